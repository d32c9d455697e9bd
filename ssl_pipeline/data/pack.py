"""A folder of pictures as tar shards in WebDataset's layout, with the same ids, labels and classes.

A member's name is its sample's id, so that the order of names is the order of ids and no dot of a picture's name can cut it;
its class is written as its label, so that a class called 7 keeps its place. What the pictures were called, and where each one
lies, is in the index file beside the shards (`index.shards`).
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from ssl_pipeline.data.index import (
    INDEX,
    PLAN,
    SUMS,
    UNFINISHED,
    Index,
    pack_command,
    read_index,
    read_shard_index,
    read_sums,
    sha256,
    shard_name,
    sum_line,
    tar_members,
    write_shard_index,
)
from ssl_pipeline.data.listing import FORMATS
from ssl_pipeline.data.parallel import ProgressLine, cores, each
from ssl_pipeline.exits import BadInput, StorageFailure

log = logging.getLogger("ssl_pipeline")

SPLITS = ("train", "val")
SMALLEST = 100_000
"""Bytes that a shard must be allowed to have."""

_VERSION = 1
_SAMPLED = 64
_LOST = {
    errno.ENOENT,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ENXIO,
    None,  # of `Index.read`: no regular file
}
"""Errors that say of a picture that it cannot be read; others are of the storage, and may pass."""
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
    empty: tuple[str, ...]
    """Paths of the pictures without a byte, because they could not be read or had none: a run replaces them."""


class _Job(NamedTuple):
    root: str
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    first: int
    """Id of the first sample."""
    target: str
    encoding: Encoding | None
    known: str | None
    """The digest of the shard where it was written of these very files before."""


class _Shard(NamedTuple):
    spans: list[tuple[int, int]]
    """Offset and size of each sample."""
    size: int
    sum: str
    """SHA-256."""
    kept: list[str]
    lost: list[str]
    """Pictures that could not be read, each with the reason."""
    there: bool
    """Whether it was there already."""


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

    A shard is written under another name, flushed, read back and compared with what was written, and then renamed: each is
    whole or not there. Its SHA-256 goes into SUMS beside it. Until the index is there nothing can be trained on. When it goes
    on, a shard that is not what its SHA-256 says, and one of whose pictures the size or time has changed, is written anew.
    Pictures that cannot be decoded are named and kept as they are, and those that cannot be read are named and packed as
    empty ones, which a run replaces, so that ids stay.
    Raises BadInput for what cannot work, other names in `source` and other parameters than those of `out` among it;
    StorageFailure where a shard cannot be written or is not what was written, where the storage of `source` fails, and where
    one picture in a hundred (and more than ten) cannot be read.
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
        log.info(
            "not packed: %s; shards are made of train and val, and data.unlabelled is not for them", ", ".join(others)
        )
    indexes = {}
    for split in splits:
        indexes[split] = read_index(source / split)
        if indexes[split].spans is not None:
            raise BadInput(f"{str(source / split)!r} holds tar shards already")
    of_train, of_val = (set(indexes[split].classes) if split in indexes else set() for split in SPLITS)
    if of_train and of_val and of_train != of_val:
        raise BadInput(
            f"train/ and val/ in {str(source)!r} hold different classes, as {min(of_train ^ of_val)!r}, so that their labels "
            "would not mean the same: give both the same ones, or pack each by itself"
        )
    states = functools.cache(lambda split: _states(indexes[split]))
    try:
        if out.is_dir() and not (out / PLAN).is_file() and any(path.name != ".lock" for path in out.iterdir()):
            raise BadInput(f"{str(out)!r} holds something else: name a folder that is new or empty")
        out.mkdir(parents=True, exist_ok=True)
        with (out / ".lock").open("a") as lock:
            _lock(lock.fileno(), out)
            bounds = _plan(source, out, indexes, states, shard_size, encoding)
            for split in splits:
                (out / split).mkdir(exist_ok=True)
                if not isinstance(_finished(out / split, indexes[split], bounds[split]), Index):
                    (out / split / UNFINISHED).touch()
            return {
                split: _pack(
                    indexes[split],
                    out / split,
                    bounds[split],
                    functools.partial(states, split),
                    encoding,
                    processes or cores(),
                )
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
    source: Path,
    out: Path,
    indexes: dict[str, Index],
    states: Callable[[str], np.ndarray],
    shard_size: int,
    encoding: Encoding | None,
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
            again = pack_command(plan, out)
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
                    f"{str(out)!r} was begun with {key} = {plan.get(key)}, and this asks for {value}: give the same, "
                    f"`{again}`, or name another folder"
                )
        return bounds
    bounds = {split: _cut(index, states(split)[:, 0], shard_size, encoding) for split, index in indexes.items()}
    _write(path, json.dumps({**asked, "bounds": bounds}))
    return bounds


def _write(path: Path, text: str) -> None:
    """Write a file that is whole or not there."""
    working = path.with_name(f".{path.name}.partial")
    with working.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(working, path)


def _states(index: Index) -> np.ndarray:
    """(N, 2) int64: size and mtime_ns of each picture; 0 where it has none."""

    def state(path: str) -> tuple[int, int]:
        try:
            found = os.stat(index.root / path)
        except OSError as error:
            if error.errno in _LOST:
                return 0, 0
            raise _failed(index.root / path, error) from None
        return found.st_size, found.st_mtime_ns

    with ThreadPoolExecutor(16) as pool:  # each takes a round trip to a file system's server
        return np.array(list(pool.map(state, index.paths)), dtype=np.int64)


def _cut(index: Index, sizes: np.ndarray, shard_size: int, encoding: Encoding | None) -> list[int]:
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
        try:
            data = _bytes(index, sample)
            made = _encode(data, encoding)
        except _Lost:
            continue
        except _Undecodable:
            made = None
        before += len(data)
        after += len(data if made is None else made)
    return min(1.0, after / max(before, 1))


# ------------------------------------------------------------------------------------------------------------ the shards
def _pack(
    index: Index,
    folder: Path,
    bounds: list[int],
    states: Callable[[], np.ndarray],
    encoding: Encoding | None,
    processes: int,
) -> Packed:
    kept: list[str] = []
    found = _finished(folder, index, bounds)
    if isinstance(found, Index):
        log.info("%s is whole; nothing to do", folder)
    else:
        _write_shards(index, folder, bounds, states(), encoding, processes, kept)
        found = _finished(folder, index, bounds)
    if isinstance(found, str):
        raise StorageFailure(f"{folder / INDEX} does not fit what was written: {found}")
    (folder / UNFINISHED).unlink(missing_ok=True)
    assert found.spans is not None
    empty = tuple(found.paths[sample] for sample in np.flatnonzero(found.spans[:, 2] == 0))
    size = sum((folder / name).stat().st_size for name in found.shards)
    return Packed(len(index), len(found.shards), size, tuple(kept), empty)


def _write_shards(
    index: Index,
    folder: Path,
    bounds: list[int],
    states: np.ndarray,
    encoding: Encoding | None,
    processes: int,
    kept: list[str],
) -> None:
    """Write the shards that are not there, SUMS and the index; what could not be encoded again goes into `kept`."""
    starts = list(itertools.pairwise(bounds))
    names = tuple(shard_name(number) for number in range(len(starts)))
    sources = [hashlib.sha256(states[start:end].tobytes()).hexdigest() for start, end in starts]
    sums = read_sums(folder)
    sums = {
        name: sums[name] for name, source in zip(names, sources, strict=True) if sums.get(name, ("", ""))[1] == source
    }
    _write(folder / SUMS, "".join(sum_line(name, *sums[name]) for name in sums))
    jobs = [
        _Job(
            str(index.root),
            index.paths[start:end],
            tuple(index.labels[start:end].tolist()),
            start,
            str(folder / name),
            encoding,
            sums[name][0] if name in sums else None,
        )
        for name, (start, end) in zip(names, starts, strict=True)
    ]
    spans = np.zeros((len(index), 3), dtype=np.int64)
    sizes = [0] * len(jobs)
    lost: list[str] = []
    line = ProgressLine(f"packing {folder.name}", len(index))
    with (folder / SUMS).open("a", encoding="utf-8") as record:
        for job, shard in each(_write_shard, jobs, min(processes, len(jobs))):
            if shard is None:
                raise StorageFailure(
                    f"the process that wrote {job.target} died, of memory perhaps: give fewer --processes; the same command "
                    "goes on"
                )
            number = int(Path(job.target).stem)
            spans[job.first : job.first + len(job.paths)] = [(number, *span) for span in shard.spans]
            sizes[number] = shard.size
            sums[names[number]] = (shard.sum, sources[number])
            if not shard.there and not shard.lost:  # a picture that was lost may be there when this goes on
                record.write(sum_line(names[number], *sums[names[number]]))
                record.flush()
                os.fsync(record.fileno())
            for text in shard.kept:
                log.warning("not encoded again, and kept as it is: %s", text)
            for text in shard.lost:
                log.warning("not read, and packed as an empty picture: %s", text)
            kept += shard.kept
            lost += shard.lost
            if len(lost) > max(10, len(index) // 100):
                raise StorageFailure(
                    f"{len(lost)} pictures below {str(index.root)!r} cannot be read, as {lost[-1]}: look whether all of it is "
                    "mounted and may be read, or put empty files there; the same command goes on"
                )
            line.add(len(job.paths), before=shard.there)
    for path in folder.glob(".*.partial"):
        path.unlink()
    _write(folder / SUMS, "".join(sum_line(name, *sums[name]) for name in names))
    write_shard_index(Index(folder, index.paths, index.labels, index.classes, spans, names), sizes)


def _finished(folder: Path, index: Index, bounds: list[int]) -> Index | str:
    """The index of shards that hold these samples; where they do not, a few words saying why."""
    if not (folder / INDEX).is_file():
        return "there is none"
    found = read_shard_index(folder)
    if isinstance(found, str):
        return found
    same = found.paths == index.paths and found.classes == index.classes and np.array_equal(found.labels, index.labels)
    return found if same and len(found.shards) == len(bounds) - 1 else "it is of other pictures"


class _Summed(io.BufferedWriter):
    """A file that is written from its beginning to its end, and the SHA-256 of what it should then hold."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"))
        self.sum = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sum.update(data)
        return super().write(data)


def _write_shard(job: _Job) -> _Shard:
    """Write one shard, or see that it is there. In a worker."""
    target = Path(job.target)
    if job.known is not None:
        there = _there(target, job, job.known)
        if there is not None:
            return there
    source = Index(Path(job.root), job.paths, np.empty(0), ())
    working = target.with_name(f".{target.name}.partial")
    kept: list[str] = []
    lost: list[str] = []
    try:
        with _Summed(working) as raw, tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for place, path in enumerate(job.paths):
                ending = os.path.splitext(path)[1].lower()
                made = None
                try:
                    data = _bytes(source, place)
                    made = None if job.encoding is None else _encode(data, job.encoding)
                except _Lost as error:
                    data = b""
                    lost.append(f"{source.name(place)}: {error}")
                except _Undecodable as error:
                    kept.append(f"{source.name(place)}: {error}")
                if made is not None:
                    data, ending = made, ".jpg"
                members = [(ending, data)]
                if job.labels[place] >= 0:
                    members.append((".cls", str(job.labels[place]).encode()))
                for end, content in members:
                    member = tarfile.TarInfo(f"{_key(job, place)}{end}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        with working.open("rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # read back from the disk, not from memory
        _verify(working, raw.sum.hexdigest())
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
    return shard._replace(sum=raw.sum.hexdigest(), kept=kept, lost=lost, there=False)


def _there(target: Path, job: _Job, known: str) -> _Shard | None:
    try:
        shard = _members(target, job) if sha256(target) == known else None
    except OSError:  # a disk that cannot read it may yet write it anew
        return None
    return None if shard is None else shard._replace(sum=known)


def _members(target: Path, job: _Job) -> _Shard | None:
    """Where this job's samples lie in a shard; None where it does not hold them."""
    try:
        members = iter(tar_members(target)[0])
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
        return _Shard(spans, target.stat().st_size, "", [], [], True)
    except (StopIteration, tarfile.TarError, OSError):
        return None


def _verify(path: Path, wanted: str) -> None:
    """Raises StorageFailure where the file is not what was written."""
    if sha256(path) != wanted:
        path.unlink(missing_ok=True)
        raise StorageFailure(
            f"{path} could not be read back as it was written: look at the disk; the same command goes on"
        )


def _key(job: _Job, place: int) -> str:
    return f"{job.first + place:09d}"


class _Lost(Exception):
    """A picture that cannot be read."""


class _Undecodable(Exception):
    """A picture that cannot be encoded again."""


def _bytes(index: Index, sample: int) -> bytes:
    try:
        return index.read(sample).tobytes()
    except OSError as error:
        if error.errno in _LOST:
            raise _Lost(error.strerror or str(error)) from None
        raise _failed(index.root / index.paths[sample], error) from None


def _failed(path: Path, error: OSError) -> StorageFailure:
    return StorageFailure(
        f"cannot read {str(path)!r}: {error.strerror or error}; the same command goes on once it can, or once an empty file "
        "lies there"
    )


def _encode(data: bytes, encoding: Encoding) -> bytes | None:
    """JPEG with the shorter side of `short_side`; None where it is not longer.

    The EXIF orientation is dropped and not applied, since the loader does not apply it. Raises _Undecodable where the picture
    cannot be decoded, before or after, or has more than 8 bits.
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
        with Image.open(made, formats=["JPEG"]) as again:
            again.load()
            if again.size != size:
                raise ValueError(f"encoded, it has {again.size} pixels")
    except UnidentifiedImageError:
        raise _Undecodable("no picture" if data else "the file is empty") from None
    except Exception as error:  # PIL raises many types on damaged pictures; all mean the same here
        raise _Undecodable(str(error) or type(error).__name__) from None
    return made.getvalue()
