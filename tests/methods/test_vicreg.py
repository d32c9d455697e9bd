"""What VICReg alone has: three terms, and what happens without one."""

from functools import cache

import torch

from ssl_pipeline import optim
from tests.methods.test_methods import make


@cache
def train(*overrides: str, half: bool = False, steps: int = 30) -> list[dict[str, float]]:
    """What `steps` steps on one batch log."""
    torch.manual_seed(0)
    options, method, views = make("digits/vicreg", ["head.hidden=256", "head.output=128", *overrides])
    optimizer = optim.build(method.parameter_groups(), options.optim, 32)
    logs = []
    views = [view[:, :, :12, :12] for view in views]
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = method(views)
        output.loss.backward()
        optimizer.grad_scale, optimizer.found_inf = None, torch.zeros(())
        optimizer.step()
        optimizer.zero_grad()
        logs.append({name: value.item() for name, value in output.logs.items()})
    return logs


def test_the_terms_are_logged_before_their_weights() -> None:
    weights = {"invariance": 3.0, "variance": 5.0, "covariance": 7.0}
    row = train(*(f"method.{name}_weight={weight}" for name, weight in weights.items()), steps=1)[0]
    total = sum(weight * row[name] for name, weight in weights.items())
    assert abs(row["loss"] - total) <= 1e-5 * total


def test_a_collapse_shows_in_the_terms() -> None:
    well, constant, alike = train(), train("method.variance_weight=0"), train("method.covariance_weight=0")
    # Without the variance all embeddings become one point; without the covariance all dimensions say the same.
    assert well[-1]["variance"] < 0.2 < well[0]["variance"] < constant[-1]["variance"]
    assert constant[-1]["embedding_std"] < 0.8 < well[-1]["embedding_std"]
    assert alike[-1]["covariance"] > 20 * well[-1]["covariance"]
    assert alike[-1]["variance"] < 0.2
