"""What all benchmarks share, and the run of all of them: that a number above its bound cannot pass unseen."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    """benchmarks/measure.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("measure", BENCHMARKS / "measure.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["measure"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_row_is_missed_above_its_bound_and_where_it_is_no_number(measure: ModuleType) -> None:
    def missed(value: float, bound: float | None) -> bool:
        return measure.measured("x", [value], "s", bound).missed

    assert [missed(*pair) for pair in ((0.9, 1.0), (1.0, 1.0), (1.1, 1.0), (9.9, None))] == [False, False, True, False]
    assert missed(math.nan, 1.0)
    assert missed(math.inf, 1.0)


def test_a_ratio_is_of_rounds_and_not_of_medians(measure: ModuleType) -> None:
    row = measure.ratio("x", [1.0, 4.0, 3.0], [2.0, 4.0, 1.0], "theirs", 1.5)
    assert (row.value, row.low, row.high, row.unit) == (1.0, 0.5, 3.0, "of theirs")
    assert row.detail == "3000 against 2000 ms"
    assert not row.missed
    assert measure.ratio("x", [3e6], [2e6], "theirs", None, "MB").detail == "3 against 2 MB"
    with pytest.raises(ValueError, match="zip"):
        measure.ratio("x", [1.0], [1.0, 2.0], "theirs", None)


def test_a_table_marks_what_is_missed(measure: ModuleType) -> None:
    (line,) = measure.table([measure.measured("bad", [1.0, 1234.5], "s", 500.0)]).splitlines()[2:]
    assert line == "| bad | 618 s | 500 MISSED | 1 to 1234 |  |"
    within = measure.measured("w", [0.12345], "s", 0.5)
    assert measure.table([within]).splitlines()[2] == "| w | 0.123 s | 0.5 | 0.123 to 0.123 |  |"


def test_the_first_round_is_not_counted_and_all_take_turns(
    measure: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []
    ticks = iter(range(100))
    monkeypatch.setattr(measure, "clock", lambda: float(next(ticks)))
    found = measure.interleaved({name: lambda name=name: turns.append(name) for name in "ab"}, rounds=2)
    assert turns == ["a", "b"] * 3
    assert found == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_the_peak_is_of_what_was_held_and_freed(measure: ModuleType) -> None:
    if torch.cuda.is_available():
        pytest.skip("of the resident set")
    kept = torch.ones(20_000_000)  # held before: not counted
    most = measure.peak_bytes(lambda: torch.ones(30_000_000).sum())
    assert 115e6 <= most < 150e6  # pages that were held before may be used again
    assert len(kept) == 20_000_000


# ---------------------------------------------------------------------------------------------------------- all of them
PASSES = """
import json, sys
row = {"what": "fast", "value": 0.5, "bound": 1.0, "unit": "s", "low": 0.4, "high": 0.6, "detail": "d"}
json.dump([row], open(sys.argv[2], "w"))
"""
MISSES = PASSES.replace("0.5", "1.5").replace("fast", "slow") + "sys.exit(1)\n"
NO_NUMBER = PASSES.replace("0.5", "float('nan')").replace("fast", "lost") + "sys.exit(1)\n"
CRASHES = "print('before'); raise RuntimeError('no such device')\n"
DIES_AFTERWARDS = PASSES.replace("fast", "half") + "import os; os.kill(os.getpid(), 9)\n"


def run(folder: Path, files: dict[str, str], *words: str) -> subprocess.CompletedProcess:
    """bench.py of a folder that has these files beside it."""
    for name in ("bench.py", "measure.py"):
        shutil.copyfile(BENCHMARKS / name, folder / name)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    line = [sys.executable, str(folder / "bench.py"), *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)


def names() -> list[str]:
    """The benchmarks of `make bench`."""
    text = re.search(r"^BENCHMARKS = \((.*)\)$", (BENCHMARKS / "bench.py").read_text(), re.MULTILINE)
    assert text is not None
    return re.findall(r'"(\w+)"', text[1])


def test_a_missed_bound_and_a_failure_are_told_and_the_others_run(tmp_path: Path) -> None:
    bad = dict(zip(names(), (CRASHES, MISSES, NO_NUMBER, DIES_AFTERWARDS), strict=False))
    done = run(tmp_path, dict.fromkeys(names(), PASSES) | bad)
    crashed, slow, lost, died, *good = names()
    assert done.returncode == 1, done.stderr
    for words in (
        f"| {slow}: slow | 1.5 s | 1 MISSED | 0.4 to 0.6 | d |",
        f"| {good[-1]}: fast | 0.5 s | 1 | 0.4 to 0.6 | d |",
        f"- missed: {lost}: lost",
        f"{crashed} failed: exit status 1\nbefore\nTraceback",
        "RuntimeError: no such device",
        f"{died} failed: exit status -9",
    ):
        assert words in done.stdout
    record = json.loads((tmp_path / "results" / "bench.json").read_text())
    assert record["missed"] == [f"{slow}: slow", f"{lost}: lost"]
    assert list(record["failed"]) == [crashed, died]
    assert [row["value"] for row in record["rows"] if row["what"] == f"{good[0]}: fast"] == [0.5]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", record["date"])
    page = (tmp_path / "results" / "bench.md").read_text()
    assert f"- failed: {crashed}\n" in page
    assert record["machine"] in page


def test_some_of_them_write_no_results(tmp_path: Path) -> None:
    one, two = names()[:2]
    done = run(tmp_path, {one: PASSES, two: CRASHES}, "--only", one)
    assert done.returncode == 0, done.stderr
    assert f"| {one}: fast |" in done.stdout
    assert not (tmp_path / "results").exists()
    done = run(tmp_path, {}, "--only", "small_table")
    assert (done.returncode, "invalid choice: 'small_table'" in done.stderr) == (2, True)


def test_a_benchmark_alone_exits_by_its_bounds(tmp_path: Path) -> None:
    shutil.copyfile(BENCHMARKS / "measure.py", tmp_path / "measure.py")
    (tmp_path / "own.py").write_text(
        "import measure\n"
        "def rows(): return [measure.measured('one', [2.0], 's', 3.0)]\n"
        "def long(): return [measure.measured('two', [4.0], 's', 3.0)]\n"
        "measure.main('What it is.', rows, long=long)\n"
    )
    found = tmp_path / "rows.json"
    for words, status, what in (((), 0, "one"), (("long",), 1, "two")):
        line = [sys.executable, str(tmp_path / "own.py"), *words, "--json", str(found)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == status, done.stderr
        assert f"| {what} |" in done.stdout
        (row,) = json.loads(found.read_text())
        assert row["what"] == what


def test_every_benchmark_is_there() -> None:
    text = (BENCHMARKS.parent / "docs" / "performance.md").read_text()
    assert all(f"`benchmarks/{name}.py`" in text for name in names())
    # One that make bench does not run would have its bounds for nothing.
    files = [path for path in BENCHMARKS.glob("*.py") if "main(__doc__, rows" in path.read_text()]
    assert sorted(path.stem for path in files) == sorted([*names(), "measure"])
