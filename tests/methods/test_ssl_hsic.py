"""What is SSL-HSIC's own: the kernel by random features, its trained scale, the averaged backbone, a collapse."""

import copy

import numpy as np
import pytest
import torch

from ssl_pipeline import config, distributed
from ssl_pipeline.methods import Method, Progress
from ssl_pipeline.methods.ssl_hsic import (
    Frequencies,
    amplitude_law,
    draw_frequencies,
    fourier_features,
    gather_sets,
    hsic_xy,
    log_slope,
    root_hsic_xx,
    ssl_hsic_loss,
)
from ssl_pipeline.pretrain import PretrainConfig, build_method
from tests import golden
from tests.methods.test_golden import ssl_hsic_of
from tests.ranks import on_ranks

TINY = ["backbone.arguments={layers: [1, 1, 1, 1], channels: [8, 16, 32, 32]}", "method.predictor_hidden=64"]
YES, NO = torch.tensor(True), torch.tensor(False)


def make(*overrides: str) -> Method:
    values = config.load("digits/ssl_hsic", [*TINY, "head.hidden=64", "head.output=16", *overrides]).values
    return build_method(config.validate(PretrainConfig, values))


def two_views(rows: int = 16) -> list[torch.Tensor]:
    base = torch.randn(rows, 3, 32, 32)
    return [base + 0.3 * torch.randn_like(base) for _ in range(2)]


def progress(step: int) -> Progress:
    return Progress(step=step, steps=100, epoch=0, epochs=10)


# ------------------------------------------------------------------------------------------------ the authors' values
@pytest.mark.parametrize("name", golden.select("hsic_N"))
def test_both_parts_and_the_scales_objective_are_the_authors_own(name: str) -> None:
    entry = golden.entries()[name]
    outputs = entry["outputs"]
    inputs = golden.views(entry)
    loss, logs = ssl_hsic_of(inputs, entry)
    np.testing.assert_allclose(logs["hsic_xy"], outputs["hsic_xy"], rtol=1e-7)
    np.testing.assert_allclose(logs["hsic_xx"], outputs["hsic_xx"], rtol=1e-7)
    loss.backward()
    assert inputs[2].grad is inputs[3].grad is None
    hidden = gather_sets(inputs[:2], inputs[2:]).detach()
    left, right = (
        torch.cat([x[place] for x, place in zip(hidden, places, strict=True)]) for places in golden.fourier(entry)[1]
    )
    scale = torch.tensor(entry["hyper"]["c"], dtype=torch.float64)
    slope, derivative = log_slope((left[:, None] - right).square().sum(dim=-1), scale)
    np.testing.assert_allclose(slope, outputs["grad_norm_term"], rtol=1e-7)
    np.testing.assert_allclose(-derivative, outputs["d_negative_grad_norm_d_scale"], rtol=1e-7)


@pytest.mark.parametrize("name", golden.select("hsic_amp_"))
def test_the_law_of_amplitudes_is_the_authors_own(name: str) -> None:
    entry = golden.entries()[name]
    outputs = entry["outputs"]
    amplitudes, probabilities = amplitude_law(entry["hyper"]["n"])
    mean = (amplitudes * probabilities).sum()
    np.testing.assert_allclose(mean, outputs["mean"], rtol=1e-9)
    np.testing.assert_allclose(((amplitudes - mean) ** 2 * probabilities).sum() ** 0.5, outputs["std"], rtol=1e-9)
    for place, probability in outputs["probs"].items():
        np.testing.assert_allclose(probabilities[int(place)], probability, rtol=1e-9)
    for share, amplitude in outputs["quantiles"].items():
        np.testing.assert_allclose(amplitudes[probabilities.cumsum().searchsorted(float(share))], amplitude, rtol=1e-9)


def test_the_sample_is_weighed_by_the_authors_own_label_kernel() -> None:
    """Their centred label kernel on the Gram matrix, and the unbiased normalisation of a sample's own pairs."""
    sets = 4
    for batch, positive, negative in golden.entries()["hsic_label_weights"]["outputs"]["batch_wpos_wneg"][:3]:
        features = torch.randn(sets, batch, 5, dtype=torch.float64)
        rows = features.transpose(0, 1).flatten(0, 1)  # a sample's sets stand together
        gram = rows @ rows.T
        same = torch.block_diag(*[torch.ones(sets, sets, dtype=torch.bool)] * batch)
        biased = (gram * torch.where(same, positive, negative)).sum() / (batch * sets**2)
        expected = biased + gram[same].sum() / (batch * sets**2 * (sets - 1))
        torch.testing.assert_close(hsic_xy(features), expected)


@pytest.mark.parametrize("dimension", [1, 2, 3, 65, 2048])
def test_the_law_is_one_in_any_dimension(dimension: int) -> None:
    _, probabilities = amplitude_law(dimension)
    assert np.isfinite(probabilities).all()
    assert probabilities.sum() == pytest.approx(1)


# ---------------------------------------------------------------------------------------------------- random features
def test_many_features_are_the_kernel() -> None:
    x = torch.nn.functional.normalize(torch.randn(20, 32), dim=1)
    draw = draw_frequencies(100_000, 32, torch.Generator().manual_seed(0))
    for scale in (0.5, 1.0):
        features = fourier_features(x, draw, torch.tensor(scale))
        kernel = scale / (scale**2 + torch.cdist(x, x).square()).sqrt()
        torch.testing.assert_close(features @ features.T, kernel, rtol=0, atol=0.02)


def test_the_estimates_are_those_of_kernel_matrices() -> None:
    """The same sums, written with Gram matrices of features."""
    sets, batch, count = 4, 6, 40
    one, two = torch.randn(2, sets, batch, count, dtype=torch.float64).unbind()
    rows = one.transpose(0, 1).flatten(0, 1)  # a sample's sets stand together
    gram = rows @ rows.T
    same = torch.block_diag(*[torch.ones(sets, sets, dtype=torch.float64)] * batch)
    total = sets * batch
    expected = (gram * same).sum() / (total * (sets - 1)) - gram.sum() / total**2
    torch.testing.assert_close(hsic_xy(one), expected)
    centre = torch.eye(total, dtype=torch.float64) - 1 / total
    first, second = (x.flatten(0, 1) for x in (one, two))
    expected = torch.trace(first @ first.T @ centre @ second @ second.T @ centre) / total**2
    torch.testing.assert_close(root_hsic_xx(one, two).square(), expected)


def test_embeddings_that_are_one_have_a_finite_gradient() -> None:
    predictions = [torch.ones(8, 4, requires_grad=True) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    one, two = (draw_frequencies(16, 4, generator) for _ in range(2))
    hidden = gather_sets(predictions, [torch.ones(8, 4)] * 2)
    loss, logs = ssl_hsic_loss(hidden, (one, two), torch.tensor(1.0), 3.0)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in predictions)
    assert logs["hsic_xx"] < 1e-10


def test_the_two_draws_are_independent_new_every_step_and_the_same_after_a_resume() -> None:
    method = make()
    views = two_views()

    def loss(step: int) -> float:
        method.before_forward(progress(step))
        with torch.no_grad():
            return method(views).loss.item()

    assert loss(3) != loss(4)
    assert loss(3) == loss(3)
    generator = method.generator()
    one, two = (draw_frequencies(512, 16, generator) for _ in range(2))
    directions = [torch.nn.functional.normalize(draw.weight, dim=1) for draw in (one, two)]
    assert (directions[0] * directions[1]).sum(dim=1).abs().mean() < 0.3  # 0.2 for random directions in 16 dimensions
    assert 0 <= one.offset.min() < 0.2 < 6 < one.offset.max() <= 2 * torch.pi
    assert isinstance(one, Frequencies)


# ----------------------------------------------------------------------------------------------------- kernel's scale
def test_the_scales_derivative_is_autograds_also_where_slopes_are_cut() -> None:
    squared = torch.tensor([0.0, 0.1, 1.0, 4.0, 1e6], dtype=torch.float64)
    for scale in (0.3, 1.0):
        c = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
        d = squared.clone().requires_grad_()
        (slope,) = torch.autograd.grad((c / (d + c**2).sqrt()).sum(), d, create_graph=True)
        objective = 0.5 * torch.log(torch.clamp(slope**2, min=1e-14)).mean()
        objective.backward()
        found, derivative = log_slope(squared, c.detach())
        torch.testing.assert_close(found, objective.detach())
        torch.testing.assert_close(derivative, c.grad)


def test_the_scale_is_trained_by_adam_and_only_by_steps_that_took_place() -> None:
    method = make("method.scale_learning_rate=0.01")
    reference = torch.nn.Parameter(torch.ones(()))
    adam = torch.optim.Adam([reference], lr=0.01)
    torch.manual_seed(1)
    for step, (gradient, finite) in enumerate(zip(torch.randn(8), [YES, NO, YES, YES, NO, YES, YES, YES], strict=True)):
        before = {name: buffer.clone() for name, buffer in method.named_buffers() if "." not in name}
        method.scale_gradient.copy_(gradient if finite else torch.tensor(float("nan")))
        method.after_update(progress(step), {}, finite)
        if finite:
            reference.grad = -gradient  # the slope is to grow
            adam.step()
        else:
            for name in ("kernel_scale", "scale_moments", "updates"):
                assert torch.equal(method.get_buffer(name), before[name])
        torch.testing.assert_close(method.kernel_scale, reference.detach(), rtol=1e-5, atol=1e-6)
    assert method.updates == 6


def test_training_the_scale_raises_the_slope() -> None:
    method = make("method.scale_learning_rate=0.01")
    views = two_views()
    slopes = []
    for step in range(30):
        with torch.no_grad():
            output = method(views)
        method.after_update(progress(step), {}, YES)
        slopes.append(output.logs["kernel_log_slope"].item())
    assert slopes[-1] > slopes[0] + 0.01
    assert output.logs["kernel_scale"] != 1
    assert not any(value.requires_grad for value in output.logs.values())


def _scale_after_a_step() -> dict[str, torch.Tensor]:
    world = distributed.start()
    method = make("method.scale_samples=64").double()
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(2)]
    model = distributed.wrap(method, world.device)
    output = model([view[world.rank :: world.size] for view in whole])
    method.after_update(progress(0), {}, YES)
    return {"slope": output.logs["kernel_log_slope"], "scale": method.kernel_scale, "gradient": method.scale_gradient}


def test_two_ranks_measure_the_slope_over_the_pairs_of_one() -> None:
    one = _scale_after_a_step()
    for found in on_ranks(2, _scale_after_a_step):
        for key, value in one.items():
            torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------------ the averaged backbone
def test_what_is_evaluated_is_the_average_of_the_weights_with_the_online_statistics() -> None:
    method = make("method.ema_decay=0.9")
    name, online = next(iter(method.backbone.named_parameters()))
    history = [online.detach().clone()]
    for step, finite in enumerate([YES, YES, NO, YES]):
        method(two_views())  # moves the running statistics
        if finite:
            with torch.no_grad():
                online.add_(torch.randn_like(online))
            history.append(online.detach().clone())
        method.after_update(progress(step), {}, finite)
    hidden = torch.zeros_like(online)
    for value in history:  # haiku's ExponentialMovingAverage, from zero and divided by its sum of weights
        hidden = 0.9 * hidden + 0.1 * value
    average = method.evaluated_backbone()
    torch.testing.assert_close(dict(average.named_parameters())[name].data, hidden / (1 - 0.9 ** len(history)))
    buffers = dict(method.backbone.named_buffers())
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in average.named_buffers())
    assert average.state_dict().keys() == method.backbone.state_dict().keys()
    trained = {id(p) for group in method.parameter_groups() for p in group["params"]}
    assert trained.isdisjoint({id(p) for module in (average, method.target) for p in module.parameters()})


def test_a_skipped_step_moves_neither_target_nor_average() -> None:
    method = make()
    before = copy.deepcopy({"target": method.target.state_dict(), "average": dict(method.average.named_parameters())})
    with torch.no_grad():
        for p in method.backbone.parameters():
            p.add_(1)
    method.after_update(progress(0), {}, NO)
    assert all(torch.equal(value, before["target"][key]) for key, value in method.target.state_dict().items())
    assert all(torch.equal(value, before["average"][key]) for key, value in method.average.named_parameters())
    method.after_update(progress(0), {}, YES)
    assert not torch.equal(next(method.average.parameters()), next(iter(before["average"].values())))


# ------------------------------------------------------------------------------------------------------------- failures
def test_a_collapse_shows_in_the_logs_though_not_in_the_loss() -> None:
    method = make()
    views = two_views()
    healthy = method(views).logs
    for head in (method.head, method.target["head"], method.predictor):
        torch.nn.init.zeros_(head.last_layer.weight)
        torch.nn.init.ones_(head.last_layer.bias)
    collapsed = method(views).logs
    for key in ("hsic_xx", "embedding_std"):
        assert collapsed[key] < 1e-6 < 1e-3 < healthy[key]
    assert collapsed["hsic_xy"] == pytest.approx(1 / 3, abs=0.05)
    assert collapsed["loss"] < healthy["loss"]
