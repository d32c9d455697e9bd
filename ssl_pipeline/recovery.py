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
from ssl_pipeline.run_folder import RunFolder, read_lines, saved_steps

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


def tell(skipped: Sequence[Skipped], data: Loader, path: Path, half: bool) -> None:
    """Append each skipped step with the pictures of its batch to `path`, and say so in one sentence. On the main rank.

    A row: step (counted from 1), epoch, rollbacks before it, loss and gradient_norm (a string where not finite), ids of the
    global batch before replacement of unreadable ones, and files. Where `half`, fp16's loss scale may have been too
    large for a finite loss: that is ordinary, and has no files.
    """
    if not skipped:
        return
    overflows = [one for one in skipped if half and math.isfinite(one.values["loss"])]
    rows = []
    for one in skipped[:MOST_STEPS]:
        epoch, place = divmod(one.step - 1, len(data))
        ids = data.batch_ids(epoch, place).tolist()
        numbers = {name: value if math.isfinite(value) else str(value) for name, value in one.values.items()}
        why = {"overflow": "fp16"} if one in overflows else {"files": [data.index.name(sample) for sample in ids]}
        rows.append({"step": one.step, "epoch": epoch, "rollbacks": data.rollbacks, **numbers, "ids": ids, **why})
    try:
        full = path.is_file() and path.stat().st_size > MOST_BYTES
        with path.open("a", encoding="utf-8") as file:
            file.write("" if full else "".join(json.dumps(row) + "\n" for row in rows))
        where = f"{path} is full, no more are listed there" if full else f"the pictures of each batch are in {path}"
    except OSError as error:  # a diary: no run ends for it
        where = f"cannot write to {path}: {error}"
    if overflows:
        log.info(
            "%s skipped while the loss scale of fp16 fell: ordinary at the start of a run and now and then",
            _steps([one.step for one in overflows]),
        )
    if bad := [one for one in skipped if one not in overflows]:
        told = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in bad[-1].values.items())
        log.warning("%s skipped, nothing was changed by them: %s; %s", _steps([one.step for one in bad]), told, where)


def _steps(steps: list[int]) -> str:
    if len(steps) == 1:
        return f"step {steps[0]} was"
    dense = steps[-1] - steps[0] == len(steps) - 1
    return f"{len(steps)} steps{'' if dense else ' of those'} from {steps[0]} to {steps[-1]} were"


def gave_up(options: Options, run: RunFolder, step: int, in_a_row: int, precision: str) -> NonFinite:
    """The end after `max_rollbacks`, where the last `in_a_row` of `step` steps were skipped: what was seen, and a way out."""
    logged = [row for row in read_lines(run.metrics) if row.get("loss") is not None and "gradient_norm" in row]
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
        f"{last}; the batches' pictures are listed in {run.nonfinite}; {kept}: look at the pictures "
        f"if the same ones come back there, else try a lower optim.learning_rate{other} with another --output"
    )
