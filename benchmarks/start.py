"""Starting, and stopping to save: CPU time until a verb answers, time to the first step, and what a save costs the loop.

Rounds of processes of their own, with one thread each; files lie in the page cache. The first step is that of
configs/smoke.yaml on random pictures of 32 px: `seconds_to_first_step` of metrics.jsonl, wall time from the start of the
process. A save is one of ResNet-50 with an 8192-8192-8192 head, Barlow Twins' at ImageNet, and its momentum: 1.4 GB, into
TMPDIR, in wall time. The loop waits for the copy to host memory; its peer is torch.save into a file, which the official
loops call, and which reaches the page cache, not the disk.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from measure import Row
from PIL import Image

from ssl_pipeline import checkpoint, config, distributed, optim
from ssl_pipeline.pretrain import PretrainConfig, build_method

ROUNDS = 3
ROOM = 8e9
"""Bytes that must be free, on disk and in memory, for the large state."""


def python(*words: object) -> float:
    """CPU seconds of a Python that is given these words."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    line = [sys.executable, *map(str, words)]
    done = subprocess.run(line, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)}\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def pictures(root: Path) -> None:
    """256 of random pixels, without labels."""
    (root / "train").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (256, 32, 32, 3), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(root / "train" / f"{number:03d}.jpg")


def verbs(folder: Path) -> list[Row]:
    """Of what a person waits for: the first answer of a verb, and a run's first step."""
    pictures(folder / "data")
    first_step: list[float] = []
    whole: list[float] = []

    def pretrain() -> None:
        run = folder / str(len(whole))
        small = [f"data.root={folder / 'data'}", "max_steps=1"]
        whole.append(python("-m", "ssl_pipeline", "pretrain", "smoke", *small, "--output", run))
        row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        first_step.append(row["seconds_to_first_step"])

    verb = ("-m", "ssl_pipeline")
    found: dict[str, list[float]] = {}
    asked: dict[str, Callable[[], Any]] = {
        "import": lambda: python("-c", "import ssl_pipeline"),
        "help": lambda: python(*verb, "--help"),
        "list": lambda: python(*verb, "config"),
        "config": lambda: python(*verb, "config", "cifar10/simclr_sparsehead"),
        "timm": lambda: python("-c", "import timm"),
        "imports": lambda: python("-c", "import gc, os; gc.disable(); import ssl_pipeline.pretrain; os._exit(0)"),
        "first": pretrain,
        "status": lambda: python(*verb, "status", folder / "0"),
    }
    for number in range(ROUNDS + 1):
        for name, action in asked.items():
            seconds = action()
            if number and seconds is not None:
                found.setdefault(name, []).append(seconds)
    imports, cpu = (statistics.median(values) for values in (found["imports"], whole[1:]))
    return [
        measure.measured("import ssl_pipeline", found["import"], "s of CPU", 0.3),
        measure.measured("ssl-pipeline --help", found["help"], "s of CPU", 0.5),
        measure.measured("ssl-pipeline config, the list", found["list"], "s of CPU", 0.5),
        measure.measured("ssl-pipeline status RUN", found["status"], "s of CPU", 0.5),
        measure.ratio("ssl-pipeline config NAME", found["config"], found["timm"], "python -c 'import timm'", 1.0, "s"),
        measure.measured(
            "from the start of the process to the first step", first_step[1:], "s", None,
            f"the whole process takes {cpu:.2g} s of CPU, imports {imports:.2g} of them",
        ),
    ]  # fmt: skip


def saves(folder: Path) -> list[Row]:
    """How long the loop waits for a save, beside a blocking one of the same state."""
    folder.mkdir()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    width = 8192 if min(shutil.disk_usage(folder).free, memory) > ROOM else 512
    words = ["data.root=.", f"head.hidden={width}", f"head.output={width}"]
    options = config.validate(PretrainConfig, config.load("imagenet/barlow_twins", words).values)
    method = build_method(options).to(distributed.start().device)
    optimizer = optim.build(method.parameter_groups(), options.optim, options.data.batch_size)
    state = {"model": method.state_dict(), "optimizer": optimizer.state_dict()}
    stalls: list[float] = []
    blocking: list[float] = []
    with checkpoint.Writer(folder, keep=1, max_failed=3) as writer:
        for number in range(ROUNDS + 1):
            turns: list[tuple[list[float], Callable[[], object]]] = [
                (stalls, functools.partial(writer.save, {"step": number, **state})),
                (blocking, functools.partial(torch.save, state, folder / "blocking.pt")),
            ]
            for seconds, action in turns:
                start = time.perf_counter()
                action()
                if number:  # the first one allocates
                    seconds.append(time.perf_counter() - start)
                writer.wait()
                (folder / "blocking.pt").unlink(missing_ok=True)  # what of it the disk has not got, it need not get
    less = "" if width == 8192 else ", for want of disk or memory for 8192"
    size = checkpoint.state_bytes(state) / 1e9
    what = f"stall of a save, ResNet-50 with a {width}-{width}-{width} head and momentum, {size:.2g} GB{less}"
    return [measure.ratio(what, stalls, blocking, "torch.save", None)]


def rows() -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="start-") as name:
        return verbs(Path(name)) + saves(Path(name) / "checkpoints")


if __name__ == "__main__":
    measure.main(__doc__, rows)
