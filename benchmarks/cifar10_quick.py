"""A first real result on a CPU: 500 CIFAR-10 pictures a class, SimCLR with and without SparseHead, 5-nn before and after.

    ssl-pipeline prepare-data cifar10 data/cifar10
    python benchmarks/cifar10_quick.py --data data/cifar10

Rows that are done are not done again, and a row that was stopped goes on from its checkpoint. ResNet-18, batch 256, Adam
3e-3, bf16. 5-nn searches the 5,000 training pictures and classifies 2,000 test pictures. The table is written as it comes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import time
from pathlib import Path

import torch
import torchvision

from ssl_pipeline import __version__, config
from ssl_pipeline.data.index import image_folder
from ssl_pipeline.evaluation import features, knn
from ssl_pipeline.exits import Status
from ssl_pipeline.pretrain import PretrainConfig, pretrain
from ssl_pipeline.run_folder import read_lines

ROWS = {"SimCLR": "cifar10/simclr", "SimCLR + SparseHead": "cifar10/simclr_sparsehead"}


def subset(source: Path, target: Path, train: int, val: int) -> None:
    """The first pictures of each class, in the order of their names."""
    if target.is_dir():
        return
    working = target.with_name(f".{target.name}.partial")
    shutil.rmtree(working, ignore_errors=True)
    for split, count in (("train", train), ("val", val)):
        index = image_folder(source / split)
        for label in range(len(index.classes)):
            for sample in (index.labels == label).nonzero()[0][:count]:
                path = working / split / index.paths[sample]
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(index.root / index.paths[sample], path)
    os.replace(working, target)


def row(name: str, data: Path, work: Path, epochs: int, seed: int) -> dict[str, object]:
    """Pretrain one row and measure it."""
    overrides = [
        f"data.root={data}", "data.batch_size=256", f"epochs={epochs}", f"seed={seed}", "optim.schedule=cosine",
        "optim.warmup_steps=19", "precision=bf16", "monitor.every_steps=5", "checkpoint.every_epochs=1",
    ]  # fmt: skip
    options = config.validate(PretrainConfig, config.load(ROWS[name], overrides).values)
    run = work / ROWS[name].replace("/", "_")
    if pretrain(options, run) != Status.DONE:
        raise SystemExit(int(Status.STOPPED))
    # From the logged rates, which a stop and a restart leave whole; the row before the clock first ran has none.
    rows = read_lines(run / "metrics.jsonl")
    steps = [b["step"] - a["step"] for a, b in itertools.pairwise([{"step": 0}, *rows])]
    seconds = sum(n * 256 / r["images_per_second"] for n, r in zip(steps, rows, strict=True) if r["images_per_second"])
    scores = {}
    for label, untrained in (("before", True), ("after", False)):
        result = knn.run(knn.Options(features=features.options(run, random_init=untrained), cosine_k=[]))
        scores[label] = result["knn5_top1"]
    return {"row": name, "epochs": epochs, "seed": seed, "seconds": round(seconds), **scores}


def table(rows: list[dict[str, object]]) -> str:
    """The results as Markdown."""
    processor = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    lines = [
        "# SimCLR on a tenth of CIFAR-10, on a CPU",
        "",
        "`python benchmarks/cifar10_quick.py --data data/cifar10` (5,000 training pictures, 2,000 test pictures; ResNet-18 with",
        "the small stem, batch 256, Adam 3e-3, bf16, cosine). As it came, one seed: differences of a point mean nothing.",
        "",
        "| method | epochs | seed | 5-nn at random initialisation, % | 5-nn after, % | seconds |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['row']} | {r['epochs']} | {r['seed']} | {r['before']:.2f} | {r['after']:.2f} | {r['seconds']} |"
        for r in rows
    ]
    lines += [f"| {name} | - | - | - | not run | - |" for name in ROWS if name not in {r["row"] for r in rows}]
    lines += [
        "",
        f"{len(os.sched_getaffinity(0))} cores of {processor}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, ssl_pipeline {__version__}; {time.strftime('%Y-%m-%d')}.",
        "Seconds are of pretraining alone; the machine was also running tests.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"))
    parser.add_argument("--work", type=Path, default=Path("runs/cifar10_quick"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cifar10_quick.md")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    data = args.work / "data"
    subset(args.data, data, 500, 200)
    done = args.work / "rows.json"
    rows = json.loads(done.read_text()) if done.is_file() else []
    for name in ROWS:
        if not any(r["row"] == name for r in rows):
            rows.append(row(name, data, args.work, args.epochs, args.seed))
            done.write_text(json.dumps(rows, indent=2) + "\n")
        print(table(rows), flush=True)
    args.output.write_text(table(rows))


if __name__ == "__main__":
    main()
