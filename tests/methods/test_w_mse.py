"""What is W-MSE's own: whitening, slices, and what a slice without a Cholesky factor does."""

import numpy as np
import pytest
import torch

from ssl_pipeline import config
from ssl_pipeline.exits import BadInput
from ssl_pipeline.methods import Method, Progress
from ssl_pipeline.methods.w_mse import Options, w_mse_loss, whiten
from ssl_pipeline.pretrain import PretrainConfig, build_method
from tests import golden

TINY = ["backbone.arguments={layers: [1, 1, 1, 1], channels: [8, 16, 32, 32]}", "head.output=8", "method.w_size=16"]


def make(*overrides: str) -> Method:
    values = config.load("digits/w_mse", [*TINY, "data.batch_size=32", *overrides]).values
    return build_method(config.validate(PretrainConfig, values))


@pytest.mark.parametrize("name", golden.select("wmse_"))
def test_a_whitened_slice_is_the_authors_own(name: str) -> None:
    entry = golden.entries()[name]
    first = golden.permutations(entry)[0, : entry["hyper"]["w_size"]]
    white, failed = whiten(golden.views(entry)[0][first])
    golden.assert_gradient(white, entry["outputs"]["whitened_v0_first_slice"])
    assert failed == 0


def test_whitened_slices_have_unit_covariance_each() -> None:
    mixing = torch.randn(6, 6, dtype=torch.float64)
    white, failed = whiten(torch.randn(2, 3, 40, 6, dtype=torch.float64) @ mixing + 5)
    for part in white.flatten(0, 1):
        torch.testing.assert_close(part.T.cov(), torch.eye(6, dtype=torch.float64))
        torch.testing.assert_close(part.mean(dim=0), torch.zeros(6, dtype=torch.float64))
    assert failed == 0
    # Shrunk towards the identity, as np.linalg sees it.
    x = torch.randn(40, 6, dtype=torch.float64)
    covariance = 0.9 * np.cov(x.numpy().T) + 0.1 * np.eye(6)
    expected = (x - x.mean(dim=0)).numpy() @ np.linalg.inv(np.linalg.cholesky(covariance)).T
    np.testing.assert_allclose(whiten(x, epsilon=0.1)[0].numpy(), expected, rtol=1e-10, atol=1e-12)


def test_a_slice_without_a_factor_is_mended_and_counted_and_the_others_are_as_they_were() -> None:
    x = torch.randn(3, 20, 6, dtype=torch.float64)
    x[1, :, 4] = 0  # one dimension is dead
    x[2] = 7.0  # all samples are one
    x.requires_grad_()
    white, failed = whiten(x)
    assert failed == 2
    torch.testing.assert_close(white[0], whiten(x[0])[0])
    assert white.isfinite().all()
    white.pow(3).sum().backward()
    assert x.grad.isfinite().all()
    # The mended slice is white but for its dead dimension, to the share of the identity.
    alive = white[1].detach()[:, [0, 1, 2, 3, 5]]
    torch.testing.assert_close(alive.T.cov(), torch.eye(5, dtype=torch.float64), rtol=0, atol=0.01)


def test_the_gradient_reaches_every_view_and_is_that_of_differences() -> None:
    z = torch.randn(2, 8, 2, dtype=torch.float64, requires_grad=True)
    orders = torch.stack([torch.randperm(8), torch.randperm(8)])
    for normalize in (True, False):
        options = Options(name="w_mse", w_size=4, w_iter=2, normalize=normalize)
        assert torch.autograd.gradcheck(lambda z, options=options: w_mse_loss(z, orders, options)[0], z)


def test_without_normalisation_it_is_the_mean_squared_difference() -> None:
    z = torch.randn(4, 16, 3)
    order = torch.randperm(16)
    loss, _ = w_mse_loss(z, order[None], Options(name="w_mse", w_size=8, normalize=False))
    white = [torch.cat([whiten(view[half])[0] for half in order.split(8)]) for view in z]
    pairs = [(white[i] - white[j]).square().mean() for i in range(4) for j in range(i)]
    torch.testing.assert_close(loss, torch.stack(pairs).mean())


def test_slices_are_new_every_step_and_the_same_after_a_resume() -> None:
    method = make()
    views = [torch.randn(32, 3, 32, 32) for _ in range(2)]

    def loss(step: int) -> float:
        method.before_forward(Progress(step=step, steps=9, epoch=0, epochs=1))
        with torch.no_grad():
            return method(views).loss.item()

    assert loss(3) != loss(4)
    assert loss(3) == loss(3)


def test_a_head_that_loses_dimensions_shows_in_the_logs_and_its_step_stays_finite() -> None:
    method = make()
    views = [torch.randn(32, 3, 32, 32) for _ in range(2)]
    assert method(views).logs["cholesky_failed"] == 0
    last = method.head.last_layer
    assert last is not None
    with torch.no_grad():
        last.weight[3] = 0
        last.bias[3] = 0
    output = method(views)
    assert output.logs["cholesky_failed"] == 4  # two views of two slices
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.batch_size=40"], r"data.batch_size = 40 is no multiple of method.w_size = 16: take 32$"),
        (["data.batch_size=8"], r"data.batch_size = 8 is no multiple of method.w_size = 16: take 16$"),
        (["head.output=9"], r"method.w_size = 16 is less than twice the embedding's 9 dimensions.*w_size=18, or .* 8$"),
        (["head.kind=identity"], r"less than twice the embedding's 32 dimensions"),
        (["data.views.0.count=1"], r"w_mse uses 2 to any number of views and data.views makes 1"),
    ],
)
def test_what_cannot_be_whitened_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        make(*overrides)


def test_four_views_by_the_options_that_the_configs_name() -> None:
    values = config.load("cifar10/w_mse", ["data.views.0.count=4", "data.batch_size=256"]).values
    options = config.validate(PretrainConfig, values)
    assert sum(view.count for view in options.data.views) == 4
    assert options.data.batch_size % options.method.w_size == 0  # type: ignore[attr-defined]
