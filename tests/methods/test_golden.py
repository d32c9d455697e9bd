"""Losses and gradients against the values of the authors' code, float64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ssl_pipeline import distributed
from ssl_pipeline.methods.barlow_twins import barlow_twins_loss, standardize
from ssl_pipeline.methods.byol import byol_loss, target_momentum
from ssl_pipeline.methods.simclr import nt_xent_loss
from tests import golden
from tests.ranks import on_ranks

# Row a method: prefix of its entries -> (loss of the inputs and hyper-parameters, relative tolerance of the loss).
LOSSES: dict[str, tuple[Callable[..., Tensor], float]] = {
    "ntxent_N": (lambda v, h: nt_xent_loss(v[0], v[1], h["tau"]), 1e-9),
    "ntxent_google_": (lambda v, h: 2 * nt_xent_loss(v[0], v[1], h["tau"]), 1e-7),
    "barlow_": (lambda v, h: barlow_twins_loss(v[0], v[1], h["lambd"]), 1e-9),
    "byol_N": (lambda v, h: byol_loss(*v), 1e-9),
    "byol_jax_": (lambda v, h: byol_loss(*v), 1e-7),
}
CASES = [(name, prefix) for prefix in LOSSES for name in golden.select(prefix)]


@pytest.mark.parametrize(("name", "prefix"), CASES)
def test_loss_and_gradients_are_the_authors_own(name: str, prefix: str) -> None:
    entry = golden.entries()[name]
    loss_of, rtol = LOSSES[prefix]
    inputs = golden.views(entry)
    loss = loss_of(inputs, entry["hyper"])
    np.testing.assert_allclose(loss.item(), entry["outputs"]["loss"], rtol=rtol)
    loss.backward()
    checked = 0
    for place, value in enumerate(inputs):
        summary = entry["outputs"].get(f"grad_v{place}")
        if summary is not None and summary["l2"] > 0:
            golden.assert_gradient(value.grad, summary)
            checked += 1
    assert checked >= 2


def test_every_entry_of_these_methods_is_checked() -> None:
    known = {name for name, entry in golden.entries().items() if entry["method"] in ("simclr", "byol", "barlow_twins")}
    losses = {name for name in known if golden.entries()[name]["kind"] == "loss"}
    print(f"{len(CASES)} golden losses checked")
    assert losses == {name for name, _ in CASES}


@pytest.mark.parametrize("name", golden.select("ema_"))
def test_target_momentum_is_the_authors_own(name: str) -> None:
    entry = golden.entries()[name]
    hyper = entry["hyper"]
    (rows,) = entry["outputs"].values()
    for done, momentum in rows:
        whole = hyper.get("epochs", hyper.get("max_steps"))
        np.testing.assert_allclose(target_momentum(hyper["base"], done, whole), momentum, rtol=1e-12)


def _half(entry: dict) -> list[Tensor]:
    rank = distributed.rank()
    return [v.detach()[rank * 8 : rank * 8 + 8].requires_grad_() for v in golden.views(entry)]


def _simclr_gradients() -> dict[str, Tensor]:
    v = _half(golden.entries()["dist_simclr_W2_n8_D16"])
    loss = nt_xent_loss(v[0], v[1], 0.5)
    loss.backward()
    return {"loss": loss.detach(), "v0": v[0].grad, "v1": v[1].grad}


def _barlow_gradients() -> dict[str, Tensor]:
    v = _half(golden.entries()["dist_barlow_W2_n8_D16"])
    loss = barlow_twins_loss(v[0], v[1], 0.0051)
    loss.backward()
    return {"loss": loss.detach(), "v0": v[0].grad, "v1": v[1].grad}


def test_simclr_on_two_ranks_is_the_authors_own() -> None:
    outputs = golden.entries()["dist_simclr_W2_n8_D16"]["outputs"]
    ranks = on_ranks(2, _simclr_gradients)
    np.testing.assert_allclose([r["loss"] for r in ranks], outputs["loss_per_rank"], rtol=1e-9)
    golden.assert_gradient(ranks[0]["v0"], outputs["local_grad_rank0_v0"])
    golden.assert_gradient(ranks[1]["v1"], outputs["local_grad_rank1_v1"])


def test_barlow_twins_on_two_ranks_has_the_exact_gradient_and_its_divisor_the_official_one() -> None:
    entry = golden.entries()["dist_barlow_W2_n8_D16"]
    ranks = on_ranks(2, _barlow_gradients)
    whole = golden.views(entry)
    loss = barlow_twins_loss(whole[0], whole[1], 0.0051)
    loss.backward()
    np.testing.assert_allclose([r["loss"] for r in ranks], entry["outputs"]["loss_per_rank"], rtol=1e-9)
    # Backward sums over ranks, so a rank's part is W times its rows of the true gradient; DDP's mean undoes the W.
    for rank, found in enumerate(ranks):
        torch.testing.assert_close(found["v0"] / 2, whole[0].grad[rank * 8 : rank * 8 + 8], rtol=1e-10, atol=1e-14)
    # The official code's scale after DDP is 1 / W: gradient_divisor = W reproduces it.
    assert entry["outputs"]["ddp_effective_scale"] == [0.5, 0.5]


def test_standardize_is_batch_norm_without_affine() -> None:
    z = torch.randn(12, 5, dtype=torch.float64)
    expected = torch.nn.BatchNorm1d(5, affine=False).double()(z)
    torch.testing.assert_close(standardize(z), expected, rtol=1e-12, atol=1e-12)
