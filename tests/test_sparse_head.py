import numpy as np
import pytest
import torch
from torch import nn

from ssl_pipeline import config, head, sparse_head
from ssl_pipeline.exits import BadInput
from ssl_pipeline.head import ProjectionHead
from ssl_pipeline.pretrain import PretrainConfig, build_method
from tests import golden


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


def test_an_identity_head_has_nothing_to_be_sparse() -> None:
    with pytest.raises(BadInput, match=r"head.sparse.weight = 0.0001 needs a linear layer.*head.kind=linear"):
        config.validate(PretrainConfig, config.load("cifar10/simclr_sparsehead", ["head.kind=identity"]).values)


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
