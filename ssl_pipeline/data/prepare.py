"""From official sources to the one layout: OUT/train/<class>/<picture> and OUT/val/<class>/<picture>."""

from __future__ import annotations

import functools
import io
import itertools
import logging
import lzma
import os
import re
import shutil
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from ssl_pipeline.data.index import EXTENSIONS, class_names, image_folder
from ssl_pipeline.exits import BadInput

log = logging.getLogger("ssl_pipeline")

SPLITS = {"train": "train", "val": "val", "test": "val"}
"""Names of splits in a source, and what they are called here."""

SOURCES = {
    "folder": "a tar, zip or folder with train/<class>/ and val/<class>/",
    "stl10": "stl10_binary.tar.gz, or the folder in it (https://cs.stanford.edu/~acoates/stl10)",
    "tiny_imagenet": "tiny-imagenet-200.zip, or the folder in it",
    "imagenet100": "a laid-out ImageNet, with train/<wnid>/ and val/<wnid>/",
    "imagenet": "ILSVRC2012_img_train.tar ILSVRC2012_img_val.tar ILSVRC2012_devkit_t12.tar.gz, in any order",
}
"""What --source must name for the data sets that are not downloaded."""

SMALL = 1 << 26
"""Bytes above which a list of labels or names is none."""

UNPACKED = 100
"""Times the size of an archive that its files may have together: pictures, and lists of their names, are hardly ever smaller
packed. zip and gzip reach 1000 with zeros."""

Picture = tuple[str, str, IO[bytes] | np.ndarray | Path]
"""(split, path below it, the picture): an open file, pixels (H, W, 3), or the path of a file that may be linked."""


class Member(NamedTuple):
    """A file of a folder or an archive; read it before the next one is asked for."""

    path: PurePosixPath
    size: int
    """In bytes."""
    open: Callable[[], IO[bytes]]


def prepare(name: str, out: Path, sources: Sequence[Path] = (), classes: Path | None = None) -> dict[str, int]:
    """Make the data set `name` under `out`; returns the number of pictures in train, in val and, if any, without labels.

    `sources`: what SOURCES says; `cifar10` and `cifar100` download nothing where they have one, laid out as for `folder`.
    `classes`: for `imagenet100`, the file with its wnids. Pictures are written one after the other, beside `out`, which is
    renamed at the end: `out` is whole or not there.
    Raises BadInput for an unknown name, an `out` that exists, and a source that lacks something or holds something else.
    """
    makers: dict[str, Callable[[], Iterable[Picture]]] = {
        "digits": _digits,
        "cifar10": lambda: _laid_out(sources) if sources else _cifar("CIFAR10", out),
        "cifar100": lambda: _laid_out(sources) if sources else _cifar("CIFAR100", out),
        "stl10": lambda: _stl10(_only(name, sources)),
        "tiny_imagenet": lambda: _tiny_imagenet(_only(name, sources)),
        "imagenet100": lambda: _imagenet100(_only(name, sources), classes),
        "imagenet": lambda: _imagenet(sources),
        "folder": lambda: _laid_out(sources),
    }
    if name not in makers:
        raise BadInput(f"no data set {name!r}: choose among {', '.join(makers)}")
    if name in SOURCES and not sources:
        raise BadInput(f"`{name}` needs --source: {SOURCES[name]}")
    if name == "digits" and sources:
        raise BadInput("`digits` comes with scikit-learn: leave --source out")
    for source in sources:
        if not source.exists():
            raise BadInput(f"--source {str(source)!r} does not exist")
        if out.resolve().is_relative_to(source.resolve()):
            raise BadInput(f"{str(out)!r} lies within --source {str(source)!r}: name a folder outside it")
    if classes is not None and name != "imagenet100":
        raise BadInput(f"--classes is imagenet100's; leave it out for {name}")
    if out.exists():
        raise BadInput(f"{str(out)!r} exists; remove it or name another folder")
    working = out.with_name(f".{out.name}.partial")
    shutil.rmtree(working, ignore_errors=True)
    written: Counter[str] = Counter()
    try:
        working.mkdir(parents=True)  # nobody else's, whom rmtree could not remove
        for split, path, picture in makers[name]():
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise BadInput(f"the source names a class or picture {path!r}, which would not lie below {str(out)!r}")
            _write(picture, working / split / path)
            written[split] += 1
        splits = [split for split in ("train", "val") if (working / split).is_dir()]
        if "train" not in splits or (name != "folder" and "val" not in splits):
            lacking = "val" if "train" in splits else "train"
            raise BadInput(
                f"the source holds no {lacking} pictures; it needs train/<class>/ and val/<class>/ (or test/)"
            )
        if "val" not in splits:
            log.warning(
                "the source holds no val pictures (val/<class>/ or test/<class>/): evaluations need --data FOLDER"
            )
        elif class_names(working / "train") != class_names(working / "val"):
            raise BadInput("the source's train and val hold different classes; a classifier needs the same in both")
        counts = {split: len(image_folder(working / split)) for split in splits}
        counts |= {split: count for split, count in written.items() if split not in counts}
        os.replace(working, out)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile,
            NotImplementedError, RuntimeError) as error:  # fmt: skip
        raise BadInput(f"cannot make {str(out)!r}: {error}") from None
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return counts


def _write(picture: IO[bytes] | np.ndarray | Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(picture, np.ndarray):
        Image.fromarray(picture).save(target)
    elif isinstance(picture, Path):
        there = os.path.realpath(picture)  # a link to a relative symbolic link would point elsewhere
        try:
            os.link(there, target)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(there, target)
    else:
        with picture, target.open("wb") as file:
            shutil.copyfileobj(picture, file)


def _only(name: str, sources: Sequence[Path]) -> Path:
    if len(sources) > 1:
        raise BadInput(f"`{name}` takes one --source, not {len(sources)}: {SOURCES[name]}")
    return sources[0]


# ------------------------------------------------------------------------------------------------- folders and archives
def _members(source: Path) -> Iterator[Member]:
    """The files of a folder (sorted), a tar or a zip (in its order). Raises BadInput where it is none of them.

    Only names and bytes are taken: a member's mode, owner and links never reach the disk, and neither does a name with `..`.
    """
    if source.is_dir():
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            yield from _named(path.relative_to(source), path.stat().st_size, functools.partial(path.open, "rb"))
    elif source.is_file() and tarfile.is_tarfile(source):
        with tarfile.open(source) as archive:
            yield from _no_bomb(_tar_members(archive), source, source.stat().st_size)
    elif source.is_file() and zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as zipped:
            yield from _no_bomb(_zip_members(zipped), source, source.stat().st_size)
    else:
        raise BadInput(f"source {str(source)!r} is neither a folder nor a tar or zip that can be read")


def _tar_members(archive: tarfile.TarFile) -> Iterator[Member]:
    for info in archive:
        if info.isfile():
            yield from _named(info.name, info.size, functools.partial(archive.extractfile, info))


def _zip_members(archive: zipfile.ZipFile) -> Iterator[Member]:
    for info in archive.infolist():
        if not info.is_dir():
            yield from _named(info.filename, info.file_size, functools.partial(archive.open, info))


def _no_bomb(members: Iterable[Member], archive: Path | PurePosixPath, size: int) -> Iterator[Member]:
    """The files of an archive of `size` bytes. Raises BadInput before the one with which they have over UNPACKED times that."""
    whole = 0
    for member in members:
        whole += member.size
        if whole > max(UNPACKED * size, SMALL):
            raise BadInput(
                f"{str(archive)!r} has {size:,} bytes and its files have {whole:,} or more, which no pictures have: unpack it "
                "by hand where you trust it, and give the folder"
            )
        yield member


def _named(name: str | Path, size: int, opened: Callable[[], Any]) -> Iterator[Member]:
    path = PurePosixPath(name)
    if ".." not in path.parts and not path.name.startswith("."):
        yield Member(path, size, opened)


def _is_picture(member: Member) -> bool:
    return member.path.suffix.lower() in EXTENSIONS


def _small(member: Member) -> bytes:
    """The bytes of a list of labels or names."""
    if member.size > SMALL:
        raise BadInput(
            f"{member.path} has {member.size:,} bytes, too many for what it is: is the archive the official one?"
        )
    with member.open() as file:
        return file.read()


def _lines(data: bytes) -> list[str]:
    return [line.strip() for line in data.decode(errors="replace").splitlines() if line.strip()]


def _laid_out(sources: Iterable[Path]) -> Iterator[Picture]:
    """Every picture whose name ends in <split>/<class>/<picture>."""
    for source in sources:
        for member in _members(source):
            parts = member.path.parts
            if len(parts) >= 3 and parts[-3] in SPLITS and _is_picture(member):
                yield SPLITS[parts[-3]], f"{parts[-2]}/{parts[-1]}", member.open()


# ------------------------------------------------------------------------------------------------------------ data sets
def _digits() -> Iterator[Picture]:
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


def _cifar(name: str, out: Path) -> Iterator[Picture]:
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


STL10_SHAPE = (3, 96, 96)
"""Of a picture in STL-10's binary files: channels, columns, rows, one byte each."""


def _stl10(source: Path) -> Iterator[Picture]:
    """STL-10's binary files, losslessly as PNG: 5,000 train, 8,000 test as val, and unlabeled/<thousand>/, 100,000.

    Read twice, since a tar may have the labels behind the pictures. Source of the format: the data set's page;
    pytorch/vision torchvision/datasets/stl10.py.
    """
    splits = {"train_X.bin": "train", "test_X.bin": "val", "unlabeled_X.bin": "unlabeled"}
    labels = {"train": "train_y.bin", "val": "test_y.bin"}
    sizes: dict[str, int] = {}
    small: dict[str, bytes] = {}
    for member in _members(source):
        sizes[member.path.name] = member.size
        if member.path.name in (*labels.values(), "class_names.txt"):
            small[member.path.name] = _small(member)
    for wanted in (*splits, *labels.values(), "class_names.txt"):
        if wanted not in sizes:
            raise BadInput(f"{str(source)!r} holds no {wanted}: STL-10 needs {SOURCES['stl10']}")
    names = _lines(small["class_names.txt"])
    one = int(np.prod(STL10_SHAPE))
    for file, split in splits.items():
        count, rest = divmod(sizes[file], one)
        known = len(small[labels[split]]) if split in labels else count
        if rest or count != known:
            raise BadInput(
                f"{file} in {str(source)!r} has {sizes[file]:,} bytes, which are not {known} pictures of {one:,}: "
                "download STL-10 again"
            )
        wrong = sorted({label for label in small.get(labels.get(split, ""), b"") if not 1 <= label <= len(names)})
        if wrong:
            raise BadInput(
                f"{labels[split]} in {str(source)!r} has class {wrong[0]}, and class_names.txt names 1 to {len(names)}: "
                "download STL-10 again"
            )
    for member in _members(source):
        if member.path.name not in splits:
            continue
        split = splits[member.path.name]
        with member.open() as pictures:
            for number in range(member.size // one):
                pixels = np.frombuffer(pictures.read(one), dtype=np.uint8).reshape(STL10_SHAPE).transpose(2, 1, 0)
                folder = names[small[labels[split]][number] - 1] if split in labels else f"{number // 1000:03d}"
                yield split, f"{folder}/{number:06d}.png", pixels


def _tiny_imagenet(source: Path) -> Iterator[Picture]:
    """Tiny ImageNet: 100,000 train and, by val_annotations.txt, 10,000 val; test/ has no labels and is left out."""
    known: set[str] = set()
    notes: bytes | None = None
    for member in _members(source):
        parts = member.path.parts
        if parts[-2:] == ("val", "val_annotations.txt"):
            notes = _small(member)
        elif _tiny_training(member):
            known.add(parts[-3])
    if not known or notes is None:
        lacking = "val/val_annotations.txt" if known else "train/<wnid>/images/<picture>"
        raise BadInput(f"{str(source)!r} holds no {lacking}: Tiny ImageNet needs {SOURCES['tiny_imagenet']}")
    truth: dict[str, str] = {}
    for line in _lines(notes):
        picture, wnid = [*line.split(), "", ""][:2]
        if wnid not in known:
            raise BadInput(
                f"val_annotations.txt in {str(source)!r} gives {picture!r} class {wnid!r}, which train/ does not have: "
                "download Tiny ImageNet again"
            )
        truth[picture] = wnid
    for member in _members(source):
        parts = member.path.parts
        if _tiny_training(member):
            yield "train", f"{parts[-3]}/{parts[-1]}", member.open()
        elif parts[-3:-1] == ("val", "images") and _is_picture(member):
            if parts[-1] not in truth:
                raise BadInput(f"val_annotations.txt in {str(source)!r} does not name {parts[-1]}: download it again")
            yield "val", f"{truth.pop(parts[-1])}/{parts[-1]}", member.open()
    if truth:
        raise BadInput(
            f"val/images in {str(source)!r} lacks {len(truth)} of the pictures that val_annotations.txt names, "
            f"{min(truth)} among them: download it again"
        )


def _tiny_training(member: Member) -> bool:
    parts = member.path.parts
    return len(parts) >= 4 and (parts[-4], parts[-2]) == ("train", "images") and _is_picture(member)


def _imagenet100(source: Path, classes: Path | None) -> Iterator[Picture]:
    """The pictures of 100 classes of a laid-out ImageNet, by hard links where the file system allows."""
    if classes is None:
        raise BadInput("`imagenet100` needs --classes FILE: its 100 wnids, one a line or separated by blanks")
    if not classes.is_file() or classes.stat().st_size > SMALL:
        raise BadInput(f"--classes {str(classes)!r} is no file of wnids")
    wnids = classes.read_text(encoding="utf-8", errors="replace").split()
    strange = next((word for word in wnids if not re.fullmatch(r"n\d{8}", word)), None)
    if strange is not None:
        raise BadInput(f"{str(classes)!r} holds {strange[:40]!r}, which is no wnid: n and eight digits, as n01440764")
    if len(wnids) != 100 or len(set(wnids)) != 100:
        raise BadInput(
            f"{str(classes)!r} holds {len(wnids)} words, {len(set(wnids))} different ones; it must be 100 wnids"
        )
    for split in ("train", "val"):
        known = set(class_names(source / split)) if (source / split).is_dir() else set()
        unknown = sorted(set(wnids) - known)
        if unknown:
            raise BadInput(
                f"{str(source / split)!r} has no folder of {len(unknown)} of the classes in {str(classes)!r}, {unknown[0]!r} "
                f"among them; --source must be {SOURCES['imagenet100']}"
            )
    for split, wnid in itertools.product(("train", "val"), sorted(wnids)):
        found = sorted((source / split / wnid).iterdir())
        found = [path for path in found if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")]
        if not found:
            raise BadInput(f"class folder {str(source / split / wnid)!r} holds no pictures: is the source whole?")
        for path in found:
            yield split, f"{wnid}/{path.name}", path


def _imagenet(sources: Sequence[Path]) -> Iterator[Picture]:
    """ImageNet (ILSVRC 2012) from its two tars and the development kit.

    The training tar holds a tar of each class, which is read in place. Source of the formats: the kit's readme.txt;
    pytorch/vision torchvision/datasets/imagenet.py.
    """
    found = [_kind(source) for source in sources]
    if sorted(found) != ["devkit", "train", "val"]:
        raise BadInput(
            f"--source gives ImageNet's {', '.join(found)}, and one of each is needed: {SOURCES['imagenet']}"
        )
    kinds = dict(zip(found, sources, strict=True))
    wnids, truth = _devkit(kinds["devkit"])
    known = set(wnids.values())
    for inner in _members(kinds["train"]):
        wnid = inner.path.stem
        if wnid not in known:
            raise BadInput(
                f"{inner.path.name} in {str(kinds['train'])!r} is no tar of a class that the development kit has"
            )
        with inner.open() as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in _no_bomb(_tar_members(archive), inner.path, inner.size):
                yield "train", f"{wnid}/{member.path.name}", member.open()
    seen: set[int] = set()
    for member in _members(kinds["val"]):
        digits = member.path.stem.rpartition("_")[2]
        number = int(digits) if digits.isdecimal() else 0
        if not 1 <= number <= len(truth) or number in seen:
            raise BadInput(
                f"{member.path.name} in {str(kinds['val'])!r} is none of the {len(truth)} pictures whose classes the development "
                "kit has, or the second one of its number"
            )
        seen.add(number)
        yield "val", f"{wnids[truth[number - 1]]}/{member.path.name}", member.open()
    if len(seen) != len(truth):
        raise BadInput(
            f"{str(kinds['val'])!r} holds {len(seen)} pictures, and the development kit has the classes of {len(truth)}: "
            "download it again"
        )


def _kind(source: Path) -> str:
    """Which of ImageNet's archives this is, by what lies in it: train, val or devkit."""
    for member in _members(source):
        if member.path.name == "meta.mat":
            return "devkit"
        if member.path.suffix == ".tar":
            return "train"
        if _is_picture(member):
            return "val"
    raise BadInput(f"{str(source)!r} is none of ImageNet's archives: give {SOURCES['imagenet']}")


def _devkit(source: Path) -> tuple[dict[int, str], list[int]]:
    """({class id: wnid} of the leaves of the hierarchy, class id of each validation picture in order)."""
    from scipy.io import loadmat  # type: ignore[import-untyped]

    files = {m.path.name: _small(m) for m in _members(source) if m.path.parent.name == "data"}
    mat, ground_truth = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
    for name in (mat, ground_truth):
        if name not in files:
            raise BadInput(f"{str(source)!r} holds no data/{name}: is it ILSVRC2012_devkit_t12.tar.gz?")
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(files[mat]), squeeze_me=True)["synsets"])
        leaves = synsets[synsets["num_children"] == 0]
        wnids = {int(number): str(wnid) for number, wnid in zip(leaves["ILSVRC2012_ID"], leaves["WNID"], strict=True)}
        truth = [int(word) for word in files[ground_truth].split()]
    except Exception as error:  # scipy raises many types on damaged files; all mean the same here
        raise BadInput(f"cannot read the classes in {str(source)!r}: {type(error).__name__}: {error}") from None
    strange = sorted(set(truth) - wnids.keys())
    if strange:
        raise BadInput(f"{ground_truth} in {str(source)!r} has class {strange[0]}, which meta.mat does not have")
    return wnids, truth
