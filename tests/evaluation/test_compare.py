"""`compare` on series that are made up here, and on runs of a tiny network."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssl_pipeline import cli, config
from ssl_pipeline.evaluation import compare
from ssl_pipeline.exits import BadInput, Status
from ssl_pipeline.monitor import TIME_KEYS
from ssl_pipeline.pretrain import PretrainConfig, completed, pretrain
from ssl_pipeline.run_folder import RunFolder, read_lines

Rows = list[dict[str, Any]]


def series(steps: int = 6, **changed: Any) -> Rows:
    return [
        {"step": step, "loss": 1 / step, "rank": 3.0, "images_per_second": step * 7.0, **changed}
        for step in range(1, steps)
    ]


# -------------------------------------------------------------------------------------------------------------- made up
def test_equal_series_never_part() -> None:
    found = compare.metrics(series(), [row | dict.fromkeys(TIME_KEYS, 0.5) for row in series()])
    assert (found["steps"], found["equal_up_to"], found["parts_at"], found["beyond"]) == (5, 5, None, {})
    assert found["missing"] == found["only"] == [[], []]


def test_the_step_at_which_they_part_and_the_one_beyond_the_tolerance() -> None:
    others = series()
    others[2]["loss"] = math.nextafter(others[2]["loss"], 1)  # the last bit
    others[3]["loss"] *= 1.0009
    others[4] |= {"loss": others[4]["loss"] * 1.002, "rank": 4.0}
    found = compare.metrics(series(), others)
    assert found["equal_up_to"] == 2
    assert found["parts_at"] == {"step": 3, "values": {"loss": [1 / 3, others[2]["loss"]]}}
    assert found["beyond"] == {
        "loss": {"step": 5, "values": [0.2, others[4]["loss"]]},
        "rank": {"step": 5, "values": [3.0, 4.0]},
    }
    assert compare.metrics(series(), others, tolerance=1e-4)["beyond"]["loss"]["step"] == 4
    assert compare.metrics(others, series())["equal_up_to"] == 2  # whichever comes first


def test_from_the_first_row_on() -> None:
    found = compare.metrics(series(), series(rank=-3.0))
    assert found["equal_up_to"] is None
    assert found["parts_at"]["step"] == 1


@pytest.mark.parametrize(
    ("a", "b", "equal", "relative"),
    [
        (math.nan, math.nan, True, 0.0),
        (None, None, True, 0.0),
        (None, 1.0, False, math.inf),
        (math.inf, -math.inf, False, math.inf),
        (0.0, 1e-9, False, 1.0),
        (2, 1, False, 0.5),
    ],
)
def test_what_is_no_number(a: Any, b: Any, equal: bool, relative: float) -> None:
    found = compare.metrics([{"step": 1, "x": a}], [{"step": 1, "x": b}])
    assert (found["parts_at"] is None) == equal
    assert ("x" in found["beyond"]) == (relative > 1e-3)
    json.loads(json.dumps(found, allow_nan=False))
    if not isinstance(a, float) or math.isfinite(a):
        assert compare.relative(a, b) == relative


def test_rows_and_keys_of_one_side_alone() -> None:
    rows, others = series(), series(9, heldout_rankme=1.0)
    del rows[2], others[0]
    rows.insert(1, {"step": 2, "online_knn5_top1": 30.0})  # a row of its own beside the step's
    found = compare.metrics(rows, others)
    assert found["missing"] == [[3], [1]]  # what is beyond the shorter one's end is not missing
    assert found["only"] == [["online_knn5_top1"], ["heldout_rankme"]]
    assert found["last"] == [5, 8]
    assert (found["steps"], found["parts_at"]) == (3, None)
    assert compare.metrics([], rows)["steps"] == 0


def test_final_values_stand_side_by_side_in_few_digits(tmp_path: Path) -> None:
    runs = [RunFolder(tmp_path / name) for name in ("a", "b")]
    for run, loss in zip(runs, (0.12345678912345678, 0.12345678912345), strict=True):
        run.describe({"method": {"name": "simclr"}})
        rows = [{"step": 1, "loss": loss}, {"step": 2, "loss": 2 * loss}, {"step": 2, "online_knn5_top1": 3.0}]
        run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs[1].write_result("knn", {"knn5_top1": 61.0, "ranks": 2})
    runs[1].write_result("analysis", {"representation_effective_rank": 7.5, "representation_std": 0.5})
    found = compare.compare(runs)
    ranks, knn = "analysis.representation_effective_rank", "knn.knn5_top1"
    assert found["final"] == {
        "step": [2, 2], "loss": [0.24691357824691357, 0.2469135782469], ranks: [None, 7.5], knn: [None, 61.0],
    }  # fmt: skip
    text = compare.described(found)
    lines = [line.split() for line in text.partition("final values")[2].splitlines()[1:]]
    assert lines == [
        ["A", "B"],
        ["step", "2", "2"],
        ["loss", *["0.24691358"] * 2],
        [ranks, "-", "7.5"],
        [knn, "-", "61"],
    ]
    assert ["loss", "0.12345679", "0.12345679"] in [line.split()[:3] for line in text.splitlines()]
    assert "same run folder" not in text
    (tmp_path / "link").symlink_to(runs[0].path)
    assert compare.described(compare.compare([runs[0], RunFolder(tmp_path / "link")])).startswith(
        "A and B are the same run"
    )


def test_options_that_an_older_version_did_not_have_count_at_their_defaults(tmp_path: Path) -> None:
    values = config.load("digits/simclr").values
    runs = [RunFolder(tmp_path / name) for name in ("old", "new")]
    runs[0].describe(values)
    runs[1].describe(completed(values) | {"seed": 4})
    assert compare.compare(runs, completed)["config"] == {"seed": [0, 4]}
    assert compare.compare(runs)["config"]["precision"] == [compare.ABSENT, "bf16"]


# ------------------------------------------------------------------------------------------------------------- real runs
def go(data: Path, output: Path, *overrides: str) -> RunFolder:
    tiny = [
        f"data.root={data}", "data.batch_size=32", "backbone.arguments={layers: [1,1,1,1], channels: [8,8,8,8]}",
        "head.hidden=32", "head.output=16", "epochs=2", "max_steps=8", "monitor.every_steps=2", "monitor.tensorboard=false",
    ]  # fmt: skip
    tree = config.load("digits/simclr", [*tiny, *overrides])
    assert pretrain(config.validate(PretrainConfig, tree.values, tree), output) == Status.DONE
    return RunFolder(output)


@pytest.fixture(scope="module")
def runs(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """The same twice, one of another seed, and one whose rate fell more slowly after step 4, for a longer schedule."""
    root = tmp_path_factory.mktemp("runs")
    found = {name: go(few_digits, root / name) for name in ("one", "same")}
    found["seed"] = go(few_digits, root / "seed", "seed=1")
    found["rate"] = go(few_digits, root / "rate", "max_steps=4")
    values = found["rate"].read_config()
    found["rate"].config.write_text(config.dump_yaml(values | {"epochs": 4}))  # as nobody is kept from doing
    go(few_digits, root / "rate", "epochs=4")
    return found


def of(runs: dict[str, RunFolder], other: str) -> dict[str, Any]:
    return compare.compare([runs["one"], runs[other]], completed)


def test_the_same_seed_gives_the_same_numbers(runs: dict[str, RunFolder]) -> None:
    found = of(runs, "same")
    assert (found["config"], found["environment"]) == ({}, {})
    assert found["pictures"][0] == found["pictures"][1]
    assert found["pictures"][0].startswith("160 pictures, ")
    assert (found["metrics"]["equal_up_to"], found["metrics"]["parts_at"]) == (8, None)


def test_another_seed_parts_at_once(runs: dict[str, RunFolder]) -> None:
    found = of(runs, "seed")
    assert found["config"] == {"seed": [0, 1]}
    assert (found["metrics"]["equal_up_to"], found["metrics"]["parts_at"]["step"]) == (None, 2)
    assert found["metrics"]["beyond"]["loss"]["step"] == 2


def test_a_rate_that_was_changed_on_the_way_parts_there(runs: dict[str, RunFolder]) -> None:
    found = of(runs, "rate")
    assert found["config"] == {"epochs": [2, 4]}
    assert found["runs"][1]["resumed_after"] == [4]
    assert found["metrics"]["equal_up_to"] == 6  # the first step after an epoch of warm-up has the whole rate in both
    parts = found["metrics"]["parts_at"]
    assert parts["step"] == 8
    rates = [value for key, value in parts["values"].items() if key.startswith("lr_")]
    assert rates
    assert all(b > 1.1 * a for a, b in rates)
    text = compare.described(found)
    assert "metrics: equal to the last bit up to step 6; at step 8 they part; 4 logged steps are in both\n" in text
    assert "resumed after step 4" in text


def test_versions_and_pictures_of_an_older_run_are_its_checkpoints(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    old = RunFolder(tmp_path / "old")
    shutil.copytree(runs["same"].path, old.path)
    events = [{k: v for k, v in e.items() if k not in ("versions", "pictures")} for e in read_lines(old.jobs)]
    old.jobs.write_text("".join(json.dumps(event | {"host": "other"}) + "\n" for event in events))
    found = compare.compare([runs["one"], old], completed)
    assert list(found["environment"]) == ["host"]
    assert found["pictures"][0] == found["pictures"][1]
    for path in old.checkpoints.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    found = compare.compare([runs["one"], old], completed)
    assert found["environment"]["version of torch"][1] is None
    assert found["pictures"][1] is None


def test_the_verb(runs: dict[str, RunFolder], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_pipeline.distributed.stop", lambda: None)  # the tests' own process group stays
    words = ["compare", str(runs["one"].path), str(runs["seed"].path)]
    assert cli.main(words) == Status.DONE
    text = capsys.readouterr().out
    assert "\n  seed  0  1\n" in text
    assert "metrics: from the first logged step (2) on they differ; 4 logged steps are in both\n" in text
    assert cli.main([*words, "--json", "--tolerance", "0.5"]) == Status.DONE
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(compare.compare([runs["one"], runs["seed"]], completed, tolerance=0.5)))
    for wrong, said in (
        ([*words, "--tolerance", "0"], "no relative difference"),
        ([*words[:2], "/nowhere"], "no run folder"),
    ):
        assert cli.main(wrong) == Status.BAD_INPUT
        assert said in capsys.readouterr().err


def test_what_lies_in_a_run_cannot_command_the_terminal(make_evil: Callable[[], list[RunFolder]]) -> None:
    text = compare.described(compare.compare(make_evil()))
    assert "\x1b" not in text
    assert "evil\\x1b[2J\\nline" in text


@pytest.fixture
def make_evil(tmp_path: Path) -> Callable[[], list[RunFolder]]:
    def make() -> list[RunFolder]:
        found = []
        for name in ("a", "b"):
            run = RunFolder(tmp_path / name)
            run.describe({"method": {"name": "simclr", "x": f"evil\x1b[2J\nline {name}"}})
            run.record(
                "start", step=0, steps=3, host=f"\x1b[1m{name}", versions={"torch": f"\x1b{name}"}, pictures="\x1b"
            )
            run.metrics.write_text(json.dumps({"step": 1, "loss": f"\x1b{name}"}) + "\n")
            found.append(run)
        return found

    return make


def test_two_runs_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is no run folder"):
        compare.compare([RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")])
