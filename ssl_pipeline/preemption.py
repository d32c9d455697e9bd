"""Signals, and what they become: one decision of all ranks at a step boundary, without a step that waits for it.

Slurm sends SIGTERM at scancel, preemption and requeue, and the signal of --signal before the time limit. Nothing is done
in a handler but to note the signal: a second one during the save changes nothing.
"""

from __future__ import annotations

import signal
from datetime import timedelta
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from ssl_pipeline.exits import Status, Stop

if TYPE_CHECKING:
    import torch.distributed as dist

SLURM_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SIGNALS = (*SLURM_SIGNALS, signal.SIGINT)

_noted: list[int] = []


def note_signals() -> None:
    """From here on SIGTERM, SIGUSR1 and SIGUSR2 end nothing: the first step boundary will answer them.

    Called before torch is imported (torch is therefore imported within `Preemption`): a job that is preempted while it
    starts must end with status 75 as any other, or Slurm would count it as failed and its script not requeue it.
    """
    for number in SLURM_SIGNALS:
        signal.signal(number, _note)


def noted() -> list[int]:
    """The signals that came."""
    return list(_noted)


def stop_at_signals() -> None:
    """From here on SIGTERM raises Stop with status 75: for work that has nothing to save, and would start anew.

    SIGUSR1 and SIGUSR2, which come some time before the time limit, end nothing: the work may be done by then.
    """
    for number in SLURM_SIGNALS:
        signal.signal(number, _raise if number == signal.SIGTERM else _note)
    if signal.SIGTERM in _noted:
        _raise(signal.SIGTERM, None)


def _note(number: int, frame: FrameType | None) -> None:
    _noted.append(number)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    for other in SLURM_SIGNALS:
        signal.signal(other, _note)  # a second one must not take the exit status
    stop = Stop(f"stopped by {signal.Signals(number).name}; the same command starts again")
    stop.status = Status.STOPPED
    raise stop


class Preemption:
    """A context in which signals only set a flag; `requested()` tells all ranks the same answer.

    The flags are summed by an asynchronous collective on the CPU, started at one step and read at the next: it has had
    a whole step to finish, so no rank waits for another. After a stop the handlers stay: the process is about to end,
    and a signal that comes late must not take its exit status.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        import numpy as np
        import torch
        import torch.distributed as dist

        self._dist = dist
        self._stopped = False
        self._old: dict[signal.Signals, Any] = {}
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout)
        self._sum = np.zeros(1, dtype=np.int64)  # read through numpy: no tensor operation, no wait for a device
        self._tensor = torch.from_numpy(self._sum)
        self._pending: dist.Work | None = None

    def __enter__(self) -> Preemption:
        self._before = len(_noted) if signal.getsignal(signal.SIGTERM) is not _note else 0
        self._old = {number: signal.signal(number, _note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not self._stopped:
            for number, handler in self._old.items():
                signal.signal(number, handler)
        if self._pending is not None and kind is None:
            self._pending.wait()

    def requested(self) -> bool:
        """Whether any rank had been signalled by its last call. To be called once a step by all ranks."""
        if self._pending is not None:
            self._pending.wait()
            if self._sum[0]:
                self._pending = None
                self._stopped = True
                return True
        self._sum[0] = len(_noted) > self._before
        self._pending = self._dist.all_reduce(self._tensor, group=self._group, async_op=True)
        return False
