"""The pictures and shards below a folder, listed once and remembered.

A million names take seconds from a local disk and minutes from a parallel file system, and every rank of every run and
evaluation asks for them. Listings of `CACHED_FROM` names or more are therefore kept in `cache_folder()`, one file a root.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssl_pipeline.exits import BadInput

log = logging.getLogger("ssl_pipeline")

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"})
"""Endings, in lower case, of the files that count as pictures."""

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")
"""What DALI decodes, by PIL's names."""

CACHED_FROM = 10_000
"""Names from which a listing is kept; fewer are listed as fast as they are read."""

SETTLED = 2.0
"""Seconds that the newest folder must be old: a change within one tick of its clock would leave its time as it is."""

_VERSION = 1


@dataclass(frozen=True)
class Listing:
    """What lies below a folder. Hidden names (.x) do not count; symbolic links are followed, but not into a circle."""

    folders: tuple[str, ...]
    """All folders, relative to the root, which is the first one, as an empty name."""
    times: np.ndarray
    """(F,) int64: their mtime_ns, each taken before its folder was read."""
    pictures: tuple[str, ...]
    """Relative paths of all pictures, sorted."""
    tars: tuple[str, ...]
    """Relative paths of all *.tar, sorted."""


def cache_folder() -> Path:
    """$SSL_PIPELINE_CACHE, else $XDG_CACHE_HOME/ssl_pipeline, else ~/.cache/ssl_pipeline."""
    own, xdg = os.environ.get("SSL_PIPELINE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(xdg or Path(os.path.expanduser("~")) / ".cache") / "ssl_pipeline"


def listing(root: Path) -> Listing:
    """What lies below `root`, from the cache where that is not stale.

    Stale is a listing where the set of folders or one folder's mtime_ns is not as it was: names that were added, removed
    or renamed anywhere below the root. It cannot see a folder whose time was set back after a change (`touch -d`,
    `rsync --times` onto the same source), a change that this node's view of a network file system does not show yet, and
    other contents under an old name, which no listing is concerned with.

    A cache file that is damaged, of another version or of another root is ignored. Raises BadInput where a folder cannot
    be read.
    """
    real = os.path.realpath(root)
    kept = cache_folder() / "listings" / f"{hashlib.sha256(os.fsencode(real)).hexdigest()[:32]}.npz"
    found = _remembered(kept, real)
    if found is not None:
        return found
    start = time.monotonic()
    found = list_folder(root)
    count = len(found.pictures) + len(found.tars)
    if count >= CACHED_FROM:
        log.info("listed %s files below %s in %.1f s", f"{count:,}", root, time.monotonic() - start)
        if int(found.times.max()) < time.time_ns() - SETTLED * 1e9:
            _remember(kept, real, found)
    return found


def list_folder(root: Path) -> Listing:
    """What lies below `root`, read anew. Raises BadInput where a folder cannot be read."""
    folders: list[tuple[str, int]] = []
    pictures: list[str] = []
    tars: list[str] = []

    def walk(folder: Path | str, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        try:
            state = os.stat(folder)
            here = (state.st_dev, state.st_ino)
            if here in above:
                return
            folders.append((prefix[:-1], state.st_mtime_ns))
            below = []
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = entry.name
                    if name.startswith("."):
                        continue
                    if is_folder(entry):
                        below.append((entry.path, f"{prefix}{name}/"))
                    elif os.path.splitext(name)[1].lower() in EXTENSIONS:
                        pictures.append(prefix + name)
                    elif name.endswith(".tar"):
                        tars.append(prefix + name)
        except OSError as error:
            raise BadInput(f"cannot list {str(folder)!r}: {error.strerror}; mend it or move it away") from None
        for path, longer in below:
            walk(path, longer, above | {here})

    walk(root, "", frozenset())
    times = np.array([time for _, time in folders], dtype=np.int64)
    return Listing(tuple(name for name, _ in folders), times, tuple(sorted(pictures)), tuple(sorted(tars)))


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or leads to one; links that lead nowhere or into a circle do not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _remembered(kept: Path, real: str) -> Listing | None:
    saved = read_arrays(kept)
    if saved is None:
        return None
    try:
        if int(saved["version"]) != _VERSION or names(saved["root"]) != (real,):
            return None
        folders, times = names(saved["folders"]), saved["times"]
        if times.shape != (len(folders),) or folders[0] != "":
            return None
        for folder, then in zip(folders, times.tolist(), strict=True):
            if os.stat(os.path.join(real, folder)).st_mtime_ns != then:
                return None
        return Listing(folders, times, names(saved["pictures"]), names(saved["tars"]))
    except (OSError, KeyError, ValueError, TypeError, IndexError):
        return None


def _remember(kept: Path, real: str, found: Listing) -> None:
    values: dict[str, Any] = {"version": np.int64(_VERSION), "root": blob([real]), "times": found.times}
    values |= {"folders": blob(found.folders), "pictures": blob(found.pictures), "tars": blob(found.tars)}
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(kept, values)
    except OSError as error:
        log.info("the listing is not kept for the next time: %s: %s", kept.parent, error.strerror)


# ---------------------------------------------------------------------------------------------------- names in .npz files
def blob(texts: Iterable[str]) -> np.ndarray:
    """Names as bytes, each ended by a zero, which no file's name can hold. Names that are no UTF-8 come back as they were."""
    return np.frombuffer("".join(f"{text}\0" for text in texts).encode("utf-8", "surrogateescape"), dtype=np.uint8)


def names(saved: np.ndarray) -> tuple[str, ...]:
    """The names of a `blob`. Raises ValueError where it is none."""
    if saved.dtype != np.uint8 or saved.ndim != 1 or (saved.size and saved[-1] != 0):
        raise ValueError("no names")
    return tuple(saved.tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1])


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of an .npz file, its checksums verified; None where there is none or it is damaged. Reads no pickles."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception:  # numpy, zipfile and zlib raise many types on damaged files; all mean the same here
        return None


def write_arrays(path: Path, values: Mapping[str, Any]) -> None:
    """Write an .npz file that is whole or not there. Raises OSError."""
    handle, working = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            np.savez(file, **values)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(working, 0o644)
        os.replace(working, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(working)
