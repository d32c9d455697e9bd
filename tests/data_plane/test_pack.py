from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_pipeline import config, distributed
from ssl_pipeline.data import index as indexes
from ssl_pipeline.data import pack as packing
from ssl_pipeline.data import parallel
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
        (one.paths, one.classes, one.labelled_digest()) == (other.paths, other.classes, other.labelled_digest())
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
        digests = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in
                   sorted((tmp_path / "out" / split).glob("*.tar"))]  # fmt: skip
        lines = (tmp_path / "out" / split / "SHA256SUMS").read_text().splitlines()
        assert [line for line in lines if line[0] != "#"] == digests  # sha256sum takes lines with # for comments
    assert not list(tmp_path.rglob("*.partial"))


def test_the_tars_alone_have_the_same_order_and_labels(
    named: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A key must not be cut at a dot, tars must sort as ids, and the classes 9 and 10 keep their places."""
    pack(named, tmp_path / "out", shard_size=100_000, processes=1)
    folder, out = read_index(named / "train"), tmp_path / "out" / "train"
    (out / "index.npz").unlink()
    (tmp_path / "out" / "plan.json").unlink()
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
    """And beside the plan of `pack-shards` it is refused, with the command that mends it."""
    pack(named, tmp_path / "out", shard_size=100_000, processes=1)
    out = tmp_path / "out" / "train"
    in_first = sum(read_index(out).spans[:, 0] == 0)
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
    with pytest.raises(BadInput) as refused:
        shards(out)
    told = str(refused.value)
    again = f"`ssl-pipeline pack-shards {named} {tmp_path / 'out'} --shard-size 100000`"
    assert again in told
    lost = f"1 shard is missing, as 000000.tar, with {in_first} of 8 pictures"
    reason = lost if what == "missing shard" else words[what]
    assert reason in told
    (tmp_path / "out" / "plan.json").rename(tmp_path / "plan.json")
    found = shards(out)
    assert "index.npz is not used, and the shards are read themselves" in caplog.text
    assert words[what] in caplog.text
    assert found.paths[0].startswith("00000")
    assert all(path.split("/")[0].endswith(".tar") for path in found.paths)


def test_a_packed_folder_that_was_half_copied_is_refused_until_it_is_packed_again(named: Path, tmp_path: Path) -> None:
    pack(named, tmp_path / "out", shard_size=100_000, processes=1)
    whole = read_index(tmp_path / "out" / "train")
    (tmp_path / "out" / "train" / "index.npz").unlink()
    with pytest.raises(
        BadInput, match=r"not what `pack-shards` wrote: index.npz is missing; copy them again, or pack again"
    ):
        read_index(tmp_path / "out" / "train")
    for path in sorted((tmp_path / "out" / "train").glob("*.tar"))[1:]:
        path.unlink()
    with pytest.raises(BadInput, match=r"\d shards are missing, as 000001.tar, with \d of 8 pictures"):
        read_index(tmp_path / "out" / "train")
    pack(named, tmp_path / "out", shard_size=100_000, processes=1)
    assert same(whole, read_index(tmp_path / "out" / "train"))


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
    rolled = loader(index, shuffle="shards", window=3)
    rolled.load_state_dict(state)
    rolled.rekey(1)
    rest = [i for i, _, _ in seen(rolled)]
    assert sorted(orders[0][:16] + rest) == list(range(64))
    assert rest != orders[0][16:]
    assert max(len(set(of[rest].tolist()[place : place + 8])) for place in range(0, 48, 8)) <= 6
    other = Index(index.root, index.paths, index.labels, index.classes, index.spans // [[2, 1, 1]], index.shards)
    loader(other).load_state_dict(loader(index).state_dict())  # shards of another size: the order is the same,
    with pytest.raises(BadInput, match="names, labels or shards have changed"):  # and here it is not
        loader(other, shuffle="shards", window=3).load_state_dict(state)
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


def test_the_shards_of_imagenet_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """550 of them, by a process whose soft limit of files is lower."""
    names = tuple(f"{number:06d}.tar" for number in range(550))
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    spans = np.stack([np.arange(550), np.zeros(550), np.full(550, 10)], axis=1).astype(np.int64)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))
    opened: list[str] = []
    really = os.open
    monkeypatch.setattr(
        "ssl_pipeline.data.index.os.open", lambda path, flags: opened.append(path) or really(path, flags)
    )
    try:
        index = Index(tmp_path, names, np.zeros(550, dtype=np.int64), ("a",), spans, names)
        assert [index.read(i).tobytes().decode() for i in [*range(550)] * 2] == [*names] * 2
        assert len(opened) == 550
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (4 * indexes.OPEN_SHARDS, hard)
        # Where no more are allowed, a quarter of these.
        resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))
        monkeypatch.setattr("resource.setrlimit", lambda *_: (_ for _ in ()).throw(ValueError))
        assert indexes._opener().cache_info().maxsize == 250
    finally:
        monkeypatch.undo()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_shard_is_opened_anew_after_its_server_forgot_it(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = read_index(packed / "train")
    fresh = Index(index.root, index.paths, index.labels, index.classes, index.spans, index.shards)
    first = fresh.read(0).tobytes()
    stale = fresh._open(str(fresh.root / fresh.shards[0]))  # held: its number is not given anew
    really = os.preadv

    def preadv(number: int, *more) -> int:
        if number == stale.number:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return really(number, *more)

    monkeypatch.setattr("ssl_pipeline.data.index.os.preadv", preadv)
    with pytest.raises(OSError, match="Stale file handle"):
        fresh.read(0)
    assert fresh.read(0).tobytes() == first


def test_windows_are_read_ahead(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shards of a step and of the window after it were asked for before the step's samples are, each once, by one rank."""
    index = read_index(packed / "train")
    assert index.spans is not None
    of, shards_, windows = index.spans[:, 0], len(index.shards), 2
    asked: list[int] = []
    monkeypatch.setattr("ssl_pipeline.data.loader.Index.fetch", lambda _, shards: asked.extend(shards))
    ranks = [loader(index, rank, 2, shuffle="shards", window=windows) for rank in range(2)]
    for epoch in (0, 1):
        asked.clear()
        order = np.concatenate([loader(index, shuffle="shards", window=windows).ids(epoch, step) for step in range(4)])
        for step in range(4):
            for data in ranks:
                data._prepare(epoch, step)
            for thread in threading.enumerate():
                if thread.name == "fetch":
                    thread.join()
            coming = order[16 * step :][: 16 + 64 * windows // shards_]
            assert set(of[coming].tolist()) <= set(asked)
            if step == 0:
                assert asked[0] == of[order[0]]
                assert len(asked) < shards_
        assert sorted(asked) == list(range(shards_))
    whole = loader(index)
    asked.clear()
    whole._prepare(0, 0)
    assert asked == []


def test_fetching_asks_for_whole_shards_in_order(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = read_index(packed / "train")
    asked = []

    def advise(number: int, *what: int) -> None:
        asked.append((Path(os.readlink(f"/proc/self/fd/{number}")).name, *what))
        if len(asked) == 1:
            raise OSError(errno.EIO, "of no concern here")

    monkeypatch.setattr("ssl_pipeline.data.index.os.posix_fadvise", advise)
    index.fetch([3, 0, 1])
    whole = (0, 0, os.POSIX_FADV_WILLNEED)
    assert asked == [("000003.tar", *whole), ("000000.tar", *whole), ("000001.tar", *whole)]


def test_what_cannot_be_read_is_an_oserror(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setattr("ssl_pipeline.data.index.np.empty", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(OSError, match="no memory for") as error:
        index.read(0)
    assert error.value.errno == errno.ENOMEM


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
    flipped = out / "train" / "000004.tar"
    data = bytearray(flipped.read_bytes())
    data[600] ^= 1
    flipped.write_bytes(data)
    with (out / "train" / "SHA256SUMS").open("a") as file:
        file.write("# made from 0123")  # what a killed one left
    kept = {name: (out / "train" / name).stat().st_mtime_ns for name in ("000000.tar", "000003.tar")}
    with pytest.raises(BadInput, match=r"not complete.*give the same `ssl-pipeline pack-shards` command again"):
        read_index(out / "train")
    pack(photos, out, shard_size=150_000, processes=1)
    del wanted["index.npz"]  # its members have times
    assert {path.name: path.read_bytes() for path in sorted((out / "train").iterdir()) if path.name in wanted} == wanted
    assert {name: (out / "train" / name).stat().st_mtime_ns for name in kept} == kept
    assert same(read_index(photos / "train"), read_index(out / "train"))
    assert not [*out.rglob("*.partial"), *out.rglob(".unfinished")]


def test_a_picture_that_changed_makes_its_shard_anew(named: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(named, out, shard_size=100_000, processes=1)
    before = {path: path.stat().st_ino for path in out.rglob("*.tar")}
    index = read_index(out / "train")
    changed = named / "train" / index.paths[3]
    data = bytearray(changed.read_bytes())
    data[0] ^= 1
    changed.write_bytes(data)
    os.utime(changed, ns=(10**18, 10**18))
    (out / "train" / "index.npz").unlink()
    pack(named, out, shard_size=100_000, processes=1)
    assert same(read_index(named / "train"), read_index(out / "train"))
    assert [path for path in before if path.stat().st_ino != before[path]] == [
        out / "train" / index.shards[index.spans[3, 0]]
    ]


def test_it_ends_where_only_its_mark_was_left(named: Path, tmp_path: Path) -> None:
    """As where it was killed between the index and the end."""
    pack(named, tmp_path / "out", processes=1)
    (tmp_path / "out" / "val" / ".unfinished").touch()
    pack(named, tmp_path / "out", processes=1)
    assert len(read_index(tmp_path / "out" / "val")) == len(read_index(named / "val"))


def children(process: int) -> list[int]:
    return [int(word) for path in Path(f"/proc/{process}/task").glob("*/children") for word in path.read_text().split()]


def runs(process: int) -> bool:
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_for(what) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_kill_leaves_nothing_that_trains_and_nobody_who_writes(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    for split, count in (("train", 200), ("val", 1)):
        (source / split / "a").mkdir(parents=True)
        for number in range(count):
            with (source / split / "a" / f"{number:03d}.jpg").open("wb") as file:
                file.write(bytes([number]) * 90_000)
    line = f"{sys.executable} -m ssl_pipeline pack-shards {source} {out} --shard-size 0.1MB --processes 2".split()
    with subprocess.Popen(line, stderr=subprocess.PIPE) as packer:
        try:
            wait_for(lambda: len(list((out / "train").glob("[!.]*.tar"))) >= 3)
            packer.send_signal(signal.SIGSTOP)  # in the midst of it and with its lock, however fast this machine is
            with pytest.raises(BadInput, match="another pack-shards is writing"):
                pack(source, out, shard_size=100_000)
            workers = children(packer.pid)
            assert len(workers) >= 2
        finally:
            packer.kill()
        assert packer.wait() == -signal.SIGKILL
    wait_for(lambda: not any(map(runs, workers)))
    done = {path: path.stat().st_mtime_ns for path in sorted((out / "train").glob("[!.]*.tar"))}
    assert 3 <= len(done) < 200
    for split in ("train", "val"):
        with pytest.raises(BadInput, match="not complete"):
            read_index(out / split)
    recorded = indexes.read_sums(out / "train")
    assert {path.name for path in done} >= set(recorded)
    assert len(done) - len(recorded) <= 4  # what was being written, or told of
    pack(source, out, shard_size=100_000, processes=2)
    for split in ("train", "val"):
        assert same(read_index(source / split), read_index(out / split))
    assert [path.name for path in done if path.stat().st_mtime_ns == done[path]] == sorted(recorded)


def test_what_cannot_be_read_is_packed_as_an_empty_picture(
    named: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, out = named / "train" / "10", tmp_path / "out"
    (folder / "link.jpg").symlink_to(tmp_path / "nowhere")
    (folder / "circle.jpg").symlink_to("circle.jpg")
    os.mkfifo(folder / "pipe.jpg")
    for encoding in (None, Encoding(50, 90)):
        done = pack(named, out, encoding=encoding, processes=1)["train"]
        assert done.empty == ("10/circle.jpg", "10/link.jpg", "10/pipe.jpg", "9/empty.jpg")
        for name, reason in (("link", "No such file"), ("circle", "Too many levels"), ("pipe", "no regular file")):
            assert caplog.text.count(f"not read, and packed as an empty picture: {folder}/{name}.jpg: {reason}") == 1
        found = read_index(out / "train")
        assert (found.paths, found.labels.tolist()) == (
            read_index(named / "train").paths,
            read_index(named / "train").labels.tolist(),
        )
        assert pack(named, out, encoding=encoding)["train"].empty == done.empty  # said again when nothing is to be done
        caplog.clear()
        shutil.rmtree(out)


def test_a_picture_that_can_be_read_again_is_packed(
    named: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its size and time say nothing of that: its rights were changed, or what lies below was mounted."""
    monkeypatch.setattr(packing, "each", lambda work, jobs, processes: ((job, work(job)) for job in jobs))
    whole, read, out = read_index(named / "train"), Index.read, tmp_path / "out"
    wrong = {"10/a/z.JPEG": errno.EACCES, "9/x.png": errno.EIO}

    def refuse(index: Index, sample: int) -> np.ndarray:
        if index.paths[sample] in wrong:
            raise OSError(wrong[index.paths[sample]], "is wrong")
        return read(index, sample)

    monkeypatch.setattr(Index, "read", refuse)
    with pytest.raises(
        StorageFailure, match=r"cannot read .*/9/x.png': is wrong; the same command goes on once it can"
    ):
        pack(named, out, shard_size=100_000)
    assert len(list((out / "train").glob("[!.]*.tar"))) >= 1
    wrong.clear()
    assert pack(named, out, shard_size=100_000)["train"].empty == ("9/empty.jpg",)
    assert same(whole, read_index(out / "train"))


def test_a_source_that_is_gone_is_not_packed(tmp_path: Path) -> None:
    for number in range(11):
        path = tmp_path / "source" / "train" / "a" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(tmp_path / "unmounted" / f"{number}.jpg")
    with pytest.raises(StorageFailure, match=r"11 pictures below .* cannot be read, as .*: No such file.*mounted"):
        pack(tmp_path / "source", tmp_path / "out", processes=1)
    with pytest.raises(BadInput, match="not complete"):
        read_index(tmp_path / "out" / "train")
    (tmp_path / "unmounted").mkdir()
    for number in range(11):
        (tmp_path / "unmounted" / f"{number}.jpg").write_bytes(b"x")
    assert not pack(tmp_path / "source", tmp_path / "out", processes=1)["train"].empty


def test_classes_that_differ_are_refused(named: Path, tmp_path: Path) -> None:
    shutil.rmtree(named / "val" / "9")
    with pytest.raises(BadInput, match=r"train/ and val/ in .* hold different classes, as '9'"):
        pack(named, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shutil.rmtree(named / "val")
    (named / "val").mkdir()
    (named / "val" / "1.jpg").touch()  # without labels, there are none to mistake
    assert pack(named, tmp_path / "out", processes=1)["val"].pictures == 1


def test_how_far_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    now = [100.0]
    monkeypatch.setattr(parallel.time, "monotonic", lambda: now[0])
    line = parallel.ProgressLine("packing train", 1000)
    line.add(600, before=True)  # finished before a kill
    for _ in range(3):
        now[0] += 20
        line.add(100)
    now[0] += 1
    line.add(100)
    assert [row.getMessage() for row in caplog.records] == [
        "packing train: 800 of 1,000 (80 %), 5 a second, 0:00:40 left",
        "packing train: 1,000 of 1,000 (100 %), 7 a second, 0:00:00 left",
    ]


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


def test_a_shard_is_read_back_before_it_has_its_name(
    named: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = read_index(named / "train")
    target = tmp_path / "a.tar"
    job = packing._Job(str(index.root), index.paths, tuple(index.labels.tolist()), 0, str(target), None, None)
    flush, times = os.posix_fadvise, []

    def flushed(number: int, *rest: int) -> None:
        """The disk keeps another byte than it was given, in the midst of a picture."""
        assert not target.exists()
        times.append(os.pwrite(number, bytes([os.pread(number, 1, 5000)[0] ^ len(times)]), 5000))
        flush(number, *rest)

    monkeypatch.setattr(os, "posix_fadvise", flushed)
    shard = packing._write_shard(job)  # the first time, the byte is right
    assert [size for _, size in shard.spans] == [len(index.read(i)) for i in range(8)]
    assert shard.sum == hashlib.sha256(target.read_bytes()).hexdigest()
    target.unlink()
    with pytest.raises(StorageFailure, match=r"\.a\.tar\.partial could not be read back as it was written"):
        packing._write_shard(job)
    assert not list(tmp_path.glob("*a.tar*"))
    assert len(times) == 2


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
    (tmp_path / "out" / "plan.json").unlink()
    assert shards(tmp_path / "out" / "train").labels.tolist() == [-1] * 3


def test_the_verb(named: Path, tmp_path: Path, command) -> None:
    done = command("pack-shards", named, tmp_path / "out", "--shard-size", "0.1MB", "--processes", 1)
    assert done.returncode == 0, done.stderr
    assert "train: 8 pictures" in done.stdout
    wrong = command("pack-shards", named, tmp_path / "out2", "--shard-size", "many")
    assert (wrong.returncode, "'many' is no size" in wrong.stderr) == (2, True)
    alone = command("pack-shards", named, tmp_path / "out2", "--quality", 80)
    assert (alone.returncode, "--short-side" in alone.stderr) == (2, True)
