"""Kill a pretraining of two ranks again and again, and compare what it ends with to a run that nobody disturbed.

    python benchmarks/chaos.py --kills 50 --output benchmarks/results/chaos.md

A quiet run goes first. Then the same one is started, SIGKILLed at a moment drawn uniformly from three checkpoint
intervals after its first step, and started again, until it was killed `--kills` times; then it may end. Every other
kill waits for a checkpoint to be under way and takes rank 0, which writes it, alone or with rank 1. The others take both
processes, rank 0 alone, or rank 1 alone; the rank that is left has to end by itself. Exit status 0 where the two runs
are equal to the last bit, no restart went further back than to the newest checkpoint, and four in five of the kills that
waited for a save met it.
"""

from __future__ import annotations

import argparse
import collections
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from measure import machine

from ssl_pipeline import checkpoint
from ssl_pipeline.data.prepare import prepare
from ssl_pipeline.monitor import TIME_KEYS
from ssl_pipeline.run_folder import RunFolder, read_lines, saved_steps

INTERVAL = 4
"""Steps between checkpoints."""
LEAST = 60
"""Steps of a run, however few its kills: the quiet run's clock needs some."""


def overrides(data: Path, kills: int) -> list[str]:
    """The config: a ResNet of 1.2 million weights on digits, with more steps than so many kills let through.

    Between two kills lie two or three checkpoints at most, and fewer on average.
    """
    steps = max(LEAST, 5 * kills * INTERVAL // 2)
    return [
        f"data.root={data}",
        "backbone.arguments={layers: [1, 1, 1, 1], channels: [32, 64, 128, 256]}",
        "data.batch_size=16",
        "data.threads=1",
        f"epochs={steps * 16 // 1437 + 1}",
        f"max_steps={steps}",
        f"checkpoint.every_steps={INTERVAL}",
        "checkpoint.every_epochs=null",
        "distributed.timeout=30",
    ]


class Job:
    """Two ranks of `ssl-pipeline pretrain`, without a launcher that would end the one when the other is killed."""

    def __init__(self, run: RunFolder, words: list[str], log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.log = log
        self.processes = []
        for rank in range(2):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
            environment = os.environ | {key: str(value) for key, value in place.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
            line = [sys.executable, "-m", "ssl_pipeline", "pretrain", "smoke", "--output", str(run.path), *words]
            with log.open("a") as file:
                self.processes.append(subprocess.Popen(line, env=environment, stdout=file, stderr=file))

    def running(self) -> bool:
        """Whether both ranks live."""
        return all(process.poll() is None for process in self.processes)

    def wait(self, limit: float) -> list[int]:
        """Exit statuses; what lives after `limit` seconds is killed, as -9."""
        end = time.monotonic() + limit
        for process in self.processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return [process.returncode for process in self.processes]


@dataclass
class Toll:
    """What the kills did."""

    kills: int = 0
    while_saving: int = 0
    """Kills of the writing rank that left a half-written checkpoint behind."""
    repeated: list[int] = field(default_factory=list)
    """Logged steps that each restart did again."""
    too_far: list[str] = field(default_factory=list)
    """Restarts that did not go on from the newest checkpoint."""
    survivors: collections.Counter[int] = field(default_factory=collections.Counter)
    """Exit statuses of ranks whose peer was killed."""


def last_step(run: RunFolder) -> int:
    """The last step that was logged."""
    rows = read_lines(run.metrics)
    return int(rows[-1]["step"]) if rows else 0


def half_written(run: RunFolder) -> list[Path]:
    """Checkpoints that are under way, or were when the process died."""
    return list(run.checkpoints.glob(".*.partial"))


def started_from(run: RunFolder) -> list[int]:
    """The step from which each start went on."""
    return [event["step"] for event in run.events() if event["event"] == "start"]


def until(condition: Any, job: Job, limit: float = 120.0) -> bool:
    """Wait for `condition()`; False where a rank ended first."""
    end = time.monotonic() + limit
    while not condition():
        if not job.running():
            return False
        if time.monotonic() > end:
            raise SystemExit(f"nothing happened for {limit:.0f} s: see {job.log}")
        time.sleep(0.0005)
    return True


def disturb(
    run: RunFolder, words: list[str], kills: int, interval: float, draw: np.random.Generator, log: Path
) -> Toll:
    """Run to the end in spite of `kills`. `interval` is the time between two checkpoints in seconds."""
    toll = Toll()
    while True:
        starts, newest, logged = len(started_from(run)), max(saved_steps(run.checkpoints), default=0), last_step(run)
        job = Job(run, words, log)
        begun = until(lambda: len(started_from(run)) > starts, job)  # noqa: B023
        if begun and toll.kills:
            back = started_from(run)[-1]
            toll.repeated.append(max(logged - back, 0))
            if back != newest:
                toll.too_far.append(f"after kill {toll.kills}: from step {back} instead of {newest}")
        if toll.kills == kills:
            statuses = job.wait(1200)
            if statuses != [0, 0]:
                raise SystemExit(f"the last start ended with {statuses}: see {log}")
            return toll
        alive = begun and until(lambda: last_step(run) > started_from(run)[-1], job)
        saving = toll.kills % 2 == 1
        if alive:
            time.sleep(draw.uniform(0, 3 * interval))
            alive = not saving or until(lambda: half_written(run), job)
        if not alive or not job.running():
            raise SystemExit(f"a rank ended before it was killed, with {job.wait(60)}: see {log}")
        victims = [job.processes, job.processes[:1], job.processes[1:]][draw.integers(2 if saving else 3)]
        for victim in victims:
            victim.kill()
        toll.kills += 1
        toll.while_saving += job.processes[0] in victims and bool(half_written(run))
        statuses = job.wait(120)
        if len(victims) == 1:
            toll.survivors[statuses[1 - job.processes.index(victims[0])]] += 1
        print(f"kill {toll.kills}: rank {'s 0 and 1' if len(victims) == 2 else job.processes.index(victims[0])}, step "
              f"{last_step(run)}, statuses {statuses}", flush=True)  # fmt: skip


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """Where two nested values are not equal to the last bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        same = same and torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (a, b)))
        return [] if same else [name]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [found for place, pair in enumerate(zip(a, b, strict=True))
                for found in differences(*pair, f"{name}[{place}]")]  # fmt: skip
    return [] if a == b else [name]


def compare(quiet: RunFolder, killed: RunFolder) -> list[str]:
    """Where two runs differ: the whole last checkpoint, and all metrics but those of the clock."""
    states = [checkpoint.read_newest(run.checkpoints) for run in (quiet, killed)]
    rows = [
        [{key: value for key, value in row.items() if key not in TIME_KEYS} for row in read_lines(run.metrics)]
        for run in (quiet, killed)
    ]
    return differences(*states) + differences(*rows, "metrics")


def main() -> int:
    """The measurement; 0 where the killed run equals the quiet one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--work", type=Path, help="folder for the two runs; by default a temporary one")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    given = parser.parse_args()
    work = given.work or Path(tempfile.mkdtemp(prefix="chaos-"))
    begin = time.monotonic()
    prepare("digits", work / "digits")
    words = overrides(work / "digits", given.kills)
    quiet, killed = RunFolder(work / "quiet"), RunFolder(work / "killed")
    statuses = Job(quiet, words, work / "quiet.log").wait(3600)
    if statuses != [0, 0]:
        raise SystemExit(f"the quiet run ended with {statuses}: see {work / 'quiet.log'}")
    seconds = [
        INTERVAL * 16 / row["images_per_second"] for row in read_lines(quiet.metrics) if row["images_per_second"]
    ]
    toll = disturb(killed, words, given.kills, median(seconds), np.random.default_rng(given.seed), work / "killed.log")
    found = compare(quiet, killed)
    good = not found and not toll.too_far and toll.while_saving >= 0.8 * (given.kills // 2)
    last = (
        f"kills {toll.kills} ({toll.while_saving} while a checkpoint was being written), restarts {len(toll.repeated)}, "
        f"repeated steps {sum(toll.repeated)} (at most {max(toll.repeated, default=0)} at once), "
        f"final state and metrics {'equal to the last bit' if not found else 'NOT equal: ' + ', '.join(found[:5])}"
    )
    survivors = ", ".join(f"{count} with {status}" for status, count in sorted(toll.survivors.items())) or "none"
    details = [
        f"{last_step(killed)} steps, a checkpoint every {INTERVAL}, {median(seconds):.2f} s apart in the quiet run; "
        f"{(time.monotonic() - begin) / 60:.0f} minutes in all. Ranks left alone ended: {survivors}.",
        *toll.too_far,
        machine(),
    ]
    if given.output:
        command = f"python benchmarks/chaos.py --kills {given.kills} --seed {given.seed} --output {given.output}"
        lines = ["# A run that is killed again and again", "", f"`{command}`", "", *details, "", f"**{last}**", ""]
        given.output.write_text("\n".join(lines), encoding="utf-8")
    if given.work is None and good:
        shutil.rmtree(work)
    print("\n".join([*details, last]), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
