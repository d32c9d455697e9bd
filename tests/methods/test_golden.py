"""Losses and gradients against the values of the authors' code, float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ssl_pipeline import distributed, head
from ssl_pipeline.methods import Progress, swav
from ssl_pipeline.methods._momentum import target_momentum
from ssl_pipeline.methods.barlow_twins import barlow_twins_loss, standardize
from ssl_pipeline.methods.byol import byol_loss
from ssl_pipeline.methods.simclr import nt_xent_loss
from ssl_pipeline.methods.simsiam import simsiam_loss
from ssl_pipeline.methods.ssl_hsic import Frequencies, gather_sets, ssl_hsic_loss
from ssl_pipeline.methods.swav import sinkhorn
from ssl_pipeline.methods.vicreg import vicreg_loss
from ssl_pipeline.methods.w_mse import Options as WMSEOptions
from ssl_pipeline.methods.w_mse import w_mse_loss
from tests import golden
from tests.ranks import on_ranks


def w_mse_options(h: dict) -> WMSEOptions:
    return WMSEOptions(name="w_mse", w_size=h["w_size"], w_iter=h["w_iter"], epsilon=h["w_eps"], normalize=h["norm"])


def ssl_hsic_of(v: list[Tensor], entry: dict) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and logs of two predictions and two targets with an entry's own random features."""
    one, two = (Frequencies(*draw) for draw in golden.fourier(entry)[0])
    scale = torch.tensor(entry["hyper"]["c"], dtype=torch.float64)
    return ssl_hsic_loss(gather_sets(v[:2], v[2:]), (one, two), scale, entry["hyper"]["regul_weight"])


# Row a method: prefix of its entries -> (loss of the inputs and hyper-parameters, relative tolerance of the loss).
LOSSES: dict[str, tuple[Callable[..., Tensor], float]] = {
    "ntxent_N": (lambda v, h: nt_xent_loss(v[0], v[1], h["tau"]), 1e-9),
    "ntxent_google_": (lambda v, h: 2 * nt_xent_loss(v[0], v[1], h["tau"]), 1e-7),
    "barlow_": (lambda v, h: barlow_twins_loss(v[0], v[1], h["lambd"]), 1e-9),
    "byol_N": (lambda v, h: byol_loss(*v), 1e-9),
    "byol_jax_": (lambda v, h: byol_loss(*v), 1e-7),
    "simsiam_N": (lambda v, h: simsiam_loss(*v), 1e-9),
    "vicreg_N": (lambda v, h: vicreg_loss(v[0], v[1], h["sim"], h["std"], h["cov"])[0], 1e-9),
    "wmse_": (lambda v, h: w_mse_loss(torch.stack(v), golden.permutations(h["entry"]), w_mse_options(h))[0], 1e-9),
    "hsic_N": (lambda v, h: ssl_hsic_of(v, h["entry"])[0], 1e-7),
}
CASES = [(name, prefix) for prefix in LOSSES for name in golden.select(prefix)]


@pytest.mark.parametrize(("name", "prefix"), CASES)
def test_loss_and_gradients_are_the_authors_own(name: str, prefix: str) -> None:
    entry = golden.entries()[name]
    loss_of, rtol = LOSSES[prefix]
    inputs = golden.views(entry)
    loss = loss_of(inputs, entry["hyper"] | {"entry": entry})
    np.testing.assert_allclose(loss.item(), entry["outputs"]["loss"], rtol=rtol)
    loss.backward()
    checked = 0
    for place, value in enumerate(inputs):
        summary = entry["outputs"].get(f"grad_v{place}")
        if summary is not None and summary["l2"] > 0:
            golden.assert_gradient(value.grad, summary)
            checked += 1
    assert checked >= 2


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


def _of_this_rank() -> dict[str, Any]:
    return {
        "simclr": _simclr_gradients(),
        "barlow": _barlow_gradients(),
        "vicreg": _vicreg_gradients(),
        "sinkhorn": _sinkhorn_of_half(),
    }


@pytest.fixture(scope="module")
def of_two_ranks() -> list[dict[str, Any]]:
    """All at once: processes take longer to start than these to compute."""
    return on_ranks(2, _of_this_rank)


def test_simclr_on_two_ranks_is_the_authors_own(of_two_ranks: list[Any]) -> None:
    outputs = golden.entries()["dist_simclr_W2_n8_D16"]["outputs"]
    ranks = [rank["simclr"] for rank in of_two_ranks]
    np.testing.assert_allclose([r["loss"] for r in ranks], outputs["loss_per_rank"], rtol=1e-9)
    golden.assert_gradient(ranks[0]["v0"], outputs["local_grad_rank0_v0"])
    golden.assert_gradient(ranks[1]["v1"], outputs["local_grad_rank1_v1"])


def test_barlow_twins_on_two_ranks_has_the_exact_gradient_and_its_divisor_the_official_one(
    of_two_ranks: list[Any],
) -> None:
    entry = golden.entries()["dist_barlow_W2_n8_D16"]
    ranks = [rank["barlow"] for rank in of_two_ranks]
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


def _vicreg_gradients() -> dict[str, Tensor]:
    v = _half(golden.entries()["dist_vicreg_W2_n8_D16"])
    loss, _ = vicreg_loss(v[0], v[1], 25, 25, 1)
    loss.backward()
    return {"loss": loss.detach(), "v0": v[0].grad, "v1": v[1].grad}


def test_vicreg_on_two_ranks_is_the_authors_own_and_the_gradient_of_one_rank(of_two_ranks: list[Any]) -> None:
    entry = golden.entries()["dist_vicreg_W2_n8_D16"]
    outputs = entry["outputs"]
    ranks = [rank["vicreg"] for rank in of_two_ranks]
    np.testing.assert_allclose([r["loss"] for r in ranks], outputs["loss_per_rank"], rtol=1e-9)
    golden.assert_gradient(ranks[0]["v0"], outputs["local_grad_rank0_v0"])
    golden.assert_gradient(ranks[1]["v1"], outputs["local_grad_rank1_v1"])
    whole = golden.views(entry)
    loss, _ = vicreg_loss(whole[0], whole[1], 25, 25, 1)
    loss.backward()
    np.testing.assert_allclose(loss.item(), outputs["loss_single_process"], rtol=1e-9)
    assert outputs["ddp_effective_scale"] == [1.0, 1.0]
    for rank, found in enumerate(ranks):  # DDP's mean divides by the two ranks
        for place in range(2):
            own = whole[place].grad[rank * 8 : rank * 8 + 8]
            torch.testing.assert_close(found[f"v{place}"] / 2, own, rtol=1e-10, atol=1e-14)


def test_vicregs_terms_are_their_definitions() -> None:
    z1, z2 = torch.randn(2, 12, 5, dtype=torch.float64) * torch.linspace(0.1, 2, 5, dtype=torch.float64)
    _, terms = vicreg_loss(z1, z2, 25, 25, 1)
    covariances = [torch.cov(z.T) for z in (z1, z2)]
    off = [matrix - torch.diag(matrix.diag()) for matrix in covariances]
    spread = [(1 - (matrix.diag() + 1e-4).sqrt()).clamp(min=0) for matrix in covariances]
    assert min(s.min() for s in spread) == 0 < max(s.max() for s in spread)  # the hinge is passed and not passed
    torch.testing.assert_close(terms["invariance"], (z1 - z2).square().sum() / 60)
    torch.testing.assert_close(terms["variance"], torch.stack(spread).mean())
    torch.testing.assert_close(terms["covariance"], torch.stack(off).square().sum() / 5)


def _scores(entry: dict) -> Tensor:
    recipe = entry["inputs"]["recipe"]
    scores = np.tanh(np.random.default_rng(recipe["seed"]).standard_normal((recipe["B"], recipe["K"])))
    for check in entry["inputs"].get("check", []):
        np.testing.assert_allclose(scores.sum(), check["sum"], rtol=1e-10)
    return torch.from_numpy(scores)


@pytest.mark.parametrize("name", golden.select("sinkhorn_"))
def test_sinkhorn_is_the_authors_own(name: str) -> None:
    entry = golden.entries()[name]
    hyper, outputs = entry["hyper"], entry["outputs"]
    found = sinkhorn(_scores(entry), hyper["epsilon"], hyper["iterations"])
    golden.assert_gradient(found, outputs["q"])
    sums = found.sum(dim=1)
    np.testing.assert_allclose([sums.min(), sums.max()], outputs["row_sums_minmax"], rtol=1e-9)
    np.testing.assert_allclose(found.sum(dim=0)[:6], outputs["col_sums_first6"], rtol=1e-9)
    if outputs["q_full"] is not None:
        np.testing.assert_allclose(found, outputs["q_full"], rtol=1e-9)


def _sinkhorn_of_half() -> Tensor:
    entry = golden.entries()["dist_sinkhorn_W2_n8_K11"]
    mine = _scores(entry)[distributed.rank() * 8 : distributed.rank() * 8 + 8]
    return sinkhorn(mine, entry["hyper"]["epsilon"], entry["hyper"]["iterations"])


def test_sinkhorn_on_two_ranks_is_the_authors_own(of_two_ranks: list[Any]) -> None:
    entry = golden.entries()["dist_sinkhorn_W2_n8_K11"]
    ranks = [rank["sinkhorn"] for rank in of_two_ranks]
    for rank, found in enumerate(ranks):
        golden.assert_gradient(found, entry["outputs"][f"q_rank{rank}"])
    whole = sinkhorn(_scores(entry), entry["hyper"]["epsilon"], entry["hyper"]["iterations"])
    torch.testing.assert_close(torch.cat(ranks), whole, rtol=1e-12, atol=1e-15)


SWAV = [name for name in golden.select("swav_") if golden.entries()[name]["kind"] == "loss"]


@pytest.mark.parametrize("name", SWAV)
def test_swav_with_its_queue_is_the_authors_own(name: str) -> None:
    """The method itself, on a backbone and a head that change nothing."""
    entry = golden.entries()[name]
    hyper, inputs, outputs = entry["hyper"], entry["inputs"], entry["outputs"]
    recipe, count = inputs["recipe"], sum(hyper["nmb_crops"])
    views = golden.views({**entry, "inputs": {**inputs, "check": inputs["check"][:count]}})
    rng = np.random.default_rng(recipe["seed"] + 500)
    assert f"default_rng({recipe['seed'] + 500})" in inputs["proto_recipe"]
    prototypes = rng.standard_normal((int(name.split("_K")[1].split("_")[0]), recipe["D"]))
    np.testing.assert_allclose(prototypes.ravel()[:2], inputs["check"][count]["first"], rtol=1e-12)
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)

    options = swav.Options(
        name="swav", prototypes=len(prototypes), temperature=hyper["temperature"], epsilon=hyper["epsilon"],
        sinkhorn_iterations=hyper["iterations"], queue_length=hyper["queue_length"], queue_start_epoch=0,
    )  # fmt: skip
    method = swav.Method(options, nn.Identity(), head.ProjectionHead(head.Options(kind="identity"), recipe["D"]))
    method = method.double()
    with torch.no_grad():
        method.prototypes.weight.copy_(torch.from_numpy(prototypes))
        if hyper["queue_length"]:
            queue = rng.standard_normal(tuple(method.queue.shape))
            method.queue.copy_(torch.from_numpy(queue / np.linalg.norm(queue, axis=2, keepdims=True)))
    method.before_forward(Progress(step=50, steps=100, epoch=5, epochs=10))
    loss = method(views).loss
    loss.backward()
    np.testing.assert_allclose(loss.item(), outputs["loss"], rtol=1e-9)
    for place, view in enumerate(views):
        golden.assert_gradient(view.grad, outputs["grad_embeddings_pre_norm"][f"v{place}"])
    golden.assert_gradient(method.prototypes.weight.grad, outputs["grad_prototypes"])
    assert (outputs["queue_after"] is not None) == bool(hyper["queue_length"])
    if outputs["queue_after"] is not None:
        golden.assert_gradient(method.queue, outputs["queue_after"])
