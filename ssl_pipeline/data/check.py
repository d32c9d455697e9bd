"""Which pictures a training would replace, found before it starts, and what else is noteworthy about the others.

torch and DALI are imported by the processes that decode, not by the one that waits for them.
"""

from __future__ import annotations

import io
import os
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from ssl_pipeline.data.index import INDEX, PLAN, SUMS, Index, read_shard_index, read_sums, sha256, shards, tar_members
from ssl_pipeline.data.listing import EXTENSIONS, FORMATS, list_folder, shown
from ssl_pipeline.data.parallel import ProgressLine, cores, each
from ssl_pipeline.exits import BadInput

CHUNK = 256
"""Pictures that a process is given at a time."""

BATCH, PIXELS = 64, 64_000_000
"""Pictures that DALI decodes at a time, and pixels: a batch of large ones must not fill the memory."""

ENDINGS = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm"),
    "JPEG2000": (".jp2",),
}


@dataclass
class Report:
    """What was found."""

    checked: int = 0
    """Pictures."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    """(where it lies, reason) of each picture, shard or index file that cannot be used, sorted."""
    noteworthy: Counter[str] = field(default_factory=Counter)
    """Pictures by kind; they are read as they should be."""
    examples: dict[str, str] = field(default_factory=dict)
    """One picture of each kind."""


class _Job(NamedTuple):
    root: str
    paths: tuple[str, ...]
    spans: np.ndarray | None
    shards: tuple[str, ...]

    def samples(self) -> Index:
        return Index(Path(self.root), self.paths, np.empty(0), (), self.spans, self.shards)

    def halves(self) -> list[_Job]:
        middle = len(self.paths) // 2
        return [
            self._replace(paths=self.paths[part], spans=None if self.spans is None else self.spans[part])
            for part in (slice(middle), slice(middle, None))
        ]


class _Found(NamedTuple):
    bad: list[tuple[int, str]]
    """Place in the job, and reason."""
    kinds: list[tuple[int, str]]


def check(root: Path, processes: int | None = None) -> Report:
    """Read every picture below `root`, in folders of any depth and in tar shards, as the loader reads it on a CPU.

    `processes`: None: a core each. Bad is what the loader would replace: what cannot be read, is empty, is no picture by its
    header, or is refused by DALI's decoder (a truncated one is), alone or by ending the process that decodes it; and a tar or
    an index file of shards that cannot be used, and a shard that is not what `pack-shards` wrote, by its SHA-256.
    Raises BadInput where there is nothing to check, or no DALI.
    """
    if not root.is_dir():
        raise BadInput(f"no folder {str(root)!r}: give a data set's, with train/ and val/ in it")
    found = list_folder(root)
    report = Report()
    parts = [Index(root, found.pictures, np.empty(0), ())] if found.pictures else []
    folders = [root / folder for folder in sorted({str(PurePosixPath(name).parent) for name in found.tars})]
    for folder in folders:
        parts += _shards(folder, report)
    _compare(folders, report, processes or cores())
    jobs = [job for part in parts for job in _jobs(part)]
    if not jobs and not report.bad:
        raise BadInput(f"{str(root)!r} holds no pictures and no tar shards: give a data set's folder")
    line = ProgressLine("checking", sum(len(part) for part in parts))
    while jobs:
        again: list[_Job] = []
        for job, seen in each(_check, jobs, min(processes or cores(), len(jobs))):
            index = job.samples()
            if seen is None and len(job.paths) > 1:
                again += job.halves()
                continue
            if seen is None:
                seen = _Found([(0, "decoding it ends the process")], [])
            report.checked += len(job.paths)
            report.bad += [(index.name(place), reason) for place, reason in seen.bad]
            report.noteworthy.update(kind for _, kind in seen.kinds)
            for place, kind in seen.kinds:
                report.examples[kind] = min(report.examples.get(kind, index.name(place)), index.name(place))
            line.add(len(job.paths))
        jobs = again
    report.bad.sort()
    return report


def _shards(folder: Path, report: Report) -> list[Index]:
    """The pictures in a folder's shards; what is wrong with these themselves goes into the report."""
    packed = (folder.parent / PLAN).is_file()  # what does not fit is then told of by `shards`
    if not packed and (folder / INDEX).is_file() and isinstance(reason := read_shard_index(folder), str):
        report.bad.append((str(folder / INDEX), f"{reason}; copy or pack the shards again, or remove this file"))
    try:
        return [shards(folder)]
    except BadInput as error:
        report.bad.append((str(folder), str(error)))
    parts = []
    for path in sorted(folder.glob("[!.]*.tar")):
        try:
            members = [m for m in tar_members(path)[0] if os.path.splitext(m[0])[1].lower() in EXTENSIONS]
        except (tarfile.TarError, OSError) as error:
            report.bad.append((str(path), f"no tar that can be read: {error}"))
            continue
        spans = np.array([(0, offset, size) for _, offset, size in members], dtype=np.int64).reshape(-1, 3)
        names = tuple(f"{path.name}/{name}" for name, _, _ in members)
        parts.append(Index(folder, names, np.empty(0), (), spans, (path.name,)))
    return parts


def _compare(folders: list[Path], report: Report, processes: int) -> None:
    """Compare the shards that `pack-shards` wrote with what it noted of them."""
    wanted: dict[str, str | None] = {}
    for folder in folders:
        if (folder / SUMS).is_file():
            sums = read_sums(folder)
            wanted |= {str(path): sums.get(path.name, (None,))[0] for path in folder.glob("[!.]*.tar")}
    line = ProgressLine(f"comparing shards with {SUMS}", len(wanted))
    for path, found in each(_sum, sorted(wanted), max(min(processes, len(wanted)), 1)):
        if found != wanted[path]:
            report.bad.append((shown(path), f"it is not what {SUMS} says: copy or pack it again"))
        line.add(1)


def _jobs(index: Index) -> Iterator[_Job]:
    for start in range(0, len(index), CHUNK):
        part = slice(start, start + CHUNK)
        if index.spans is None:
            yield _Job(str(index.root), index.paths[part], None, ())
            continue
        spans = index.spans[part].copy()
        used, spans[:, 0] = np.unique(spans[:, 0], return_inverse=True)
        yield _Job(str(index.root), index.paths[part], spans, tuple(index.shards[shard] for shard in used))


# ---------------------------------------------------------------------------------------------------------- in a process
def _sum(path: str) -> str:
    try:
        return sha256(Path(path))
    except OSError:
        return ""


def _check(job: _Job) -> _Found:
    import torch

    from ssl_pipeline.data.loader import picture_size, refusal, require_dali, undecodable

    require_dali()
    _be_quiet()
    index = job.samples()
    found = _Found([], [])
    batch: dict[int, np.ndarray] = {}
    pixels = 0

    def decode() -> None:
        places = list(batch)
        for place in undecodable(list(batch.values()), "cpu", torch.device("cpu")):
            found.bad.append((places[place], refusal(batch[places[place]])))
        batch.clear()

    for place in range(len(index)):
        try:
            data = index.read(place)
            height, width = picture_size(data)
        except (OSError, ValueError, MemoryError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            found.bad.append((place, reason))
            continue
        found.kinds.extend((place, kind) for kind in kinds(data, index.paths[place]))
        if batch and pixels + height * width > PIXELS:
            decode()
            pixels = 0
        batch[place] = data
        pixels += height * width
        if len(batch) == BATCH:
            decode()
            pixels = 0
    decode()
    bad = {place for place, _ in found.bad}
    return found._replace(kinds=[(place, kind) for place, kind in found.kinds if place not in bad])


def _be_quiet() -> None:
    """DALI and PIL say of each picture what is told in the report."""
    warnings.simplefilter("ignore")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)
    os.close(silence)


def kinds(data: np.ndarray, path: str) -> list[str]:
    """What is noteworthy, by its header, about a picture that can be read."""
    found = []
    try:
        with Image.open(io.BytesIO(data.tobytes()), formats=FORMATS) as picture:
            kind, mode = picture.format or "", picture.mode
            if mode == "CMYK":
                found.append("CMYK")
            if mode in ("L", "LA", "1") or mode.startswith("I"):
                found.append("gray")
            # PIL opens a PNG of 16-bit colours with 8; the depth is the 25th byte of its header.
            deep = kind == "PNG" and data[24] == 16
            if deep or mode.startswith(("I", "F")):
                found.append("16 bits")
            if kind in ("JPEG", "WEBP") and picture.getexif().get(0x0112, 1) not in (0, 1):
                found.append("turned by EXIF, which no recipe applies")
            if picture.size == (1, 1):
                found.append("1 x 1 pixels")
            ending = os.path.splitext(path)[1].lower()
            if ending not in ENDINGS.get(kind, (ending,)):
                found.append(f"{kind} named {ending}")
    except Exception:  # a damaged EXIF part is nothing that the loader would see
        found.append("damaged EXIF or other metadata")
    return found
