"""Numbers that are not finite: what a skipped step leaves, what is told of it, and the way back."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ssl_pipeline import checkpoint, cluster, config, distributed, pretrain, recovery
from ssl_pipeline.data import randomness
from ssl_pipeline.data.index import image_folder, read_index
from ssl_pipeline.data.loader import Batch, Loader
from ssl_pipeline.data.pack import pack
from ssl_pipeline.exits import NonFinite, Status, Stop, StorageFailure
from ssl_pipeline.methods import Method, byol
from ssl_pipeline.monitor import Skipped
from ssl_pipeline.run_folder import RunFolder, checkpoint_file, read_lines, saved_steps
from tests.ranks import on_ranks
from tests.test_checkpoint import file_limit, small_disk
from tests.test_pretrain import METHODS, SPARSE, bits, options, series

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


def one_bad_micro_batch(data: str, run: str) -> dict[str, Any]:
    """On each rank: bits after each of 4 steps of two micro-batches; in the third step the last rank's first one, whose
    gradient waits for that of the second, has a NaN picture."""
    last = distributed.rank() == distributed.world_size() - 1
    seen: list[str] = []
    after_update = byol.Method.after_update

    def noted(self: byol.Method, *args: Any) -> None:
        after_update(self, *args)
        seen.append(hashlib.sha256(repr(bits(dict(self.state_dict()))).encode()).hexdigest())

    with pytest.MonkeyPatch.context() as monkeypatch:
        Poison(monkeypatch, lambda loader: last and number(loader) == 3)
        monkeypatch.setattr(byol.Method, "after_update", noted)
        chosen = options(Path(data), "optim.accumulate=2", "max_steps=4", "monitor.every_steps=4", method="byol")
        status = pretrain.pretrain(chosen, Path(run))
    return {"status": int(status), "seen": seen}


def stopped(chosen: pretrain.PretrainConfig, run: str) -> dict[str, Any]:
    """What a run ends with on each rank, and what it warned of."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ssl_pipeline")
    logger.addHandler(handler)
    try:
        status, text = pretrain.pretrain(chosen, Path(run)), ""
    except Stop as stop:
        status, text = stop.status, str(stop)
    finally:
        logger.removeHandler(handler)
    return {"status": int(status), "text": text, "said": said}


def refused(data: str, run: str) -> dict[str, Any]:
    """A rollback for which the last rank alone cannot read the checkpoint."""
    last = distributed.rank() == distributed.world_size() - 1
    read = checkpoint.read

    def unread(file: Path) -> dict[str, Any]:
        if last:
            raise StorageFailure(f"cannot read {file.name} here")
        return read(file)

    with pytest.MonkeyPatch.context() as monkeypatch:
        Poison(monkeypatch, lambda loader: number(loader) >= 3)
        monkeypatch.setattr(checkpoint, "read", unread)
        return stopped(options(Path(data), *BACK, "checkpoint.every_steps=2", "max_steps=10"), run)


def gave_up(data: str, run: str) -> dict[str, Any]:
    """A run that must not go back, of which the last rank alone sees NaN."""
    last = distributed.rank() == distributed.world_size() - 1
    with pytest.MonkeyPatch.context() as monkeypatch:
        Poison(monkeypatch, lambda loader: last and number(loader) >= 3)
        return stopped(options(Path(data), *BACK, "recovery.max_rollbacks=0", "max_steps=10"), run)


def each(data: str, run: str) -> dict[str, dict[str, Any]]:
    sick = options(Path(data), "alarms.gradient_norm_above=1e-9", "alarms.stop=true", "max_steps=9")
    return {
        "bad": two_bad_steps(data, f"{run}/bad"),
        "back": rolled_back(data, f"{run}/back"),
        "micro": one_bad_micro_batch(data, f"{run}/micro"),
        "alarm": stopped(sick, f"{run}/alarm"),
        "refused": refused(data, f"{run}/refused"),
        "gave_up": gave_up(data, f"{run}/gave_up"),
    }


@pytest.fixture(scope="module")
def of_two_ranks(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, on_ranks(2, each, str(few_digits), str(folder))


def test_two_ranks_go_back_together(of_two_ranks: tuple[Path, list[Any]]) -> None:
    folder, ranks = of_two_ranks
    one, two = (rank["back"] for rank in ranks)
    assert one["status"] == two["status"] == Status.DONE
    assert one["ids"].keys() == two["ids"].keys() == set(range(1, 11))
    assert sorted(sample for rank in (one, two) for ids in rank["ids"].values() for sample in ids) == list(range(160))
    assert [(row["step"], row["skipped"]) for row in series(folder / "back")] == [(step, 0) for step in range(2, 11, 2)]
    assert [row["rollbacks"] for row in read_lines(folder / "back" / "nonfinite.jsonl")] == [0, 0, 0]


def test_what_one_rank_alone_sees_is_skipped_by_both_and_listed(
    few_digits: Path, of_two_ranks: tuple[Path, list[Any]]
) -> None:
    folder, ranks = of_two_ranks
    one, two = (rank["bad"] for rank in ranks)
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


def test_what_one_micro_batch_of_one_rank_sees_is_skipped_by_both(of_two_ranks: tuple[Path, list[Any]]) -> None:
    folder, ranks = of_two_ranks
    one, two = (rank["micro"] for rank in ranks)
    assert one["status"] == two["status"] == Status.DONE
    assert one["seen"] == two["seen"]
    assert len(one["seen"]) == 4
    assert one["seen"][1] == one["seen"][2]
    assert len(set(one["seen"])) == 3
    assert [row["step"] for row in read_lines(folder / "micro" / "nonfinite.jsonl")] == [3]


def test_an_alarm_of_two_ranks_is_told_by_the_main_one_and_ends_both(of_two_ranks: tuple[Path, list[Any]]) -> None:
    folder, ranks = of_two_ranks
    one, two = (rank["alarm"] for rank in ranks)
    assert one["status"] == two["status"] == Status.NON_FINITE
    assert one["text"].startswith("gradient_norm is ")
    assert [text for text in one["said"] if " since step " in text] == []  # it is said once, at the end
    assert (two["text"], two["said"]) == ("", [])
    assert saved_steps(folder / "alarm" / "checkpoints")[-1] == 3
    assert [row["step"] for row in series(folder / "alarm")] == [1, 2, 3]


@pytest.mark.parametrize("case", ["refused", "gave_up"])
def test_what_stops_one_rank_ends_both_with_its_status(of_two_ranks: tuple[Path, list[Any]], case: str) -> None:
    folder, ranks = of_two_ranks
    one, two = (rank[case] for rank in ranks)
    if case == "refused":
        assert one["status"] == two["status"] == Status.STORAGE
        assert "rank 1 on " in one["text"]
        assert one["text"].endswith(": cannot read step_00000002.pt here")
        assert two["text"] == "cannot read step_00000002.pt here"
        assert series(folder / case)[-1]["step"] == 6  # nothing was dropped
    else:
        assert one["status"] == two["status"] == Status.NON_FINITE
        assert one["text"].startswith(
            "loss or gradient norm was not finite for 4 steps in a row from step 3, after 0 roll"
        )
        assert two["text"] == ""


def test_skipped_steps_are_said_in_one_sentence_a_logged_step(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Poison(monkeypatch, lambda loader: number(loader) in (2, 4, 7))
    pretrain.pretrain(options(few_digits, "max_steps=8", "monitor.every_steps=4"), tmp_path)
    assert [r.getMessage() for r in caplog.records if "skipped" in r.getMessage() and r.levelname == "WARNING"] == [
        f"{steps} skipped and changed nothing: loss nan, gradient norm nan; the pictures of each batch are in "
        f"{tmp_path / 'nonfinite.jsonl'}"
        for steps in ("2 steps of those from 2 to 4 were", "3 steps of those from 2 to 7 were")
    ]
    json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0], parse_constant=pytest.fail)


class Pictures:
    """What a SkipLog asks of a loader."""

    rollbacks = 0
    index = SimpleNamespace(name=str)

    def __len__(self) -> int:
        return 10

    def batch_ids(self, epoch: int, step: int) -> np.ndarray:
        return np.array([epoch, step])


def skips(*steps: int, loss: float = NAN) -> list[Skipped]:
    return [Skipped(step, {"loss": loss, "gradient_norm": NAN}) for step in steps]


def test_skipped_steps_are_told_of_less_and_less_and_so_is_their_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="ssl_pipeline")
    told, data = recovery.SkipLog(tmp_path / "nonfinite.jsonl", fp16=True), Pictures()

    def said(step: int, *steps: int, loss: float = NAN) -> list[str]:
        caplog.clear()
        told.tell(step, skips(*steps, loss=loss), data)  # type: ignore[arg-type]
        return [record.getMessage() for record in caplog.records]

    assert [step for step in range(10, 210, 10) if said(step, step - 8, step)] == [10, 20, 40, 80, 160]
    assert [row["step"] for row in read_lines(told.path)] == [
        n for step in range(10, 210, 10) for n in (step - 8, step)
    ]
    end = "40 steps of those from 2 to 200 were skipped and changed nothing; none was after them up to step 210"
    assert said(210) == [end]
    assert said(220) == []
    (once,) = said(230, 225)
    assert once.startswith("step 225 was skipped and changed nothing: loss nan, gradient norm nan; the pictures")
    assert said(240) == []
    # Each kind by itself; both go on.
    assert len(said(250, 245)) == 1
    (overflow,) = [text for text in said(260, 255, loss=1.0) if "fp16" in text]
    assert overflow.startswith("step 255 was skipped while the loss scale of fp16 fell: ordinary")
    assert "2 steps of those from 255 to 265 were" in said(270, 265, loss=1.0)[0]
    # What a rollback ended has been told of.
    assert len(said(280, 275)) == 2
    assert len(said(290, 285)) == 1
    data.rollbacks = 1
    assert said(280) == []
    assert len(said(290, 285)) == 1


def test_rows_of_steps_that_come_again_are_dropped_and_others_wait_for_a_full_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told, data = recovery.SkipLog(tmp_path / "nonfinite.jsonl", fp16=False), Pictures()
    for data.rollbacks, steps in ((0, (3, 6, 7, 8)), (1, (4, 6, 7)), (2, (8,))):
        told.tell(8, skips(*steps), data)  # type: ignore[arg-type]

    def listed() -> list[tuple[int, int]]:
        return [(row["rollbacks"], row["step"]) for row in read_lines(told.path)]

    told.drop_after(7, rollbacks=1)  # the second rollback was not saved
    assert listed() == [(0, 3), (0, 6), (0, 7), (0, 8), (1, 4), (1, 6), (1, 7)]
    told.drop_after(4, rollbacks=1)
    assert listed() == [(0, 3), (0, 6), (0, 7), (0, 8), (1, 4)]
    told.drop_after(4, rollbacks=1)
    assert len(listed()) == 5
    size = told.path.stat().st_size
    caplog.clear()
    with file_limit(size + 20):
        told.tell(8, skips(7), data)  # type: ignore[arg-type]
    assert told.path.stat().st_size == size  # no half row
    assert f"cannot write to {told.path}: [Errno 27] File too large" in caplog.text
    told.close()
    assert listed()[5:] == [(2, 7)]
    told.drop_after(2, rollbacks=0)
    assert listed() == []


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


class Overflow(torch.autograd.Function):
    """The identity, whose gradient is too large for fp16."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * 2.0**40


@pytest.mark.parametrize("method", ["byol", "ssl_hsic"])
def test_an_fp16_overflow_in_one_micro_batch_skips_the_step_of_all(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Both ways of accumulating: one micro-batch after the other, and in one pass."""
    mark = 2.5  # the first pixel of the first picture of step 2
    take, represent = Loader._take, Method.represent

    def marked(loader: Loader) -> Batch:
        batch = take(loader)
        if number(loader) == 2:
            batch.views[0][0, 0, 0, 0] = mark
        return batch

    def overflowing(self: Method, views: list[torch.Tensor]) -> list[torch.Tensor]:
        features = represent(self, views)
        return [Overflow.apply(x) for x in features] if views[0][0, 0, 0, 0] == mark else features

    monkeypatch.setattr(Loader, "_take", marked)
    monkeypatch.setattr(Method, "represent", overflowing)
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, 2.0**6, enabled=enabled))
    after = []
    for end in (1, 2, 3):
        wanted = ["precision=fp16", "optim.accumulate=2", "optim.name=adam", "data.batch_size=8", f"max_steps={end}"]
        pretrain.pretrain(options(few_digits, *wanted, method=method), tmp_path)
        after.append(computed(tmp_path))
        scale = checkpoint.read_newest(tmp_path / "checkpoints")["scaler"]["scale"]
        assert scale == 2.0 ** (6 if end == 1 else 5)
    assert [name for name, value in after[0].items() if after[1][name] != value] == []
    assert [row["skipped"] for row in series(tmp_path)] == [0, 1, 0]
    (row,) = read_lines(tmp_path / "nonfinite.jsonl")
    assert (row["step"], row["overflow"], len(row["ids"]), math.isfinite(row["loss"])) == (2, "fp16", 8, True)
    weights = [name for name in after[1] if name.startswith("/model/backbone") and name.endswith("weight")]
    assert all(after[2][name] != after[1][name] for name in weights)


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


def test_what_the_abandoned_steps_left_behind_goes(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bare backbones of epochs that are done again, and what the alarms had counted."""
    seen: list[set[str]] = []

    def bad(loader: Loader) -> bool:
        if loader.rollbacks and not seen:
            seen.append({path.name for path in (tmp_path / "backbones").iterdir()})
        return not loader.rollbacks and number(loader) >= 14

    Poison(monkeypatch, bad)
    alarms: dict[tuple[int, int], Any] = {}
    write = checkpoint.write

    def noted(folder: Path, state: dict[str, Any], keep: int) -> Path:
        alarms[state["step"], state["loader"]["rekeyed"][-1][2] if state["loader"]["rekeyed"] else 0] = state["alarms"]
        return write(folder, state, keep)

    monkeypatch.setattr(checkpoint, "write", noted)
    often = ["checkpoint.backbone_every_epochs=1", "monitor.every_steps=3", "alarms.gradient_norm_above=1e-9"]
    chosen = options(few_digits, *BACK, *often, "recovery.max_skipped=8", "epochs=3", "max_steps=22")
    assert pretrain.pretrain(chosen, tmp_path) == Status.DONE
    assert "back from step 21 to the checkpoint of step 10, rollback 1" in caplog.text
    assert seen == [{"epoch_0001.pth", "epoch_0001.json"}]  # that of epoch 2 stood there
    assert alarms[20, 0]["held"]["gradient_norm_above"][0] == 5  # of logged steps 3 to 15
    assert alarms[10, 0]["held"]["gradient_norm_above"][0] == 3
    assert alarms[10, 1] == alarms[10, 0]
    assert alarms[20, 1]["held"]["gradient_norm_above"][0] == 6
    assert {path.name for path in (tmp_path / "backbones").glob("*.pth")} == {"epoch_0001.pth", "epoch_0002.pth"}


def test_the_alarms_forget_the_first_loss_of_a_start_that_is_left(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Poison(monkeypatch, lambda loader: not loader.rollbacks and number(loader) >= 3)
    assert pretrain.pretrain(options(few_digits, *BACK, "max_steps=8"), tmp_path) == Status.DONE
    state = checkpoint.read_newest(tmp_path / "checkpoints")
    assert state["loader"]["rekeyed"] == [[0, 0, 1]]
    assert state["alarms"]["first_loss"] == series(tmp_path)[0]["loss"]


def test_an_epoch_of_shards_goes_on_in_another_order(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(few_digits, tmp_path / "shards", shard_size=100_000, processes=1)
    poison = Poison(monkeypatch, lambda loader: not loader.rollbacks and number(loader) >= 6)
    shards = ["data.shuffle=shards", "data.shuffle_window=1", "checkpoint.every_steps=1", "max_steps=13"]
    assert pretrain.pretrain(options(tmp_path / "shards", *BACK, *shards), tmp_path / "run") == Status.DONE
    spans = read_index(tmp_path / "shards" / "train").spans
    assert spans is not None
    assert len(np.unique(spans[:, 0])) > 2
    done = [sample for step in range(1, 14) for sample in poison.ids[step]]
    assert sorted(done[:160]) == list(range(160))
    plain = [randomness.windowed_permutation(0, epoch, spans[:, 0], 1) for epoch in (0, 1)]
    assert done[:80] == plain[0][:80].tolist()
    rest = plain[0][80:]
    assert done[80:160] == rest[randomness.windowed_permutation(0, 0, spans[rest, 0], 1, rollbacks=1)].tolist()
    assert done[80:160] != rest.tolist()
    assert done[160:] == plain[1][:48].tolist()
    (event,) = [event for event in read_lines(tmp_path / "run" / "jobs.jsonl") if event["event"] == "rollback"]
    assert [event[key] for key in ("step", "to", "rollbacks", "skipped")] == [8, 5, 1, 3]


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
        f"if the same ones come back in {tmp_path / 'nonfinite.jsonl'}, else",
        "a lower optim.learning_rate with another --output, or a larger recovery.max_rollbacks to go on here",
    ):
        assert words in told
    assert "\n" not in told
    events = [event for event in read_lines(tmp_path / "jobs.jsonl") if event["event"] != "start"]
    assert [event["event"] for event in events] == ["rollback", "end"]
    assert (events[-1]["status"], events[-1]["reason"]) == (76, told)
    assert f"ended with status 76: {told}" in cluster.status(RunFolder(tmp_path))
    rows = read_lines(tmp_path / "nonfinite.jsonl")
    assert {row["rollbacks"] for row in rows} == {0, 1}
    state = checkpoint.read_newest(tmp_path / "checkpoints", checkpoint.worth_going_back_to)
    assert all(value.isfinite().all() for value in state["model"].values())


def test_after_76_the_same_command_lists_each_skipped_step_once(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Step 3 is skipped within an interval that the checkpoint divides; from step 6 on all are.
    Poison(monkeypatch, lambda loader: number(loader) == 3 or number(loader) >= 6)
    wanted = [*BACK, "monitor.every_steps=5", "checkpoint.every_steps=4", "max_steps=20"]
    for most in (0, 0, 1, 1, 2):
        with pytest.raises(NonFinite):
            pretrain.pretrain(options(few_digits, *wanted, f"recovery.max_rollbacks={most}"), tmp_path)
        listed = [(row["rollbacks"], row["step"]) for row in read_lines(tmp_path / "nonfinite.jsonl")]
        assert listed == [(0, 3), *((count, step) for count in range(most + 1) for step in range(6, 11))]


@pytest.mark.parametrize("mended", [True, False])
def test_a_rollback_on_a_full_disk_loses_nothing(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mended: bool
) -> None:
    run, ballast = tmp_path / "disk" / "run", tmp_path / "disk" / "ballast"
    full: list[int] = []

    def bad(loader: Loader) -> bool:
        step = number(loader)
        if (loader.rollbacks, step) == (0, 7) and run.is_dir() and not full:
            full.append(step)
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**12))
        if mended and (loader.rollbacks, step) == (1, 9):
            ballast.unlink(missing_ok=True)
        return not loader.rollbacks and step >= 6

    Poison(monkeypatch, bad)
    often = ["monitor.tensorboard=true", "checkpoint.every_steps=4", "max_steps=16"]
    chosen = options(few_digits, *BACK, *often)
    assert pretrain.pretrain(chosen, tmp_path / "whole") == Status.DONE
    with small_disk(tmp_path / "disk", 2**22):
        if mended:
            assert pretrain.pretrain(chosen, run) == Status.DONE
        else:
            with pytest.raises(StorageFailure, match="No space left on device; free room .* give the same command"):
                pretrain.pretrain(chosen, run)
            assert saved_steps(run / "checkpoints") == [4]
            ballast.unlink()
            assert "rollback 1 of at most 3" in caplog.text
            assert pretrain.pretrain(chosen, run) == Status.DONE
        assert full
        assert "No space left on device" in caplog.text
        assert computed(run) == computed(tmp_path / "whole")
        assert series(run) == series(tmp_path / "whole")
        assert read_lines(run / "nonfinite.jsonl") == read_lines(tmp_path / "whole" / "nonfinite.jsonl")


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
