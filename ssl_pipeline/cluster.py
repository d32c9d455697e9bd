"""The cluster, asked and told in Slurm's own commands: requeue, status, what a plan needs to know.

Everything here also works where there is no Slurm: what cannot be asked is said to be unknown.
"""

from __future__ import annotations

import logging
import math
import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ssl_pipeline.exits import BadInput, Status, printable
from ssl_pipeline.run_folder import RunFolder, checkpoint_file, duration, read_lines, saved_steps

log = logging.getLogger("ssl_pipeline")


# -------------------------------------------------------------------------------------------------------- Slurm's words
def ask(*words: str) -> str | None:
    """What a Slurm command prints, None where it is missing or fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def job_id() -> str | None:
    """The Slurm job that this process belongs to, as 12 or, for a task of an array, 12_3; None without Slurm.

    Not SLURM_JOB_ID for an array's task: the last one's is the whole array's.
    """
    env = os.environ
    if "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")


def node_name() -> str:
    """This node as Slurm calls it, which need not be its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def job_state(job: str) -> str:
    """Slurm's state of a job, as RUNNING or `PENDING (Dependency)`; `unknown` where nobody remembers it."""
    if not re.fullmatch(r"\d+(_\d+)?", str(job)):  # of a file that anyone may have written, and no word for a command
        return "unknown"
    seen = ask("squeue", "-h", "-j", job, "-o", "%T %r")
    if seen:
        state, _, reason = seen.splitlines()[0].partition(" ")
        return f"{state} ({reason})" if state == "PENDING" else state
    shown = ask("scontrol", "-o", "show", "job", job)
    if shown and (match := re.search(r"JobState=(\S+)", shown)):
        return match.group(1)
    recorded = ask("sacct", "-n", "-X", "-P", "-j", job, "-o", "State")
    return recorded.splitlines()[0] if recorded else "unknown"


def requeue(exclude: Sequence[str] = (), patience: float = 180.0) -> bool:
    """Put this job back into the queue, without the nodes `exclude` besides those already excluded.

    False where it is not ours to do: without Slurm, or where the job is being cancelled or is on its way back already.
    A controller that does not answer is asked again for `patience` seconds: a run of weeks must not end for a failover.
    """
    job = job_id()
    if job is None:
        return False
    end = time.monotonic() + patience
    while True:
        state = ask("squeue", "-h", "-j", job, "-o", "%T")
        if state == "RUNNING":
            before = re.search(r"ExcNodeList=(\S+)", ask("scontrol", "-o", "show", "job", job) or "")
            if ask("scontrol", "requeue", job) is not None:
                break
        elif state not in (None, "", "SIGNALING"):  # SIGNALING: running, and being sent a signal
            return False
        if time.monotonic() > end:
            log.error("job %s could not be requeued (squeue says %s); by hand: scontrol requeue %s", job, state, job)
            return False
        time.sleep(2)
    log.info("requeued job %s", job)
    if exclude:
        nodes = [before.group(1)] if before and before.group(1) != "(null)" else []
        _exclude(job, [*nodes, *exclude])
    return True


def _exclude(job: str, nodes: Sequence[str]) -> None:
    # Only a pending job's nodes can be changed, so after the requeue; Slurm lets a requeued job wait for seconds. More
    # than once, because the SIGTERM of the requeue ends this command too when it comes while it runs.
    for _ in range(5):
        if ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}") is not None:
            return
        time.sleep(0.5)
    log.error("Slurm did not take %s as nodes to exclude from job %s", ",".join(nodes), job)


def require_progress(events: Sequence[Mapping[str, Any]]) -> None:
    """Raises BadInput where this job was stopped within a minute ten times in a row: it would go on so for ever."""
    job = job_id()
    stops = []
    began = None
    for event in events:
        if event.get("event") == "start":
            began = event if event.get("job") == job else None
        elif event.get("event") == "end" and began is not None:
            seconds = datetime.fromisoformat(event["time"]) - datetime.fromisoformat(began["time"])
            stops.append(event["status"] == Status.STOPPED and seconds.total_seconds() < 60)
            began = None  # of a job that was refused before its start there is an end alone
    if job is not None and len(stops) >= 10 and all(stops[-10:]):
        raise BadInput(
            f"job {job} was stopped within a minute of its start ten times in a row: where that is not preemption, its --time "
            "is not longer than the lead of its --signal; give it more time or a shorter lead and submit it again"
        )


# --------------------------------------------------------------------------------------------------------------- status
def status(run: RunFolder) -> str:
    """How a run stands, from its folder and from Slurm: state, progress, restarts, age of the last checkpoint, results;
    of one that runs also speed and time left. Epochs are counted from 1."""
    options = run.read_config()  # raises where this is no run
    events = run.events()
    all_starts = [event for event in events if event["event"] == "start"]
    last = all_starts[-1] if all_starts else None
    starts = [event for event in all_starts if event["step"] < event["steps"]]  # not those that found it finished
    saved = saved_steps(run.checkpoints)
    metrics = [row for row in read_lines(run.metrics) if "images_per_second" in row]
    row = metrics[-1] if metrics else {"step": 0}
    finished = last is not None and _finished(events, last, saved)
    state, running = ("finished", False) if finished else _state(run, events, last, saved, row["step"])
    lines = [f"{run.path}: {state}"]
    if last:
        began = next(event for event in reversed(events) if event["event"] in ("start", "rollback"))
        since = began["step"] if began["event"] == "start" else began["to"]
        done = max(row["step"], since) if running or not saved else saved[-1]
        done = last["steps"] if finished else done
        per_epoch = last["steps"] // last["epochs"] if options.get("max_steps") is None else 0
        epoch = row["epoch"] + 1 if row["step"] == done > 0 else math.ceil(done / per_epoch) if per_epoch else 0
        of_epochs = f", epoch {epoch} of {last['epochs']}" if epoch else ""
        lines.append(f"step {done} of {last['steps']}{of_epochs}")
        speed, left = row.get("images_per_second"), row.get("seconds_left")
        if running and row["step"] > since and speed is not None and left is not None:
            lines.append(f"{speed:.0f} images/s, {duration(left)} left" if left else f"{speed:.0f} images/s")
        restarts = max(len(starts) - 1, 0)
        lines.append(
            f"{restarts} restart{'' if restarts == 1 else 's'}, {last['ranks']} rank{'' if last['ranks'] == 1 else 's'}"
        )
    if saved:
        age = time.time() - checkpoint_file(run.checkpoints, saved[-1]).stat().st_mtime
        lines.append(f"last checkpoint: step {saved[-1]}, {duration(age)} ago")
    else:
        lines.append("checkpoints removed" if finished else "no checkpoint yet")
    lines += [
        f"excluded: {', '.join(event['nodes'])} ({event['reason']})" for event in events if event["event"] == "excluded"
    ]
    began_at = max((place for place, event in enumerate(events) if event["event"] == "start"), default=0)
    lines += [f"lost {_when(event)}: {event['reason']}" for event in events[began_at:] if event["event"] == "rank_lost"]
    for event in events:
        if event["event"] == "submitted":
            job = job_state(event["job"]) if event["cluster"] == "slurm" else event["cluster"]
            lines.append(f"job {event['job']}  {event['verb']}: {job}")
    lines += [f"result {name}: {_headlines(name, values)}" for name, values in run.read_results().items()]
    return "\n".join(map(printable, lines))


def _headlines(name: str, values: Any) -> str:
    """A result's accuracies and effective ranks; of one without, how many numbers it has."""
    shown = [
        f"{key} {value:.2f}"
        for key, value in (values.items() if isinstance(values, Mapping) else ())
        if key.endswith(("_top1", "_top5", "effective_rank")) and isinstance(value, (int, float))
    ]
    count = _numbers(values)
    return ", ".join(shown) or f"{count} number{'' if count == 1 else 's'} in results/{name}.json"


def _numbers(values: Any) -> int:
    """How many numbers lie in nested mappings; lists, of which pictures are drawn, are not looked into."""
    if isinstance(values, Mapping):
        return sum(map(_numbers, values.values()))
    return int(isinstance(values, (int, float)) and not isinstance(values, bool))


def _when(event: Mapping[str, Any]) -> str:
    return f"{datetime.fromisoformat(event['time']).astimezone():%Y-%m-%d %H:%M:%S}"


def _failure(run: RunFolder, events: Sequence[Mapping[str, Any]]) -> str:
    """How the newest start ended, where that is known and it neither finished nor was stopped by a signal; else empty."""
    ends = [
        event
        for event in events
        if event["event"] in ("start", "end") or (event["event"] == "submitted" and event["verb"] == "pretrain")
    ]
    status = ends[-1].get("status") if ends else None
    if status in (None, Status.DONE, Status.STOPPED):
        return ""
    listed = f", and {run.nonfinite}" if status == Status.NON_FINITE and run.nonfinite.exists() else ""
    return f"ended with status {status}: {ends[-1].get('reason') or f'its log says why{listed}'}"


def _finished(events: Sequence[Mapping[str, Any]], last: Mapping[str, Any], saved: Sequence[int]) -> bool:
    """Whether all steps are done, by the last checkpoint or, where that was removed, by what was recorded."""
    ending = [e for e in events if e["event"] in ("start", "end")][-1]
    if ending.get("status") not in (None, Status.DONE, Status.STOPPED):
        return False
    told = ending is last or ending["status"] == Status.DONE
    return max(saved[-1] if saved else 0, ending.get("step", 0) if told else 0) >= last["steps"]


def _state(
    run: RunFolder,
    events: Sequence[Mapping[str, Any]],
    last: Mapping[str, Any] | None,
    saved: Sequence[int],
    logged: int,
) -> tuple[str, bool]:
    """How a run that is not finished stands, in words, and whether it runs. `logged` is the last logged step."""
    failure = _failure(run, events)
    submitted = [e for e in events if e["event"] == "submitted" and e["verb"] == "pretrain" and e["cluster"] == "slurm"]
    newest = next((event for event in reversed(events) if event is last or event in submitted), None)
    job = newest.get("job") if newest else None
    if job is not None:
        state = job_state(job)
        running = state == "RUNNING"
        nodes = f" on {last['nodes']}" if running and last and last.get("nodes") else ""
        return f"Slurm job {job} {state}{nodes}" + (f"; {failure}" if failure else ""), running or run.is_locked()
    failed = [event for event in events if event["event"] == "failed" and event["verb"] == "pretrain"]
    if failed and failed[-1] == [event for event in events if event.get("verb", "pretrain") == "pretrain"][-1]:
        log = next(run.logs.rglob(f"{failed[-1]['job']}_0_log.out"), run.logs)
        words = f"{failure}; log: {log}" if failure else f"failed with status {failed[-1]['status']}; why: {log}"
        return words, False
    if run.is_locked():
        return f"running on {last['host']}" if last else "running", True
    local = [event for event in events if event["event"] == "submitted" and event["verb"] == "pretrain"]
    if local and (last is None or events.index(local[-1]) > events.index(last)):
        return f"process {local[-1]['job']} was started on this machine and has not begun yet; {run.logs}", False
    if failure:
        return failure, False
    told = [event for event in events if event["event"] in ("start", "end", "rank_lost")]
    if told and told[-1] is last:  # no end was recorded
        after = max([logged, last["step"], *saved[-1:]])
        on = f"goes on from step {saved[-1]}" if saved else "begins anew"
        return f"vanished without a word after step {after} (killed?); the same command {on}", False
    return f"stopped at step {saved[-1]}; the same command goes on" if saved else "not running", False


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
    if "qos" in config.get("PreemptType", ""):
        found.append(
            "preemption is by QOS here: its own PreemptMode and GraceTime (sacctmgr show qos) come before the partition's"
        )
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
    """Time slots that a run takes, each losing the signal's lead and the start; 0 where nothing is left of one."""
    useful = slot_seconds - lead_seconds - start_seconds
    return max(1, math.ceil(total_seconds / useful)) if useful > 0 else 0


def signal_lead(checkpoint_bytes: int, bytes_per_second: float) -> int:
    """Seconds before the time limit at which to be signalled: three saves, a minute, and Slurm's own half minute.

    Slurm looks at limits every 30 s and may send the signal up to 60 s early (sbatch(1), --signal).
    """
    return math.ceil((3 * checkpoint_bytes / bytes_per_second + 90) / 30) * 30


def write_speed(folder: Path) -> float:
    """Bytes/s of one flushed file of 64 MB in `folder`, as a checkpoint is written."""
    data = os.urandom(2**20)
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.monotonic()
        for _ in range(64):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return 64 * 2**20 / (time.monotonic() - start)
