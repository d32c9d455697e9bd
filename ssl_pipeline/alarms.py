"""Alarms: logged values that tell of a run that learns nothing, against thresholds; a warning with the likely cause."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from ssl_pipeline import config, distributed
from ssl_pipeline.exits import NonFinite
from ssl_pipeline.sparse_head import LEAST_WEIGHT, MOST_WEIGHT

log = logging.getLogger("ssl_pipeline")


class Options(config.Options):
    """Thresholds on the values of metrics.jsonl, means over the steps between two logged ones. null: no such alarm."""

    embedding_std_below: float | None = Field(0.01, gt=0)
    """Of a collapse to a point; 1 is a spread over the whole sphere."""
    embedding_rank_below: float | None = Field(1.1, gt=0)
    """Of a collapse to a line; the number of dimensions that a rank's batch fills."""
    loss_above: float | None = None
    loss_rise: float | None = Field(2.0, gt=0)
    """By how much the loss may be above the first one logged, as a multiple of that one's size, or of 1 if that is larger."""
    gradient_norm_above: float | None = Field(1e6, gt=0)
    loss_over_ln_k_above: float | None = Field(0.995, gt=0)
    """Of SwAV; 1 where all prototypes are alike to it."""
    cholesky_failed_above: float | None = Field(0.1, ge=0)
    """Of W-MSE: slices a step whose covariance could not be inverted."""
    inactive_groups_above: float | None = Field(0.999, gt=0, le=1)
    """Share of the head's groups without weight worth the name; 1 where the head is dead."""
    adaptive_weight_at_bound: bool = True
    """Whether an adaptive SparseHead weight that came to the end of its range is told of."""
    patience: int = Field(3, gt=0)
    """Logged steps in a row for which a threshold must be passed."""
    stop: bool = False
    """Whether an alarm ends the run, with a checkpoint and status 76."""


@dataclass(frozen=True)
class Rule:
    """One alarm."""

    option: str
    key: str
    """Of metrics.jsonl."""
    sign: int
    """1: above the threshold, -1: below it."""
    epochs: int
    """Epochs at the start in which it is ordinary."""
    cause: str
    only: str | None = None
    """The method, or the feature, that it is of; None: of all."""


RULES = (
    Rule("embedding_std_below", "embedding_std", -1, 1, "the embeddings collapse to a point: {collapse}"),
    Rule("embedding_rank_below", "embedding_rank", -1, 1, "the embeddings collapse to a line: {collapse}"),
    Rule("loss_above", "loss", 1, 0, "the run diverges: try a lower optim.learning_rate or more optim.warmup_epochs"),
    Rule("loss_rise", "loss", 1, 0, "the run diverges: try a lower optim.learning_rate or more optim.warmup_epochs"),
    Rule("gradient_norm_above", "gradient_norm", 1, 0,
         "the gradient explodes: try a lower optim.learning_rate, more optim.warmup_epochs, or precision=fp32 to see whether "
         "it is rounding"),
    Rule("loss_over_ln_k_above", "loss_over_ln_k", 1, 10,
         "the prototypes are all alike to every picture: try method.epsilon=0.03, a larger "
         "method.freeze_prototypes_steps, or a lower optim.learning_rate", "swav"),
    Rule("cholesky_failed_above", "cholesky_failed", 1, 1,
         "the embeddings of a slice do not span its dimensions: try a larger method.w_size, a smaller head.output, or "
         "method.epsilon above 0", "w_mse"),
    Rule("inactive_groups_above", "head_groups_inactive", 1, 0,
         "hardly a group of the head has any weight left: try a lower head.sparse.weight, or head.sparse.schedule=adaptive"),
    Rule("least_weight", "sparse_weight", -1, 0,
         "it cannot fall further and the head is sparser than head.sparse.target: try a lower target", "adaptive"),
    Rule("most_weight", "sparse_weight", 1, 0,
         "it cannot rise further and the head is less sparse than head.sparse.target: try "
         "head.sparse.mode=scale_invariant, or a higher target", "adaptive"),
)  # fmt: skip

COLLAPSE = {
    "simclr": "try a higher method.temperature or a lower optim.learning_rate",
    "byol": "try a method.momentum nearer to 1, batch norm in the head (head.kind=mlp), or a lower optim.learning_rate",
    "barlow_twins": "try a lower optim.learning_rate or a smaller method.off_diagonal_weight",
    "simsiam": "it needs the predictor, a batch norm at the head's end (head.output_norm=plain) and no gradient through the "
    "targets; where it has all, try a lower optim.learning_rate or method.predictor_rate=constant",
    "vicreg": "try a higher method.variance_weight or a lower optim.learning_rate",
    "w_mse": "try a larger method.w_size or a lower optim.learning_rate",
    "ssl_hsic": "try a method.momentum nearer to 1 or a lower method.regularization",
    "swav": "try a lower method.epsilon or a lower optim.learning_rate",
}
"""What to try where the embeddings of a method collapse."""


class Alarms:
    """Looks at each logged step, and counts for how long a rule has held; the same on all ranks.

    Args:
        options: thresholds.
        method: the method's name.
        adaptive: whether SparseHead's weight is.
    """

    def __init__(self, options: Options, method: str, adaptive: bool) -> None:
        self.options = options
        self.method = method
        bounds = {"least_weight": 1.001 * LEAST_WEIGHT, "most_weight": 0.999 * MOST_WEIGHT}
        given = options.model_dump() | (bounds if options.adaptive_weight_at_bound else {})
        there = {None, method} | ({"adaptive"} if adaptive else set())
        self.rules = {
            rule: float(given[rule.option])
            for rule in RULES
            if rule.only in there and given.get(rule.option) is not None
        }
        self.first_loss: float | None = None
        self._held: dict[str, list[int]] = {}
        """Of a rule that holds, by its option: logged steps in a row, and the first of them."""

    def state_dict(self) -> dict[str, Any]:
        """What goes on in the next job."""
        return {"first_loss": self.first_loss, "held": dict(self._held)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        first = state.get("first_loss")
        self.first_loss = None if first is None else float(first)
        self._held = {option: [int(held), int(since)] for option, (held, since) in state.get("held", {}).items()}

    def look(self, step: int, epoch: int, values: Mapping[str, float | None]) -> NonFinite | None:
        """Warn of what has held for `patience` logged steps, again after twice, four times as many, and of its end.

        `values` are those logged at `step`. Returns, in the place of the warning, what to end the run with where an alarm
        shall.
        """
        if self.first_loss is None:
            self.first_loss = values.get("loss")
        stops = []
        for rule, given in self.rules.items():
            value = values.get(rule.key)
            if value is None or epoch < rule.epochs:
                continue
            threshold = self._threshold(rule, given)
            if (value - threshold) * rule.sign <= 0:
                held, _ = self._held.pop(rule.option, (0, 0))
                if held >= self.options.patience:
                    log.info("%s is %.4g again at step %d", rule.key, value, step)
                continue
            held, since = self._held.get(rule.option, (0, step))
            self._held[rule.option] = [held + 1, since]
            times = (held + 1) // self.options.patience
            if (held + 1) % self.options.patience or times & (times - 1):
                continue
            side = "above" if rule.sign > 0 else "below"
            cause = rule.cause.format(collapse=COLLAPSE.get(self.method, "try a lower optim.learning_rate"))
            seen = f"{rule.key} is {value:.4g}, {side} {threshold:.4g} since step {since}: {cause}"
            if self.options.stop:
                stops.append(seen)
            elif distributed.rank() == 0:
                log.warning("%s", seen)
        if not stops:
            return None
        return NonFinite(
            f"{'; '.join(stops)}; ended by alarms.stop: begin anew with that and another --output, or go on as it is with "
            "alarms.stop=false"
        )

    def _threshold(self, rule: Rule, given: float) -> float:
        if rule.option != "loss_rise":
            return given
        first = self.first_loss or 0.0
        return first + given * max(abs(first), 1.0)
