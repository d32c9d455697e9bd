"""What every method must do, whichever it is."""

import pytest
import torch

from ssl_pipeline import config, methods, optim
from ssl_pipeline.exits import BadInput
from ssl_pipeline.methods import Method, Progress
from ssl_pipeline.pretrain import PretrainConfig, build_method

CASES = [
    ("digits/simclr_sparsehead", []),
    ("digits/byol_sparsehead", []),
    ("digits/barlow_twins_sparsehead", ["head.hidden=256", "head.output=128"]),
    ("digits/simsiam_sparsehead", ["head.hidden=256", "head.output=128", "method.predictor_hidden=32"]),
    ("digits/vicreg_sparsehead", ["head.hidden=256", "head.output=128"]),
    ("digits/w_mse_sparsehead", ["head.output=8", "method.w_size=32"]),
    ("digits/ssl_hsic_sparsehead", []),
    ("digits/swav_sparsehead", ["method.freeze_prototypes_steps=0"]),
]
SMALL = ["backbone.arguments={layers: [1, 1, 1, 1], channels: [16, 32, 64, 64]}"]


def make(name: str, overrides: list[str]) -> tuple[PretrainConfig, Method, list[torch.Tensor]]:
    options = config.validate(PretrainConfig, config.load(name, [*SMALL, *overrides]).values)
    method = build_method(options)
    torch.manual_seed(0)
    base = torch.randn(32, 3, 32, 32)
    return options, method, [base + 0.3 * torch.randn_like(base) for _ in range(2)]


def test_these_are_all() -> None:
    assert {name.split("/")[1].removesuffix("_sparsehead") for name, _ in CASES} == set(config.method_names())


@pytest.mark.parametrize(("name", "overrides"), CASES)
def test_thirty_steps_lower_the_loss_and_every_parameter_has_a_gradient(name: str, overrides: list[str]) -> None:
    options, method, views = make(name, overrides)
    optimizer = optim.build(method.parameter_groups(), options.optim, 32)
    losses = []
    for step in range(30):
        output = method(views)
        output.loss.backward()
        missing = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []
        progress = Progress(step, 30, step // 10, 3)
        method.before_update(progress)
        optimizer.grad_scale, optimizer.found_inf = None, torch.zeros(())
        optimizer.step()
        method.after_update(progress, {}, torch.tensor(True))
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert sum(losses[-5:]) < sum(losses[:5])
    assert output.features.shape == (32, 64)
    assert not output.features.requires_grad
    assert {"loss", "embedding_std", "sparse_penalty"} <= output.logs.keys()
    assert not any(value.requires_grad for value in output.logs.values())


@pytest.mark.parametrize(("name", "overrides"), CASES)
def test_bf16_is_near_fp32(name: str, overrides: list[str]) -> None:
    _, method, views = make(name, overrides)
    with torch.no_grad():
        full = method(views).loss
        with torch.autocast("cpu", torch.bfloat16):
            half = method(views).loss
    assert half.dtype == torch.float32
    assert (half - full).abs() <= 0.01 * (full.abs() + 1)


def test_byols_target_follows_and_holds_still_when_a_step_is_skipped() -> None:
    _, method, _ = make("digits/byol", [])
    online, target = method.backbone.conv1.weight, method.target["backbone"].conv1.weight
    before = target.clone()
    with torch.no_grad():
        online.add_(1.0)
    progress = Progress(step=0, steps=100, epoch=0, epochs=10)
    method.after_update(progress, {}, torch.tensor(False))
    assert torch.equal(target, before)
    method.after_update(progress, {}, torch.tensor(True))
    torch.testing.assert_close(target, before * 0.99 + online * 0.01)
    assert not any(p.requires_grad for p in method.target.parameters())
    assert all("target" not in g["name"] for g in method.parameter_groups())
    trained = {id(p) for g in method.parameter_groups() for p in g["params"]}
    assert trained.isdisjoint({id(p) for p in method.target.parameters()})


def test_barlow_twins_divisor_scales_the_gradient_and_not_the_value() -> None:
    name, overrides = CASES[2]
    found = []
    for divisor in (1, 16):
        _, method, views = make(name, [*overrides, f"method.gradient_divisor={divisor}"])
        output = method(views)
        output.loss.backward()
        found.append((output.loss.detach(), method.head.last_layer.weight.grad))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1] / 16, found[1][1])


def test_a_collapse_shows() -> None:
    _, method, views = make("digits/simclr", [])
    spread = method(views).logs["embedding_std"]
    torch.nn.init.zeros_(method.head.last_layer.weight)
    torch.nn.init.zeros_(method.head.layers[-1].weight)
    torch.nn.init.ones_(method.head.layers[-1].bias)
    assert method(views).logs["embedding_std"] < 1e-3 < 0.5 < spread


def test_views_that_do_not_fit() -> None:
    needs = methods.ViewNeeds()
    needs.check("m", [32, 32])
    with pytest.raises(BadInput, match="m uses 2 views and data.views makes 3"):
        needs.check("m", [32] * 3)
    with pytest.raises(BadInput, match=r"one size and data.views makes sizes \[32, 96\]"):
        needs.check("m", [32, 96])
