"""Preflight, in a job's first seconds: does every node compute, and do all mean the same?"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ssl_pipeline import cluster, distributed
from ssl_pipeline.exits import RankLost, Requeued, Stop
from ssl_pipeline.run_folder import RunFolder

log = logging.getLogger("ssl_pipeline")

MOST_EXCLUSIONS = 2
"""Times that a job is put back without its bad nodes, before it gives up."""

FAULT = "SSL_PIPELINE_FAULT"
"""For tests: `selftest:HOST,...`, `versions:HOST` or `bandwidth:HOST` makes these nodes fail."""


def preflight(world: distributed.World, run: RunFolder, same: Mapping[str, str], error: Stop | None = None) -> None:
    """`error` is what kept this rank from reading its data: a node that alone misses a mount is a bad node.

    All ranks compare versions and `same` (digests of config and data listing), test their device, and measure the links
    between the nodes and one all-reduce. Where single nodes are at fault and Slurm runs the job, it is put back without
    them, at most twice, and Requeued is raised; else RankLost, which names them.
    """
    host = cluster.node_name()
    fault, _, faulty = os.environ.get(FAULT, "").partition(":")
    fault = fault if host in faulty.split(",") else ""
    mine = {
        "host": host,
        "self_test": "a fault was injected" if fault == "selftest" else str(error or self_test(world.device)),
        "error": error is not None,
        "device": device_name(world.device),
        "same": {**versions(world.device), **same},
    }
    if fault == "versions":
        mine["same"] = {**versions(world.device), **same, "torch": "0.0"}
    reports = distributed.gather_json(mine)
    if error is not None and all(report["error"] for report in reports):
        raise distributed.of_all(error)  # no node has the data: that is no node's fault
    hosts = [report["host"] for report in reports]
    bad, undecided = findings(reports)
    if not bad and not undecided:  # else a device may be broken: it is not to be used
        links = _link_bandwidths(world, hosts, slow=fault == "bandwidth")
        if slow_nodes(links):  # once more before a node is blamed: it may have been busy
            again = _link_bandwidths(world, hosts, slow=fault == "bandwidth")
            links = {name: max(speed, again[name]) for name, speed in links.items()}
        bad = slow_nodes(links)
    if not bad and not undecided:
        if world.size > 1:
            bandwidth = _all_reduce_bandwidth(world)
            log.info(
                "preflight: ranks %d, nodes %d: all agree and compute; all-reduce %.2f GB/s",
                world.size,
                len(set(hosts)),
                bandwidth / 1e9,
            )
        return
    reason = "; ".join([*(f"node {node}: {why}" for node, why in bad.items()), *undecided])
    requeued = torch.zeros(1)
    if world.is_main and bad and not undecided:
        before = [
            event for event in run.events() if event["event"] == "excluded" and event.get("job") == cluster.job_id()
        ]
        if len(before) < MOST_EXCLUSIONS and cluster.job_id() is not None:
            # Before the requeue, which ends this process within seconds: what is not counted could go on for ever.
            run.record("excluded", job=cluster.job_id(), nodes=list(bad), reason=reason)
            requeued.fill_(cluster.requeue(exclude=list(bad)))
    dist.broadcast(requeued, 0)
    if requeued.item():
        raise distributed.of_all(Requeued(f"preflight failed ({reason}); the job was requeued without it"))
    way_out = "start one process a GPU, and give all nodes the same installation and files"
    if bad:
        way_out = f"leave out by --exclude={','.join(bad)}"
    raise distributed.of_all(RankLost(f"preflight failed: {reason}: {way_out}"))


def versions(device: torch.device) -> dict[str, str]:
    """What must be the same on all nodes for one job to make sense."""
    found = {"python": platform.python_version(), "device": device.type}
    if device.type != "cpu":
        found["accelerator"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    for name in ("ssl-pipeline", "torch", "timm", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def device_name(device: torch.device) -> str:
    """A name of a GPU that no other one has; empty for a CPU, which ranks may share."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def self_test(device: torch.device) -> str:
    """What is wrong with this rank's device; empty where it multiplies two matrices of whole numbers exactly."""
    try:
        size = 256
        x = (torch.arange(size * size, device=device) % 7).float().reshape(size, size)
        y = (x @ x).double().cpu()
        whole = x.cpu().numpy().astype(np.int64)
        return "" if np.array_equal(y.numpy(), whole @ whole) else "its device multiplies matrices wrongly"
    except Exception as error:  # any failure of the device is the finding
        return f"its device fails: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def findings(reports: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], list[str]]:
    """(bad nodes with the reason, what is wrong without one node being at fault) from the reports of all ranks."""
    bad: dict[str, str] = {}
    undecided = []
    for report in reports:
        if report["self_test"]:
            bad.setdefault(report["host"], report["self_test"])
    sound = [report for report in reports if report["host"] not in bad]
    for key in reports[0]["same"]:
        nodes = {report["host"]: report["same"].get(key, "absent") for report in sound}
        counts = Counter(nodes.values()).most_common()
        if len(counts) < 2:
            continue
        if counts[0][1] * 2 <= len(nodes):
            shown = ", ".join(f"{value} on {', '.join(n for n in nodes if nodes[n] == value)}" for value, _ in counts)
            undecided.append(f"the nodes differ in {key}: {shown}")
            continue
        for node, value in nodes.items():
            if value != counts[0][0]:
                bad.setdefault(node, f"{key} is {value}, elsewhere {counts[0][0]}")
    taken = Counter((report["host"], report["device"]) for report in reports if report["device"])
    undecided += [f"{count} ranks on {host} share device {name}" for (host, name), count in taken.items() if count > 1]
    if len(bad) > 1 and len(bad) == len({report["host"] for report in reports}):
        undecided += [f"node {node}: {why}" for node, why in bad.items()]
        bad = {}
    return bad, undecided


def slow_nodes(links: Mapping[str, float]) -> dict[str, str]:
    """Nodes, of three or more, whose bandwidth is under half of the median, with the reason."""
    if len(links) < 3:
        return {}
    median = statistics.median(links.values())
    return {
        node: f"its link carries {speed / 1e9:.2f} GB/s, the median node's {median / 1e9:.2f}"
        for node, speed in links.items()
        if speed < median / 2
    }


def pairs(nodes: int) -> list[list[tuple[int, int]]]:
    """Rounds of disjoint pairs in which each node meets both neighbours on a ring."""
    if nodes < 2:
        return []
    ring = [(i, (i + 1) % nodes) for i in range(nodes if nodes > 2 else 1)]
    last = [ring.pop()] if nodes % 2 and nodes > 2 else []
    return [found for found in (ring[0::2], ring[1::2], last) if found]


def _link_bandwidths(world: distributed.World, hosts: Sequence[str], slow: bool) -> dict[str, float]:
    """Bytes/s that each node exchanged with the better of its two neighbours; a bad link is blamed on no good node."""
    names = sorted(set(hosts), key=hosts.index)
    leaders = [hosts.index(name) for name in names]
    best = torch.zeros(len(names), dtype=torch.float64)
    buffer = torch.zeros(_probe_bytes(world) // 4, device=world.device)
    for found in pairs(len(names)):
        dist.barrier()
        for a, b in found:
            if world.rank not in (leaders[a], leaders[b]):
                continue
            other = leaders[b] if world.rank == leaders[a] else leaders[a]

            def exchange(other: int = other) -> None:
                if world.rank < other:
                    dist.send(buffer, other)
                    dist.recv(buffer, other)
                else:
                    dist.recv(buffer, other)
                    dist.send(buffer, other)

            exchange()  # the first one opens the connection
            seconds = min(_timed(exchange, world.device) for _ in range(3))
            speed = 2 * buffer.numel() * 4 / seconds
            for node in (a, b):
                best[node] = max(best[node].item(), speed)
    if slow:
        best[names.index(cluster.node_name())] = -1
    worst = best.clone()
    dist.all_reduce(best, op=dist.ReduceOp.MAX)
    dist.all_reduce(worst, op=dist.ReduceOp.MIN)
    return {
        name: 1.0 if low < 0 else high for name, high, low in zip(names, best.tolist(), worst.tolist(), strict=True)
    }


def _all_reduce_bandwidth(world: distributed.World) -> float:
    """Bytes/s that each rank sends in an all-reduce: 2 (W - 1) / W of the buffer, the ring's lower bound."""
    buffer = torch.zeros(_probe_bytes(world) // 4, device=world.device)
    dist.all_reduce(buffer)
    seconds = min(_timed(lambda: dist.all_reduce(buffer), world.device) for _ in range(3))
    return 2 * (world.size - 1) / world.size * buffer.numel() * 4 / seconds


def _probe_bytes(world: distributed.World) -> int:
    return 2**22 if world.device.type == "cpu" else 2**26


def _timed(action: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.monotonic()
    action()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.monotonic() - start
