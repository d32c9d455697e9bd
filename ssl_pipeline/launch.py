"""Jobs by submitit, on Slurm or on this machine: any verb, a whole experiment, and its plan.

What a job runs is the same `ssl-pipeline VERB ...` as by hand, so there is one code path; its pickle holds these words and
nothing else. submitit's way to checkpoint (in a signal handler, on rank 0) serves evaluations, which have nothing to save.
Pretraining replaces submitit's handlers by its own: all ranks save together at a step boundary, then rank 0 requeues.

Nothing here imports torch: until a job has been unpickled nobody listens to signals, and that must not take seconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import submitit
from pydantic import Field, field_validator, model_validator
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE
from submitit.slurm.slurm import _make_sbatch_string

from ssl_pipeline import cluster, config, preemption
from ssl_pipeline.exits import BadInput, Status
from ssl_pipeline.run_folder import RunFolder, duration, read_lines

log = logging.getLogger("ssl_pipeline")

EVALUATIONS = {"knn": 2, "linear-probe": 8}
"""Evaluations of an experiment, each on one task, and the hours that it is given."""

_UNLIMITED = 10**6
_YEAR = 365 * 24 * 60


class Resources(config.Options):
    """What a job asks for."""

    cluster: Literal["slurm", "local", "debug"] = "slurm"
    """local: processes on this machine, in the background; debug: in this process."""
    nodes: int = Field(1, gt=0)
    gpus_per_node: int = Field(0, ge=0)
    """Also the number of processes on a node, unless tasks_per_node says otherwise; 0: CPUs only, one process."""
    tasks_per_node: int | None = Field(None, gt=0)
    cpus_per_task: int | None = Field(None, gt=0)
    mem: str | None = None
    """Of a node, in Slurm's words: 200G."""
    time: str | None = None
    """Limit of one slot: minutes, HH:MM:SS, D-HH or D-HH:MM:SS. The run goes on in the next slot."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    exclude: str | None = None
    constraint: str | None = None
    dependency: str | None = None
    signal_lead: int | None = Field(None, gt=0)
    """Seconds before the time limit at which all is saved and the job requeued; by default 300, or a fifth of `time`."""

    @field_validator("time")
    @classmethod
    def _readable(cls, text: str | None) -> str | None:
        if text is not None:
            minutes(text)
        return text

    @model_validator(mode="after")
    def _lead_fits(self) -> Resources:
        if self.time is not None and self.lead >= 60 * minutes(self.time):
            raise ValueError(
                f"a signal {self.lead} s before the end of a slot of {self.time} comes at once: lower --signal-lead"
            )
        return self

    @property
    def lead(self) -> int:
        """Seconds before the time limit at which the signal comes."""
        return self.signal_lead or (min(300, 12 * minutes(self.time)) if self.time else 300)

    @property
    def tasks(self) -> int:
        """Processes on a node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        """Processes on all nodes."""
        return self.nodes * self.tasks


def minutes(time: str) -> int:
    """Minutes, rounded up, of a time limit in Slurm's words: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. Raises ValueError."""
    days, dash, rest = time.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in parts) or (dash and not days.isdigit()) or len(parts) > 3:
        raise ValueError("give minutes, HH:MM:SS, D-HH or D-HH:MM:SS")
    numbers = [int(part) for part in parts]
    if dash:
        hours, mins, seconds = [*numbers, 0, 0][:3]
    else:
        hours, mins, seconds = {1: (0, *numbers, 0), 2: (0, *numbers), 3: tuple(numbers)}[len(numbers)]
    total = ((int(days or 0) * 24 + hours) * 60 + mins) * 60 + seconds
    if total <= 0:
        raise ValueError("a time limit is more than 0")
    return -(-total // 60)


# ------------------------------------------------------------------------------------------------------- inside the job
class Job:
    """What a submitted job runs: the words of one command line, and of those to be submitted beside it.

    `beside` are commands for each bare backbone that pretraining keeps; `{backbone}` in them stands for its file.
    """

    def __init__(self, words: Sequence[str], beside: Sequence[Sequence[str]] = ()) -> None:
        self.words = [str(word) for word in words]
        self.beside = [[str(word) for word in command] for command in beside]

    def __call__(self) -> int:
        """Run the words in this process. Any end but DONE leaves by SystemExit, so that Slurm sees the status."""
        from ssl_pipeline import cli

        here = submitit.JobEnvironment()
        if here.cluster == "local" and here.num_tasks > 1:
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        pretrains = self.words[0] == "pretrain"
        watcher = _Beside(self) if self.beside and here.global_rank == 0 else None
        # Pretraining's own handlers replace submitit's; an evaluation keeps submitit's, which requeue it by checkpoint().
        status = cli.main(self.words, signals=pretrains)
        if watcher:
            watcher.end(last_pass=status == Status.DONE)
        if status == Status.DONE:
            return status
        if status == Status.STOPPED and here.cluster == "slurm" and here.global_rank == 0 and cluster.requeue():
            print("ssl-pipeline: requeued", file=sys.stderr)
        if status == Status.STOPPED and here.cluster == "local" and signal.SIGUSR2 in preemption.noted():
            sys.exit(LOCAL_REQUEUE_RETURN_CODE)  # its time limit, and submitit's word to start it again
        sys.exit(status)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """For submitit: start again with the same words."""
        return submitit.helpers.DelayedSubmission(self)


def pretraining(run: RunFolder, beside: Sequence[Sequence[str]] = ()) -> Job:
    """The job of a run whose config lies in its folder: later changes of the config's files do not reach it."""
    return Job(["pretrain", str(run.config), "--output", str(run.path)], beside)


class _Beside(threading.Thread):
    """Submits the evaluations of each bare backbone as it appears, from rank 0, in a thread that mostly sleeps."""

    def __init__(self, job: Job) -> None:
        super().__init__(daemon=True)
        self.run_folder = RunFolder(Path(job.words[job.words.index("--output") + 1]))
        self.commands = job.beside
        self.ended = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.ended.wait(10):
            self.submit_new()

    def submit_new(self) -> None:
        done = {(event.get("verb"), event.get("source")) for event in self.run_folder.events()}
        for file in sorted(self.run_folder.backbones.glob("epoch_*.pth")):
            for command in self.commands:
                words = [word.replace("{backbone}", str(file)) for word in command]
                if (verb := words[1], str(file)) in done:
                    continue
                line = [sys.executable, "-m", "ssl_pipeline", *words]
                told = subprocess.run(line, env=outside(), capture_output=True, text=True, check=False)
                if told.returncode:
                    log.warning("%s of %s was not submitted: %s", verb, file, told.stderr.strip())
                    self.run_folder.record("not submitted", verb=verb, source=str(file), reason=told.stderr.strip())

    def end(self, last_pass: bool) -> None:
        self.ended.set()
        self.join()
        if last_pass:
            self.submit_new()


def outside() -> dict[str, str]:
    """This process's environment without what a job adds to it: with that, a job submitted from a job is misled."""
    inside = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_")
    torchs = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return {
        name: value
        for name, value in os.environ.items()
        if (not name.startswith(inside) or name == "SLURM_CONF") and name not in torchs
    }


# ----------------------------------------------------------------------------------------------------------- submitting
def parameters(resources: Resources, name: str, **more: str) -> dict[str, Any]:
    """submitit's parameters for Slurm; `more` are sbatch options that it has no name for."""
    found = {
        "job_name": name,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.tasks,
        "gpus_per_node": resources.gpus_per_node or None,
        "cpus_per_task": resources.cpus_per_task,
        "mem": resources.mem,
        "time": minutes(resources.time) if resources.time else None,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "exclude": resources.exclude,
        "constraint": resources.constraint,
        "dependency": resources.dependency,
        "signal_delay_s": resources.lead,
        "stderr_to_stdout": True,
        # One rank's status ends no other rank; those that hang after one died are ended after two minutes.
        # Since 22.05 srun does not take --cpus-per-task from the job.
        "srun_args": [
            "--kill-on-bad-exit=0",
            "--wait=120",
            *([f"--cpus-per-task={resources.cpus_per_task}"] if resources.cpus_per_task else []),
        ],
        "additional_parameters": {"requeue": True, "kill-on-invalid-dep": "yes", **more},
    }
    return {key: value for key, value in found.items() if value is not None}


def script(resources: Resources, name: str, folder: Path, **more: str) -> str:
    """The sbatch script by which submitit starts the job."""
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder.absolute()))}"
    return _make_sbatch_string(command=command, folder=folder, **parameters(resources, name, **more))


def submit(
    jobs: Sequence[Job], resources: Resources, name: str, folder: Path, run: RunFolder | None = None, **recorded: str
) -> list[str]:
    """Submit jobs, several as one array, and return their ids at once. Raises BadInput where Slurm refuses them.

    `run` is the run folder in which the submission is recorded.
    """
    if resources.cluster == "debug":
        return _in_this_process(jobs, folder)
    if resources.cluster == "local":
        if resources.nodes > 1:
            raise BadInput(f"--cluster local has one node, not {resources.nodes}: give --nodes 1")
        executor: Any = submitit.LocalExecutor(folder, max_num_timeout=_UNLIMITED)
        executor.update_parameters(
            tasks_per_node=resources.tasks,
            gpus_per_node=resources.gpus_per_node,
            timeout_min=minutes(resources.time) if resources.time else _YEAR,
            signal_delay_s=resources.lead,
            stderr_to_stdout=True,
        )
    else:
        resumes = (
            jobs[0].words[0] == "pretrain"
        )  # else each slot starts anew, and too short a slot would do so for ever
        try:
            executor = submitit.SlurmExecutor(folder, max_num_timeout=_UNLIMITED if resumes else 3)
        except RuntimeError:
            raise BadInput("no srun here: submit on a machine of the cluster, or give --cluster local") from None
        executor.update_parameters(**parameters(resources, name))
    try:
        with executor.batch():
            submitted = [executor.submit(job) for job in jobs]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise BadInput(f"Slurm refuses the job: {' '.join(str(error).split())}") from None
    ids = [job.job_id for job in submitted]
    for job, number in zip(jobs, ids, strict=True):
        into = RunFolder(Path(job.words[job.words.index("--output") + 1])) if "--output" in job.words else run
        if into is not None:
            into.record("submitted", verb=job.words[0], job=number, cluster=resources.cluster, **recorded)
    return ids


def _in_this_process(jobs: Iterable[Job], folder: Path) -> list[str]:
    from ssl_pipeline import cli

    for job in jobs:
        status = cli.main(job.words)
        if status != Status.DONE:
            sys.exit(status)
    return []


def follow(ids: Sequence[str], resources: Resources, folder: Path, run: RunFolder | None) -> str:
    """How to see a job that was submitted."""
    if not ids:
        return "done in this process"
    gpus = f"{resources.gpus_per_node} GPUs" if resources.gpus_per_node else "no GPU"
    asked = f"nodes {resources.nodes}, on each {resources.tasks} processes and {gpus}"
    lines = [f"submitted {'job' if len(ids) == 1 else 'jobs'} {', '.join(ids)} ({resources.cluster}): {asked}"]
    if run is not None:
        lines.append(f"status:   ssl-pipeline status {shlex.quote(str(run.path))}")
    lines.append(f"log:      tail -F {shlex.quote(str(folder / f'{ids[0]}_0_log.out'))}")
    cancel = f"scancel {' '.join(ids)}" if resources.cluster == "slurm" else f"kill {' '.join(ids)}"
    lines.append(f"stop:     {cancel}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- an experiment
def experiment(
    run: RunFolder, resources: Resources, *, every: bool = False, evaluations: Sequence[str] = tuple(EVALUATIONS),
    dry_run: bool = False,
) -> str:  # fmt: skip
    """Submit pretraining (its config lies in the run folder) and, depending on it, every evaluation and the report.

    A failed evaluation blocks no other. With `every`, evaluations of the bare backbones that pretraining
    keeps (checkpoint.backbone_every_epochs) are submitted as they appear.
    Returns what was submitted, to be printed.
    """
    folder = run.path / "logs"
    one = resources.model_copy(
        update={"nodes": 1, "gpus_per_node": min(resources.gpus_per_node, 1), "tasks_per_node": None, "mem": None}
    )
    beside = [["launch", verb, "{backbone}", *_flags(_sized(one, verb))] for verb in evaluations] if every else []
    train = pretraining(run, beside)
    if dry_run:
        parts = [("pretrain", script(resources, "pretrain", folder))]
        for verb in evaluations:
            waits = _sized(one, verb).model_copy(update={"dependency": "afterok:PRETRAIN"})
            parts.append((verb, script(waits, verb, folder)))
        last = _sized(one, "report").model_copy(update={"dependency": "afterany:EVALUATIONS"})
        parts.append(("report", script(last, "report", folder)))
        return "\n".join(f"# ---- {name}\n{text}" for name, text in parts)
    if resources.cluster != "slurm":
        return _one_after_the_other(train, run, resources, one, evaluations)
    first = submit([train], resources, "pretrain", folder, run)[0]
    lines = [f"{first}  pretrain"]
    ids = []
    for verb in evaluations:
        waits = _sized(one, verb).model_copy(update={"dependency": f"afterok:{first}"})
        ids += submit([Job([verb, str(run.path)])], waits, verb, folder, run)
        again = shlex.join(["ssl-pipeline", "launch", verb, str(run.path), *_flags(_sized(one, verb))])
        lines.append(f"{ids[-1]}  {verb}, after {first}; again alone: {again}")
    after = ":".join(["afterany", *ids])
    last = _sized(one, "report").model_copy(update={"dependency": after if ids else f"afterok:{first}"})
    ids += submit([Job(["report", str(run.path)])], last, "report", folder, run)
    lines.append(f"{ids[-1]}  report, after all of them: {run.path / 'report.html'}")
    return "\n".join([*lines, follow([first], resources, folder, run)])


def _sized(one: Resources, verb: str) -> Resources:
    time = f"{EVALUATIONS[verb]}:00:00" if verb in EVALUATIONS else "30"
    limit = min(minutes(time), minutes(one.time)) if one.time else minutes(time)
    sized = {"time": str(limit), "dependency": None}
    return one.model_copy(update=sized | ({} if verb in EVALUATIONS else {"gpus_per_node": 0}))


def _flags(resources: Resources) -> list[str]:
    """The command line's options for these resources."""
    given = resources.model_dump(exclude_defaults=True)
    return [
        word for key, value in given.items() if value is not None for word in (f"--{key.replace('_', '-')}", str(value))
    ]


def _one_after_the_other(
    train: Job, run: RunFolder, resources: Resources, one: Resources, evaluations: Sequence[str]
) -> str:
    """Without a scheduler: the same jobs in the foreground, an evaluation that fails not ending the rest."""
    failed = []
    for job, needs in [
        (train, resources),
        *((Job([verb, str(run.path)]), _sized(one, verb)) for verb in evaluations),
        (Job(["report", str(run.path)]), one),
    ]:
        verb = job.words[0]
        status = _run_local(job, needs, run)
        if status != Status.DONE:
            failed.append(verb)
            log.warning("%s ended with status %d; its log is in %s", verb, status, run.path / "logs")
            if job is train:
                sys.exit(status)
    return f"{run.path / 'report.html'}" + (f"; failed: {', '.join(failed)}" if failed else "")


def _run_local(job: Job, resources: Resources, run: RunFolder) -> int:
    if resources.cluster == "debug":
        from ssl_pipeline import cli

        return cli.main(job.words)
    (number,) = submit([job], resources.model_copy(update={"time": None}), job.words[0], run.path / "logs", run)
    local: Any = submitit.LocalJob(run.path / "logs", number, tasks=list(range(resources.tasks)))
    local._process.wait()
    return Status.DONE if local.exception() is None else Status.CRASH


# ----------------------------------------------------------------------------------------------------------------- plan
def plan(
    tree: config.Tree,
    words: Sequence[str],
    output: Path,
    resources: Resources,
    *,
    measure_seconds: int = 60,
    images_per_second: float | None = None,
) -> str:
    """What a pretraining will cost and whether this cluster takes it; runs a few steps where that says something.

    `words` are the config's name and overrides; `images_per_second` of one process spares the measurement. Raises
    BadInput for what cannot work.
    """
    from ssl_pipeline.checkpoint import require_room
    from ssl_pipeline.pretrain import PretrainConfig, consequences, cost

    options = config.validate(PretrainConfig, tree.values, tree)
    facts = consequences(options, resources.ranks)
    costs = cost(options)
    lines = [f"{key}: {value}" for key, value in facts.items()]

    parent = output.absolute()
    while not parent.is_dir():
        parent = parent.parent
    size = costs["checkpoint_bytes"]
    needed = (options.checkpoint.keep + 1) * size
    room = require_room(parent, needed)
    speed = cluster.write_speed(parent)
    lead = cluster.signal_lead(size, speed)
    lines += [
        f"checkpoint: {size / 1e9:.2f} GB, {options.checkpoint.keep} kept and one being written: {needed / 1e9:.2f} GB; "
        f"{room / 1e9:.0f} GB free at {parent}",
        f"signal lead: {lead} s (three saves at {speed / 1e9:.2f} GB/s measured at {parent}, and Slurm's own slack)",
    ]
    if images_per_second is None and measure_seconds:
        images_per_second, told = _measure(words, options, resources, measure_seconds)
        lines.append(told)
    if images_per_second is not None and costs["images"]:
        total = costs["images"] / (images_per_second * resources.ranks)
        devices = resources.gpus_per_node * resources.nodes
        unit = (
            f"{total * devices / 3600:.1f} GPU-hours"
            if devices
            else f"{total * resources.ranks / 3600:.1f} process-hours"
        )
        lines.append(
            f"time: {duration(total)} at {images_per_second:.0f} images/s a process (communication and waits not included): "
            f"{unit}"
        )
        if resources.time:
            slot = minutes(resources.time) * 60
            count = cluster.slots(total, slot, lead)
            lines.append(
                f"slots of {resources.time}: {count}"
                if count
                else f"slots of {resources.time}: too short for the start and a lead of {lead} s"
            )
    else:
        lines.append("time: unknown; give --images-per-second, of one process, from a run on such a machine")
    lines += cluster.preemption_facts(resources.partition)

    asked = resources.model_copy(update={"signal_lead": lead})
    text = script(asked, "pretrain", output / "logs")
    lines.append(test_only(text))
    by_hand = [
        f"--nodes={asked.nodes}",
        f"--ntasks-per-node={asked.tasks}",
        f"--gpus-per-node={asked.gpus_per_node}",
        f"--signal=USR2@{asked.lead}",
        *(f"--{key.replace('_', '-')}={value}" for key in _SBATCH if (value := getattr(asked, key)) is not None),
    ]
    line = shlex.join(["sbatch", *by_hand, "slurm/pretrain_imagenet.sh", *words])
    flags = _flags(asked)
    lines += [
        "",
        f"by sbatch:    RUN={shlex.quote(str(output))} {line}",
        f"by submitit:  {shlex.join(['ssl-pipeline', 'launch', 'pretrain', *words, '--output', str(output), *flags])}",
        "which submits:",
        "",
        text,
    ]
    return "\n".join(lines)


_SBATCH = ("cpus_per_task", "mem", "time", "partition", "account", "qos", "exclude", "constraint", "dependency")


def test_only(text: str) -> str:
    """What `sbatch --test-only` says of a script: when it would start, or why it never will."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(text)
        file.flush()
        line = ["sbatch", "--test-only", file.name]
        try:
            done = subprocess.run(
                line,
                capture_output=True,
                text=True,
                env=outside(),
                timeout=60,
                check=False,
            )
        except OSError:
            return "sbatch --test-only: no sbatch here"
    said = " ".join((done.stdout + done.stderr).split())
    if done.returncode:
        raise BadInput(f"Slurm refuses this job: {said}")
    return f"sbatch --test-only: {said}"


def _measure(words: Sequence[str], options: Any, resources: Resources, seconds: int) -> tuple[float | None, str]:
    """(images/s of one process with its share of the batch, a sentence) from a few steps run here and now."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if resources.gpus_per_node and accelerator is None:
        return None, "not measured: the job is for GPUs, and this machine has none"
    share = options.data.batch_size // resources.ranks
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        line = [sys.executable, "-m", "ssl_pipeline", "pretrain", *words, f"data.batch_size={share}", "max_steps=12",
                "monitor.every_steps=1", "monitor.tensorboard=false", "--output", str(run)]  # fmt: skip
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(line, env=outside(), capture_output=True, timeout=seconds, check=False)
        speeds = [row["images_per_second"] for row in read_lines(run / "metrics.jsonl")[2:]]
    if not speeds:
        return None, f"not measured: fewer than three steps in {seconds} s on this machine (--measure-seconds)"
    speed = sorted(speeds)[len(speeds) // 2]
    where = torch.cuda.get_device_name() if accelerator is not None and accelerator.type == "cuda" else "CPU"
    return speed, f"measured here ({where}), one process, batch {share}, {len(speeds)} steps: {speed:.1f} images/s"
