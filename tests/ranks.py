"""Functions run on several gloo ranks, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from ssl_pipeline import distributed

# Ranks are forked from a process that has imported what takes seconds to import, and has done nothing else.
multiprocessing.set_forkserver_preload(["ssl_pipeline.pretrain", "tests.conftest"])


def on_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns on each of `count` ranks: tensors and plain values."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        given = (count, port, folder, dict(os.environ), function, arguments)
        mp.start_processes(_rank, given, nprocs=count, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _rank(
    rank: int,
    count: int,
    port: int,
    folder: str,
    environment: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.clear()  # the server's, of when it started
    os.environ |= environment | {
        "RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    distributed.start()
    torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    distributed.stop()
