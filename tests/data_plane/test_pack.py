from __future__ import annotations

import hashlib
import io
import itertools
import os
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_pipeline import config, distributed
from ssl_pipeline.data import index as indexes
from ssl_pipeline.data import pack as packing
from ssl_pipeline.data.index import Index, read_index, shards
from ssl_pipeline.data.loader import Loader
from ssl_pipeline.data.pack import Encoding, pack
from ssl_pipeline.exits import BadInput, StorageFailure
from ssl_pipeline.pretrain import PretrainConfig

NAMES = ("10/b.c.jpg", "10/a/z.JPEG", "9/x y.png", "9/x.png", "9-1/1.jpg", "ü/é.jpg", "a.b/1.2.3.webp", "a.b/._no.jpg")


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """Names that WebDataset would cut, classes that are numbers, orders that differ with a slash or without."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in NAMES:
            path = tmp_path / "folder" / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(rng.bytes(int(rng.integers(0, 60_000))))
    (tmp_path / "folder" / "train" / "9" / "empty.jpg").touch()
    return tmp_path / "folder"


def same(one: Index, other: Index) -> bool:
    return (
        (one.paths, one.classes, one.digest()) == (other.paths, other.classes, other.digest())
        and np.array_equal(one.labels, other.labels)
        and all(one.read(i).tobytes() == other.read(i).tobytes() for i in range(len(one)))
    )


def test_shards_have_the_ids_labels_classes_and_bytes_of_the_folder(named: Path, tmp_path: Path) -> None:
    done = pack(named, tmp_path / "out", shard_size=100_000, processes=2)
    assert done["train"].pictures == 8
    assert done["train"].shards > 2
    for split in ("train", "val"):
        assert same(read_index(named / split), read_index(tmp_path / "out" / split))
        assert all(path.stat().st_size <= 100_000 for path in (tmp_path / "out" / split).glob("*.tar"))
    assert not list(tmp_path.rglob("*.partial"))


def test_the_tars_alone_have_the_same_order_and_labels(
    named: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A key must not be cut at a dot, tars must sort as ids, and the classes 9 and 10 keep their places."""
    pack(named, tmp_path / "out", shard_size=100_000, processes=1)
    folder, out = read_index(named / "train"), tmp_path / "out" / "train"
    (out / "index.npz").unlink()
    alone = shards(out)
    assert "is not used" not in caplog.text
    assert alone.labels.tolist() == folder.labels.tolist()
    assert [alone.read(i).tobytes() for i in range(8)] == [folder.read(i).tobytes() for i in range(8)]
    keys = []
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as archive:
            keys += [name.split(".")[0] for name in archive.getnames()]
    assert keys == sorted(keys)  # WebDataset groups neighbours of one key
    assert [keys.count(key) for key in set(keys)] == [2] * 8


@pytest.mark.parametrize("what", ["damaged", "missing shard", "further shard", "other size", "outside", "version"])
def test_an_index_that_does_not_fit_is_told_of_and_not_used(
    what: str, named: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pack(named, tmp_path / "out", shard_size=100_000, processes=1)
    out = tmp_path / "out" / "train"
    files = sorted(out.glob("*.tar"))
    if what == "damaged":
        data = bytearray((out / "index.npz").read_bytes())
        data[len(data) // 2] ^= 1
        (out / "index.npz").write_bytes(data)
    elif what == "missing shard":
        files[0].unlink()
    elif what == "further shard":
        shutil.copyfile(files[0], out / "x.tar")
    elif what == "other size":
        files[0].write_bytes(files[0].read_bytes() + bytes(10240))
    else:
        values = dict(np.load(out / "index.npz"))
        values["spans"][3, 1] += 10**7 * (what == "outside")
        values["version"] = values["version"] + (what == "version")
        np.savez(out / "index.npz", **values)
    words = {
        "damaged": "it is damaged", "missing shard": "000000.tar is missing", "further shard": "x.tar is not in it",
        "other size": "000000.tar has another size", "outside": "it points outside the shards", "version": "of version 2",
    }  # fmt: skip
    found = shards(out)
    assert "index.npz is not used, and the shards are read themselves" in caplog.text
    assert words[what] in caplog.text
    assert found.paths[0].startswith("00000")
    assert all(path.split("/")[0].endswith(".tar") for path in found.paths)


VIEWS = config.validate(PretrainConfig, config.load("imagenet/byol").values).data.views
SMALL = [view.model_copy(update={"size": 40}) for view in VIEWS]


def loader(index: Index, rank: int = 0, size: int = 1, **more) -> Loader:
    world = distributed.World(rank, size, rank, size, torch.device("cpu"))
    return Loader(index, SMALL, 16, seed=3, world=world, threads=1, **more)


def seen(data: Loader) -> list[tuple[int, int, str]]:
    """(id, label, digest of both views) of the rest of the epoch."""
    rows = []
    for batch in data:
        for i, label, *views in zip(batch.ids.tolist(), batch.labels.tolist(), *batch.views, strict=True):
            rows.append(
                (i, label, hashlib.sha256(b"".join(v.contiguous().numpy().tobytes() for v in views)).hexdigest())
            )
    return rows


@pytest.fixture(scope="module")
def packed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    assert pack(photos, out, shard_size=150_000, processes=2)["train"].shards > 5
    return out


def test_a_loader_gives_the_same_bits_from_both_and_goes_on_from_one_with_the_other(photos: Path, packed: Path) -> None:
    folder, tars = read_index(photos / "train"), read_index(packed / "train")
    assert tars.spans is not None
    whole = seen(loader(folder))
    assert seen(loader(tars)) == whole
    assert len(whole) == 64
    for first, second in ((folder, tars), (tars, folder)):
        begun = loader(first)
        next(iter(begun))
        state = begun.state_dict()
        parts = []
        for rank in range(2):
            part = loader(second, rank, 2)
            part.load_state_dict(state)
            parts.append(seen(part))
        assert [row for pair in zip(*parts, strict=True) for row in pair] == whole[16:]


def test_shards_shuffled_in_windows(photos: Path, packed: Path) -> None:
    index = read_index(packed / "train")
    assert index.spans is not None
    of = index.spans[:, 0]
    data = loader(index, shuffle="shards", window=3)
    orders = [[int(i) for step in range(4) for i in data.ids(epoch, step)] for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(64))
        windows = [sorted(set(of[order].tolist()[place : place + 8])) for place in range(0, 64, 8)]
        assert max(map(len, windows)) <= 6  # of two windows at most
    assert orders[0] != orders[1]
    whole = seen(data)
    assert [i for i, _, _ in whole] == orders[0]
    halves = [seen(loader(index, rank, 2, shuffle="shards", window=3)) for rank in range(2)]
    assert [row for pair in zip(*halves, strict=True) for row in pair] == whole
    begun = loader(index, shuffle="shards", window=3)
    next(iter(begun))
    state = begun.state_dict()
    assert set(state) == set(loader(index).state_dict())
    again = loader(index, shuffle="shards", window=3)
    again.load_state_dict(state)
    assert seen(again) == whole[16:]
    with pytest.raises(BadInput, match=r"data.shuffle = shards reads tar shards, and .* is a folder.*pack-shards"):
        loader(read_index(photos / "train"), shuffle="shards")


def read(index: Index, sample: int) -> bytes:
    return index.read(sample).tobytes()


def test_any_number_of_threads_reads_few_open_files(
    photos: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexes, "OPEN_SHARDS", 2)
    folder, tars = read_index(photos / "train"), read_index(packed / "train")
    fresh = Index(tars.root, tars.paths, tars.labels, tars.classes, tars.spans, tars.shards)
    before = len(os.listdir("/proc/self/fd"))
    samples = np.random.default_rng(0).integers(0, 64, 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read, itertools.repeat(fresh), samples))
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    wanted = [folder.read(i).tobytes() for i in range(64)]
    assert found == [wanted[i] for i in samples]
    del fresh
    assert len(os.listdir("/proc/self/fd")) <= before


def test_what_cannot_be_read_is_an_oserror(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed / "train", tmp_path / "train")
    index = read_index(tmp_path / "train")
    last = tmp_path / "train" / index.shards[-1]
    os.truncate(last, last.stat().st_size // 4)
    with pytest.raises(OSError, match="the file ends .* bytes before the picture does"):
        index.read(63)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "a.jpg")
    with pytest.raises(OSError, match="no regular file"):
        read_index(tmp_path / "pipe").read(0)


def test_it_goes_on_where_it_was_stopped(photos: Path, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(packed, out)
    wanted = {path.name: path.read_bytes() for path in sorted((out / "train").iterdir())}
    (out / "train" / "index.npz").unlink()
    (out / "train" / ".unfinished").touch()
    (out / "train" / "000001.tar").unlink()
    (out / "train" / ".000001.tar.partial").write_bytes(b"half of it")
    other = out / "train" / "000002.tar"
    other.write_bytes(other.read_bytes()[:1000])
    kept = {name: (out / "train" / name).stat().st_mtime_ns for name in ("000000.tar", "000003.tar")}
    with pytest.raises(BadInput, match=r"not complete.*give the same `ssl-pipeline pack-shards` command again"):
        read_index(out / "train")
    pack(photos, out, shard_size=150_000, processes=1)
    assert {path.name: path.read_bytes() for path in sorted((out / "train").glob("*.tar"))} == {
        name: data for name, data in wanted.items() if name.endswith(".tar")
    }
    assert {name: (out / "train" / name).stat().st_mtime_ns for name in kept} == kept
    assert same(read_index(photos / "train"), read_index(out / "train"))
    assert not [*out.rglob("*.partial"), *out.rglob(".unfinished")]


def test_what_does_not_fit_is_refused(named: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(named, out, shard_size=100_000, processes=1)
    with pytest.raises(BadInput, match=r"begun with shard-size = 100000, and this asks for 200000"):
        pack(named, out, shard_size=200_000)
    with pytest.raises(BadInput, match=r"begun with short-side = None, and this asks for 32"):
        pack(named, out, shard_size=100_000, encoding=Encoding(32, 90))
    (named / "train" / "9" / "new.jpg").touch()
    with pytest.raises(BadInput, match=r"not those that .*out' was begun with"):
        pack(named, out, shard_size=100_000)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(BadInput, match="holds something else"):
        pack(named, tmp_path / "full")
    with pytest.raises(BadInput, match="lies in the pictures"):
        pack(named, named / "train" / "out")
    with pytest.raises(BadInput, match="neither train/ nor val/"):
        pack(tmp_path / "full", tmp_path / "other")
    with pytest.raises(BadInput, match="holds tar shards already"):
        pack(out, tmp_path / "other")
    for wrong in ({"shard_size": 10}, {"encoding": Encoding(0, 90)}, {"encoding": Encoding(9, 101)}):
        with pytest.raises(BadInput, match="--shard-size|--short-side|--quality"):
            pack(named, tmp_path / "other", **wrong)
    assert not (tmp_path / "other").exists()
    (out / "plan.json").write_text("{")
    with pytest.raises(BadInput, match=r"plan.json' is damaged"):
        pack(named, out, shard_size=100_000)


def test_a_shard_that_is_not_what_was_written_is_found(named: Path, tmp_path: Path) -> None:
    index = read_index(named / "train")
    job = packing._Job(str(index.root), index.paths, tuple(index.labels.tolist()), 0, str(tmp_path / "a.tar"), None)
    shard = packing._write_shard(job)
    assert [size for _, size in shard.spans] == [len(index.read(i)) for i in range(8)]
    with tarfile.open(tmp_path / "a.tar") as archive:
        written = [(m.name, packing._digest(archive.extractfile(m).read()), None) for m in archive.getmembers()]
    packing._verify(tmp_path / "a.tar", written)
    with pytest.raises(StorageFailure, match="could not be read back as it was written .more."):
        packing._verify(tmp_path / "a.tar", written[:-1])
    packing._write_shard(job)
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[shard.spans[2][0]] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(StorageFailure, match=r"could not be read back as it was written .000000002"):
        packing._verify(tmp_path / "a.tar", written)
    assert not (tmp_path / "a.tar").exists()


def test_pictures_are_encoded_again(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "source"
    shutil.copytree(photos / "val", source / "train")
    folder = source / "train" / "china"
    photo = Image.open(next(path for path in sorted(folder.iterdir()) if min(Image.open(path).size) > 90))
    pixels = np.asarray(photo.resize((60, 90)))
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(folder / "turned.jpg", exif=turned)
    Image.fromarray(pixels).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(pixels[..., 0]).save(folder / "gray.jpg")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 256).save(folder / "deep.png")
    (folder / "text.jpg").write_bytes(b"no picture")
    (folder / "half.jpg").write_bytes((folder / "cmyk.jpg").read_bytes()[:2000])
    done = pack(source, tmp_path / "out", encoding=Encoding(50, 95), processes=1)
    before, after = read_index(source / "train"), read_index(tmp_path / "out" / "train")
    assert (before.paths, before.labels.tolist()) == (after.paths, after.labels.tolist())
    kept = {Path(text.partition(":")[0]).name for text in done["train"].kept}
    assert kept == {"text.jpg", "half.jpg", "deep.png"}
    for name in kept:
        assert caplog.text.count(f"{name}:") == 1
    for sample, path in enumerate(before.paths):
        old, new = before.read(sample).tobytes(), after.read(sample).tobytes()
        with io.BytesIO(old) as raw:
            size = None if Path(path).name in kept else Image.open(raw).size
        if size is None or min(size) <= 50:
            assert old == new
            continue
        picture = Image.open(io.BytesIO(new))
        assert (picture.format, min(picture.size)) == ("JPEG", 50)
        assert picture.size == tuple(round(side * 50 / min(size)) for side in size)
        assert picture.mode == ("L" if "gray" in path else "RGB")
        assert 0x0112 not in picture.getexif()
        # The luma (JPEG halves the resolution of colours) is that of the picture as it is stored.
        wanted = np.asarray(
            Image.open(io.BytesIO(old)).convert("RGB").resize(picture.size, 3).convert("L"), dtype=float
        )
        assert np.abs(np.asarray(picture.convert("L"), dtype=float) - wanted).mean() < 3


def test_pictures_without_labels(photos: Path, tmp_path: Path) -> None:
    for name in ("b.jpg", "a.x.jpg", "more/c.jpg"):
        path = tmp_path / "flat" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(photos / "train" / "china" / "000.jpg", path)
    pack(tmp_path / "flat", tmp_path / "out", processes=1)
    found = read_index(tmp_path / "out" / "train")
    assert same(read_index(tmp_path / "flat" / "train"), found)
    assert (found.paths, found.labels.tolist(), found.classes) == (("a.x.jpg", "b.jpg", "more/c.jpg"), [-1] * 3, ())
    (tmp_path / "out" / "train" / "index.npz").unlink()
    assert shards(tmp_path / "out" / "train").labels.tolist() == [-1] * 3


def test_the_verb(named: Path, tmp_path: Path, command) -> None:
    done = command("pack-shards", named, tmp_path / "out", "--shard-size", "0.1MB", "--processes", 1)
    assert done.returncode == 0, done.stderr
    assert "train: 8 pictures" in done.stdout
    wrong = command("pack-shards", named, tmp_path / "out2", "--shard-size", "many")
    assert (wrong.returncode, "'many' is no size" in wrong.stderr) == (2, True)
    alone = command("pack-shards", named, tmp_path / "out2", "--quality", 80)
    assert (alone.returncode, "--short-side" in alone.stderr) == (2, True)
