"""Training on labels, on the digits with a tiny backbone: linear probes on pictures, and fine-tuning."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl_pipeline import backbone, checkpoint, config, distributed
from ssl_pipeline.data.loader import Loader
from ssl_pipeline.evaluation import features, probe, semi_supervised, supervised
from ssl_pipeline.exits import BadInput, Status, Stop
from ssl_pipeline.preemption import Preemption
from ssl_pipeline.run_folder import RunFolder, read_lines
from tests.ranks import on_ranks

TINY = {"name": "resnet18", "stem": "small", "arguments": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}}


def source(root: Path, **changed: Any) -> features.Options:
    view = {"size": 32, "ops": [{"op": "normalize", "mean": [0.3] * 3, "std": [0.3] * 3}]}
    return config.validate(
        features.Options, {"weights": None, "backbone": TINY, "root": root, "view": view, "threads": 1, **changed}
    )


def probe_recipe(**changed: Any) -> probe.Recipe:
    values = config.load("_evaluation/linear_probe/barlow_twins").values
    return config.validate(probe.Recipe, {**values, "epochs": 2, "batch_size": 32, **changed})


def tuning_recipe(**changed: Any) -> semi_supervised.Recipe:
    values = config.load("_evaluation/semi_supervised/barlow_twins").values
    return config.validate(semi_supervised.Recipe, {**values, "epochs": 2, "batch_size": 16, **changed})


def run_probe(root: Path, into: Path, **changed: Any) -> tuple[dict[str, Any], supervised.History]:
    """The result, and the history that its folder holds."""
    result = probe.run(source(root), probe_recipe(**changed), "barlow_twins", into)
    return result, json.loads((Path(result["folder"]) / "history.json").read_text())


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a signal came in that step."""
    calls = []
    monkeypatch.setattr(Preemption, "requested", lambda self: (calls.append(0), len(calls) == steps)[1])


# ------------------------------------------------------------------------------------------------- against plain torch
def plain_batches(root: Path, batch_size: int, epochs: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    options = source(root)
    data = Loader(
        features.pictures(options, "train"), [features.crop_and_flip(options.view)], batch_size, seed=0,
        world=distributed.start(), threads=1,
    )  # fmt: skip
    return [(batch.views[0], batch.labels) for _ in range(epochs) for batch in data]


def test_the_probe_is_a_plain_torch_loop(few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    monkeypatch.setattr(supervised, "Frozen", lambda *a, init=supervised.Frozen: kept.append(init(*a)) or kept[0])
    run_probe(few_digits, tmp_path)
    network = features.network(source(few_digits)).to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    head = nn.Linear(16, 10)
    nn.init.normal_(head.weight, std=0.01)
    torch.manual_seed(0)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), 0.3, momentum=0.9, weight_decay=1e-6)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
    batches = plain_batches(few_digits, 32, 2)
    for step, (images, labels) in enumerate(batches):
        with torch.no_grad():
            x = network(images.contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad()
        F.cross_entropy(head(x), labels).backward()
        optimizer.step()
        if step + 1 == len(batches) // 2:
            schedule.step()
    torch.testing.assert_close(kept[0].classifiers.each[0].weight, head.weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(kept[0].classifiers.each[0].bias, head.bias, rtol=1e-5, atol=1e-7)


def test_fine_tuning_is_a_plain_torch_loop(few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    monkeypatch.setattr(supervised, "Whole", lambda *a, init=supervised.Whole: kept.append(init(*a)) or kept[0])
    options = semi_supervised.Options(features=source(few_digits), percent=100)
    semi_supervised.run(options, tuning_recipe(epochs=1), "barlow_twins", tmp_path)
    network = features.network(source(few_digits)).to(memory_format=torch.channels_last).train()
    head = nn.Linear(16, 10)
    torch.manual_seed(0)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(
        [{"params": network.parameters(), "lr": 0.005}, {"params": head.parameters(), "lr": 0.5}], momentum=0.9
    )
    for images, labels in plain_batches(few_digits, 16, 1):
        optimizer.zero_grad()
        F.cross_entropy(head(network(images.contiguous(memory_format=torch.channels_last))), labels).backward()
        optimizer.step()
    torch.testing.assert_close(kept[0].classifiers.each[0].weight, head.weight, rtol=1e-5, atol=1e-6)
    ours = kept[0].backbone.state_dict()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=name)


# -------------------------------------------------------------------------------------------------------- many at once
def grid(few_digits: Path, into: Path, **changed: Any) -> supervised.History:
    changed = {"learning_rates": [0.03, 0.3, 3.0], "weight_decays": [0.0, 1e-2], "choose_on": "val", **changed}
    return run_probe(few_digits, into, **changed)[1]


def test_heads_side_by_side_are_the_same_heads_alone_bit_for_bit(few_digits: Path, tmp_path: Path) -> None:
    together = grid(few_digits, tmp_path / "grid")
    assert len(set(together[-1]["loss"])) == 6  # six heads that learnt differently
    for place, rate, decay in ((0, 0.03, 0.0), (3, 0.3, 1e-2), (5, 3.0, 1e-2)):
        alone = grid(few_digits, tmp_path / f"{place}", learning_rates=[rate], weight_decays=[decay])
        for one, all_heads in zip(alone, together, strict=True):
            assert one["loss"] == [all_heads["loss"][place]]
            assert one["val"]["top1"] == [all_heads["val"]["top1"][place]]


def test_the_fused_form_agrees(few_digits: Path, tmp_path: Path) -> None:
    a, b = grid(few_digits, tmp_path / "a"), grid(few_digits, tmp_path / "b", fused=True)
    np.testing.assert_allclose([row["loss"] for row in a], [row["loss"] for row in b], rtol=1e-5)


def test_a_head_that_diverges_takes_no_other_with_it(few_digits: Path, tmp_path: Path) -> None:
    good = grid(few_digits, tmp_path / "good", learning_rates=[0.3], weight_decays=[0.0])
    both = grid(few_digits, tmp_path / "both", learning_rates=[0.3, 1e38], weight_decays=[0.0])
    assert [row["loss"][0] for row in both] == [row["loss"][0] for row in good]
    assert both[-1]["loss"][1] is None
    assert both[-1]["val"]["top1"][1] == 0  # NaN is never right
    with pytest.raises(Stop, match="no loss is finite after epoch 1: lower the rates") as stopped:
        grid(few_digits, tmp_path / "bad", learning_rates=[1e38], weight_decays=[0.0])
    assert stopped.value.status == Status.NON_FINITE


def test_what_chooses_a_head_is_held_out_of_train(few_digits: Path, tmp_path: Path) -> None:
    values = {"learning_rates": [1e-9, 0.3], "held_out": 0.25, "choose_on": "held_out", "epochs": 4}
    result, history = run_probe(few_digits, tmp_path / "a", **values)
    assert result["chosen_on"] == "held-out part of train"
    assert [head["held_out_top1"] for head in result["heads"]] == history[-1]["held_out"]["top1"]
    chosen = max(range(2), key=lambda head: history[-1]["held_out"]["top1"][head])
    assert result["linear_top1"] == history[-1]["val"]["top1"][chosen]
    index = features.pictures(source(few_digits), "train")
    kept, held = probe.held_out(index.labels, 0.25, 0)
    assert np.bincount(index.labels[held]).tolist() == [4] * 10
    assert not set(kept) & set(held)
    assert len(kept) + len(held) == len(index)
    result, _ = run_probe(few_digits, tmp_path / "b", **{**values, "choose_on": "val"})
    assert result["chosen_on"] == "val"
    with pytest.raises(BadInput, match="too few pictures to hold one out"):
        probe.held_out(np.array([0, 0, 1]), 0.5, 0)


def test_last_and_best_epoch(few_digits: Path, tmp_path: Path) -> None:
    wide = {**TINY, "zero_init_last": False, "arguments": {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128]}}
    as_they_are = source(few_digits, backbone=wide)
    as_they_are = as_they_are.model_copy(update={"labelled_view": as_they_are.view})
    result = probe.run(as_they_are, probe_recipe(epochs=8), "barlow_twins", tmp_path)
    history = json.loads((Path(result["folder"]) / "history.json").read_text())
    top1 = [row["val"]["top1"][0] for row in history]
    assert [row["epoch"] for row in history] == list(range(1, 9))
    assert result["linear_top1"] == top1[-1]
    assert result["best_epoch_top1"] == max(top1)
    assert top1[result["best_epoch"] - 1] == max(top1)
    assert result["best_epoch_chosen_on"] == "val"
    assert result["linear_top5"] >= result["linear_top1"]
    assert max(top1) > 25  # of ten classes: it learns


def test_accuracy_is_a_plain_count(few_digits: Path) -> None:
    options, recipe, world = source(few_digits), probe_recipe(), distributed.start()
    network = features.network(options)
    module = supervised.Frozen(network, supervised.classifiers(recipe, network, 10, 2)).eval()
    nn.init.normal_(module.classifiers.each[1].weight)
    found = supervised.measure(module, features.pictures(options, "val"), options, recipe, world)
    test = features.extract(options, "val")
    for head, top1, top5 in zip(module.classifiers.each, found["top1"], found["top5"], strict=True):
        order = head(test.values).argsort(dim=1, descending=True)
        assert top1 == pytest.approx(100 * (order[:, 0] == test.labels).double().mean().item())
        assert top5 == pytest.approx(100 * (order[:, :5] == test.labels[:, None]).any(1).double().mean().item())


# ----------------------------------------------------------------------------------------------------- ranks, stopping
def probe_on_this_rank(root: str, into: str) -> torch.Tensor:
    recipe = probe_recipe(learning_rates=[0.03, 0.3], choose_on="val")
    result = probe.run(source(Path(root)), recipe, "barlow_twins", Path(into))
    distributed.gather_json(None)  # the main rank has written by now
    history = json.loads((Path(result["folder"]) / "history.json").read_text())
    rows = [[*row["loss"], *row["val"]["top1"], *row["val"]["top5"]] for row in history]
    return torch.tensor([*rows, [result["linear_top1"]] * 6], dtype=torch.float64)


def tuning_on_this_rank(root: str, into: str, synchronise: bool) -> torch.Tensor:
    options = semi_supervised.Options(features=source(Path(root)), percent=50)
    recipe = tuning_recipe(synchronise_batch_norm=synchronise)
    result, names = semi_supervised.run(options, recipe, "barlow_twins", Path(into))
    assert len(names) == 80
    distributed.gather_json(None)  # the main rank has written by now
    history = json.loads((Path(result["folder"]) / "history.json").read_text())
    return torch.tensor([[*row["loss"], *row["val"]["top1"]] for row in history], dtype=torch.float64)


def test_two_ranks_are_one(few_digits: Path, tmp_path: Path) -> None:
    one = probe_on_this_rank(str(few_digits), str(tmp_path / "1"))
    two = on_ranks(2, probe_on_this_rank, str(few_digits), str(tmp_path / "2"))
    torch.testing.assert_close(two[0], two[1], rtol=0, atol=0)
    torch.testing.assert_close(two[0], one, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_ranks_are_one_in_fine_tuning(few_digits: Path, tmp_path: Path) -> None:
    one = tuning_on_this_rank(str(few_digits), str(tmp_path / "1"), True)
    two = on_ranks(2, tuning_on_this_rank, str(few_digits), str(tmp_path / "2"), True)
    torch.testing.assert_close(two[0], two[1], rtol=0, atol=0)
    torch.testing.assert_close(two[0][:, 0], one[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two[0][:, 1], one[:, 1], rtol=0, atol=2)  # a picture more or less
    apart = on_ranks(2, tuning_on_this_rank, str(few_digits), str(tmp_path / "3"), False)
    torch.testing.assert_close(apart[0], apart[1], rtol=0, atol=0)  # measured with one rank's statistics
    assert not torch.allclose(apart[0][:, 0], one[:, 0], rtol=1e-4)


@pytest.mark.parametrize("steps", [3, 5, 10])  # in an epoch of five steps: within, at its end, at the end of the run
def test_stopped_and_resumed_is_not_stopped(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    _, whole = run_probe(few_digits, tmp_path / "whole")
    with monkeypatch.context() as patched:
        stop_after(steps, patched)
        if steps < 10:
            with pytest.raises(
                Stop, match=f"stopped by a signal after step {steps} of 10; the same command"
            ) as stopped:
                run_probe(few_digits, tmp_path / "cut")
            assert stopped.value.status == Status.STOPPED
    result, resumed = run_probe(few_digits, tmp_path / "cut")
    assert resumed == whole
    rows = read_lines(Path(result["folder"]) / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [10]


def test_fine_tuning_stopped_and_resumed_is_not_stopped(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tuning_on_this_rank(str(few_digits), str(tmp_path / "whole"), False)
    with monkeypatch.context() as patched:
        stop_after(7, patched)
        with pytest.raises(Stop, match="after step 7 of 10"):
            tuning_on_this_rank(str(few_digits), str(tmp_path / "cut"), False)
    assert torch.equal(tuning_on_this_rank(str(few_digits), str(tmp_path / "cut"), False), whole)


def test_a_finished_one_is_read_and_another_recipe_has_another_folder(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = run_probe(few_digits, tmp_path)
    assert not checkpoint.saved_steps(RunFolder(Path(first["folder"])).checkpoints)
    with monkeypatch.context() as patched:
        patched.setattr(Loader, "_take", lambda self: pytest.fail("it trains again"))
        assert run_probe(few_digits, tmp_path)[0] == first
    other, _ = run_probe(few_digits, tmp_path, seed=1)
    assert other["folder"] != first["folder"]
    running = RunFolder(Path(first["folder"]))
    assert Path(first["folder"]).parent == tmp_path / "evaluations"
    assert running.read_config()["recipe"]["epochs"] == 2


def test_the_backbone_is_frozen(few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = source(few_digits)
    network = features.network(options)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    monkeypatch.setattr(features, "network", lambda _: network)
    run_probe(few_digits, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    monkeypatch.setattr(supervised.Frozen, "train", nn.Module.train)  # the mistake that the check is for
    with pytest.raises(Stop, match="the frozen backbone changed"):
        run_probe(few_digits, tmp_path / "moved")


def test_few_pictures_are_one_batch(few_digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, history = run_probe(few_digits, tmp_path, batch_size=256)
    assert len(history) == 2
    assert "160 labelled pictures: the batch is of 160, not 256" in caplog.text
    assert supervised.possible_batch(probe_recipe(batch_size=256), 163, 8) == 160
    with pytest.raises(BadInput, match="3 labelled pictures are fewer than 4 ranks"):
        supervised.possible_batch(probe_recipe(), 3, 4)
    with pytest.raises(BadInput, match=r"recipe.batch_size = 32 cannot be divided by 3 ranks"):
        supervised.possible_batch(probe_recipe(), 100, 3)
    with pytest.raises(BadInput, match="the warm-up does not end"):
        supervised.possible_batch(probe_recipe(optim={"name": "sgd", "warmup_steps": 10}), 160, 1)


# ------------------------------------------------------------------------------------------------------------- presets
def test_presets_have_the_methods_rates() -> None:
    """Section 5 of what the official code does, at the step where it can be seen: (optimizer, base rate, batch, epochs)."""
    from ssl_pipeline import optim

    expected = {
        "barlow_twins": (0.3, 256, 100, 1e-6), "vicreg": (0.02, 256, 100, 1e-6), "swav": (0.3, 256, 100, 1e-6),
        "simsiam": (1.6, 4096, 90, 0.0), "simclr": (1.6, 4096, 90, 1e-6), "byol": (0.8, 1024, 80, 0.0),
        "ssl_hsic": (8.0, 4096, 90, 0.0),
    }  # fmt: skip
    assert set(config.presets("_evaluation/linear_probe")) == set(expected)
    for name, (rate, batch, epochs, decay) in expected.items():
        recipe = config.validate(probe.Recipe, config.load(f"_evaluation/linear_probe/{name}").values)
        assert optim.base_rate(recipe.optim, recipe.batch_size) == pytest.approx(rate), name
        assert (recipe.batch_size, recipe.epochs, recipe.optim.weight_decay) == (batch, epochs, decay), name
        assert recipe.optim.nesterov == (name in ("simclr", "byol")), name
        assert recipe.optim.name == ("lars" if name == "simsiam" else "sgd"), name
        half = optim.rate_factor(recipe.optim, 100 * recipe.epochs // 2, 100, recipe.epochs)
        assert half == pytest.approx(0.5, abs=0.01), name  # cosine


@pytest.mark.parametrize(
    ("name", "backbone_rate", "head_rate", "epochs"),
    [
        ("barlow_twins", 0.005, 0.5, 20), ("vicreg_1percent", 0.03, 0.08, 20), ("vicreg_10percent", 0.01, 0.1, 20),
        ("swav_1percent", 0.02, 5.0, 20), ("swav_10percent", 0.01, 0.2, 20), ("simclr_1percent", 0.8, 0.8, 60),
        ("simclr_10percent", 0.8, 0.8, 30),
    ],
)  # fmt: skip
def test_fine_tuning_presets(name: str, backbone_rate: float, head_rate: float, epochs: int) -> None:
    from ssl_pipeline import optim

    recipe = config.validate(semi_supervised.Recipe, config.load(f"_evaluation/semi_supervised/{name}").values)
    assert optim.base_rate(recipe.optim, recipe.batch_size, recipe.backbone_rate) == pytest.approx(backbone_rate)
    assert optim.base_rate(recipe.optim, recipe.batch_size) == pytest.approx(head_rate)
    assert (recipe.epochs, recipe.optim.weight_decay) == (epochs, 0)
    if name.startswith("swav"):
        factors = [optim.rate_factor(recipe.optim, 10 * epoch, 10, 20) for epoch in (0, 11, 12, 15, 16, 19)]
        assert factors == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.04])


def test_the_cosine_moves_by_epochs_as_torchs() -> None:
    from ssl_pipeline import optim

    recipe = probe_recipe(epochs=10)
    p = nn.Parameter(torch.zeros(1))
    theirs = torch.optim.SGD([p], 1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 10)
    for epoch in range(10):
        for step in (0, 6):
            factor = optim.rate_factor(recipe.optim, 7 * epoch + step, 7, 10)
            assert factor == pytest.approx(theirs.param_groups[0]["lr"], abs=1e-12)
        theirs.step()
        schedule.step()
    assert math.isclose(optim.rate_factor(recipe.optim, 0, 7, 10), 1.0)
    assert backbone.Options(**TINY).stem == "small"
