"""A real Slurm cluster on this machine: eight nodes in namespaces of their own, started by local_cluster.sh.

Needs root and Debian's slurm-wlm, munge, iproute2, slurmdbd, mariadb-server-core, mariadb-client-core; without them these
tests skip, saying what is missing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_pipeline import checkpoint
from ssl_pipeline.monitor import TIME_KEYS
from ssl_pipeline.run_folder import RunFolder, read_lines

REPOSITORY = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("local_cluster.sh")
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "mungekey", "ip", "nsenter", "unshare", "slurmdbd", "mariadbd")
SETTINGS = {"CLUSTER_NODES": "8", "CLUSTER_GPUS": "8", "CLUSTER_CPUS": "96", "CLUSTER_GRACE": "20"}

SMALL = ("data.batch_size=16", "checkpoint.every_steps=10")
TWO_BY_TWO = (
    "--nodes=2",
    "--ntasks-per-node=2",
    "--gpus-per-node=2",
    "--cpus-per-task=1",
    "--time=5",
    "--signal=USR2@30",
)


class Cluster:
    """Commands of the cluster, each with a deadline, and what is often waited for."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment

    def tell(self, *words: object, cwd: Path = REPOSITORY, **environment: str) -> str:
        """What a command prints; fails where it fails."""
        done = self.run(*words, cwd=cwd, **environment)
        assert done.returncode == 0, f"{words}: {done.stdout}\n{done.stderr}"
        return done.stdout.strip()

    def run(self, *words: object, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
        line = [str(word) for word in words]
        if line[0] == "ssl-pipeline":
            line[:1] = [sys.executable, "-m", "ssl_pipeline"]
        return subprocess.run(
            line, cwd=cwd, env=self.environment | environment, capture_output=True, text=True, timeout=120, check=False
        )

    def sbatch(self, *words: object, cwd: Path = REPOSITORY, **environment: str) -> str:
        """Submit; the script's own output goes to slurm-ID.out in this test's folder."""
        line = ("sbatch", "--parsable", f"--output={self.folder}/slurm-%j.out", *words)
        return self.tell(*line, cwd=cwd, **environment)

    def output(self, job: str) -> str:
        return (self.folder / f"slurm-{job}.out").read_text()

    def state(self, job: str) -> str:
        return re.search(r"JobState=(\S+)", self.tell("scontrol", "-o", "show", "job", job)).group(1)

    def wait(self, job: str, *states: str, seconds: float = 120) -> str:
        """Until a job is in one of `states` (default: an end)."""
        ends = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.until(lambda: self.state(job) in ends, f"job {job} to be in {ends}", seconds)
        return self.state(job)

    def until(self, true: Callable[[], Any], what: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                logs = "".join(f"\n== {f}\n{f.read_text()[-3000:]}" for f in sorted(self.folder.rglob("*_0*.log")))
                outs = "".join(f"\n== {f}\n{f.read_text()[-1500:]}" for f in sorted(self.folder.rglob("*.out")))
                pytest.fail(f"waited {seconds} s for {what}; {self.tell('squeue')}{logs}{outs}")
            time.sleep(0.2)

    def until_step(self, run: Path, step: int, seconds: float = 120) -> None:
        """Until a run has logged `step`."""
        self.until(
            lambda: any(row["step"] >= step for row in read_lines(run / "metrics.jsonl")), f"step {step}", seconds
        )

    def preempt(self, nodes: str = "8") -> str:
        """A job of the higher partition that takes whole nodes; when it has run, it is over at once."""
        return self.sbatch("--partition=high", f"--nodes={nodes}", "--exclusive", "--wrap=sleep 1")

    def quiet(self) -> None:
        """Until no job is left, and every node that lives is idle again."""
        self.until(lambda: not self.tell("squeue", "-h"), "an empty queue", 60)


def same(run: Path, quiet: Path) -> None:
    """Two finished runs are equal: weights, optimizer and random state bitwise, the series but for its times."""
    first, second = (checkpoint.read_newest(path / "checkpoints") for path in (run, quiet))
    assert first is not None
    assert second is not None
    for key in ("step", "model", "optimizer", "random", "loader"):
        assert_equal(first[key], second[key], key)
    series = [
        [{k: v for k, v in json.loads(line).items() if k not in TIME_KEYS} for line in text.splitlines()]
        for text in ((path / "metrics.jsonl").read_text() for path in (run, quiet))
    ]
    assert series[0] == series[1]
    steps = [row["step"] for row in series[0]]
    assert steps == list(range(1, len(steps) + 1))  # each step once


def assert_equal(a: Any, b: Any, where: str) -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}.{number}")
    else:
        assert a == b, where


def starts(run: Path) -> list[dict[str, Any]]:
    return [event for event in RunFolder(run).events() if event["event"] == "start"]


@pytest.fixture(scope="session")
def slurm() -> Iterator[dict[str, str]]:
    """The environment of a running cluster."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        end = pytest.fail if os.environ.get("CI") else pytest.skip
        end(f"a Slurm cluster needs root and, from Debian's packages, {', '.join(missing) or 'nothing more'}")
    state = f"{tempfile.gettempdir()}/ssl-pipeline-slurm"  # short: a socket's path has 107 characters at most
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "CLUSTER_"))}
    environment |= {"CLUSTER_ID": "78", "CLUSTER_STATE": state, **SETTINGS}
    subprocess.run([SCRIPT, "start"], env=environment, check=True, timeout=120)
    yield environment | {
        "SLURM_CONF": f"{state}/etc/slurm.conf",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([SCRIPT, "stop"], env=environment, check=False, timeout=120)


@pytest.fixture
def cluster(slurm: dict[str, str], tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, slurm)
    yield cluster
    cluster.run("scancel", "-u", "root")
    cluster.quiet()


@pytest.fixture(scope="session")
def quiet(slurm: dict[str, str], few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 steps on 2 nodes x 2 tasks that nothing disturbed: what the others must equal, bit for bit."""
    folder = tmp_path_factory.mktemp("quiet")
    cluster = Cluster(folder, slurm)
    run = folder / "run"
    job = cluster.sbatch(*TWO_BY_TWO, "slurm/pretrain_imagenet.sh", *recipe(few_digits), RUN=str(run))
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert len(starts(run)) == 1
    return run


def recipe(data: Path, steps: int = 30) -> tuple[str, ...]:
    return ("smoke", f"data.root={data}", f"max_steps={steps}", "epochs=20", *SMALL)
