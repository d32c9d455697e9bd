"""Numbers that are not finite: what a skipped step leaves, what is told of it, and the way back."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssl_pipeline import checkpoint, cluster, config, distributed, pretrain
from ssl_pipeline.data import randomness
from ssl_pipeline.data.index import image_folder
from ssl_pipeline.data.loader import Batch, Loader
from ssl_pipeline.exits import NonFinite, Status
from ssl_pipeline.methods import Method
from ssl_pipeline.run_folder import RunFolder, checkpoint_file, read_lines, saved_steps
from tests.ranks import on_ranks
from tests.test_pretrain import METHODS, SPARSE, options, series

NAN = float("nan")
BACK = ["recovery.max_skipped=3", "monitor.every_steps=2", "checkpoint.every_epochs=null"]


def number(loader: Loader) -> int:
    """Of the step whose batch the loader is about to give, counted from 1."""
    return loader.epoch * len(loader) + loader.consumed // loader.batch_size + 1


class Poison:
    """Puts a NaN picture into some batches; remembers the ids of each step that was done last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, when: Callable[[Loader], bool]) -> None:
        self.ids: dict[int, list[int]] = {}
        take = Loader._take

        def taken(loader: Loader) -> Batch:
            batch = take(loader)
            self.ids[number(loader)] = batch.ids.tolist()
            if when(loader):
                batch.views[0][0] = NAN
            return batch

        monkeypatch.setattr(Loader, "_take", taken)


def bits(values: Any, name: str = "") -> dict[str, Any]:
    """Everything in nested values by name, tensors as bytes: 0 and -0 differ, and NaN is itself."""
    if isinstance(values, dict):
        return {k: v for key, value in values.items() for k, v in bits(value, f"{name}/{key}").items()}
    if isinstance(values, (list, tuple)):
        return bits(dict(enumerate(values)), name)
    return {name: values.detach().contiguous().numpy().tobytes() if isinstance(values, torch.Tensor) else values}


def computed(run: Path) -> dict[str, Any]:
    """Bits of all that training changes: parameters, buffers, optimizer, online probe."""
    state = checkpoint.read_newest(run / "checkpoints")
    for group in state["optimizer"]["param_groups"]:
        del group["lr"]  # of the schedule
    return bits({key: state[key] for key in ("model", "optimizer", "online")})


# ------------------------------------------------------------------------------------------------------ a skipped step
@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        *((method, ["optim.name=adam"]) for method in METHODS),
        *(("byol", ["optim.name=adam", *sparse]) for sparse in SPARSE.values()),
        ("simclr", ["optim.name=lars", "optim.learning_rate=0.3"]),
        *((method, ["optim.name=adam", "optim.accumulate=2"]) for method in ("byol", "ssl_hsic")),
    ],
)
def test_a_step_with_nan_pictures_leaves_every_bit_as_it_was(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, overrides: list[str]
) -> None:
    Poison(monkeypatch, lambda loader: number(loader) == 6)
    for end in (5, 6, 7):
        chosen = options(few_digits, f"max_steps={end}", "monitor.every_steps=1", *overrides, method=method)
        pretrain.pretrain(chosen, tmp_path / "run")
        if end == 5:
            shutil.copytree(tmp_path / "run", tmp_path / "never")
            before = computed(tmp_path / "run")
        if end == 6:
            skipped = computed(tmp_path / "run")
    differing = [name for name, value in before.items() if skipped.get(name) != value]
    assert (before.keys(), differing) == (skipped.keys(), [])
    # A run in which nothing but the counts of steps and pictures went on has the same next step.
    state = checkpoint.read_newest(tmp_path / "never" / "checkpoints")
    state["step"] += 1
    state["loader"]["consumed"] += 16
    checkpoint.write(tmp_path / "never" / "checkpoints", state, 1)
    pretrain.pretrain(chosen, tmp_path / "never")
    after, expected = computed(tmp_path / "run"), computed(tmp_path / "never")
    assert after == expected
    assert after != before
    assert [row["skipped"] for row in series(tmp_path / "run")] == [0, 0, 0, 0, 0, 1, 0]
    assert all(math.isfinite(row["loss"]) for row in series(tmp_path / "run") if not row["skipped"])


def infinite_loss(self: Method, views: list[torch.Tensor], micro_batches: int = 1) -> Any:
    """A loss that is not finite in step 2 of the last rank, where every gradient is."""
    output = forward(self, views, micro_batches)
    last = distributed.rank() == distributed.world_size() - 1
    if last and self.progress.step == 1:
        output.loss = output.loss + torch.tensor(float("inf"))
        output.logs["loss"] = output.loss.detach()
    return output


forward = Method.forward


def two_bad_steps(data: str, run: str) -> dict[str, Any]:
    """On each rank: weights after each of 4 steps, the second with an infinite loss and the third with a NaN picture, both
    on the last rank alone."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Method, "forward", infinite_loss)
        last = distributed.rank() == distributed.world_size() - 1
        poison = Poison(monkeypatch, lambda loader: last and number(loader) == 3)
        seen = []
        after_update = Method.after_update

        def noted(self: Method, *args: Any) -> None:
            after_update(self, *args)
            seen.append(torch.cat([value.flatten().double() for value in self.state_dict().values()]))

        monkeypatch.setattr(Method, "after_update", noted)
        status = pretrain.pretrain(options(Path(data), "max_steps=4", "monitor.every_steps=4"), Path(run))
    return {"status": int(status), "seen": torch.stack(seen), "ids": poison.ids}


def rolled_back(data: str, run: str) -> dict[str, Any]:
    """On each rank: ids of an epoch in which the last rank alone saw NaN from step 6 on, until it went back."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        last = distributed.rank() == distributed.world_size() - 1
        poison = Poison(monkeypatch, lambda loader: last and not loader.rollbacks and number(loader) >= 6)
        chosen = options(Path(data), *BACK, "checkpoint.every_steps=4", "max_steps=10")
        status = pretrain.pretrain(chosen, Path(run))
    return {"status": int(status), "ids": poison.ids}


def both(data: str, run: str) -> list[dict[str, Any]]:
    return [two_bad_steps(data, f"{run}/bad"), rolled_back(data, f"{run}/back")]


@pytest.fixture(scope="module")
def of_two_ranks(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, on_ranks(2, both, str(few_digits), str(folder))


def test_two_ranks_go_back_together(of_two_ranks: tuple[Path, list[Any]]) -> None:
    folder, ((_, one), (_, two)) = of_two_ranks
    assert one["status"] == two["status"] == Status.DONE
    assert one["ids"].keys() == two["ids"].keys() == set(range(1, 11))
    assert sorted(sample for rank in (one, two) for ids in rank["ids"].values() for sample in ids) == list(range(160))
    assert [(row["step"], row["skipped"]) for row in series(folder / "back")] == [(step, 0) for step in range(2, 11, 2)]
    assert [row["rollbacks"] for row in read_lines(folder / "back" / "nonfinite.jsonl")] == [0, 0, 0]


def test_what_one_rank_alone_sees_is_skipped_by_both_and_listed(
    few_digits: Path, of_two_ranks: tuple[Path, list[Any]]
) -> None:
    folder, ((one, _), (two, _)) = of_two_ranks
    assert one["status"] == two["status"] == Status.DONE
    assert torch.equal(one["seen"], two["seen"])
    first, second, third, fourth = one["seen"]
    assert torch.equal(first, second)
    assert torch.equal(second, third)
    assert not torch.equal(third, fourth)
    assert fourth.isfinite().all()
    (row,) = series(folder / "bad")
    assert row["skipped"] == 2
    assert math.isfinite(row["loss"])
    rows = read_lines(folder / "bad" / "nonfinite.jsonl")
    assert [(row["step"], row["epoch"], row["loss"]) for row in rows] == [(2, 0, "inf"), (3, 0, "nan")]
    paths = image_folder(few_digits / "train").paths
    for row in rows:
        ids = [
            sample for pair in zip(*(rank["ids"][row["step"]] for rank in (one, two)), strict=True) for sample in pair
        ]
        assert row["ids"] == ids
        assert row["files"] == [str(few_digits / "train" / paths[sample]) for sample in ids]


def test_skipped_steps_are_said_in_one_sentence_a_logged_step(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Poison(monkeypatch, lambda loader: number(loader) in (2, 4, 7))
    pretrain.pretrain(options(few_digits, "max_steps=8", "monitor.every_steps=4"), tmp_path)
    assert [r.getMessage() for r in caplog.records if "skipped" in r.getMessage() and r.levelname == "WARNING"] == [
        f"{steps} skipped, nothing was changed by them: loss nan, gradient norm nan; the pictures of each batch are in "
        f"{tmp_path / 'nonfinite.jsonl'}"
        for steps in ("2 steps of those from 2 to 4 were", "step 7 was")
    ]
    json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0], parse_constant=pytest.fail)


def test_an_fp16_overflow_is_counted_and_no_alarm(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="ssl_pipeline")
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, 2.0**22, enabled=enabled))
    wanted = ["precision=fp16", "max_steps=12", "monitor.every_steps=3", "optim.learning_rate=1e-3"]
    pretrain.pretrain(options(few_digits, *wanted), tmp_path)
    skipped = [row["skipped"] for row in series(tmp_path)]
    assert skipped[0] > 1
    assert skipped[-1] == 0
    scale = checkpoint.read_newest(tmp_path / "checkpoints")["scaler"]["scale"]
    assert scale == 2.0 ** (22 - sum(skipped))
    assert "skipped while the loss scale of fp16 fell: ordinary at the start" in caplog.text
    assert not [r for r in caplog.records if r.levelname == "WARNING" and "skipped" in r.getMessage()]
    rows = read_lines(tmp_path / "nonfinite.jsonl")
    assert len(rows) == sum(skipped)
    assert all(row["overflow"] == "fp16" and math.isfinite(row["loss"]) and len(row["ids"]) == 16 for row in rows)


# ------------------------------------------------------------------------------------------------------------- rollback
def test_back_to_the_last_good_checkpoint_and_on_in_another_order(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # In the first pass all is NaN from step 6 on; until it is noticed, at 8, steps are saved all the same.
    poison = Poison(monkeypatch, lambda loader: not loader.rollbacks and number(loader) >= 6)
    chosen = options(few_digits, *BACK, "checkpoint.every_steps=1", "checkpoint.keep=1", "max_steps=13")
    assert pretrain.pretrain(chosen, tmp_path) == Status.DONE
    assert "from step 8 to the checkpoint of step 5, rollback 1 of at most 3" in caplog.text
    (event,) = [event for event in read_lines(tmp_path / "jobs.jsonl") if event["event"] == "rollback"]
    assert [event[key] for key in ("step", "to", "rollbacks", "skipped")] == [8, 5, 1, 3]
    rows = series(tmp_path)
    assert [row["step"] for row in rows] == [*range(2, 13, 2), 13]
    assert sum(row["skipped"] for row in rows) == 0
    assert saved_steps(tmp_path / "checkpoints") == [13]
    assert checkpoint.read_newest(tmp_path / "checkpoints")["loader"]["rekeyed"] == [[0, 80, 1]]
    done = [sample for step in range(1, 14) for sample in poison.ids[step]]
    assert sorted(done[:160]) == list(range(160))  # every picture of the epoch once
    plain = [randomness.permutation(0, epoch, 160).tolist() for epoch in (0, 1)]
    assert done[:80] == plain[0][:80]
    assert done[80:96] != plain[0][80:96]
    assert done[160:] == plain[1][:48]


class Killed(Exception):
    pass


@pytest.mark.parametrize("first", [13, 1], ids=["checkpoint", "start"])
def test_a_kill_after_a_rollback_does_not_forget_it(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """Also where there is no checkpoint, and the run starts anew from its first weights."""
    Poison(monkeypatch, lambda loader: not loader.rollbacks and number(loader) >= first)
    chosen = options(few_digits, *BACK, "checkpoint.every_steps=7", "max_steps=18", "optim.name=adam")
    assert pretrain.pretrain(chosen, tmp_path / "whole") == Status.DONE
    take = Loader._take

    def killed(loader: Loader) -> Batch:
        if loader.rollbacks:
            raise Killed
        return take(loader)

    with monkeypatch.context() as once:
        once.setattr(Loader, "_take", killed)
        with pytest.raises(Killed):
            pretrain.pretrain(chosen, tmp_path / "killed")
    there = 7 if first == 13 else 0
    assert saved_steps(tmp_path / "killed" / "checkpoints") == [there]
    state = checkpoint.read_newest(tmp_path / "killed" / "checkpoints")
    if not there:
        assert bits(state["model"]) == bits(dict(pretrain.build_method(chosen).state_dict()))
        assert state["optimizer"]["state"] == {}
        assert state["online"]["optimizer"]["state"] == {}
    assert pretrain.pretrain(chosen, tmp_path / "killed") == Status.DONE
    assert computed(tmp_path / "whole") == computed(tmp_path / "killed")
    assert series(tmp_path / "whole") == series(tmp_path / "killed")
    assert [row["skipped"] for row in series(tmp_path / "whole")] == [0] * 9


def test_an_exploding_rate_ends_with_a_sentence_and_keeps_the_last_good_checkpoint(
    few_digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = [*BACK, "recovery.max_rollbacks=1", "checkpoint.every_steps=2", "optim.learning_rate=1e30"]
    with pytest.raises(NonFinite) as stopped:
        pretrain.pretrain(options(few_digits, *wanted), tmp_path)
    assert stopped.value.status == Status.NON_FINITE == 76
    told = str(stopped.value)
    for words in (
        "was not finite for",
        "in a row from step",
        "after 1 rollback; the last finite ones, logged at step",
        f"listed in {tmp_path / 'nonfinite.jsonl'}; ",
        "a lower optim.learning_rate with another --output",
    ):
        assert words in told
    assert "\n" not in told
    events = [event for event in read_lines(tmp_path / "jobs.jsonl") if event["event"] != "start"]
    assert [event["event"] for event in events] == ["rollback", "end"]
    assert events[-1]["status"] == 76
    assert f"ended with status 76 at step {events[-1]['step']}; " in cluster.status(RunFolder(tmp_path))
    rows = read_lines(tmp_path / "nonfinite.jsonl")
    assert {row["rollbacks"] for row in rows} == {0, 1}
    state = checkpoint.read_newest(tmp_path / "checkpoints", checkpoint.worth_going_back_to)
    assert all(value.isfinite().all() for value in state["model"].values())


# --------------------------------------------------------------------------------------------------------- its parts
def test_which_checkpoint_is_gone_back_to(tmp_path: Path) -> None:
    def write(step: int, in_a_row: int, rekeyed: list[list[int]]) -> None:
        loader = {"epoch": 0, "consumed": step, "rekeyed": rekeyed}
        checkpoint.write(tmp_path, {"step": step, "loader": loader, "monitor": {"in_a_row": in_a_row}}, 3)

    def found() -> int | None:
        state = checkpoint.read_newest(tmp_path, checkpoint.worth_going_back_to)
        return state and state["step"]

    write(1, 4, [])
    assert found() is None  # its weights may be those that made the first bad step
    write(2, 0, [])
    write(3, 1, [])
    write(4, 2, [])
    assert saved_steps(tmp_path) == [1, 2, 3, 4]  # none is removed while steps are skipped
    assert found() == 2
    write(5, 0, [[0, 3, 1]])
    assert saved_steps(tmp_path) == [3, 4, 5]
    assert found() == 5
    checkpoint.remove_after(tmp_path, 2)
    write(2, 0, [])
    write(5, 0, [[0, 3, 1], [0, 5, 2]])  # gone back to before, and nothing came of it
    write(6, 1, [[0, 3, 1], [0, 5, 2]])
    assert found() == 2
    checkpoint_file(tmp_path, 2).unlink()
    assert found() == 5  # nothing better is left
    checkpoint.remove_after(tmp_path, 5)
    assert saved_steps(tmp_path) == [5]


def test_options_are_of_the_config_and_may_change(few_digits: Path, tmp_path: Path) -> None:
    for more in ([], ["recovery.max_skipped=9", "alarms.embedding_std_below=null"]):
        assert pretrain.pretrain(options(few_digits, "max_steps=1", *more), tmp_path) == Status.DONE
    assert config.parse_yaml((tmp_path / "config.yaml").read_text(), "")["recovery"]["max_skipped"] == 9


def test_the_list_is_bounded(few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr("ssl_pipeline.recovery.MOST_STEPS", 2)
    Poison(monkeypatch, lambda loader: number(loader) > 1)
    chosen = options(few_digits, "max_steps=8", "monitor.every_steps=4")
    pretrain.pretrain(chosen, tmp_path)
    assert [row["step"] for row in read_lines(tmp_path / "nonfinite.jsonl")] == [2, 3, 5, 6]
    monkeypatch.setattr("ssl_pipeline.recovery.MOST_BYTES", 10)
    pretrain.pretrain(chosen.model_copy(update={"max_steps": 9}), tmp_path)
    assert len(read_lines(tmp_path / "nonfinite.jsonl")) == 4
    assert "nonfinite.jsonl is full" in caplog.text
    assert np.isfinite([row["loss"] for row in series(tmp_path)[:1]]).all()
