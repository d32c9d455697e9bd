"""Seeing a run: TensorBoard, JSON lines and a progress line, from sums that stay on the device between logged steps."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from ssl_pipeline import config, distributed
from ssl_pipeline.exits import StorageFailure
from ssl_pipeline.run_folder import Diary, duration

log = logging.getLogger("ssl_pipeline")

T = TypeVar("T")

SLOW, PATIENCE, SILENCE = 0.05, 60.0, 600.0
"""Share of time waiting for data, seconds for which it lasts before a word is said, and seconds until it is said again."""

TIME_KEYS = ("images_per_second", "data_wait", "seconds_left", "checkpoint_stall", "seconds_to_first_step")
"""Keys of metrics.jsonl that depend on the clock; all others are functions of the config and the data. The last one stands
in the first row of each start alone."""

OF_EACH_STEP = ("loss", "gradient_norm")
"""Scalars that are kept of each step until the next logged one."""


class Options(config.Options):
    """How often to look."""

    every_steps: int = Field(50, gt=0)
    """Steps between logged steps; each is one wait for the device."""
    tensorboard: bool = True


@dataclass(frozen=True)
class Skipped:
    """A step that was skipped."""

    step: int
    """Counted from 1, as in metrics.jsonl."""
    values: dict[str, float]
    """Its OF_EACH_STEP, means over ranks."""


class Curves:
    """TensorBoard's file of events, in `folder`.

    Written here, since the writer of torch.utils.tensorboard does so in a thread, which a full disk ends with a traceback.
    The format is TensorFlow's: tensorboard/compat/proto/event.proto in tensorboard/summary/writer/record_writer.py.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        self._start = SessionLog(status=SessionLog.START)
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.0"
        self._diary = Diary(folder / name)
        self._records = RecordWriter(self._diary)
        self._add(file_version="brain.Event:2")

    def drop_from(self, step: int) -> None:
        """Have points of steps from `step` on no longer shown, in whichever file of the folder they are."""
        self._add(step=step, session_log=self._start)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add a point to the curve of each name."""
        points = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step=step, summary=self._summary(value=points))

    def image(self, name: str, png: bytes, height: int, width: int) -> None:
        """Show a PNG file of RGB."""
        image = self._summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._add(step=0, summary=self._summary(value=[self._summary.Value(tag=name, image=image)]))

    def close(self) -> None:
        """Write what waits, and close the file."""
        self._diary.close()

    def _add(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())


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
        self.skipped: list[Skipped] = []
        """Of the last logged interval."""
        self.in_a_row = 0
        """Skipped steps up to the last logged one, without one between them that was not."""
        self._in_a_row = torch.zeros((), device=world.device)
        self._each: list[Tensor] = []
        """Of each step since the last logged one: whether it was skipped, and OF_EACH_STEP."""
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._clock: float | None = None
        self._waited = self._held = 0.0
        self._to_first_step: float | None = None
        """Seconds; 0 once they are logged."""
        self._since = start_step
        self._remedy = remedy
        self._slow = (0.0, 0.0)
        """Seconds without a logged interval that waited less than SLOW of its time, and of these seconds those waited."""
        self._quiet = math.inf
        """Seconds of training since a word was said."""
        self._metrics = Diary(metrics)
        self._curves = Curves(tensorboard) if options.tensorboard and world.is_main else None
        self._drop_after(start_step)

    def _drop_after(self, step: int) -> None:
        if self.world.is_main:
            try:
                self._metrics.drop(lambda row: row["step"] > step)
                self._metrics.path.touch()
            except OSError as error:
                raise StorageFailure.of(str(self._metrics.path), error) from None
            if self._curves is not None:
                self._curves.drop_from(step + 1)

    def rewind(self, step: int) -> None:
        """Drop what was logged after `step`, whose state was loaded, and go on from there, no step having been skipped."""
        self._drop_after(step)
        self._in_a_row.zero_()
        # Those among them that were skipped have been told of.
        self._each = [torch.zeros_like(one) for one in self._each]
        self.tick(step)

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

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The time within is counted as the checkpoint's."""
        start = time.monotonic()
        yield
        self._held += time.monotonic() - start

    def add(self, logs: dict[str, Tensor], finite: Tensor) -> None:
        """Add one step's scalars; a step that was skipped, `finite` being false, is counted and left out."""
        if self._to_first_step is None:
            self._to_first_step = process_seconds()
        values = torch.stack([value.detach().float() for value in logs.values()])
        kept = torch.where(finite, values, torch.zeros_like(values))
        row = torch.cat([kept, torch.stack([finite.float(), (~finite).float()])])
        if self._sums is None or self._names != list(logs):  # resumed with something more to measure
            self._names = list(logs)
            self._sums = row
        else:
            self._sums = self._sums + row
        self._in_a_row = torch.where(finite, 0.0, self._in_a_row + 1)
        each = [logs[name].detach().float() for name in OF_EACH_STEP if name in logs]
        self._each.append(torch.stack([(~finite).float(), *each]))

    @property
    def unread(self) -> int:
        """Steps added since the last logged one."""
        return len(self._each)

    def state_dict(self) -> dict[str, Any]:
        """The sums since the last logged step, a row a rank. All ranks must call it."""
        sums, each = (
            None if x is None else distributed.gather_values(x)
            for x in (self._sums, torch.stack(self._each) if self._each else None)
        )
        return {"names": self._names, "sums": sums, "each": each, "in_a_row": int(self._in_a_row)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on summing where `state` was taken. Raises ValueError where the sums are not of its names."""
        sums, each = (
            None if rows is None else (rows[self.world.rank] if len(rows) == self.world.size else rows.mean(dim=0))
            for rows in (state["sums"], state.get("each"))  # an older version kept sums alone
        )
        self._names = list(state["names"])
        numbers = len(self._names) + 2, 1 + sum(name in self._names for name in OF_EACH_STEP)
        for rows, count in zip((sums, each), numbers, strict=True):
            if rows is not None and rows.shape[-1] != count:
                raise ValueError(f"{rows.shape[-1]} numbers in the place of {count}")
        self._sums = None if sums is None else sums.to(self.world.device)
        self._each = [] if each is None else list(each.to(self.world.device))
        self._in_a_row = torch.full_like(self._in_a_row, state.get("in_a_row", 0))

    # --------------------------------------------------------------------------------------------------- every interval
    def log(self, step: int, epoch: int, rates: dict[str, float], bad: int) -> dict[str, float | None]:
        """Read the sums of all ranks and write them as the values of `step` (steps done), which are returned.

        `bad` is the number of unreadable pictures that the ranks together met. All ranks must call it.
        """
        assert self._sums is not None
        here = torch.cat([self._sums, self._in_a_row[None], *self._each])
        read = distributed.mean_over_ranks(here).tolist()
        *means, finite, skipped, in_a_row = read[: len(self._sums) + 1]
        self._read_each(np.reshape(read[len(self._sums) + 1 :], (len(self._each), -1)), step)
        self.in_a_row = round(in_a_row)
        self._sums, self._each = None, []
        now = time.monotonic()
        seconds = now - self._clock if self._clock is not None else math.nan
        done = step - self._since
        rate = done * self.batch_size / seconds if seconds > 0 else math.nan
        left = (self.steps - step) * self.batch_size / rate if rate > 0 else math.nan
        values: dict[str, float | None] = {"step": step, "epoch": epoch}
        good = [mean / finite if finite and math.isfinite(mean) else None for mean in means]
        values |= dict(zip(self._names, good, strict=True))
        values |= {f"lr_{name}": value for name, value in rates.items()}
        values |= {"skipped": round(skipped), "bad_pictures": bad}
        # One rank that waits keeps all: the others meet it in a collective, where nobody counts.
        each = distributed.gather_values(torch.tensor([self._waited, seconds], dtype=torch.float64))
        slowest = int(each[:, 0].argmax())
        waited, of = each[slowest].tolist()
        times = (rate, waited / of if of > 0 else math.nan, left, self._held)
        values |= {k: v if math.isfinite(v) else None for k, v in zip(TIME_KEYS, times, strict=False)}
        if self._to_first_step:
            values["seconds_to_first_step"] = self._to_first_step
        self._held = self._to_first_step = 0.0
        if self.world.is_main:
            self._write(values, [name for name in values if name != "step"])
            with contextlib.suppress(OSError):  # the terminal may be a file on a full disk
                print(self._line(values, slowest), file=sys.stderr, flush=True)
        if of > 0:
            self._tell_of_waiting(waited, of, slowest)
        self.tick(step)
        return values

    def _read_each(self, rows: np.ndarray, step: int) -> None:
        """Note the skipped steps among the rows of all steps up to `step`."""
        first = step - len(rows) + 1
        self.skipped = [
            Skipped(first + place, dict(zip(OF_EACH_STEP, numbers, strict=False)))
            for place, (skipped, *numbers) in enumerate(rows.tolist())
            if skipped
        ]

    def _tell_of_waiting(self, waited: float, seconds: float, rank: int) -> None:
        """Say once in SILENCE seconds what to try, where training has waited for data for PATIENCE seconds.

        `rank` waited longest in the last interval, of so many seconds. All ranks must call it, with the same numbers.
        """
        self._quiet += seconds
        if self._remedy is None or waited <= SLOW * seconds:
            self._slow = (0.0, 0.0)
            return
        self._slow = (self._slow[0] + seconds, self._slow[1] + waited)
        passed, waited = self._slow
        if passed >= PATIENCE and self._quiet >= SILENCE:
            self._quiet = 0.0
            remedy = distributed.gather_json(self._remedy() if self.world.rank == rank else None)[rank]
            where = f" on rank {rank}" if self.world.size > 1 else ""
            share = f"{100 * waited / passed:.0f} % of the last {duration(passed)}"
            if self.world.is_main:
                log.warning("training waited for data %s%s; %s", share, where, remedy)

    def note(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Write values of `step` that are no sums over steps, as a row of their own."""
        if self.world.is_main:
            self._write({"step": step, "epoch": epoch, **values}, list(values))

    def _write(self, row: dict[str, float | None], shown: list[str]) -> None:
        """A row of metrics.jsonl, and those of its values that TensorBoard shows."""
        self._metrics.write(json.dumps(row).encode() + b"\n")
        if self._curves is not None:
            values = {name: value for name in shown if (value := row[name]) is not None}
            self._curves.scalars(values, int(row["step"] or 0))

    def tick(self, step: int) -> None:
        """Start the clock of the next interval: after `step` steps, and after anything that is no training."""
        self._clock, self._waited, self._since = time.monotonic(), 0.0, step

    def _line(self, values: dict[str, Any], slowest: int) -> str:
        def shown(key: str, form: str, scale: float = 1.0) -> str:
            return "-" if values.get(key) is None else format(values[key] * scale, form)

        left = values["seconds_left"]
        waits = self.world.size > 1 and (values["data_wait"] or 0.0) > SLOW
        parts = [
            f"step {values['step']}/{self.steps}",
            f"epoch {values['epoch'] + 1}",
            f"loss {shown('loss', '.4f')}",
            f"{shown('images_per_second', '.0f')} images/s",
            f"waiting for data {shown('data_wait', '.0f', 100)} %{f' on rank {slowest}' if waits else ''}",
            f"left {duration(left) if left is not None else '-'}",
        ]
        parts += [f"skipped {values['skipped']}"] if values["skipped"] else []
        parts += [f"unreadable pictures {values['bad_pictures']}"] if values["bad_pictures"] else []
        return "  ".join(parts)

    # ------------------------------------------------------------------------------------------------------ at the start
    def show_views(self, path: Path, views: Sequence[Tensor], normalized: Sequence[tuple[Any, Any]]) -> None:
        """Write the first eight pictures' views, undone normalisation, as `path` and to TensorBoard: a row a picture."""
        grid = view_grid(views, normalized)
        png = io.BytesIO()
        Image.fromarray(grid).save(png, "png")
        try:
            path.write_bytes(png.getvalue())
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)  # half a picture
            log.warning("cannot write %s: %s; the run goes on without this picture of its views", path, error.strerror)
        if self._curves is not None:
            self._curves.image("views", png.getvalue(), *grid.shape[:2])

    def close(self) -> None:
        """Write what waits, and close what was opened."""
        self._metrics.close()
        if self._curves is not None:
            self._curves.close()


def process_seconds() -> float:
    """Seconds since this process started, its imports among them."""
    # proc(5): after the name in brackets the 20th field is the start, in ticks since the machine's.
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def view_pixels(views: Sequence[Tensor], normalized: Sequence[tuple[Any, Any]]) -> list[np.ndarray]:
    """Of each of V views (N, 3, S, S) the first eight pictures, (8, S, S, 3) uint8; `normalized` as in `view_grid`."""
    found = []
    for view, (mean, std) in zip(views, normalized, strict=True):
        pixels = view[:8].float().cpu().numpy() * np.reshape(std, (1, 3, 1, 1)) + np.reshape(mean, (1, 3, 1, 1))
        found.append(np.clip(np.rint(np.nan_to_num(pixels) * 255), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1))
    return found


def view_grid(views: Sequence[Tensor], normalized: Sequence[tuple[Any, Any]]) -> np.ndarray:
    """The first eight pictures' views, V times (N, 3, S, S), as one picture (H, W, 3) uint8: a row a picture.

    `normalized` are the means and deviations, V pairs, that are undone. Small pictures are enlarged by a whole factor, so
    that their pixels can be seen.
    """
    columns = view_pixels(views, normalized)
    largest = max(column.shape[1] for column in columns)
    cell = largest + 4
    rows = len(columns[0])
    grid = np.full((rows * cell + 4, len(columns) * cell + 4, 3), 255, dtype=np.uint8)
    for x, column in enumerate(columns):
        for y, picture in enumerate(column):
            top, left = (
                place * cell + 4 + (largest - side) // 2 for place, side in ((y, len(picture)), (x, picture.shape[1]))
            )
            grid[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    factor = -(-96 // largest)
    return grid.repeat(factor, axis=0).repeat(factor, axis=1)
