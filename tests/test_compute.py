"""How a step is computed: another way to the same numbers."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

from ssl_pipeline import compute, config, distributed, pretrain
from ssl_pipeline.exits import BadInput, Status
from ssl_pipeline.head import Options as HeadOptions
from ssl_pipeline.head import ProjectionHead
from ssl_pipeline.methods import Method, Progress, simclr
from ssl_pipeline.pretrain import PretrainConfig, _forward_backward, build_method
from tests.methods.test_accumulate import Small
from tests.ranks import on_ranks
from tests.test_pretrain import options, series, weights

NARROW = "backbone.arguments={layers: [1, 1, 1, 1], channels: [8, 16, 32, 64]}"
SMALL = [NARROW, "head.hidden=32", "head.output=16"]
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def config_of(name: str, *overrides: str) -> PretrainConfig:
    return config.validate(PretrainConfig, config.load(name, [*SMALL, *overrides]).values)


def views_of(seed: int, world: distributed.World) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 3, 32, 32, generator=generator)[world.rank :: world.size] for _ in range(2)]


def steps(name: str, *overrides: str, count: int = 1, half: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Loss and gradients of the last of some steps, and weights and buffers after them."""
    run = config_of(name, *overrides)
    return steps_of(build_method(run), run.compute, count, run.optim.accumulate, half)


def steps_of(
    method: Method, how: compute.Options, count: int = 1, accumulate: int = 1, half: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    world = distributed.start()
    model = compute.wrap(method, how, world.device)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01)
    found = {}
    for number in range(count):
        progress = Progress(number, count, 0, 1)
        method.before_forward(progress)
        torch.manual_seed(number)  # of dropout
        output = _forward_backward(method, model, views_of(number, world), accumulate, half, NO_SCALER)
        found = {"loss": output.loss.detach()}
        found |= {f"gradient {n}": p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}
        optimizer.step()
        method.after_update(progress, {"matrices": 0.01}, torch.tensor(True))
        optimizer.zero_grad()
    return found | method.state_dict()


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    assert sum(name.startswith("gradient") for name in expected) >= 14
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


# ----------------------------------------------------------------------------------------------------------- activations
GIVEN_UP = "compute.checkpoint_activations=true"
CASES: dict[str, tuple[str, list[str], torch.dtype | None]] = {
    "simclr": ("cifar10/simclr_sparsehead", [], None),
    "simclr in two parts": ("cifar10/simclr", ["optim.accumulate=2"], None),
    "byol": ("cifar10/byol", [], None),
    "byol in two parts, bf16": ("cifar10/byol", ["optim.accumulate=2"], torch.bfloat16),
    "ssl_hsic": ("cifar10/ssl_hsic", [], None),
}


@pytest.mark.parametrize("case", CASES)
def test_activations_computed_again_change_no_bit(case: str) -> None:
    name, overrides, half = CASES[case]
    expected = steps(name, *overrides, count=2, half=half)
    found = steps(name, *overrides, GIVEN_UP, count=2, half=half)
    assert_same_bits(found, expected)
    parts = 2 if "optim.accumulate=2" in overrides else 1
    assert found["backbone.layer1.0.bn1.num_batches_tracked"] == 2 * 2 * parts  # two steps of two views


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "resnet26": {},
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 3, "drop_path_rate": 0.3},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64], "drop_path_rate": 0.3},
    "efficientnet_b0": {"drop_path_rate": 0.3},
    "regnety_002": {},
    "densenet121": {"growth_rate": 8, "block_config": [2, 2, 2, 2]},  # whose blocks are given a list that grows
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_of_any_architecture_give_their_activations_up(name: str) -> None:
    def passed(options: compute.Options) -> tuple[dict[str, torch.Tensor], int]:
        """Gradients and state after a pass, and the bytes that it keeps for the backward pass."""
        torch.manual_seed(0)
        backbone = timm.create_model(name, num_classes=0, **ARCHITECTURES[name])
        method = nn.Module()
        method.backbone = backbone
        compute._prepare(method, options)  # type: ignore[arg-type]
        kept: dict[int, int] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        for block in compute.blocks(backbone):
            block.register_forward_pre_hook(lambda _, inputs: [keep(x) for x in tree_leaves(inputs)] and None)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = backbone(torch.randn(8, 3, 32, 32)).square().sum()
        own = {x.untyped_storage().data_ptr() for x in (*backbone.parameters(), *backbone.buffers())}
        loss.backward()
        gradients = {f"gradient {n}": p.grad for n, p in backbone.named_parameters()}
        return {"loss": loss.detach(), **gradients, **backbone.state_dict()}, sum(
            size for place, size in kept.items() if place not in own
        )

    expected, all_bytes = passed(compute.Options())
    found, fewer_bytes = passed(compute.Options(checkpoint_activations=True))
    assert_same_bits(found, expected)
    assert fewer_bytes < 0.6 * all_bytes


def test_passes_without_gradient_are_as_they_were() -> None:
    backbone = timm.create_model("resnet18", num_classes=0, layers=[1, 1, 1, 1], channels=[8, 16, 32, 64]).eval()
    method = nn.Module()
    method.backbone = backbone
    pictures = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = backbone(pictures)
        compute._prepare(method, compute.Options(checkpoint_activations=True))  # type: ignore[arg-type]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compute, "checkpoint", None)
            assert torch.equal(backbone(pictures), expected)


# ----------------------------------------------------------------------------------------------------------------- ranks
STATIC = "compute.static_graph=true"
ON_RANKS: dict[str, tuple[list[str], list[str]]] = {
    "computed again": (["cifar10/simclr"], [GIVEN_UP]),
    "computed again, in two parts": (["cifar10/simclr", "optim.accumulate=2"], [GIVEN_UP]),
    "computed again, a loss a part": (["cifar10/byol", "optim.accumulate=2"], [GIVEN_UP]),
    "static": (["cifar10/byol"], [STATIC]),
    "static, in two parts": (["cifar10/simclr", "optim.accumulate=2"], [STATIC]),
    "static, computed again": (["cifar10/simclr"], [STATIC, GIVEN_UP]),
}
"""A run, and what shall change no bit of it."""


COMPILED_ON_RANKS = {
    "compiled": {"compile": "default"},
    "compiled, static": {"compile": "default", "static_graph": True},
}


def of_a_small_network(how: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Two steps with two batch norms in the backbone: torch.compile takes long over our batch norm between ranks."""
    torch.manual_seed(0)
    head = ProjectionHead(HeadOptions(hidden=16), 8)
    method = simclr.Method(simclr.Options(name="simclr"), Small(nn.BatchNorm2d), head)
    return steps_of(method, compute.Options(**how), count=2)


def without_generated_code(patch: pytest.MonkeyPatch) -> None:
    """torch.compile traces, and runs what it traced by torch's own operations: generating code takes half a minute."""
    compile = nn.Module.compile
    patch.setattr(nn.Module, "compile", lambda self, mode, **more: compile(self, backend="aot_eager", **more))


def of_a_rank() -> dict[str, Any]:
    found: dict[str, Any] = {}
    plain = functools.cache(functools.partial(steps, count=2))
    for case, (run, changes) in ON_RANKS.items():
        found[case] = [plain(*run), steps(*run, *changes, count=2)]
    with pytest.MonkeyPatch.context() as patch:
        without_generated_code(patch)
        for case, more in COMPILED_ON_RANKS.items():
            found[case] = [of_a_small_network({}), of_a_small_network(more)]
    found["bf16"] = [mean_of_rounded_gradients(), steps("cifar10/simclr", "compute.gradient_compression=bf16")]
    return found


def mean_of_rounded_gradients() -> dict[str, torch.Tensor]:
    """The mean over ranks of each rank's own gradients in bf16, in fp32."""
    world = distributed.start()
    method = build_method(config_of("cifar10/simclr"))
    distributed.synchronise_batch_norm(method, world.device)
    views = views_of(0, world)
    _forward_backward(method, method, views, 1, None, NO_SCALER)
    gradients = {f"gradient {n}": p.grad for n, p in method.named_parameters() if p.grad is not None}
    return {n: distributed.gather_values(g.bfloat16().float()).mean(dim=0) for n, g in gradients.items()}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return on_ranks(2, of_a_rank)


@pytest.mark.parametrize("case", [*ON_RANKS, *COMPILED_ON_RANKS])
def test_two_ranks_compute_the_same_bits(case: str, two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        expected, found = rank[case]
        assert_same_bits(found, expected)


def test_ranks_average_gradients_rounded_to_bf16(two_ranks: list[dict[str, Any]]) -> None:
    exact = two_ranks[0]["computed again"][0]
    for rank in two_ranks:
        expected, found = rank["bf16"]
        assert len(expected) > 20
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), name
    assert any(not torch.equal(found[name], exact[name]) for name in expected)


# --------------------------------------------------------------------------------------------------------------- compiled
@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    without_generated_code(monkeypatch)
    counters.clear()
    yield
    torch._dynamo.reset()


COMPILED = "compute.compile=default"


@pytest.mark.parametrize(
    "words",
    [
        ["cifar10/simclr_sparsehead", "optim.accumulate=2"],
        ["cifar10/ssl_hsic", "head.sparse.inner_steps=2"],
    ],
)
def test_compiled_networks_compute_the_same(words: list[str], traced: None) -> None:
    expected = steps(*words, count=3)
    assert counters["stats"]["unique_graphs"] == 0
    found = steps(*words, COMPILED, count=3)
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
    assert 0 < counters["stats"]["unique_graphs"] <= 8
    assert not counters["graph_break"]


def run_to(step: int, root: Path, run: Path, *overrides: str) -> None:
    some = [
        "epochs=2",
        "online.knn_every_epochs=1",
        "online.measures_every_epochs=1",
        "head.kind=mlp",
        "head.hidden=32",
    ]
    assert pretrain.pretrain(options(root, *some, f"max_steps={step}", *overrides), run) == Status.DONE


def test_compiled_and_plain_runs_go_on_from_each_other(few_digits: Path, tmp_path: Path, traced: None) -> None:
    run_to(20, few_digits, tmp_path / "plain")
    assert counters["stats"]["unique_graphs"] == 0
    for step, overrides in ((11, [COMPILED]), (15, []), (20, [COMPILED])):
        run_to(step, few_digits, tmp_path / "mixed", *overrides)
        if step == 11:
            # Backbone and head alone: nothing for evaluations, of batches of other sizes.
            assert counters["stats"]["unique_graphs"] == 2
    expected, found = (weights(tmp_path / name) for name in ("plain", "mixed"))
    assert list(found) == list(expected)
    bare = [torch.load(tmp_path / name / "backbone.pth", weights_only=True) for name in ("plain", "mixed")]
    assert list(bare[0]) == list(bare[1])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
    assert [row["step"] for row in series(tmp_path / "mixed")] == [row["step"] for row in series(tmp_path / "plain")]


@pytest.mark.slow
def test_generated_code_trains(few_digits: Path, tmp_path: Path) -> None:
    vit = "backbone={name: vit_tiny_patch16_224, arguments: {img_size: 32, patch_size: 8, depth: 1, embed_dim: 48}}"
    for name, overrides in (("plain", []), ("compiled", ["compute.compile=reduce-overhead"])):
        run_to(3, few_digits, tmp_path / name, vit, *overrides)
    expected, found = (weights(tmp_path / name) for name in ("plain", "compiled"))
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-3, msg=name)


def test_a_copy_of_a_compiled_network_is_its_own() -> None:
    method = build_method(config_of("cifar10/simclr"))
    compute.wrap(method, compute.Options(compile="default"), torch.device("cpu"))
    assert copy.deepcopy(method.backbone)._compiled_call_impl is None


# ------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([COMPILED, GIVEN_UP], "torch.compile does not see into blocks that are computed again: take compile=none or"),
        (
            ["compute.compile=reduce-overhead", "optim.accumulate=2"],
            "take compute.compile=default or optim.accumulate=1",
        ),
        (["method.name=byol", STATIC, "optim.accumulate=2"], "take compute.static_graph=false or optim.accumulate=1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(overrides: list[str], words: str) -> None:
    name = "cifar10/byol" if "method.name=byol" in overrides else "cifar10/simclr"
    with pytest.raises(BadInput, match=re.escape(words)):
        config_of(name, *overrides)


def test_a_loss_of_the_whole_batch_may_be_static_in_parts() -> None:
    config_of("cifar10/byol", STATIC, "optim.accumulate=2", "head.sparse.inner_steps=1")


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(
        BadInput, match="needs a backbone of blocks and timm knows none in VGG: take compute.checkpoint_"
    ):
        compute.blocks(timm.create_model("vgg11_bn", num_classes=0))


def test_a_machine_without_a_compiler_is_refused_before_anything_starts(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BadInput, match=r"compute.compile = default needs a compiler \(no-such-compiler, or what"):
        pretrain.pretrain(options(few_digits, COMPILED), tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'fatal error: Python.h: No such file' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(
        BadInput, match=rf"needs a compiler that works \({broken}: fatal error: Python.h: No such file\)"
    ):
        compute.require_compiler(compute.Options(compile="default"), torch.device("cpu"))
    monkeypatch.delenv("CXX")
    compute.require_compiler(compute.Options(compile="default"), torch.device("cpu"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    compute.require_compiler(compute.Options(compile=False), torch.device("cpu"))  # YAML's off
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="compute.compile = default needs the package triton"):
        compute.require_compiler(compute.Options(compile="default"), torch.device("cuda"))


def test_a_network_that_cannot_be_built_leaves_no_folder_and_a_start_names_its_options(
    few_digits: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(BadInput, match="no_such_argument"):
        pretrain.pretrain(options(few_digits, "backbone.arguments={no_such_argument: 1}"), run)
    assert not (run / "config.yaml").exists()
    pretrain.pretrain(options(few_digits, "max_steps=1", STATIC), run)
    starts = [row for row in map(json.loads, (run / "jobs.jsonl").read_text().splitlines()) if "compute" in row]
    assert [row["compute"]["static_graph"] for row in starts] == [True]


def test_cudnn_searches_unless_results_are_to_be_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    method = build_method(config_of("cifar10/simclr"))
    for repeatable in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", repeatable)
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda repeatable=repeatable: repeatable)
        compute.wrap(method, compute.Options(), torch.device("cpu"))
        assert torch.backends.cudnn.benchmark is not repeatable


def test_graphs_that_norms_over_ranks_would_cut_are_refused() -> None:
    method = build_method(config_of("cifar10/simclr"))
    method.backbone = nn.SyncBatchNorm.convert_sync_batchnorm(method.backbone)
    with pytest.raises(
        BadInput, match="which would end at every batch norm over several ranks: take compute.compile=default"
    ):
        compute.wrap(method, compute.Options(compile="reduce-overhead"), torch.device("cpu"))
    compute.wrap(method, compute.Options(compile="default"), torch.device("cpu"))


# ------------------------------------------------------------------------------------------------------------- taken back
def test_copies_bring_back_every_bit() -> None:
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]
    tensors = [torch.tensor([1.5, -0.0, 3.0, 0.0]).to(kind) for kind in kinds]
    tensors += [torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last), torch.randn(6, 5).T, torch.tensor(7)]
    first = [x.clone() for x in tensors]
    copies = compute.Copies(tensors)

    def spoil() -> list[torch.Tensor]:
        for x in tensors:
            x.copy_(torch.full_like(x, float("nan") if x.is_floating_point() else 1))
        return [x.clone() for x in tensors]

    def assert_bits(expected: list[torch.Tensor]) -> None:
        for x, other in zip(tensors, expected, strict=True):
            assert torch.equal(x.flatten().view(torch.uint8), other.flatten().view(torch.uint8))

    for kept in (False, True):
        copies.take()
        spoiled = spoil()
        copies.put_back_unless(torch.tensor(kept))
        assert_bits(spoiled if kept else first)
