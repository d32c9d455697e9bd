"""What SimSiam alone has: a predictor with a rate of its own, and its own way to fail."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from ssl_pipeline import methods, optim
from ssl_pipeline.methods import simsiam
from tests.methods.test_methods import make

SIZES = ["head.hidden=256", "head.output=128", "method.predictor_hidden=32"]


def without_stop(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """SimSiam's loss with a gradient to the projections."""
    return -(F.cosine_similarity(p1, z2) + F.cosine_similarity(p2, z1)).mean() / 2


@cache
def train(steps: int, half: bool = False, stop_gradient: bool = True) -> list[dict[str, float]]:
    """What `steps` steps of SGD on noisy digits log."""
    torch.manual_seed(0)
    sgd = ["optim.name=sgd", "optim.learning_rate=0.1", "optim.weight_decay=1e-4"]
    options, method, _ = make("digits/simsiam", [*SIZES, *sgd])
    optimizer = optim.build(method.parameter_groups(), options.optim, 64)
    pictures = torch.tensor(load_digits().images, dtype=torch.float32) / 8 - 1
    generator = torch.Generator().manual_seed(0)
    logs = []
    with pytest.MonkeyPatch.context() as patch:
        if not stop_gradient:
            patch.setattr(simsiam, "simsiam_loss", without_stop)
        for _ in range(steps):
            chosen = torch.randint(len(pictures), (64,), generator=generator)
            noise = 0.5 * torch.randn(2, 64, 3, 8, 8, generator=generator)
            views = list(pictures[chosen][:, None] + noise)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                output = method(views)
            output.loss.backward()
            optimizer.grad_scale, optimizer.found_inf = None, torch.zeros(())
            optimizer.step()
            optimizer.zero_grad()
            logs.append({name: value.item() for name, value in output.logs.items()})
    return logs


def test_the_predictor_keeps_its_rate_and_all_parameters_are_in_one_group() -> None:
    for rate, expected in (
        ("constant", {"matrices": 0.1, "vectors": 0.1, "predictor_matrices": 0.4, "predictor_vectors": 0.4}),
        ("scheduled", {"matrices": 0.1, "vectors": 0.1}),
    ):
        options, method, _ = make("digits/simsiam", [*SIZES, f"method.predictor_rate={rate}"])
        groups = method.parameter_groups()
        held = [id(p) for group in groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in method.parameters())
        chosen = options.optim.model_copy(update={"learning_rate": 0.2, "scale_with_batch": True})
        assert optim.set_rates(optim.build(groups, chosen, 512), 0.25) == expected
        predictor = {id(p) for p in method.predictor.parameters()}
        own = {id(p) for group in groups if group["lr"] == "constant" for p in group["params"]}
        assert own == (predictor if rate == "constant" else set())


def test_the_effective_rank_counts_directions_of_equal_variance() -> None:
    directions = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64)).Q
    for count in (1, 4):
        z = torch.cat([directions[:count], -directions[:count]]) * 3 + 5
        torch.testing.assert_close(methods.participation_ratio(z), torch.tensor(float(count), dtype=torch.float64))
    z = torch.randn(20, 6, dtype=torch.float64) * torch.arange(1, 7)
    values = torch.linalg.eigvalsh(torch.cov(z.T))
    torch.testing.assert_close(methods.participation_ratio(z), values.sum() ** 2 / values.square().sum())


def test_a_collapse_without_the_stop_gradient_shows_in_the_logs() -> None:
    well, badly = train(100), train(100, stop_gradient=False)

    def at_the_end(logs: list[dict[str, float]], name: str) -> float:
        return sum(row[name] for row in logs[-20:]) / 20

    assert at_the_end(badly, "loss") < -0.95 < at_the_end(well, "loss")
    assert at_the_end(badly, "embedding_rank") < 3 < at_the_end(well, "embedding_rank")
