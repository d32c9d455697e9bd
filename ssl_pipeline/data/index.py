"""What samples there are: the pictures of an image folder or of tar shards, in an order that depends on names alone."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import stat
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ssl_pipeline.data.listing import (
    EXTENSIONS,
    Listing,
    blob,
    is_folder,
    list_folder,
    listing,
    names,
    read_arrays,
    write_arrays,
)
from ssl_pipeline.exits import BadInput

log = logging.getLogger("ssl_pipeline")

INDEX = "index.npz"
"""Name of the index file beside the shards that `pack-shards` wrote."""

UNFINISHED = ".unfinished"
"""Name of the file that lies beside shards while they are being written."""

OPEN_SHARDS = 256
"""Shards that an index holds open at a time."""

_VERSION = 1


class _OpenFile:
    """A file that is open for reading at any place, by any number of threads, and closed with its last user."""

    def __init__(self, path: str) -> None:
        # Without O_NONBLOCK a pipe that is called as a picture would stop its reader for ever.
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        state = os.fstat(self.number)
        self.size = state.st_size
        if not stat.S_ISREG(state.st_mode):
            raise OSError("no regular file")

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)

    def read(self, offset: int, size: int) -> np.ndarray:
        """(size,) uint8. Raises OSError where the file ends before."""
        data = np.empty(size, dtype=np.uint8)
        room = memoryview(data)  # type: ignore[arg-type]
        done = 0
        while done < size:
            more = os.preadv(self.number, [room[done:]], offset + done)
            if more == 0:
                raise OSError(f"the file ends {size - done} bytes before the picture does")
            done += more
        return data


def _opener() -> Callable[[str], _OpenFile]:
    return functools.lru_cache(maxsize=OPEN_SHARDS)(_OpenFile)


@dataclass(frozen=True)
class Index:
    """N samples. A sample's id is its place here; it never changes while the folder's names do not."""

    root: Path
    paths: tuple[str, ...]
    """Path of each sample, relative to `root`. In shards with an index file, of the folder that they were packed from; in
    others, the shard's name and the member's."""
    labels: np.ndarray
    """(N,) int64: the place of the sample's class in `classes`; -1 where it has none."""
    classes: tuple[str, ...]
    """Names of the classes, sorted; none where nothing is labelled."""
    spans: np.ndarray | None = None
    """(N, 3) int64: place in `shards`, offset and size, in bytes, of each sample; None where each is a file of its own."""
    shards: tuple[str, ...] = ()
    """Names of the shards in `root`, sorted."""
    _open: Callable[[str], _OpenFile] = field(default_factory=_opener, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, sample: int) -> np.ndarray:
        """The encoded bytes of a sample, (size,) uint8, by any number of threads at a time. Raises OSError."""
        if self.spans is None:
            file = _OpenFile(os.path.join(self.root, self.paths[sample]))
            return file.read(0, file.size)
        shard, offset, size = self.spans[sample].tolist()
        return self._open(os.path.join(self.root, self.shards[shard])).read(offset, size)

    def name(self, sample: int) -> str:
        """Where a sample lies, for messages."""
        if self.spans is None:
            return str(self.root / self.paths[sample])
        shard, offset, _ = self.spans[sample].tolist()
        return f"{self.root / self.shards[shard]} at byte {offset} ({self.paths[sample].removeprefix(self.shards[shard] + '/')})"

    def digest(self) -> str:
        """A short name of the listing: equal where ids mean the same pictures."""
        return hashlib.sha256("\n".join(self.paths).encode("utf-8", "surrogateescape")).hexdigest()[:12]

    def select(self, samples: np.ndarray) -> Index:
        """The index of some of the samples, in the given order, with ids of its own."""
        spans = None if self.spans is None else self.spans[samples]
        paths = tuple(self.paths[i] for i in samples)
        return Index(self.root, paths, self.labels[samples], self.classes, spans, self.shards, self._open)


def read_index(root: Path) -> Index:
    """The index of a folder of class folders, of pictures without labels or, where it has neither, of tar shards.

    A folder's listing is kept (`listing`). Raises BadInput as `image_folder` and `shards`.
    """
    if not root.is_dir():
        raise _no_folder(root, "data.root")
    found = listing(root)
    if not _class_names(found) and any("/" not in name for name in found.tars):
        return shards(root)
    return _of_listing(root, found)


def pretraining_index(root: Path, unlabelled: Sequence[str] | None = None) -> Index:
    """The index of what is pretrained on: `root/train` and, with label -1, all pictures in further folders below `root`.

    Where `train` itself is among these, no folder in it is a class.
    Raises BadInput as `read_index`, and where a further folder is missing or holds no pictures.
    """
    if not unlabelled:
        return read_index(root / "train")
    if "train" in unlabelled:
        labelled = Index(root / "train", (), np.empty(0, dtype=np.int64), ())
    else:
        labelled = read_index(root / "train")
    if labelled.spans is not None:
        raise BadInput(
            f"data.unlabelled = {list(unlabelled)} adds folders of pictures, and {str(labelled.root)!r} holds tar shards: "
            "lay the shards' pictures out in folders, or leave data.unlabelled out"
        )
    paths = [f"train/{path}" for path in labelled.paths]
    for folder in unlabelled:
        found = listing(root / folder).pictures if (root / folder).is_dir() else ()
        if not found:
            raise BadInput(
                f"`data.unlabelled` names {folder!r}, and {str(root / folder)!r} is no folder with pictures: fill it, or "
                "give data.unlabelled=null to pretrain on train alone"
            )
        paths += [f"{folder}/{path}" for path in found]
    labels = np.full(len(paths), -1, dtype=np.int64)
    labels[: len(labelled)] = labelled.labels
    return Index(root, tuple(paths), labels, labelled.classes)


def image_folder(root: Path, *, option: str = "data.root") -> Index:
    """The index of `root/<class>/**/<picture>`, or of a flat folder: where pictures lie directly in `root`, all that lie
    below it, at any depth, have no label.

    Lists anew always. Raises BadInput, naming `option`, where the folder is missing, has neither class folders nor
    pictures, or has a class folder without pictures.
    """
    if not root.is_dir():
        raise _no_folder(root, option)
    return _of_listing(root, list_folder(root))


def _no_folder(root: Path, option: str) -> BadInput:
    return BadInput(
        f"no folder {str(root)!r}: point {option} at a data set laid out as train/<class>/<picture> and "
        "val/<class>/<picture>, or make one with `ssl-pipeline prepare-data NAME OUT`"
    )


def _class_names(found: Listing) -> list[str]:
    return sorted(name for name in found.folders if name and "/" not in name)


def _of_listing(root: Path, found: Listing) -> Index:
    classes = _class_names(found)
    direct = [path for path in found.pictures if "/" not in path]
    if direct:
        if classes:
            log.warning(
                "%d pictures lie directly in %s, %s among them, so its folders are no classes and nothing in it is labelled: "
                "move them out where the folders are classes",
                len(direct), root, direct[0],
            )  # fmt: skip
        return Index(root, found.pictures, np.full(len(found.pictures), -1, dtype=np.int64), ())
    if not classes:
        raise BadInput(
            f"{str(root)!r} holds no class folders: lay pictures out as {root}/<class>/<picture>, or as {root}/<picture> "
            "where they have no labels"
        )
    by_class: dict[str, list[str]] = {name: [] for name in classes}
    for path in found.pictures:
        by_class[path.partition("/")[0]].append(path)
    for name, members in by_class.items():
        if not members:
            endings = ", ".join(sorted(EXTENSIONS))
            raise BadInput(f"class folder {str(root / name)!r} holds no pictures ({endings}): fill it or remove it")
    paths = tuple(path for name in classes for path in by_class[name])
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(by_class[name]) for name in classes])
    return Index(root, paths, labels, tuple(classes))


def class_names(root: Path) -> list[str]:
    """Names of the class folders, sorted."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if is_folder(entry) and not entry.name.startswith("."))


# ---------------------------------------------------------------------------------------------------------------- shards
def shards(root: Path) -> Index:
    """The index of `root/*.tar` in WebDataset's layout: a picture NAME.jpg and its class in NAME.cls, one line of text.

    From the index file of `pack-shards`, where it is there and fits the shards' names and sizes: ids, labels, classes and
    paths are then those of the packed folder. Otherwise from the tars themselves: samples in the order of shards and of
    names in them; classes that are whole numbers are labels as they stand, others are numbered in the order of their
    sorted names; and where no picture has one, nothing is labelled.
    Read once in a process, while the shards do not change.
    Raises BadInput where a shard cannot be read, some pictures have a class and some have none, or packing did not end.
    """
    if (root / UNFINISHED).exists():
        raise BadInput(
            f"the shards in {str(root)!r} are not complete, packing is going on or was stopped: wait, or give the same "
            "`ssl-pipeline pack-shards` command again"
        )
    try:
        there = tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in _tars(root))
    except OSError as error:
        raise BadInput(f"cannot list {str(root)!r}: {error.strerror}; mend it or move it away") from None
    index = root / INDEX
    return _shards(root, there, index.stat().st_mtime_ns if index.is_file() else None)


def _tars(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("*.tar") if not path.name.startswith("."))


@functools.lru_cache(maxsize=8)
def _shards(root: Path, there: tuple[tuple[str, int, int], ...], indexed: int | None) -> Index:
    if indexed is not None:
        found = read_shard_index(root)
        if isinstance(found, Index):
            return found
        log.warning("%s is not used, and the shards are read themselves: %s", root / INDEX, found)
    return _of_tars(root, tuple(name for name, _, _ in there))


def read_shard_index(root: Path) -> Index | str:
    """The index of shards by their index file; where that does not do, a few words saying why."""
    saved = read_arrays(root / INDEX)
    if saved is None:
        return "it is damaged"
    try:
        if int(saved["version"]) != _VERSION:
            return f"it is of version {int(saved['version'])}, and this program writes {_VERSION}"
        files, sizes = names(saved["shards"]), saved["shard_sizes"]
        paths, classes = names(saved["paths"]), names(saved["classes"])
        labels, spans = saved["labels"].astype(np.int64), saved["spans"].astype(np.int64)
        if sizes.shape != (len(files),) or labels.shape != (len(paths),) or spans.shape != (len(paths), 3):
            return "its parts do not fit each other"
        ends = spans[:, 1] + spans[:, 2]
        if (labels.min(initial=0) < -1 or labels.max(initial=-1) >= len(classes) or spans.min(initial=0) < 0
                or spans[:, 0].max(initial=-1) >= len(files) or (ends > sizes[spans[:, 0]]).any()):  # fmt: skip
            return "it points outside the shards"
        found = [path.name for path in _tars(root)]
        if found != sorted(files):
            other = min(set(found) ^ set(files))
            return f"{other} is {'not in it' if other in found else 'missing'}"
        for name, size in zip(files, sizes.tolist(), strict=True):
            if (root / name).stat().st_size != size:
                return f"{name} has another size"
    except (OSError, KeyError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return Index(root, paths, labels, classes, spans, files)


def write_shard_index(index: Index, sizes: Sequence[int]) -> None:
    """Write the index file of shards of the given sizes, in bytes, into their folder. Raises OSError."""
    assert index.spans is not None
    values: dict[str, Any] = {"version": np.int64(_VERSION), "paths": blob(index.paths), "classes": blob(index.classes)}
    values |= {"labels": index.labels, "spans": index.spans, "shards": blob(index.shards)}
    write_arrays(index.root / INDEX, values | {"shard_sizes": np.array(sizes, dtype=np.int64)})


def tar_members(path: Path) -> list[tuple[str, int, int]]:
    """(name, offset, size) of the files in a tar, in its order. Raises tarfile.TarError or OSError."""
    with tarfile.open(path, "r:") as archive:
        return [(member.name, member.offset_data, member.size) for member in archive if member.isfile()]


def _of_tars(root: Path, files: tuple[str, ...]) -> Index:
    paths: list[str] = []
    spans: list[tuple[int, int, int]] = []
    words: list[str] = []
    without: tuple[str, str, str] | None = None
    log.info("reading the names in %d shards of %s", len(files), root)
    for place, file in enumerate(files):
        found: dict[str, tuple[str, int, int]] = {}
        classes: dict[str, str] = {}
        try:
            with tarfile.open(root / file, "r:") as archive:
                for member in archive:
                    folder, slash, name = member.name.rpartition("/")
                    key, _, ending = name.partition(".")  # WebDataset's rule: the first dot of the file's name
                    key = folder + slash + key
                    if f".{ending.lower()}" in EXTENSIONS:
                        found[key] = (member.name, member.offset_data, member.size)
                    elif ending.lower() == "cls":
                        classes[key] = archive.extractfile(member).read(1000).decode().strip()  # type: ignore[union-attr]
        except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{str(root / file)!r} is no tar shard that can be read: {error}") from None
        for key, (name, offset, size) in sorted(found.items()):
            if key in classes:
                words.append(classes[key])
            else:
                without = without or (str(root / file), name, key)
            if words and without:
                raise BadInput(
                    f"{without[0]!r}: picture {without[1]} has no class file {without[2]}.cls beside it, and others have one"
                )
            paths.append(f"{file}/{name}")
            spans.append((place, offset, size))
    if not paths:
        raise BadInput(f"the shards in {str(root)!r} hold no pictures")
    labels, classes_of_all = _numbered(root, words) if words else ([-1] * len(paths), ())
    return Index(
        root,
        tuple(paths),
        np.asarray(labels, dtype=np.int64),
        classes_of_all,
        np.asarray(spans, dtype=np.int64),
        files,
    )


def _numbered(root: Path, words: list[str]) -> tuple[list[int], tuple[str, ...]]:
    """Labels of class words, and the names of all classes."""
    if not all(word.isdecimal() for word in words):
        known = sorted(set(words))
        places = {name: place for place, name in enumerate(known)}
        return [places[word] for word in words], tuple(known)
    labels = [int(word) for word in words]
    if max(labels) >= 100 * len(set(labels)) + 1000:
        raise BadInput(
            f"the class numbers in {str(root)!r} reach {max(labels)} for {len(set(labels))} classes: number them from 0, or "
            "give names that are no numbers"
        )
    return labels, tuple(str(number) for number in range(max(labels) + 1))
