"""The checkpoint file: what is in it, how it is written so that none is ever half there, and how it is found again.

RUN/checkpoints/step_00012345.pt is a torch archive of tensors and plain values, loaded with weights_only=True, so that
a stranger's file can run no code. It is written to a temporary file in the same folder, flushed, and renamed: a job
killed at any moment leaves the last good one. torch.load accepts a file with a flipped bit, so the archive's CRC32s are
checked first.

    format      1
    step        steps done
    model       state dict of the method (backbone, head, predictor, targets, queues)
    optimizer   its state dict;  scaler: the fp16 loss scale's
    loader      (epoch, samples consumed, unreadable ids, rollbacks)
    monitor     sums since the last logged step; steps skipped in a row, 0 in a good checkpoint
    alarms      for how long each has held
    online      the online probe and its optimizer
    random      state of torch's generator on the host, a row a rank;  random_cuda: the same of each rank's device
    config      the resolved config, plain values
    method, versions    names, for messages

While one is being written training goes on (`Writer`).
"""

from __future__ import annotations

import contextlib
import copy
import errno
import logging
import os
import re
import shutil
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline import config, distributed
from ssl_pipeline.exits import BadInput, Stop, StorageFailure
from ssl_pipeline.run_folder import checkpoint_file, saved_steps

log = logging.getLogger("ssl_pipeline")

FORMAT = 1

NOT_FLUSHED = frozenset(
    {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR}
)
"""What file systems answer that cannot flush a folder (FUSE, NFS, SMB); of a disk that failed, EIO and ENOSPC tell."""

UNLISTED = "it is damaged: the list of its parts has changed since it was written"
"""Of a file by whose list nothing can be found in it."""


class Options(config.Options):
    """When to save, and how many to keep."""

    every_steps: int | None = Field(None, gt=0)
    every_epochs: int | None = Field(1, gt=0)
    keep: int = Field(2, gt=0)
    """Newest checkpoints that stay."""
    backbone_every_epochs: int | None = Field(None, gt=0)
    """Epochs between bare backbones that stay for good, as RUN/backbones/epoch_0100.pth."""
    max_failed_saves: int = Field(3, gt=0)
    """Saves that fail one after the other until the run ends (exit status 77). The save that could be the last of them is
    waited for, with 1 therefore every save."""

    def due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether to save after `step` steps are done."""
        by_epoch = self.every_epochs is not None and step % (self.every_epochs * steps_per_epoch) == 0
        by_step = self.every_steps is not None and step % self.every_steps == 0
        return by_epoch or by_step or self.backbone_due(step, steps_per_epoch)

    def backbone_due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether a bare backbone is kept after `step` steps are done."""
        every = self.backbone_every_epochs
        return every is not None and step > 0 and step % (every * steps_per_epoch) == 0


class Writer:
    """Writes checkpoints on a thread of the main rank: a step waits only until the state is copied to host memory.

    That memory is kept from save to save; it is pinned where the state is on an accelerator. The other ranks copy
    nothing. As a context the writer is left when the write under way is over, whatever ends the run.

    Args:
        folder: of the checkpoints.
        keep: newest checkpoints that stay.
        max_failed: saves that may fail one after the other; with the last of them the run ends.
    """

    def __init__(self, folder: Path, keep: int, max_failed: int) -> None:
        self.folder, self.keep, self.max_failed = folder, keep, max_failed
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._failed = 0
        self._host: dict[tuple[Any, ...], Tensor] = {}

    def save(
        self,
        state: dict[str, Any],
        extra: Any = None,
        first: Callable[[Any], object] | None = None,
        final: bool = False,
    ) -> None:
        """Write `state` as the checkpoint of its step as it is now. All ranks must call it.

        Before the checkpoint, `first` is called on the writing thread with a copy of `extra`, nested values like
        `state`. A save that fails is told and left to the next one. A `final` one, after which no other comes, is waited
        for and tried twice. Raises StorageFailure where it fails both times, or is the last that may fail.
        """
        distributed.together(lambda: self._save(state, extra, first, final) if distributed.rank() == 0 else None)

    def wait(self) -> None:
        """Until no write is under way: what was saved can be read then. All ranks must call it."""
        distributed.together(self._join)

    def _save(self, state: dict[str, Any], extra: Any, first: Callable[[Any], object] | None, final: bool) -> None:
        self._join()
        state, extra = self._copies((state, extra))

        def work() -> None:
            if first is not None:
                first(extra)
            write(self.folder, state, self.keep)

        last_chance = self._failed + 1 == self.max_failed
        self._start(work, waited_for=final or last_chance)
        if final or last_chance:
            self._join()
        if final and self._error:
            log.warning("%s; trying once more", self._error)
            self._start(work, waited_for=True)
            self._join()
        if self._error and (final or last_chance):
            raise StorageFailure(f"{self._error}, and give the same command again")

    def _start(self, work: Callable[[], None], waited_for: bool) -> None:
        def run() -> None:
            try:
                work()
                self._failed, self._error = 0, None
            except Exception as error:
                self._failed, self._error = self._failed + 1, error
                if not waited_for:
                    log.warning(
                        "%s; training goes on and the next save tries again (save %d of %d in a row that failed, "
                        "checkpoint.max_failed_saves)", error, self._failed, self.max_failed,
                    )  # fmt: skip

        # Not a daemon: the interpreter does not end before the file is whole.
        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def _join(self) -> None:
        """Raises what the thread raised, but for a failure of the disk, which is counted."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._error is not None and not isinstance(self._error, StorageFailure):
                raise self._error

    def _copies(self, values: Any) -> Any:
        """`values` with every tensor copied to this writer's host memory; one storage is copied once."""
        seen: dict[tuple[Any, ...], Tensor] = {}

        def copied(value: Any, place: tuple[Any, ...]) -> Any:
            if isinstance(value, Tensor):
                same = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
                if same not in seen:
                    seen[same] = self._copy(value, place)
                return seen[same]
            if isinstance(value, dict):
                fresh = copy.copy(value)  # a state dict's _metadata goes along
                fresh.update({key: copied(one, (*place, key)) for key, one in value.items()})
                return fresh
            if isinstance(value, (list, tuple)):
                return type(value)(copied(one, (*place, number)) for number, one in enumerate(value))
            return value

        result = copied(values, ())
        if any(device.type != "cpu" for device, *_ in seen):
            torch.accelerator.synchronize()
        return result

    def _copy(self, value: Tensor, place: tuple[Any, ...]) -> Tensor:
        host = self._host.get(place)
        on_device = value.device.type != "cpu"
        if host is None or host.shape != value.shape or host.dtype != value.dtype or host.is_pinned() != on_device:
            host = self._host[place] = torch.empty_like(value, device="cpu", pin_memory=on_device)
        return host.copy_(value.detach(), non_blocking=on_device)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self._join()
        elif self._thread is not None:
            self._thread.join()


def write(folder: Path, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as the checkpoint of its step and remove all but the newest `keep` up to it. Raises StorageFailure.

    Files of later steps do not count: they are damaged ones. While steps are being skipped none is removed, because a good
    one may be needed.
    """
    target = checkpoint_file(folder, state["step"])
    partial = folder / f".{target.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        _flush_folder(folder)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise StorageFailure.of(f"checkpoint {target}", error) from None
    if state.get("monitor", {}).get("in_a_row"):
        return target  # what is older may be the last good one
    try:
        there = [step for step in saved_steps(folder) if step <= state["step"]]
        for old in there[:-keep]:
            checkpoint_file(folder, old).unlink(missing_ok=True)
    except OSError as error:
        log.warning("checkpoints before the newest %d stay: %s", keep, error)
    return target


def remove_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of steps after `step`. Raises StorageFailure."""
    try:
        for newer in saved_steps(folder):
            if newer > step:
                checkpoint_file(folder, newer).unlink(missing_ok=True)
    except OSError as error:
        raise StorageFailure.of(f"to {folder}", error) from None


def remove_backbones_after(folder: Path, epoch: int) -> None:
    """Remove the bare backbones of epochs after `epoch`, whose weights the run no longer has. Raises StorageFailure."""
    try:
        for file in folder.glob("epoch_*.*"):
            if (number := file.stem.removeprefix("epoch_")).isdecimal() and int(number) > epoch:
                file.unlink()
    except OSError as error:
        raise StorageFailure.of(f"to {folder}", error) from None


def set_aside(folder: Path, step: int) -> None:
    """Rename the checkpoints of steps after `step`, from which a run goes on because these are damaged.

    They would be taken for the newest once more, and for ones that need no earlier one. Raises StorageFailure.
    """
    try:
        for newer in saved_steps(folder):
            if newer > step:
                file = checkpoint_file(folder, newer)
                os.replace(file, file.with_name(f"{file.name}.damaged"))
    except OSError as error:
        raise StorageFailure.of(f"to {folder}", error) from None


def _flush_folder(folder: Path) -> None:
    """Make a rename in `folder` last through a power cut, where its file system can."""
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_FLUSHED:
            raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


def read(file: Path) -> dict[str, Any]:
    """The state in one file, tensors on the host. Raises ValueError, with the reason, for a damaged or foreign file.

    Raises StorageFailure where the storage does not give it: that says nothing of the file.
    """
    try:
        reason = _damage(file)
        state = None if reason else torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):
            raise StorageFailure(
                f"cannot read checkpoint {file}: {error.strerror}; the same command goes on once it can"
            ) from None
        reason = UNLISTED  # by which it was sent to a place outside the file
    except Exception as error:  # many types
        foreign = type(error).__name__ == "UnpicklingError"  # torch's own words tell how to load it all the same
        reason = f"it cannot be read: {'it holds more than tensors and plain values' if foreign else _reason(error)}"
    if reason:
        raise ValueError(reason)
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("step"), int):
        raise ValueError("it is not a checkpoint of this tool")
    if file != checkpoint_file(file.parent, state["step"]):
        raise ValueError(f"it is the checkpoint of step {state['step']}")
    return state


def _damage(file: Path) -> str:
    """What is wrong with a file as an archive of torch, in words; empty if nothing is. Raises OSError."""
    size = file.stat().st_size
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
            if sum(part.file_size for part in parts) > size:
                return "it is compressed, and not by this tool"
            altered = archive.testzip()
    except OSError:
        raise
    except zipfile.BadZipFile:  # the list of its parts is not at its end
        return f"it is cut short or not a checkpoint ({size:,} bytes)"
    except Exception:  # many types
        return UNLISTED
    if altered:
        return f"it is damaged: bits of its part {altered} have changed since it was written"
    # torch takes a part marked as a folder for an empty one, and leaves its tensor uninitialised.
    marked = next((part.filename for part in parts if part.external_attr), None)
    return f"it is damaged: its part {marked} is not as torch writes it" if marked else ""


def _reason(error: Exception) -> str:
    """The first line or sentence of what an exception says; torch's go on for long, and others repeat what they were given."""
    return re.split(r"\n|\. ", str(error))[0][:200] or type(error).__name__


def put_back(state: dict[str, Any], entry: str, load: Callable[[Any], object], optional: bool = False) -> None:
    """`load` one entry of a checkpoint, {} in the place of an `optional` one that is not there.

    Raises BadInput where that fails: on what an older version wrote, or somebody edited.
    """
    try:
        load(state.get(entry, {}) if optional else state[entry])
    except (Stop, torch.OutOfMemoryError):
        raise
    except Exception as error:  # many types: no entry has a schema
        if entry not in state:
            reason = f"it has no {entry}"
        elif isinstance(error, KeyError):
            reason = f"its {entry} has no {_reason(error)}"
        else:
            reason = f"its {entry} does not fit: {_reason(error)}"
        name = checkpoint_file(Path(), state["step"]).name
        raise BadInput(
            f"the checkpoint of step {state['step']} cannot be gone on from: {reason}; move {name} away, and the same "
            "command goes on from the one before"
        ) from None


def worth_going_back_to(state: dict[str, Any]) -> int:
    """2 for a state to which a run whose loss is no longer finite may go back, 1 where there is nothing better, 0 never.

    1: it went back to this one before and came no further. 0: steps were being skipped when it was written.
    """
    if state["monitor"].get("in_a_row", 0):
        return 0
    loader = state["loader"]
    keys = loader.get("rekeyed", [])
    return 1 if keys and list(keys[-1][:2]) == [loader["epoch"], loader["consumed"]] else 2


def read_newest(folder: Path, worth: Callable[[dict[str, Any]], int] = lambda _: 2) -> dict[str, Any] | None:
    """The newest state of `worth` 2, else the newest of worth 1; None where there is none of them.

    A damaged one is named and the next older one taken. Raises BadInput where every one is damaged.
    """
    damaged: dict[Path, str] = {}
    best: dict[str, Any] | None = None
    most, sound = 0, False
    for step in reversed(saved_steps(folder)):
        file = checkpoint_file(folder, step)
        try:
            state = read(file)
        except ValueError as error:
            damaged[file] = str(error)
            continue
        sound = True
        if worth(state) > most:
            best, most = state, worth(state)
        if most == 2:
            break
    if damaged and not sound:
        reasons = "; ".join(f"{file.name}: {reason}" for file, reason in damaged.items())
        raise BadInput(f"no checkpoint in {folder} can be used ({reasons}); move them away to start from step 0")
    for file, reason in damaged.items():
        used = checkpoint_file(folder, best["step"]) if best else None
        instead = f"{used.name} ({used.stat().st_size:,} bytes)" if used else "none of the others"
        log.warning("checkpoint %s is not used: %s; %s is used instead", file, reason, instead)
    return best


def read_together(folder: Path, worth: Callable[[dict[str, Any]], int] = lambda _: 2) -> dict[str, Any] | None:
    """`read_newest`, and the same file on all ranks, which must call it: a node may list a shared folder late.

    Raises BadInput also where another rank cannot read what the main one read.
    """
    main = distributed.rank() == 0
    state = distributed.together(lambda: read_newest(folder, worth) if main else None)
    step = distributed.gather_json(state["step"] if state else None)[0]

    def read_too() -> dict[str, Any] | None:
        if main:
            return state
        file = checkpoint_file(folder, step)
        for _ in range(10):  # a shared folder shows a new file late
            if file.exists():
                break
            time.sleep(1)
        try:
            return read(file)
        except ValueError as error:
            raise BadInput(
                f"{file} can be read by rank 0 and not here: {error}; is the folder on a shared disk?"
            ) from None

    return None if step is None else distributed.together(read_too)


def state_bytes(values: Any) -> int:
    """Bytes of all tensors in nested values."""
    if isinstance(values, Tensor):
        return values.numel() * values.element_size()
    if isinstance(values, dict):
        return sum(state_bytes(value) for value in values.values())
    if isinstance(values, (list, tuple)):
        return sum(state_bytes(value) for value in values)
    return 0


def require_room(folder: Path, needed: int) -> int:
    """Free bytes on the folder's disk. Raises StorageFailure where it cannot hold `needed` bytes more."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        has, needs = (f"{count / 1e6:,.1f} MB" for count in (free, needed))
        if has == needs:
            has, needs = (f"{count:,} bytes" for count in (free, needed))
        raise StorageFailure(
            f"the disk of {folder} has {has} free and the checkpoints of this run need {needs}: "
            "free room, lower checkpoint.keep, or name another output"
        )
    return free
