import copy
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ssl_pipeline import optim, pretrain
from ssl_pipeline.exits import BadInput, Status
from tests import golden, test_pretrain


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


@pytest.mark.parametrize("name", ["lars", "larc", "sgd", "adam", "adamw", "lamb"])
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


# --------------------------------------------------------------------------------------------------- blocks and layouts
SIZES = [(3,), (7,), (8,), (9,), (31,), (4, 4), (2, 3, 3, 5), (1,), (6, 5, 1, 1), (0,)]
"""Smaller than a block of 8 numbers, equal to it, larger; several to a block; nothing."""


def authors(
    larc: bool, w: torch.Tensor, g: torch.Tensor, buffer: torch.Tensor, adapt: bool, decay: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and buffer after a step of rate 0.3, momentum 0.9, eta 0.02, as facebookresearch/barlowtwins main.py:LARS and
    NVIDIA/apex apex/parallel/LARC.py write them: tensor by tensor."""
    size, slope = w.norm().item(), g.norm().item()
    d = g + decay * w
    if adapt and not larc and size > 0 and d.norm().item() > 0:
        d = d * (0.02 * size / d.norm().item())
    if adapt and larc and size > 0:
        d = d * (0.02 * size / (slope + decay * size + 1e-8)) if slope > 0 else torch.zeros_like(d)
    buffer = 0.9 * buffer + d
    return w - 0.3 * buffer, buffer


def strange(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, lying otherwise in memory."""
    if layout == "channels_last" and values.ndim == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "every second":
        return torch.stack([values, values], dim=-1)[..., 0]
    return values.contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("weights", "gradients"), [("plain", "plain"), ("channels_last", "channels_last"),
                                                    ("channels_last", "plain"), ("plain", "every second")])  # fmt: skip
@pytest.mark.parametrize("name", ["lars", "larc"])
def test_blocks_of_any_layout_give_the_authors_formula(
    name: str, weights: str, gradients: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim, "block_size", lambda device: 8)
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    values = [draw(shape) for shape in SIZES] + [torch.zeros(4, 5, dtype=dtype), draw((4, 5))]
    params = [nn.Parameter(strange(value, weights)) for value in values]
    unused = nn.Parameter(draw((5,)))
    half = len(SIZES) // 2
    options = optim.Options(name=name, learning_rate=0.3, trust_coefficient=0.02, weight_decay=0.1)
    flags = [(True, True), (False, False), (True, False), (False, True)]
    rows = [params[:half] + params[-2:], params[half : half + 2], params[half + 2 : half + 3], params[half + 3 : -2]]
    groups = [
        {
            "params": [*some, unused][: len(some) + (not n)],
            "name": f"g{n}",
            "decay": decay,
            "adapt": adapt,
            "lr": "scheduled",
        }
        for n, (some, (decay, adapt)) in enumerate(zip(rows, flags, strict=True))
    ]
    optimizer = optim.build(groups, options, 256)
    expected = {p: (p.detach().double(), torch.zeros_like(p, dtype=torch.float64)) for p in params}
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 1e-7}
    for step in range(3):
        for group, (decay, adapt) in zip(groups, flags, strict=True):
            for p in group["params"]:
                if p is unused:
                    continue
                zero = p is params[-1] and step == 1  # then a gradient of zeros
                g = torch.zeros_like(p) if zero else strange(draw(tuple(p.shape)), gradients)
                expected[p] = authors(name == "larc", expected[p][0], g.double(), expected[p][1], adapt, 0.1 * decay)
                p.grad = g
        optimizer.grad_scale, optimizer.found_inf = None, torch.zeros(())
        optimizer.step()
        for p, (w, buffer) in expected.items():
            torch.testing.assert_close(p.detach().double(), w, **tolerance)
            torch.testing.assert_close(optimizer.state[p]["momentum_buffer"].double(), buffer, **tolerance)
    assert unused.grad is None
    saved = optimizer.state_dict()
    assert {frozenset(state) for state in saved["state"].values()} == {frozenset({"momentum_buffer"})}
    optim.load(optimizer, saved)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))


@pytest.mark.parametrize("name", ["lars", "larc", "lamb"])
def test_scaled_gradients_are_unscaled_and_no_step_is_needed_before(name: str) -> None:
    """As torch.amp.GradScaler.step hands them over."""
    found = []
    for scale in (None, torch.tensor(1024.0)):
        torch.manual_seed(0)
        model, groups = model_and_groups()
        optimizer = optim.build(groups, optim.Options(name=name, learning_rate=0.3, momentum=0, weight_decay=0.1), 256)
        for p in model.parameters():
            p.grad = torch.ones_like(p) * (1 if scale is None else scale)
        optimizer.grad_scale, optimizer.found_inf = scale, torch.zeros(())
        optimizer.step(closure=lambda: None)
        moments = [value for state in optimizer.state.values() for value in state.values()]
        found.append([p.detach() for p in model.parameters()] + moments)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["lars", "larc", "lamb"])
def test_a_step_reads_nothing_from_the_device(name: str) -> None:
    """Fake tensors have no values to be read. Blocks of a GPU: a group is one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model, groups = model_and_groups()
        optimizer = optim.build(groups, optim.Options(name=name, learning_rate=0.1, weight_decay=0.1), 256)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.grad_scale, optimizer.found_inf = None, torch.zeros(())
        optimizer.step()
    assert optim.block_size(torch.device("cuda")) > 2**60


# ----------------------------------------------------------------------------------------------------------------- lamb
def test_lamb_is_timms() -> None:
    from timm.optim.lamb import Lamb

    torch.manual_seed(0)
    model, groups = model_and_groups()
    groups[1]["lr"] = "scheduled"
    other = copy.deepcopy(model)
    optimizer = optim.build(groups, optim.Options(name="lamb", learning_rate=0.05, weight_decay=0.1), 256)
    vectors = [p for p in other.parameters() if p.ndim == 1]
    theirs = Lamb([{"params": [p for p in other.parameters() if p.ndim > 1]}, {"params": vectors, "weight_decay": 0.0}],
                  lr=0.05, weight_decay=0.1, max_grad_norm=None)  # fmt: skip
    for _ in range(4):
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        optimizer.grad_scale, optimizer.found_inf = None, torch.zeros(())
        optimizer.step()
        theirs.step()
        torch.testing.assert_close(list(model.parameters()), list(other.parameters()))
    state = optimizer.state_dict()
    optim.load(optimizer, state)
    assert {frozenset(values) for values in state["state"].values()} == {frozenset({"step", "exp_avg", "exp_avg_sq"})}


# ----------------------------------------------------------------------------------------------------------------- apex
STAND_IN = Path(__file__).parent / "apex_stand_in"
WITHOUT_LARS = ["sgd", "adam", "adamw", "lamb"]


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """apex's interface, with its arithmetic in torch, on a machine that needs no GPU for it."""
    monkeypatch.syspath_prepend(str(STAND_IN))
    with monkeypatch.context() as gpu:
        gpu.setattr(torch.cuda, "is_available", lambda: True)
        optim.require_backend(optim.Options(name="sgd", backend="apex"))
    monkeypatch.setattr(optim, "require_backend", lambda options: None)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in ("apex", "amp_C")]:
        del sys.modules[name]


def a_step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int, bad: bool = False) -> list[torch.Tensor]:
    """The parameters after it."""
    generator = torch.Generator().manual_seed(number)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) * (float("nan") if bad else 1)
    optim.set_rates(optimizer, 1 / (number + 1))
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(float(bad))
    optimizer.step()
    optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", WITHOUT_LARS)
def test_apex_is_torch_and_skips_as_torch_does(apex: None, name: str) -> None:
    built = {}
    for backend in ("torch", "apex"):
        torch.manual_seed(0)
        model, groups = model_and_groups()
        options = optim.Options(name=name, learning_rate=0.1, weight_decay=0.1, nesterov=name == "sgd", backend=backend)
        built[backend] = model, optim.build(groups, options, 256)
    optimizer = built["apex"][1]
    for number, bad in enumerate([True, False, False, True, True, False, False]):
        before = [p.detach().clone() for p in built["apex"][0].parameters()]
        state = copy.deepcopy(optimizer.state_dict())
        ours, theirs = (a_step(*one, number, bad) for one in (built["torch"], built["apex"]))
        torch.testing.assert_close(theirs, ours)
        if bad:
            assert all(torch.equal(a, b) for a, b in zip(before, theirs, strict=True))
            torch.testing.assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)
    if name != "sgd":  # steps that were left out are not counted, whatever the group
        assert [group["step"].tolist() for group in optimizer.param_groups] == [[4], [4]]
    assert optim.set_rates(optimizer, 0.5) == {"matrices": 0.05, "vectors": 0.5}
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.05, 0.5])


@pytest.mark.parametrize("name", WITHOUT_LARS)
def test_apex_goes_on_from_a_checkpoint(apex: None, name: str, tmp_path: Path) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model, groups = model_and_groups()
        options = optim.Options(name=name, learning_rate=0.1, weight_decay=0.1, backend="apex")
        return model, optim.build(groups, options, 256)

    model, optimizer = fresh()
    a_step(model, optimizer, 0)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state")
    expected = a_step(model, optimizer, 1)
    model, optimizer = fresh()
    weights, state = torch.load(tmp_path / "state", weights_only=True)
    model.load_state_dict(weights)
    mine = {id(x) for group in optimizer.param_groups for x in group.values() if isinstance(x, torch.Tensor)}
    optim.load(optimizer, state)
    found = a_step(model, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    # What lies on the device stays there; a stranger's tensor of another size would be read beyond its end.
    assert {id(x) for group in optimizer.param_groups for x in group.values() if isinstance(x, torch.Tensor)} == mine
    if name != "sgd":
        state["param_groups"][0]["step"] = torch.zeros(0, dtype=torch.int)
        with pytest.raises(BadInput, match="does not fit the config's optimizer"):
            optim.load(optimizer, state)


def test_a_run_on_apex_is_the_run_on_torch(apex: None, few_digits: Path, tmp_path: Path) -> None:
    series = []
    for backend in ("torch", "apex"):
        words = ["optim.name=adamw", f"optim.backend={backend}", "max_steps=3", "monitor.every_steps=1"]
        chosen = test_pretrain.options(few_digits, *words)
        assert pretrain.pretrain(chosen, tmp_path / backend) == Status.DONE
        series.append([row["loss"] for row in test_pretrain.read_lines(tmp_path / backend / "metrics.jsonl")])
    np.testing.assert_allclose(*series, rtol=1e-4)


@pytest.mark.parametrize(("values", "said"), [
    ({"name": "lars"}, "apex has no lars: take backend=torch, or name=sgd, adam, adamw or lamb"),
    ({"name": "larc"}, "apex has no larc: take backend=torch, or name=sgd, adam, adamw or lamb"),
    ({"name": "lamb", "weight_decay": 0}, "apex's LAMB adapts only what decays: give weight_decay above 0, or take backend="),
])  # fmt: skip
def test_what_apex_cannot_do_is_refused_in_the_config(values: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        optim.Options(backend="apex", **values)


def test_a_machine_without_apex_is_told_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = optim.Options(name="sgd", backend="apex")
    _, groups = model_and_groups()

    def said() -> str:
        importlib.invalidate_caches()
        with pytest.raises(BadInput) as caught:
            optim.build(groups, options, 256)
        return str(caught.value)

    assert said() == "optim.backend = apex needs a GPU with CUDA and torch sees none: take optim.backend=torch"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert said().startswith("optim.backend = apex and NVIDIA apex is not installed: `APEX_CPP_EXT=1 ")
    assert "git+https://github.com/NVIDIA/apex`, or take optim.backend=torch" in said()
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("raise RuntimeError('PyPI\\'s was imported')\n")
    assert "the installed package apex is PyPI's, which is not NVIDIA's: `pip uninstall apex`, then" in said()
    (tmp_path / "apex/optimizers.py").touch()
    assert "the installed apex was built without its CUDA kernels" in said()
    (tmp_path / "amp_C.py").touch()
    assert said().startswith("apex cannot be imported (PyPI's was imported): build it anew")


def test_a_run_without_its_backend_begins_nothing(few_digits: Path, tmp_path: Path) -> None:
    chosen = test_pretrain.options(few_digits, "optim.name=sgd", "optim.backend=apex")
    with pytest.raises(BadInput, match="needs a GPU with CUDA and torch sees none"):
        pretrain.pretrain(chosen, tmp_path / "run")
    assert not (tmp_path / "run").exists()
