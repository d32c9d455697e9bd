import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ssl_pipeline.data import index as indexes
from ssl_pipeline.data import listing as listings
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


def member(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = "", data: bytes = b""
) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    return info, io.BytesIO(data)


def test_what_is_no_picture_in_a_tar_is_left_out_and_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for row in (
            member("1.jpg", data=b"one"), member("1.cls", tarfile.DIRTYPE), member("1.cls", tarfile.SYMTYPE, "nowhere"),
            member("1.cls", data=b"cat"), member("2.jpg", tarfile.LNKTYPE, "1.jpg"), member("2.cls", tarfile.LNKTYPE, "1.cls"),
            member("3.jpg", tarfile.SYMTYPE, "1.jpg"), member("4.jpg", tarfile.DIRTYPE), member("5.jpg", tarfile.LNKTYPE, "no"),
            member("photo.final.jpg", data=b"x"), member("x/6.seg.png", data=b"x"), member("x/6.json", data=b"{}"),
            member("7.jpg", data=b"jpg"), member("7.cls", data=b"dog"), member("7.png", data=b"png"),
            member("8.jpg", data=b"old"), member("8.cls", data=b"dog"), member("8.jpg", data=b"new"),
        ):  # fmt: skip
            archive.addfile(*row)
    found = read_index(tmp_path)
    assert found.paths == ("a.tar/1.jpg", "a.tar/2.jpg", "a.tar/7.png", "a.tar/8.jpg")
    assert [found.read(place).tobytes() for place in range(4)] == [b"one", b"one", b"png", b"new"]
    assert [found.classes[label] for label in found.labels] == ["cat", "cat", "dog", "dog"]
    told = [row.getMessage().partition(": ")[2] for row in caplog.records if row.levelname == "WARNING"]
    assert told == [
        "3 pictures that are folders, links or sparse files, as a.tar/3.jpg",
        "2 pictures with a further dot in the name (WebDataset's rule), as a.tar/photo.final.jpg",
        "2 pictures before another of the same name, as a.tar/7.jpg",
    ]


def test_a_tar_that_was_cut_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", **{"1.jpg": b"1" * 700, "2.jpg": b"2" * 700})
    whole = (tmp_path / "a.tar").read_bytes()
    ends = 2 * (512 + 1024)
    (tmp_path / "a.tar").write_bytes(whole[: ends + 512])
    assert len(read_index(tmp_path)) == 2  # nothing is lost of it
    damaged = whole[: ends // 2] + b"?" * 512 + whole[ends // 2 + 512 :]
    for data in (whole[: ends // 2], whole[: ends // 2 + 100], whole[: ends // 2 + 800], whole[:ends], damaged):
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(
            BadInput, match=r"a.tar' is no tar shard that can be read: (it has no end mark|unexpected end)"
        ):
            read_index(tmp_path)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "A.TAR", "deeper/a.tar", "deeper/a.tar.gz"])
def test_what_is_meant_as_shards_and_is_none_is_named(tmp_path: Path, name: str) -> None:
    make(tmp_path, name)
    with pytest.raises(
        BadInput, match=rf"; shards are read where they lie as .*/NAME.tar, uncompressed, and not as .*{name}$"
    ):
        read_index(tmp_path)


def test_the_names_in_shards_of_others_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SSL_PIPELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(listings, "CACHED_FROM", 2)
    monkeypatch.setattr(listings, "SETTLED", -1.0)
    caplog.set_level("INFO")
    root = tmp_path / "root"
    root.mkdir()
    tar(root / "a.tar", **{"1.jpg": b"1", "1.cls": b"ant", "ü.png": b"2", "ü.cls": b"cat"})

    def again() -> tuple[list, int]:
        """What another process would find, and how many times the tars themselves were read for it."""
        indexes._shards.cache_clear()
        caplog.clear()
        found = read_index(root)
        rows = [
            (*row, found.read(place).tobytes())
            for place, row in enumerate(zip(found.paths, found.labels.tolist(), strict=True))
        ]
        return [*rows, found.classes], caplog.text.count("reading the names in 1 shards")

    first = again()
    assert first == ([("a.tar/1.jpg", 0, b"1"), ("a.tar/ü.png", 1, b"2"), ("ant", "cat")], 1)
    assert again() == (first[0], 0)
    size = os.stat(root / "a.tar").st_size
    tar(root / "a.tar", **{"1.jpg": b"3", "1.cls": b"ant", "ü.png": b"4", "ü.cls": b"cow"})  # of the same size
    os.utime(root / "a.tar", ns=(10**18, 10**18))  # this may be the same tick of the clock
    assert os.stat(root / "a.tar").st_size == size
    assert again() == ([("a.tar/1.jpg", 0, b"3"), ("a.tar/ü.png", 1, b"4"), ("ant", "cow")], 1)
    (kept,) = (tmp_path / "cache" / "shards").iterdir()
    kept.write_bytes(kept.read_bytes()[:300])
    assert again()[1] == 1
    assert again()[1] == 0
    monkeypatch.setattr(listings, "SETTLED", 3600.0)
    kept.unlink()
    assert (again()[1], again()[1]) == (1, 1)


def test_names_that_would_break_a_line_are_quoted(tmp_path: Path) -> None:
    make(tmp_path, "a/two\nlines.jpg", "a/ü ö.jpg")
    index = image_folder(tmp_path)
    assert index.name(0) == repr(f"{tmp_path}/a/two\nlines.jpg")
    assert index.name(1) == f"{tmp_path}/a/ü ö.jpg"
    (tmp_path / "tars").mkdir()
    tar(tmp_path / "tars" / "a.tar", **{"1\n.jpg": b"1"})
    assert read_index(tmp_path / "tars").name(0) == f"{tmp_path}/tars/a.tar at byte 512 ('1\\n.jpg')"


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


def test_no_unlabelled_picture_counts_twice(tmp_path: Path) -> None:
    make(tmp_path / "root", "train/a/1.png", "val/a/1.png", "more/x/2.png", "more/y/3.png", "more-of it/4.png")
    make(tmp_path, "else/5.png")
    root = tmp_path / "root"
    (root / "link").symlink_to("more")
    (root / "out").symlink_to(tmp_path / "else")
    for twice in (["more", "more"], ["more", "./more/"], ["more", "more/x"], ["more/x", "more"], ["train/a"], ["."],
                  ["train", "train/a"], ["more", "link"], ["link/x", "more"]):  # fmt: skip
        with pytest.raises(BadInput, match="share would count twice"):
            pretraining_index(root, twice)
    for outside in ("../else", str(tmp_path / "else"), "more/../../else"):
        with pytest.raises(BadInput, match="which is not below data.root"):
            pretraining_index(root, [outside])
    wanted = ("train/a/1.png", "more/x/2.png", "more/y/3.png", "more-of it/4.png", "out/5.png")
    assert pretraining_index(root, ["./more//", "more-of it", "out"]).paths == wanted
    alone = pretraining_index(root, ["./train/"])
    assert (alone.paths, alone.labels.tolist(), alone.classes) == (("train/a/1.png",), [-1], ())
