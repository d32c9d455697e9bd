from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ssl_pipeline import config, head, sparse_head
from ssl_pipeline.exits import BadInput
from ssl_pipeline.head import ProjectionHead
from ssl_pipeline.pretrain import PretrainConfig, build_method
from tests import golden

SMALL = ["backbone.arguments={layers: [1, 1, 1, 1], channels: [16, 32, 64, 64]}"]


def weight_of(entry: dict) -> torch.Tensor:
    rows, columns = entry["inputs"]["check"][0]["shape"]
    seed = int(entry["inputs"]["recipe"].split("default_rng(")[1].split(")")[0])
    low, high = (float(x) for x in entry["inputs"]["recipe"].split("linspace(")[1].split(",")[:2])
    array = np.random.default_rng(seed).standard_normal((rows, columns)) * np.linspace(low, high, columns)
    np.testing.assert_allclose(array.sum(), entry["inputs"]["check"][0]["sum"], rtol=1e-10)
    return torch.from_numpy(array).requires_grad_()


@pytest.mark.parametrize("name", golden.select("l21_"))
def test_norm_and_gradient_are_the_definition(name: str) -> None:
    entry = golden.entries()[name]
    for groups, value, gradient in (
        ("columns", "penalty_columns", "grad_columns"),
        ("rows", "penalty_rows_alternative", "grad_rows_alternative"),
    ):
        weight = weight_of(entry)
        penalty = entry["hyper"]["lam"] * sparse_head.l21_norm(weight, groups)
        np.testing.assert_allclose(penalty.item(), entry["outputs"][value], rtol=1e-9)
        penalty.backward()
        golden.assert_gradient(weight.grad, entry["outputs"][gradient])
        if groups == "columns":
            assert weight.grad[:, 0].abs().sum() == 0  # a group of zeros: a subgradient, not NaN


def test_the_penalty_is_fp32_inside_autocast_and_of_the_online_head_alone() -> None:
    options = config.validate(
        PretrainConfig, config.load("digits/byol_sparsehead", ["head.sparse.weight=0.5", "head.hidden=32"]).values
    )
    method = build_method(options)
    views = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        output = method(views)
    weight = method.head.last_layer.weight
    expected = 0.5 * weight.detach().double().norm(dim=0).sum()
    assert output.logs["sparse_penalty"].dtype == torch.float32
    torch.testing.assert_close(output.logs["sparse_penalty"].double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(output.loss - output.logs["loss"], output.logs["sparse_penalty"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["head.kind=identity"], r"head.sparse.weight = 0.0001 needs a linear layer.*head.kind=linear"),
        (
            ["head.kind=identity", "head.sparse.weight=0", "head.sparse.inner_steps=1"],
            r"head.sparse.inner_steps = 1 needs a linear layer.*head.sparse.inner_steps=0",
        ),
        (
            ["head.sparse.schedule=adaptive", "head.sparse.weight=1"],
            r"between 1e-07 and 0.1, and weight = 1 is not between them: start it at 1e-4",
        ),
        (
            ["head.sparse.weight=0", "head.sparse.mode=proximal"],
            r"mode = proximal has no effect without weight above 0",
        ),
        (
            ["head.sparse.ramp=0.1"],
            r"ramp = 0.1 has no effect without schedule=linear or cosine: give that too, or leave",
        ),
        (
            ["head.sparse.target=0.3", "head.sparse.schedule=cosine"],
            r"target = 0.3 has no effect without schedule=adapt",
        ),
        (["head.sparse.inner_lr=0.3"], r"inner_lr = 0.3 has no effect without inner_steps above 0"),
        (["head.sparse.inner_steps=1", "precision=fp16"], r"inner_steps are not scaled.*precision=bf16"),
        (["head.sparse.mode=hard"], r"head.sparse.mode"),
    ],
)
def test_what_cannot_be_sparse(overrides: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        config.validate(PretrainConfig, config.load("cifar10/simclr_sparsehead", overrides).values)


# ------------------------------------------------------------------------------------------------- norms and thresholds
def test_the_ratio_does_not_see_scale_and_the_paper_s_norm_sees_little_else() -> None:
    weight = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    for groups in ("columns", "rows"):
        ratio, norm = sparse_head.scale_invariant_norm(weight, groups), sparse_head.l21_norm(weight, groups)
        torch.testing.assert_close(ratio, norm / weight.norm())
        torch.testing.assert_close(sparse_head.scale_invariant_norm(7 * weight, groups), ratio)
        torch.testing.assert_close(sparse_head.l21_norm(7 * weight, groups), 7 * norm)
        (of_ratio,) = torch.autograd.grad(ratio, weight)
        (of_norm,) = torch.autograd.grad(norm, weight)
        assert (of_ratio * weight).sum().abs() < 1e-12  # no step along W: shrinking gains nothing
        torch.testing.assert_close((of_norm * weight).sum(), norm)  # as far along W as the norm is large


@pytest.mark.parametrize("groups", ["columns", "rows"])
def test_a_weight_of_zeros_gives_numbers(groups: str) -> None:
    weight = torch.zeros(3, 4, requires_grad=True)
    (sparse_head.l21_norm(weight, groups) + sparse_head.scale_invariant_norm(weight, groups)).backward()
    assert torch.equal(weight.grad, torch.zeros(3, 4))
    norms = sparse_head.group_norms(weight.detach(), groups)
    assert not sparse_head.active(norms).any()
    assert sparse_head.hoyer_sparsity(norms).isfinite()
    sparse_head.soft_threshold(weight, 0.1, groups)
    assert torch.equal(weight, torch.zeros(3, 4))


def test_hoyer_sparsity_by_hand() -> None:
    def hoyer(*norms: float) -> float:
        return sparse_head.hoyer_sparsity(torch.tensor(norms, dtype=torch.float64)).item()

    assert hoyer(2, 2, 2, 2) == pytest.approx(0, abs=1e-12)
    assert hoyer(0, 0, 5, 0) == pytest.approx(1)
    assert hoyer(0, 0, 0, 0) == 1
    assert hoyer(3, 4) == pytest.approx((2**0.5 - 7 / 5) / (2**0.5 - 1))
    assert np.isfinite(hoyer(3))


def test_soft_thresholding_by_hand() -> None:
    weight = torch.tensor([[3.0, 0.3, 0.0], [4.0, 0.4, 0.0]])  # columns of norm 5, 0.5, 0
    kept = weight.clone()
    sparse_head.soft_threshold(weight, 0.0)
    assert torch.equal(weight, kept)
    sparse_head.soft_threshold(weight, 1.0)
    torch.testing.assert_close(weight, torch.tensor([[2.4, 0.0, 0.0], [3.2, 0.0, 0.0]]))
    assert (weight[:, 1:] == 0).all()
    rows = kept.T.contiguous()
    sparse_head.soft_threshold(rows, torch.tensor(1.0), "rows")
    assert torch.equal(rows, weight.T)


def test_soft_thresholding_minimises_its_definition() -> None:
    """prox(V) = argmin_W ||W - V||_F^2 / 2 + t ||W||_{2,1}: no other W is better."""
    start, t = torch.randn(5, 8, dtype=torch.float64), 2.0
    best = start.clone()
    sparse_head.soft_threshold(best, t)

    def value(weight: torch.Tensor) -> torch.Tensor:
        return 0.5 * (weight - start).square().sum() + t * sparse_head.l21_norm(weight)

    assert 0 < (best.norm(dim=0) == 0).sum() < 8
    for scale in (1e-3, 1e-1, 1.0):
        for _ in range(50):
            assert value(best + scale * torch.randn_like(best)) > value(best)


def test_proximal_sgd_solves_the_group_lasso() -> None:
    """Its limit satisfies the conditions of optimality, with groups that are zero; subgradients of the penalty do not."""
    x = torch.randn(40, 10, dtype=torch.float64)
    y = x @ torch.cat([torch.randn(4, 3), torch.zeros(6, 3)]).double() + 0.1 * torch.randn(40, 3, dtype=torch.float64)
    lam, rate = 0.2, 0.1
    sparse = sparse_head.SparseHead(sparse_head.Options(weight=lam, mode="proximal"))
    layer = nn.Linear(10, 3, bias=False).double()
    optimizer = torch.optim.SGD(layer.parameters(), rate)
    for _ in range(3000):
        optimizer.zero_grad()
        (0.5 * (layer(x) - y).square().sum() / len(x)).backward()
        optimizer.step()
        sparse.threshold([layer], 0.0, rate)
    weight = layer.weight.detach()
    slope = (x @ weight.T - y).T @ x / len(x)
    norms = weight.norm(dim=0)
    zero = norms == 0
    assert 3 <= zero.sum() < 10
    assert (slope[:, zero].norm(dim=0) <= lam + 1e-12).all()
    torch.testing.assert_close(slope[:, ~zero], -lam * weight[:, ~zero] / norms[~zero], rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- where and how much
def test_all_linear_layers_of_the_head_and_none_of_the_predictor() -> None:
    base = ["head.sparse.weight=0.5", "head.sparse.where=all", "head.layers=3", "head.hidden=16", *SMALL]
    method = build_method(config.validate(PretrainConfig, config.load("digits/byol_sparsehead", base).values))
    expected = sum(
        layer.weight.double().norm(dim=0).sum() for layer in method.head.layers if isinstance(layer, nn.Linear)
    )
    assert len(method.head.sparse_layers) == 3
    logs = method([torch.randn(4, 3, 32, 32) for _ in range(2)]).logs
    torch.testing.assert_close(logs["sparse_penalty"].double(), 0.5 * expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [4.0] * 5), ("linear", [1.0, 2.5, 4.0, 4.0, 4.0]), ("cosine", [1.0, 2.5, 4.0, 4.0, 4.0])],
)
def test_schedules(schedule: str, expected: list[float]) -> None:
    course = {} if schedule == "constant" else {"first_factor": 0.25, "ramp": 0.5}
    options = sparse_head.Options(weight=4, schedule=schedule, **course)
    assert [sparse_head.weight_at(options, done) for done in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(expected)
    quarter = sparse_head.weight_at(options, 0.125)
    assert quarter == pytest.approx({"constant": 4, "linear": 1.75, "cosine": 1 + 3 * (1 - 0.5**0.5) / 2}[schedule])


def test_the_adaptive_weight_goes_where_the_target_is_and_stays_in_its_range() -> None:
    sparse = sparse_head.SparseHead(
        sparse_head.Options(weight=1e-3, schedule="adaptive", target=0.5, gain=0.1)
    ).double()
    layer = nn.Linear(4, 2, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 1.0, 1.0, 0.009], [0, 0, 0, 0]]))  # three of four are active
    yes, no = torch.tensor(True), torch.tensor(False)
    sparse.adapt([layer], no)
    assert sparse.weight(0.0).item() == pytest.approx(1e-3)
    sparse.adapt([layer], yes)
    assert sparse.weight(0.0).item() == pytest.approx(1e-3 * np.exp(0.1 * 0.25))
    for _ in range(1000):
        sparse.adapt([layer], yes)
    assert sparse.weight(0.0).item() == pytest.approx(1e-1)
    with torch.no_grad():
        layer.weight[:, 1:] = 0
    for _ in range(2000):
        sparse.adapt([layer], yes)
    assert sparse.weight(0.0).item() == pytest.approx(1e-7)
    assert list(sparse.state_dict()) == ["log_weight"]
    assert list(sparse_head.SparseHead(sparse_head.Options(weight=1)).state_dict()) == []


def test_what_is_logged() -> None:
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 1.0, 0.0, 0.01], [4.0, 0.0, 0.0, 0.0]]))
    sparse = sparse_head.SparseHead(sparse_head.Options(weight=0.5))
    logs = {k: v.item() for k, v in sparse.logs([layer], 0.0, torch.tensor(-1.0, requires_grad=True)).items()}
    norms = np.array([5, 1, 0, 0.01])
    expected = {
        "head_group_norm_min": 0, "head_group_norm_median": 0.01, "head_group_norm_max": 5,
        "head_groups_inactive": 0.5, "head_groups_zero": 0.25,
        "head_hoyer": 2 - norms.sum() / np.linalg.norm(norms),
        "sparse_weight": 0.5, "sparse_penalty": 3.005, "sparse_share": 3.005 / 4.005,
    }  # fmt: skip
    assert logs == pytest.approx(expected, rel=1e-5)
    dense = sparse_head.SparseHead(sparse_head.Options()).logs([layer], 0.0, torch.tensor(1.0))
    assert dense.keys() == {key for key in expected if key.startswith("head_")}


@pytest.mark.parametrize(
    ("options", "outputs", "linear"),
    [
        ({"kind": "identity"}, 16, 0),
        ({"kind": "linear", "output": 8}, 8, 1),
        ({"kind": "mlp", "hidden": 32, "output": 8}, 8, 2),
        ({"kind": "mlp", "layers": 3, "hidden": 32, "output": 8, "output_norm": "scale"}, 8, 3),
        ({"kind": "mlp", "hidden": 32, "output": 8, "output_norm": "plain"}, 8, 2),
    ],
)
def test_head_kinds(options: dict, outputs: int, linear: int) -> None:
    module = ProjectionHead(head.Options(**options), 16)
    assert module(torch.randn(4, 16)).shape == (4, outputs)
    assert module.outputs == outputs
    layers = [m for m in module.modules() if isinstance(m, nn.Linear)]
    assert len(layers) == linear
    assert module.last_layer is (layers[-1] if layers else None)


def test_official_simclr_head() -> None:
    options = config.validate(PretrainConfig, config.load("imagenet/simclr").values).head
    module = ProjectionHead(options, 2048)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad}
    assert sorted(shapes.values()) == sorted([(2048, 2048), (2048,), (2048,), (128, 2048), (128,)])
    assert abs(module.last_layer.weight.std().item() - 0.01) < 1e-3


def test_a_plain_norm_has_no_parameters_and_cancels_the_bias_before_it() -> None:
    options = {"kind": "mlp", "hidden": 32, "output": 8, "output_norm": "plain"}
    with_bias = ProjectionHead(head.Options(**options), 16).double()
    without = ProjectionHead(head.Options(**options, output_bias=False), 16).double()
    assert list(without.layers[-1].parameters()) == []
    without.load_state_dict({k: v for k, v in with_bias.state_dict().items() if k != "layers.3.bias"})
    features = torch.randn(10, 16, dtype=torch.float64)
    z = without(features)
    torch.testing.assert_close(z, with_bias(features), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(z.mean(0), torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.var(0, correction=0), torch.ones(8, dtype=torch.float64), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("name", "matrices", "vectors"),
    [  # simsiam/builder.py: biases nowhere but the frozen one; vicreg main_vicreg.py:Projector: everywhere but in the last
        ("imagenet/simsiam", [(2048, 2048)] * 3, [(2048,)] * 4),
        ("imagenet/vicreg", [(8192, 2048), (8192, 8192), (8192, 8192)], [(8192,)] * 6),
    ],
)
def test_official_heads(name: str, matrices: list, vectors: list) -> None:
    options = config.validate(PretrainConfig, config.load(name).values).head
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in ProjectionHead(options, 2048).parameters()]
    assert [shape for shape in shapes if len(shape) == 2] == matrices
    assert [shape for shape in shapes if len(shape) == 1] == vectors


def test_every_option_and_every_value_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "sparsehead.md").read_text()
    for name, field in sparse_head.Options.model_fields.items():
        assert f"`{name}`" in text, name
        for value in getattr(field.annotation, "__args__", ()):
            assert value in text, (name, value)
    layer = nn.Linear(3, 2)
    logged = sparse_head.SparseHead(sparse_head.Options(weight=1)).logs([layer], 0.0, torch.ones(()))
    written = text.replace(
        "`head_group_norm_{min,median,max}`", "`head_group_norm_min` `head_group_norm_median` `head_group_norm_max`"
    )
    assert all(f"`{key}`" in written for key in logged)
