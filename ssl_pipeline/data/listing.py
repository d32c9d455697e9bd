"""The pictures and shards below a folder, listed once and remembered.

A million names take seconds from a local disk and minutes from a parallel file system, and every rank of every run and
evaluation asks for them. Listings of `CACHED_FROM` names or more are therefore kept in `cache_folder()`, one file a root.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

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

_VERSION = 2


@dataclass(frozen=True)
class Listing:
    """What lies below a folder. Hidden names (.x) do not count; symbolic links are followed, but not into a circle."""

    folders: tuple[str, ...]
    """All folders, relative to the root, which is the first one, as an empty name."""
    times: np.ndarray
    """(F, 2) int64: their mtime_ns and ctime_ns, each taken before its folder was read."""
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

    Stale is a listing where the set of folders or one folder's mtime_ns or ctime_ns is not as it was: names that were added,
    removed or renamed anywhere below the root, also where the folder's mtime was then set back (`tar`, `rsync --times`). It
    cannot see a change that this node's view of a network file system does not show yet, and other contents under an old
    name, which no listing is concerned with.

    A cache file that is damaged, another user's, of another version or of another root is ignored. Raises BadInput where a
    folder cannot be read.
    """
    real = os.path.realpath(root)
    kept = cache_file("listings", real)
    found = _remembered(kept, real)
    if found is not None:
        return found
    start = time.monotonic()
    found = list_folder(root)
    count = len(found.pictures) + len(found.tars)
    if count >= CACHED_FROM:
        log.info("listed %s files below %s in %.1f s", f"{count:,}", root, time.monotonic() - start)
    values: dict[str, Any] = {"version": np.int64(_VERSION), "root": blob([real]), "times": found.times}
    values |= {"folders": blob(found.folders), "pictures": blob(found.pictures), "tars": blob(found.tars)}
    keep(kept, values, count, int(found.times.max()))
    return found


def cache_file(kind: str, real: str) -> Path:
    """Where what was listed below `real`, a real path, is kept."""
    return cache_folder() / kind / f"{hashlib.sha256(os.fsencode(real)).hexdigest()[:32]}.npz"


def keep(kept: Path, values: Mapping[str, Any], count: int, newest: int) -> None:
    """Write a listing of `count` names, whose newest time is `newest` in ns, for the next time, unless it is small or too new.

    A cache that cannot be written stops nothing.
    """
    if count < CACHED_FROM or newest >= time.time_ns() - SETTLED * 1e9:
        return
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(kept, values)
    except OSError as error:
        log.info("the listing is not kept for the next time: %s: %s", kept.parent, error.strerror)


def list_folder(root: Path) -> Listing:
    """What lies below `root`, read anew. Raises BadInput where a folder cannot be read."""
    folders: list[tuple[str, int, int]] = []
    pictures: list[str] = []
    tars: list[str] = []

    def walk(folder: Path | str, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        try:
            state = os.stat(folder)
            here = (state.st_dev, state.st_ino)
            if here in above:
                return
            folders.append((prefix[:-1], state.st_mtime_ns, state.st_ctime_ns))
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
    times = np.array([folder[1:] for folder in folders], dtype=np.int64)
    return Listing(tuple(name for name, _, _ in folders), times, tuple(sorted(pictures)), tuple(sorted(tars)))


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or leads to one; links that lead nowhere or into a circle do not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _remembered(kept: Path, real: str) -> Listing | None:
    try:
        with kept.open("rb") as file:
            if os.fstat(file.fileno()).st_uid != os.geteuid():  # who writes it says which files are read
                return None
            saved = read_arrays(file)
    except OSError:
        return None
    if saved is None:
        return None
    try:
        if int(saved["version"]) != _VERSION or names(saved["root"]) != (real,):
            return None
        folders, times = names(saved["folders"]), saved["times"]
        if times.shape != (len(folders), 2) or folders[0] != "":
            return None
        for folder, then in zip(folders, times.tolist(), strict=True):
            state = os.stat(os.path.join(real, folder))
            if [state.st_mtime_ns, state.st_ctime_ns] != then:
                return None
        return Listing(folders, times, names(saved["pictures"]), names(saved["tars"]))
    except (OSError, KeyError, ValueError, TypeError, IndexError, OverflowError):
        return None


def shown(name: str) -> str:
    """A file's name in a line of text: quoted where it would break the line or is no text."""
    return name if name.isprintable() else repr(name)


# ---------------------------------------------------------------------------------------------------- names in .npz files
def blob(texts: Iterable[str]) -> np.ndarray:
    """Names as bytes, each ended by a zero, which no file's name can hold. Names that are no UTF-8 come back as they were."""
    return np.frombuffer("".join(f"{text}\0" for text in texts).encode("utf-8", "surrogateescape"), dtype=np.uint8)


def names(saved: np.ndarray) -> tuple[str, ...]:
    """The names of a `blob`. Raises ValueError where it is none."""
    if saved.dtype != np.uint8 or saved.ndim != 1 or (saved.size and saved[-1] != 0):
        raise ValueError("no names")
    return tuple(saved.tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1])


def read_arrays(path: Path | IO[bytes]) -> dict[str, np.ndarray] | None:
    """The arrays of an .npz file, its checksums verified; None where there is none or it is not one of `write_arrays`.

    Reads no pickles, and nothing compressed: a small file cannot fill the memory.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if any(part.compress_size != part.file_size for part in file.zip.infolist()):
                return None
            return {name: file[name] for name in file.files}
    except Exception:  # numpy, zipfile and zlib raise many types on damaged files; all mean the same here
        return None


def write_arrays(path: Path, values: Mapping[str, Any]) -> None:
    """Write an .npz file that is whole or not there. Raises OSError."""
    working = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with working.open("xb") as file:
            np.savez(file, **values)
            file.flush()
            os.fsync(file.fileno())
        os.replace(working, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(working)
