from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_pipeline import config, distributed
from ssl_pipeline.data import loader
from ssl_pipeline.data.augment import ViewSpec
from ssl_pipeline.data.index import image_folder
from ssl_pipeline.data.loader import Loader
from ssl_pipeline.exits import BadInput
from ssl_pipeline.pretrain import PretrainConfig

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
    assert set(data.bad) == bad
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
    assert not loader.decodes(np.frombuffer(bytes(damaged), dtype=np.uint8), torch.device("cpu"))
    data = make(tmp_path, batch=4)
    rows = seen(data, epochs=2)
    assert data.bad == {3: "DALI cannot decode it"}
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
