from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from ssl_pipeline import backbone, config
from ssl_pipeline.data.augment import ViewSpec
from ssl_pipeline.evaluation import features, linear

VIEW = config.validate(ViewSpec, {"size": 32, "ops": [{"op": "normalize"}]})
SOURCE = features.Options(weights=None, backbone=backbone.Options(name="resnet18"), root=Path(), view=VIEW)


def pixels() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    mixed = np.random.default_rng(0).permutation(len(data.target))  # the last digits are other writers'
    return torch.from_numpy(data.data[mixed] / 16).float(), torch.from_numpy(data.target[mixed])


def test_the_probe_is_as_good_as_logistic_regression_on_pixels() -> None:
    x, y = pixels()
    options = linear.Options(features=SOURCE)
    found = linear.evaluate(options, x[:1400], y[:1400], x[1400:], y[1400:])
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
    options = linear.Options(features=SOURCE, epochs=5)
    linear.fit(options, x[:1400], y[:1400], 10)
    assert sizes == [1000, 400] * 5  # nothing is dropped
    assert rates[0] == 1e-2
    assert rates[-1] == pytest.approx(1e-2 * (1e-6 / 1e-2) ** (4 / 5))
    before = torch.get_rng_state()
    a, b = linear.fit(options, x[:10], y[:10], 10), linear.fit(options, x[:10], y[:10], 10)
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(a.weight, linear.fit(options.model_copy(update={"seed": 1}), x[:10], y[:10], 10).weight)
