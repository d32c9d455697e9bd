"""What the benchmarks share: contenders in turn, rows with bounds, where it ran.

A benchmark is a file with a function `rows() -> list[Row]` and, at its end, `measure.main(__doc__, rows)`. So it prints
its table when run alone, and `python benchmarks/bench.py` (`make bench`) runs all of them, each in a process of its own.
Measurements of the same kind that take too long for that are further functions, run by their names.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ssl_pipeline import __version__


@dataclass(frozen=True)
class Row:
    """One number and the most that it may be."""

    what: str
    value: float
    bound: float | None
    """The most that `value` may be; None where it is reported only."""
    unit: str
    """`of <peer>` where `value` is ours / theirs; else a unit."""
    low: float
    """Least and most of `value` over the rounds."""
    high: float
    detail: str = ""
    """The medians behind a ratio, with their unit; versions of peers."""

    @property
    def missed(self) -> bool:
        """Whether the number is above its bound."""
        return self.bound is not None and not self.value <= self.bound


def clock() -> float:
    """Seconds: of the device's wall where there is a GPU, after all its work; else CPU time of this process, since wall time
    on a shared machine is noise."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def interleaved(actions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each action in each round. All take their turn in every round, and the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            start = clock()
            action()
            if number:
                seconds[name].append(clock() - start)
    return seconds


def ratio(
    what: str, ours: Sequence[float], theirs: Sequence[float], peer: str, bound: float | None, unit: str = "ms"
) -> Row:
    """Ours over theirs: the median, least and most of the rounds' ratios. Times are in seconds, sizes in bytes (`MB`)."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    scale = {"ms": 1e3, "s": 1.0, "MB": 1e-6}[unit]
    detail = f"{statistics.median(ours) * scale:.4g} against {statistics.median(theirs) * scale:.4g} {unit}"
    return Row(what, statistics.median(each), bound, f"of {peer}", min(each), max(each), detail)


def measured(what: str, values: Sequence[float], unit: str, bound: float | None = None, detail: str = "") -> Row:
    """A number by itself: the median, least and most of the rounds."""
    return Row(what, statistics.median(values), bound, unit, min(values), max(values), detail)


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| | measured | bound | least to most | |", "|---|---|---|---|---|"]
    for row in rows:
        bound = "" if row.bound is None else f"{row.bound:g}" + (" MISSED" if row.missed else "")
        value, low, high = (f"{x:.3g}" if x < 1000 else f"{x:.0f}" for x in (row.value, row.low, row.high))
        lines.append(f"| {row.what} | {value} {row.unit} | {bound} | {low} to {high} | {row.detail} |")
    return "\n".join(lines)


def machine() -> str:
    """Hardware and versions, as a sentence."""
    found = {distribution.metadata["Name"]: distribution.version for distribution in importlib.metadata.distributions()}
    found["DALI"] = found.get("nvidia-dali-cuda130") or found.get("nvidia-dali-cuda120") or ""
    versions = "".join(f", {name} {found[name]}" for name in ("torchvision", "timm", "DALI") if found.get(name))
    cores = len(os.sched_getaffinity(0))
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        device = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), platform.processor())
    return (
        f"{device}, {cores} core{'s' if cores > 1 else ''}, {torch.get_num_threads()} threads of torch; "
        f"torch {torch.__version__}{versions}, Python {platform.python_version()}, ssl_pipeline {__version__}."
    )


def resident_bytes() -> int:
    """Memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Environment of a process in which freed memory goes back to the system at once, so that the resident set is what is held.
That takes time, which is to be measured in another process."""


def peak_bytes(action: Callable[[], object]) -> int:
    """The most memory that `action` holds beyond what was held before it: the device's, or else the resident set's.

    On a CPU the process wants FREED_AT_ONCE in its environment.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return torch.cuda.max_memory_allocated() - before
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets the peak to what is held now
    action()
    status = Path("/proc/self/status").read_text()
    peak = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))) * 1024
    return peak - before


def main(doc: str | None, rows: Callable[[], list[Row]], **longer: Callable[[], list[Row]]) -> None:
    """The command line of a benchmark: prints its table; with `--json FILE` also writes its rows there.

    `longer` are what `make bench` has no time for, by the names that choose them in the place of `rows`.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if longer:
        parser.add_argument("which", nargs="?", choices=longer, help="what to measure in the place of the quick rows")
    parser.add_argument("--json", type=Path, help="file for the rows")
    arguments = parser.parse_args()
    found = longer.get(getattr(arguments, "which", None) or "", rows)()
    print(table(found), machine(), sep="\n\n")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in found], indent=1))
    sys.exit(any(row.missed for row in found))
