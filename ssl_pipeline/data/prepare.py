"""From official sources to the one layout: OUT/train/<class>/<picture> and OUT/val/<class>/<picture>."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ssl_pipeline.data.index import EXTENSIONS, class_names, image_folder
from ssl_pipeline.exits import BadInput

SPLITS = {"train": "train", "val": "val", "test": "val"}
"""Names of splits in a source, and what they are called here."""


def prepare(name: str, out: Path, sources: Sequence[Path] = ()) -> dict[str, int]:
    """Make the data set `name` under `out`; returns the number of pictures in train and val.

    `sources`: tars or folders that hold train/<class>/<picture> and val/ or test/ likewise (`folder` needs one, `cifar10`
    and `cifar100` then download nothing). Written beside `out` and renamed at the end: `out` is whole or not there.
    Raises BadInput for an unknown name, an `out` that exists, or a source without pictures.
    """
    makers: dict[str, Callable[[], Iterable[tuple[str, str, bytes | np.ndarray]]]] = {
        "digits": _digits,
        "cifar10": lambda: _from_sources(sources) if sources else _cifar("CIFAR10", out),
        "cifar100": lambda: _from_sources(sources) if sources else _cifar("CIFAR100", out),
        "folder": lambda: _from_sources(sources),
    }
    if name not in makers:
        raise BadInput(f"no data set {name!r}: choose among {', '.join(makers)}")
    if name == "folder" and not sources:
        raise BadInput("`folder` needs --source PATH: a tar or folder with train/<class>/ and val/<class>/")
    if out.exists():
        raise BadInput(f"{str(out)!r} exists; remove it or name another folder")
    working = out.with_name(f".{out.name}.partial")
    shutil.rmtree(working, ignore_errors=True)
    try:
        for split, path, picture in makers[name]():
            target = working / split / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(picture, bytes):
                target.write_bytes(picture)
            else:
                Image.fromarray(picture).save(target)
        counts = {}
        for split in ("train", "val"):
            if not (working / split).is_dir():
                raise BadInput(
                    f"the source holds no {split} pictures; it needs train/<class>/ and val/<class>/ (or test/)"
                )
            counts[split] = len(image_folder(working / split))
        if class_names(working / "train") != class_names(working / "val"):
            raise BadInput("the source's train and val hold different classes; a classifier needs the same in both")
        os.replace(working, out)
    except (OSError, tarfile.TarError) as error:
        raise BadInput(f"cannot make {str(out)!r}: {error}") from None
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return counts


def _digits() -> Iterator[tuple[str, str, np.ndarray]]:
    """scikit-learn's 1,797 handwritten digits (8 x 8, UCI), as 32 x 32 RGB: 1,437 train and 360 val, stratified."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise BadInput("the digits come with scikit-learn: pip install 'ssl-pipeline[demo]'") from None
    data = load_digits()
    train, val = train_test_split(np.arange(len(data.target)), test_size=360, stratify=data.target, random_state=0)
    for split, samples in (("train", train), ("val", val)):
        for sample in sorted(samples):
            small = Image.fromarray(np.rint(data.images[sample] * (255 / 16)).astype(np.uint8))
            picture = np.asarray(small.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB"))
            yield split, f"{data.target[sample]}/{sample:04d}.png", picture


def _cifar(name: str, out: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """CIFAR as torchvision downloads it (md5-checked), losslessly as PNG."""
    from torchvision import datasets

    archive = out.parent / ".download"
    for split in ("train", "val"):
        try:
            data = getattr(datasets, name)(archive, train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise BadInput(
                f"cannot download {name}: {error}; give --source PATH, a tar or folder with train/<class>/ and test/<class>/"
            ) from None
        for sample, (picture, label) in enumerate(zip(data.data, data.targets, strict=True)):
            yield split, f"{data.classes[label]}/{sample:05d}.png", picture


def _from_sources(sources: Iterable[Path]) -> Iterator[tuple[str, str, bytes]]:
    for source in sources:
        if source.is_dir():
            files = (path for path in sorted(source.rglob("*")) if path.is_file())
            pictures = ((path.relative_to(source).as_posix(), path.read_bytes) for path in files)
            yield from _laid_out(pictures)
        elif source.is_file() and tarfile.is_tarfile(source):
            with tarfile.open(source) as archive:
                # Only names and bytes are taken: a member's mode, owner, links and absolute paths never reach the disk.
                members = ((m.name, _reader(archive, m)) for m in archive if m.isfile())
                yield from _laid_out(members)
        else:
            raise BadInput(f"source {str(source)!r} is neither a folder nor a tar")


def _reader(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Callable[[], bytes]:
    def read() -> bytes:
        file = archive.extractfile(member)
        assert file is not None
        return file.read()

    return read


def _laid_out(pictures: Iterable[tuple[str, Callable[[], bytes]]]) -> Iterator[tuple[str, str, bytes]]:
    """(split, class/picture, bytes) of every name that ends in <split>/<class>/<picture>."""
    for name, read in pictures:
        parts = PurePosixPath(name).parts
        if len(parts) < 3 or parts[-3] not in SPLITS or PurePosixPath(name).suffix.lower() not in EXTENSIONS:
            continue
        if parts[-2] == "..":
            continue
        yield SPLITS[parts[-3]], "/".join(parts[-2:]), read()
