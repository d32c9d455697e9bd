"""Seeing a run: TensorBoard, JSON lines and a progress line, from sums that stay on the device between logged steps."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from ssl_pipeline import config, distributed
from ssl_pipeline.run_folder import duration, read_lines

log = logging.getLogger("ssl_pipeline")

T = TypeVar("T")

SLOW, PATIENCE, SILENCE = 0.05, 60.0, 600.0
"""Share of time waiting for data, seconds for which it lasts before a word is said, and seconds until it is said again."""

TIME_KEYS = ("images_per_second", "data_wait", "seconds_left")
"""Keys of metrics.jsonl that depend on the clock; all others are functions of the config and the data."""


class Options(config.Options):
    """How often to look."""

    every_steps: int = Field(50, gt=0)
    """Steps between logged steps; each is one wait for the device."""
    tensorboard: bool = True


class Monitor:
    """Collects on the device at every step, reads once an interval, and writes on the main rank.

    Args:
        options: how often.
        metrics: path of metrics.jsonl.
        tensorboard: folder of the event files.
        world: this process's place.
        batch_size: pictures in a step, over all ranks.
        steps: steps at which the run ends.
        start_step: steps done before; what was logged after it, by a process that died, is dropped.
        remedy: which setting to try where training waits for data.
    """

    def __init__(
        self,
        options: Options,
        metrics: Path,
        tensorboard: Path,
        world: distributed.World,
        batch_size: int,
        steps: int,
        start_step: int = 0,
        remedy: Callable[[], str] | None = None,
    ) -> None:
        self.options, self.world, self.batch_size, self.steps = options, world, batch_size, steps
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._writer: Any = None
        self._clock: float | None = None
        self._waited = 0.0
        self._since = start_step
        self._remedy = remedy
        self._slow = (0.0, 0.0)
        """Seconds without a logged interval that waited less than SLOW of its time, and of these seconds those waited."""
        self._told = -math.inf
        if world.is_main:
            _drop_after(metrics, start_step)
            self._metrics = metrics.open("a", encoding="utf-8")
            if options.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(tensorboard), purge_step=start_step + 1)

    # ------------------------------------------------------------------------------------------------------- every step
    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the time that the caller waits for each is counted."""
        iterator = iter(batches)
        while True:
            start = time.monotonic()
            batch = next(iterator, None)
            self._waited += time.monotonic() - start
            if batch is None:
                return
            yield batch

    def add(self, logs: dict[str, Tensor], finite: Tensor) -> None:
        """Add one step's scalars; a step that was skipped, `finite` being false, is counted and left out."""
        values = torch.stack([value.detach().float() for value in logs.values()])
        kept = torch.where(finite, values, torch.zeros_like(values))
        row = torch.cat([kept, torch.stack([finite.float(), (~finite).float()])])
        if self._sums is None or self._names != list(logs):  # resumed with something more to measure
            self._names = list(logs)
            self._sums = row
        else:
            self._sums = self._sums + row

    def state_dict(self) -> dict[str, Any]:
        """The sums since the last logged step, a row a rank. All ranks must call it."""
        return {"names": self._names, "sums": None if self._sums is None else distributed.gather_values(self._sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on summing where `state` was taken."""
        self._names = list(state["names"])
        if state["sums"] is not None:
            rows = state["sums"].to(self.world.device)
            self._sums = rows[self.world.rank] if len(rows) == self.world.size else rows.mean(dim=0)

    # --------------------------------------------------------------------------------------------------- every interval
    def log(self, step: int, epoch: int, rates: dict[str, float], bad: int) -> None:
        """Read the sums of all ranks and write them as the values of `step` (steps done). All ranks must call it.

        `bad` is the number of unreadable pictures that the ranks together met.
        """
        assert self._sums is not None
        *means, finite, skipped = distributed.mean_over_ranks(self._sums).tolist()
        self._sums = None
        now = time.monotonic()
        seconds = now - self._clock if self._clock is not None else math.nan
        done = step - self._since
        rate = done * self.batch_size / seconds if seconds > 0 else math.nan
        left = (self.steps - step) * self.batch_size / rate if rate > 0 else math.nan
        values: dict[str, float | None] = {"step": step, "epoch": epoch}
        values |= {name: mean / finite if finite else None for name, mean in zip(self._names, means, strict=True)}
        values |= {f"lr_{name}": value for name, value in rates.items()}
        values |= {"skipped": round(skipped), "bad_pictures": bad}
        times = (rate, self._waited / seconds if seconds > 0 else math.nan, left)
        values |= {k: v if math.isfinite(v) else None for k, v in zip(TIME_KEYS, times, strict=True)}
        if self.world.is_main:
            self._metrics.write(json.dumps(values) + "\n")
            self._metrics.flush()
            for name, value in values.items():
                if self._writer is not None and value is not None and name != "step":
                    self._writer.add_scalar(name, value, step)
            print(self._line(values), file=sys.stderr, flush=True)
            if seconds > 0:
                self._tell_of_waiting(seconds, now)
        self.tick(step)

    def _tell_of_waiting(self, seconds: float, now: float) -> None:
        """Say once in SILENCE seconds what to try, where training has waited for data for PATIENCE seconds."""
        if self._remedy is None or self._waited <= SLOW * seconds:
            self._slow = (0.0, 0.0)
            return
        self._slow = (self._slow[0] + seconds, self._slow[1] + self._waited)
        passed, waited = self._slow
        if passed >= PATIENCE and now - self._told >= SILENCE:
            self._told = now
            share = f"{100 * waited / passed:.0f} % of the last {duration(passed)}"
            log.warning("training waited for data %s; %s", share, self._remedy())

    def note(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Write values of `step` that are no sums over steps, as a row of their own."""
        if self.world.is_main:
            self._metrics.write(json.dumps({"step": step, "epoch": epoch, **values}) + "\n")
            self._metrics.flush()
            if self._writer is not None:
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)

    def tick(self, step: int) -> None:
        """Start the clock of the next interval: after `step` steps, and after anything that is no training."""
        self._clock, self._waited, self._since = time.monotonic(), 0.0, step

    def _line(self, values: dict[str, Any]) -> str:
        def shown(key: str, form: str, scale: float = 1.0) -> str:
            return "-" if values.get(key) is None else format(values[key] * scale, form)

        left = values["seconds_left"]
        parts = [
            f"step {values['step']}/{self.steps}",
            f"epoch {values['epoch']}",
            f"loss {shown('loss', '.4f')}",
            f"{shown('images_per_second', '.0f')} images/s",
            f"waiting for data {shown('data_wait', '.0f', 100)} %",
            f"left {duration(left) if left is not None else '-'}",
        ]
        parts += [f"skipped {values['skipped']}"] if values["skipped"] else []
        parts += [f"unreadable pictures {values['bad_pictures']}"] if values["bad_pictures"] else []
        return "  ".join(parts)

    # ------------------------------------------------------------------------------------------------------ at the start
    def show_views(self, path: Path, views: Sequence[Tensor], normalized: Sequence[tuple[Any, Any]]) -> None:
        """Write the first eight pictures' views, undone normalisation, as `path` and to TensorBoard: a row a picture."""
        columns = []
        for view, (mean, std) in zip(views, normalized, strict=True):
            pixels = view[:8].float().cpu().numpy() * np.reshape(std, (1, 3, 1, 1)) + np.reshape(mean, (1, 3, 1, 1))
            columns.append(np.clip(np.rint(pixels * 255), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1))
        cell = max(column.shape[1] for column in columns) + 4
        rows = len(columns[0])
        grid = np.full((rows * cell + 4, len(columns) * cell + 4, 3), 255, dtype=np.uint8)
        for x, column in enumerate(columns):
            for y, picture in enumerate(column):
                top, left = y * cell + 4, x * cell + 4
                grid[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
        # Small pictures are enlarged by a whole factor, so that their pixels can be seen.
        factor = max(1, 96 // cell)
        Image.fromarray(grid.repeat(factor, axis=0).repeat(factor, axis=1)).save(path)
        if self._writer is not None:
            self._writer.add_image("views", grid, 0, dataformats="HWC")

    def close(self) -> None:
        """Flush and close what was opened."""
        if self.world.is_main:
            self._metrics.close()
            if self._writer is not None:
                self._writer.close()


def _drop_after(metrics: Path, step: int) -> None:
    """Remove the rows of steps that will be done again."""
    rows = [row for row in read_lines(metrics) if row["step"] <= step]
    partial = metrics.with_name(f".{metrics.name}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, metrics)
