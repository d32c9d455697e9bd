"""Thresholds on logged values: when they are told of, how often, and when they end a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ssl_pipeline import alarms, checkpoint, cluster, config, pretrain, sparse_head
from ssl_pipeline.alarms import RULES, Alarms, Options
from ssl_pipeline.exits import BadInput, NonFinite
from ssl_pipeline.run_folder import RunFolder, read_lines
from tests.test_pretrain import METHODS, options

HEALTHY = {
    "loss": 5.0, "embedding_std": 0.9, "embedding_rank": 12.0, "gradient_norm": 4.0, "loss_over_ln_k": 0.9,
    "cholesky_failed": 0.0, "head_groups_inactive": 0.2, "sparse_weight": 1e-4,
}  # fmt: skip
SICK = [
    ("simsiam", "embedding_std", 0.001, "needs the predictor"),
    ("byol", "embedding_rank", 1.01, "collapse to a line: try a method.momentum nearer to 1"),
    ("simclr", "loss", 15.5, "above 15 since step 10: the run diverges: try a lower optim.learning_rate"),
    ("vicreg", "gradient_norm", 2e6, "the gradient explodes"),
    ("swav", "loss_over_ln_k", 0.999, "try method.epsilon=0.03"),
    ("w_mse", "cholesky_failed", 1.5, "a larger method.w_size"),
    ("barlow_twins", "head_groups_inactive", 1.0, "try a lower head.sparse.weight"),
    ("ssl_hsic", "sparse_weight", sparse_head.MOST_WEIGHT, "less sparse than head.sparse.target"),
    ("ssl_hsic", "sparse_weight", sparse_head.LEAST_WEIGHT, "sparser than head.sparse.target"),
]


def look(alarm: Alarms, steps: int, epoch: int = 19, start: int = 10, **values: Any) -> list[NonFinite | None]:
    return [alarm.look(step, epoch, HEALTHY | values) for step in range(start, start + 10 * steps, 10)]


@pytest.mark.parametrize(("method", "key", "value", "words"), SICK, ids=[f"{row[1]} {row[2]}" for row in SICK])
def test_what_holds_is_told_with_its_cause(
    caplog: pytest.LogCaptureFixture, method: str, key: str, value: float, words: str
) -> None:
    ends = []
    for stop in (False, True):
        alarm = Alarms(Options(stop=stop), method, adaptive=True)
        look(alarm, 1, start=0)
        assert look(alarm, 2, **{key: value}) == [None, None]  # it may be noise
        assert len(caplog.records) == stop
        ends += look(alarm, 1, start=30, **{key: value})
    (record,) = caplog.records  # what ends the run says it itself
    assert record.getMessage().startswith(f"{key} is {value:.4g}, ")
    assert "since step 10: " in record.getMessage()
    assert words in record.getMessage()
    assert ends[0] is None
    assert str(ends[1]).startswith(f"{record.getMessage()}; ended by alarms.stop: ")
    assert "\n" not in str(ends[1])


def test_one_rank_says_it_for_all(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alarms.distributed, "rank", lambda: 1)
    for stop in (False, True):
        look(Alarms(Options(stop=stop, patience=1), "simclr", adaptive=False), 1, start=30, gradient_norm=1e9)
    assert caplog.text == ""


def test_every_rule_has_a_case() -> None:
    assert {row[1] for row in SICK} == {rule.key for rule in RULES}
    assert alarms.COLLAPSE.keys() == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_the_options_that_an_alarm_names_are_there(few_digits: Path, method: str) -> None:
    there = config.flatten(options(few_digits, method=method).model_dump(mode="json"))
    told = [alarms.COLLAPSE[method], *(rule.cause for rule in RULES if rule.only in (None, method, "adaptive"))]
    named = {name for text in told for name in re.findall(r"(?:method|head|optim)\.[a-z_.]+[a-z]", text)}
    assert named - there.keys() == set()
    assert "optim.learning_rate" in named
    for given in {given for text in told for given in re.findall(r"[a-z_.]+=[\w.]*\w", text)}:
        options(few_digits, given, method=method)


def test_again_after_twice_as_many_until_it_recovers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="ssl_pipeline")
    alarm = Alarms(Options(patience=2), "simclr", adaptive=False)
    told = []
    for step in range(1, 20):
        alarm.look(step, 5, HEALTHY | {"embedding_std": 0.0})
        if len(caplog.records) > len(told):
            told.append(step)
    assert told == [2, 4, 8, 16]
    alarm.look(20, 5, {"embedding_std": None})  # a logged step of which all was skipped says nothing
    assert len(caplog.records) == 4
    look(alarm, 2, start=21)
    assert [r.getMessage() for r in caplog.records[4:]] == ["embedding_std is 0.9 again at step 21"]
    alarm.look(50, 5, HEALTHY | {"embedding_std": 0.0})
    look(alarm, 1, start=51)  # once is not told, nor its end
    assert len(caplog.records) == 5


def test_thresholds_are_the_configs(caplog: pytest.LogCaptureFixture) -> None:
    first_epoch = Alarms(Options(), "simclr", adaptive=False)
    look(first_epoch, 9, epoch=0, embedding_std=0.0, embedding_rank=1.0)
    others = Alarms(Options(), "simclr", adaptive=False)
    look(others, 9, loss_over_ln_k=1.0, cholesky_failed=3.0, sparse_weight=0.1)
    off = Alarms(Options(embedding_std_below=None, loss_rise=None), "simclr", adaptive=False)
    look(off, 9, embedding_std=0.0, loss=1e9)
    bounds = Alarms(Options(adaptive_weight_at_bound=False), "simclr", adaptive=True)
    look(bounds, 9, sparse_weight=0.1)
    assert caplog.text == ""
    mine = Alarms(Options(loss_above=5.5, patience=1), "simclr", adaptive=False)
    look(mine, 1, loss=5.6)
    assert "loss is 5.6, above 5.5 since step 10" in caplog.text
    negative = Alarms(Options(patience=1), "simsiam", adaptive=False)
    look(negative, 1, loss=-0.5)
    caplog.clear()
    look(negative, 1, loss=1.4)
    assert caplog.text == ""
    look(negative, 1, loss=1.6)
    assert "above 1.5" in caplog.text


def test_a_restart_goes_on_counting(caplog: pytest.LogCaptureFixture) -> None:
    first = Alarms(Options(), "simclr", adaptive=False)
    look(first, 2, gradient_norm=1e9)
    second = Alarms(Options(), "simclr", adaptive=False)
    second.load_state_dict(first.state_dict())
    look(second, 1, start=30, gradient_norm=1e9)
    assert "gradient_norm is 1e+09, above 1e+06 since step 10" in caplog.text
    assert second.first_loss == 5.0


def test_a_stop_leaves_a_checkpoint_and_the_same_command_goes_on(
    few_digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sick = options(
        few_digits, "alarms.gradient_norm_above=1e-9", "alarms.loss_above=0.01", "alarms.stop=true", "max_steps=9"
    )
    with pytest.raises(
        NonFinite,
        match=r"^loss is .*, above 0\.01 since step 1: .*; gradient_norm is .*, above 1e-09 since step 1: .*; ended by "
        r"alarms\.stop: .* another --output, or .*alarms\.stop=false$",
    ) as ended:
        pretrain.pretrain(sick, tmp_path)
    assert "since step" not in caplog.text  # it is said once
    assert checkpoint.read_newest(tmp_path / "checkpoints")["step"] == 3
    end = read_lines(tmp_path / "jobs.jsonl")[-1]
    assert (end["event"], end["status"], end["reason"]) == ("end", 76, str(ended.value))
    assert cluster.status(RunFolder(tmp_path)).startswith(f"{tmp_path}: ended with status 76: {ended.value}\n")
    assert pretrain.pretrain(options(few_digits, "max_steps=9"), tmp_path) == 0
    with pytest.raises(BadInput, match="alarms.embedding_std_belw.*the nearest is `alarms.embedding_std_below`"):
        options(few_digits, "alarms.embedding_std_belw=1")


@pytest.mark.parametrize("method", METHODS)
def test_no_alarm_for_a_run_that_learns(
    few_digits: Path, tmp_path: Path, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    gentle = ["optim.name=adam", "optim.learning_rate=1e-3"]
    pretrain.pretrain(options(few_digits, "max_steps=13", "alarms.patience=1", *gentle, method=method), tmp_path)
    assert [r.getMessage() for r in caplog.records if " since step " in r.getMessage()] == []
