"""Signals become one decision of all ranks, at a step boundary, without a step that waits for it."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
"""Slurm sends SIGTERM at scancel, preemption and requeue, and the signal of --signal before the time limit."""


class Preemption:
    """A context in which signals only set a flag; `requested()` tells all ranks the same answer.

    The flags are summed by an asynchronous collective on the CPU, started at one step and read at the next: it has had
    a whole step to finish, so no rank waits for another.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._old: dict[signal.Signals, Any] = {}
        self._group: Any = dist.new_group(backend="gloo")
        self._sum = np.zeros(1, dtype=np.int64)  # read through numpy: no tensor operation, no wait for a device
        self._tensor = torch.from_numpy(self._sum)
        self._pending: dist.Work | None = None

    def __enter__(self) -> Preemption:
        self._old = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        if self._pending is not None and kind is None:
            self._pending.wait()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def requested(self) -> bool:
        """Whether any rank had been signalled by its last call. To be called once a step by all ranks."""
        if self._pending is not None:
            self._pending.wait()
            if self._sum[0]:
                self._pending = None
                return True
        self._sum[0] = self._signalled
        self._pending = dist.all_reduce(self._tensor, group=self._group, async_op=True)
        return False
