import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ssl_pipeline.data.index import image_folder, pretraining_index, read_index
from ssl_pipeline.exits import BadInput


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def test_the_order_depends_on_names_alone(tmp_path: Path) -> None:
    root = make(
        tmp_path, "b/2.JPEG", "a/x/9.png", "b/1.jpg", "a/ü ö.jpg", "a/.hidden.jpg", ".cache/1.jpg", "b/notes.txt"
    )
    index = image_folder(root)
    assert index.classes == ("a", "b")
    assert index.paths == ("a/x/9.png", "a/ü ö.jpg", "b/1.jpg", "b/2.JPEG")
    assert index.labels.tolist() == [0, 0, 1, 1]
    assert index.read(1).tobytes() == b"x"
    assert index.select(np.array([3, 0])).paths == ("b/2.JPEG", "a/x/9.png")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no folder .*none.*data.root.*prepare-data"):
        image_folder(tmp_path / "none")
    with pytest.raises(BadInput, match="no class folders"):
        image_folder(tmp_path)
    make(tmp_path, "a/1.jpg", "b/notes.txt")
    with pytest.raises(BadInput, match=r"class folder .*/b' holds no pictures"):
        image_folder(tmp_path)


def test_the_digest_names_the_listing(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    before = image_folder(tmp_path).digest()
    assert image_folder(tmp_path).digest() == before
    (tmp_path / "b" / "2.png").touch()
    assert image_folder(tmp_path).digest() != before


def tar(path: Path, **members: bytes) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_shards_are_read_by_place(tmp_path: Path) -> None:
    tar(tmp_path / "b.tar", **{"x/2.jpg": b"two", "x/2.cls": b"cat\n", "x/1.seg.png": b"no picture of a sample"})
    tar(tmp_path / "a.tar", **{"9.cls": b"dog", "9.PNG": b"nine", "1.jpg": b"one", "1.cls": b"ant", "1.json": b"{}"})
    found = read_index(tmp_path)
    assert found.paths == ("a.tar/1.jpg", "a.tar/9.PNG", "b.tar/x/2.jpg")
    assert [found.read(place).tobytes() for place in range(3)] == [b"one", b"nine", b"two"]
    assert found.classes == ("ant", "cat", "dog")
    assert found.labels.tolist() == [0, 2, 1]
    some = found.select(np.array([2, 0]))
    assert [some.read(place).tobytes() for place in range(2)] == [b"two", b"one"]


def test_shards_of_numbered_classes_keep_their_numbers(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", **{"1.jpg": b"1", "1.cls": b"7", "2.jpg": b"2", "2.cls": b"10"})
    found = read_index(tmp_path)
    assert found.labels.tolist() == [7, 10]
    assert len(found.classes) == 11


def test_shards_that_do_not_do(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", **{"1.jpg": b"1"})
    tar(tmp_path / "b.tar", **{"2.jpg": b"2", "2.cls": b"0"})
    with pytest.raises(BadInput, match=r"a.tar': picture 1.jpg has no class file 1.cls beside it"):
        read_index(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(BadInput, match=r"a.tar' is no tar shard that can be read"):
        read_index(tmp_path)
    (tmp_path / "b.tar").unlink()
    tar(tmp_path / "a.tar", **{"readme.txt": b"1"})
    with pytest.raises(BadInput, match="hold no pictures"):
        read_index(tmp_path)


def test_pretraining_takes_in_folders_without_labels(tmp_path: Path) -> None:
    make(tmp_path, "train/b/1.png", "train/a/1.png", "val/a/9.png", "val/b/9.png", "more/x.jpg")
    make(tmp_path, "unlabeled/001/3.png", "unlabeled/000/2.png", "unlabeled/notes.txt")
    index = pretraining_index(tmp_path, ["unlabeled", "more"])
    assert index.paths == ("train/a/1.png", "train/b/1.png", "unlabeled/000/2.png", "unlabeled/001/3.png", "more/x.jpg")
    assert index.labels.tolist() == [0, 1, -1, -1, -1]
    assert index.classes == ("a", "b")
    assert [index.read(place).tobytes() for place in range(5)] == [b"x"] * 5
    alone = pretraining_index(tmp_path)
    assert (alone.root, alone.paths) == (
        tmp_path / "train",
        ("a/1.png", "b/1.png"),
    )  # ids and digest of runs without them
    assert read_index(tmp_path / "train").digest() == alone.digest() != index.digest()


def test_unlabelled_folders_that_do_not_do(tmp_path: Path) -> None:
    make(tmp_path, "train/a/1.png", "empty/notes.txt")
    for folder in ("gone", "empty"):
        with pytest.raises(BadInput, match=f"`data.unlabelled` names '{folder}', and .* is no folder with pictures"):
            pretraining_index(tmp_path, [folder])
    (tmp_path / "shards" / "train").mkdir(parents=True)
    make(tmp_path / "shards", "unlabeled/1.png")
    tar(tmp_path / "shards" / "train" / "a.tar", **{"1.jpg": b"1", "1.cls": b"0"})
    assert len(pretraining_index(tmp_path / "shards")) == 1
    with pytest.raises(BadInput, match="holds tar shards"):
        pretraining_index(tmp_path / "shards", ["unlabeled"])
