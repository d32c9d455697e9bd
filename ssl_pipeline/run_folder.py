"""The run folder: where a run's files lie, which config it belongs to, and who may write to it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import logging
import os
import pwd
import re
import socket
import tempfile
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from ssl_pipeline import config
from ssl_pipeline.exits import BadInput, Stop, StorageFailure

log = logging.getLogger("ssl_pipeline")

CHANGEABLE = (
    "data.name",
    "data.protocol",
    "data.evaluation_view",
    "data.labelled_view",
    "data.threads",
    "data.readers",
    "data.prefetch",
    "data.max_bad_fraction",
    "monitor.",
    "online.",
    "checkpoint.",
    "max_steps",
    "distributed.",
    "recovery.",
    "alarms.",
    "optim.accumulate",
    "data.root",
    "compute.",
)
"""Keys in which a second start of a run may differ from the first: they do not change what is computed, but for
`optim.accumulate`, which another number of ranks may need and which divides the batch that batch norm sees, and for
`compute.`, which rounds otherwise. That `data.root` holds the same pictures is asked of the checkpoint."""


class RunFolder:
    """Paths below one run's folder, and its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.logs = path / "logs"
        self.views = path / "views.png"
        self.backbone = path / "backbone.pth"
        self.backbones = path / "backbones"
        self.jobs = path / "jobs.jsonl"
        self.nonfinite = path / "nonfinite.jsonl"
        self.results = path / "results"
        self._lock: IO[str] | None = None

    def open_for_writing(
        self,
        values: Mapping[str, Any],
        complete: Callable[[dict[str, Any]], Mapping[str, Any]] = dict,
        write: bool = True,
    ) -> None:
        """Make the folder, take its lock, and write `values` as its config, or leave that to `describe`.

        `complete` adds to the config of a run that an older version began the options which that did not have.

        Raises BadInput where another process writes here, or the folder belongs to another user or another config, or
        holds links, or it cannot be made here; StorageFailure where there is no room.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.require_own()
            self._lock = (self.path / ".lock").open("a+")
        except OSError as error:
            raise refused(self.path, error) from None
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another process"
            job = os.environ.get("SLURM_JOB_ID")
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                log.warning("%s/.lock: %s; nothing keeps a second run out of this folder", self.path, error.strerror)
            elif job is not None and owner.endswith(f" of job {job}"):
                # This job was here before, on a node that died: an NFS server may keep the lock of a client that is gone.
                log.warning("going on although %s still has the lock of %s", owner, self.path)
            else:
                self._lock.close()
                raise BadInput(
                    f"the run folder {str(self.path)!r} is being written by {owner}: stop it or name another --output"
                ) from None
        self._lock.seek(0)
        self._lock.truncate()
        job = f" of job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}{job}\n")
        self._lock.flush()
        self._remove_partials()
        if self.config.is_file() and self.begun():
            self._require_same(values, complete(self.read_config()))
        elif any(self.checkpoints.glob("*.pt")):
            raise BadInput(f"{str(self.path)!r} holds checkpoints but no config.yaml: name another --output")
        if write:
            self.describe(values)

    def _remove_partials(self) -> None:
        """Remove what a process that was killed had begun to write; this one, which has the lock, has begun nothing."""
        for pattern in ("checkpoints/.*.partial", "backbones/.*.partial", ".backbone.*.partial"):
            for left in self.path.glob(pattern):
                with contextlib.suppress(OSError):
                    left.unlink()

    def require_own(self) -> None:
        """Raises BadInput where the folder is another user's, or not plain; one that is not there yet is ours."""
        require_owner(self.path)
        self.require_plain()

    def require_plain(self) -> None:
        """Raises BadInput where there is something in the folder that is neither a file nor a folder.

        Through a link a stranger's run would show files from elsewhere in a report, and have them overwritten. What lies
        in logs/ is left out: submitit makes links there.
        """
        for folder in (self.path, self.checkpoints, self.backbones, self.results, self.tensorboard):
            if not os.path.isdir(folder):  # Path.is_dir raises where a folder above may not be entered
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not (entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)):
                        raise BadInput(
                            f"{entry.path!r} is a link or a device, and a run folder holds files and folders alone: remove it; "
                            "a link may stand for the whole run folder"
                        )

    def describe(self, values: Mapping[str, Any]) -> None:
        """Write config.yaml. Raises as `refused`."""
        partial = self.path / ".config.yaml.partial"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            text = config.dump_yaml(values)
            if self.config.is_file() and self.config.read_text(encoding="utf-8") == text:
                return
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # after a power cut there is the old one or the new one
            os.replace(partial, self.config)
        except OSError as error:
            raise refused(self.config, error) from None

    def begun(self) -> bool:
        """Whether anything was submitted or computed here; until then its config may be replaced."""
        events = any(event["event"] in ("submitted", "start") for event in self.events())
        return events or self.metrics.exists() or any(self.checkpoints.glob("*.pt"))

    def _require_same(self, values: Mapping[str, Any], there: Mapping[str, Any]) -> None:
        old, new = config.flatten(there), config.flatten(values)
        changed = [
            f"  {key}: {old.get(key, 'absent')!r} there, {new.get(key, 'absent')!r} now"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not key.startswith(CHANGEABLE)
        ]
        if changed:
            raise BadInput(
                f"the run folder {str(self.path)!r} belongs to another config: give the same config to go on, or another "
                "--output. What differs:\n" + "\n".join(changed)
            )

    def read_config(self) -> dict[str, Any]:
        """The resolved config of this run. Raises BadInput where there is none."""
        if not self.config.is_file():
            raise BadInput(f"{str(self.path)!r} is no run folder: it has no config.yaml")
        values = config.parse_yaml(self.config.read_text(encoding="utf-8"), str(self.config))
        if not isinstance(values, dict):
            raise BadInput(f"{self.config} holds no mapping")
        return values

    def write_result(self, name: str, values: Mapping[str, Any]) -> Path:
        """Write results/<name>.json; another result that stood there is appended to results/superseded.jsonl.

        Raises as `refused`.
        """
        path = self.results / f"{name}.json"
        try:
            self.results.mkdir(parents=True, exist_ok=True)
            if path.is_file() and (old := json.loads(path.read_text(encoding="utf-8"))) != values:
                with (self.results / "superseded.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"name": name, **old}) + "\n")
            partial = self.results / f".{name}.json.partial"
            partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            raise refused(path, error) from None
        return path

    def read_results(self) -> dict[str, dict[str, Any]]:
        """What the evaluations wrote: the name of each file in results/, and its values."""
        files = [path for path in sorted(self.results.glob("*.json")) if path.is_file()]
        return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}

    def record(self, event: str, **values: Any) -> None:
        """Append an object to jobs.jsonl, which tells what was submitted, started, excluded and ended here, and when."""
        time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = json.dumps({"time": time, "event": event, **values}).encode() + b"\n"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self.jobs.open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read() == b"\n" else b"\n" + line  # a full disk had cut the last one
                file.write(line)  # whole lines: several jobs append here
        except OSError as error:  # a diary: no run ends for it
            log.warning("cannot write to %s: %s", self.jobs, error)

    def events(self) -> list[dict[str, Any]]:
        """What was recorded."""
        return read_lines(self.jobs)

    def is_locked(self) -> bool:
        """Whether another process writes to this run."""
        try:
            with (self.path / ".lock").open("r+") as file:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


class Diary:
    """A file that grows row by row, for which no run ends: what a full disk refuses waits, and is written with what comes later.

    Each row is there whole or not at all.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: io.FileIO | None = None
        self._waiting: list[bytes] = []

    @property
    def size(self) -> int:
        """Bytes, with what waits."""
        waiting = sum(map(len, self._waiting))
        try:
            return self.path.stat().st_size + waiting
        except OSError:
            return waiting

    def write(self, row: bytes) -> None:
        """Append `row`, which is there when this returns if the disk takes it."""
        said = bool(self._waiting)
        self._waiting.append(row)
        try:
            self._write_waiting()
        except OSError as error:
            if not said:
                log.warning("cannot write to %s: %s; what it lacks is written when there is room", self.path, error)

    def _write_waiting(self) -> None:
        while self._waiting:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("ab", buffering=0)
            try:
                self._append(self._file, self._waiting[0])
            except OSError:
                # The next try opens it anew: what failed may be this descriptor alone (ESTALE, after a server's failover).
                with contextlib.suppress(OSError):
                    self._file.close()
                self._file = None
                raise
            del self._waiting[0]

    @staticmethod
    def _append(file: io.FileIO, row: bytes) -> None:
        start = file.seek(0, os.SEEK_END)
        try:
            while row:
                row = row[file.write(row) :]
        except OSError:
            file.truncate(start)  # else the next row would be joined to half of this one
            raise

    def drop(self, dropped: Callable[[dict[str, Any]], bool]) -> None:
        """Cut the file, of JSON lines, off at the first row that is to be `dropped`, and from what a kill left of a last
        row; of what waits, drop those rows.

        In place, which needs no room and cannot lose the others. Raises OSError.
        """
        self._waiting = [row for row in self._waiting if not dropped(json.loads(row))]
        if not self.path.exists():
            return
        kept = end = 0
        with self.path.open("r+b") as file:
            for line in file:
                end += len(line)
                with contextlib.suppress(ValueError, TypeError, KeyError):  # a line that was cut
                    if dropped(json.loads(line)):
                        break
                    kept = end if line.endswith(b"\n") else kept
            file.truncate(kept)

    def close(self) -> None:
        """Write what waits, if the disk takes it by now, and close the file."""
        with contextlib.suppress(OSError):
            self._write_waiting()
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()


NOT_HERE = (
    errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP,
    errno.ENAMETOOLONG,
)  # fmt: skip
"""Why a place will not take a file however often one tries."""


def require_writable(folder: Path) -> None:
    """Raises as `refused` where `folder` cannot be made, or no file in it: asked before hours of work. Leaves nothing there."""
    try:
        there = folder
        while not there.exists() and there != there.parent:
            there = there.parent
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(4096))  # an empty file fits on a full disk
            file.flush()
    except OSError as error:
        raise refused(folder, error) from None


def refused(path: Path, error: OSError) -> Stop:
    """What ends a verb whose file or folder `path` could not be written: BadInput where another folder must be named,
    StorageFailure where the same command may succeed later."""
    said = f"cannot write to {str(path)!r}: {error.strerror or error}; "
    if error.errno in NOT_HERE:
        return BadInput(said + "name another folder by --output")
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageFailure(said + "free room there and give the same command again")
    return StorageFailure(said + "see that its storage answers and give the same command again")


def require_owner(folder: Path) -> None:
    """Raises BadInput where a folder is another user's, unless this one is root; warns where others may write to it."""
    if not os.path.exists(folder):  # Path.exists raises where a folder above may not be entered
        return
    state = folder.stat()
    if os.geteuid() not in (0, state.st_uid):
        try:
            owner = pwd.getpwuid(state.st_uid).pw_name
        except KeyError:
            owner = str(state.st_uid)
        raise BadInput(f"{str(folder)!r} belongs to user {owner}: name a folder of your own by --output")
    if state.st_mode & 0o022:
        log.warning("others can write to %s, and so decide what your jobs there run: chmod -R go-w it", folder)


def write_json(path: Path, values: Any) -> None:
    """Write a file whole or not at all. Raises StorageFailure."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(values), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise StorageFailure(f"cannot write {path}: {error}; free room and give the same command again") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; one that was cut short by a kill is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def checkpoint_file(folder: Path, step: int) -> Path:
    """The file of a step's checkpoint."""
    return folder / f"step_{step:08d}.pt"


def saved_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    found = (re.fullmatch(r"step_(\d{8,})\.pt", name) for name in os.listdir(folder))
    return sorted(int(match.group(1)) for match in found if match)


def duration(seconds: float) -> str:
    """A time span to be read: `3 min 05 s`, `2 h 07 min`, `12 days 4 h`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 72:
        return f"{hours // 24} days {hours % 24} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
