"""What `optim.accumulate` costs and saves: peak memory and time of a step on random pictures, ResNet-50.

    python benchmarks/accumulate.py --rows 32 --size 64 --output benchmarks/results/accumulate.md

Each cell is two processes, one for memory and one for time, whose second step is measured. On a CPU memory is the growth
of the resident set from before the steps to its peak, and time is CPU time; on a GPU both are the allocator's and the
device's. BYOL is measured by both ways: its own, a loss a micro-batch, and the other methods', the backbone forward twice.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
from measure import FREED_AT_ONCE, clock, peak_bytes

from ssl_pipeline import config, distributed
from ssl_pipeline.pretrain import PretrainConfig, _forward_backward, build_method

WAYS = {"SimCLR": "simclr", "BYOL, a loss a micro-batch": "byol", "BYOL, forward twice": "byol"}
BEGIN, END = "<!-- table -->", "<!-- end -->"


def measure(way: str, accumulate: int, rows: int, size: int) -> dict[str, float]:
    """Megabytes and seconds of one step of `rows` pictures a view."""
    device = distributed.start().device
    options = config.validate(PretrainConfig, config.load(f"imagenet/{WAYS[way]}", ["data.root=."]).values)
    method = build_method(options).to(device)
    method.per_sample = way == "BYOL, a loss a micro-batch"
    views = [torch.randn(rows, 3, size, size, device=device) for _ in range(2)]
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    seconds = 0.0

    def steps() -> None:
        nonlocal seconds
        for _ in range(2):
            for p in method.parameters():
                p.grad = None
            start = clock()
            _forward_backward(method, method, views, accumulate, None, scaler)
            seconds = clock() - start

    return {"megabytes": peak_bytes(steps) / 1e6, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32, help="pictures of a rank")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--accumulate", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--output", type=Path, help="file whose table is replaced; none: printed")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(measure(arguments.cell[0], int(arguments.cell[1]), arguments.rows, arguments.size)))
        return
    lines = ["| | " + " | ".join(f"accumulate {n}" for n in arguments.accumulate) + " |"]
    lines.append("|---" * (len(arguments.accumulate) + 1) + "|")
    for way in WAYS:
        cells = []
        for count in arguments.accumulate:
            words = ["--rows", arguments.rows, "--size", arguments.size, "--cell", way, count]
            line = [sys.executable, __file__, *map(str, words)]
            memory, speed = (
                json.loads(subprocess.run(line, env=os.environ | more, stdout=subprocess.PIPE, check=True).stdout)
                for more in (FREED_AT_ONCE, {})
            )
            cells.append(f"{memory['megabytes']:.0f} MB, {speed['seconds']:.1f} s")
            print(way, count, cells[-1], file=sys.stderr)
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    device = distributed.start().device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    lines += ["", f"ResNet-50, {arguments.rows} pictures of {arguments.size} px a view, fp32; {name}; torch "
              f"{torch.__version__}, Python {platform.python_version()}."]  # fmt: skip
    table = "\n".join(lines)
    if arguments.output is None:
        print(table)
        return
    text = arguments.output.read_text()
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    arguments.output.write_text(f"{head}{BEGIN}\n{table}\n{END}{tail}")


if __name__ == "__main__":
    main()
