"""Two gloo processes, each with half of the batch, give the loss and all gradients of one with the whole batch."""

import pytest
import torch

from ssl_pipeline import config, distributed
from ssl_pipeline.methods import Progress
from ssl_pipeline.pretrain import PretrainConfig, build_method
from tests.ranks import on_ranks

CASES = [
    ("cifar10/simclr_sparsehead", []),
    ("cifar10/simclr_sparsehead", ["method.views_together=true", "head.output_norm=scale"]),
    ("cifar10/byol_sparsehead", []),
    ("cifar10/barlow_twins_sparsehead", ["head.hidden=256", "head.output=256"]),
    ("cifar10/barlow_twins_sparsehead", ["head.hidden=256", "head.output=256", "method.gradient_divisor=16"]),
    ("cifar10/simclr", ["head.kind=linear"]),
    ("cifar10/byol", ["head.kind=identity"]),
    ("cifar10/simsiam_sparsehead", ["head.hidden=256", "head.output=256", "method.predictor_hidden=64"]),
    ("cifar10/vicreg_sparsehead", ["head.hidden=256", "head.output=256"]),
    ("cifar10/w_mse_sparsehead", ["head.output=2", "method.w_size=4", "method.w_iter=2"]),
    ("cifar10/w_mse", ["head.output=2", "method.w_size=4", "data.views.0.count=4"]),
    ("cifar10/ssl_hsic_sparsehead", []),
    ("cifar10/swav_sparsehead", []),
    # The inner steps train the head in the forward pass; with rate 1 they do so visibly.
    ("cifar10/simclr_sparsehead", ["head.sparse.inner_steps=2", "head.sparse.inner_lr=1", "head.sparse.where=all"]),
    ("cifar10/byol_sparsehead", ["head.sparse.inner_steps=1", "head.sparse.mode=proximal", "head.sparse.weight=0.1"]),
    ("cifar10/swav_sparsehead", ["head.sparse.inner_steps=1", "head.sparse.mode=scale_invariant"]),
    (
        "cifar10/simclr_sparsehead",
        ["head.sparse.mode=proximal", "head.sparse.weight=0.05", "head.sparse.schedule=adaptive"],
    ),
]


NARROW = "backbone.arguments={channels: [16, 32, 64, 128]}"


def loss_and_gradients(name: str, overrides: list[str]) -> dict[str, torch.Tensor]:
    """Mean loss over ranks, every gradient, and what a step leaves, of a narrow ResNet-18 with its real head in float64."""
    world = distributed.start()
    options = config.validate(PretrainConfig, config.load(name, [NARROW, *overrides]).values)
    method = build_method(options).double()
    model = distributed.wrap(method, world.device)
    generator = torch.Generator().manual_seed(0)
    whole = [
        torch.randn(8, 3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(options.data.views[0].count)
    ]
    views = [view[world.rank :: world.size] for view in whole]
    output = model(views)
    output.loss.backward()
    found = {f"gradient {n}": p.grad for n, p in method.named_parameters() if p.grad is not None}
    method.after_update(Progress(0, 10, 0, 1), {"matrices": 0.1}, torch.tensor(True))
    found |= {f"buffer {n}": b for n, b in method.named_buffers()}
    found |= {f"head {n}": p for n, p in method.head.named_parameters()}
    return {"loss": distributed.mean_over_ranks(output.loss), **found}


def all_cases() -> list[dict[str, torch.Tensor]]:
    return [loss_and_gradients(*case) for case in CASES]


@pytest.fixture(scope="module")
def of_two_ranks() -> list[list[dict[str, torch.Tensor]]]:
    """All cases, once: processes take longer to start than a case."""
    return on_ranks(2, all_cases)


@pytest.mark.parametrize("case", range(len(CASES)), ids=[" ".join([name, *overrides]) for name, overrides in CASES])
def test_two_ranks_equal_one(case: int, of_two_ranks: list[list[dict[str, torch.Tensor]]]) -> None:
    one = loss_and_gradients(*CASES[case])
    assert sum(key.startswith("gradient") for key in one) >= 60
    for found in (rank[case] for rank in of_two_ranks):
        assert found.keys() == one.keys()
        for key, value in one.items():
            scale = value.abs().max().clamp(min=1e-3) if value.is_floating_point() else 1
            assert ((found[key] - value).abs().max() / scale) <= 1e-10, key
