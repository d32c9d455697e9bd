"""Nearest neighbours: the paper's Euclidean majority vote, and the weighted cosine vote of Wu et al. 2018."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ssl_pipeline import config
from ssl_pipeline.evaluation.features import Options as FeatureOptions
from ssl_pipeline.evaluation.features import extract
from ssl_pipeline.exits import BadInput

SPARE = 32
"""Candidates beyond k whose distances are computed again without cancellation, so that ties are seen exactly."""


class Options(config.Options):
    """Which votes to count."""

    features: FeatureOptions
    k: int = Field(5, gt=0)
    """Neighbours of the majority vote; 5 in the paper."""
    cosine_k: list[int] = [10, 20, 100, 200]
    """Neighbours of the weighted vote."""
    temperature: float = Field(0.07, gt=0)
    """Of the weighted vote."""


def run(options: Options) -> dict[str, float]:
    """top-1 and top-5 in percent of each vote; train is searched, val is classified."""
    train, train_labels = extract(options.features, "train")
    test, test_labels = extract(options.features, "val")
    return evaluate(train, train_labels, test, test_labels, options.k, options.cosine_k, options.temperature)


def evaluate(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    k: int = 5,
    cosine_k: list[int] | None = None,
    temperature: float = 0.07,
) -> dict[str, float]:
    """The same from features (N, D) and (M, D)."""
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    if k > len(train):
        raise BadInput(f"{k} neighbours are asked of {len(train)} training pictures: give a smaller k")
    neighbours = euclidean_neighbours(test, train, k)
    ranking = majority_vote(train_labels[neighbours], classes)
    result = {f"knn{k}_top{n}": accuracy(ranking, test_labels, n) for n in (1, 5)}
    for kc in cosine_k or []:
        if kc > len(train):
            continue
        ranking = cosine_vote(test, train, train_labels, kc, temperature, classes)
        result |= {f"cosine{kc}_top{n}": accuracy(ranking, test_labels, n) for n in (1, 5)}
    return result


def euclidean_neighbours(test: Tensor, train: Tensor, k: int, chunk: int = 1024) -> Tensor:
    """Places in `train` (N, D) of the k nearest of each row of `test` (M, D), nearest first: (M, k).

    Exact in float64. Of equally distant rows the one of lower place comes first.
    """
    test, train = test.double(), train.double()
    squares = train.square().sum(dim=1)
    found = []
    for rows in test.split(chunk):
        distances = squares - 2 * rows @ train.T  # less |row|^2, which does not change the order
        near = distances.topk(min(k + SPARE, len(train)), largest=False).indices.sort(dim=1).values
        exact = torch.stack([(train[places] - row).square().sum(dim=1) for row, places in zip(rows, near, strict=True)])
        order = exact.sort(dim=1, stable=True).indices[:, :k]
        found.append(near.gather(1, order))
    return torch.cat(found)


def majority_vote(labels: Tensor, classes: int) -> Tensor:
    """Classes by their number of votes, most first, the smaller label first on a tie: (M, k) -> (M, classes).

    Source of the rule: htdt/self-supervised eval/knn.py.
    """
    votes = F.one_hot(labels, classes).sum(dim=1)
    return votes.sort(dim=1, descending=True, stable=True).indices


def cosine_vote(
    test: Tensor, train: Tensor, train_labels: Tensor, k: int, temperature: float, classes: int, chunk: int = 1024
) -> Tensor:
    """Classes by the sum of exp(cosine / temperature) over the k most similar rows: (M, classes).

    Wu et al. 2018 (arXiv 1805.01978), section 3.4.
    """
    train = F.normalize(train, dim=1)
    rankings = []
    for rows in test.split(chunk):
        similarity, places = (F.normalize(rows, dim=1) @ train.T).topk(k, dim=1)
        votes = torch.zeros(len(rows), classes, dtype=torch.float64)
        votes.scatter_add_(1, train_labels[places], (similarity.double() / temperature).exp())
        rankings.append(votes.sort(dim=1, descending=True, stable=True).indices)
    return torch.cat(rankings)


def accuracy(ranking: Tensor, labels: Tensor, top: int) -> float:
    """Percent of rows whose label is among the first `top` of its ranking (M, classes)."""
    return 100 * (ranking[:, :top] == labels[:, None]).any(dim=1).double().mean().item()
