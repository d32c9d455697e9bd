from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_pipeline import cli, config, distributed
from ssl_pipeline.data import check as checking
from ssl_pipeline.data import index as indexes
from ssl_pipeline.data.augment import ViewSpec
from ssl_pipeline.data.check import check
from ssl_pipeline.data.index import Index, image_folder
from ssl_pipeline.data.loader import Loader
from ssl_pipeline.data.pack import pack
from ssl_pipeline.data.parallel import each
from ssl_pipeline.exits import BadInput
from tests.data_plane import jobs

BAD = ("empty.jpg", "text.jpg", "half.jpg", "half.png", "tables.jpg", "gif.jpg", "gone.jpg", "pipe.jpg", "dir.jpg.png")


@pytest.fixture
def mixed(photos: Path, tmp_path: Path) -> Path:
    """Some good photographs, every kind of bad picture, and every kind that is only noteworthy."""
    for split in ("train", "val"):
        (tmp_path / "root" / split / "a").mkdir(parents=True)
    folder = tmp_path / "root" / "train" / "a"
    good = sorted((photos / "train" / "china").glob("*.jpg"))[:12]
    for path in good:
        shutil.copyfile(path, folder / path.name)
    shutil.copyfile(good[0], tmp_path / "root" / "val" / "a" / "ü 1.jpg")
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_bytes(b"this is no picture")
    whole = good[0].read_bytes()
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    photo = Image.open(good[0])
    made = io.BytesIO()
    photo.save(made, "PNG")
    (folder / "half.png").write_bytes(made.getvalue()[: len(made.getvalue()) // 2])
    damaged = bytearray(whole)
    place = damaged.index(b"\xff\xc4")
    damaged[place + 4 : place + 30] = bytes(26)  # what only the decoder sees
    (folder / "tables.jpg").write_bytes(damaged)
    photo.save(folder / "gif.jpg", "GIF")
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "dir.jpg.png").symlink_to("dir.jpg.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    photo.save(folder / "turned.jpg", exif=turned)
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    photo.convert("L").save(folder / "gray.jpg")
    Image.fromarray(np.zeros((9, 9), dtype=np.uint16)).save(folder / "deep.png")
    photo.save(folder / "png.JPEG", "PNG")
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    return tmp_path / "root"


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without processes, each of which imports torch; the first test has two."""
    monkeypatch.setattr(checking, "each", lambda work, jobs, processes: [(job, work(job)) for job in jobs])
    monkeypatch.setattr(checking, "_be_quiet", lambda: None)


def test_it_finds_what_the_loader_would_replace(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counted(work, jobs, processes):
        asked.append((len(jobs), processes))
        return each(work, jobs, processes)

    monkeypatch.setattr(checking, "each", counted)
    monkeypatch.setattr(checking, "CHUNK", 5)
    report = check(mixed, processes=2)
    assert asked[-1] == (6, 2)
    found = {Path(name).name: reason for name, reason in report.bad}
    assert set(found) == set(BAD)
    assert found["empty.jpg"] == "the file is empty"
    assert found["gone.jpg"] == "No such file or directory"
    assert found["pipe.jpg"] == "no regular file"
    assert found["half.jpg"] == found["half.png"] == "truncated"
    assert (found["tables.jpg"], found["text.jpg"]) == ("damaged", "no picture")
    assert report.checked == 12 + 1 + len(BAD) + 6
    assert report.noteworthy == {
        "CMYK": 1, "gray": 2, "16 bits": 1, "turned by EXIF, which no recipe applies": 1, "PNG named .jpeg": 1,
        "1 x 1 pixels": 1,
    }  # fmt: skip
    assert Path(report.examples["CMYK"]).name == "cmyk.jpg"
    # The loader itself replaces the same ones.
    view = config.validate(ViewSpec, {"size": 16, "ops": [{"op": "center_crop", "resize": 16}, {"op": "normalize"}]})
    index = image_folder(mixed / "train")
    world = distributed.World(0, 1, 0, 1, torch.device("cpu"))
    data = Loader(index, [view], 7, seed=0, world=world, threads=1, training=False)
    assert sum(len(batch.ids) for batch in data) == len(index)
    assert {Path(index.paths[sample]).name for sample in data.bad} == set(BAD)


def test_shards_are_checked_too(mixed: Path, tmp_path: Path, in_process: None) -> None:
    for name in ("gone.jpg", "pipe.jpg", "dir.jpg.png"):
        (mixed / "train" / "a" / name).unlink()
    pack(mixed, tmp_path / "out", shard_size=100_000, processes=1)
    left = set(BAD) - {"gone.jpg", "pipe.jpg", "dir.jpg.png"}
    report = check(tmp_path / "out", processes=1)
    assert {name.rpartition("/")[2].rstrip(")") for name, _ in report.bad} == left
    assert all("train/0000" in name for name, _ in report.bad)
    assert report.checked == 12 + 1 + len(left) + 6
    # A tar that is none, and an index that does not fit.
    shutil.rmtree(tmp_path / "out" / "train")
    (tmp_path / "out" / "val" / "b.tar").write_bytes(b"no tar" * 500)
    broken = check(tmp_path / "out", processes=1)
    assert broken.checked == 1
    assert [Path(name).name for name, _ in broken.bad] == ["val", "b.tar", "b.tar"]


def test_shards_that_are_not_what_was_packed_are_found(mixed: Path, tmp_path: Path, in_process: None) -> None:
    """What neither the index nor a decoder sees: two shards in each other's place, a label that was flipped."""
    for name in BAD:
        (mixed / "train" / "a" / name).unlink()
    for number in range(6):  # in shards of one size
        shutil.copyfile(mixed / "train" / "a" / "one.png", mixed / "train" / "a" / f"x{number}.png")
        with (mixed / "train" / "a" / f"x{number}.png").open("ab") as file:
            file.write(bytes([number]) * 95_000)
    folder = tmp_path / "out" / "train"
    pack(mixed, tmp_path / "out", shard_size=100_000, processes=1)
    assert check(tmp_path / "out").bad == []
    sizes = {path: path.stat().st_size for path in sorted(folder.glob("*.tar"))}
    one, other, third = [path for path in sizes if list(sizes.values()).count(sizes[path]) >= 5][:3]
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)
    with tarfile.open(third) as archive:
        place = next(m.offset_data for m in archive if m.name.endswith(".cls"))
    data = bytearray(third.read_bytes())
    data[place] ^= 1
    third.write_bytes(data)
    assert isinstance(indexes.read_shard_index(folder), Index)
    reason = "it is not what SHA256SUMS says: copy or pack it again"
    assert check(tmp_path / "out").bad == [(str(path), reason) for path in sorted((one, other, third))]
    (folder / "SHA256SUMS").unlink()
    assert check(tmp_path / "out").bad == []


def test_a_picture_that_ends_its_process_is_found_among_the_others(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadly = ("train/a/cmyk.jpg", "val/a/ü 1.jpg")
    monkeypatch.setattr(checking, "_be_quiet", lambda: None)
    monkeypatch.setattr(
        checking,
        "each",
        lambda work, jobs, processes: [(job, None if set(deadly) & set(job.paths) else work(job)) for job in jobs],
    )
    report = check(mixed, processes=1)
    found = {Path(name).name: reason for name, reason in report.bad}
    assert set(found) == {*BAD, "cmyk.jpg", "ü 1.jpg"}
    assert [name for name in found if found[name] == "decoding it ends the process"] == ["cmyk.jpg", "ü 1.jpg"]
    assert report.checked == 28


def test_the_verb_exits_with_2_or_0(mixed: Path, capsys: pytest.CaptureFixture, in_process: None) -> None:
    assert cli.main(["check-data", str(mixed), "--processes", "1"], signals=False) == 2
    told = capsys.readouterr().out
    lines = told.splitlines()
    assert lines[0] == f"{mixed}/train/a/dir.jpg.png: Too many levels of symbolic links"
    assert lines[-1] == f"28 pictures read below {mixed}, 9 bad"
    assert "noteworthy: 2 gray, as " in told
    assert cli.main(["check-data", str(mixed / "val"), "--processes", "1"], signals=False) == 0
    assert capsys.readouterr().out == f"1 pictures read below {mixed}/val, 0 bad\n"
    assert cli.main(["check-data", str(mixed / "nothing")], signals=False) == 2
    assert "no folder" in capsys.readouterr().err


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no pictures and no tar shards"):
        check(tmp_path)


def test_a_worker_that_dies_stops_nothing() -> None:
    found = dict(each(jobs.deadly, range(20), 2))
    assert found == {job: None if job in (7, 17) else job * job for job in range(20)}


def test_what_a_worker_raises_is_raised() -> None:
    with pytest.raises(BadInput, match="0 does not do"):
        list(each(jobs.wrong, [0], 1))
