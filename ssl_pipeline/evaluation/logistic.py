"""Multinomial logistic regression on frozen features by L-BFGS: the linear probe's protocol for transfer.

The objective is scikit-learn's LogisticRegression(C) on three classes and more: C * sum of cross-entropies + |W|^2 / 2,
the bias free, features as they come. C is chosen on a part of train, as Kornblith et al. 2019 (arXiv 1805.08974) and CLIP
(arXiv 2103.00020, A.3) do on a validation part; then all of train is fitted. Loss and gradient are taken in float64, by
each rank over its share.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from pydantic import Field, PositiveFloat
from torch import Tensor

from ssl_pipeline import config, distributed
from ssl_pipeline.data.randomness import Purpose, generator
from ssl_pipeline.evaluation.features import Features
from ssl_pipeline.evaluation.knn import NOT_FINITE
from ssl_pipeline.exits import BadInput

log = logging.getLogger("ssl_pipeline")

ROWS = 4096
"""Features that are worked on at a time."""


class Recipe(config.Options):
    """The probe's recipe."""

    c: list[PositiveFloat] = Field([1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0], min_length=1)
    """Inverse regularisations to try; with one, nothing is held out."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of each class of train, rounded, at least one picture, on which C is chosen."""
    seed: int = Field(0, ge=0)
    """Of what is held out."""
    max_iterations: int = Field(1000, gt=0)
    """Of L-BFGS, for each C."""
    tolerance: float = Field(1e-6, gt=0)
    """Greatest entry of the gradient at which L-BFGS stops, of the objective divided by C N (scikit-learn's `tol`) and
    by features of mean 0 and deviation 1."""


class Fit(NamedTuple):
    """A linear classifier."""

    weight: Tensor
    """(C, D) float64 on the host."""
    bias: Tensor
    """(C,) float64."""
    loss: float
    """The objective."""
    converged: bool
    """Whether L-BFGS came to its tolerance within its iterations."""


def evaluate(recipe: Recipe, train: Features, test: Features) -> dict[str, Any]:
    """Top-1 and top-5, in percent, on `test` of the classifier of `train`, and what C it took.

    From each rank's shares, the same on all ranks, which must all call it. Raises BadInput, on all ranks alike, where a
    class has too few pictures to hold one out, and for features that are not finite.
    """
    classes = max(train.classes, test.classes)
    c, start = recipe.c[0], None
    result: dict[str, Any] = {"chosen_on": "given"}
    if len(set(recipe.c)) > 1:
        c, start, tried = _choose(recipe, train, classes)
        result = {"chosen_on": "held-out part of train", "held_out_top1": tried}
    fitted = fit(train, c, classes, start, max_iterations=recipe.max_iterations, tolerance=recipe.tolerance)
    top1, top5 = _accuracies(fitted, test)
    return {"linear_top1": top1, "linear_top5": top5, "c": c, "converged": fitted.converged, **result}


def _choose(recipe: Recipe, train: Features, classes: int) -> tuple[float, Fit, dict[str, float]]:
    """The C that is best on what is held out, the smaller one on a tie, its classifier, and top-1 in percent of each C."""
    held = _held_out(recipe, train)
    kept, held = (~held).nonzero().flatten(), held.nonzero().flatten()
    path: dict[float, Fit] = {}
    tried: dict[float, float] = {}
    start = None
    for c in sorted(set(recipe.c)):
        start = path[c] = fit(train, c, classes, start, kept, recipe.max_iterations, recipe.tolerance)
        tried[c], _ = _accuracies(start, train, held)
    best = max(tried, key=tried.__getitem__)  # the first of equals
    names = {f"{c:g}": top1 for c, top1 in tried.items()}
    if best in (min(tried), max(tried)) and distributed.rank() == 0:
        log.warning("the best C, %g, is at an end of the grid %s: widen it there (recipe.c)", best, ", ".join(names))
    return best, path[best], names


def _held_out(recipe: Recipe, train: Features) -> Tensor:
    """Whether each row (n,) of this rank's share is held out: a function of the seed and of the labels by id alone."""
    ids = torch.cat(distributed.gather_rows(train.ids)).numpy()
    labels = torch.cat(distributed.gather_rows(train.labels)).numpy()
    chosen = []
    for label in np.unique(labels):
        own = np.sort(ids[labels == label])
        if len(own) < 2:
            raise BadInput(
                f"class {label} has a single picture in train, so none can be held out to choose C: give one C, "
                f"as recipe.c=[{recipe.c[0]:g}]"
            )
        count = min(max(1, round(recipe.held_out * len(own))), len(own) - 1)
        # 1: other streams than those of the small-data probe, which count epochs in the first number alone.
        chosen.append(generator(recipe.seed, Purpose.PROBE, int(label), 1).permutation(own)[:count])
    return torch.isin(train.ids, torch.from_numpy(np.concatenate(chosen)))


# ----------------------------------------------------------------------------------------------------------------- fit
def fit(
    train: Features,
    c: float,
    classes: int,
    start: Fit | None = None,
    rows: Tensor | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
) -> Fit:
    """The classifier that minimises the objective over all ranks' shares of `train`, or over `rows` (n,) of each.

    `start` is the classifier from which it goes on; zeros by default. All ranks must call it, and get the same. Warns
    where L-BFGS stops before its tolerance; raises BadInput for features that are not finite, and on all ranks where one
    fails.
    """
    count, mean, scale = _statistics(train, rows)
    shape = classes, len(mean)
    resident, chosen = distributed.together(lambda: _resident(train, rows, distributed.start().device))

    # L-BFGS works on the weights of features less their mean, in units of their deviation, in which it needs several
    # times fewer iterations. The bias is free and takes up the mean; the penalty stays that of the weights themselves.
    def classifier(x: Tensor) -> tuple[Tensor, Tensor]:
        weight = x[:-classes].reshape(shape) / scale
        return weight, x[-classes:] - weight @ mean

    def objective(x: Tensor) -> tuple[float, Tensor]:
        """The objective divided by C N, so that the tolerance fits any C and N, and its gradient; x (C * D + C,)."""
        weight, bias = classifier(x)
        loss, by_weight, by_bias = _cross_entropies(resident, chosen, weight, bias)
        by_weight = (by_weight - by_bias[:, None] * mean + weight / c) / scale
        value = loss / count + weight.square().sum() / (2 * c * count)
        return float(value), torch.cat([by_weight.flatten(), by_bias]) / count

    x = torch.zeros(classes * (len(mean) + 1), dtype=torch.float64)
    if start is not None:
        x = torch.cat([start.weight.flatten() * scale, start.bias + start.weight @ mean])
    x, value, converged = _minimise(objective, x, max_iterations, tolerance)
    if not converged and distributed.rank() == 0:
        log.warning(
            "L-BFGS with C = %g did not come to its tolerance %g in %d iterations: raise recipe.max_iterations or "
            "recipe.tolerance",
            c,
            tolerance,
            max_iterations,
        )
    return Fit(*classifier(x), c * count * value, converged)


def _minimise(
    objective: Callable[[Tensor], tuple[float, Tensor]], x: Tensor, max_iterations: int, tolerance: float
) -> tuple[Tensor, float, bool]:
    """The minimum of `objective`, its value, and whether it was reached. `objective` is called by all ranks together.

    The main rank alone decides where it is evaluated next: on other processors the same sums round otherwise, and
    ranks that each ran L-BFGS might stop at different iterations and wait for each other for ever. What `objective`
    raises, it raises on all ranks; where L-BFGS itself fails on the main rank, the others stop too.
    """
    message = torch.zeros(3 + len(x), dtype=torch.float64)  # whether to evaluate, value, whether converged, parameters
    if distributed.rank() != 0:
        while True:
            dist.broadcast(message, 0)
            if not message[0]:
                distributed.together(lambda: None)
                return message[3:], float(message[1]), bool(message[2])
            objective(message[3:])

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        message[0], message[3:] = 1, torch.from_numpy(x)
        dist.broadcast(message, 0)
        value, gradient = objective(message[3:])
        message[0] = 0
        return value, gradient.numpy()

    # Line search and the tolerance of the value as in scikit-learn's _logistic.py.
    limits: dict[str, float] = {"maxiter": max_iterations, "maxfun": 50 * max_iterations, "maxls": 50}
    limits |= {"gtol": tolerance, "ftol": 64 * np.finfo(float).eps}
    failure: Exception | None = None
    try:
        found = scipy.optimize.minimize(value_and_gradient, x.numpy(), method="L-BFGS-B", jac=True, options=limits)
        message[1:3] = message.new_tensor([found.fun, found.success])
        message[3:] = torch.from_numpy(found.x)
    except Exception as error:
        if message[0]:  # raised by the objective, and so on all ranks: nobody waits for a message
            raise
        failure = error

    def outcome() -> None:
        if failure is not None:
            raise failure

    dist.broadcast(message, 0)
    distributed.together(outcome)
    return message[3:], float(message[1]), bool(message[2])


def _chunks(features: Features, rows: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Values (m, D) and labels (m,), m up to ROWS, of `rows`, or of all, which are not copied."""
    for first in range(0, len(features.labels if rows is None else rows), ROWS):
        chunk = slice(first, first + ROWS)
        part = chunk if rows is None else rows[chunk]
        yield features.values[part], features.labels[part]


def _resident(features: Features, rows: Tensor | None, device: torch.device) -> tuple[Features, Tensor | None]:
    """`rows` of the features, all of them now, on the device; what was given on the host or where there is no room."""
    if device.type == "cpu":
        return features, rows
    ids = features.ids if rows is None else features.ids[rows]
    try:
        # Chunk by chunk: the host, or the file that it maps, may have no room for a second copy.
        values = torch.empty(len(ids), features.values.shape[1], dtype=features.values.dtype, device=device)
        labels = torch.empty(len(ids), dtype=features.labels.dtype, device=device)
        for number, (some, of_some) in enumerate(_chunks(features, rows)):
            place = slice(number * ROWS, number * ROWS + len(some))
            values[place], labels[place] = some, of_some
    except torch.OutOfMemoryError:
        log.info("%d features do not fit on %s: each evaluation of the objective copies them anew", len(ids), device)
        return features, rows
    return Features(values, labels, ids, features.classes), None


def _statistics(train: Features, rows: Tensor | None) -> tuple[int, Tensor, float]:
    """Over all ranks: the number of features, their mean (D,) and their deviation from it, one number for all entries."""
    sums = torch.zeros(2 + train.values.shape[1], dtype=torch.float64)
    for values, _ in _chunks(train, rows):
        x = values.double()
        sums += torch.cat([x.new_tensor([len(x), float(x.square().sum())]), x.sum(dim=0)])
    sums = distributed.all_reduce_sum(sums)
    if not sums.isfinite().all():
        raise BadInput(NOT_FINITE)
    mean = sums[2:] / sums[0]
    variance = float(sums[1] / sums[0] - mean.square().sum()) / len(mean)
    return int(sums[0]), mean, variance**0.5 if variance > 0 else 1.0


def _cross_entropies(
    train: Features, rows: Tensor | None, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over all ranks of the cross-entropies, and its gradients (C, D) and (C,), on the host.

    Raises on all ranks where one fails.
    """
    own = distributed.together(lambda: _own_cross_entropies(train, rows, weight, bias, distributed.start().device))
    total = distributed.all_reduce_sum(own).cpu()
    return total[0], total[1 : -len(bias)].reshape(weight.shape), total[-len(bias) :]


def _own_cross_entropies(
    train: Features, rows: Tensor | None, weight: Tensor, bias: Tensor, device: torch.device
) -> Tensor:
    """The same of this rank's share, one after the other (1 + C * D + C,), on the device."""
    weight, bias = weight.to(device), bias.to(device)
    loss, by_weight, by_bias = bias.new_zeros(1), torch.zeros_like(weight), torch.zeros_like(bias)
    for values, of_chunk in _chunks(train, rows):
        x, labels = values.to(device).double(), of_chunk.to(device)[:, None]
        log_p = torch.addmm(bias, x, weight.T).log_softmax(dim=1)
        loss -= log_p.gather(1, labels).sum()
        residual = log_p.exp_().scatter_add_(1, labels, -torch.ones_like(labels, dtype=log_p.dtype))
        by_weight.addmm_(residual.T, x)
        by_bias += residual.sum(dim=0)
    return torch.cat([loss, by_weight.flatten(), by_bias])


def _accuracies(classifier: Fit, features: Features, rows: Tensor | None = None) -> tuple[float, float]:
    """Top-1 and top-5, in percent, over all ranks' shares or `rows` of each; the smaller label comes first on a tie."""
    device = distributed.start().device
    weight, bias = classifier.weight.to(device), classifier.bias.to(device)
    counts = torch.zeros(4, dtype=torch.int64)  # of the first, of the first five, of all, of those that are not finite
    for values, labels in _chunks(features, rows):
        logits = torch.addmm(bias, values.to(device).double(), weight.T)
        ranking = logits.sort(dim=1, descending=True, stable=True).indices[:, :5].cpu()
        hits = ranking == labels[:, None]
        counts += torch.tensor(
            [hits[:, :1].sum(), hits.sum(), len(hits), len(hits) - logits.isfinite().all(dim=1).sum()]
        )
    top1, top5, count, not_finite = distributed.all_reduce_sum(counts).tolist()
    if not_finite:
        raise BadInput(NOT_FINITE)
    return 100 * top1 / count, 100 * top5 / count
