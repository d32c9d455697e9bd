from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from ssl_pipeline import config, distributed
from ssl_pipeline.data import loader
from ssl_pipeline.data.augment import ViewSpec
from ssl_pipeline.data.index import Index, image_folder
from ssl_pipeline.data.loader import Loader
from ssl_pipeline.exits import BadInput, StorageFailure
from ssl_pipeline.pretrain import PretrainConfig
from ssl_pipeline.run_folder import RunFolder
from ssl_pipeline.watchdog import Watchdog
from tests.ranks import on_ranks

VIEWS = config.validate(PretrainConfig, config.load("imagenet/byol").values).data.views
SMALL = [view.model_copy(update={"size": 48}) for view in VIEWS]


def place(rank: int, size: int) -> distributed.World:
    return distributed.World(rank, size, rank, size, torch.device("cpu"))


def make(root: Path, rank: int = 0, size: int = 1, batch: int = 16, **more) -> Loader:
    index = image_folder(root / "train")
    return Loader(index, SMALL, batch, seed=5, world=place(rank, size), threads=1, **more)


def digest(view: torch.Tensor) -> str:
    return hashlib.sha256(view.contiguous().numpy().tobytes()).hexdigest()


def seen(loader: Loader, epochs: int = 1) -> list[tuple[int, int, str]]:
    """(epoch, id, digest of both views) of every picture, in order."""
    rows = []
    for _ in range(epochs):
        epoch = loader.epoch
        for batch in loader:
            rows += [(epoch, int(i), digest(a) + digest(b)) for i, a, b in zip(batch.ids, *batch.views, strict=True)]
    return rows


def test_batches(photos: Path) -> None:
    data = make(photos)
    assert len(data) == 4
    batch = next(iter(data))
    assert [tuple(v.shape) for v in batch.views] == [(16, 3, 48, 48)] * 2
    assert batch.views[0].dtype == torch.float32
    assert not torch.equal(*batch.views)
    assert batch.labels.tolist() == data.index.labels[batch.ids].tolist()


def test_every_sample_once_an_epoch_and_every_epoch_differs(photos: Path) -> None:
    rows = seen(make(photos), epochs=2)
    first, second = rows[:64], rows[64:]
    assert sorted(i for _, i, _ in first) == sorted(i for _, i, _ in second) == list(range(64))
    assert [i for _, i, _ in first] != [i for _, i, _ in second]
    assert {d for *_, d in first}.isdisjoint({d for *_, d in second})
    # 64 pictures in batches of 24: two batches, and 16 pictures of another choice each epoch are dropped.
    assert len(seen(make(photos, batch=24))) == 48


def test_the_same_pictures_whatever_the_number_of_ranks(photos: Path) -> None:
    one = seen(make(photos))
    two = [seen(make(photos, rank, 2)) for rank in range(2)]
    four = [seen(make(photos, rank, 4)) for rank in range(4)]
    assert [row for pair in zip(*two, strict=True) for row in pair] == one
    assert [row for quad in zip(*four, strict=True) for row in quad] == one


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 6])
def test_stopped_and_gone_on_is_never_stopped(photos: Path, stop: int) -> None:
    whole = seen(make(photos), epochs=2)
    data = make(photos)
    rows, state, done = [], data.state_dict(), 0
    while done < stop:
        for batch in data:
            rows += [
                (data.epoch, int(i), digest(a) + digest(b)) for i, a, b in zip(batch.ids, *batch.views, strict=True)
            ]
            done += 1
            state = data.state_dict()
            if done == stop:
                break
    again = make(photos)
    again.load_state_dict(state)
    rest = seen(again)
    if len(rows) + len(rest) < 128:
        rest += seen(again)
    assert rows + rest == whole


def test_another_number_of_ranks_finishes_the_epoch(photos: Path) -> None:
    whole = seen(make(photos))
    data = make(photos)
    iterator = iter(data)
    next(iterator)
    state = data.state_dict()
    parts = []
    for rank in range(2):
        part = make(photos, rank, 2)
        part.load_state_dict(state)
        parts.append(seen(part))
    assert [row for pair in zip(*parts, strict=True) for row in pair] == whole[16:]


def test_after_a_rollback_the_rest_of_the_epoch_comes_once_and_otherwise(photos: Path) -> None:
    plain, next_epoch = seen(make(photos)), seen(make(photos), epochs=2)[64:]
    data = make(photos)
    rows = []
    for done in (1, 2):  # twice in one epoch
        for batch in data:
            rows += batch.ids.tolist()
            break
        made_ahead = data._ahead
        data.rekey(done)
        assert not made_ahead
    assert data.rollbacks == 2
    state = data.state_dict()
    rest = seen(data)
    ids = [sample for _, sample, _ in rest]
    assert rows[:16] == [sample for _, sample, _ in plain[:16]]
    assert rows[16:] != [sample for _, sample, _ in plain[16:32]]
    assert sorted(rows + ids) == list(range(64))
    assert set(rest) < set(plain)  # the same views of each
    assert [sample for step in range(4) for sample in data.batch_ids(0, step)] == rows + ids
    parts = []
    for rank in range(2):
        part = make(photos, rank, 2)
        part.load_state_dict(state)
        assert part.rollbacks == 2
        parts.append(seen(part))
    assert [row for pair in zip(*parts, strict=True) for row in pair] == rest
    assert seen(data) == next_epoch


def test_a_rollback_to_the_end_of_an_epoch_is_of_the_next_one(photos: Path) -> None:
    plain = [[sample for _, sample, _ in seen(make(photos), epochs=2)[64:]]]
    for rollbacks in (1, 2):
        data = make(photos)
        for _ in range(3):
            next(iter(data))
        for _ in data:
            data.load_state_dict(data.state_dict())  # as of a checkpoint at the epoch's end
            break
        data.rekey(rollbacks)
        plain.append([sample for _, sample, _ in seen(data)])
    assert all(sorted(order) == list(range(64)) for order in plain)
    assert len({tuple(order) for order in plain}) == 3


def test_evaluation_is_one_pass_in_order_with_nothing_dropped(photos: Path) -> None:
    index = image_folder(photos / "train")
    plain = config.validate(ViewSpec, {"size": 32, "ops": [{"op": "center_crop", "resize": 32}, {"op": "normalize"}]})
    data = Loader(index, [plain], 24, seed=0, world=place(0, 1), threads=1, training=False)
    ids = [int(i) for batch in data for i in batch.ids]
    assert ids == list(range(64))
    assert len(data) == 3


BAD = {
    "empty.jpg": b"",
    "text.jpg": b"this is no picture, whatever it is called",
    "header_only.jpg": None,
}


@pytest.fixture
def with_bad_files(photos: Path, tmp_path: Path) -> Path:
    for path in (photos / "train").rglob("*.jpg"):
        target = tmp_path / path.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    whole = (tmp_path / "train" / "china" / "000.jpg").read_bytes()
    for name, data in BAD.items():
        (tmp_path / "train" / "china" / name).write_bytes(whole[:700] if data is None else data)
    return tmp_path


def test_bad_files_are_replaced_named_once_and_leave_the_others_as_they_are(
    with_bad_files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = make(with_bad_files, batch=67)
    rows = seen(data, epochs=2)
    bad = {i for i, path in enumerate(data.index.paths) if Path(path).name in BAD}
    assert set(data.all_bad()) == set(data.all_bad()) == bad
    for name in BAD:
        assert caplog.text.count(f"{name}:") == 1
    for epoch in (0, 1):
        wanted = data.ids(epoch, 0)
        got = [i for e, i, _ in rows if e == epoch]
        assert [int(w) for w in wanted if w not in bad] == [g for g, w in zip(got, wanted, strict=True) if w not in bad]
        assert not bad & set(got)
    # The state remembers them, and a loader that goes on from it does not ask them again.
    again = make(with_bad_files, batch=67)
    again.load_state_dict(data.state_dict())
    assert set(again.bad) == bad


def test_what_only_dali_cannot_decode_is_found(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    for number, path in enumerate(sorted((photos / "train" / "china").glob("*.jpg"))[:8]):
        (folder / f"{number}.jpg").write_bytes(path.read_bytes())
    damaged = bytearray((folder / "3.jpg").read_bytes())
    # The size in the header stays; the Huffman tables are wiped.
    place = damaged.index(b"\xff\xc4")
    damaged[place + 4 : place + 30] = bytes(26)
    (folder / "3.jpg").write_bytes(damaged)
    assert loader.picture_size(np.frombuffer(bytes(damaged), dtype=np.uint8))
    assert not loader.decodes([np.frombuffer(bytes(damaged), dtype=np.uint8)], "cpu", torch.device("cpu"))
    data = make(tmp_path, batch=4)
    rows = seen(data, epochs=2)
    assert data.bad == {3: "damaged"}
    assert len(rows) == 16
    assert 3 not in {i for _, i, _ in rows}


def test_formats_and_sizes(tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8))
    for kind in ("PNG", "JPEG", "BMP", "WEBP"):
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        assert loader.picture_size(np.frombuffer(buffer.getvalue(), dtype=np.uint8)) == (30, 50)
    buffer = io.BytesIO()
    picture.save(buffer, "GIF")
    with pytest.raises(ValueError, match="no picture"):
        loader.picture_size(np.frombuffer(buffer.getvalue(), dtype=np.uint8))


def test_a_missing_dali_is_one_sentence(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(BadInput, match=r"DALI is not installed.*ssl-pipeline\[cuda13\].*ssl-pipeline\[cuda12\]"):
        make(photos)


def test_additional_photographs_are_read(test_data: Path, tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(test_data / "imagenet_sample.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    data = make(tmp_path, batch=50)
    rows = seen(data)
    assert sorted(i for _, i, _ in rows) == list(range(200))
    assert data.bad == {}


@pytest.mark.parametrize("sizes", [[(32, 32), (40, 32)], [(64, 64)] * 2])
def test_pictures_that_do_not_have_the_views_size_are_refused(tmp_path: Path, sizes: list[tuple[int, int]]) -> None:
    for number, (height, width) in enumerate(sizes):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.new("RGB", (width, height)).save(tmp_path / "a" / f"{number}.png")
    plain = config.validate(ViewSpec, {"size": 32, "ops": [{"op": "normalize"}]})
    data = Loader(image_folder(tmp_path), [plain], 2, seed=0, world=place(0, 1), threads=1, training=False)
    with pytest.raises(BadInput, match=r"a view of size 32 that resizes nothing: add .op: crop_resize"):
        next(iter(data))


def test_views_of_several_sizes(photos: Path) -> None:
    """SwAV's two large and six small crops: each of its own box, whatever other views there are and on any rank."""
    specs = config.validate(PretrainConfig, config.load("imagenet/swav").values).data.views
    specs = [spec.model_copy(update={"size": size}) for spec, size in zip(specs, (48, 24), strict=True)]
    index = image_folder(photos / "train")

    def first(views: list[ViewSpec], rank: int = 0, size: int = 1) -> list[torch.Tensor]:
        return next(iter(Loader(index, views, 16, seed=5, world=place(rank, size), threads=1))).views

    views = first(specs)
    assert [tuple(view.shape) for view in views] == [(16, 3, 48, 48)] * 2 + [(16, 3, 24, 24)] * 6
    assert len({digest(view) for view in views}) == 8
    assert [digest(view) for view in first(specs[:1])] == [digest(view) for view in views[:2]]
    halves = [first(specs, rank, 2) for rank in range(2)]
    for whole, even, odd in zip(views, *halves, strict=True):
        assert digest(torch.stack([even, odd], dim=1).flatten(0, 1)) == digest(whole)


def test_a_batch_that_is_kept_stays_as_it_is(photos: Path) -> None:
    """Batches are not copied out of DALI: what it makes later must not be written into them."""
    data = make(photos, prefetch=3)
    kept = [batch for _ in range(3) for batch in data]
    assert [digest(a) + digest(b) for batch in kept for a, b in zip(*batch.views, strict=True)] == [
        d for *_, d in seen(make(photos), epochs=3)
    ]
    kept[0].views[0].add_(1)  # it belongs to the caller


def encoded(picture: Image.Image, kind: str = "JPEG", **more) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **more)
    return buffer.getvalue()


def odd_files() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Strange files that are good, and bad ones, by name."""
    photo = Image.fromarray(np.asarray(load_sample_images().images[0])[:120, :160])
    turned = Image.Exif()
    turned[0x112] = 6  # to be shown after a quarter turn
    deep = Image.fromarray(np.asarray(photo.convert("L"), dtype=np.uint16) * 257)
    good = {
        "cmyk.jpg": encoded(photo.convert("CMYK")),
        "gray.jpg": encoded(photo.convert("L")),
        "png.JPEG": encoded(photo, "PNG"),
        "16 bit.png": encoded(deep, "PNG"),
        "exif.jpg": encoded(photo, exif=turned),
        "1x1.jpg": encoded(photo.resize((1, 1))),
        "20000x200.jpg": encoded(photo.resize((20_000, 200))),
        "alpha.png": encoded(photo.convert("RGBA"), "PNG"),
        "n\u00e4m\u00e9 \u56fe \u0444.jpg": encoded(photo),
    }
    whole = encoded(photo)
    tables = whole.index(b"\xff\xc4") + 4
    bad = {
        "truncated.jpg": whole[: len(whole) // 2],
        "cut in the header.jpg": whole[:200],
        "empty.jpg": b"",
        "text.jpg": b"this is no picture, whatever it is called",
        "truncated.png": encoded(photo, "PNG")[:9000],
        "only DALI sees it.jpg": whole[:tables] + bytes(26) + whole[tables + 26 :],
    }
    return good, bad


@pytest.mark.parametrize("name", ["cmyk.jpg", "gray.jpg", "png.JPEG", "exif.jpg", "alpha.png", "16 bit.png"])
def test_strange_pictures_are_what_pil_says(name: str, tmp_path: Path) -> None:
    data = odd_files()[0][name]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_bytes(data)
    plain = {"op": "normalize", "mean": [0, 0, 0], "std": [1, 1, 1]}
    spec = config.validate(ViewSpec, {"size": 120, "ops": [{"op": "center_crop", "resize": 120}, plain]})
    (batch,) = Loader(image_folder(tmp_path), [spec], 1, seed=0, world=place(0, 1), threads=1, training=False)
    picture = Image.open(io.BytesIO(data))
    if name == "16 bit.png":  # PIL's convert("RGB") clips at 255 of 65535
        picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    expected = np.asarray(picture.convert("RGB"))[:, 20:140]
    np.testing.assert_allclose(batch.views[0][0].permute(1, 2, 0).numpy() * 255, expected, atol=1e-3)


def meet(root: str, gone: str, epochs: int) -> list:
    """On each rank: rows of (epoch, wanted id, id, digest), the lines logged, and the state. `gone` vanishes in mid-run."""
    world = distributed.start()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("ssl_pipeline")
    log.addHandler(handler)
    data = Loader(image_folder(Path(root)), SMALL, 20, seed=5, world=world, threads=1)
    rows = []
    for epoch in range(epochs):
        for step, batch in enumerate(data):
            if (epoch, step) == (1, 0) and gone and world.is_main:
                (Path(root) / gone).unlink()
            distributed.together(lambda: None)
            wanted = data.ids(epoch, step).tolist()
            digests = [digest(a) + digest(b) for a, b in zip(*batch.views, strict=True)]
            rows += [[epoch, *row] for row in zip(wanted, batch.ids.tolist(), digests, strict=True)]
        data.all_bad()
    state, summary = data.state_dict(), data.bad_summary()
    again = Loader(data.index, SMALL, 20, seed=5, world=world, threads=1)
    left = []
    for mended in ("", "truncated.jpg", "only DALI sees it.jpg"):
        if mended and world.is_main and (Path(root) / "china" / mended).exists():
            shutil.copyfile(Path(root) / "china" / "000.jpg", Path(root) / "china" / mended)
        distributed.together(lambda: None)
        again.load_state_dict(state)
        again.try_bad_again()
        left.append(sorted(again.bad))
    log.removeHandler(handler)
    return [rows, lines, state, summary, left]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_no_bad_file_stops_a_run(ranks: int, photos: Path, tmp_path: Path) -> None:
    good, bad = odd_files()
    photo = encoded(Image.fromarray(np.asarray(load_sample_images().images[1])[:100, :100]))
    for name, replaced in (("mended", True), ("broken", False)):
        for path in (photos / "train").rglob("*.jpg"):
            target = tmp_path / name / path.relative_to(photos / "train")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        for file, data in (good | bad).items():
            (tmp_path / name / "china" / file).write_bytes(photo if replaced and file in bad else data)
    index = image_folder(tmp_path / "broken")
    ids = {Path(path).name: sample for sample, path in enumerate(index.paths)}
    gone = index.paths[40]
    whole = {(e, wanted): d for e, wanted, _, d in meet(str(tmp_path / "mended"), "", 3)[0]}
    broken = str(tmp_path / "broken"), gone, 3
    both = on_ranks(ranks, meet, *broken) if ranks > 1 else [meet(*broken)]

    unreadable = {ids[name] for name in bad} | {40}
    for rows, _, state, summary, again in both:
        assert state["bad"] == both[0][2]["bad"]
        # What is asked again on going on: as it was while the files are, and without those that were mended since.
        mended = unreadable - {ids["truncated.jpg"]}
        assert again == [sorted(unreadable), sorted(mended), sorted(mended - {ids["only DALI sees it.jpg"]})]
        assert set(state["bad"]) == unreadable
        assert "another rank" not in summary
        for name in (*bad, Path(gone).name):
            assert name in summary
        for epoch, wanted, sample, pixels in rows:
            assert sample == wanted or wanted in unreadable
            if sample == wanted:
                assert pixels == whole[epoch, wanted]
        assert not {sample for epoch, _, sample, _ in rows if epoch == 2} & unreadable
    lines = [line for _, said, *_ in both for line in said]
    for name in (*bad, Path(gone).name):
        assert sum(f"/{name}:" in line for line in lines) == 1, name
    told = [line for line in lines if "can be read now, and take part again from here" in line]
    assert [line.rpartition(": ")[2] for line in told] == [
        "china/truncated.jpg", "china/only DALI sees it.jpg, china/truncated.jpg"
    ]  # fmt: skip
    # The choice of a replacement is keyed: one rank alone makes the same, where it knows what all met.
    alone = Loader(index, SMALL, 20, seed=5, world=place(0, 1), threads=1)
    alone.load_state_dict({"epoch": 2, "consumed": 0, "bad": both[0][2]["bad"]})
    last = [[row for row in rows if row[0] == 2] for rows, *_ in both]
    expected = [(sample, pixels) for pair in zip(*last, strict=True) for *_, sample, pixels in pair]
    assert [(sample, pixels) for _, sample, pixels in seen(alone)] == expected


def test_bisection_finds_all_and_nothing_else() -> None:
    good, bad = odd_files()
    whole, broken = good["gray.jpg"], bad["only DALI sees it.jpg"]
    pictures = [np.frombuffer(broken if place in (0, 7, 8, 12) else whole, dtype=np.uint8) for place in range(13)]
    assert loader.undecodable(pictures, "cpu", torch.device("cpu")) == [0, 7, 8, 12]
    assert loader.undecodable(pictures[1:7], "cpu", torch.device("cpu")) == []


def test_pngs_that_were_cut_end_no_process(tmp_path: Path) -> None:
    """DALI leaves a batch with one while its threads still work on it: a crash that depends on who is faster."""
    rng = np.random.default_rng(0)
    (tmp_path / "train" / "a").mkdir(parents=True)
    cut = set(rng.choice(128, 6, replace=False).tolist())
    for number in range(128):
        pixels = rng.integers(0, 255, (256, 256, 3), dtype=np.uint8)
        path = tmp_path / "train" / "a" / f"{number:03d}.png"
        Image.fromarray(pixels).save(path, "PNG" if number in cut else "JPEG")
        if number in cut:
            data = path.read_bytes()
            path.write_bytes(data[: int(rng.uniform(0.1, 0.9) * len(data))])
    words = [
        sys.executable,
        "-c",
        "import sys; from tests.data_plane.jobs import loads; loads(sys.argv[1])",
        str(tmp_path),
    ]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["loader"] == [{str(number): "truncated" for number in sorted(cut)}] * 2
    assert found["bisected"] == [sorted(cut)] * 2


def test_a_png_needs_its_end_and_nothing_behind_it() -> None:
    made = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (150, 150, 3), dtype=np.uint8)).save(made, "PNG")
    png = made.getvalue()
    assert png.count(b"IDAT") > 1

    def size(data: bytes) -> tuple[int, int]:
        return loader.picture_size(np.frombuffer(data, dtype=np.uint8))

    assert size(png) == size(png + bytes(1000)) == (150, 150)
    for end in (len(png) - 12, len(png) - 9, 40_000, 60):
        with pytest.raises(ValueError, match="truncated"):
            size(png[:end])
    assert not loader.decodes([np.frombuffer(png[:-12], dtype=np.uint8)], "cpu", torch.device("cpu"))


def test_where_the_halves_are_placed() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert loader.placement(None, None, cpu) == loader.placement("cpu", "cpu", cpu) == ("cpu", "cpu")
    for decode, augment in (("mixed", None), (None, "gpu"), ("cpu", "gpu")):
        with pytest.raises(
            BadInput, match=r"^data\.(decode=mixed|augment=gpu) needs a GPU and torch sees none here: .*$"
        ):
            loader.placement(decode, augment, cpu)
    assert loader.placement(None, None, cuda) == ("mixed", "gpu")
    assert loader.placement("cpu", None, cuda) == ("cpu", "gpu")
    assert loader.placement(None, "cpu", cuda) == ("cpu", "cpu")
    with pytest.raises(BadInput, match="out of reach"):
        loader.placement("mixed", "cpu", cuda)


def test_the_remedy_is_for_the_half_that_is_slow(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(photos, readers=3)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    threads = "decoding and making views is what takes long: try data.threads=4"
    read = type(data.index).read

    def slowly(index, sample: int) -> np.ndarray:
        time.sleep(0.05)  # of a far disk
        return read(index, sample)

    monkeypatch.setattr(type(data.index), "read", slowly)
    seen(data)
    assert data.remedy() == "reading files is what takes long: try data.readers=6"
    assert data.remedy() == threads  # since then, nothing was waited for
    data.threads = 4
    assert "try more cores a rank" in data.remedy()


# --------------------------------------------------------------------------------------------------- storage that fails
def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int, str], bool], number: int = errno.ESTALE) -> None:
    """Opening a picture raises an error where `fails(how many were opened before, path)`."""
    opened, really = 0, os.open

    def open_(path: str, *more: int, **named: int) -> int:
        nonlocal opened
        if str(path).endswith(".jpg"):
            opened += 1
            if fails(opened - 1, str(path)):
                raise OSError(number, os.strerror(number), path)
        return really(path, *more, **named)

    monkeypatch.setattr("ssl_pipeline.data.index.os.open", open_)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EMFILE])
def test_a_storage_that_fails_for_a_while_is_waited_for(
    number: int, photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = seen(make(photos))
    failing(monkeypatch, lambda before, _: 20 <= before < 34, number)
    data = make(photos)
    assert seen(data) == whole
    assert data.state_dict()["bad"] == {}
    assert caplog.text.count("asking again for 240 s") == 1
    assert f"rank 0 cannot read {photos / 'train'}" in caplog.text
    assert caplog.text.count("rank 0 reads again after") == 1


def test_what_was_given_is_not_asked_for_again(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One read in three fails: all of a batch at once would never come."""
    whole = seen(make(photos))
    monkeypatch.setattr(loader, "PATIENCE", 20.0)
    failing(monkeypatch, lambda before, _: before % 3 == 0, errno.ETIMEDOUT)
    data = make(photos)
    assert seen(data) == whole
    assert data.all_bad() == {}


def test_a_storage_that_stays_away_ends_the_run_and_marks_nothing(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = seen(make(photos))
    data = make(photos)
    rows = [(0, int(i), digest(a) + digest(b)) for batch in [next(iter(data))]
            for i, a, b in zip(batch.ids, *batch.views, strict=True)]  # fmt: skip
    state = data.state_dict()
    monkeypatch.setattr(loader, "PATIENCE", 0.3)
    with monkeypatch.context() as outage:
        failing(outage, lambda *_: True)
        with pytest.raises(
            StorageFailure, match=r"cannot read .*\.jpg: Stale file handle, nor others, .*goes on"
        ) as stop:
            seen(data)
    assert stop.value.status == 77
    assert data.state_dict()["bad"] == {}
    again = make(photos)
    again.load_state_dict(state)
    assert rows + seen(again) == whole


@pytest.mark.parametrize("timeout", [5.0, 20.0, 33.0, 60.0, 250.0, 600.0, 7200.0])
def test_a_storage_is_given_up_before_the_other_ranks_give_up_this_one(
    timeout: float, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    data = make(photos, timeout=timeout)
    monkeypatch.setattr(loader, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    failing(monkeypatch, lambda *_: True)
    with pytest.raises(StorageFailure, match=f"nor others, for {min(240, 0.4 * timeout):.0f} s: "):
        seen(data)
    assert min(240, 0.4 * timeout) <= clock[0] < Watchdog(RunFolder(photos), data.world, timeout)._limit


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_a_folder_that_was_unmounted_is_no_million_bad_files(
    left: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(photos / "train", tmp_path / "train")
    data = make(tmp_path)
    whole = seen(make(tmp_path), epochs=2)
    monkeypatch.setattr(loader, "PATIENCE", 0.3)
    first = seen(data)
    state = data.state_dict()
    (tmp_path / "train").rename(tmp_path / "away")
    if left == "an empty folder":
        (tmp_path / "train").mkdir()
    with pytest.raises(StorageFailure, match="No such file or directory, nor others"):
        seen(data, epochs=2)  # some of the next one was read before
    assert data.state_dict()["bad"] == {}
    if left == "an empty folder":
        (tmp_path / "train").rmdir()
    (tmp_path / "away").rename(tmp_path / "train")
    again = make(tmp_path)
    again.load_state_dict(state)
    assert first + seen(again) == whole


def test_a_picture_that_alone_is_not_given_is_bad(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {(e, i): d for e, i, d in seen(make(photos))}
    monkeypatch.setattr(loader, "PATIENCE", 0.2)
    failing(monkeypatch, lambda _, path: path.endswith("china/007.jpg"), errno.EIO)  # a disk's bad block
    data = make(photos)
    rows = seen(data)
    assert data.all_bad() == {7: f"[Errno 5] Input/output error: '{photos}/train/china/007.jpg'"}
    assert len(rows) == 64
    assert all(whole[e, i] == d for e, i, d in rows if [i for _, i, _ in rows].count(i) == 1)
    again = make(photos)
    again.load_state_dict(data.state_dict())
    again.try_bad_again()
    assert set(again.bad) == {7}


def test_a_file_of_absurd_size_is_bad(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos / "train", tmp_path / "train")
    huge = tmp_path / "train" / "china" / "huge.jpg"
    huge.touch()
    os.truncate(huge, 4 << 40)  # sparse: it takes no room
    data = make(tmp_path, batch=65)
    assert len(seen(data)) == 65
    assert list(data.all_bad().values()) == ["4,398,046,511,104 bytes are more than a picture may have, 1,000,000,000"]


# ------------------------------------------------------------------------------------------------------- its own state
def test_other_pictures_are_not_gone_on_with(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos / "train", tmp_path / "train")
    data = make(tmp_path)
    state = data.state_dict()
    old = {name: value for name, value in state.items() if name != "pictures"}  # an older version did not say
    (tmp_path / "train" / "china" / "005.jpg").rename(tmp_path / "train" / "flower" / "x.jpg")
    other = make(tmp_path)
    with pytest.raises(
        BadInput, match=r"pictures in .*train' are not those .*\(64 pictures, .* then, 64 pictures, .* now"
    ):
        other.load_state_dict(state)
    other.load_state_dict(old)
    (tmp_path / "train" / "flower" / "x.jpg").rename(tmp_path / "train" / "china" / "005.jpg")
    make(tmp_path).load_state_dict(state)
    # The names alone do not tell: labels may be read from elsewhere.
    index = data.index
    swapped = Index(index.root, index.paths, 1 - index.labels, index.classes)
    with pytest.raises(BadInput, match="names, labels have changed"):
        Loader(swapped, SMALL, 16, seed=5, world=place(0, 1), threads=1).load_state_dict(state)


# ------------------------------------------------------------------------------------------------------------- its views
def test_exact_comes_from_the_config(photos: Path) -> None:
    index = image_folder(photos / "train")

    def first(*more: str) -> np.ndarray:
        tree = config.load("imagenet/simclr", [f"data.root={photos}", "data.batch_size=16", *more])
        tree.values["data"]["views"][0]["size"] = 48
        options = config.validate(PretrainConfig, tree.values).data
        (view, *_) = options.views
        batch = next(iter(Loader.for_training(options, index, seed=5, world=place(0, 1))))
        expected = alone(view, index, batch.ids, options.exact)
        np.testing.assert_array_equal(batch.views[0].numpy(), expected)
        return expected

    assert np.abs(first("data.exact=true") - first()).max() > 0.01


def alone(view: ViewSpec, index: Index, ids: np.ndarray, exact: bool) -> np.ndarray:
    """A first view by its two functions, without a loader."""
    from nvidia.dali import fn, pipeline_def

    files = [index.read(int(i)) for i in ids]
    sizes = np.array([loader.picture_size(file) for file in files])
    arrays = view.parameters(5, 0, ids, 0, sizes, exact)

    @pipeline_def(batch_size=len(ids), num_threads=1, device_id=None)
    def graph():
        inputs = fn.external_source(source=lambda: [files, *arrays], num_outputs=1 + len(arrays), batch=True)
        return view.nodes(fn.decoders.image(inputs[0], adjust_orientation=False), inputs[1:], exact)

    pipeline = graph()
    pipeline.build()
    (out,) = pipeline.run()
    return np.stack([np.array(out[i]) for i in range(len(ids))])


def test_four_equal_views_are_four_draws(photos: Path) -> None:
    """W-MSE's: of one entry with `count: 4`, each other than the rest, the first two those of `count: 2`."""
    index = image_folder(photos / "train")

    def first(count: int, rank: int = 0, size: int = 1) -> list[torch.Tensor]:
        views = [SMALL[0].model_copy(update={"count": count})]
        return next(iter(Loader(index, views, 16, seed=5, world=place(rank, size), threads=1))).views

    four = first(4)
    assert len({digest(picture) for view in four for picture in view}) == 64
    assert [digest(view) for view in first(2)] == [digest(view) for view in four[:2]]
    for whole, even, odd in zip(four, first(4, 0, 2), first(4, 1, 2), strict=True):
        assert digest(torch.stack([even, odd], dim=1).flatten(0, 1)) == digest(whole)
