from __future__ import annotations

import re
import socket
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from ssl_pipeline import cluster, distributed, pretrain
from ssl_pipeline.exits import BadInput, Stop
from ssl_pipeline.run_folder import RunFolder
from tests.ranks import on_ranks
from tests.test_pretrain import options


# ------------------------------------------------------------------------------------------------------- Slurm and none
def test_without_slurm_nothing_is_requeued_and_states_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert cluster.job_id() is None
    assert not cluster.requeue()
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert not cluster.requeue(exclude=["n1"], patience=0)
    assert cluster.job_state("12") == "unknown"
    assert cluster.preemption_facts(None) == ["no Slurm answers here: nothing is known about preemption"]


def slurm_of(folder: Path, monkeypatch: pytest.MonkeyPatch, **commands: str) -> None:
    """Slurm's commands replaced by scripts, which note how they were called."""
    for name, body in commands.items():
        path = folder / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> "{folder}/called"\n{body}\n')
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_excluded_nodes_are_added_to_those_excluded_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shows = '[ "$2" = show ] && echo "JobId=12 ExcNodeList=n[7-8] Command=x"; exit 0'
    slurm_of(tmp_path, monkeypatch, squeue="echo RUNNING", scontrol=shows)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert cluster.requeue(exclude=["n1", "n2"])
    assert (tmp_path / "called").read_text().splitlines()[-2:] == [
        "scontrol requeue 12",
        "scontrol update JobId=12 ExcNodeList=n[7-8],n1,n2",
    ]


def test_a_controller_that_does_not_answer_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cluster.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    # It fails, says that the job is being signalled, and then that it runs.
    answers = 'case $n in "") exit 1;; x) echo SIGNALING;; *) echo RUNNING;; esac'
    answers = f"n=$(cat {tmp_path}/n 2>/dev/null); echo x >> {tmp_path}/n; {answers}"
    slurm_of(tmp_path, monkeypatch, squeue=answers, scontrol="exit 0")
    assert cluster.requeue()
    slurm_of(tmp_path, monkeypatch, squeue="echo RUNNING", scontrol="exit 1")
    assert not cluster.requeue(patience=0)
    assert "could not be requeued (squeue says RUNNING); by hand: scontrol requeue 12" in caplog.text


def test_a_task_of_an_array_is_not_the_array(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("JOB_ID", "12"), ("ARRAY_JOB_ID", "12"), ("ARRAY_TASK_ID", "3")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert cluster.job_id() == "12_3"


@pytest.mark.parametrize("state", ["COMPLETING", "PENDING", "CANCELLED"])
def test_a_job_that_is_ending_is_not_requeued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    slurm_of(tmp_path, monkeypatch, squeue=f"echo {state}", scontrol="exit 0")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert not cluster.requeue()
    assert "requeue" not in (tmp_path / "called").read_text()


# --------------------------------------------------------------------------------------------------------------- status
def test_status_of_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is no run folder"):
        cluster.status(RunFolder(tmp_path))


def test_status_of_a_run_that_was_stopped_and_of_one_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    run.open_for_writing({"a": 1})
    run.record("start", job=None, restart=0, nodes=None, host="n1", ranks=4, step=0, steps=100, epochs=5)
    run.record("start", job=None, restart=0, nodes=None, host="n1", ranks=4, step=40, steps=100, epochs=5)
    run.metrics.write_text('{"step": 50, "epoch": 2, "images_per_second": 1234.5, "seconds_left": 400000}\n{"ste')
    run.checkpoints.mkdir()
    (run.checkpoints / "step_00000040.pt").touch()
    run.record("end", status=75, step=40)
    run.write_result("knn", {"knn5_top1": 61.234, "weights": "x", "ranks": 2})
    run.write_result("analysis", {"a": 1, "b": 2.0, "pictures": {"values": [1, 2], "width": 3}})
    run.close()
    at_rest = cluster.status(run).splitlines()
    assert at_rest[0] == f"{tmp_path}: stopped at step 40; the same command goes on"
    assert at_rest[1:3] == ["step 40 of 100, epoch 2 of 5", "1 restart, 4 ranks"]  # from where it goes on; no speed
    assert at_rest[3].startswith("last checkpoint: step 40, 0 min")
    assert at_rest[4:] == ["result analysis: 3 numbers in results/analysis.json", "result knn: knn5_top1 61.23"]
    run.record("start", job=None, restart=0, nodes=None, host="n1", ranks=4, step=40, steps=100, epochs=5)
    monkeypatch.setattr(RunFolder, "is_locked", lambda self: True)
    running = cluster.status(run).splitlines()
    assert running[0] == f"{tmp_path}: running on n1"
    assert running[1:3] == ["step 50 of 100, epoch 3 of 5", "1234 images/s, 4 days 15 h left"]
    run.metrics.write_text('{"step": 40, "epoch": 1, "images_per_second": 1234.5, "seconds_left": 400000}\n')
    assert cluster.status(run).splitlines()[1:3] == ["step 40 of 100, epoch 2 of 5", "2 restarts, 4 ranks"]  # of before


def began(run: RunFolder, step: int = 0, job: str | None = None) -> None:
    run.record("start", job=job, restart=0, nodes=None, host="n1", ranks=4, step=step, steps=100, epochs=5)


def test_status_says_how_a_run_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    run.open_for_writing({"a": 1})
    run.close()

    def state() -> str:
        return cluster.status(run).splitlines()[0].removeprefix(f"{tmp_path}: ")

    began(run)
    run.record("end", status=77, reason="the disk is full")
    assert state() == "ended with status 77: the disk is full"
    run.record("failed", verb="pretrain", job="7", status=77)
    assert state() == f"ended with status 77: the disk is full; log: {run.logs}"
    (run.logs / "pretrain_1").mkdir(parents=True)
    (run.logs / "pretrain_1" / "7_0_log.out").touch()
    assert state() == f"ended with status 77: the disk is full; log: {run.logs}/pretrain_1/7_0_log.out"
    began(run)
    assert state() == "vanished without a word after step 0 (killed?); the same command begins anew"
    assert cluster.status(run).splitlines()[1:] == ["step 0 of 100", "1 restart, 4 ranks", "no checkpoint yet"]
    run.checkpoints.mkdir()
    (run.checkpoints / "step_00000040.pt").touch()
    for status in (75, 0):
        run.record("end", status=status, step=40)
        assert state() == "stopped at step 40; the same command goes on"
    run.record("end", status=2, reason="no pictures")  # of a start that was refused
    assert state() == "ended with status 2: no pictures"
    began(run, 40)
    run.record("end", status=76, step=50)  # as an older version records it
    assert state() == "ended with status 76: its log says why"
    run.nonfinite.touch()
    assert state() == f"ended with status 76: its log says why, and {run.nonfinite}"
    (run.checkpoints / "step_00000100.pt").touch()
    assert state() == f"ended with status 76: its log says why, and {run.nonfinite}"  # at its last step
    began(run, 100)
    assert state() == "finished"
    (run.checkpoints / "step_00000100.pt").unlink()
    monkeypatch.setattr(cluster, "job_state", lambda job: "FAILED")
    began(run, 40, job="7")
    assert state() == "Slurm job 7 FAILED"
    run.record("end", status=2, reason="no pictures")
    assert state() == "Slurm job 7 FAILED; ended with status 2: no pictures"
    run.record("submitted", verb="pretrain", job="8", cluster="slurm")
    assert state() == "Slurm job 8 FAILED"  # of which nothing is known yet


def test_a_run_that_was_killed_and_one_whose_checkpoints_were_removed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.open_for_writing({"a": 1})
    run.close()
    began(run)
    run.metrics.write_text('{"step": 35, "epoch": 1, "images_per_second": 1.0, "seconds_left": 65}\n')
    run.checkpoints.mkdir()
    (run.checkpoints / "step_00000030.pt").touch()
    assert cluster.status(run).splitlines()[:2] == [
        f"{tmp_path}: vanished without a word after step 35 (killed?); the same command goes on from step 30",
        "step 30 of 100, epoch 2 of 5",
    ]
    began(run, 30)
    run.record("end", status=0, step=100)
    (run.checkpoints / "step_00000030.pt").unlink()
    gone = ["step 100 of 100, epoch 5 of 5", "1 restart, 4 ranks", "checkpoints removed"]
    assert cluster.status(run).splitlines() == [f"{tmp_path}: finished", *gone]
    began(run)  # once more, from the start
    assert cluster.status(run).startswith(f"{tmp_path}: vanished")


def test_a_rank_that_was_lost_is_told_with_its_time_until_the_next_start(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.open_for_writing({"a": 1})
    run.close()
    began(run)
    run.record("rank_lost", reason="rank 3 has been silent", job=None, ranks=[3], saved=0)
    at = datetime.fromisoformat(run.events()[-1]["time"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    assert f"lost {at}: rank 3 has been silent" in cluster.status(run).splitlines()
    began(run)
    assert "silent" not in cluster.status(run)
    run.record("rank_lost", reason="rank 2 has been silent", job=None, ranks=[2], saved=0)
    assert re.findall("rank . has been silent", cluster.status(run)) == ["rank 2 has been silent"]


def refused(data: str, folder: str) -> list[tuple[int, str]]:
    """(status, sentence) of pretrainings that stop on all ranks because of one: rank 0, then rank 1, then all."""
    ends = []
    rank = distributed.rank()
    for case in ("metrics", "pictures", "room"):
        run = Path(folder) / case
        chosen = options(Path(data), f"checkpoint.keep={1000000000 if case == 'room' else 2}")
        if rank == 0 and case == "metrics":
            (run / "metrics.jsonl").mkdir(parents=True)
        with pytest.MonkeyPatch.context() as monkeypatch:
            if rank == 1 and case == "pictures":
                monkeypatch.setattr(pretrain, "validation_pictures", raising(BadInput("no pictures here")))
            with pytest.raises(Stop) as stop:
                pretrain.pretrain(chosen, run)
        ends.append((int(stop.value.status), str(stop.value)))
    return ends


def raising(error: Exception) -> Callable[..., Any]:
    def function(*_: object) -> None:
        raise error

    return function


def test_a_stop_for_whatever_rank_is_the_runs_end(few_digits: Path, tmp_path: Path) -> None:
    one, two = on_ranks(2, refused, str(few_digits), str(tmp_path))
    for (status, said), (status_two, said_two), case, expected, code in zip(
        one, two, ("metrics", "pictures", "room"),
        (r"cannot write .*metrics\.jsonl: Is a directory; .*", rf"rank 1 on {re.escape(socket.gethostname())}: no pictures here",
         r"the disk of .* MB free .*"),
        (77, 2, 77), strict=True,
    ):  # fmt: skip
        assert (status, status_two) == (code, code)
        assert re.fullmatch(expected, said)
        assert said_two == ("no pictures here" if case == "pictures" else "")
        run = RunFolder(tmp_path / case)
        assert [(e["event"], e.get("reason")) for e in run.events()] == [("start", None), ("end", said)]
        assert cluster.status(run).startswith(f"{run.path}: ended with status {code}: {said}\n")
    # Once its cause is gone the same run goes on, and what was is forgotten.
    assert pretrain.pretrain(options(few_digits, "max_steps=1"), tmp_path / "room") == 0
    assert cluster.status(RunFolder(tmp_path / "room")).startswith(f"{tmp_path / 'room'}: finished\n")


# ----------------------------------------------------------------------------------------------------------------- plan
CONFIG = {"JobRequeue": "1", "EnforcePartLimits": "ALL", "AccountingStorageType": "accounting_storage/slurmdbd",
          "KillWait": "30 sec", "SlurmctldParameters": "(null)"}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "partition", "said"),
    [
        ({}, {"PreemptMode": "OFF", "PartitionName": "gpu"}, "jobs of partition gpu are not preempted"),
        (
            {},
            {"PreemptMode": "REQUEUE", "GraceTime": "120"},
            "gets SIGTERM and 120 s before it is killed; that is enough",
        ),
        (
            {"SlurmctldParameters": "preempt_send_user_signal,idle_on_node_suspend"},
            {"PreemptMode": "REQUEUE", "GraceTime": "120"},
            "gets the signal of --signal and 120 s",
        ),
        ({}, {"PreemptMode": "REQUEUE", "GraceTime": "0"}, "only KillWait = 30 s"),
        ({"JobRequeue": "0"}, {}, "JobRequeue=0"),
        ({"EnforcePartLimits": "NO"}, {}, "waits for ever instead of being refused"),
        ({"AccountingStorageType": "accounting_storage/none"}, {}, "no accounting"),
    ],
)
def test_what_a_cluster_does_to_preempted_jobs(config: dict, partition: dict, said: str) -> None:
    assert said in "\n".join(cluster.judge_preemption(CONFIG | config, partition))


def test_slots_and_leads() -> None:
    assert cluster.slots(3600, 24 * 3600, 300) == 1
    # 10 h of work in slots of 1 h, of which 300 s go to the lead and 60 s to the start: 36000 / 3240 = 11.1
    assert cluster.slots(36000, 3600, 300) == 12
    assert cluster.slots(36000, 300, 300) == 0
    assert cluster.signal_lead(0, 1e9) == 90
    assert cluster.signal_lead(10 * 10**9, 1e9) == 120  # three saves of 10 s and 90 s


def test_write_speed_leaves_nothing(tmp_path: Path) -> None:
    assert cluster.write_speed(tmp_path) > 0
    assert list(tmp_path.iterdir()) == []


def slots(count: int, seconds: int, job: str = "5") -> list[dict[str, Any]]:
    """Events of slots that were stopped after so many seconds, one a half hour."""
    found = []
    for number in range(count):
        hour, minute = divmod(number * 30, 60)
        began = f"2026-01-01T{hour:02d}:{minute:02d}:00.000+00:00"
        ended = f"2026-01-01T{hour:02d}:{minute + seconds // 60:02d}:{seconds % 60:02d}.000+00:00"
        found += [{"event": "start", "job": job, "time": began}, {"event": "end", "status": 75, "time": ended}]
    return found


def test_a_job_that_is_stopped_at_once_ten_times_does_not_go_on_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    with pytest.raises(BadInput, match="stopped within a minute of its start ten times in a row: .* --time"):
        cluster.require_progress(slots(10, 20))
    cluster.require_progress(slots(9, 20))
    cluster.require_progress(slots(10, 20)[:-2] + slots(10, 70)[-2:])  # the last one got on
    cluster.require_progress(slots(10, 20, job="4"))  # another job's
    refused = {"event": "end", "status": 2, "reason": "", "time": "2026-01-01T23:00:00.000+00:00"}
    with pytest.raises(BadInput, match="ten times in a row"):
        cluster.require_progress([*slots(10, 20), refused])  # an end without a start is no slot
    monkeypatch.delenv("SLURM_JOB_ID")
    cluster.require_progress(slots(10, 20))
