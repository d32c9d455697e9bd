"""Ranks that die, stop, hang and fail, in processes of their own that no launcher ends."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ssl_pipeline import cluster, config, distributed
from ssl_pipeline.cli import entry, leave
from ssl_pipeline.data.loader import Batch, Loader
from ssl_pipeline.exits import Status, Stop, StorageFailure
from ssl_pipeline.run_folder import RunFolder, saved_steps
from ssl_pipeline.watchdog import (
    MOST_RETURNS,
    Heartbeat,
    Verdict,
    Watchdog,
    _everyone,
    _position,
    diagnose,
    tells_of_a_lost_rank,
)

PATIENCE = 90
"""Seconds after which a test fails that should have ended long before, on a busy machine."""


class Job:
    """Ranks of `python -c` or `python -m ...`, and what they wrote to stderr."""

    def __init__(self, folder: Path, words: list[str], ranks: int = 2) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.files = [folder / f"{rank}.err" for rank in range(ranks)]
        shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.ranks = []
        for rank, file in enumerate(self.files):
            env = os.environ | {
                name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()
            }
            root = Path(__file__).parents[1]
            with file.open("w") as stream:
                self.ranks.append(subprocess.Popen([sys.executable, *words], env=env, stderr=stream, cwd=root))

    def until(self, reached: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not reached():
            assert time.monotonic() < end
            assert [rank.poll() for rank in self.ranks] == [None] * len(self.ranks), self.told(0) + self.told(-1)
            time.sleep(0.1)

    def told(self, rank: int) -> str:
        return self.files[rank].read_text()

    def end(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs = []

    def begin(*words: object, ranks: int = 2) -> Job:
        jobs.append(Job(tmp_path, list(map(str, words)), ranks))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.end()


# ---------------------------------------------------------------------------------------------------------- pretraining
@pytest.mark.parametrize("fate", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_pretraining_that_lost_a_rank_ends_with_78_and_goes_on_at_the_same_command(
    few_digits: Path, tmp_path: Path, start: Callable[..., Job], fate: signal.Signals
) -> None:
    run = RunFolder(tmp_path / "run")
    words = ["smoke", f"data.root={few_digits}", "data.batch_size=16", "monitor.tensorboard=false", "epochs=100000",
             "max_steps=100000", "checkpoint.every_steps=5", "distributed.timeout=10"]  # fmt: skip
    job = start("-m", "ssl_pipeline", "pretrain", *words, "--output", run.path)
    job.until(lambda: bool(saved_steps(run.checkpoints)))
    job.ranks[1].send_signal(fate)
    if fate == signal.SIGSTOP:
        job.ranks[0].send_signal(signal.SIGTERM)  # as a launcher does; there is no step boundary left to answer it
    assert job.ranks[0].wait(PATIENCE) == Status.RANK_LOST
    host = cluster.node_name()
    assert re.search(rf"^ssl-pipeline: rank 1 on {host} has been silent .*others wait at step \d", job.told(0), re.M)
    assert "Traceback" not in job.told(0)
    stacks = (run.logs / "stacks_rank_0000.txt").read_text()
    assert re.search(r'pretrain\.py", line \d+ in _train$', stacks, re.M) or fate == signal.SIGKILL
    assert re.search(r'pretrain\.py", line \d+, in _train$', stacks, re.M) or fate == signal.SIGSTOP
    assert [path.name for path in run.logs.iterdir()] == [
        "stacks_rank_0000.txt"
    ]  # the lost one left none, not even empty
    (lost,) = [event for event in run.events() if event["event"] == "rank_lost"]
    assert lost["ranks"] == [1]
    assert re.search(rf"^lost \d{{4}}-\d\d-\d\d .*: {re.escape(lost['reason'])}$", cluster.status(run), re.M)
    if fate == signal.SIGSTOP:  # woken when its own timer is over too
        job.ranks[1].send_signal(signal.SIGCONT)
        assert job.ranks[1].wait(PATIENCE) == Status.RANK_LOST, job.told(1)
    if fate == signal.SIGKILL:
        from ssl_pipeline.pretrain import PretrainConfig, pretrain  # here, since the ranks of `loop` need none of it

        tree = config.load(words[0], [*words[1:], f"max_steps={lost['saved'] + 2}", "distributed.timeout=30"])
        done = pretrain(config.validate(PretrainConfig, tree.values, tree), run.path)
        assert done == Status.DONE
        assert saved_steps(run.checkpoints)[-1] == lost["saved"] + 2


def without_storage(data: str, run: str, rank: int) -> None:
    """`ssl-pipeline pretrain` on a rank; on `rank` alone the pictures cannot be read from the third batch on."""
    take = Loader._take

    def away(loader: Loader) -> Batch:
        if loader.world.rank == rank and loader.consumed == 2 * loader.batch_size:
            raise StorageFailure("cannot read a.jpg, nor others")
        return take(loader)

    Loader._take = away  # type: ignore[method-assign]
    entry(
        ["pretrain", "smoke", f"data.root={data}", "data.batch_size=16", "monitor.tensorboard=false", "--output", run]
    )


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_stops_for_a_reason_of_its_own_is_not_lost_and_all_end_alike(
    few_digits: Path, tmp_path: Path, start: Callable[..., Job], rank: int
) -> None:
    """Rank 0 takes the job's store with it."""
    run = RunFolder(tmp_path / "run")
    here = f"from tests.test_watchdog import without_storage; without_storage({str(few_digits)!r}, {str(run.path)!r}, {rank})"
    job = start("-c", here)
    assert [one.wait(PATIENCE) for one in job.ranks] == [Status.STORAGE] * 2, job.told(0) + job.told(1)
    reason = (
        "cannot read a.jpg, nor others"
        if rank == 0
        else f"rank 1 on {cluster.node_name()}: cannot read a.jpg, nor others"
    )
    assert [line for line in job.told(0).splitlines() if "cannot read" in line] == [f"ssl-pipeline: {reason}"]
    assert ("cannot read" in job.told(1)) == (rank == 1)
    assert "Traceback" not in job.told(0) + job.told(1)
    events = run.events()
    assert [event["event"] for event in events] == ["start", "end"]  # and none that a rank is lost, nor a requeue
    assert (events[1]["status"], events[1]["reason"]) == (Status.STORAGE, reason)
    assert not list(run.logs.glob("*"))  # no stacks
    assert cluster.status(run).startswith(f"{run.path}: ended with status 77: {reason}\n")


# ------------------------------------------------------------------------------------------------------- the loop alone
def loop(folder: str, fate: str, timeout: float) -> None:
    """What one rank runs: a collective a step, until its fate comes in step 40."""
    world = distributed.start(timedelta(seconds=timeout))
    run = RunFolder(Path(folder))
    try:
        with Watchdog(run, world, timeout) as watchdog:
            for step in range(10**6):
                if world.rank == 1 and step == 40 and fate == "sleeps":
                    sleep_in_the_loader()
                if world.rank == 1 and step == 40 and fate == "holds the GIL":
                    hold_the_gil()
                if world.rank == 1 and step == 40 and fate == "raises":
                    raise ValueError("a defect")
                watchdog.beat(step)
                dist.all_reduce(torch.ones(1))
                Path(folder, f"step_{world.rank}").write_text(f"{step:09d}")
                for _ in range(30 if fate == "is stopped" else 1):  # one sleep would be over when the process wakes
                    time.sleep(0.05)
    except Stop as stop:
        print(stop, file=sys.stderr)
        leave(stop.status)


def sleep_in_the_loader() -> None:
    time.sleep(2 * PATIENCE)


def hold_the_gil() -> None:
    ctypes.PyDLL(None).sleep(2 * PATIENCE)


def step_of(folder: Path, rank: int) -> int:
    path = folder / f"step_{rank}"
    return int(path.read_text() or 0) if path.exists() else 0


def words_of(folder: Path, fate: str, timeout: float) -> tuple[str, str]:
    return "-c", f"from tests.test_watchdog import loop; loop({str(folder)!r}, {fate!r}, {timeout})"


@pytest.mark.slow
def test_the_rank_that_holds_the_store_dies(tmp_path: Path, start: Callable[..., Job]) -> None:
    job = start(*words_of(tmp_path, "killed", 12))
    job.until(lambda: step_of(tmp_path, 1) >= 40)
    job.ranks[0].kill()
    assert job.ranks[1].wait(PATIENCE) == Status.RANK_LOST
    assert f"rank 0 on {cluster.node_name()} is lost, and the job's store with it" in job.told(1)
    assert [event["ranks"] for event in RunFolder(tmp_path).events()] == [[0]]


@pytest.mark.slow
def test_a_rank_that_hangs_in_its_loader_is_behind_and_all_end(tmp_path: Path, start: Callable[..., Job]) -> None:
    job = start(*words_of(tmp_path, "sleeps", 12))
    assert [rank.wait(PATIENCE) for rank in job.ranks] == [Status.RANK_LOST] * 2
    said = job.told(0) + job.told(1)
    assert re.search(r"^ssl-pipeline: rank 1 on \S+ has not gone on for \d+ s at step 39, in .*; the others wait at step 40",
                     said, re.M)  # fmt: skip
    assert said.count("ssl-pipeline: ") == 1  # one rank tells
    assert len(RunFolder(tmp_path).events()) == 1
    stacks = [(tmp_path / "logs" / f"stacks_rank_{rank:04d}.txt").read_text() for rank in range(2)]
    assert "in all_reduce" in stacks[0]
    assert "in sleep_in_the_loader" in stacks[1]


@pytest.mark.slow
def test_a_ranks_own_error_keeps_its_traceback_and_the_others_name_it(
    tmp_path: Path, start: Callable[..., Job]
) -> None:
    job = start(*words_of(tmp_path, "raises", 12))
    assert [rank.wait(PATIENCE) for rank in job.ranks] == [Status.RANK_LOST, Status.CRASH]
    assert job.told(1).rstrip().endswith("ValueError: a defect")
    assert re.search(
        r"^(ssl-pipeline: )?rank 1 on \S+ ended with ValueError: a defect; the others wait at step 40; ",
        job.told(0),
        re.M,
    )
    assert "Traceback" not in job.told(0)


@pytest.mark.slow
def test_a_rank_that_holds_the_gil_is_silent_and_its_main_threads_stack_is_written_all_the_same(
    tmp_path: Path, start: Callable[..., Job]
) -> None:
    job = start(*words_of(tmp_path, "holds the GIL", 12))
    assert job.ranks[0].wait(PATIENCE) == Status.RANK_LOST
    assert re.search(r"^ssl-pipeline: rank 1 on \S+ has been silent", job.told(0), re.M)
    end = time.monotonic() + PATIENCE
    while "in hold_the_gil" not in job.told(1):
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_a_process_that_was_stopped_for_longer_than_the_timeout_goes_on(
    tmp_path: Path, start: Callable[..., Job]
) -> None:
    job = start(*words_of(tmp_path, "is stopped", 5), ranks=1)
    job.until(lambda: step_of(tmp_path, 0) >= 2)
    time.sleep(0.5)  # in the midst of a step whose beat was seen
    job.ranks[0].send_signal(signal.SIGSTOP)
    time.sleep(6)
    step = step_of(tmp_path, 0)
    job.ranks[0].send_signal(signal.SIGCONT)
    job.until(lambda: step_of(tmp_path, 0) >= step + 3)


# ------------------------------------------------------------------------------------------------------------ judgements
def heartbeat(
    count: int, step: int | None = 7, waits: bool = True, ended: str | None = None, host: str = "n1"
) -> Heartbeat:
    return Heartbeat(count, 100.0, host, step, 590.0, "data/loader.py:1 (_take)", waits, ended)


@pytest.mark.parametrize(
    ("first", "last", "ranks", "said", "defect"),
    [
        (
            {0: heartbeat(1), 1: heartbeat(1, 6, host="n2"), 2: heartbeat(1)},
            {0: heartbeat(2), 1: heartbeat(1, 6, host="n2"), 2: heartbeat(2)},
            [1], "rank 1 on n2 has been silent for 60 s at step 6: its process is dead .*; the others wait at step 7", False,
        ),
        # One that never spoke, one whose node cannot be told from a dead process.
        ({0: heartbeat(1)}, {0: heartbeat(2)}, [1, 2], "ranks 1, 2 have been silent before the first step: ", False),
        # It ended with an error, and the third went because of that, properly: no blame.
        (
            {0: heartbeat(1), 1: heartbeat(1, ended="KeyError: 'x'"), 2: heartbeat(1, ended="")},
            {0: heartbeat(2), 1: heartbeat(1, ended="KeyError: 'x'"), 2: heartbeat(1, ended="")},
            [1], r"rank 1 on n1 ended with KeyError: 'x'; the others wait at step 7$", True,
        ),
        # All live: the lowest step; among equals the one that waits for nobody; else all.
        (
            dict.fromkeys(range(3), heartbeat(1)),
            {0: heartbeat(2), 1: heartbeat(2), 2: heartbeat(2, 6)},
            [2], "rank 2 on n1 has not gone on for 590 s at step 6, in .*; the others wait at step 7", False,
        ),
        (
            dict.fromkeys(range(3), heartbeat(1)),
            {0: heartbeat(2), 1: heartbeat(2, waits=False), 2: heartbeat(2)},
            [1], "rank 1 on n1 has not gone on .*; the others wait at step 7", False,
        ),
        (
            dict.fromkeys(range(3), heartbeat(1)),
            dict.fromkeys(range(3), heartbeat(2)),
            [0, 1, 2], r"ranks 0, 1, 2 on n1 have not gone on for 590 s at step 7, in data/loader.py:1 \(_take\)$", False,
        ),
    ],
)  # fmt: skip
def test_whom_two_readings_of_the_heartbeats_blame(
    monkeypatch: pytest.MonkeyPatch,
    first: dict[int, Heartbeat],
    last: dict[int, Heartbeat],
    ranks: list[int],
    said: str,
    defect: bool,
) -> None:
    monkeypatch.setattr("ssl_pipeline.watchdog.time.time", lambda: 160.0)
    found, sentence, own_error = diagnose(first, last, 3)
    assert (found, own_error) == (ranks, defect)
    assert re.match(said, sentence), sentence


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error [n1]:3: Connection reset by peer"), True),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 600000ms for recv operation"), True),
        (dist.DistBackendError("NCCL communicator was aborted on rank 1."), True),
        (dist.DistNetworkError("Connection was likely closed."), True),
        (
            RuntimeError("[enforce fail at gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4"),
            False,
        ),
        (dist.DistBackendError("NCCL error: invalid usage"), False),
        (RuntimeError("connection closed, says somebody else"), False),
        (ValueError("gloo: connection closed"), False),
    ],
)
def test_which_errors_tell_of_another_rank(error: Exception, lost: bool) -> None:
    assert tells_of_a_lost_rank(error) == lost


def test_a_slurm_job_comes_back_unless_it_was_lost_too_often_at_the_same_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requeued = []
    monkeypatch.setattr(cluster, "requeue", lambda **_: requeued.append(1) or True)
    run = RunFolder(tmp_path)

    def lose(told: list, saved: int = 0, job: str | None = "7") -> str:
        """What the main rank says; each start of the job is a process of its own, here a new Watchdog."""
        if job is not None:
            monkeypatch.setenv("SLURM_JOB_ID", job)
        run.checkpoints.mkdir(exist_ok=True)
        (run.checkpoints / f"step_{saved:08d}.pt").touch()
        requeued.clear()
        watchdog = Watchdog(run, distributed.start(), 5)
        watchdog._verdict = lambda: Verdict(*told)  # type: ignore[method-assign]
        return str(watchdog._end(None)).rpartition("; ")[2]

    silent = [0, [3], "rank 3 has been silent", False]
    goes_on = "the same command goes on from the last checkpoint"
    assert lose(silent, job=None) == goes_on
    assert [lose(silent) for _ in range(MOST_RETURNS + 1)] == ["the job was requeued"] * MOST_RETURNS + [goes_on]
    assert not requeued
    assert lose(silent, saved=5) == "the job was requeued"
    assert lose(silent, saved=5, job="8") == "the job was requeued"
    assert lose([0, [3], "rank 3 ended with KeyError", True], saved=9) == goes_on  # a defect would come again
    assert lose([2, [3], "rank 3 has been silent", False], saved=9) == ""  # rank 2 tells it
    assert [event["saved"] for event in run.events()] == [0] * (MOST_RETURNS + 2) + [5, 5, 9]


@pytest.mark.parametrize("alive", [(1, 2, 3), (2, 3)])
def test_that_rank_0_and_the_store_are_lost_is_recorded_once_also_where_its_whole_node_is(
    tmp_path: Path, alive: tuple[int, ...]
) -> None:
    run = RunFolder(tmp_path)
    run.record("rank_lost", job=None, saved=0, ranks=[3], reason="of the start before")
    run.record("start")
    for rank in alive:  # of two nodes with two ranks each
        watchdog = Watchdog(run, replace(distributed.start(), rank=rank, size=4, local_size=2), 5)
        watchdog._verdict = lambda: Verdict(None, [0], "rank 0 is lost", False)  # type: ignore[method-assign]
        assert str(watchdog._end(None)).startswith("rank 0 is lost; ")
    assert [event["event"] for event in run.events()] == ["rank_lost", "start", "rank_lost"]


def test_a_run_that_ends_properly_leaves_no_file_no_thread_and_no_timer(tmp_path: Path) -> None:
    of_two = replace(distributed.start(), size=2)  # one alone has no timer
    with Watchdog(RunFolder(tmp_path), of_two, 5) as watchdog:
        watchdog.beat(0)
        until(lambda: signal.getitimer(signal.ITIMER_REAL)[0] > 0)
    assert not list(tmp_path.iterdir())
    assert not watchdog._thread.is_alive()
    assert not watchdog._line._thread.is_alive()
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert json.loads(distributed.store().get("heartbeat/0"))["ended"] == ""


def woken_again_and_again(folder: str) -> None:
    """A process whose timer is over as often as possible, while its main thread waits and all others run."""

    def run_python(until: float) -> None:
        while time.monotonic() < until:
            functools.reduce(lambda found, _: (lambda: found)(), range(100))

    of_two = replace(distributed.start(), size=2)
    with Watchdog(RunFolder(Path(folder)), of_two, 600):
        end = time.monotonic() + 3
        for _ in range(3):
            threading.Thread(target=run_python, args=(end,)).start()
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0005)
        time.sleep(3)
    print("goes on", flush=True)


def test_a_timer_that_is_over_while_threads_run_crashes_nothing(tmp_path: Path) -> None:
    """As where a process is woken: one time in hundreds it died of SIGSEGV when the stacks of all threads were read then."""
    line = [sys.executable, "-c", f"from tests.test_watchdog import *; woken_again_and_again({str(tmp_path)!r})"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert (done.returncode, done.stdout) == (0, "goes on\n"), done.stderr[-2000:]
    assert done.stderr.count("in woken_again_and_again") > 100


# ------------------------------------------------------------------------------------------------------------- the store
@pytest.fixture
def tcp_store(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """The job's store, as several ranks have it."""
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: dist.PrefixStore("default_pg", store))
    return store


def sockets() -> dict[str, int]:
    """This process's open sockets: what each is, and its number."""
    found = {}
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            found[os.readlink(f"/proc/self/fd/{number}")] = number
    return {name: number for name, number in found.items() if name.startswith("socket")}


def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_heartbeats_go_on_and_questions_are_answered_after_the_connection_broke(
    tmp_path: Path, tcp_store: dist.TCPStore
) -> None:
    def count() -> int:
        return watchdog._line.ask(partial(_everyone, 1))[0].count

    before = sockets()
    with Watchdog(RunFolder(tmp_path), distributed.start(), 5) as watchdog:
        until(lambda: watchdog._line._count > 2)
        first = count()
        for number in [place for name, place in sockets().items() if name not in before]:
            # The other end, a socket of this process too, may be closed by then.
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as connection:
                connection.shutdown(socket.SHUT_RDWR)
        broken = watchdog._line._store
        assert count() > first  # by the next connection
        assert watchdog._line._store is not broken
        second = count()
        until(lambda: count() > second + 1)
    assert json.loads(distributed.store().get("heartbeat/0"))["ended"] == ""


def test_a_first_try_to_reach_the_store_that_fails_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries, there = [], distributed.store

    def busy() -> dist.Store:
        tries.append(1)
        if len(tries) == 1:
            raise TimeoutError
        return there()

    monkeypatch.setattr(distributed, "store", busy)
    with Watchdog(RunFolder(tmp_path), distributed.start(), 5) as watchdog:
        until(lambda: watchdog._line._count > 2)
    assert len(tries) == 2


def test_a_store_that_stays_away_is_given_up_with_a_sentence_and_the_loop_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = []

    def away() -> dist.Store:
        tries.append(time.monotonic())
        raise ConnectionRefusedError

    with Watchdog(RunFolder(tmp_path), distributed.start(), 1) as watchdog:
        watchdog.beat(0)
        until(lambda: watchdog._line._count > 2)
        monkeypatch.setattr(distributed, "store", away)
        monkeypatch.setattr(
            watchdog._line, "_speak", lambda store: (_ for _ in ()).throw(dist.DistNetworkError("reset"))
        )
        while watchdog._line._thread.is_alive():
            watchdog.beat(1)
            time.sleep(0.05)
        assert watchdog._thread.is_alive()
        assert watchdog._verdict()[1:3] == (
            [], f"a rank is lost, and without the job's store on {cluster.node_name()} which one it is cannot be told"
        )  # fmt: skip
        watchdog.beat(2)
    assert len(tries) > 2
    (told,) = caplog.records
    assert re.fullmatch(
        rf"rank 0 has not reached the job's store on {cluster.node_name()} for 1 s and tries no more: training goes on, but "
        "if a rank is lost, which one it was cannot be told",
        told.getMessage(),
    )


# -------------------------------------------------------------------------------------------------------- small matters
def test_where_a_thread_is_and_whether_it_waits_for_others() -> None:
    release = threading.Event()
    for action, where in ((partial(distributed.together, release.wait), r"distributed\.py:\d+ \(together\)"),
                          (release.wait, "no line of ours")):  # fmt: skip
        thread = threading.Thread(target=action)
        thread.start()
        try:
            while "wait" not in (sys._current_frames()[thread.ident].f_code.co_name):
                time.sleep(0.01)
            found, waits = _position(thread.ident)
        finally:
            release.set()
            thread.join()
            release.clear()
        assert re.fullmatch(where, found)
        assert waits == found.startswith("distributed.py")


@pytest.mark.parametrize(("said", "ended"), [("no room", "StorageFailure: no room"), ("", "")])
def test_a_stop_of_one_rank_alone_is_its_own(tmp_path: Path, said: str, ended: str) -> None:
    """The others would else find all ranks alive and blame one of themselves."""
    watchdog = Watchdog(RunFolder(tmp_path), distributed.start(), 5)
    with pytest.raises(StorageFailure), watchdog:
        raise StorageFailure(said)
    assert watchdog._ended == ended
    assert not distributed.store().check(["verdict"])  # there is nobody to tell, but for the next run in this process
