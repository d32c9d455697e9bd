from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from ssl_pipeline.data import listing as listings
from ssl_pipeline.data.index import image_folder, pretraining_index, read_index
from ssl_pipeline.data.listing import list_folder, listing
from ssl_pipeline.exits import BadInput


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is old enough, and a cache that keeps every listing."""
    monkeypatch.setenv("SSL_PIPELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(listings, "CACHED_FROM", 0)
    monkeypatch.setattr(listings, "SETTLED", -1.0)  # nothing but time itself can make a ctime old
    for name in ("b/2.jpg", "b/x/1.JPEG", "a/1.png", "a-b/1.png", "a/ü.jpg", "a/two\nlines.png", ".hidden/3.jpg"):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with open(os.fsencode(tmp_path / "root" / "b") + b"/\xff.jpg", "wb"):
        pass  # a name that is no UTF-8
    settle(tmp_path / "root")
    return tmp_path / "root"


def settle(root: Path) -> None:
    """As if nothing had been changed for a while."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, ns=(10**18, 10**18))


class Walks:
    """Counts how often a folder is read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0

        def counted(root: Path):
            self.count += 1
            return list_folder(root)

        monkeypatch.setattr(listings, "list_folder", counted)


def test_it_is_listed_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walks = Walks(monkeypatch)
    first, second = read_index(root), read_index(root)
    assert walks.count == 1
    fresh = image_folder(root)
    assert first.paths == second.paths == fresh.paths
    assert first.labels.tolist() == second.labels.tolist() == fresh.labels.tolist() == [0, 0, 0, 1, 2, 2, 2]
    assert fresh.classes == ("a", "a-b", "b")
    assert "b/\udcff.jpg" in second.paths
    assert second.digest() == fresh.digest()
    # By the folder's real path, however it is called.
    (root.parent / "link").symlink_to(root)
    assert read_index(root.parent / "link").paths == fresh.paths
    assert walks.count == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "b" / "3.jpg").touch(),
        lambda root: (root / "b" / "x" / "1.JPEG").unlink(),
        lambda root: (root / "a" / "1.png").rename(root / "a" / "9.png"),
        lambda root: (root / "b" / "x").rename(root / "b" / "y"),
        lambda root: (root / "b" / "x" / "deeper").mkdir(),
    ],
    ids=["added", "removed", "renamed", "folder renamed", "folder added"],
)
def test_a_change_is_seen(root: Path, change) -> None:
    read_index(root)
    change(root)
    again = listing(root)
    assert (again.pictures, again.folders) == (list_folder(root).pictures, list_folder(root).folders)


def test_a_change_is_seen_where_the_times_were_set_back(root: Path) -> None:
    """As tar and rsync set a folder's time after they wrote into it."""
    read_index(root)
    (root / "b" / "3.jpg").touch()
    before = os.stat(root / "b").st_ctime_ns
    while os.stat(root / "b").st_ctime_ns == before:  # until the file system's clock has ticked
        settle(root)
    assert os.stat(root / "b").st_mtime_ns == 10**18
    assert "b/3.jpg" in listing(root).pictures


@pytest.mark.parametrize("back", [False, True])
def test_what_was_changed_just_now_is_not_kept(root: Path, back: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listings, "SETTLED", 3600.0)
    (root / "b" / "3.jpg").touch()
    if back:
        settle(root)
    walks = Walks(monkeypatch)
    read_index(root)
    read_index(root)
    assert walks.count == 2


@pytest.mark.parametrize("what", ["damaged", "cut", "text", "pickle", "other root", "other version", "folder"])
def test_a_cache_file_that_does_not_do_is_ignored(root: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = read_index(root).paths
    (kept,) = (root.parent / "cache" / "listings").iterdir()
    data = kept.read_bytes()
    values = dict(np.load(kept))
    if what == "damaged":
        place = data.index(b"1.JPEG")
        kept.write_bytes(data[:place] + b"2" + data[place + 1 :])
    elif what == "cut":
        kept.write_bytes(data[: len(data) // 2])
    elif what == "text":
        kept.write_text("no listing")
    elif what == "pickle":
        np.savez(kept, **{**values, "pictures": np.array([{}], dtype=object)})
    elif what == "other root":
        np.savez(kept, **{**values, "root": listings.blob(["/elsewhere"]), "pictures": listings.blob(["a/0.png"])})
    elif what == "other version":
        np.savez(kept, **{**values, "version": np.int64(0), "pictures": listings.blob(["a/0.png"])})
    else:
        kept.unlink()
        kept.mkdir()
    walks = Walks(monkeypatch)
    assert read_index(root).paths == wanted
    assert walks.count == 1


def test_a_cache_that_cannot_be_written_stops_nothing(root: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    (root.parent / "file").touch()
    monkeypatch.setenv("SSL_PIPELINE_CACHE", str(root.parent / "file" / "cache"))
    caplog.set_level("INFO")
    assert len(read_index(root)) == 7
    assert "the listing is not kept" in caplog.text


def test_small_folders_are_not_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listings, "CACHED_FROM", 8)
    read_index(root)
    assert not (root.parent / "cache").exists()


def test_folders_that_lead_into_themselves_and_that_cannot_be_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = list_folder(root).pictures
    (root / "b" / "x" / "up").symlink_to(root)
    assert list_folder(root).pictures == before
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/x"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(BadInput, match="cannot list .*/b/x': Permission denied"):
        list_folder(root)


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_PIPELINE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert listings.cache_folder() == Path("/x/ssl_pipeline")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert listings.cache_folder() == Path("/h/.cache/ssl_pipeline")


def test_pictures_without_labels(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    flat = root / "b"
    found = read_index(flat)
    assert found.paths == ("2.jpg", "x/1.JPEG", "\udcff.jpg")
    assert (found.labels.tolist(), found.classes) == ([-1] * 3, ())
    assert "2 pictures lie directly in" in caplog.text
    (root / "train").mkdir()
    (root / "a").rename(root / "train" / "a")
    whole = pretraining_index(root, ["train", "b"])
    assert whole.paths == (
        "train/a/1.png",
        "train/a/two\nlines.png",
        "train/a/ü.jpg",
        "b/2.jpg",
        "b/x/1.JPEG",
        "b/\udcff.jpg",
    )
    assert (whole.labels.tolist(), whole.classes) == ([-1] * 6, ())
    assert whole.read(0).size == 0
