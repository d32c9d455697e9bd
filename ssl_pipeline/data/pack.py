"""A folder of pictures as tar shards in WebDataset's layout, with the same ids, labels and classes.

A member's name is its sample's id, so that the order of names is the order of ids and no dot of a picture's name can cut it;
its class is written as its label, so that a class called 7 keeps its place. What the pictures were called, and where each one
lies, is in the index file beside the shards (`index.shards`).
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import itertools
import json
import logging
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from ssl_pipeline.data.index import (
    INDEX,
    UNFINISHED,
    Index,
    read_index,
    read_shard_index,
    tar_members,
    write_shard_index,
)
from ssl_pipeline.data.listing import FORMATS
from ssl_pipeline.data.parallel import ProgressLine, cores, each
from ssl_pipeline.exits import BadInput, StorageFailure

log = logging.getLogger("ssl_pipeline")

PLAN = "plan.json"
"""Name of the file in OUT that says how its shards were cut."""

SPLITS = ("train", "val")
SMALLEST = 100_000
"""Bytes that a shard must be allowed to have."""

_VERSION = 1
_SAMPLED = 64
_SAVED = {"RGB": "RGB", "RGBA": "RGB", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "L": "L", "LA": "L", "1": "L"}
"""PIL's mode of a picture, and the mode in which it is saved; others, of more than 8 bits, are kept as they are."""


class Encoding(NamedTuple):
    """How pictures are encoded again."""

    short_side: int
    """In pixels."""
    quality: int
    """Of JPEG."""


@dataclass(frozen=True)
class Packed:
    """What a split's shards hold."""

    pictures: int
    shards: int
    size: int
    """In bytes."""
    kept: tuple[str, ...]
    """Pictures that were written by this call and could not be encoded again, each with the reason."""


class _Job(NamedTuple):
    root: str
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    first: int
    """Id of the first sample."""
    target: str
    encoding: Encoding | None


class _Shard(NamedTuple):
    spans: list[tuple[int, int]]
    """Offset and size of each sample."""
    size: int
    kept: list[str]


def pack(
    source: Path,
    out: Path,
    *,
    shard_size: int = 256_000_000,
    encoding: Encoding | None = None,
    processes: int | None = None,
) -> dict[str, Packed]:
    """Write `source`/{train,val} as `out`/{train,val}/*.tar with an index file each, or go on where that was stopped.

    Args:
        source: a data set of class folders, or of pictures without labels.
        out: a folder that is new, empty, or was begun by the same call.
        shard_size: bytes that a shard may have, unless one picture has more; with `encoding`, what it has about.
        encoding: make the shorter side of larger pictures `short_side` and save them as JPEG. None: bytes as they are.
        processes: that write shards; None: a core each.

    A shard is written under another name, flushed, read back and compared with what was read from `source` (an encoded
    picture is decoded too), and then renamed: each is whole or not there. Until the index is there nothing can be trained on.
    Pictures that cannot be decoded are named and kept as they are, so that ids stay.
    Raises BadInput for what cannot work, a changed `source` and other parameters than those of `out` among it;
    StorageFailure where a shard cannot be written or is not what was written.
    """
    _require_sensible(shard_size, encoding)
    splits = [split for split in SPLITS if (source / split).is_dir()]
    if not splits:
        raise BadInput(
            f"{str(source)!r} holds neither train/ nor val/: give a folder laid out as train/<class>/<picture>"
        )
    if any(out.resolve().is_relative_to((source / split).resolve()) for split in splits):
        raise BadInput(f"{str(out)!r} lies in the pictures that it is to be packed of: name a folder elsewhere")
    others = sorted(
        path.name for path in source.iterdir() if path.is_dir() and path.name[0] != "." and path.name not in SPLITS
    )
    if others:
        log.info("not packed: %s; shards are made of train and val", ", ".join(others))
    indexes = {}
    for split in splits:
        indexes[split] = read_index(source / split)
        if indexes[split].spans is not None:
            raise BadInput(f"{str(source / split)!r} holds tar shards already")
    try:
        if out.is_dir() and not (out / PLAN).is_file() and any(path.name != ".lock" for path in out.iterdir()):
            raise BadInput(f"{str(out)!r} holds something else: name a folder that is new or empty")
        out.mkdir(parents=True, exist_ok=True)
        with (out / ".lock").open("a") as lock:
            _lock(lock.fileno(), out)
            bounds = _plan(source, out, indexes, shard_size, encoding)
            for split in splits:
                (out / split).mkdir(exist_ok=True)
                if not isinstance(_finished(out / split, indexes[split], bounds[split]), Index):
                    (out / split / UNFINISHED).touch()
            return {
                split: _pack(indexes[split], out / split, bounds[split], encoding, processes or cores())
                for split in splits
            }
    except OSError as error:
        raise StorageFailure(
            f"cannot write {str(out)!r}: {error.strerror or error}; the same command goes on"
        ) from None


def _require_sensible(shard_size: int, encoding: Encoding | None) -> None:
    if shard_size < SMALLEST:
        raise BadInput(f"--shard-size of {shard_size:,} bytes is less than {SMALLEST:,}: give, say, 256MB")
    if encoding is not None and encoding.short_side < 1:
        raise BadInput(f"--short-side {encoding.short_side} is no number of pixels: give, say, 256")
    if encoding is not None and not 1 <= encoding.quality <= 100:
        raise BadInput(f"--quality {encoding.quality} is none of JPEG's, 1 to 100")


def _lock(number: int, out: Path) -> None:
    try:
        fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise BadInput(f"another pack-shards is writing {str(out)!r}: wait for it, or name another folder") from None
    except OSError:
        log.info("%s has no locks: take care that one pack-shards alone writes there", out)


# ------------------------------------------------------------------------------------------------------------- the plan
def _plan(
    source: Path, out: Path, indexes: dict[str, Index], shard_size: int, encoding: Encoding | None
) -> dict[str, list[int]]:
    """Of each split, ids at which shards begin, and the number of samples: as was decided when `out` was begun."""
    asked = {
        "version": _VERSION,
        "source": os.path.realpath(source),
        "shard-size": shard_size,
        "short-side": encoding.short_side if encoding else None,
        "quality": encoding.quality if encoding else None,
        "listing": {split: index.digest() for split, index in indexes.items()},
    }
    path = out / PLAN
    if path.is_file():
        try:
            plan = json.loads(path.read_text(encoding="utf-8"))
            bounds = {split: [int(bound) for bound in plan["bounds"][split]] for split in plan["listing"]}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(f"{str(path)!r} is damaged: remove {str(out)!r} and begin anew") from None
        for key, value in asked.items():
            if key == "listing" and plan.get(key) != value:
                raise BadInput(
                    f"the pictures below {str(source)!r} are not those that {str(out)!r} was begun with: name another folder, "
                    "or remove it and begin anew"
                )
            if plan.get(key) != value:
                raise BadInput(
                    f"{str(out)!r} was begun with {key} = {plan.get(key)}, and this asks for {value}: give the same, or name "
                    "another folder"
                )
        return bounds
    bounds = {split: _cut(index, shard_size, encoding) for split, index in indexes.items()}
    working = out / f".{PLAN}.partial"
    working.write_text(json.dumps({**asked, "bounds": bounds}), encoding="utf-8")
    os.replace(working, path)
    return bounds


def _cut(index: Index, shard_size: int, encoding: Encoding | None) -> list[int]:
    def size(path: str) -> int:
        try:
            return os.stat(index.root / path).st_size
        except OSError as error:
            raise _unreadable(index.root, path, error) from None

    with ThreadPoolExecutor(16) as pool:  # a file's size takes a round trip to a file system's server
        sizes = np.fromiter(pool.map(size, index.paths), dtype=np.int64, count=len(index))
    if encoding is not None:
        sizes = (sizes * _shrinkage(index, encoding)).astype(np.int64)
    whole = 512 + -(-sizes // 512) * 512 + (1024 if index.classes else 0)
    room = shard_size - tarfile.RECORDSIZE
    bounds, filled = [0], 0
    for sample, one in enumerate(whole.tolist()):
        if filled and filled + one > room:
            bounds.append(sample)
            filled = 0
        filled += one
    return [*bounds, len(index)]


def _shrinkage(index: Index, encoding: Encoding) -> float:
    """About what share of its bytes a picture has when it is encoded, by a few that are spread over all."""
    before = after = 0
    for sample in np.linspace(0, len(index) - 1, min(_SAMPLED, len(index))).astype(int):
        data = _bytes(index.root, index.paths[sample])
        try:
            made = _encode(data, encoding)
        except ValueError:
            made = None
        before += len(data)
        after += len(data) if made is None else len(made[0])
    return min(1.0, after / max(before, 1))


# ------------------------------------------------------------------------------------------------------------ the shards
def _pack(index: Index, folder: Path, bounds: list[int], encoding: Encoding | None, processes: int) -> Packed:
    done = _finished(folder, index, bounds)
    if isinstance(done, Index):
        log.info("%s is whole; nothing to do", folder)
        size = sum((folder / name).stat().st_size for name in done.shards)
        return Packed(len(index), len(done.shards), size, ())
    starts = list(itertools.pairwise(bounds))
    jobs = [
        _Job(
            str(index.root),
            index.paths[start:end],
            tuple(index.labels[start:end].tolist()),
            start,
            str(folder / _shard_name(number)),
            encoding,
        )
        for number, (start, end) in enumerate(starts)
    ]
    spans = np.zeros((len(index), 3), dtype=np.int64)
    sizes = [0] * len(jobs)
    kept: list[str] = []
    line = ProgressLine(f"packing {folder.name}", len(index))
    for job, shard in each(_write_shard, jobs, min(processes, len(jobs))):
        if shard is None:
            raise StorageFailure(
                f"the process that wrote {job.target} died, of memory perhaps: give fewer --processes; the same command goes on"
            )
        number = int(Path(job.target).stem)
        spans[job.first : job.first + len(job.paths)] = [(number, *span) for span in shard.spans]
        sizes[number] = shard.size
        for text in shard.kept:
            log.warning("not encoded again, and kept as it is: %s", text)
        kept += shard.kept
        line.add(len(job.paths))
    for path in folder.glob(".*.partial"):
        path.unlink()
    names = tuple(_shard_name(number) for number in range(len(jobs)))
    write_shard_index(Index(folder, index.paths, index.labels, index.classes, spans, names), sizes)
    found = _finished(folder, index, bounds)
    if isinstance(found, str):
        raise StorageFailure(f"{folder / INDEX} does not fit what was written: {found}")
    (folder / UNFINISHED).unlink(missing_ok=True)
    return Packed(len(index), len(jobs), sum(sizes), tuple(kept))


def _shard_name(number: int) -> str:
    return f"{number:06d}.tar"


def _finished(folder: Path, index: Index, bounds: list[int]) -> Index | str:
    """The index of shards that hold these samples; where they do not, a few words saying why."""
    if not (folder / INDEX).is_file():
        return "there is none"
    found = read_shard_index(folder)
    if isinstance(found, str):
        return found
    same = found.paths == index.paths and found.classes == index.classes and np.array_equal(found.labels, index.labels)
    return found if same and len(found.shards) == len(bounds) - 1 else "it is of other pictures"


def _write_shard(job: _Job) -> _Shard:
    """Write one shard, or see that it is there. In a worker."""
    target = Path(job.target)
    if target.is_file():
        there = _members(target, job)
        if there is not None:
            return there
    working = target.with_name(f".{target.name}.partial")
    written: list[tuple[str, bytes, tuple[int, int] | None]] = []
    kept: list[str] = []
    try:
        with working.open("wb") as raw, tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for place, path in enumerate(job.paths):
                data = _bytes(Path(job.root), path)
                ending, size = os.path.splitext(path)[1].lower(), None
                if job.encoding is not None:
                    try:
                        made = _encode(data, job.encoding)
                    except ValueError as error:
                        made = None
                        kept.append(f"{Path(job.root) / path}: {error}")
                    if made is not None:
                        data, size = made
                        ending = ".jpg"
                members = [(ending, data, size)]
                if job.labels[place] >= 0:
                    members.append((".cls", str(job.labels[place]).encode(), None))
                for end, content, pixels in members:
                    member = tarfile.TarInfo(f"{_key(job, place)}{end}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
                    written.append((member.name, _digest(content), pixels))
        with working.open("rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # read back from the disk, not from memory
        _verify(working, written)
        os.replace(working, target)
    except OSError as error:
        working.unlink(missing_ok=True)
        raise StorageFailure(
            f"cannot write {job.target}: {error.strerror or error}; the same command goes on"
        ) from None
    shard = _members(target, job)
    if shard is None:
        raise StorageFailure(
            f"{job.target} does not hold what was written; look at the disk, then give the same command"
        )
    return shard._replace(kept=kept)


def _members(target: Path, job: _Job) -> _Shard | None:
    """Where this job's samples lie in a shard; None where it does not hold them."""
    try:
        members = iter(tar_members(target))
        spans = []
        for place, label in enumerate(job.labels):
            name, offset, size = next(members)
            if os.path.splitext(name)[0] != _key(job, place) or name.endswith(".cls"):
                return None
            spans.append((offset, size))
            if label >= 0 and next(members)[0] != f"{_key(job, place)}.cls":
                return None
        if next(members, None) is not None:
            return None
        return _Shard(spans, target.stat().st_size, [])
    except (StopIteration, tarfile.TarError, OSError):
        return None


def _verify(path: Path, written: Sequence[tuple[str, bytes, tuple[int, int] | None]]) -> None:
    """Raises StorageFailure where the tar does not hold what was written."""
    try:
        with tarfile.open(path, "r:") as archive:
            for name, digest, pixels in written:
                member: Any = archive.next()
                content = archive.extractfile(member).read() if member is not None else b""  # type: ignore[union-attr]
                if member is None or member.name != name or _digest(content) != digest:
                    raise ValueError(name)
                if pixels is not None:
                    with Image.open(io.BytesIO(content), formats=["JPEG"]) as picture:
                        picture.load()
                        if picture.size != pixels:
                            raise ValueError(name)
            if archive.next() is not None:
                raise ValueError("more")
    except (ValueError, tarfile.TarError) as error:
        path.unlink(missing_ok=True)
        raise StorageFailure(
            f"{path} could not be read back as it was written ({error}): look at the disk; the same command goes on"
        ) from None


def _key(job: _Job, place: int) -> str:
    return f"{job.first + place:09d}"


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _bytes(root: Path, path: str) -> bytes:
    try:
        return (root / path).read_bytes()
    except OSError as error:
        raise _unreadable(root, path, error) from None


def _unreadable(root: Path, path: str, error: OSError) -> BadInput:
    return BadInput(f"cannot read {str(root / path)!r}: {error.strerror}; the same command goes on once it can")


def _encode(data: bytes, encoding: Encoding) -> tuple[bytes, tuple[int, int]] | None:
    """JPEG with the shorter side of `short_side`, and its (width, height); None where it is not longer.

    The EXIF orientation is dropped and not applied, since the loader does not apply it. Raises ValueError where the picture
    cannot be decoded, or has more than 8 bits.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            picture.load()
            width, height = picture.size
            if min(width, height) <= encoding.short_side:
                return None
            if picture.mode not in _SAVED:
                raise ValueError(f"mode {picture.mode} has more than 8 bits")
            scale = encoding.short_side / min(width, height)
            size = (round(width * scale), round(height * scale))
            small = picture.convert(_SAVED[picture.mode]).resize(size, Image.Resampling.BICUBIC)
            made = io.BytesIO()
            small.save(made, "JPEG", quality=encoding.quality)
    except UnidentifiedImageError:
        raise ValueError("no picture" if data else "the file is empty") from None
    except Exception as error:  # PIL raises many types on damaged pictures; all mean the same here
        raise ValueError(str(error) or type(error).__name__) from None
    return made.getvalue(), size
