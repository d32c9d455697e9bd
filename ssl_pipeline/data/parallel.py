"""Work on many files in processes of their own, told of in one line. No file can stop it: a worker that dies is replaced."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

log = logging.getLogger("ssl_pipeline")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def each(work: Callable[[Job], Result], jobs: Iterable[Job], processes: int) -> Iterator[tuple[Job, Result | None]]:
    """(job, work(job)) of every job, in the order in which they end; None where its process died of it.

    `work` is a function at a module's top level; its module is imported anew in each process. What it raises is raised here.
    """
    waiting = deque(jobs)
    flying: dict[Future[Result], Job] = {}
    pool = _pool(processes)
    try:
        while waiting or flying:
            died = False
            suspects: list[Job] = []
            while waiting and len(flying) < 2 * processes:  # each has its next one at hand, and few are suspects
                try:
                    flying[pool.submit(work, waiting[0])] = waiting[0]
                except BrokenProcessPool:
                    died = True
                    break
                waiting.popleft()
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                job = flying.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    died = True
                    suspects.append(job)
                    continue
                yield job, result
            if died:  # of one of those that it had
                pool.shutdown()
                suspects += flying.values()
                flying.clear()
                for job in suspects:
                    yield job, _alone(work, job)
                pool = _pool(processes)
    finally:
        pool.shutdown(cancel_futures=True)


def _alone(work: Callable[[Job], Result], job: Job) -> Result | None:
    with _pool(1) as pool:
        try:
            return pool.submit(work, job).result()
        except BrokenProcessPool:
            return None


def _pool(processes: int) -> ProcessPoolExecutor:
    # Not forked: a fork of a process with threads, as DALI's and torch's, may wait for ever for a lock that one of them held.
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_begin)


def _begin() -> None:
    """In a worker: Ctrl-C is answered by its parent, and it ends with that, which a killed parent cannot ask for."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class ProgressLine:
    """How far `total` things are: one line that changes on a terminal; elsewhere a line every half minute and at the end.

    Args:
        what: is done, as `packing train`.
        total: of things.
    """

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total = what, total
        self.done = self._before = 0
        self._start = self._told = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def add(self, count: int, *, before: bool = False) -> None:
        """So many more are done; `before`: by an earlier process, so that they say nothing of the rate."""
        self.done += count
        self._before += count * before
        now = time.monotonic()
        if now - self._told < (0.2 if self._terminal else 30) and self.done < self.total:
            return
        self._told = now
        rate = max(self.done - self._before, 1) / max(now - self._start, 1e-9)
        left = int((self.total - self.done) / rate)
        text = (
            f"{self.what}: {self.done:,} of {self.total:,} ({100 * self.done // self.total} %), {rate:,.0f} a second, "
        )
        text += f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        if self._terminal:
            end = "\n" if self.done >= self.total else ""
            print(f"\r{text:<100}", end=end, file=sys.stderr, flush=True)
        else:
            log.info("%s", text)
