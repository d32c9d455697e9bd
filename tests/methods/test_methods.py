"""What every method must do, whichever it is."""

from functools import cache

import pytest
import torch

from ssl_pipeline import config, methods, optim, sparse_head
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
    base = torch.randn(32, 3, 16, 16)
    return options, method, [base + 0.3 * torch.randn_like(base) for _ in range(2)]


def test_these_are_all() -> None:
    assert {name.split("/")[1].removesuffix("_sparsehead") for name, _ in CASES} == set(config.method_names())


@cache
def trained(case: int) -> tuple[Method, list[torch.Tensor], list[float], list[str]]:
    """A case after thirty steps on a fixed batch: method, views, losses, and parameters that had no gradient."""
    options, method, views = make(*CASES[case])
    optimizer = optim.build(method.parameter_groups(), options.optim, 32)
    losses, missing = [], []
    for step in range(30):
        progress = Progress(step, 30, step // 10, 3)
        method.before_forward(progress)
        output = method(views)
        output.loss.backward()
        missing += [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
        method.before_update(progress)
        optimizer.grad_scale, optimizer.found_inf = None, torch.zeros(())
        optimizer.step()
        method.after_update(progress, optim.set_rates(optimizer, 1.0), torch.tensor(True))
        optimizer.zero_grad()
        losses.append(output.loss.item())
    return method, views, losses, missing


@pytest.mark.parametrize("case", range(len(CASES)), ids=[name for name, _ in CASES])
def test_thirty_steps_lower_the_loss_and_every_parameter_has_a_gradient(case: int) -> None:
    method, views, losses, missing = trained(case)
    assert missing == []
    assert sum(losses[-5:]) < sum(losses[:5])
    output = method(views)
    assert output.features.shape == (32, 64)
    assert not output.features.requires_grad
    assert {"loss", "embedding_std", "sparse_penalty"} <= output.logs.keys()
    assert not any(value.requires_grad for value in output.logs.values())


@pytest.mark.parametrize("after", [0, 30])
@pytest.mark.parametrize("case", range(len(CASES)), ids=[name for name, _ in CASES])
def test_bf16_is_near_fp32(case: int, after: int) -> None:
    method, views = trained(case)[:2] if after else make(*CASES[case])[1:]
    with torch.no_grad():
        full = method(views).loss
        with torch.autocast("cpu", torch.bfloat16):
            half = method(views).loss
    assert half.dtype == torch.float32
    assert (half - full).abs() <= 0.01 * (full.abs() + 1)


# ------------------------------------------------------------------------------------------------------------ SparseHead
@pytest.mark.parametrize(("name", "overrides"), CASES)
def test_a_proximal_step_thresholds_the_head_after_the_update_unless_it_was_skipped(
    name: str, overrides: list[str]
) -> None:
    _, method, views = make(name, [*overrides, "head.sparse.mode=proximal", "head.sparse.weight=1e-3"])
    loss = method(views)
    assert loss.loss == loss.logs["loss"]  # no penalty in it
    before = method.head.last_layer.weight.detach().clone()
    others = {
        n: p.detach().clone() for n, p in method.named_parameters() if n.split(".")[0] not in ("target", "average")
    }
    progress = Progress(30, 100, 3, 10)
    method.after_update(progress, {"matrices": 2.0}, torch.tensor(False))
    assert torch.equal(method.head.last_layer.weight, before)
    method.after_update(progress, {"matrices": 2.0}, torch.tensor(True))
    norms = before.norm(dim=0)
    torch.testing.assert_close(method.head.last_layer.weight, before * (1 - 2e-3 / norms).clamp(min=0))
    changed = {n for n, p in others.items() if not torch.equal(p, method.get_parameter(n))} - {"prototypes.weight"}
    assert [n for n in changed if method.get_parameter(n) is not method.head.last_layer.weight] == []


def test_a_proximal_step_is_as_long_as_the_penalty_s_pull_whatever_scales_the_gradient() -> None:
    """One step of SGD, on groups far from zero: how far the last layer moved because of SparseHead, by divisor and mode."""
    moved = {}
    for divisor in (1, 16):
        found = {}
        for mode, weight in (("penalty", 0.0), ("penalty", 0.1), ("proximal", 0.1)):
            sparse = [f"head.sparse.mode={mode}", f"head.sparse.weight={weight}", f"method.gradient_divisor={divisor}"]
            _, method, views = make(CASES[2][0], [*CASES[2][1], *sparse])
            method(views).loss.backward()
            with torch.no_grad():
                layer = method.head.last_layer.weight
                layer.sub_(0.1 * layer.grad)
            method.after_update(Progress(0, 10, 0, 1), {"matrices": 0.1}, torch.tensor(True))
            found[mode, weight] = layer.detach().clone()
        for mode in ("penalty", "proximal"):
            moved[divisor, mode] = (found[mode, 0.1] - found["penalty", 0.0]).norm().item()
    # Each of 256 groups by rate * weight / divisor, along the weight before the step or after it.
    for (divisor, _), length in moved.items():
        assert length == pytest.approx(16 * 0.1 * 0.1 / divisor, rel=1e-2)


@pytest.mark.parametrize("mode", ["penalty", "proximal"])
@pytest.mark.parametrize(("name", "overrides"), CASES)
def test_inner_steps_train_the_head_alone_and_the_outer_one_all_else(
    name: str, overrides: list[str], mode: str
) -> None:
    weight = {"penalty": 0.01, "proximal": 0.1}[mode]
    sparse = [f"head.sparse.weight={weight}", f"head.sparse.mode={mode}"]
    _, plain, views = make(name, [*overrides, *sparse])
    inner = ["head.sparse.inner_steps=2", "head.sparse.inner_lr=0.5"]
    _, method, _ = make(name, [*overrides, *sparse, *inner])
    assert all(torch.equal(p, method.get_parameter(n)) for n, p in plain.named_parameters())
    held = {n for n, p in plain.named_parameters() if n.startswith("head.") and p.requires_grad}
    trained = {id(p) for group in method.parameter_groups() for p in group["params"]}
    assert not any(id(p) in trained for p in method.head.parameters())

    views = [view.double() for view in views]
    first = plain.double().head.last_layer.weight.detach().clone()
    output = method.double()(views)
    output.loss.backward()
    assert all(p.grad is None for p in method.head.parameters())

    # By hand: two steps of SGD on loss + penalty of the head, at the features and statistics of the start.
    start = {n: b.clone() for n, b in plain.named_buffers()}
    for _ in range(2):
        for p in plain.parameters():
            p.grad = None
        plain(views).loss.backward()
        with torch.no_grad():
            for n in held:
                plain.get_parameter(n).sub_(0.5 * plain.get_parameter(n).grad)
            if mode == "proximal":
                last = plain.head.last_layer.weight
                last.mul_((1 - 0.5 * weight / last.norm(dim=0)).clamp(min=0))
            for n, b in plain.named_buffers():
                b.copy_(start[n])
    for n in held:
        torch.testing.assert_close(method.get_parameter(n), plain.get_parameter(n), rtol=1e-9, atol=1e-11)
    assert (plain.head.last_layer.weight - first).abs().max() > 1e-3

    for p in plain.parameters():
        p.grad = None
    plain.head.sparse.options = sparse_head.Options()
    outer = plain(views)
    outer.loss.backward()
    assert output.loss.item() == output.logs["loss"].item() == pytest.approx(outer.loss.item(), rel=1e-9, abs=1e-11)
    for n, p in method.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, plain.get_parameter(n).grad, rtol=1e-7, atol=1e-9)
    for n, b in method.named_buffers():
        torch.testing.assert_close(b, plain.get_buffer(n), rtol=1e-9, atol=1e-11)
    method.after_update(Progress(0, 10, 0, 1), {}, torch.tensor(True))
    for n in held:  # no second threshold
        torch.testing.assert_close(method.get_parameter(n), plain.get_parameter(n), rtol=1e-9, atol=1e-11)
    with torch.no_grad():  # a look at the loss is no step
        method(views)
    for n in held:
        torch.testing.assert_close(method.get_parameter(n), plain.get_parameter(n), rtol=1e-9, atol=1e-11)


def test_inner_steps_see_their_own_steps_under_autocast() -> None:
    """Autocast keeps its copies of weights that need a gradient: the second step must not be made with the first's."""
    found = []
    for steps, rate in ((1, 1.0), (2, 1.0)):
        sparse = [f"head.sparse.inner_steps={steps}", f"head.sparse.inner_lr={rate}", "head.kind=linear"]
        _, method, views = make("digits/simclr_sparsehead", sparse)
        before = method.head.last_layer.weight.detach().clone()
        with torch.autocast("cpu", torch.bfloat16):
            method(views)
        found.append(method.head.last_layer.weight - before)
    one, two = found
    assert one.abs().max() > 0.01
    assert (two - 2 * one).abs().max() > 0.1 * one.abs().max()  # the same gradient twice would be twice the step


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
    crops = methods.get("swav").views(None)
    crops.check("swav", [32, 32, 16])
    for sizes in ([16, 16, 32, 32], [32, 48, 48]):
        with pytest.raises(BadInput, match=r"swav needs its 2 views of full size first and data.views makes sizes \["):
            crops.check("swav", sizes)
