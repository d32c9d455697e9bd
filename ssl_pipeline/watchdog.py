"""A rank that dies or hangs: named, and the job ended with status 78 instead of waiting for it.

Beside the loop of each rank run two threads. One speaks with the job's store: every second it writes this rank's
heartbeat, under a key of its own, and nobody reads them while all is well. The other counts how long the loop has not
beaten, whatever keeps it: a collective that a peer never enters, the data, a file system. Shortly before `timeout` (and
so before the collectives' own timeout, after which NCCL aborts the process) it writes the stacks of all threads to
RUN/logs, compares two readings of all heartbeats, and ends the process.

A peer that died makes a living rank's collective raise at once, on gloo: then the loop's exception is the occasion, and
the heartbeats are the evidence.

A rank that ends by a Stop of its own (its pictures' storage is gone) says so in the place of a verdict before it goes:
the others end with its status and its sentence, and nobody is lost.

Where a library holds Python's lock (the GIL), neither thread runs: a timer's signal then has C write the main thread's
stack to stderr, and the other ranks find this one silent.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import queue
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from pydantic import Field

from ssl_pipeline import cluster, config, distributed
from ssl_pipeline.exits import Status, Stop
from ssl_pipeline.run_folder import RunFolder, saved_steps

log = logging.getLogger("ssl_pipeline")

T = TypeVar("T")

MOST_RETURNS = 2
"""Times that a Slurm job is put back after a rank was lost without a new checkpoint in between."""

BEATS = 5
"""A rank whose heartbeat does not change for this many intervals is silent."""


class Options(config.Options):
    """When a rank counts as lost."""

    timeout: float = Field(600.0, ge=5)
    """Seconds without a step after which the job ends with status 78; also the timeout of every collective. Longer than
    the slowest of: the first step, a checkpoint, k-nn while training. For the pictures' storage 0.4 of it is waited, 240 s at
    most."""


@dataclass(frozen=True)
class Heartbeat:
    """What a rank says of itself."""

    count: int
    """Grows by one an interval while the process lives."""
    time: float
    """Of the rank's own clock, which decides nothing."""
    host: str
    step: int | None
    """Of the last beat; None before the first."""
    still: float
    """Seconds since then, without those in which the whole process was stopped."""
    where: str
    """The innermost line of ours that the main thread is in."""
    waits: bool
    """Whether it is in a collective there, or in a backward pass, which ends in some."""
    ended: str | None = None
    """None while it runs, empty after a proper end, else what it ended with."""


class Verdict(NamedTuple):
    """Why all end; the first one that a rank writes into the store is all ranks'."""

    teller: int | None
    """The rank that says and records it. None: each does, since without the store they cannot agree."""
    ranks: list[int]
    """Those that are lost, or the one that said why it goes."""
    reason: str
    defect: bool
    """Whether one of them ended with an error of its own, which would come again."""
    status: int = Status.RANK_LOST
    """With which all end: another one where a rank said why it goes."""


class Line:
    """A rank's line to the job's store, in a thread of its own, since it may hang where a node is gone.

    Every `interval` seconds it writes the heartbeat that `look` returns for a count, and reads whether there is a verdict.
    A connection that broke is made anew; where that fails for `patience` seconds it gives up.
    """

    def __init__(self, world: distributed.World, interval: float, patience: float, look: Callable[[int], Heartbeat]):
        self._rank, self._interval, self._patience, self._look = world.rank, interval, patience, look
        self._store: dist.Store | None = None
        self._count = 0
        self._over = threading.Event()
        self._questions: queue.Queue[tuple[Callable[[dist.Store], Any], queue.Queue[Any]]] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.known = threading.Event()
        """Set when there is a verdict."""
        self.verdict: Verdict | None = None
        self.at_main = ""
        """` on HOST`, where the main rank's host is known."""
        self.gave_up = False

    @property
    def farewell(self) -> bool:
        """Whether the verdict is that of a rank which said why it goes."""
        return self.verdict is not None and self.verdict.status != Status.RANK_LOST

    def start(self) -> None:
        """Begin with the heartbeats."""
        self._thread.start()  # which connects: that many ranks do so at once, and the first try may fail, ends no run

    def ask(self, question: Callable[[dist.Store], T]) -> T | None:
        """What `question` finds in the store; None where it does not answer."""
        answer: queue.Queue[T] = queue.Queue()
        self._questions.put((question, answer))
        try:
            return answer.get(timeout=BEATS * self._interval)
        except queue.Empty:
            return None

    def propose(self, verdict: Verdict) -> None:
        """Make `verdict` all ranks', unless there is one already, which is then this rank's too."""
        if found := self.ask(lambda store: store.compare_set("verdict", "", json.dumps(verdict))):
            self.verdict = Verdict(*json.loads(found))

    def close(self) -> None:
        """Write a last heartbeat, and end."""
        self._over.set()
        self._questions.put((lambda store: None, queue.Queue()))  # wakes the thread
        self._thread.join(BEATS * self._interval)

    def _run(self) -> None:
        failed_since: float | None = None
        while True:
            over = self._over.is_set()
            try:
                if self._store is None:  # torch does not mend a connection that broke
                    self._store = distributed.store()
                self._speak(self._store)
                failed_since = None
                if not over:
                    self._answer(self._store)
            except (OSError, RuntimeError):  # a DistError is a RuntimeError
                self._store = None
                now = time.monotonic()
                failed_since = failed_since or now
                if now - failed_since > self._patience:
                    self.gave_up = True
                    log.warning(
                        "rank %d has not reached the job's store%s for %.0f s and tries no more: training goes on, but if a "
                        "rank is lost, which one it was cannot be told",
                        self._rank, self.at_main, now - failed_since,
                    )  # fmt: skip
                    return
                self._over.wait(self._interval)
            if over:
                return

    def _speak(self, store: dist.Store) -> None:
        self._count += 1
        store.set(_key(self._rank), json.dumps(asdict(self._look(self._count))))
        if not self.at_main and store.check([_key(0)]):
            self.at_main = f" on {_read(store.get(_key(0))).host}"
        if not self.known.is_set() and store.check(["verdict"]):
            self.verdict = Verdict(*json.loads(store.get("verdict")))
            self.known.set()

    def _answer(self, store: dist.Store) -> None:
        """Answer the next question, for which it waits an interval."""
        try:
            question, answer = self._questions.get(timeout=self._interval)
        except queue.Empty:
            return
        try:
            answer.put(question(store))
        except (OSError, RuntimeError):
            self._questions.put((question, answer))  # for the next connection
            raise


class Watchdog:
    """A context around the loop, which calls `beat` once a step.

    Raises a Stop with the verdict's status in the place of an exception by which a collective tells that another rank is
    gone. Ends the process with that status where the loop does not beat for `timeout` seconds, or another rank came to a
    verdict. The first to find that a rank is lost tells and records it for all; of a rank that said why it goes, the main
    one does.
    """

    def __init__(self, run: RunFolder, world: distributed.World, timeout: float) -> None:
        self._run, self._world, self._timeout = run, world, timeout
        self._interval = min(1.0, timeout / (4 * BEATS))
        self._limit = timeout - 2 * BEATS * self._interval  # the rest is for the verdict
        self._line = Line(world, self._interval, timeout, self._heartbeat)
        self._main = threading.get_ident()
        self._step: int | None = None
        self._beats = 0
        self._still = 0.0
        self._ended: str | None = None
        self._over = threading.Event()
        self._deciding = threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def beat(self, step: int) -> None:
        """The loop goes on, in `step`. To be called once a step, and after what takes long and is no step."""
        self._step = step
        self._beats += 1

    def __enter__(self) -> Watchdog:
        # Of the thread that gets the signal alone, which stands still meanwhile. faulthandler's own timer reads the frames
        # of all threads from one without the GIL. Where another one holds it and hangs, they do not change; but in a process
        # that is woken after a stop (SIGCONT, a laptop asleep) the timer is over at once and all run: it crashed. A main
        # thread that does not wait for the others may be caught halfway into a call and crash still, once in thousands.
        if self._world.size > 1:
            faulthandler.register(signal.SIGALRM, file=2, all_threads=False)
        self._line.start()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        stop = None
        if self._world.size > 1 and isinstance(error, Exception) and tells_of_a_lost_rank(error):
            stop = self._end(error)
            self._let_others_know()
        # A rank that stops because another one does has nothing to say of itself.
        self._ended = "" if error is None or stop or not str(error) else _in_short(error)
        self._over.set()
        if self._world.size > 1 and self._ended and isinstance(error, Stop) and not error.of_all:
            self._say_farewell(error)
        self._line.close()
        self._thread.join(BEATS * self._interval)
        if self._world.size > 1:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.unregister(signal.SIGALRM)
        if stop is not None:
            raise stop from error

    def _watch(self) -> None:
        seen, before = 0, time.monotonic()
        while not self._over.wait(self._interval):
            now = time.monotonic()
            # A process that was stopped (SIGSTOP, a laptop asleep) is not to blame for that time: it did not tick either.
            self._still += min(now - before, 2 * self._interval)
            before = now
            if seen != self._beats:
                seen, self._still = self._beats, 0.0
                if self._world.size > 1:  # a rank alone that was stopped goes on, and has nothing to tell
                    signal.setitimer(signal.ITIMER_REAL, self._timeout)
            if self._line.known.is_set() or (seen and self._still >= self._limit):
                # After a farewell the loop ends by itself where its collectives fail, and what it was writing is whole.
                if self._line.farewell and self._over.wait(3 * BEATS * self._interval):
                    return
                stop = self._end(None)
                if str(stop):
                    line = f"ssl-pipeline: {stop}"
                    _within(BEATS * self._interval, partial(print, line, file=sys.stderr, flush=True))
                self._let_others_know()
                os._exit(stop.status)

    def _heartbeat(self, count: int) -> Heartbeat:
        where, waits = _position(self._main)
        host = cluster.node_name()
        return Heartbeat(count, time.time(), host, self._step, self._still, where, waits, self._ended)

    # -------------------------------------------------------------------------------------------------------- the verdict
    def _end(self, error: BaseException | None) -> Stop:
        """What ends this rank by all ranks' verdict, without a word where another rank says it."""
        if not self._deciding.acquire(blocking=False):
            threading.Event().wait()  # the other thread is at it, and ends the process
        signal.setitimer(signal.ITIMER_REAL, 0)
        if error is None and not self._line.farewell:  # at once: there may not be much time left
            _within(BEATS * self._interval, lambda: self._dump(error))
        verdict = self._verdict()
        if error is not None and verdict.status == Status.RANK_LOST:
            _within(BEATS * self._interval, lambda: self._dump(error))
        stop = Stop(self._tell(verdict) if verdict.teller in (self._world.rank, None) else "")
        stop.status = Status(verdict.status)
        return stop

    def _verdict(self) -> Verdict:
        """All ranks' verdict: the one that there is, or what two readings of all heartbeats say."""
        line, read = self._line, partial(_everyone, self._world.size)
        first = None if line.known.is_set() else line.ask(read)
        if first is not None and not line.known.wait(BEATS * self._interval):
            last = line.ask(read)
            if last is not None:
                line.propose(Verdict(self._world.rank, *diagnose(first, last, self._world.size)))
        if line.verdict is not None:
            return line.verdict
        if line.gave_up:  # and the loop went on since then, with rank 0
            reason = f"a rank is lost, and without the job's store{line.at_main} which one it is cannot be told"
            return Verdict(None, [], reason, False)
        return Verdict(None, [0], f"rank 0{line.at_main} is lost, and the job's store with it: {GONE}", False)

    def _tell(self, verdict: Verdict) -> str:
        """Record the verdict, and give the job back to Slurm where a lost rank may be a node's fault: what to say."""
        if verdict.status != Status.RANK_LOST:
            end = {"status": verdict.status, "reason": verdict.reason}
            _within(BEATS * self._interval, lambda: self._run.record("end", **end))
            return verdict.reason
        after = "the same command goes on from the last checkpoint"
        if verdict.teller is not None or self._records_for_all():
            saved = (_within(BEATS * self._interval, lambda: saved_steps(self._run.checkpoints)) or [0])[-1]
            put_back = not verdict.defect and _within(BEATS * self._interval, lambda: self._may_come_back(saved))
            event = {"job": cluster.job_id(), "ranks": verdict.ranks, "reason": verdict.reason, "saved": saved}
            # Before the requeue, which ends this process: what is not counted could go on for ever.
            _within(BEATS * self._interval, lambda: self._run.record("rank_lost", **event))
            if put_back and _within(60.0, lambda: cluster.requeue(patience=45.0)):
                after = "the job was requeued"
        return f"{verdict.reason}; stacks of the living ranks in {self._run.logs}; {after}"

    def _records_for_all(self) -> bool:
        """Whether this rank records what all found without the store: rank 1 or, where the whole of rank 0's node died and
        rank 1 with it, the first rank of the next node, which waits for rank 1's record."""
        if self._world.rank == self._world.local_size != 1:
            time.sleep(2 * BEATS * self._interval)
            events = _within(BEATS * self._interval, self._run.events) or []
            newest = [event["event"] for event in events if event["event"] in ("start", "rank_lost")][-1:]
            return newest != ["rank_lost"]
        return self._world.rank == 1

    def _say_farewell(self, stop: Stop) -> None:
        """Leave the reason for which this rank alone goes as the verdict, and time to read it."""
        rank = self._world.rank
        reason = str(stop) if rank == 0 else f"rank {rank} on {cluster.node_name()}: {stop}"
        self._line.propose(Verdict(0, [rank], reason, True, stop.status))
        self._let_others_know()

    def _let_others_know(self) -> None:
        """Where the store may end with this process, wait until all have read the verdict."""
        if self._world.rank == 0 and self._world.size > 1:
            time.sleep(BEATS * self._interval)

    def _may_come_back(self, saved: int) -> bool:
        """Whether this is a Slurm job that was not lost MOST_RETURNS times before at the same checkpoint."""
        job = cluster.job_id()
        events = [event for event in self._run.events() if event["event"] == "rank_lost"]
        before = [event for event in events if (event["job"], event["saved"]) == (job, saved)]
        return job is not None and len(before) < MOST_RETURNS

    def _dump(self, error: BaseException | None) -> None:
        """Write the stacks of all threads, and `error`, to RUN/logs; to stderr where that is not possible."""
        title = f"{time.strftime('%Y-%m-%d %H:%M:%S %z')} rank {self._world.rank}, step {self._step}\n"
        lines = traceback.format_exception(error) if error is not None else []
        try:
            self._run.logs.mkdir(parents=True, exist_ok=True)
            path = self._run.logs / f"stacks_rank_{self._world.rank:04d}.txt"
            with path.open("a", encoding="utf-8") as file:
                file.writelines([title, *lines])
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError:
            faulthandler.dump_traceback(2)


# ------------------------------------------------------------------------------------------------------------ judgements
GONE = "its process is dead or stopped, or its node cannot be reached"

_OF_A_PEER = re.compile(r"time(d )?[ -]?out|connection|closed|reset|broken pipe|aborted|remote", re.IGNORECASE)


def tells_of_a_lost_rank(error: Exception) -> bool:
    """Whether a collective raised `error` because of another rank: torch's own classes, or gloo's plain RuntimeError.

    gloo's "enforce fail" (ranks that give buffers of different sizes) is a defect and none of these.
    """
    kind = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
    return kind and _OF_A_PEER.search(str(error)) is not None


def diagnose(first: Mapping[int, Heartbeat], last: Mapping[int, Heartbeat], size: int) -> tuple[list[int], str, bool]:
    """(lost ranks, a sentence, whether one of them ended with an error of its own) from two readings of all heartbeats.

    No clocks of two hosts are compared to decide: silent is whose heartbeat did not change in between. Where all live,
    lost are those at the lowest step, and among equals those that wait for nobody.
    """
    failed = [rank for rank in sorted(last) if last[rank].ended]
    here = [rank for rank in sorted(last) if last[rank].ended is None]
    living = [rank for rank in here if rank not in first or last[rank].count != first[rank].count]
    silent = [rank for rank in range(size) if rank not in living and (rank not in last or rank in here)]
    told = []
    if failed:
        told.append(f"{_named(failed, last)} ended with {last[failed[0]].ended}")
    if silent:
        since = max((time.time() - last[rank].time for rank in silent if rank in last), default=None)
        so_long = "" if since is None else f" for {since:.0f} s"
        told.append(f"{_named(silent, last)} {_have(silent)} been silent{so_long}{_at(silent, last)}: {GONE}")
    if told:
        others = [rank for rank in living if rank not in failed]
        told += [f"the others wait{_at(others, last)}"] if others else []
        return [*failed, *silent], "; ".join(told), bool(failed)
    lowest = min(_step(last[rank]) for rank in living)
    behind = [rank for rank in living if _step(last[rank]) == lowest]
    if len(behind) == len(living):
        behind = [rank for rank in living if not last[rank].waits] or living
    one = last[behind[0]]
    sentence = (
        f"{_named(behind, last)} {_have(behind)} not gone on for {one.still:.0f} s{_at(behind, last)}, in {one.where}"
    )
    others = [rank for rank in living if rank not in behind]
    return behind, f"{sentence}; the others wait{_at(others, last)}" if others else sentence, False


def _step(heartbeat: Heartbeat) -> int:
    return -1 if heartbeat.step is None else heartbeat.step


def _named(ranks: Sequence[int], heartbeats: Mapping[int, Heartbeat]) -> str:
    numbers = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    hosts = sorted({heartbeats[rank].host for rank in ranks if rank in heartbeats})
    where = f" on {', '.join(hosts[:8])}{' and others' if len(hosts) > 8 else ''}" if hosts else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {numbers}{where}"


def _have(ranks: Sequence[int]) -> str:
    return "have" if len(ranks) > 1 else "has"


def _at(ranks: Sequence[int], heartbeats: Mapping[int, Heartbeat]) -> str:
    """Where they are, of the foremost of them."""
    step = max((_step(heartbeats[rank]) for rank in ranks if rank in heartbeats), default=-1)
    return " before the first step" if step < 0 else f" at step {step}"


# -------------------------------------------------------------------------------------------------------- small matters
def _key(rank: int) -> str:
    return f"heartbeat/{rank}"


def _read(text: bytes) -> Heartbeat:
    return Heartbeat(**json.loads(text))


def _everyone(size: int, store: dist.Store) -> dict[int, Heartbeat]:
    keys = {rank: _key(rank) for rank in range(size)}
    if not store.check(list(keys.values())):  # a rank that never spoke: to read its key would be to wait for it
        keys = {rank: key for rank, key in keys.items() if store.check([key])}
    values = store.multi_get(list(keys.values()))
    return {rank: _read(value) for rank, value in zip(keys, values, strict=True)}


def _in_short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:300]


def _position(thread: int) -> tuple[str, bool]:
    """(the innermost line of ours that a thread is in, whether it is in a collective there or in a backward pass)."""
    package, waits = f"{Path(__file__).parent}{os.sep}", False
    frame = sys._current_frames().get(thread)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(package):
            file = code.co_filename.removeprefix(package)
            return f"{file}:{frame.f_lineno} ({code.co_name})", waits or file in ("distributed.py", "preemption.py")
        waits |= "/torch/distributed/" in code.co_filename or "/torch/autograd/" in code.co_filename
        frame = frame.f_back
    return "no line of ours", waits


def _within(seconds: float, action: Callable[[], T]) -> T | None:
    """What `action` returns; None where it takes longer, as on a file system that hangs, or fails: the end must come."""
    done: list[T] = []

    def run() -> None:
        with contextlib.suppress(Exception):
            done.append(action())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return done[0] if done else None
