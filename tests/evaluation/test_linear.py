import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from ssl_pipeline import distributed
from ssl_pipeline.data.randomness import Purpose, generator
from ssl_pipeline.evaluation import linear
from ssl_pipeline.evaluation.features import Features
from tests.ranks import on_ranks


def pixels() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    mixed = np.random.default_rng(0).permutation(len(data.target))  # the last digits are other writers'
    return torch.from_numpy(data.data[mixed] / 16).float(), torch.from_numpy(data.target[mixed])


def of(values: torch.Tensor, labels: torch.Tensor) -> Features:
    return Features(values, labels, torch.arange(len(labels)), 10)


def test_the_probe_is_a_plain_torch_loop() -> None:
    x, y = pixels()
    ours = linear.fit(linear.Recipe(epochs=3, batch_size=500, seed=4), x, y, 10)
    torch.manual_seed(4)
    theirs = torch.nn.Linear(64, 10)
    optimizer = torch.optim.Adam(theirs.parameters(), 1e-2, weight_decay=5e-6)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, (1e-6 / 1e-2) ** (1 / 3))
    for epoch in range(3):
        order = generator(4, Purpose.PROBE, epoch).permutation(len(x))
        for start in range(0, len(x), 500):
            rows = order[start : start + 500]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(theirs(x[rows]), y[rows]).backward()
            optimizer.step()
        schedule.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-6)


def on_this_rank() -> torch.Tensor:
    x, y = pixels()
    places = torch.arange(400)[distributed.rank() :: distributed.world_size()]
    train, test = Features(x[places], y[places], places, 10), of(x[1400:], y[1400:])
    test = Features(
        *(part[distributed.rank() :: distributed.world_size()] for part in (test.values, test.labels, test.ids)), 10
    )
    return torch.tensor(list(linear.evaluate(linear.Recipe(epochs=5), train, test).values()), dtype=torch.float64)


def test_two_ranks_are_one() -> None:
    two = on_ranks(2, on_this_rank)
    assert torch.equal(two[0], two[1])
    torch.testing.assert_close(two[0], on_this_rank(), rtol=0, atol=0.3)


def test_the_probe_is_as_good_as_logistic_regression_on_pixels() -> None:
    x, y = pixels()
    found = linear.evaluate(linear.Recipe(), of(x[:1400], y[:1400]), of(x[1400:], y[1400:]))
    theirs = LogisticRegression(C=100, max_iter=2000).fit(x[:1400], y[:1400]).score(x[1400:], y[1400:]) * 100
    assert abs(found["linear_top1"] - theirs) < 2.5
    assert found["linear_top5"] > found["linear_top1"]


def test_rates_batches_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = pixels()
    rates, sizes = [], []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1]
    )
    loss = torch.nn.functional.cross_entropy
    monkeypatch.setattr(linear.F, "cross_entropy", lambda a, b: (sizes.append(len(a)), loss(a, b))[1])
    options = linear.Recipe(epochs=5)
    linear.fit(options, x[:1400], y[:1400], 10)
    assert sizes == [1000, 400] * 5  # nothing is dropped
    assert rates[0] == 1e-2
    assert rates[-1] == pytest.approx(1e-2 * (1e-6 / 1e-2) ** (4 / 5))
    before = torch.get_rng_state()
    a, b = linear.fit(options, x[:10], y[:10], 10), linear.fit(options, x[:10], y[:10], 10)
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(a.weight, linear.fit(options.model_copy(update={"seed": 1}), x[:10], y[:10], 10).weight)
