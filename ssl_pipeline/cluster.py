"""The cluster, asked and told in Slurm's own commands: preflight inside the job, requeue, status, plan.

Everything here also works where there is no Slurm: what cannot be asked is said to be unknown.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import os
import platform
import re
import socket
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ssl_pipeline import checkpoint, distributed
from ssl_pipeline.exits import RankLost, Requeued
from ssl_pipeline.monitor import duration
from ssl_pipeline.run_folder import RunFolder, read_lines

log = logging.getLogger("ssl_pipeline")

MOST_EXCLUSIONS = 2
"""Times that a job is put back without its bad nodes, before it gives up."""

FAULT = "SSL_PIPELINE_FAULT"
"""For tests: `selftest:HOST,...`, `versions:HOST` or `bandwidth:HOST` makes these nodes fail their preflight."""


# -------------------------------------------------------------------------------------------------------- Slurm's words
def ask(*words: str) -> str | None:
    """What a Slurm command prints, None where it is missing or fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def job_id() -> str | None:
    """The Slurm job that this process belongs to, None without Slurm."""
    return os.environ.get("SLURM_JOB_ID")


def job_state(job: str) -> str:
    """Slurm's state of a job, as RUNNING or `PENDING (Dependency)`; `unknown` where nobody remembers it."""
    seen = ask("squeue", "-h", "-j", job, "-o", "%T %r")
    if seen:
        state, _, reason = seen.splitlines()[0].partition(" ")
        return f"{state} ({reason})" if state == "PENDING" else state
    shown = ask("scontrol", "-o", "show", "job", job)
    if shown and (match := re.search(r"JobState=(\S+)", shown)):
        return match.group(1)
    recorded = ask("sacct", "-n", "-X", "-P", "-j", job, "-o", "State")
    return recorded.splitlines()[0] if recorded else "unknown"


def requeue(exclude: Sequence[str] = ()) -> bool:
    """Put this job back into the queue, without the nodes `exclude` besides those already excluded.

    False where it is not ours to do: without Slurm, or where the job is being cancelled or is on its way back already.
    """
    job = job_id()
    if job is None or ask("squeue", "-h", "-j", job, "-o", "%T") != "RUNNING":
        return False
    before = re.search(r"ExcNodeList=(\S+)", ask("scontrol", "-o", "show", "job", job) or "")
    if ask("scontrol", "requeue", job) is None:
        return False
    # Only a pending job's nodes can be changed, so after the requeue; Slurm lets a requeued job wait for seconds.
    if exclude:
        nodes = [before.group(1)] if before and before.group(1) != "(null)" else []
        if ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join([*nodes, *exclude])}") is None:
            log.warning("could not exclude %s from job %s", ", ".join(exclude), job)
    return True


# ------------------------------------------------------------------------------------------------------------ preflight
def preflight(world: distributed.World, run: RunFolder, same: Mapping[str, str]) -> None:
    """In a job's first seconds: does every node compute, and do all mean the same?

    All ranks compare versions and `same` (digests of config and data listing), test their device, and measure the links
    between the nodes and one all-reduce. Where single nodes are at fault and Slurm runs the job, it is put back without
    them, at most twice, and Requeued is raised; else RankLost, which names them.
    """
    host = socket.gethostname()
    fault, _, faulty = os.environ.get(FAULT, "").partition(":")
    fault = fault if host in faulty.split(",") else ""
    mine = {
        "host": host,
        "self_test": "a fault was injected" if fault == "selftest" else self_test(world.device),
        "same": {**versions(world.device), **same},
    }
    if fault == "versions":
        mine["same"] = {**versions(world.device), **same, "torch": "0.0"}
    reports = distributed.gather_json(mine)
    hosts = [report["host"] for report in reports]
    links = _link_bandwidths(world, hosts, slow=fault == "bandwidth")
    if slow_nodes(links):  # once more before a node is blamed: it may have been busy
        again = _link_bandwidths(world, hosts, slow=fault == "bandwidth")
        links = {name: max(speed, again[name]) for name, speed in links.items()}
    bad, undecided = findings(reports, links)
    if not bad and not undecided:
        if world.size > 1:
            bandwidth = _all_reduce_bandwidth(world)
            log.info(
                "preflight: %d ranks on %d nodes agree and compute; all-reduce %.2f GB/s",
                world.size,
                len(set(hosts)),
                bandwidth / 1e9,
            )
        return
    reason = "; ".join([*(f"node {node}: {why}" for node, why in bad.items()), *undecided])
    requeued = torch.zeros(1)
    if world.is_main and bad and not undecided:
        before = [event for event in run.events() if event["event"] == "excluded" and event.get("job") == job_id()]
        if len(before) < MOST_EXCLUSIONS and requeue(exclude=list(bad)):
            run.record("excluded", job=job_id(), nodes=list(bad), reason=reason)
            requeued.fill_(1)
    dist.broadcast(requeued, 0)
    mains = world.is_main  # one rank says it for all
    if requeued.item():
        raise Requeued(f"preflight failed ({reason}); the job was requeued without it" if mains else "")
    way_out = f"leave it out by --exclude={','.join(bad)}" if bad else "give all nodes the same installation and files"
    raise RankLost(f"preflight failed: {reason}: {way_out}" if mains else "")


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


def findings(reports: Sequence[Mapping[str, Any]], links: Mapping[str, float]) -> tuple[dict[str, str], list[str]]:
    """(bad nodes with the reason, differences in which no side is in the majority) from the reports of all ranks.

    `links` holds each node's bandwidth in bytes/s.
    """
    bad: dict[str, str] = {}
    undecided = []
    for report in reports:
        if report["self_test"]:
            bad.setdefault(report["host"], report["self_test"])
    for key in reports[0]["same"]:
        nodes: dict[str, str] = {}
        for report in reports:
            nodes[report["host"]] = report["same"].get(key, "absent")
        counts = Counter(nodes.values()).most_common()
        if len(counts) == 1:
            continue
        if counts[0][1] * 2 <= len(nodes):
            shown = ", ".join(f"{value} on {', '.join(n for n in nodes if nodes[n] == value)}" for value, _ in counts)
            undecided.append(f"the nodes differ in {key}: {shown}")
            continue
        for node, value in nodes.items():
            if value != counts[0][0]:
                bad.setdefault(node, f"{key} is {value}, elsewhere {counts[0][0]}")
    for node, why in slow_nodes(links).items():
        bad.setdefault(node, why)
    if bad and len(bad) == len({report["host"] for report in reports}):
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
        best[names.index(socket.gethostname())] = -1
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


# --------------------------------------------------------------------------------------------------------------- status
def status(run: RunFolder) -> str:
    """How a run stands, from its folder and from Slurm: state, progress, speed, restarts, age of the last checkpoint."""
    run.read_config()  # raises where this is no run
    events = run.events()
    starts = [event for event in events if event["event"] == "start"]
    last = starts[-1] if starts else None
    saved = checkpoint.steps(run.checkpoints)
    metrics = read_lines(run.metrics)
    lines = [f"{run.path}: {_state(run, events, last, saved)}"]
    if last and metrics:
        row = metrics[-1]
        lines.append(f"step {row['step']} of {last['steps']}, epoch {row['epoch']} of {last['epochs']}")
        speed, left = row.get("images_per_second"), row.get("seconds_left")
        if speed is not None and left is not None:
            lines.append(f"{speed:.0f} images/s, {duration(left)} left" if left else f"{speed:.0f} images/s")
        restarts = len(starts) - 1
        lines.append(
            f"{restarts} restart{'' if restarts == 1 else 's'}, {last['ranks']} rank{'' if last['ranks'] == 1 else 's'}"
        )
    if saved:
        age = time.time() - checkpoint.path(run.checkpoints, saved[-1]).stat().st_mtime
        lines.append(f"last checkpoint: step {saved[-1]}, {duration(age)} ago")
    else:
        lines.append("no checkpoint yet")
    lines += [
        f"excluded: {', '.join(event['nodes'])} ({event['reason']})" for event in events if event["event"] == "excluded"
    ]
    for event in events:
        if event["event"] == "submitted":
            state = job_state(event["job"]) if event["cluster"] == "slurm" else event["cluster"]
            lines.append(f"job {event['job']}  {event['verb']}: {state}")
    for name, values in run.read_results().items():
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        lines.append(f"result {name}: {', '.join(f'{key} {value:.2f}' for key, value in numbers.items())}")
    return "\n".join(lines)


def _state(
    run: RunFolder, events: Sequence[Mapping[str, Any]], last: Mapping[str, Any] | None, saved: Sequence[int]
) -> str:
    if last and saved and saved[-1] >= last["steps"]:
        return "finished"
    submitted = [e for e in events if e["event"] == "submitted" and e["verb"] == "pretrain" and e["cluster"] == "slurm"]
    newest = max((e for e in (last, *submitted[-1:]) if e is not None), key=lambda e: e["time"], default=None)
    job = newest.get("job") if newest else None
    if job is not None:
        state = job_state(job)
        nodes = f" on {last['nodes']}" if state == "RUNNING" and last and last.get("nodes") else ""
        return f"Slurm job {job} {state}{nodes}"
    if run.is_locked():
        return f"running on {last['host']}" if last else "running"
    return f"stopped at step {saved[-1]}; the same command goes on" if saved else "not running"


# ----------------------------------------------------------------------------------------------------------------- plan
def preemption_facts(partition: str | None) -> list[str]:
    """What happens on this cluster to a preempted job, in sentences; from `scontrol show config` and the partition."""
    shown = ask("scontrol", "show", "config")
    if shown is None:
        return ["no Slurm answers here: nothing is known about preemption"]
    values = dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", shown, flags=re.MULTILINE))
    return judge_preemption(values, _partition(partition))


def _partition(name: str | None) -> dict[str, str]:
    shown = ask("scontrol", "-o", "show", "partition", *([name] if name else [])) or ""
    rows = [dict(re.findall(r"(\w+)=(\S+)", line)) for line in shown.splitlines()]
    defaults = [row for row in rows if row.get("Default") == "YES"]
    return (rows if name else defaults or rows or [{}])[0] if rows else {}


def judge_preemption(config: Mapping[str, str], partition: Mapping[str, str]) -> list[str]:
    """Sentences from the values of `scontrol show config` and of one line of `scontrol show partition`."""
    mode = partition.get("PreemptMode") or config.get("PreemptMode", "OFF")
    grace = int(partition.get("GraceTime", 0))
    kill = config.get("KillWait", "30 sec").split()[0]
    signal_sent = "preempt_send_user_signal" in config.get("SlurmctldParameters", "")
    found = []
    if "REQUEUE" not in mode:
        found.append(
            f"jobs of partition {partition.get('PartitionName', '?')} are not preempted and requeued (PreemptMode={mode})"
        )
    elif grace and signal_sent:
        found.append(f"a preempted job gets the signal of --signal and {grace} s before it is killed")
    elif grace:
        found.append(
            f"a preempted job gets SIGTERM and {grace} s before it is killed; that is enough, we save at SIGTERM too"
        )
    else:
        found.append(
            f"a preempted job gets SIGTERM and only KillWait = {kill} s (GraceTime=0): lower checkpoint.every_steps so that "
            "little is lost where saving takes longer"
        )
    if config.get("JobRequeue") == "0":
        found.append("JobRequeue=0: jobs come back only because ours ask for it (--requeue)")
    if not config.get("EnforcePartLimits", "NO").startswith(("ALL", "YES", "ANY")):
        found.append("EnforcePartLimits=NO: a job that asks for too much waits for ever instead of being refused")
    if config.get("AccountingStorageType", "").endswith("none"):
        found.append("no accounting (slurmdbd): submitit's job.state stays UNKNOWN; `ssl-pipeline status` asks squeue")
    return found


def slots(total_seconds: float, slot_seconds: float, lead_seconds: float, start_seconds: float = 60.0) -> int:
    """Time slots that a run takes, each losing the signal's lead and the start. Raises RankLost never; 1 at least."""
    useful = slot_seconds - lead_seconds - start_seconds
    return max(1, math.ceil(total_seconds / useful)) if useful > 0 else 0


def signal_lead(checkpoint_bytes: int, bytes_per_second: float) -> int:
    """Seconds before the time limit at which to be signalled: three saves, a minute, and Slurm's own half minute.

    Slurm looks at limits every 30 s and may send the signal up to 60 s early (sbatch(1), --signal).
    """
    return math.ceil((3 * checkpoint_bytes / bytes_per_second + 90) / 30) * 30


def write_speed(folder: Path) -> float:
    """Bytes/s of one flushed file of 64 MB in `folder`, as a checkpoint is written."""
    path = folder / f".write_speed.{os.getpid()}"
    data = os.urandom(2**20)
    start = time.monotonic()
    try:
        with path.open("wb") as file:
            for _ in range(64):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return 64 * 2**20 / (time.monotonic() - start)
    finally:
        path.unlink(missing_ok=True)
