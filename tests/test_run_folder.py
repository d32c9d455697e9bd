import subprocess
import sys
from pathlib import Path

import pytest

from ssl_pipeline.exits import BadInput
from ssl_pipeline.run_folder import RunFolder

CONFIG = {"seed": 0, "data": {"root": "x", "threads": None}, "monitor": {"every_steps": 5}, "max_steps": 3}


def test_the_same_config_goes_on_and_another_is_refused_key_by_key(tmp_path: Path) -> None:
    def start(values: dict) -> None:
        run = RunFolder(tmp_path / "run")
        try:
            run.open_for_writing(values)
        finally:
            run.close()

    start({**CONFIG, "seed": 7})
    start(CONFIG)  # nothing was begun
    RunFolder(tmp_path / "run").record("start")
    start({**CONFIG, "data": {"root": "x", "threads": 8}, "monitor": {"every_steps": 1}, "max_steps": 9})
    with pytest.raises(
        BadInput, match=r"belongs to another config: .*\n  data.size: 'absent' there, 8 now\n  seed: 0 there, 1 now"
    ):
        start({**CONFIG, "seed": 1, "data": {"root": "y", "threads": None, "size": 8}})
    assert RunFolder(tmp_path / "run").read_config()["seed"] == 0


def test_checkpoints_without_a_config_are_not_ours(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000001.pt").touch()
    with pytest.raises(BadInput, match=r"no config.yaml"):
        RunFolder(tmp_path).open_for_writing(CONFIG)


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.open_for_writing(CONFIG)
    program = (
        "import sys; from pathlib import Path; from ssl_pipeline.run_folder import RunFolder; "
        "RunFolder(Path(sys.argv[1])).open_for_writing({})"
    )
    second = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "is being written by process" in second.stderr
    run.close()
    RunFolder(tmp_path).open_for_writing(CONFIG)


def test_the_diary_keeps_whole_lines_and_no_run_ends_for_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunFolder(tmp_path / "run")
    assert run.events() == []
    run.record("start", job="5")
    with run.jobs.open("a") as file:
        file.write('{"event": "sta')
    (event,) = run.events()
    assert (event["event"], event["job"]) == ("start", "5")
    run.record("end", status=77)  # does not go down with the line that a full disk had cut
    assert [event["event"] for event in run.events()] == ["start", "end"]
    run.jobs.unlink()
    run.jobs.mkdir()
    run.record("start", job="5")
    assert "cannot write to" in caplog.text


def test_who_holds_a_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    assert not run.is_locked()
    run.open_for_writing({"a": 1})
    code = "import sys; from ssl_pipeline.run_folder import *; print(RunFolder(Path(sys.argv[1])).is_locked())"

    def seen() -> str:  # by another process: a process's own lock never hinders it
        line = [sys.executable, "-c", code, str(run.path)]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()

    assert seen() == "True"
    run.close()
    assert seen() == "False"
