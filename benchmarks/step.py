"""What a step costs beside forward, backward and optimizer, and what activations computed again cost and save.

    python benchmarks/step.py

The loop is that of a real run: cifar10/simclr (ResNet-18, two views of 32 px, bf16, channels_last) at a batch of 256 on
pictures of noise, one thread. Its own cost is all that the main thread does in a step, the linear probe included, but for
`_forward_backward`, the optimizer's step and the wait for data; on a GPU the time until the device has done each of
them. Memory is measured in processes of their own, whose freed memory goes back to the system at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import FREED_AT_ONCE, Row, clock, interleaved, main, measured, peak_bytes, ratio
from PIL import Image

from ssl_pipeline import compute, config, distributed, pretrain
from ssl_pipeline.methods import Method
from ssl_pipeline.monitor import Monitor
from ssl_pipeline.pretrain import PretrainConfig, _forward_backward, build_method

BATCH, STEPS, PICTURES = 256, 6, 512
"""Of the run; its first step and its last, which saves, are not counted."""
ROWS, SIZE, ROUNDS = 32, 64, 2
"""Pictures and pixels of a view where activations are computed again, and rounds of its time."""


def make_pictures(root: Path) -> None:
    """JPEGs of noise in two classes."""
    noise = np.random.default_rng(0)
    for number in range(PICTURES):
        path = root / "train" / f"class{number % 2}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)


class Clocks:
    """Seconds of each step of a run: all but the wait for data, the parts that are no overhead, and the wait."""

    def __init__(self) -> None:
        # On a CPU, which others may use, that of the main thread, which alone computes.
        self.clock = clock if torch.cuda.is_available() else time.thread_time
        self.steps: list[float] = []
        self.parts: list[float] = []
        self.waits: list[float] = []
        """Shares of the wall's time."""

    def part(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time counted as no overhead."""

        def wrapper(*arguments: Any, **options: Any) -> Any:
            start = self.clock()
            result = function(*arguments, **options)
            self.parts[-1] += self.clock() - start
            return result

        return wrapper

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches, the body of the caller's loop over them being a step."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            came = time.perf_counter()
            if batch is None:
                return
            self.parts.append(0.0)
            start = self.clock()
            yield batch
            self.steps.append(self.clock() - start)
            self.waits.append((came - asked) / (time.perf_counter() - asked))


def of_the_loop() -> list[Row]:
    """The loop's own cost, and its wait for data."""
    clocks = Clocks()
    timed, build, forward_backward = Monitor.timed, pretrain.optim.build, pretrain._forward_backward

    def built(*arguments: Any) -> torch.optim.Optimizer:
        optimizer = build(*arguments)
        optimizer.step = clocks.part(optimizer.step)  # type: ignore[method-assign]
        return optimizer

    Monitor.timed = lambda self, batches: clocks.timed(timed(self, batches))  # type: ignore[method-assign]
    pretrain.optim.build = built
    pretrain._forward_backward = clocks.part(forward_backward)
    with tempfile.TemporaryDirectory() as folder:
        make_pictures(Path(folder) / "data")
        overrides = [
            f"data.root={folder}/data", f"data.batch_size={BATCH}", f"max_steps={STEPS}", "monitor.tensorboard=false",
            "online.measures_every_epochs=null",
        ]  # fmt: skip
        options = config.validate(PretrainConfig, config.load("cifar10/simclr", overrides).values)
        pretrain.pretrain(options, Path(folder) / "run")
    Monitor.timed, pretrain.optim.build, pretrain._forward_backward = timed, build, forward_backward
    steps, waits = np.array(clocks.steps[1 : STEPS - 1]), clocks.waits[1 : STEPS - 1]
    own = steps - np.array(clocks.parts[1 : STEPS - 1])
    detail = f"{1e3 * np.median(own):.3g} of {1e3 * np.median(steps):.4g} ms"
    return [
        measured("the loop's own time, SimCLR, ResNet-18, batch 256", list(own / steps), "of a step", 0.01, detail),
        measured("its wait for data", waits, "of the time", detail="wall time, on a machine that may be shared"),
    ]


def step(again: bool) -> Callable[[], object]:
    """Forward and backward of Barlow Twins' ResNet-50, activations computed `again` or kept."""
    device = distributed.start().device
    overrides = [
        "data.root=.",
        f"compute.checkpoint_activations={str(again).lower()}",
        "head.hidden=512",
        "head.output=512",
    ]
    options = config.validate(PretrainConfig, config.load("imagenet/barlow_twins", overrides).values)
    method: Method = build_method(options)
    model = compute.wrap(method, options.compute, device)
    views = [torch.randn(ROWS, 3, SIZE, SIZE, device=device) for _ in range(2)]
    scaler = torch.amp.GradScaler(device.type, enabled=False)

    def action() -> None:
        method.zero_grad()
        _forward_backward(method, model, views, 1, None, scaler)

    return action


def peak(again: bool) -> int:
    """Bytes at the peak of a step, gradients included."""
    action = step(again)
    action()
    return peak_bytes(action)


def of_activations() -> list[Row]:
    """Memory and time of a step whose activations are computed again, against one that keeps them."""
    again, kept = (
        json.loads(
            subprocess.run(
                [sys.executable, __file__, "--peak", word],
                env=os.environ | FREED_AT_ONCE,
                stdout=subprocess.PIPE,
                check=True,
            ).stdout
        )
        for word in ("again", "kept")
    )
    seconds = interleaved({"again": step(True), "kept": step(False)}, ROUNDS)
    what = f"activations computed again, ResNet-50, two views of {SIZE} px, batch {ROWS}, fp32: "
    return [
        ratio(what + "peak memory", [again], [kept], "one that keeps them", None, "MB"),
        ratio(what + "time", seconds["again"], seconds["kept"], "one that keeps them", None, "s"),
    ]


def rows() -> list[Row]:
    """All rows."""
    return [*of_the_loop(), *of_activations()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--peak"]:
        print(json.dumps(peak(sys.argv[2] == "again")))
    else:
        main(__doc__, rows)
