"""What a loader costs: images a second, and CPU time of the whole process tree, which a busy machine does not change."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from ssl_pipeline import distributed
from ssl_pipeline.data.index import pretraining_index
from ssl_pipeline.data.loader import Loader, Options, picture_size


def process_tree_seconds() -> float:
    """CPU seconds, user and system, that this process and its children have used so far; Linux counts them in 10 ms."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal():
            continue
        try:
            stat = Path(entry.path, "stat").read_text()
        except OSError:  # it has ended
            continue
        # proc(5): after the name in brackets come state, ppid, ..., and as 12th to 15th utime, stime, cutime, cstime.
        fields = stat.rpartition(")")[2].split()
        pid = int(entry.name)
        parents[pid], ticks[pid] = int(fields[1]), sum(map(int, fields[11:15]))
    total = 0
    for pid in ticks:
        ancestor = pid
        while ancestor not in (os.getpid(), 0):
            ancestor = parents.get(ancestor, 0)
        if ancestor:
            total += ticks[pid]
    return total / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cost:
    """What a loader was measured to need on this machine."""

    batch: int
    """Pictures in a batch of this process."""
    threads: int
    """DALI threads."""
    placed: str
    """data.decode and data.augment in force."""
    images_per_second: float
    """Of wall time, with nobody at work but the loader."""
    cpu_ms: float
    """CPU ms an image, user and system, over the process tree."""
    copied: dict[str, float]
    """Bytes that go to a GPU with a batch, by placement."""

    def cores(self, images_per_second: float) -> float:
        """Cores like these that would feed so many images a second, placed as here."""
        return self.cpu_ms / 1000 * images_per_second


def bench(options: Options, seed: int, seconds: float, most: int = 128) -> Cost:
    """Run the training loader of `options` for so long and measure it; batches have at most `most` pictures.

    Raises BadInput as `pretraining_index` and `Loader` do, and where no picture is there.
    """
    index = pretraining_index(options.root, options.unlabelled)
    batch = min(options.batch_size, most, len(index))
    data = Loader.for_training(options, index, seed=seed, world=distributed.start(), batch_size=batch)
    endless = (given for _ in iter(int, 1) for given in data)
    first = next(endless)
    for _ in range(options.prefetch + 1):  # now each batch that is taken makes room for one
        next(endless)
    start, spent, count = time.monotonic(), process_tree_seconds(), 0
    while time.monotonic() - start < seconds:
        next(endless)
        count += batch
    passed, spent = time.monotonic() - start, process_tree_seconds() - spent
    pictures = [index.read(int(sample)) for sample in first.ids]
    pixels = sum(height * width for height, width in map(picture_size, pictures))
    copied = {
        "decode=mixed": float(sum(len(picture) for picture in pictures)),
        "decode=cpu": 3.0 * pixels,
        "augment=cpu": float(sum(view.numel() * view.element_size() for view in first.views)),
    }
    data.close()
    placed = f"decode={data.decode} augment={data.augment}"
    return Cost(batch, data.threads, placed, count / passed, 1000 * spent / count, copied)


def described(cost: Cost, gpu_rate: float) -> str:
    """Lines to be read by a person who plans for GPUs of `gpu_rate` images a second each."""
    copied = ", ".join(f"{size / 1e6:.1f} MB by {placed}" for placed, size in cost.copied.items())
    return "\n".join(
        [
            f"batches of {cost.batch}, {cost.threads} DALI threads, {cost.placed}",
            f"images a second: {cost.images_per_second:.0f}",
            f"CPU ms an image: {cost.cpu_ms:.2f} (user and system, process tree)",
            f"copied to a GPU with a batch: {copied}",
            f"cores that feed a GPU of {gpu_rate:.0f} images a second, placed so: {cost.cores(gpu_rate):.1f}",
        ]
    )
