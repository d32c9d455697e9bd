"""The checkpoint file: what is in it, how it is written so that none is ever half there, and how it is found again.

RUN/checkpoints/step_00012345.pt is a torch archive of tensors and plain values, loaded with weights_only=True, so that
a stranger's file can run no code. It is written to a temporary file in the same folder, flushed, and renamed: a job
killed at any moment leaves the last good one. torch.load accepts a file with a flipped bit, so the archive's CRC32s are
checked first.

    format      1
    step        steps done
    model       state dict of the method (backbone, head, predictor, targets)
    optimizer   its state dict;  scaler: the fp16 loss scale's
    loader      (epoch, samples consumed, unreadable ids)
    monitor     sums since the last logged step
    online      the online probe and its optimizer
    random      torch's generator states, a row a rank
    method, versions    names, for messages
"""

from __future__ import annotations

import logging
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline import config
from ssl_pipeline.exits import BadInput, StorageFailure
from ssl_pipeline.run_folder import checkpoint_file, saved_steps

log = logging.getLogger("ssl_pipeline")

FORMAT = 1


class Options(config.Options):
    """When to save, and how many to keep."""

    every_steps: int | None = Field(None, gt=0)
    every_epochs: int | None = Field(1, gt=0)
    keep: int = Field(2, gt=0)
    """Newest checkpoints that stay."""
    backbone_every_epochs: int | None = Field(None, gt=0)
    """Epochs between bare backbones that stay for good, as RUN/backbones/epoch_0100.pth."""

    def due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether to save after `step` steps are done."""
        by_epoch = self.every_epochs is not None and step % (self.every_epochs * steps_per_epoch) == 0
        by_step = self.every_steps is not None and step % self.every_steps == 0
        return by_epoch or by_step or self.backbone_due(step, steps_per_epoch)

    def backbone_due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether a bare backbone is kept after `step` steps are done."""
        return self.backbone_every_epochs is not None and step % (self.backbone_every_epochs * steps_per_epoch) == 0


def write(folder: Path, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as the checkpoint of its step and remove all but the newest `keep`. Raises StorageFailure."""
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
        partial.unlink(missing_ok=True)
        raise StorageFailure(
            f"cannot write checkpoint {target}: {error}; free room and give the same command again"
        ) from None
    for old in saved_steps(folder)[:-keep]:
        checkpoint_file(folder, old).unlink(missing_ok=True)
    return target


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(file: Path) -> dict[str, Any]:
    """The state in one file, tensors on the host. Raises ValueError, with the reason, for a damaged or foreign file."""
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"its part {damaged} is damaged")
        state = torch.load(file, map_location="cpu", weights_only=True)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"it cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError("it is not a checkpoint of this tool")
    return state


def read_newest(folder: Path) -> dict[str, Any] | None:
    """The newest good state, None where there is no checkpoint at all.

    A damaged one is named and the next older one taken. Raises BadInput where every one is damaged.
    """
    reasons = []
    for step in reversed(saved_steps(folder)):
        file = checkpoint_file(folder, step)
        try:
            return read(file)
        except ValueError as error:
            log.warning("checkpoint %s is not used: %s", file, error)
            reasons.append(f"{file.name}: {error}")
    if reasons:
        raise BadInput(
            f"no checkpoint in {folder} can be used ({'; '.join(reasons)}); move them away to start from step 0"
        )
    return None


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
        raise StorageFailure(
            f"the disk of {folder} has {free / 1e6:.0f} MB free and the checkpoints of this run need {needed / 1e6:.0f} MB: "
            "free room, lower checkpoint.keep, or name another output"
        )
    return free
