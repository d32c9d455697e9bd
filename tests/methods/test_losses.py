"""Losses that never make their largest matrix, against formulas that do: one rank and two, few rows and many, float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssl_pipeline import distributed
from ssl_pipeline.methods import participation_ratio, simclr, w_mse
from ssl_pipeline.methods._column_products import column_products
from ssl_pipeline.methods.barlow_twins import barlow_twins_loss
from ssl_pipeline.methods.ssl_hsic import draw_frequencies, fourier_features, gather_sets, ssl_hsic_loss
from ssl_pipeline.methods.vicreg import vicreg_loss
from tests.ranks import on_ranks

Views = Callable[[Tensor, Tensor], Tensor]


# ------------------------------------------------------------------------------------------------- with the big matrix
def plain_nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    anchors = F.normalize(torch.cat([z1, z2]), dim=1)
    rows = len(z1)
    logits = (anchors @ anchors.T / temperature).fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, torch.cat([torch.arange(rows) + rows, torch.arange(rows)]))


def plain_barlow_twins(z1: Tensor, z2: Tensor) -> Tensor:
    one, two = ((z - z.mean(dim=0)) / (z.var(dim=0, unbiased=False) + 1e-5).sqrt() for z in (z1, z2))
    matrix = one.T @ two / len(one)
    diagonal = matrix.diagonal()
    return (diagonal - 1).square().sum() + 0.01 * (matrix - torch.diag(diagonal)).square().sum()


def plain_vicreg(z1: Tensor, z2: Tensor) -> Tensor:
    loss = 25 * F.mse_loss(z1, z2)
    for z in (z1, z2):
        matrix = torch.cov(z.T)
        variances = matrix.diagonal()
        covariance = (matrix - torch.diag(variances)).square().sum() / len(variances)
        loss = loss + 10 * F.relu(1 - (variances + 1e-4).sqrt()).mean() / 2 + covariance
    return loss


def plain_ssl_hsic(z1: Tensor, z2: Tensor) -> Tensor:
    hidden = F.normalize(torch.stack([z1, z2, z2.detach(), z1.detach()]), dim=2)
    one, two = (fourier_features(hidden, draw, torch.tensor(0.8)).flatten(0, 1) for draw in draws(z1.shape[1]))
    inner = (one @ one.T).unflatten(0, (4, -1)).unflatten(2, (4, -1))
    same = inner.diagonal(dim1=1, dim2=3).sum() / (len(one) * 3)
    xy = same - inner.sum() / len(one) ** 2
    xx = torch.linalg.matrix_norm((one - one.mean(dim=0)).T @ (two - two.mean(dim=0))) / len(one)
    return 3 * xx - xy


def plain_w_mse(z1: Tensor, z2: Tensor, w_size: int) -> Tensor:
    parts = []
    for order in orders(len(z1)):
        for places in order.split(w_size):
            white = []
            for z in (z1[places], z2[places]):
                centred = z - z.mean(dim=0)
                white.append(F.normalize(centred @ torch.linalg.inv(torch.linalg.cholesky(centred.T.cov())).T, dim=1))
            parts.append((white[0] - white[1]).square().sum(dim=1).mean())
    return torch.stack(parts).mean()


def draws(dimension: int) -> list[Any]:
    generator = torch.Generator().manual_seed(5)
    return [draw_frequencies(30, dimension, generator) for _ in range(2)]


def orders(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.stack([torch.randperm(batch, generator=generator) for _ in range(3)])


def ours_ssl_hsic(z1: Tensor, z2: Tensor) -> Tensor:
    one, two = draws(z1.shape[1])
    return ssl_hsic_loss(gather_sets([z1, z2], [z2, z1]), (one, two), torch.tensor(0.8), 3.0)[0]


def ours_w_mse(z1: Tensor, z2: Tensor, w_size: int) -> Tensor:
    places = orders(len(z1) * distributed.world_size())
    return w_mse.w_mse_loss(torch.stack([z1, z2]), places, w_mse.Options(name="w_mse", w_size=w_size))[0]


PAIRS: dict[str, tuple[Views, Views]] = {
    "NT-Xent": (lambda a, b: simclr.nt_xent_loss(a, b, 0.2), lambda a, b: plain_nt_xent(a, b, 0.2)),
    "Barlow Twins": (lambda a, b: barlow_twins_loss(a, b, 0.01), plain_barlow_twins),
    "VICReg": (lambda a, b: vicreg_loss(a, b, 25, 10, 1)[0], plain_vicreg),
    "SSL-HSIC": (ours_ssl_hsic, plain_ssl_hsic),
    "W-MSE": (lambda a, b: ours_w_mse(a, b, 8), lambda a, b: plain_w_mse(a, b, 8)),
    "W-MSE, fewer slices than ranks": (lambda a, b: ours_w_mse(a, b, 24), lambda a, b: plain_w_mse(a, b, 24)),
}
# Rows of the global batch and dimensions: on either side of where products of columns are made by rows.
SHAPES = [(2, 3), (2, 40), (6, 11), (16, 5), (24, 47), (24, 48), (24, 49), (24, 100)]
CASES = [
    *((name, shape) for name in ("NT-Xent", "Barlow Twins", "VICReg") for shape in SHAPES),
    ("SSL-HSIC", (16, 5)),
    ("SSL-HSIC", (24, 48)),
    ("W-MSE", (48, 3)),
    ("W-MSE, fewer slices than ranks", (24, 5)),
]
BLOCKS = {"one block": 2**20, "blocks of 7": 49, "blocks of 1": 2}


def views(shape: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(shape[0] + shape[1])
    z = torch.randn(2, *shape, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, shape[1]) + 2
    z[1] += 0.7 * z[0]
    if shape[1] > 40:
        z[:, :, 1] = 3.0  # a dead column
    return z


def of_this_rank(loss: Views, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The mean over ranks of the loss, and the gradient by this rank's rows of every W, as DDP's mean would have it."""
    own = views(shape)[:, distributed.rank() :: distributed.world_size()].clone().requires_grad_()
    value = loss(*own)
    (gradient,) = torch.autograd.grad(value, own)
    return distributed.mean_over_ranks(value), gradient / distributed.world_size()


def all_cases() -> dict[str, Any]:
    found = {}
    for name, shape in CASES:
        for blocks in BLOCKS if name == "NT-Xent" else ["one block"]:
            with mock.patch.object(simclr, "block_size", lambda _, blocks=blocks: BLOCKS[blocks]):
                found[f"{name} {shape} {blocks}"] = of_this_rank(PAIRS[name][0], shape)
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """Of one rank, and of two."""
    return [all_cases(), *on_ranks(2, all_cases)]


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_loss_and_gradient_are_those_of_the_whole_matrix(
    name: str, shape: tuple[int, int], found: list[dict[str, Any]]
) -> None:
    whole = views(shape).requires_grad_()
    expected = PAIRS[name][1](*whole)
    expected.backward()
    assert whole.grad is not None
    for blocks in BLOCKS if name == "NT-Xent" else ["one block"]:
        for number, of_a_rank in enumerate(found):
            value, gradient = of_a_rank[f"{name} {shape} {blocks}"]
            rows = whole.grad if number == 0 else whole.grad[:, number - 1 :: 2]
            torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(gradient, rows, rtol=1e-9, atol=1e-10 * float(rows.abs().max()))


@pytest.mark.parametrize("same", [False, True])
def test_both_ways_of_column_products_are_one(same: bool) -> None:
    """Columns of zeros change nothing but the way that is taken."""

    def of_width(more: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, y = (torch.randn(16, 12, dtype=torch.float64, generator=generator) for _ in range(2))
        inputs = [F.pad(part, (0, more)).requires_grad_() for part in ([x] if same else [x, y])]
        diagonal, squares = column_products(inputs[0], inputs[-1], 5)
        gradients = torch.autograd.grad(diagonal.pow(3).sum() + 2 * squares, inputs)
        return [squares, *(part[..., :12] for part in (diagonal, *gradients))]

    for one, other in zip(of_width(0), of_width(40), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert 52 * 52 not in sizes_made(lambda: of_width(40))


def test_a_sum_of_squares_is_never_negative() -> None:
    """One column alone is left, as in a collapse: what is taken out by subtraction is all there is."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x = F.pad(torch.randn(16, 1, generator=generator), (0, 39)).requires_grad_()
        diagonal, squares = column_products(x, x, 15)
        assert 0 <= squares <= 1e-5 * diagonal.square().sum()
        (gradient,) = torch.autograd.grad(squares, x)
        assert gradient.norm() <= 1e-5 * diagonal.norm() * x.norm()


# ------------------------------------------------------------------------------------------- what is made, and what is not
class Sizes(TorchDispatchMode):
    """Collects the number of elements of each tensor that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found += [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return result


def sizes_made(action: Callable[[], object]) -> list[int]:
    with Sizes() as sizes:
        action()
    return sizes.found


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simclr, "block_size", lambda device: 2**10)


def test_similarities_are_held_a_block_at_a_time(small_blocks: None) -> None:
    inputs = torch.randn(2, 200, 4, requires_grad=True)
    assert max(sizes_made(lambda: simclr.nt_xent_loss(*inputs, 0.1).backward())) <= inputs.numel()
    assert max(sizes_made(lambda: plain_nt_xent(*inputs, 0.1).backward())) == 400**2


def test_without_gradient_similarities_are_computed_once(small_blocks: None) -> None:
    inputs = torch.randn(2, 200, 4, requires_grad=True)

    def products(action: Callable[[], object]) -> int:
        return sizes_made(action).count(2**10)

    with torch.no_grad():
        once = products(lambda: simclr.nt_xent_loss(*inputs, 0.1))
    assert products(lambda: simclr.nt_xent_loss(*inputs, 0.1)) >= 2 * once > 0


@pytest.mark.parametrize("shape", [(100, 4), (4, 100)])
def test_the_effective_rank_makes_the_smaller_matrix(shape: tuple[int, int]) -> None:
    assert max(sizes_made(lambda: participation_ratio(torch.randn(shape)))) == 400


def test_a_low_temperature_in_fp32() -> None:
    """The bound of the option: similarities of 1 and -1, whose exponentials are the largest and least."""
    z = F.normalize(torch.randn(1, 8), dim=1).expand(64, 8)
    one, two = torch.cat([z, -z]), torch.cat([z, z])
    for inputs in ((one, two), (one, one)):
        leaves = [part.clone().requires_grad_() for part in inputs]
        exact = [part.double().requires_grad_() for part in inputs]
        loss, expected = simclr.nt_xent_loss(*leaves, 0.02), plain_nt_xent(*exact, 0.02)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-4)
        loss.backward()
        assert all(part.grad.isfinite().all() for part in leaves)


@pytest.fixture
def collectives(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of those that are made from here on."""
    made: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(distributed.dist, "all_reduce", noted("all_reduce", distributed.dist.all_reduce))
    for name in ("_all_gather", "_reduce_scatter"):
        monkeypatch.setattr(distributed, name, noted(name, getattr(distributed, name)))
    return made


@pytest.mark.parametrize(
    ("name", "shape", "forward", "backward"),
    [
        ("NT-Xent", (8, 4), ["_all_gather"] * 2, []),
        ("Barlow Twins", (8, 4), ["all_reduce"] * 4, ["all_reduce"] * 2),  # those of the standardisation
        ("Barlow Twins", (8, 40), ["all_reduce"] * 3 + ["_all_gather"] * 2 + ["all_reduce"], ["all_reduce"] * 2),
        ("VICReg", (8, 4), ["all_reduce"] * 6, []),
        ("VICReg", (8, 40), (["all_reduce"] * 2 + ["_all_gather", "all_reduce"]) * 2, []),
        ("SSL-HSIC", (8, 4), ["all_reduce"] * 3, []),
        ("W-MSE", (16, 4), ["_all_gather", "all_reduce"], ["_reduce_scatter"]),
    ],
)
def test_collectives_of_a_loss(
    name: str, shape: tuple[int, int], forward: list[str], backward: list[str], collectives: list[str]
) -> None:
    loss = PAIRS[name][0](*views(shape).requires_grad_())
    assert collectives == forward
    collectives.clear()
    loss.backward()
    assert collectives == backward
