import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from ssl_pipeline.evaluation.spectrum import write_file
from ssl_pipeline.exits import BadInput, StorageFailure
from ssl_pipeline.run_folder import RunFolder, require_writable

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


def test_a_folder_that_cannot_be_written_is_found_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_writable(tmp_path / "new" / "deep")
    assert not list(tmp_path.iterdir())  # it asks, and leaves nothing
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "deep" / "er"):
        with pytest.raises(BadInput, match=r"file.*: Not a directory; name another folder by --output$"):
            require_writable(folder)

    def full(**_: object) -> IO[bytes]:
        return open("/dev/full", "wb")  # takes no byte, as a disk without room

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(StorageFailure, match="No space left on device; free room there and give the same command"):
        require_writable(tmp_path)


@pytest.mark.parametrize(
    ("number", "kind", "way_out"),
    [
        (errno.EROFS, BadInput, "name another folder by --output"),
        (errno.EACCES, BadInput, "name another folder by --output"),
        (errno.EDQUOT, StorageFailure, "free room there and give the same command again"),
        (errno.ESTALE, StorageFailure, "see that its storage answers and give the same command again"),
    ],
)
def test_whatever_writes_to_a_run_says_the_way_out(
    number: int, kind: type, way_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("pathlib.Path.mkdir", fails)
    run = RunFolder(tmp_path / "run")
    for write in (
        lambda: run.open_for_writing(CONFIG),
        lambda: run.describe(CONFIG),
        lambda: run.write_result("knn", {"knn5_top1": 1.0}),
        lambda: write_file(tmp_path / "run" / "spectrum.png", b""),
    ):
        with pytest.raises(kind) as caught:
            write()
        assert str(caught.value).startswith(f"cannot write to '{tmp_path}/run")
        assert str(caught.value).endswith(f": {os.strerror(number)}; {way_out}")
