"""The linear probe of the small-data protocol: features once, then a linear classifier by Adam.

Source: htdt/self-supervised eval/sgd.py. Adam, rate 1e-2 falling exponentially to 1e-6 over 500 epochs, weight decay
5e-6, batches of 1000; features as they come, un-augmented and unnormalised. The last epoch counts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline import config
from ssl_pipeline.data.randomness import Purpose, generator
from ssl_pipeline.evaluation.features import Options as FeatureOptions
from ssl_pipeline.evaluation.features import extract
from ssl_pipeline.evaluation.knn import accuracy


class Options(config.Options):
    """The probe's recipe."""

    features: FeatureOptions
    epochs: int = Field(500, gt=1)
    first_rate: float = Field(1e-2, gt=0)
    last_rate: float = Field(1e-6, gt=0)
    weight_decay: float = Field(5e-6, ge=0)
    batch_size: int = Field(1000, gt=0)
    """At most; all samples where there are fewer. Nothing is dropped."""
    seed: int = Field(0, ge=0)


def run(options: Options) -> dict[str, float]:
    """top-1 and top-5 in percent on val of a classifier trained on train."""
    train, train_labels = extract(options.features, "train")
    test, test_labels = extract(options.features, "val")
    return evaluate(options, train, train_labels, test, test_labels)


def evaluate(
    options: Options, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor
) -> dict[str, float]:
    """The same from features (N, D) and (M, D)."""
    classifier = fit(options, train, train_labels, int(torch.cat([train_labels, test_labels]).max()) + 1)
    with torch.no_grad():
        ranking = classifier(test).sort(dim=1, descending=True, stable=True).indices
    return {f"linear_top{n}": accuracy(ranking, test_labels, n) for n in (1, 5)}


def fit(options: Options, train: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """A linear classifier of features (N, D), a function of the features and the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        classifier = nn.Linear(train.shape[1], classes)
    optimizer = torch.optim.Adam(
        classifier.parameters(), options.first_rate, weight_decay=options.weight_decay, fused=True
    )
    decay = (options.last_rate / options.first_rate) ** (1 / options.epochs)
    for epoch in range(options.epochs):
        optimizer.param_groups[0]["lr"] = options.first_rate * decay**epoch
        order = torch.from_numpy(generator(options.seed, Purpose.PROBE, epoch).permutation(len(train)))
        for rows in order.split(min(options.batch_size, len(train))):
            loss = F.cross_entropy(classifier(train[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return classifier
