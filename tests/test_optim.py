import numpy as np
import pytest
import torch
from torch import nn

from ssl_pipeline import optim
from tests import golden


def fixed_run(entry: dict, exclude_1d: bool) -> dict[str, np.ndarray]:
    """Five steps with the entry's gradients on W (6, 5), b (6) and Z (3, 4)."""
    # BYOL's entries have the same inputs as Barlow Twins' of the same number.
    hyper, recipe = entry["hyper"], golden.entries()[f"lars_barlowtwins_{entry['id'][-1]}"]["inputs"]["recipe"]
    rng = np.random.default_rng(int(recipe.split("default_rng(")[1].split(")")[0]))
    p = {"W": rng.standard_normal((6, 5)), "b": rng.standard_normal(6), "Z": np.zeros((3, 4))}
    p = {name: nn.Parameter(torch.from_numpy(value)) for name, value in p.items()}
    groups = [
        {"params": [p["W"], p["Z"]], "name": "matrices", "decay": True, "adapt": True, "lr": "scheduled"},
        {"params": [p["b"]], "name": "vectors", "decay": False, "adapt": False, "lr": "scheduled"},
    ]
    options = optim.Options(
        name="lars",
        learning_rate=hyper["lr"],
        weight_decay=hyper["wd"],
        momentum=hyper["mom"],
        trust_coefficient=hyper["eta"],
        exclude_1d=exclude_1d,
    )
    optimizer = optim.build(groups, options, batch_size=256)
    for _ in range(5):
        for name in ("W", "b", "Z"):
            p[name].grad = torch.from_numpy(rng.standard_normal(p[name].shape))
        optimizer.grad_scale, optimizer.found_inf = None, torch.zeros(())
        optimizer.step()
    return {name: value.detach().numpy() for name, value in p.items()}


@pytest.mark.parametrize("name", golden.select("lars_barlowtwins_") + golden.select("lars_byol_"))
def test_lars_is_the_authors_own(name: str) -> None:
    entry = golden.entries()[name]
    found = fixed_run(entry, entry["hyper"].get("exclude_1d", True))
    for key, value in found.items():
        np.testing.assert_allclose(value, np.array(entry["outputs"][key]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", golden.select("lr_barlow_") + golden.select("lr_vicreg_"))
def test_warmup_cosine_is_barlow_twins(name: str) -> None:
    entry = golden.entries()[name]
    h = entry["hyper"]
    (rows,) = entry["outputs"].values()
    options = optim.Options(scale_with_batch=True, learning_rate=h["lw"], learning_rate_1d=h["lb"],
                            warmup_epochs=h["warmup_epochs"], final_factor=h["end_factor"])  # fmt: skip
    for step, weights, *biases in rows:
        factor = optim.rate_factor(options, int(step), h["n"], h["epochs"])
        np.testing.assert_allclose(optim.base_rate(options, h["batch"]) * factor, weights, rtol=1e-9)
        for rate in biases:
            np.testing.assert_allclose(optim.base_rate(options, h["batch"], h["lb"]) * factor, rate, rtol=1e-9)


@pytest.mark.parametrize("name", golden.select("lr_byol_"))
def test_warmup_cosine_is_byol(name: str) -> None:
    entry = golden.entries()[name]
    h = entry["hyper"]
    for step, rate in entry["outputs"]["step_lr"]:
        found = h["base_lr"] * h["batch"] / 256 * optim.warmup_cosine(int(step), h["total_steps"], h["warmup_steps"])
        np.testing.assert_allclose(found, rate, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", golden.select("lr_htdt_"))
def test_drops_are_the_small_data_protocol(name: str) -> None:
    entry = golden.entries()[name]
    h = entry["hyper"]
    options = optim.Options(learning_rate=h["lr"], schedule="drops", warmup_steps=h["warmup_iters"],
                            drop_epochs=h["drop"], drop_factor=h["gamma"])  # fmt: skip
    per_epoch = h["iters_per_epoch"]
    for epoch, step, rate in entry["outputs"]["epoch_iter_lr"]:
        factor = optim.rate_factor(options, int(epoch) * per_epoch + int(step), per_epoch, h["epochs"])
        np.testing.assert_allclose(h["lr"] * factor, rate, rtol=1e-9)


def model_and_groups() -> tuple[nn.Module, list[dict]]:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return model, [
        {"params": matrices, "name": "matrices", "decay": True, "adapt": True, "lr": "scheduled"},
        {"params": vectors, "name": "vectors", "decay": False, "adapt": False, "lr": 0.5},
    ]


@pytest.mark.parametrize("name", ["lars", "sgd", "adam", "adamw"])
def test_a_step_with_found_inf_changes_no_bit(name: str) -> None:
    model, groups = model_and_groups()
    optimizer = optim.build(groups, optim.Options(name=name, learning_rate=0.1), 256)

    def step(bad: bool) -> None:
        for p in model.parameters():
            p.grad = torch.full_like(p, float("nan") if bad else 1.0)
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(float(bad))
        optimizer.step()

    def everything() -> list[torch.Tensor]:
        state = [v for s in optimizer.state.values() for v in s.values()]
        return [v.detach().clone() for v in [*model.parameters(), *state]]

    for _ in range(2):  # the first step, where buffers are new, and a later one
        before = everything()
        step(bad=True)
        if len(before) == len(everything()):
            assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
        else:  # adam makes its state in the first step: zeros
            assert all(v.abs().sum() == 0 for v in everything()[len(list(model.parameters())) :])
        step(bad=False)
        assert all(torch.isfinite(v).all() for v in everything())
        assert any(not torch.equal(a, b) for a, b in zip(before, everything(), strict=False))


def test_rates_by_group_constant_and_scaled() -> None:
    _, groups = model_and_groups()
    optimizer = optim.build(groups, optim.Options(name="sgd", learning_rate=0.2, scale_with_batch=True), 1024)
    assert optim.set_rates(optimizer, 0.5) == {"matrices": 0.4, "vectors": 0.5}


def test_barlow_twins_biases_have_a_rate_of_their_own_and_no_decay() -> None:
    _, groups = model_and_groups()
    groups[1]["lr"] = "scheduled"
    options = optim.Options(name="lars", learning_rate=0.2, learning_rate_1d=0.0048, weight_decay=1e-6)
    optimizer = optim.build(groups, options, 256)
    assert optim.set_rates(optimizer, 1.0) == {"matrices": 0.2, "vectors": 0.0048}
    assert [(g["decay"], g["adapt"]) for g in optimizer.param_groups] == [(1e-6, True), (0.0, False)]
