"""Losses, optimizers and collectives on the device: the authors' values, torch's own layers, one rank of NCCL."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from ssl_pipeline import distributed, head, optim
from ssl_pipeline.compute import Copies
from ssl_pipeline.methods import Progress, swav
from ssl_pipeline.methods._column_products import column_products
from ssl_pipeline.methods._momentum import follow
from ssl_pipeline.methods.barlow_twins import barlow_twins_loss
from ssl_pipeline.methods.simclr import nt_xent_loss
from ssl_pipeline.methods.ssl_hsic import Frequencies, gather_sets, ssl_hsic_loss
from ssl_pipeline.methods.vicreg import vicreg_loss
from ssl_pipeline.methods.w_mse import w_mse_loss
from tests import golden
from tests.methods import test_golden as values

EXACT = {torch.float64: 1e-6, torch.float32: 5e-4}
"""Relative difference that is allowed of a loss and of the norm of its gradient. In float32 W-MSE's whitening of 64 samples
in 8 dimensions and Barlow Twins' difference of nearly equal numbers lose the most; on a CPU both stay below 1e-4."""


def loss_of(prefix: str, v: list[Tensor], entry: dict[str, Any]) -> Tensor:
    """The loss of an entry's inputs, what else it needs brought to their device and precision."""
    like, hyper = v[0], entry["hyper"]
    if prefix == "wmse_":
        return w_mse_loss(torch.stack(v), golden.permutations(entry).to(like.device), values.w_mse_options(hyper))[0]
    if prefix == "hsic_N":
        one, two = (Frequencies(*(part.to(like) for part in draw)) for draw in golden.fourier(entry)[0])
        scale = torch.tensor(hyper["c"]).to(like)
        return ssl_hsic_loss(gather_sets(v[:2], v[2:]), (one, two), scale, hyper["regul_weight"])[0]
    return values.LOSSES[prefix][0](v, hyper | {"entry": entry})


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize(("name", "prefix"), values.CASES)
def test_losses_are_the_authors_own(device: torch.device, name: str, prefix: str, dtype: torch.dtype) -> None:
    entry = golden.entries()[name]
    inputs = [v.detach().to(device, dtype).requires_grad_() for v in golden.views(entry)]
    loss = loss_of(prefix, inputs, entry)
    loss.backward()
    assert loss.device == inputs[0].device
    np.testing.assert_allclose(loss.item(), entry["outputs"]["loss"], rtol=EXACT[dtype])
    for place, value in enumerate(inputs):
        summary = entry["outputs"].get(f"grad_v{place}")
        if summary is not None and summary["l2"] > 0:
            assert value.grad is not None
            np.testing.assert_allclose(value.grad.norm().item(), summary["l2"], rtol=EXACT[dtype])
            if dtype == torch.float64:
                golden.assert_gradient(value.grad.cpu(), summary, rtol=1e-6)


@pytest.mark.parametrize("name", values.SWAV)
def test_swav_with_its_queue_is_the_authors_own(device: torch.device, name: str) -> None:
    entry = golden.entries()[name]
    hyper, inputs, outputs = entry["hyper"], entry["inputs"], entry["outputs"]
    recipe, count = inputs["recipe"], sum(hyper["nmb_crops"])
    views = golden.views({**entry, "inputs": {**inputs, "check": inputs["check"][:count]}})
    rng = np.random.default_rng(recipe["seed"] + 500)
    prototypes = rng.standard_normal((int(name.split("_K")[1].split("_")[0]), recipe["D"]))
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    options = swav.Options(
        name="swav", prototypes=len(prototypes), temperature=hyper["temperature"], epsilon=hyper["epsilon"],
        sinkhorn_iterations=hyper["iterations"], queue_length=hyper["queue_length"], queue_start_epoch=0,
    )  # fmt: skip
    method = swav.Method(options, nn.Identity(), head.ProjectionHead(head.Options(kind="identity"), recipe["D"]))
    method = method.double().to(device)
    with torch.no_grad():
        method.prototypes.weight.copy_(torch.from_numpy(prototypes))
        if hyper["queue_length"]:
            queue = rng.standard_normal(tuple(method.queue.shape))
            method.queue.copy_(torch.from_numpy(queue / np.linalg.norm(queue, axis=2, keepdims=True)))
    method.before_forward(Progress(step=50, steps=100, epoch=5, epochs=10))
    on_device = [view.detach().to(device).requires_grad_() for view in views]
    loss = method(on_device).loss
    loss.backward()
    np.testing.assert_allclose(loss.item(), outputs["loss"], rtol=1e-9)
    for place, view in enumerate(on_device):
        golden.assert_gradient(view.grad.cpu(), outputs["grad_embeddings_pre_norm"][f"v{place}"], rtol=1e-6)
    golden.assert_gradient(method.prototypes.weight.grad.cpu(), outputs["grad_prototypes"], rtol=1e-6)


# ----------------------------------------------------------------------------------------------------------- optimizers
OPTIMIZERS = [
    *((name, "lars") for name in golden.select("lars_barlowtwins_") + golden.select("lars_byol_")),
    *((name, "larc") for name in golden.select("larc_apex_") + golden.select("lars_timm_")),
]


@pytest.mark.parametrize(("name", "optimizer_name"), OPTIMIZERS)
def test_lars_and_larc_are_the_authors_own(device: torch.device, name: str, optimizer_name: str) -> None:
    entry = golden.entries()[name]
    hyper, recipe = entry["hyper"], golden.entries()[f"lars_barlowtwins_{name[-1]}"]["inputs"]["recipe"]
    rng = np.random.default_rng(int(recipe.split("default_rng(")[1].split(")")[0]))
    start = {"W": rng.standard_normal((6, 5)), "b": rng.standard_normal(6), "Z": np.zeros((3, 4))}
    p = {key: nn.Parameter(torch.from_numpy(value).to(device)) for key, value in start.items()}
    groups = [
        {"params": [p["W"], p["Z"]], "name": "matrices", "decay": True, "adapt": True, "lr": "scheduled"},
        {"params": [p["b"]], "name": "vectors", "decay": False, "adapt": False, "lr": "scheduled"},
    ]
    options = optim.Options(
        name=optimizer_name, learning_rate=hyper["lr"], weight_decay=hyper["wd"], momentum=hyper["mom"],
        trust_coefficient=hyper["eta"], exclude_1d=hyper.get("exclude_1d", True),
    )  # fmt: skip
    optimizer = optim.build(groups, options, batch_size=256)
    for _ in range(5):
        for key in ("W", "b", "Z"):
            p[key].grad = torch.from_numpy(rng.standard_normal(p[key].shape)).to(device)
        optimizer.grad_scale, optimizer.found_inf = None, torch.zeros((), device=device)
        optimizer.step()
    for key, value in p.items():
        np.testing.assert_allclose(value.detach().cpu(), np.array(entry["outputs"][key]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["lars", "larc", "sgd", "adam", "adamw", "lamb"])
def test_a_skipped_step_changes_no_bit(device: torch.device, name: str) -> None:
    model = nn.Sequential(nn.Linear(64, 33), nn.BatchNorm1d(33)).to(device)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == many] for many in (True, False))
    groups = [
        {"params": matrices, "name": "matrices", "decay": True, "adapt": True, "lr": "scheduled"},
        {"params": vectors, "name": "vectors", "decay": False, "adapt": False, "lr": "scheduled"},
    ]
    optimizer = optim.build(groups, optim.Options(name=name, learning_rate=0.1), 256)

    def step(value: float) -> None:
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        optimizer.grad_scale = None
        optimizer.found_inf = torch.tensor(float(not np.isfinite(value)), device=device)
        optimizer.step()

    def everything() -> list[Tensor]:
        return [
            v.detach().clone()
            for v in [*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())]
        ]

    step(float("inf"))  # the first, where state is made
    step(1.0)
    before = everything()
    step(float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    step(1.0)
    assert all(torch.isfinite(v).all() for v in everything())
    assert not torch.equal(before[0], everything()[0])


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_a_target_follows_by_a_weight_on_the_device(device: torch.device, weight: float) -> None:
    """channels_last, of which a 1 x 1 convolution has strides of its own; with weight 0 not a bit changes."""
    networks = [nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5)) for _ in range(2)]
    online, target = (network.to(device, memory_format=torch.channels_last) for network in networks)
    expected = [p.detach() * (1 - weight) + q.detach() * weight
                for p, q in zip(target.parameters(), online.parameters(), strict=True)]  # fmt: skip
    if not weight:
        nn.init.constant_(online[0].weight, float("nan"))
        expected = [p.detach().clone() for p in target.parameters()]
    follow([target], [online], torch.tensor(weight, device=device))
    close = {"rtol": 1e-6, "atol": 1e-7} if weight else {"rtol": 0, "atol": 0}
    torch.testing.assert_close([p.detach() for p in target.parameters()], expected, **close)


def test_copies_bring_back_what_the_device_says(device: torch.device) -> None:
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]
    tensors = [torch.tensor([1.5, -0.0, 3.0, 0.0]).to(device, kind) for kind in kinds]
    tensors.append(torch.randn(3, 4, 5, 6, device=device).to(memory_format=torch.channels_last))
    first = [x.clone() for x in tensors]
    copies = Copies(tensors)
    for kept in (False, True):
        copies.take()
        for x in tensors:
            x.fill_(float("nan") if x.is_floating_point() else 7)
        spoiled = [x.clone() for x in tensors]
        copies.put_back_unless(torch.tensor(kept, device=device))
        for x, other in zip(tensors, spoiled if kept else first, strict=True):
            assert torch.equal(x.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


@pytest.mark.parametrize("rows", [24, 8])
def test_column_products_in_fp32_both_ways(device: torch.device, rows: int) -> None:
    """Of 40 columns: of 24 rows by the matrix, of 8 by the rows' inner products."""
    x = torch.randn(rows, 40, dtype=torch.float64, device=device)
    found = []
    for dtype in (torch.float32, torch.float64):
        own = x.to(dtype).requires_grad_()
        diagonal, squares = column_products(own, own, rows)
        (gradient,) = torch.autograd.grad(diagonal.sum() + squares, own)
        found.append([part.detach().double() for part in (diagonal, squares, gradient)])
    matrix = x.T @ x / rows
    plain = [matrix.diagonal(), (matrix - matrix.diagonal().diag()).square().sum()]
    torch.testing.assert_close(found[1][:2], plain, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------- batch norm, collectives
def trained_norm(norm: nn.Module, x: Tensor, slope: Tensor) -> list[Tensor]:
    """Output, gradients and running statistics of one training step."""
    norm.train()
    x = x.detach().clone().requires_grad_()
    y = norm(x)
    y.backward(slope)
    parts = [y, x.grad, *(p.grad for p in norm.parameters()), *(b for b in norm.buffers() if b.is_floating_point())]
    return [part.detach() for part in parts]


@pytest.mark.parametrize("shape", [(16, 12), (8, 12, 5, 5)])
def test_our_batch_norm_and_the_converted_one_are_torchs(device: torch.device, shape: tuple[int, ...]) -> None:
    x, slope = torch.randn(2, *shape, device=device)
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    expected = trained_norm(kind(12).to(device), 3 * x + 5, slope)
    others = [distributed._global_batch_norm(kind(12).to(device))]
    if device.type != "cpu":  # torch's raises there; of one rank it is plain batch norm
        others.append(convert_sync_batchnorm(nn.Sequential(kind(12)).to(device))[0])
        assert isinstance(others[1], nn.SyncBatchNorm)
    for other in others:
        torch.testing.assert_close(trained_norm(other, 3 * x + 5, slope), expected, rtol=1e-4, atol=1e-4)


def test_collectives_of_one_rank(device: torch.device) -> None:
    """On a GPU these are NCCL's, and those of the host's tensors gloo's."""
    assert (dist.get_backend(dist.group.WORLD) == "gloo") == (device.type == "cpu")
    for where in {device, torch.device("cpu")}:
        x = torch.randn(4, 3, device=where, requires_grad=True)
        for one in (distributed.all_reduce_sum, distributed.gather, distributed.gather_in_order):
            y = one(x)
            torch.testing.assert_close(y, x)
            (gradient,) = torch.autograd.grad(y.square().sum(), x)
            torch.testing.assert_close(gradient, 2 * x)
        torch.testing.assert_close(distributed.gather_values(x), x[None])
        torch.testing.assert_close(distributed.mean_over_ranks(x), x.detach())
        (rows,) = distributed.gather_rows(x.detach())
        torch.testing.assert_close(rows, x.detach())
    assert distributed.union([3, 1]) == {1, 3}
    assert distributed.gather_json({"a": [1]}) == [{"a": [1]}]
    assert distributed.together(lambda: 7) == 7


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "simclr": lambda a, b: nt_xent_loss(a, b, 0.5),
    "barlow_twins": lambda a, b: barlow_twins_loss(a, b, 0.0051),
    "vicreg": lambda a, b: vicreg_loss(a, b, 25, 25, 1)[0],
}


def embeddings() -> tuple[Tensor, Tensor]:
    z = torch.randn(2, 16, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return z[0], z[0] + 0.5 * z[1]


def of_one_of_two(rank: int, port: int, folder: str, device: str) -> None:
    """What one of two ranks finds, both on one device: NCCL refuses two ranks on a GPU, gloo takes a GPU's tensors."""
    if device == "cuda":
        torch.cuda.set_device(0)
    else:
        torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store, timeout=timedelta(seconds=60))
    found: dict[str, Any] = {}
    mine = slice(rank * 8, rank * 8 + 8)
    for name, loss_of_two in LOSSES.items():
        views = [z[mine].to(device).requires_grad_() for z in embeddings()]
        loss = loss_of_two(*views)
        loss.backward()
        found[name] = [loss.detach().cpu(), *(v.grad.cpu() for v in views if v.grad is not None)]
    torch.manual_seed(2)
    x, slope = torch.randn(2, 16, 12, 5, 5)
    norm = nn.Sequential(nn.BatchNorm2d(12)).to(device)
    norms = {"ours": distributed._global_batch_norm(nn.Sequential(nn.BatchNorm2d(12)).to(device))}
    if device == "cuda":
        norms["torch's"] = convert_sync_batchnorm(norm)
    for name, one in norms.items():
        found[name] = [part.cpu() for part in trained_norm(one, x[mine].to(device), slope[mine].to(device))]
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_on_one_device_are_one(device: torch.device, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=of_one_of_two, args=(rank, port, str(tmp_path), device.type), daemon=True)
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(90)
        assert rank.exitcode == 0
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, loss_of_one in LOSSES.items():
        views = [z.to(device).requires_grad_() for z in embeddings()]
        loss = loss_of_one(*views)
        loss.backward()
        means = torch.stack([one[name][0] for one in found]).mean()
        torch.testing.assert_close(means, loss.detach().cpu(), rtol=1e-9, atol=1e-12)
        for place, view in enumerate(views, start=1):  # backward sums over the ranks, DDP's mean halves it
            rows = torch.cat([one[name][place] for one in found]) / 2
            torch.testing.assert_close(rows, view.grad.cpu(), rtol=1e-8, atol=1e-12)
    torch.manual_seed(2)
    x, slope = torch.randn(2, 16, 12, 5, 5)
    output, gradient, weight, bias, mean, variance = trained_norm(nn.BatchNorm2d(12), x, slope)
    for name in ("ours", "torch's") if device.type == "cuda" else ("ours",):
        both = [one[name] for one in found]
        close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(torch.cat([one[0] for one in both]), output, **close)
        torch.testing.assert_close(torch.cat([one[1] for one in both]), gradient, **close)
        torch.testing.assert_close(sum(one[2] for one in both), weight, **close)
        torch.testing.assert_close(sum(one[3] for one in both), bias, **close)
        for one in both:
            torch.testing.assert_close([one[4], one[5]], [mean, variance], **close)
