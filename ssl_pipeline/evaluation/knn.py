"""Nearest neighbours: the paper's Euclidean majority vote, and the weighted cosine vote of Wu et al. 2018.

Each rank searches its own share of train; features stay on the host and go to the rank's device chunk by chunk. The
neighbours are exact: their order is that of (squared distance from differences in float64, id), to the last bit the same
whatever the chunks, the number of ranks or the device. No matrix of all distances and no second copy of train is held.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from ssl_pipeline import config, distributed
from ssl_pipeline.evaluation.features import Features, extract_each
from ssl_pipeline.evaluation.features import Options as FeatureOptions
from ssl_pipeline.exits import BadInput

SPARE = 32
"""Candidates beyond k whose distances are computed again from differences."""

PAIRS = 256
"""Pairs of rows at a time whose differences are taken: few, so that they stay in the cache."""

NOT_FINITE = "some features are not finite numbers: the backbone has diverged; evaluate an earlier checkpoint"


class Options(config.Options):
    """Which votes to count."""

    features: FeatureOptions
    k: int = Field(5, gt=0)
    """Neighbours of the majority vote; 5 in the paper."""
    cosine_k: list[PositiveInt] = [10, 20, 100, 200]
    """Neighbours of the weighted vote."""
    temperature: float = Field(0.07, gt=0)
    """Of the weighted vote."""


def run(options: Options) -> dict[str, float]:
    """Top-1 and top-5, in percent, of each vote; train is searched, val is classified. All ranks must call it."""
    train, test = extract_each(options.features)
    return evaluate(train, test, options.k, options.cosine_k, options.temperature)


def evaluate(
    train: Features, test: Features, k: int = 5, cosine_k: list[int] | None = None, temperature: float = 0.07
) -> dict[str, float]:
    """The same from each rank's shares of the features; the same on all ranks.

    Raises BadInput where there are fewer than k training pictures (a greater `cosine_k` is left out), and for features
    that are not finite.
    """
    pictures = int(distributed.gather_values(torch.tensor(len(train.values))).sum())
    if k > pictures:
        raise BadInput(f"{k} neighbours are asked of {pictures} training pictures: give a smaller k")
    test, classes = test.gathered(), max(train.classes, test.classes)
    labels = nearest(test.values, train, k).labels
    result = _accuracies(f"knn{k}", lambda rows: majority_vote(labels[rows], classes), test.labels)
    possible = [kc for kc in cosine_k or [] if kc <= pictures]
    if possible:
        near = nearest(test.values, train, max(possible), cosine=True)
        votes = partial(_cosine_votes, near, temperature, classes)
        for kc in possible:
            result |= _accuracies(f"cosine{kc}", partial(votes, kc), test.labels)
    return result


# -------------------------------------------------------------------------------------------------------------- search
class Neighbours(NamedTuple):
    """The k nearest rows of train of each of M rows, ascending by (distance, id)."""

    distances: Tensor
    """(M, k) float64, squared."""
    ids: Tensor
    """(M, k) int64."""
    labels: Tensor
    """(M, k) int64."""


def nearest(
    test: Tensor, train: Features, k: int, cosine: bool = False, test_rows: int = 8192, train_rows: int = 1024
) -> Neighbours:
    """The k rows of all ranks' `train` nearest to each row of `test` (M, D), the same on all ranks.

    k is at most the number of rows of all ranks. With `cosine` these are neighbours by the angle: all rows are brought
    to length 1, so that cosine = 1 - distance / 2; that of a row of zeros is 0, but for rounding. `test_rows` and
    `train_rows` are worked on at a time, and do not matter to the result. All ranks must call it with the same `test`.
    Raises BadInput, on all ranks alike, for features that are not finite.
    """
    points = partial(_points, device=distributed.start().device, cosine=cosine)
    found = [
        _merge(distributed.together(partial(_search, rows, train, k, points, train_rows)), k)
        for rows in test.split(test_rows)
    ]
    return Neighbours(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _search(rows: Tensor, train: Features, k: int, points: Callable[..., Tensor], chunk: int) -> Neighbours:
    """The k nearest, or all if fewer, among this rank's share of train, on the host."""
    count = len(train.values)
    k, kept = min(k, count), min(k + SPARE, count)
    test = points(rows, axis=0)
    lower_bounds = _LowerBounds(test)
    bounds = test.new_empty(len(test), 0)
    places = bounds.long()
    for start in range(0, count, chunk):
        here = lower_bounds(points(train.values[start : start + chunk]))
        here, columns = here.topk(min(kept, here.shape[1]), largest=False)
        bounds, places = torch.cat([bounds, here], dim=1), torch.cat([places, columns + start], dim=1)
        bounds, order = bounds.topk(min(kept, bounds.shape[1]), largest=False)
        places = places.gather(1, order)
    places = places.sort(dim=1).values  # the stable sort below then leaves equal distances in the order of the ids
    of = torch.arange(len(test), device=test.device).repeat_interleave(kept)
    distances = _distances(test, of, train.values, places.flatten().cpu(), points).reshape(len(test), kept)
    distances, order = distances.sort(dim=1, stable=True)
    distances, places = distances[:, :k], places.gather(1, order)[:, :k]
    if kept < count:
        # A row that was not kept lies at least as far as the greatest kept bound. Where that is no farther than the k-th
        # neighbour found, it might belong among them: ties beyond SPARE, as of a collapsed backbone.
        unsettled = (bounds.amax(dim=1) <= distances[:, -1]).nonzero().flatten()
        if len(unsettled):
            distances[unsettled], places[unsettled] = _search_ties(
                test[unsettled], train.values, distances[unsettled], points, chunk
            )
    places = places.cpu()
    return Neighbours(distances.cpu(), train.ids[places], train.labels[places])


def _search_ties(
    test: Tensor, train: Tensor, found: Tensor, points: Callable[..., Tensor], chunk: int
) -> tuple[Tensor, Tensor]:
    """Distances and places (m, k) of the nearest of all rows of `train`, given distances (m, k) of k rows of it.

    Differences are taken to every row whose lower bound does not rule it out, and once for equal rows of a chunk.
    """
    k, limit = found.shape[1], found[:, -1:]
    lower_bounds = _LowerBounds(test)
    distances = test.new_empty(len(test), 0)
    places = distances.long()
    for start in range(0, len(train), chunk):
        rows, copies = torch.unique(train[start : start + chunk], dim=0, return_inverse=True)
        bounds = lower_bounds(points(rows))
        of, column = (bounds <= limit).nonzero(as_tuple=True)
        here = torch.full_like(bounds, torch.inf)
        here[of, column] = _distances(test, of, rows, column.cpu(), points)
        columns = torch.arange(start, start + len(copies), device=test.device).expand(len(test), -1)
        distances = torch.cat([distances, here[:, copies.to(test.device)]], dim=1)
        distances, order = distances.sort(dim=1, stable=True)
        places = torch.cat([places, columns], dim=1).gather(1, order)[:, :k]
        distances = distances[:, :k]
    return distances, places


def _merge(share: Neighbours, k: int) -> Neighbours:
    """The first k by (distance, id) of all ranks' neighbours; a rank may have fewer. All ranks must call it."""
    missing = k - share.distances.shape[1]
    padded = (F.pad(part, (0, missing), value=value) for part, value in zip(share, (torch.inf, 0, 0), strict=True))
    whole = Neighbours(*(torch.cat(list(distributed.gather_values(part)), dim=1) for part in padded))
    order = whole.ids.argsort(dim=1)
    order = order.gather(1, whole.distances.gather(1, order).argsort(dim=1, stable=True))[:, :k]
    return Neighbours(*(part.gather(1, order) for part in whole))


# ------------------------------------------------------------------------------------------------------------ distances
def _points(rows: Tensor, device: torch.device, cosine: bool, axis: int = 1) -> Tensor:
    """Features (n, D) float32 on the host as points, float64 on `device`; of length 1, (n, D + 2), for the cosine.

    The cosine of a row of zeros is 0 with every row: zeros in test lie on an axis of their own (0), those in train on
    another (1).
    """
    points = rows.to(device).double()
    if not points.isfinite().all():
        raise BadInput(NOT_FINITE)
    if not cosine:
        return points
    norms = _sum(points.square()).sqrt()
    axes = points.new_zeros(len(points), 2)
    axes[:, axis] = (norms == 0).double()
    return torch.cat([points / norms.where(norms > 0, 1)[:, None], axes], dim=1)


def _sum(terms: Tensor) -> Tensor:
    """Sums of the rows of (n, D), halves added to halves: to the last bit the same on any device, whatever n.

    torch's own order of summation follows the shape and the number of threads.
    """
    while terms.shape[1] > 1:
        if terms.shape[1] % 2:
            terms = F.pad(terms, (0, 1))
        left, right = terms.chunk(2, dim=1)
        terms = left + right
    return terms[:, 0]


def _distances(
    test: Tensor, of: Tensor, train: Tensor, places: Tensor, points: Callable[..., Tensor], pairs: int = PAIRS
) -> Tensor:
    """Squared distances (P,) of the pairs test[of], train[places], from differences; `train` are features."""
    parts = zip(of.split(pairs), places.split(pairs), strict=True)
    return torch.cat([_sum((test[i] - points(train[j])).square()) for i, j in parts])


class _LowerBounds:
    """Numbers (m, n) none of which exceeds what `_distances` gives for points (m, D) and (n, D), by one matrix product.

    With a and b the points less a centre, which leaves distances as they are and brings their bounds much closer:
    (1 - e) (|a|^2 + |b|^2) - 2 ab, where e outweighs all rounding. Let u = 2^-53, S = |a|^2 + |b|^2, and d the squared
    distance. To first order in u and whatever the order of summation (Higham, Accuracy and Stability of Numerical
    Algorithms, section 3.1; sum |a_i b_i| <= S / 2), rounding changes by at most

        D u S           the two squares
        D u S           2 ab
        8 u S           1 - e, the products with it, and the two additions
        4 u S           d, when the centre is taken off both points
        (L + 3) u d     `_distances`: a difference, its square, L = ceil(log2 D) additions; d <= 2 S

    together (2 D + 2 L + 18) u S < e S with e = 4 (D + 16) u: more than 40 u S remain for the terms of higher order.
    """

    def __init__(self, test: Tensor) -> None:
        self.centre = test.mean(dim=0).float().double()  # in float32, the very row where all features are equal
        self.test = test - self.centre
        self.share = 1 - 4 * (test.shape[1] + 16) * 2.0**-53
        self.squares = self.share * self.test.square().sum(dim=1, keepdim=True)

    def __call__(self, train: Tensor) -> Tensor:
        train = train - self.centre
        squares = self.share * train.square().sum(dim=1)
        return (self.test @ train.mul_(-2).T).add_(self.squares).add_(squares)


# --------------------------------------------------------------------------------------------------------------- votes
def majority_vote(labels: Tensor, classes: int) -> Tensor:
    """Classes by their number of votes, most first, the smaller label first on a tie: (M, k) -> (M, classes).

    Source of the rule: htdt/self-supervised eval/knn.py.
    """
    return _ranking(labels, torch.ones_like(labels), classes)


def cosine_vote(labels: Tensor, similarity: Tensor, temperature: float, classes: int) -> Tensor:
    """Classes by the sum of exp(cosine / temperature) over the neighbours, most similar first: (M, k) -> (M, classes).

    Wu et al. 2018 (arXiv 1805.01978), section 3.4. The smaller label comes first on a tie.
    """
    # Relative to the nearest one, which changes no order: exp(1 / temperature) would overflow below 1/709.
    return _ranking(labels, ((similarity - similarity[:, :1]) / temperature).exp(), classes)


def accuracy(ranking: Tensor, labels: Tensor, top: int) -> float:
    """Percent of rows whose label is among the first `top` of its ranking (M, classes)."""
    return 100 * (ranking[:, :top] == labels[:, None]).any(dim=1).double().mean().item()


def _ranking(labels: Tensor, weights: Tensor, classes: int) -> Tensor:
    votes = weights.new_zeros(len(labels), classes).scatter_add_(1, labels, weights)
    return votes.sort(dim=1, descending=True, stable=True).indices


def _cosine_votes(near: Neighbours, temperature: float, classes: int, k: int, rows: Tensor) -> Tensor:
    return cosine_vote(near.labels[rows, :k], 1 - near.distances[rows, :k] / 2, temperature, classes)


def _accuracies(name: str, vote: Callable[[Tensor], Tensor], labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 of the rankings that `vote` gives for some of the rows at a time."""
    ranking = torch.cat([vote(rows)[:, :5] for rows in torch.arange(len(labels)).split(1024)])
    return {f"{name}_top{n}": accuracy(ranking, labels, n) for n in (1, 5)}
