"""Steps that were skipped because loss or gradients were not finite: what is told of them, and when a run gives up.

Such a step changes nothing but the counts of steps. The run goes back to its last good checkpoint where too many came
in a row (`pretrain._roll_back`).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from ssl_pipeline import config
from ssl_pipeline.data.loader import Loader
from ssl_pipeline.exits import NonFinite
from ssl_pipeline.monitor import Skipped
from ssl_pipeline.run_folder import Diary, RunFolder, read_lines, saved_steps

log = logging.getLogger("ssl_pipeline")

MOST_STEPS, MOST_BYTES = 100, 2**28
"""Skipped steps listed at one logged step, and the size at which RUN/nonfinite.jsonl grows no more."""


class Options(config.Options):
    """What to do when loss or gradients stay NaN or infinite."""

    max_skipped: int = Field(25, gt=0)
    """Steps skipped in a row, as a logged step finds them, after which the run goes back to its last good checkpoint. The
    loss scale of fp16 begins at 2^16 and is halved by every overflow: where gradients are ordinary it has been low enough
    after some 17 steps, and 25 (a scale of 2^-9) say that they are not."""
    max_rollbacks: int = Field(3, ge=0)
    """How often a run goes back, the rest of the epoch in another order each time, before it ends with status 76."""


class SkipLog:
    """Lists skipped steps in a file, with the pictures of their batches, and tells of them. On the main rank.

    Args:
        path: of the file, RUN/nonfinite.jsonl.
        fp16: whether the loss scale of fp16 may have been too large for a finite loss: that is ordinary.
    """

    def __init__(self, path: Path, fp16: bool) -> None:
        self.path, self.fp16 = path, fp16
        self._diary = Diary(path)
        self._streaks: dict[int, _Streak] = {}
        """By the level of what is logged of them."""
        self._rollbacks = 0

    def drop_after(self, step: int, rollbacks: int) -> None:
        """Drop the rows of steps after `step` with `rollbacks` before them or, of a rollback that was not saved, with more:
        a process that ended listed them, and they come again."""
        try:
            self._diary.drop(lambda row: row["step"] > step and row["rollbacks"] >= rollbacks)
        except OSError as error:
            log.warning("cannot write to %s: %s; steps may be listed there twice", self.path, error)

    def tell(self, step: int, skipped: Sequence[Skipped], data: Loader) -> None:
        """List what was `skipped` since the last logged step, `step` being this one, and say so in a sentence.

        Where it happens at one logged step after the other, the sentence comes at the first, the second, the fourth and so
        on, and one more at the end.

        A row: step (counted from 1), epoch, rollbacks before it, loss and gradient_norm (a string where not finite), ids of
        the global batch before replacement of unreadable ones, and files, or `overflow` where fp16's loss scale was at
        fault.
        """
        if self._rollbacks != data.rollbacks:  # which was told of
            self._rollbacks, self._streaks = data.rollbacks, {}
        overflows = [one for one in skipped if self.fp16 and math.isfinite(one.values["loss"])]
        bad = [one for one in skipped if one not in overflows]
        where = self._list(skipped, overflows, data)
        values = bad[-1].values.items() if bad else ()
        told = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in values)
        ordinary = "ordinary at the start of a run and now and then"
        self._say(logging.INFO, step, overflows, "while the loss scale of fp16 fell", ordinary)
        self._say(logging.WARNING, step, bad, "and changed nothing", f"{told}; {where}")

    def _say(self, level: int, step: int, skipped: Sequence[Skipped], how: str, why: str) -> None:
        streak = self._streaks.setdefault(level, _Streak())
        if skipped and streak.grow(skipped):
            log.log(level, "%s skipped %s: %s", str(streak), how, why)  # as it is now
        elif not skipped:
            if streak.logged > 1:  # one alone was over by the silence of the next
                log.info("%s skipped %s; none was after them up to step %d", streak, how, step)
            del self._streaks[level]

    def _list(self, skipped: Sequence[Skipped], overflows: Sequence[Skipped], data: Loader) -> str:
        """Append a row for each skipped step. Returns where they are."""
        if self._diary.size > MOST_BYTES:
            return f"{self.path} is full, no more are listed there"
        for one in skipped[:MOST_STEPS]:
            epoch, place = divmod(one.step - 1, len(data))
            ids = data.batch_ids(epoch, place).tolist()
            numbers = {name: value if math.isfinite(value) else str(value) for name, value in one.values.items()}
            why = {"overflow": "fp16"} if one in overflows else {"files": [data.index.name(sample) for sample in ids]}
            row = {"step": one.step, "epoch": epoch, "rollbacks": data.rollbacks, **numbers, "ids": ids, **why}
            self._diary.write(json.dumps(row).encode() + b"\n")
        return f"the pictures of each batch are in {self.path}"

    def close(self) -> None:
        """Write what waits for a full disk, if it takes it by now."""
        self._diary.close()


class _Streak:
    """Skipped steps of logged steps that follow each other and saw some each."""

    def __init__(self) -> None:
        self.logged = self.count = self.first = self.last = 0

    def grow(self, skipped: Sequence[Skipped]) -> bool:
        """Add those of one more logged step. Returns whether to tell: of the first, the second, the fourth, the eighth ..."""
        self.first = self.first or skipped[0].step
        self.last = skipped[-1].step
        self.count += len(skipped)
        self.logged += 1
        return not self.logged & (self.logged - 1)

    def __str__(self) -> str:
        if self.count == 1:
            return f"step {self.first} was"
        dense = self.last - self.first == self.count - 1
        return f"{self.count} steps{'' if dense else ' of those'} from {self.first} to {self.last} were"


def gave_up(options: Options, run: RunFolder, step: int, in_a_row: int, precision: str) -> NonFinite:
    """The end after `max_rollbacks`, where the last `in_a_row` of `step` steps were skipped: what was seen, and a way out."""
    logged = [row for row in read_lines(run.metrics) if None not in (row.get("loss"), row.get("gradient_norm"))]
    last = "no step before was finite"
    if logged:
        row = logged[-1]
        last = f"the last finite ones, logged at step {row['step']}, are {row['loss']:g} and {row['gradient_norm']:g}"
    before = [saved for saved in saved_steps(run.checkpoints) if saved <= step - in_a_row]
    kept = f"the checkpoint of step {before[-1]} is the last from before" if before else "no checkpoint is from before"
    times = f"{options.max_rollbacks} rollback{'' if options.max_rollbacks == 1 else 's'}"
    other = " or precision=bf16" if precision == "fp16" else " or precision=fp32" if precision == "bf16" else ""
    return NonFinite(
        f"loss or gradient norm was not finite for {in_a_row} steps in a row from step {step - in_a_row + 1}, after {times}; "
        f"{last}; {kept}: mend the pictures if the same ones come back in {run.nonfinite}, else try a lower "
        f"optim.learning_rate{other} with another --output, or a larger recovery.max_rollbacks to go on here"
    )
