"""What samples there are: the pictures of an image folder or of tar shards, in an order that depends on names alone."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import json
import logging
import os
import re
import resource
import shlex
import stat
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ssl_pipeline.data.listing import (
    EXTENSIONS,
    Listing,
    blob,
    cache_file,
    is_folder,
    keep,
    list_folder,
    listing,
    names,
    read_arrays,
    shown,
    write_arrays,
)
from ssl_pipeline.exits import BadInput

log = logging.getLogger("ssl_pipeline")

INDEX = "index.npz"
"""Name of the index file beside the shards that `pack-shards` wrote."""

SUMS = "SHA256SUMS"
"""Name of the file beside the shards that `pack-shards` wrote with the digest of each, as `sha256sum -c` reads it."""

UNFINISHED = ".unfinished"
"""Name of the file that lies beside shards while they are being written."""

PLAN = "plan.json"
"""Name of the file beside train/ and val/ of shards that `pack-shards` wrote, with how they were cut."""

OPEN_SHARDS = 4096
"""Shards that an index holds open at a time; fewer where the system does not let a process have four times as many files."""

LARGEST = 10**9
"""Bytes that a picture may have; more would be held in memory to learn that they are none."""

_VERSION = 1
_SUM = re.compile(r"^# made from ([0-9a-f]{64})\n([0-9a-f]{64})  ([^/\n]+)\n", re.MULTILINE)


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
        """(size,) uint8. Raises OSError where the file ends before, or that is more than a picture may have."""
        if min(offset, size) < 0 or offset + size > self.size:  # before memory is asked for: an index may say anything
            raise OSError(f"the file ends {offset + size - self.size} bytes before the picture does")
        if size > LARGEST:
            raise OSError(f"{size:,} bytes are more than a picture may have, {LARGEST:,}")
        try:
            data = np.empty(size, dtype=np.uint8)
        except MemoryError:
            raise OSError(errno.ENOMEM, f"no memory for {size:,} bytes") from None
        room = memoryview(data)  # type: ignore[arg-type]
        done = 0
        while done < size:
            more = os.preadv(self.number, [room[done:]], offset + done)
            if more == 0:
                raise OSError(f"the file ends {size - done} bytes before the picture does")
            done += more
        return data


def _opener() -> functools._lru_cache_wrapper[_OpenFile]:
    """Opens files and keeps as many open as it may: a quarter of what the process may have, which is raised for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * OPEN_SHARDS if hard == resource.RLIM_INFINITY else min(4 * OPEN_SHARDS, hard)
    if soft == resource.RLIM_INFINITY:
        soft = wanted
    elif soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # some sandboxes forbid even that
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return functools.lru_cache(maxsize=min(OPEN_SHARDS, soft // 4))(_OpenFile)


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
    _open: functools._lru_cache_wrapper[_OpenFile] = field(default_factory=_opener, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, sample: int) -> np.ndarray:
        """The encoded bytes of a sample, (size,) uint8, by any number of threads at a time. Raises OSError."""
        if self.spans is None:
            file = _OpenFile(os.path.join(self.root, self.paths[sample]))
            return file.read(0, file.size)
        shard, offset, size = self.spans[sample].tolist()
        try:
            return self._open(os.path.join(self.root, self.shards[shard])).read(offset, size)
        except OSError:
            self._open.cache_clear()  # a file server that was away may not know any more what was open
            raise

    def fetch(self, shards: Sequence[int]) -> None:
        """Have the system read whole shards into its memory, in this order. May take as long as that takes."""
        for shard in shards:
            with contextlib.suppress(OSError):  # whoever reads from it will say so
                file = self._open(os.path.join(self.root, self.shards[shard]))
                os.posix_fadvise(file.number, 0, 0, os.POSIX_FADV_WILLNEED)

    def name(self, sample: int) -> str:
        """Where a sample lies, for messages."""
        if self.spans is None:
            return shown(str(self.root / self.paths[sample]))
        shard, offset, _ = self.spans[sample].tolist()
        path = self.paths[sample].removeprefix(self.shards[shard] + "/")
        return f"{shown(str(self.root / self.shards[shard]))} at byte {offset} ({shown(path)})"

    def digest(self) -> str:
        """A short name of the listing: equal where ids mean the same pictures."""
        return hashlib.sha256("\n".join(self.paths).encode("utf-8", "surrogateescape")).hexdigest()[:12]

    def labelled_digest(self) -> str:
        """A short name of the listing and its labels; a folder's is that of the shards which it was packed as."""
        text = f"{self.digest()} {self.classes} ".encode("utf-8", "surrogateescape") + self.labels.tobytes()
        return hashlib.sha256(text).hexdigest()[:12]

    def select(self, samples: np.ndarray) -> Index:
        """The index of some of the samples, in the given order, with ids of its own."""
        spans = None if self.spans is None else self.spans[samples]
        paths = tuple(self.paths[i] for i in samples)
        return Index(self.root, paths, self.labels[samples], self.classes, spans, self.shards, self._open)


def read_index(root: Path, begun: bool = False) -> Index:
    """The index of a folder of class folders, of pictures without labels or, where it has neither, of tar shards.

    A folder's listing is kept (`listing`). Raises BadInput as `image_folder` and `shards`; `begun` says that a run is going
    on, whose pictures and classes must stay.
    """
    if not root.is_dir():
        raise _no_folder(root, "data.root")
    found = listing(root)
    if not _class_names(found) and (any("/" not in name for name in found.tars) or (root / UNFINISHED).exists()):
        return shards(root)
    return _of_listing(root, found, begun)


def pretraining_index(root: Path, unlabelled: Sequence[str] | None = None, begun: bool = False) -> Index:
    """The index of what is pretrained on: `root/train` and, with label -1, all pictures in further folders below `root`.

    Where `train` itself is among these, no folder in it is a class.
    Raises BadInput as `read_index`, and where a further folder is missing, holds no pictures, is not below `root` or shares
    pictures with another one.
    """
    if not unlabelled:
        return read_index(root / "train", begun)
    unlabelled = _apart(root, unlabelled)
    if "train" in unlabelled:
        labelled = Index(root / "train", (), np.empty(0, dtype=np.int64), ())
    else:
        labelled = read_index(root / "train", begun)
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
                f"`data.unlabelled` names {folder!r}, and {str(root / folder)!r} {_no_pictures(root / folder)}: fill it, or "
                "give data.unlabelled=null to pretrain on train alone"
            )
        paths += [f"{folder}/{path}" for path in found]
    labels = np.full(len(paths), -1, dtype=np.int64)
    labels[: len(labelled)] = labelled.labels
    return Index(root, tuple(paths), labels, labelled.classes)


def _no_pictures(folder: Path) -> str:
    if folder.is_dir() and _tars(folder):
        return "holds tar shards, which are read as train alone"
    return "is no folder with pictures"


def _apart(root: Path, unlabelled: Sequence[str]) -> list[str]:
    """The folders of `data.unlabelled` in one spelling each, after it is known that no picture would count twice."""
    folders = [os.path.normpath(folder) for folder in unlabelled]
    for given, folder in zip(unlabelled, folders, strict=True):
        if os.path.isabs(folder) or folder.split("/")[0] == "..":
            raise BadInput(
                f"`data.unlabelled` names {given!r}, which is not below data.root: give a folder in {str(root)!r}, or lay a "
                "link to yours there"
            )
    all_of_them = folders if "train" in folders else ["train", *folders]
    places = [(folder, Path(os.path.realpath(root / folder))) for folder in all_of_them]
    for (one, here), (other, there) in itertools.combinations(places, 2):
        if here.is_relative_to(there) or there.is_relative_to(here):
            raise BadInput(
                f"`data.unlabelled` = {list(unlabelled)}: the pictures that {one!r} and {other!r} share would count twice, so "
                "leave one of the two out" + (" (train is taken in by itself)" if folders != all_of_them else "")
            )
    return folders


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
    if root.name == "val" and (root.parent / "test").is_dir():
        return BadInput(
            f"no folder {str(root)!r}, and {str(root.parent / 'test')!r} is there: name it val, or lay a link"
        )
    return BadInput(
        f"no folder {str(root)!r}: point {option} at a data set laid out as train/<class>/<picture> and "
        "val/<class>/<picture> (train/<picture> where nothing is labelled), or make one with `ssl-pipeline prepare-data NAME OUT`"
    )


def _class_names(found: Listing) -> list[str]:
    return sorted(name for name in found.folders if name and "/" not in name)


def _of_listing(root: Path, found: Listing, begun: bool = False) -> Index:
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
            f"where they have no labels{_no_shards(root, root)}"
        )
    by_class: dict[str, list[str]] = {name: [] for name in classes}
    for path in found.pictures:
        by_class[path.partition("/")[0]].append(path)
    for name, members in by_class.items():
        if not members:
            endings = ", ".join(sorted(EXTENSIONS))
            way_out = "put back those that the run was begun with" if begun else "fill it or remove it"
            raise BadInput(
                f"class folder {str(root / name)!r} holds no pictures ({endings}): {way_out}"
                f"{_no_shards(root, root / name)}"
            )
    paths = tuple(path for name in classes for path in by_class[name])
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(by_class[name]) for name in classes])
    return Index(root, paths, labels, tuple(classes))


def _no_shards(root: Path, folder: Path) -> str:
    """What to add to a message where `folder` holds something that was meant as shards."""
    name = next((name for name in sorted(os.listdir(folder)) if re.search(r"\.(tar|tgz)\b", name.lower())), None)
    if name is None:
        return ""
    return f"; shards are read where they lie as {root}/NAME.tar, uncompressed, and not as {shown(str(folder / name))}"


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
    sorted names; and where no picture has one, nothing is labelled. What the tars hold is kept as a folder's listing is.
    Read once in a process, while the shards do not change.
    Raises BadInput where a shard cannot be read, some pictures have a class and some have none, or packing did not end.
    """
    if (root / UNFINISHED).exists():
        raise BadInput(
            f"the shards in {str(root)!r} are not complete, packing is going on or was stopped: wait, or give the same "
            "`ssl-pipeline pack-shards` command again"
        )
    try:
        states = [(path.name, path.stat()) for path in _tars(root)]
    except OSError as error:
        raise BadInput(f"cannot list {str(root)!r}: {error.strerror}; mend it or move it away") from None
    there = tuple((name, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for name, state in states)
    index = root / INDEX
    return _shards(root, there, index.stat().st_mtime_ns if index.is_file() else None)


def _tars(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("*.tar") if not path.name.startswith("."))


@functools.lru_cache(maxsize=8)
def _shards(root: Path, there: tuple[tuple[str, int, int, int], ...], indexed: int | None) -> Index:
    if indexed is not None:
        found = read_shard_index(root)
        if isinstance(found, Index):
            return found
        _require_foreign(root, found)
        log.warning("%s is not used, and the shards are read themselves: %s", root / INDEX, found)
    else:
        _require_foreign(root, f"{INDEX} is missing")
    real = os.path.realpath(root)
    kept = cache_file("shards", real)
    key = np.frombuffer(
        hashlib.sha256(repr((real, there)).encode("utf-8", "backslashreplace")).digest(), dtype=np.uint8
    )
    saved = read_arrays(kept)
    if saved is not None and np.array_equal(saved.get("key", ()), key):
        found = read_shard_index(root, saved)
        if isinstance(found, Index):
            return found
    index = _of_tars(root, tuple(name for name, *_ in there))
    sizes = [size for _, size, _, _ in there]
    newest = max(max(times) for _, _, *times in there)
    keep(kept, {**_arrays(index, sizes), "key": key}, len(index), newest)
    return index


def _require_foreign(root: Path, reason: str) -> None:
    """Raises BadInput where `pack-shards` wrote these shards, so that what does not fit its index is missing or damaged."""
    try:
        plan = json.loads((root.parent / PLAN).read_text(encoding="utf-8"))
        bounds = [int(bound) for bound in plan["bounds"][root.name]]
        pieces = {shard_name(number): end - start for number, (start, end) in enumerate(itertools.pairwise(bounds))}
        command = pack_command(plan, root.parent)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    there = {path.name for path in _tars(root)}
    if missing := [name for name in pieces if name not in there]:
        lost = sum(pieces[name] for name in missing)
        shards = "1 shard is" if len(missing) == 1 else f"{len(missing)} shards are"
        reason = f"{shards} missing, as {missing[0]}, with {lost:,} of {bounds[-1]:,} pictures"
    raise BadInput(
        f"the shards in {str(root)!r} are not what `pack-shards` wrote: {reason}; copy them again, or pack again, which writes "
        f"what is not there alone: `{command}`"
    )


def shard_name(number: int) -> str:
    """What `pack-shards` calls a shard."""
    return f"{number:06d}.tar"


def pack_command(plan: Mapping[str, Any], out: Path) -> str:
    """The command that `out` was begun with, by its PLAN. Raises KeyError, TypeError where that is damaged."""
    words = ["ssl-pipeline", "pack-shards", str(plan["source"]), str(out), "--shard-size", str(plan["shard-size"])]
    for option in ("short-side", "quality"):
        words += [f"--{option}", str(plan[option])] if plan[option] is not None else []
    return shlex.join(words)


def read_shard_index(root: Path, saved: Mapping[str, np.ndarray] | None = None) -> Index | str:
    """The index of shards by their index file, or by its arrays; where that does not do, a few words saying why."""
    if saved is None:
        saved = read_arrays(root / INDEX)
    if saved is None:
        return "it is damaged"
    try:
        if int(saved["version"]) != _VERSION:
            return f"it is of version {int(saved['version'])}, and this program writes {_VERSION}"
        files, sizes = names(saved["shards"]), saved["shard_sizes"].astype(np.int64)
        paths, classes = names(saved["paths"]), names(saved["classes"])
        labels, spans = saved["labels"].astype(np.int64), saved["spans"].astype(np.int64)
        if sizes.shape != (len(files),) or labels.shape != (len(paths),) or spans.shape != (len(paths), 3):
            return "its parts do not fit each other"
        if (labels.min(initial=0) < -1 or labels.max(initial=-1) >= len(classes) or spans.min(initial=0) < 0
                or spans[:, 0].max(initial=-1) >= len(files)
                or (spans[:, 1] > sizes[spans[:, 0]] - spans[:, 2]).any()):  # fmt: skip
            return "it points outside the shards"
        found = [path.name for path in _tars(root)]
        if found != sorted(files):
            other = min(set(found) ^ set(files))
            return f"{other} is {'not in it' if other in found else 'missing'}"
        for name, size in zip(files, sizes.tolist(), strict=True):
            if (root / name).stat().st_size != size:
                return f"{name} has another size"
    except (OSError, KeyError, ValueError, TypeError, OverflowError) as error:
        return f"{type(error).__name__}: {error}"
    return Index(root, paths, labels, classes, spans, files)


def write_shard_index(index: Index, sizes: Sequence[int]) -> None:
    """Write the index file of shards of the given sizes, in bytes, into their folder. Raises OSError."""
    write_arrays(index.root / INDEX, _arrays(index, sizes))


def _arrays(index: Index, sizes: Sequence[int]) -> dict[str, Any]:
    assert index.spans is not None
    values: dict[str, Any] = {"version": np.int64(_VERSION), "paths": blob(index.paths), "classes": blob(index.classes)}
    values |= {"labels": index.labels, "spans": index.spans, "shards": blob(index.shards)}
    return values | {"shard_sizes": np.array(sizes, dtype=np.int64)}


def sha256(path: Path) -> str:
    """The digest of a file. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def read_sums(folder: Path) -> dict[str, tuple[str, str]]:
    """Of each shard that SUMS names, its digest and, a comment there, that of what it was made from; none without SUMS."""
    try:
        text = (folder / SUMS).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return {name: (digest, source) for source, digest, name in _SUM.findall(text)}


def sum_line(name: str, digest: str, source: str) -> str:
    """What SUMS has of a shard."""
    return f"# made from {source}\n{digest}  {name}\n"


def tar_members(path: Path) -> tuple[list[tuple[str, int, int]], list[str]]:
    """(name, offset, size) of the files in a tar, in its order, and the names of the other members.

    A hard link is the file that it names. No files are folders, symbolic links, and sparse files, which lie in pieces.
    Raises tarfile.TarError, for a tar that was cut too, or OSError.
    """
    files: list[tuple[str, int, int]] = []
    others: list[str] = []
    places: dict[str, tuple[int, int]] = {}
    with path.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:") as archive:
        for member in archive:
            if member.isfile() and not member.issparse():
                places[member.name] = (member.offset_data, member.size)
            elif member.islnk() and member.linkname in places:
                places[member.name] = places[member.linkname]
            else:
                others.append(member.name)
                continue
            files.append((member.name, *places[member.name]))
        # tarfile takes the end of the file, or a damaged header, for the end of the tar.
        raw.seek(archive.offset)
        if raw.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it has no end mark, so it was cut or is damaged; copy or pack it again")
    return files, others


def _of_tars(root: Path, files: tuple[str, ...]) -> Index:
    paths: list[str] = []
    spans: list[tuple[int, int, int]] = []
    words: list[str] = []
    without: tuple[str, str, str] | None = None
    left_out: Counter[str] = Counter()
    examples: dict[str, str] = {}

    def leave_out(kind: str, path: str) -> None:
        left_out[kind] += 1
        examples.setdefault(kind, path)

    log.info("reading the names in %d shards of %s", len(files), root)
    for place, file in enumerate(files):
        found: dict[str, tuple[str, int, int]] = {}
        classes: dict[str, str] = {}
        try:
            members, others = tar_members(root / file)
            for path in others:
                if _is_picture(path):
                    leave_out("that are folders, links or sparse files", f"{file}/{path}")
            with (root / file).open("rb") as raw:
                for path, offset, size in members:
                    folder, slash, name = path.rpartition("/")
                    key, _, ending = name.partition(".")  # WebDataset's rule: the first dot of the file's name
                    key = folder + slash + key
                    if f".{ending.lower()}" in EXTENSIONS:
                        if key in found:
                            leave_out("before another of the same name", f"{file}/{found[key][0]}")
                        found[key] = (path, offset, size)
                    elif ending.lower() == "cls":
                        raw.seek(offset)
                        classes[key] = raw.read(min(size, 1000)).decode().strip()
                    elif _is_picture(path):
                        leave_out("with a further dot in the name (WebDataset's rule)", f"{file}/{path}")
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
    for kind, count in left_out.items():
        log.warning(
            "left out of the shards in %s: %s pictures %s, as %s", root, f"{count:,}", kind, shown(examples[kind])
        )
    if not paths:
        raise BadInput(f"the shards in {str(root)!r} hold no pictures: put NAME.jpg into them, or move them away")
    labels, classes_of_all = _numbered(root, words) if words else ([-1] * len(paths), ())
    return Index(
        root,
        tuple(paths),
        np.asarray(labels, dtype=np.int64),
        classes_of_all,
        np.asarray(spans, dtype=np.int64),
        files,
    )


def _is_picture(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in EXTENSIONS


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
