"""Jobs by submitit, on Slurm or on this machine: any verb, a whole experiment, and its plan.

What a job runs is the same `ssl-pipeline VERB ...` as by hand, so there is one code path; its pickle holds these words and
nothing else. submitit's way to checkpoint (in a signal handler, on rank 0) serves k-nn and the report, which save nothing.
What trains replaces submitit's handlers by its own: all ranks save together at a step boundary, then rank 0 requeues.

Nothing here imports torch: until a job has been unpickled nobody listens to signals, and that must not take seconds.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import submitit
from pydantic import Field, field_validator, model_validator
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE
from submitit.slurm.slurm import _make_sbatch_string

from ssl_pipeline import cluster, config, preemption
from ssl_pipeline.exits import BadInput, Status, printable
from ssl_pipeline.run_folder import RunFolder, duration, read_lines, require_owner

log = logging.getLogger("ssl_pipeline")

EVALUATIONS = {
    "knn": ["knn", "{source}"],
    "linear-probe": ["linear-probe", "{source}"],
    "semi-supervised-1": ["semi-supervised", "{source}", "--percent", "1"],
    "semi-supervised-10": ["semi-supervised", "{source}", "--percent", "10"],
    "detection": ["train-detectron2", "{source}"],
    "analyze": ["analyze", "{source}"],
    "spectrum": ["spectrum", "{source}"],
}
"""Evaluations of an experiment, by the name of their job; {source} stands for the run or a bare backbone of it."""

VERBS = tuple(dict.fromkeys(words[0] for words in EVALUATIONS.values()))

RESUMED = ("pretrain", "linear-probe", "semi-supervised", "train-detectron2")
"""Verbs that answer a signal at a step boundary, save, and go on in the next slot."""

HOURS = {
    "pretrain": 24,
    "knn": 2,
    "linear-probe": 8,
    "semi-supervised": 4,
    "train-detectron2": 24,
    "report": 1,
    "analyze": 1,
    "spectrum": 1,
}
"""Of one slot, where no --time is given."""

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
    """Limit of one slot: minutes, HH:MM:SS, D-HH or D-HH:MM:SS; by default HOURS. A run goes on in the next slot."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    exclude: str | None = None
    constraint: str | None = None
    dependency: str | None = None
    signal_lead: int | None = Field(None, gt=0)
    """Seconds before the time limit at which all is saved and the job requeued; by default 300, or a fifth of `time`."""

    def sized(self, verb: str) -> Resources:
        """With a time limit; for k-nn, which starts anew in each slot, with a lead that submitit counts.

        submitit takes a signal that comes before the last fifth, or ten minutes, of a slot for a preemption, after which an
        evaluation may start again as often as it likes. Raises BadInput where the lead is longer.
        """
        time = self.time or f"{HOURS[verb]}:00:00"
        sized = config.validate(Resources, {**self.model_dump(), "time": time})
        if verb not in RESUMED and sized.lead > max(600, 12 * minutes(time)):
            raise BadInput(f"--signal-lead {sized.lead} is too long for {verb} in a slot of {time}: leave it out")
        return sized

    @field_validator("time")
    @classmethod
    def _readable(cls, text: str | None) -> str | None:
        if text is not None:
            minutes(text)
        return text

    @field_validator("mem", "partition", "account", "qos", "exclude", "constraint", "dependency")
    @classmethod
    def _one_line(cls, text: str | None) -> str | None:
        if text is not None and printable(text) != text:
            raise ValueError("in a job's script a line ends there, and the next one would be run: leave it out")
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
    if any(number >= 60 for number in numbers[1:]):
        raise ValueError("after the first colon minutes and seconds are less than 60")
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
        resumed = self.words[0] in RESUMED
        watcher = _Beside(self) if self.beside and here.global_rank == 0 else None
        # What saves at a signal replaces submitit's handlers; k-nn keeps them, which requeue it by checkpoint().
        status = cli.main(self.words, signals=resumed)
        if status == Status.STOPPED and here.cluster == "slurm" and here.global_rank == 0:
            cluster.requeue()
        if watcher:
            watcher.end(last_pass=status == Status.DONE)
        if status == Status.DONE:
            return status
        if status != Status.STOPPED and here.global_rank == 0 and (run := _run_folder(self.words)) is not None:
            run.record("failed", verb=self.words[0], job=here.job_id, status=status)
        if status == Status.STOPPED and here.cluster == "local" and signal.SIGUSR2 in preemption.noted():
            sys.exit(LOCAL_REQUEUE_RETURN_CODE)  # submitit's word to start it again
        if status == Status.RANK_LOST:
            cli.leave(status)
        sys.exit(status)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """For submitit: start again with the same words."""
        return submitit.helpers.DelayedSubmission(self)


def _run_folder(words: Sequence[str]) -> RunFolder | None:
    """The run folder that a command line writes to."""
    path = Path(words[words.index("--output") + 1] if "--output" in words else words[1])
    return RunFolder(path) if (path / "config.yaml").is_file() else None


def pretraining(run: RunFolder, beside: Sequence[Sequence[str]] = ()) -> Job:
    """The job of a run whose config lies in its folder: later changes of the config's files do not reach it."""
    return Job(["pretrain", str(run.config), "--output", str(run.path)], beside)


class _Beside(threading.Thread):
    """Submits the evaluations of each bare backbone as it appears, from rank 0, in a thread that mostly sleeps."""

    def __init__(self, job: Job) -> None:
        super().__init__(daemon=True)
        self.run_folder = RunFolder(Path(job.words[job.words.index("--output") + 1]))
        self.commands = job.beside
        self.refused: set[tuple[str, str]] = set()
        self.ended = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.ended.wait(10):
            self.submit_new()

    def submit_new(self) -> None:
        done = {
            (event.get("verb"), event.get("source"))
            for event in self.run_folder.events()
            if event["event"] == "submitted"
        }
        for file in sorted(self.run_folder.backbones.glob("epoch_*.pth")):
            for command in self.commands:
                words = [word.replace("{backbone}", str(file)) for word in command]
                if (words[1], str(file)) in done or (words[1], str(file)) in self.refused or self.ended.is_set():
                    continue
                line = [sys.executable, "-m", "ssl_pipeline", *words]
                try:
                    told = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
                    reason = told.stderr.strip() if told.returncode else None
                except (OSError, subprocess.TimeoutExpired) as error:
                    reason = str(error)
                if reason is not None:  # once in each start of the job, not every ten seconds
                    log.warning("%s of %s was not submitted: %s", words[1], file, reason)
                    self.refused.add((words[1], str(file)))

    def end(self, last_pass: bool) -> None:
        """After a stop nothing is waited for: the job's last seconds are not for this. The next start goes on."""
        self.ended.set()
        if last_pass:
            self.join()
            self.ended.clear()
            self.submit_new()


@contextlib.contextmanager
def outside_of_jobs(quiet: bool) -> Iterator[None]:
    """This process as it would be outside of any job: what a job inherits of another one's environment misleads it.

    With `quiet`, what is started here gets none of this process's streams: who reads our output need not wait for it.
    """
    before, cleaned = dict(os.environ), outside()
    streams = [os.dup(number) for number in (0, 1, 2)] if quiet else []
    os.environ.clear()
    os.environ.update(cleaned)
    if quiet:
        sys.stdout.flush()
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nothing, number)
        os.close(nothing)
    try:
        yield
    finally:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(before)


def outside() -> dict[str, str]:
    """This process's environment without what a job adds to it."""
    inside = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_")
    torchs = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return {
        name: value
        for name, value in os.environ.items()
        if (not name.startswith(inside) or name == "SLURM_CONF") and name not in torchs
    }


# ----------------------------------------------------------------------------------------------------------- submitting
def parameters(resources: Resources, name: str) -> dict[str, Any]:
    """submitit's parameters for Slurm."""
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
        # As in slurm/job.sh: a signal does not end the script, and a job whose Python died of one before it could listen
        # comes back.
        "setup": ["trap : TERM USR1 USR2"],
        "teardown": [
            "status=$?",
            f"case $status in 138|140|143) {shlex.quote(sys.executable)} -m ssl_pipeline requeue ;; esac",
            "exit $status",
        ],
        # One rank's status ends no other rank. Those that hang after one died end by distributed.timeout, whose default is
        # ten minutes, and say why; srun ends what is left.
        # Since 22.05 srun does not take --cpus-per-task from the job.
        "srun_args": [
            "--kill-on-bad-exit=0",
            "--wait=720",
            *([f"--cpus-per-task={resources.cpus_per_task}"] if resources.cpus_per_task else []),
        ],
        "additional_parameters": {"requeue": True, "kill-on-invalid-dep": "yes"},
    }
    given = {key: value for key, value in found.items() if value is not None}
    return given | {"wckey": None}  # submitit's own is refused where wckeys are kept


def script(resources: Resources, name: str, folder: Path) -> str:
    """The sbatch script by which submitit starts the job. Raises BadInput where the folder's name ends a line of it."""
    _require_one_line(folder)
    folder = _free(folder, name)
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder.absolute()))}"
    return _make_sbatch_string(command=command, folder=folder, **parameters(resources, name))


def _free(folder: Path, name: str) -> Path:
    """The first of folder/<name>_1, folder/<name>_2 ... that is not there."""
    return next(place for n in itertools.count(1) if not os.path.lexists(place := folder / f"{name}_{n}"))


def _new_folder(folder: Path, name: str) -> Path:
    """Make a folder for jobs of this name.

    submitit unpickles what it finds under a job's number, which on one machine is the number of a process: in a folder
    that was copied from a stranger's run the stranger's file could lie there already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        with contextlib.suppress(FileExistsError):  # another submission was faster
            (place := _free(folder, name)).mkdir()
            return place


def _require_one_line(folder: Path) -> None:
    if printable(str(folder.absolute())) != str(folder.absolute()):
        raise BadInput(
            f"{str(folder)!r} holds a line's end or another control character, and stands in a job's script: name another"
        )


def submit(
    jobs: Sequence[Job], resources: Resources, name: str, folder: Path, run: RunFolder | None = None, **recorded: str
) -> list[Any]:
    """Submit jobs, several as one array, and return submitit's at once. Raises BadInput where Slurm refuses them.

    Their logs and pickles lie in a new folder below `folder`. `run` is the run folder in which the submission is recorded.
    """
    if resources.cluster == "debug":
        return _in_this_process(jobs)
    _require_one_line(folder)
    require_owner(folder)  # the jobs' pickles lie there, and are run
    if resources.cluster == "local":
        executor: Any = submitit.LocalExecutor(_new_folder(folder, name), max_num_timeout=_UNLIMITED)
        executor.update_parameters(
            tasks_per_node=resources.tasks,
            gpus_per_node=resources.gpus_per_node,
            timeout_min=_YEAR,
            stderr_to_stdout=True,
        )
    else:
        verb = jobs[0].words[0]
        resources = resources.sized(verb)
        # An evaluation starts anew in each slot: in too short a one it would do so for ever.
        timeouts = _UNLIMITED if verb in RESUMED else 3
        if cluster.ask("sinfo", "-h") is None:
            raise BadInput("no Slurm answers here: submit on a machine of the cluster, or give --cluster local")
        executor = submitit.SlurmExecutor(_new_folder(folder, name), max_num_timeout=timeouts)
        executor.update_parameters(**parameters(resources, name))
    try:
        with outside_of_jobs(quiet=resources.cluster == "local"), executor.batch():
            submitted = [executor.submit(job) for job in jobs]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise BadInput(f"Slurm refuses the job: {' '.join(str(error).split())}") from None
    for job, number in zip(jobs, (one.job_id for one in submitted), strict=True):
        into = RunFolder(Path(job.words[job.words.index("--output") + 1])) if "--output" in job.words else run
        if into is not None:
            into.record("submitted", verb=job.words[0], job=number, cluster=resources.cluster, **recorded)
    return submitted


def _in_this_process(jobs: Iterable[Job]) -> list[Any]:
    from ssl_pipeline import cli

    for job in jobs:
        status = cli.main(job.words)
        if status != Status.DONE:
            sys.exit(status)
    return []


def follow(submitted: Sequence[Any], resources: Resources, folder: Path, runs: Sequence[RunFolder]) -> str:
    """How to see a job that was submitted."""
    ids = [one.job_id for one in submitted]
    if not ids:
        return "done in this process"
    gpus = f"{resources.gpus_per_node} GPUs" if resources.gpus_per_node else "no GPU"
    asked = f"nodes {resources.nodes}, on each {resources.tasks} processes and {gpus}"
    lines = [f"submitted {'job' if len(ids) == 1 else 'jobs'} {', '.join(ids)} ({resources.cluster}): {asked}"]
    lines += [f"status:   ssl-pipeline status {shlex.quote(str(run.path))}" for run in runs]
    logs = [folder / one.paths.folder.name / f"{one.job_id}_0_log.out" for one in submitted]
    lines += [f"log:      tail -F {shlex.quote(str(path))}" for path in logs]
    cancel = f"scancel {' '.join(ids)}" if resources.cluster == "slurm" else f"kill {' '.join(ids)}"
    lines.append(f"stop:     {cancel}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- an experiment
def experiment(
    run: RunFolder, resources: Resources, values: Mapping[str, Any], *, every: bool = False, dry_run: bool = False
) -> str:
    """Submit pretraining (its config lies in the run folder) and, depending on it, every evaluation and the report.

    `values` is the config. A failed evaluation blocks no other. With `every`, k-nn and linear probes
    of the bare backbones that pretraining keeps (checkpoint.backbone_every_epochs) are submitted as they appear.
    Returns what was submitted, to be printed.
    """
    folder = run.path / "logs"
    evaluations, lines = _possible(run, values)

    def needs(name: str, dependency: str | None = None) -> Resources:
        return _beside(resources, EVALUATIONS.get(name, [name])[0], values.get("data", {}).get("protocol"), dependency)

    beside = []
    if every:
        beside = [
            ["launch", *_of(name, "{backbone}"), *_flags(needs(name))]
            for name in evaluations
            if name in ("knn", "linear-probe")
        ]
    train = pretraining(run, beside)
    if dry_run:
        parts = [("pretrain", resources.sized("pretrain"))]
        parts += [(name, needs(name, "afterok:PRETRAIN")) for name in evaluations]
        parts.append(("report", needs("report", "afterany:EVALUATIONS")))
        found = [f"# ---- {name}\n{script(asked, name, folder)}" for name, asked in parts]
        found += [
            f"# ---- beside the training, for each backbone kept\n# ssl-pipeline {printable(shlex.join(words))}"
            for words in beside
        ]
        told = [f"ssl-pipeline {shlex.join(train.words)}", *lines]
        return "\n".join([*(f"# {printable(line)}" for line in told), *found])
    if resources.cluster != "slurm":
        return "\n".join([*lines, _one_after_the_other(train, run, resources, evaluations, needs)])
    submitted = submit([train], resources, "pretrain", folder, run)
    first = submitted[0].job_id
    lines.append(f"{first}  pretrain")
    ids = []
    try:
        for name in evaluations:
            words = _of(name, str(run.path))
            (job,) = submit([Job(words)], needs(name, f"afterok:{first}"), name, folder, run)
            ids.append(job.job_id)
            again = shlex.join(["ssl-pipeline", "launch", *words, *_flags(needs(name))])
            lines.append(f"{job.job_id}  {name}, after {first}; again alone: {again}")
        after = ":".join(["afterany", *ids]) if ids else f"afterok:{first}"
        (page,) = submit([Job(["report", str(run.path)])], needs("report", after), "report", folder, run)
    except BadInput as error:
        raise BadInput(
            f"{error}; already submitted: {' '.join([first, *ids])} (scancel them, or let them run)"
        ) from None
    lines.append(f"{page.job_id}  report, after all of them: {run.path / 'report.html'}")
    return "\n".join([*lines, follow(submitted, resources, folder, [run])])


def _of(name: str, source: str) -> list[str]:
    return [word.replace("{source}", source) for word in EVALUATIONS[name]]


def _possible(run: RunFolder, values: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Names of the evaluations that can follow a pretraining config, and a sentence for each that cannot."""
    from ssl_pipeline.evaluation import detection, semi_supervised

    found, left_out = [], []
    for name, words in EVALUATIONS.items():
        try:
            if words[0] == "semi-supervised":
                semi_supervised.known_list(values.get("data", {}).get("name"), float(words[-1]))
            if words[0] == "train-detectron2":
                detection.possible(values)
            found.append(name)
        except BadInput as error:
            left_out.append(f"{name} is left out: {error}; then: ssl-pipeline {shlex.join(_of(name, str(run.path)))}")
    return found, left_out


def _beside(resources: Resources, verb: str, protocol: str | None, dependency: str | None = None) -> Resources:
    """What an evaluation, or the report, asks for beside a pretraining of `resources`.

    What trains on pictures gets one node as pretraining has it, all else one process.
    """
    trains = verb in ("semi-supervised", "train-detectron2") or (verb == "linear-probe" and protocol == "imagenet")
    batch = 16 if verb == "train-detectron2" else 256  # every preset's is a multiple of it
    count = max(n for n in range(1, resources.tasks + 1) if batch % n == 0) if trains else 1
    gpus = 0 if verb == "report" else min(resources.gpus_per_node, count)
    time = f"{HOURS[verb]}:00:00"
    if resources.time and minutes(resources.time) < minutes(time):  # a short limit is likely the partition's
        time = resources.time
    tasks = count if trains and resources.tasks_per_node else None
    own = {"nodes": 1, "gpus_per_node": gpus, "tasks_per_node": tasks, "mem": None, "time": time, "signal_lead": None}
    if resources.cluster != "slurm":
        own["time"] = None
    return resources.model_copy(update={**own, "dependency": dependency})


def _flags(resources: Resources) -> list[str]:
    """The command line's options for these resources."""
    given = resources.model_dump(exclude_defaults=True)
    return [
        word for key, value in given.items() if value is not None for word in (f"--{key.replace('_', '-')}", str(value))
    ]


def _one_after_the_other(
    train: Job, run: RunFolder, resources: Resources, evaluations: Sequence[str], needs: Callable[[str], Resources]
) -> str:
    """Without a scheduler: the same jobs in the foreground, an evaluation that fails not ending the rest."""
    failed = []
    jobs = {"pretrain": train, **{name: Job(_of(name, str(run.path))) for name in evaluations}}
    for name, job in {**jobs, "report": Job(["report", str(run.path)])}.items():
        status = _run_local(job, resources if job is train else needs(name), run)
        if status != Status.DONE:
            failed.append(name)
            log.warning("%s ended with status %d; its log is in %s", name, status, run.path / "logs")
            if job is train:
                sys.exit(status)
    return f"{run.path / 'report.html'}" + (f"; failed: {', '.join(failed)}" if failed else "")


def _run_local(job: Job, resources: Resources, run: RunFolder) -> int:
    if resources.cluster == "debug":
        from ssl_pipeline import cli

        return cli.main(job.words)
    (local,) = submit([job], resources, job.words[0], run.path / "logs", run)
    log.info("%s runs as process %s; its log: %s", job.words[0], local.job_id, local.paths.stdout)
    local.wait()
    if local.exception() is None:
        return Status.DONE
    ends = [event["status"] for event in run.events() if event["event"] == "end"]
    return int(ends[-1]) if job.words[0] == "pretrain" and ends and ends[-1] else Status.CRASH


# ----------------------------------------------------------------------------------------------------------------- plan
def plan(
    tree: config.Tree,
    words: Sequence[str],
    output: Path,
    resources: Resources,
    *,
    measure_seconds: int = 60,
    images_per_second: float | None = None,
    pictures: int | None = None,
) -> str:
    """What a pretraining will cost and whether this cluster takes it; runs a few steps where that says something.

    `words` are the config's name and overrides; `images_per_second` of one process spares the measurement; `pictures` is
    the size of a training set that is not here. Raises BadInput for what cannot work.
    """
    from ssl_pipeline.checkpoint import require_room
    from ssl_pipeline.pretrain import PretrainConfig, consequences, cost

    if images_per_second is not None and images_per_second <= 0:
        raise BadInput(f"--images-per-second {images_per_second} is no speed: give a number above 0")
    resources = resources.sized("pretrain")
    options = config.validate(PretrainConfig, tree.values, tree)
    facts = consequences(options, resources.ranks)
    costs = cost(options, pictures)
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
    if not costs["images"]:
        lines.append("time: unknown, since the training pictures are not here; give their number by --pictures")
    elif images_per_second is not None:
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

    if resources.gpus_per_node and resources.cpus_per_task is None:
        lines.append("no --cpus-per-task: each process gets Slurm's default, often one CPU; DALI keeps 8 or more busy")
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
    """What `sbatch --test-only` says of a script: when it would start. Raises BadInput where it never will."""
    if cluster.ask("sinfo", "-h") is None:
        return "sbatch --test-only: no Slurm answers here"
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(text)
        file.flush()
        line = ["sbatch", "--test-only", file.name]
        try:
            done = subprocess.run(line, capture_output=True, text=True, env=outside(), timeout=60, check=False)
        except subprocess.TimeoutExpired:
            return "sbatch --test-only: no answer within a minute"
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
        try:
            done = subprocess.run(line, env=outside(), capture_output=True, text=True, timeout=seconds, check=False)
            said = done.stderr.strip().splitlines()
            if done.returncode:
                return None, f"not measured: {said[-1] if said else f'it ended with status {done.returncode}'}"
        except subprocess.TimeoutExpired:
            pass  # what it did by then is measure enough
        speeds = [row["images_per_second"] for row in read_lines(run / "metrics.jsonl")[2:]]
    if not speeds:
        return None, f"not measured: fewer than three steps in {seconds} s on this machine (--measure-seconds)"
    speed = sorted(speeds)[len(speeds) // 2]
    where = torch.cuda.get_device_name() if accelerator is not None and accelerator.type == "cuda" else "CPU"
    return speed, f"measured here ({where}), one process, batch {share}, {len(speeds)} steps: {speed:.1f} images/s"
