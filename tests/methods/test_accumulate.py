"""Micro-batches: where no batch norm tells them apart, a step that is divided is the step that is not."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_pipeline import config, distributed, methods
from ssl_pipeline.head import Options as HeadOptions
from ssl_pipeline.head import ProjectionHead
from ssl_pipeline.methods import Method, Output, byol, simclr
from ssl_pipeline.pretrain import PretrainConfig, _forward_backward, build_method
from tests.ranks import on_ranks

CASES = [
    ("cifar10/simclr_sparsehead", []),
    ("cifar10/simclr_sparsehead", ["method.views_together=true", "head.sparse.where=all"]),
    ("cifar10/byol_sparsehead", []),
    ("cifar10/barlow_twins_sparsehead", ["head.hidden=256", "head.output=256", "method.gradient_divisor=16"]),
    ("cifar10/simsiam_sparsehead", ["head.hidden=256", "head.output=256", "method.predictor_hidden=64"]),
    ("cifar10/vicreg_sparsehead", ["head.hidden=256", "head.output=256"]),
    ("cifar10/w_mse_sparsehead", ["head.output=2", "method.w_size=4", "data.views.0.count=4"]),
    ("cifar10/ssl_hsic_sparsehead", []),
    ("cifar10/swav_sparsehead", []),
    # The inner steps see the whole batch: BYOL's loss is then no mean over micro-batches.
    ("cifar10/byol_sparsehead", ["head.sparse.inner_steps=2", "head.sparse.inner_lr=1"]),
]
IDS = [" ".join([name, *overrides]) for name, overrides in CASES]
NARROW = "backbone.arguments={layers: [1, 1, 1, 1], channels: [8, 16, 32, 64]}"
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def freeze(*parts: nn.Module) -> None:
    """Batch norm by the running statistics, which then stay."""
    for part in parts:
        for module in part.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def step(name: str, overrides: list[str], accumulate: int) -> dict[str, torch.Tensor]:
    """Loss, logs, rows and every gradient of a step, with frozen batch norm wherever a micro-batch would be seen."""
    world = distributed.start()
    options = config.validate(PretrainConfig, config.load(name, [NARROW, *overrides]).values)
    method = build_method(options).double()
    model = distributed.wrap(method, world.device)
    freeze(method) if method.per_sample else freeze(method.backbone, getattr(method, "target", nn.Identity()))
    generator = torch.Generator().manual_seed(0)
    sizes = [16] * options.data.views[0].count + ([8, 8] if "swav" in name else [])
    whole = [torch.randn(8, 3, size, size, generator=generator, dtype=torch.float64) for size in sizes]
    views = [view[world.rank :: world.size] for view in whole]
    output = _forward_backward(method, model, views, accumulate, None, NO_SCALER)
    found = {f"gradient {n}": p.grad for n, p in method.named_parameters() if p.grad is not None}
    found |= {f"head {n}": p.detach() for n, p in method.head.named_parameters()}
    found |= {f"log {n}": value for n, value in output.logs.items()}
    return found | {
        "loss": distributed.mean_over_ranks(output.loss),
        "features": distributed.gather_in_order(output.features),
        "embeddings": distributed.gather_in_order(output.embeddings),
    }


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert sum(key.startswith("gradient") for key in expected) >= 35
    for key, value in expected.items():
        scale = value.abs().max().clamp(min=1e-3)
        assert (found[key] - value).abs().max() / scale <= 1e-10, key


@functools.cache
def undivided(case: int) -> dict[str, torch.Tensor]:
    return step(*CASES[case], 1)


@pytest.mark.parametrize("case", range(len(CASES)), ids=IDS)
def test_four_micro_batches_are_the_undivided_batch(case: int) -> None:
    assert_equal(step(*CASES[case], 4), undivided(case))


def of_a_rank() -> dict[str, Any]:
    return {"halves": [step(*case, 2) for case in CASES], "buckets": buckets_averaged()}


@pytest.fixture(scope="module")
def on_two_ranks() -> list[dict[str, Any]]:
    """All that needs ranks, once: processes take longer to start than a case."""
    return on_ranks(2, of_a_rank)


@pytest.mark.parametrize("case", range(len(CASES)), ids=IDS)
def test_two_micro_batches_on_each_of_two_ranks_are_the_undivided_batch(
    case: int, on_two_ranks: list[dict[str, Any]]
) -> None:
    def shared(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value for key, value in found.items() if not key.startswith("log ")}  # which are of a rank's rows

    for rank in on_two_ranks:
        assert_equal(shared(rank["halves"][case]), shared(undivided(case)))


# --------------------------------------------------------------------------------------------------- the repeated pass
class Ours(distributed.BatchNorm):
    """On one rank, where `wrap` leaves torch's."""


class Synchronised(nn.SyncBatchNorm):
    """torch's own forward pass but for the refusal of a CPU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributed, "is_initialized", lambda: False)
            return super().forward(input)


class Small(nn.Sequential):
    """A network with batch norm of a kind, and dropout."""

    num_features = 8

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(8, 8, 3), norm(8),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten())  # fmt: skip


def a_step(backbone: nn.Module, accumulate: int, half: torch.dtype | None = None) -> tuple[Output, Method]:
    method = simclr.Method(simclr.Options(name="simclr"), backbone, ProjectionHead(HeadOptions(hidden=16), 8))
    torch.manual_seed(1)
    views = [torch.randn(12, 3, 9, 9) for _ in range(2)]
    return _forward_backward(method, method, views, accumulate, half, NO_SCALER), method


@pytest.fixture
def without_repeating() -> Iterator[pytest.MonkeyPatch]:
    """Activations are kept, so that no pass is repeated: call `undo` to repeat them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "checkpoint", lambda function, *arguments, **_: function(*arguments))
        yield patch


@pytest.mark.parametrize("half", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, Ours, Synchronised, timm.layers.BatchNormAct2d])
def test_the_repeated_pass_changes_no_bit(
    norm: type[nn.Module], half: torch.dtype | None, without_repeating: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    kept, kept_method = a_step(Small(norm), 4, half)
    without_repeating.undo()
    torch.manual_seed(0)
    found, method = a_step(Small(norm), 4, half)
    assert method.backbone.state_dict()["1.num_batches_tracked"] == 4  # micro-batches, of both views together
    assert torch.equal(found.loss, kept.loss)
    for (name, one), other in zip(method.state_dict().items(), kept_method.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    for (name, p), other in zip(method.named_parameters(), kept_method.parameters(), strict=True):
        assert torch.equal(p.grad, other.grad), name


def test_the_activations_of_one_micro_batch_are_held_at_a_time(without_repeating: pytest.MonkeyPatch) -> None:
    def most_held() -> int:
        torch.manual_seed(0)
        backbone = Small(nn.BatchNorm2d)
        made: list[StorageWeakRef] = []
        held = [0]

        def note(module: nn.Module, inputs: object, output: torch.Tensor) -> None:  # batch norm saves it for backward
            made.append(StorageWeakRef(output.untyped_storage()))
            held.append(sum(not one.expired() for one in made))

        backbone[0].register_forward_hook(note)
        a_step(backbone, 4)
        return max(held)

    assert most_held() == 4
    without_repeating.undo()
    assert most_held() == 1


# ------------------------------------------------------------------------------------------------------ one loss a part
def buckets_averaged() -> list[int]:
    counts = []
    averaged = distributed._mean_in_rank_order

    def counted(state, bucket):  # type: ignore[no-untyped-def] # DDP refuses annotations that are strings
        counts[-1] += 1
        return averaged(state, bucket)

    distributed._mean_in_rank_order = counted
    for accumulate in (1, 3):
        counts.append(0)
        torch.manual_seed(0)
        shape = byol.Options(name="byol", predictor_hidden=8)
        method = byol.Method(shape, Small(nn.BatchNorm2d), ProjectionHead(HeadOptions(hidden=16), 8))
        model = distributed.wrap(method, torch.device("cpu"))
        _forward_backward(method, model, [torch.randn(6, 3, 9, 9) for _ in range(2)], accumulate, None, NO_SCALER)
    return counts


def test_ranks_exchange_gradients_once_a_step(on_two_ranks: list[dict[str, Any]]) -> None:
    for once, thrice in (rank["buckets"] for rank in on_two_ranks):
        assert once == thrice > 0


def test_a_loss_per_sample_takes_each_micro_batch_forward_once() -> None:
    torch.manual_seed(0)
    passes = []
    backbone = Small(nn.BatchNorm2d)
    method = byol.Method(byol.Options(name="byol"), backbone, ProjectionHead(HeadOptions(hidden=16), 8))
    backbone.register_forward_hook(lambda module, inputs, output: passes.append(len(inputs[0])))
    _forward_backward(method, method, [torch.randn(12, 3, 9, 9) for _ in range(2)], 4, None, NO_SCALER)
    assert passes == [3] * 8
