import numpy as np
import pytest
import torch
from torch import nn

from ssl_pipeline import optim
from tests import golden


def fixed_run(entry: dict, exclude_1d: bool, optimizer_name: str = "lars") -> dict[str, np.ndarray]:
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
        name=optimizer_name,
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


@pytest.mark.parametrize("name", golden.select("larc_apex_") + golden.select("lars_timm_"))
def test_larc_is_the_authors_own(name: str) -> None:
    """apex's on biases too; timm's without them."""
    entry = golden.entries()[name]
    found = fixed_run(entry, entry["hyper"]["exclude_1d"], "larc")
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


@pytest.mark.parametrize("name", golden.select("lr_swav_"))
def test_inclusive_warmup_is_swav(name: str) -> None:
    entry = golden.entries()[name]
    h = entry["hyper"]
    options = optim.Options(learning_rate=h["base_lr"], warmup_epochs=h["warmup_epochs"],
                            warmup_start_factor=h["start_warmup"] / h["base_lr"], warmup_inclusive=True,
                            final_factor=h["final_lr"] / h["base_lr"])  # fmt: skip
    for step, rate in entry["outputs"]["step_lr"]:
        factor = optim.rate_factor(options, int(step), h["iters_per_epoch"], h["epochs"])
        np.testing.assert_allclose(optim.base_rate(options, 4096) * factor, rate, rtol=1e-9, atol=1e-15)
    # The base rate stands twice: at the end of the warm-up and at the cosine's start.
    last = h["warmup_epochs"] * h["iters_per_epoch"] - 1
    factors = [optim.rate_factor(options, step, h["iters_per_epoch"], h["epochs"]) for step in (last, last + 1)]
    assert factors == [1.0, 1.0]


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


@pytest.mark.parametrize("name", golden.select("lr_simsiam_"))
def test_the_cosine_of_epochs_and_the_predictors_constant_rate_are_simsiams(name: str) -> None:
    entry = golden.entries()[name]
    h = entry["hyper"]
    options = optim.Options(
        name="sgd", learning_rate=h["base_lr"], scale_with_batch=True, warmup_epochs=0, cosine_per="epoch"
    )
    groups = [
        {"params": [nn.Parameter(torch.zeros(2))], "name": part, "decay": True, "adapt": True, "lr": lr}
        for part, lr in (("encoder", "scheduled"), ("predictor", "constant"))
    ]
    optimizer = optim.build(groups, options, h["batch"])
    for epoch, encoder, predictor in entry["outputs"]["epoch_lrEncoder_lrPredictor"]:
        for step in (0, 4):  # the first and the last of an epoch of five
            factor = optim.rate_factor(options, int(epoch) * 5 + step, 5, h["epochs"])
            found = optim.set_rates(optimizer, factor)
            np.testing.assert_allclose([found["encoder"], found["predictor"]], [encoder, predictor], rtol=1e-9)


def model_and_groups() -> tuple[nn.Module, list[dict]]:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return model, [
        {"params": matrices, "name": "matrices", "decay": True, "adapt": True, "lr": "scheduled"},
        {"params": vectors, "name": "vectors", "decay": False, "adapt": False, "lr": 0.5},
    ]


@pytest.mark.parametrize("name", ["lars", "larc", "sgd", "adam", "adamw"])
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


def test_a_constant_group_of_biases_keeps_the_biases_rate() -> None:
    _, groups = model_and_groups()
    groups[1] |= {"lr": "constant", "name": "predictor_vectors"}
    options = optim.Options(name="sgd", learning_rate=0.2, learning_rate_1d=0.1, scale_with_batch=True)
    optimizer = optim.build(groups, options, 512)
    assert optim.set_rates(optimizer, 0.5) == {"matrices": 0.2, "predictor_vectors": 0.2}
    assert optim.set_rates(optimizer, 0.25) == {"matrices": 0.1, "predictor_vectors": 0.2}


def larc_of_one(weight: torch.Tensor, gradient: torch.Tensor | None, options: optim.Options) -> torch.Tensor:
    """The weight after one step."""
    p = nn.Parameter(weight.clone())
    group = {"params": [p], "name": "matrices", "decay": True, "adapt": True, "lr": "scheduled"}
    optimizer = optim.build([group], options, 256)
    p.grad = gradient
    optimizer.grad_scale, optimizer.found_inf = None, torch.zeros(())
    optimizer.step()
    return p.detach()


def test_larc_neither_scales_nor_decays_zeros_and_leaves_what_has_no_gradient() -> None:
    options = optim.Options(name="larc", learning_rate=1.0, weight_decay=0.5, exclude_1d=False)
    ones, zeros = torch.ones(2, 2), torch.zeros(2, 2)
    torch.testing.assert_close(larc_of_one(ones, zeros.clone(), options), ones)
    torch.testing.assert_close(larc_of_one(ones, None, options), ones)
    torch.testing.assert_close(larc_of_one(zeros, ones.clone(), options), -ones)
    # ||w|| = ||g|| = 2: 1 - 0.001 * 2 / (2 + 0.5 * 2 + 1e-8) * (1 + 0.5)
    torch.testing.assert_close(larc_of_one(ones, ones.clone(), options), 0.999 * ones)
    # Under LARS a gradient of zeros leaves the decay.
    lars = options.model_copy(update={"name": "lars"})
    assert not torch.equal(larc_of_one(ones, zeros.clone(), lars), ones)


def test_a_warmup_that_only_the_cosine_has_is_refused_elsewhere() -> None:
    assert optim.warmup_cosine(0, 10, 1, start_factor=0.5, inclusive=True) == 0.5  # a warm-up of one step
    for values in ({"warmup_start_factor": 0.1}, {"warmup_inclusive": True}):
        with pytest.raises(ValueError, match=r"are the cosine's and schedule = drops has a warm-up of its own"):
            optim.Options(schedule="drops", **values)
