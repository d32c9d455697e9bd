"""What samples there are: the pictures of an image folder, in an order that depends on their names alone."""

from __future__ import annotations

import hashlib
import os
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
    """Path of each sample, relative to `root`."""
    labels: np.ndarray
    """(N,) int64: the place of the sample's class in `classes`."""
    classes: tuple[str, ...]
    """Names of the classes, sorted."""

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, sample: int) -> np.ndarray:
        """The encoded bytes of a sample, (size,) uint8. Raises OSError."""
        return np.fromfile(self.root / self.paths[sample], dtype=np.uint8)

    def digest(self) -> str:
        """A short name of the listing: equal where ids mean the same pictures."""
        return hashlib.sha256("\n".join(self.paths).encode()).hexdigest()[:12]

    def select(self, samples: np.ndarray) -> Index:
        """The index of some of the samples, in the given order, with ids of its own."""
        return Index(self.root, tuple(self.paths[i] for i in samples), self.labels[samples], self.classes)


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
