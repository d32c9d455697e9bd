"""What samples there are: the pictures of an image folder or of tar shards, in an order that depends on names alone."""

from __future__ import annotations

import functools
import hashlib
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssl_pipeline.exits import BadInput

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"})
"""Endings, in lower case, of the files that count as pictures."""


@dataclass(frozen=True)
class Index:
    """N samples. A sample's id is its place here; it never changes while the folder's names do not."""

    root: Path
    paths: tuple[str, ...]
    """Path of each sample, relative to `root`; within a shard, the shard's name and the member's."""
    labels: np.ndarray
    """(N,) int64: the place of the sample's class in `classes`; -1 where it has none (`pretraining_index`)."""
    classes: tuple[str, ...]
    """Names of the classes, sorted."""
    spans: np.ndarray | None = None
    """(N, 2) int64: offset and size, in bytes, of each sample in its shard; None where each is a file of its own."""

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, sample: int) -> np.ndarray:
        """The encoded bytes of a sample, (size,) uint8. Raises OSError."""
        if self.spans is None:
            return np.fromfile(self.root / self.paths[sample], dtype=np.uint8)
        shard, _, _ = self.paths[sample].partition("/")
        offset, size = self.spans[sample].tolist()
        return np.fromfile(self.root / shard, dtype=np.uint8, count=size, offset=offset)

    def digest(self) -> str:
        """A short name of the listing: equal where ids mean the same pictures."""
        return hashlib.sha256("\n".join(self.paths).encode()).hexdigest()[:12]

    def select(self, samples: np.ndarray) -> Index:
        """The index of some of the samples, in the given order, with ids of its own."""
        spans = None if self.spans is None else self.spans[samples]
        return Index(self.root, tuple(self.paths[i] for i in samples), self.labels[samples], self.classes, spans)


def read_index(root: Path) -> Index:
    """The index of a folder of class folders or, where it has none, of tar shards. Raises BadInput as these do."""
    if root.is_dir() and not class_names(root) and any(root.glob("*.tar")):
        return shards(root)
    return image_folder(root)


def pretraining_index(root: Path, unlabelled: Sequence[str] | None = None) -> Index:
    """The index of what is pretrained on: `root/train` and, with label -1, all pictures in further folders below `root`.

    Raises BadInput as `read_index`, and where a further folder is missing or holds no pictures.
    """
    labelled = read_index(root / "train")
    if not unlabelled:
        return labelled
    if labelled.spans is not None:
        raise BadInput(
            f"data.unlabelled = {list(unlabelled)} adds folders of pictures, and {str(labelled.root)!r} holds tar shards: "
            "lay the shards' pictures out in folders, or leave data.unlabelled out"
        )
    paths = [f"train/{path}" for path in labelled.paths]
    for folder in unlabelled:
        found = sorted(_pictures(root / folder, folder)) if (root / folder).is_dir() else []
        if not found:
            raise BadInput(
                f"`data.unlabelled` names {folder!r}, and {str(root / folder)!r} is no folder with pictures: fill it, or "
                "give data.unlabelled=null to pretrain on train alone"
            )
        paths += found
    labels = np.full(len(paths), -1, dtype=np.int64)
    labels[: len(labelled)] = labelled.labels
    return Index(root, tuple(paths), labels, labelled.classes)


def image_folder(root: Path, *, option: str = "data.root") -> Index:
    """The index of `root/<class>/**/<picture>`.

    Raises BadInput, naming `option`, where the folder is missing, has no class folders, or has a class folder without
    pictures.
    """
    if not root.is_dir():
        raise BadInput(
            f"no folder {str(root)!r}: point {option} at a data set laid out as train/<class>/<picture> and "
            "val/<class>/<picture>, or make one with `ssl-pipeline prepare-data NAME OUT`"
        )
    classes = class_names(root)
    if not classes:
        raise BadInput(f"{str(root)!r} holds no class folders: lay pictures out as {root}/<class>/<picture>")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(_pictures(root / name, name))
        if not found:
            endings = ", ".join(sorted(EXTENSIONS))
            raise BadInput(f"class folder {str(root / name)!r} holds no pictures ({endings}): fill it or remove it")
        paths += found
        labels += [label] * len(found)
    return Index(root, tuple(paths), np.asarray(labels, dtype=np.int64), tuple(classes))


@functools.cache
def shards(root: Path) -> Index:
    """The index of `root/*.tar` in WebDataset's layout: a picture NAME.jpg and its class in NAME.cls, one line of text.

    Read once in a process. Classes that are whole numbers are labels as they stand; others are numbered in the order of
    their sorted names.
    Raises BadInput where a shard cannot be read or a picture has no class.
    """
    paths: list[str] = []
    spans: list[tuple[int, int]] = []
    words: list[str] = []
    for path in sorted(root.glob("*.tar")):
        found: dict[str, tuple[str, int, int]] = {}
        classes: dict[str, str] = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    folder, slash, name = member.name.rpartition("/")
                    key, _, ending = name.partition(".")  # WebDataset's rule: the first dot of the file's name
                    key = folder + slash + key
                    if f".{ending.lower()}" in EXTENSIONS:
                        found[key] = (member.name, member.offset_data, member.size)
                    elif ending.lower() == "cls":
                        classes[key] = archive.extractfile(member).read(1000).decode().strip()  # type: ignore[union-attr]
        except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{str(path)!r} is no tar shard that can be read: {error}") from None
        for key, (name, offset, size) in sorted(found.items()):
            if key not in classes:
                raise BadInput(f"{str(path)!r}: picture {name} has no class file {key}.cls beside it")
            paths.append(f"{path.name}/{name}")
            spans.append((offset, size))
            words.append(classes[key])
    if not paths:
        raise BadInput(f"the shards in {str(root)!r} hold no pictures with class files")
    if all(word.isdecimal() for word in words):
        labels = [int(word) for word in words]
        if max(labels) >= 100 * len(set(labels)) + 1000:
            raise BadInput(
                f"the class numbers in {str(root)!r} reach {max(labels)} for {len(set(labels))} classes: number them from 0, or "
                "give names that are no numbers"
            )
        names = [str(number) for number in range(max(labels) + 1)]
    else:
        names = sorted(set(words))
        places = {name: place for place, name in enumerate(names)}
        labels = [places[word] for word in words]
    return Index(
        root, tuple(paths), np.asarray(labels, dtype=np.int64), tuple(names), np.asarray(spans, dtype=np.int64)
    )


def class_names(root: Path) -> list[str]:
    """Names of the class folders, sorted."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _pictures(folder: Path, prefix: str) -> list[str]:
    found: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = f"{prefix}/{entry.name}"
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                found += _pictures(Path(entry.path), name)
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                found.append(name)
    return found
