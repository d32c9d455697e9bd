"""The linear probe of the small-data protocol: features once, then a linear classifier by Adam.

Source: htdt/self-supervised eval/sgd.py. Adam, rate 1e-2 falling exponentially to 1e-6 over 500 epochs, weight decay
5e-6, batches of 1000; features as they come, un-augmented and unnormalised. The last epoch counts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline import config
from ssl_pipeline.data.randomness import Purpose, generator
from ssl_pipeline.evaluation.features import Features
from ssl_pipeline.evaluation.knn import accuracy


class Recipe(config.Options):
    """The probe's recipe."""

    epochs: int = Field(500, gt=1)
    first_rate: float = Field(1e-2, gt=0)
    last_rate: float = Field(1e-6, gt=0)
    weight_decay: float = Field(5e-6, ge=0)
    batch_size: int = Field(1000, gt=0)
    """At most; all samples where there are fewer. Nothing is dropped."""
    seed: int = Field(0, ge=0)


def evaluate(recipe: Recipe, train: Features, test: Features) -> dict[str, Any]:
    """Top-1 and top-5, in percent, on `test` of a classifier trained on `train`. Every rank trains the same one."""
    train, test = train.gathered(), test.gathered()
    classifier = fit(recipe, train.values, train.labels, max(train.classes, test.classes))
    with torch.no_grad():
        ranking = classifier(test.values).sort(dim=1, descending=True, stable=True).indices
    return {f"linear_top{n}": accuracy(ranking, test.labels, n) for n in (1, 5)}


def fit(recipe: Recipe, train: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """A linear classifier of features (N, D), a function of the features and the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        classifier = nn.Linear(train.shape[1], classes)
    optimizer = torch.optim.Adam(
        classifier.parameters(), recipe.first_rate, weight_decay=recipe.weight_decay, fused=True
    )
    decay = (recipe.last_rate / recipe.first_rate) ** (1 / recipe.epochs)
    for epoch in range(recipe.epochs):
        optimizer.param_groups[0]["lr"] = recipe.first_rate * decay**epoch
        order = torch.from_numpy(generator(recipe.seed, Purpose.PROBE, epoch).permutation(len(train)))
        for rows in order.split(min(recipe.batch_size, len(train))):
            loss = F.cross_entropy(classifier(train[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return classifier
