"""The paper's Table 1 in small, on a CPU: eight methods, without and with SparseHead, on a tenth of CIFAR-10.

    ssl-pipeline prepare-data cifar10 data/cifar10
    python benchmarks/small_table.py --data data/cifar10

A row is one pretraining, a 5-nn and a linear probe (the small-data protocol), all by the same verbs as by hand. Rows that
are done with the same config are not done again, and one that was stopped goes on from its checkpoint. The table is
written as it comes; a row that was not run says so. 24 rows of about three minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from measure import machine

from ssl_pipeline import config
from ssl_pipeline.data.index import image_folder
from ssl_pipeline.pretrain import PretrainConfig
from ssl_pipeline.run_folder import RunFolder, read_lines

METHODS = {
    "simclr": "SimCLR",
    "barlow_twins": "Barlow Twins",
    "byol": "BYOL",
    "simsiam": "SimSiam",
    "w_mse": "W-MSE",
    "swav": "SwAV",
    "ssl_hsic": "SSL-HSIC",
    "vicreg": "VICReg",
}
SEEDS = {"simclr": 3, "barlow_twins": 3}
"""Runs of a method; one of all others."""
BATCH = 128
SHORT = [
    "backbone.arguments={layers: [1, 1, 1, 1], channels: [32, 64, 128, 256]}",
    f"data.batch_size={BATCH}", "epochs=4", "optim.schedule=cosine", "optim.warmup_steps=0", "optim.warmup_epochs=1",
    "checkpoint.every_epochs=1", "monitor.every_steps=13", "monitor.tensorboard=false", "online.linear=false",
]  # fmt: skip
"""What makes a run of the CIFAR-10 recipes a short one."""
OWN = {"swav": ["method.freeze_prototypes_steps=39"]}  # an epoch, as in the recipe


class Row(NamedTuple):
    """One run."""

    label: str
    config: str
    seed: int
    overrides: list[str]


def rows() -> list[Row]:
    """All rows: first one run of each, then the further seeds."""
    found = []
    for seed in range(max(SEEDS.values())):
        for method, name in METHODS.items():
            for sparse in ("", "_sparsehead"):
                if seed < SEEDS.get(method, 1):
                    overrides = [*SHORT, *OWN.get(method, []), f"seed={seed}"]
                    label = name + (" + SparseHead" if sparse else "")
                    found.append(Row(label, f"cifar10/{method}{sparse}", seed, overrides))
    return found


def tenth(source: Path, target: Path, train: int = 500, val: int = 200) -> Path:
    """The first pictures of each class, in the order of their names."""
    if target.is_dir():
        return target
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
    return target


def digest(row: Row) -> str:
    """Of the resolved config, wherever the data lies."""
    values = config.validate(PretrainConfig, config.load(row.config, [*row.overrides, "data.root=."]).values)
    return hashlib.sha256(config.dump_yaml(values.model_dump(mode="json")).encode()).hexdigest()[:8]


def commit() -> str:
    """Of the repository, with a mark where files other than results were changed since."""

    def git(*words: str) -> str:
        line = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
    return git("rev-parse", "--short=8", "HEAD") + ("+" if changed else "")


def verb(*words: object) -> None:
    """`ssl-pipeline` in a process of its own; ends this program where it fails."""
    process = subprocess.run([sys.executable, "-m", "ssl_pipeline", *map(str, words)], check=False)
    if process.returncode:
        raise SystemExit(process.returncode)


def scores(run: Path, *options: str) -> dict[str, float]:
    """5-nn and linear accuracy, in percent."""
    verb("knn", run, *options)
    verb("linear-probe", run, *options)
    results = RunFolder(run).read_results()
    suffix = "_random_init" if options else ""
    return {"knn5": results[f"knn{suffix}"]["knn5_top1"], "linear": results[f"linear_probe{suffix}"]["linear_top1"]}


def measure(row: Row, data: Path, work: Path) -> dict[str, Any]:
    """Pretrain and evaluate one row, or go on with it."""
    key, made_by = digest(row), commit()
    run = work / f"{row.config.replace('/', '_')}_{row.seed}_{key}"
    verb("pretrain", row.config, *row.overrides, f"data.root={data}", "--output", run)
    logged = [line for line in read_lines(run / "metrics.jsonl") if "loss" in line]
    batch = config.load(row.config, row.overrides).values["data"]["batch_size"]
    return {
        "label": row.label, "seed": row.seed, "config": key, "commit": made_by, "date": time.strftime("%Y-%m-%d"),
        "seconds": seconds(logged, batch), **scores(run), "run": str(run),
        "loss": logged[-1].get("loss_before_inner", logged[-1]["loss"]), "embedding_std": logged[-1]["embedding_std"],
    }  # fmt: skip


def seconds(logged: list[dict[str, Any]], batch: int) -> int:
    """Of pretraining, from the logged rates, which a stop and a restart leave whole."""
    steps = [b["step"] - a["step"] for a, b in itertools.pairwise([{"step": 0}, *logged])]
    # The row before the clock first ran has no rate.
    return round(
        sum(n * batch / r["images_per_second"] for n, r in zip(steps, logged, strict=True) if r["images_per_second"])
    )


def table(planned: list[Row], done: list[dict[str, Any]], before: dict[str, float] | None) -> str:
    """The results as Markdown."""
    start = f"5-nn {before['knn5']:.2f}, linear {before['linear']:.2f}" if before else "not run"
    lines = [
        "# Eight methods, without and with SparseHead, on a tenth of CIFAR-10",
        "",
        "`python benchmarks/small_table.py --data data/cifar10`: 5,000 training and 2,000 test pictures, a ResNet of four basic",
        "blocks (32 to 256 channels, small stem), 4 epochs of 39 steps of 128 pictures, Adam 3e-3, one epoch of warm-up and a",
        "cosine, bf16; else the CIFAR-10 recipes. 5-nn and the linear probe see the same 5,000 pictures.",
        f"At random initialisation (seed 0): {start}. Accuracies in percent.",
        "",
        "What it can show is that a method runs, whether it comes away from its initialisation in 156 steps, and how far seeds",
        "differ. So few steps rank no method, and lambda = 1e-4 has no time to act: compare a pair of rows with the spread of",
        "seeds before reading anything into it.",
        "",
        "| method | seed | 5-nn | linear | loss | deviation of embeddings | seconds | date | commit | config |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(planned, key=lambda row: (list(METHODS).index(method_of(row)), row.config, row.seed)):
        found = [r for r in done if (r["label"], r["seed"], r["config"]) == (row.label, row.seed, digest(row))]
        if found:
            (r,) = found
            lines.append(
                f"| {row.label} | {row.seed} | {r['knn5']:.2f} | {r['linear']:.2f} | {r['loss']:.3f} | "
                f"{r['embedding_std']:.2f} | {r['seconds']} | {r['date']} | {r['commit']} | {r['config']} |"
            )
        else:
            lines.append(f"| {row.label} | {row.seed} | not run | not run | - | - | - | - | - | {digest(row)} |")
    lines += ["", machine(), "Seconds are of pretraining alone, on a machine that did other work at the same time."]
    return "\n".join(lines) + "\n"


def method_of(row: Row) -> str:
    return row.config.split("/")[1].removesuffix("_sparsehead")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path("data/cifar10"), help="laid out by prepare-data (%(default)s)"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/small_table"), help="runs and rows (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "small_table.md")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    data = tenth(args.data, args.work / "data")
    record, planned = args.work / "rows.json", rows()
    state = json.loads(record.read_text()) if record.is_file() else {"before": None, "rows": []}
    for row in planned:
        if not any((r["label"], r["seed"], r["config"]) == (row.label, row.seed, digest(row)) for r in state["rows"]):
            state["rows"].append(measure(row, data, args.work))
        if state["before"] is None:
            state["before"] = scores(Path(state["rows"][0]["run"]), "--random-init")
        record.write_text(json.dumps(state, indent=2) + "\n")
        args.output.write_text(table(planned, state["rows"], state["before"]))
    print(args.output.read_text())


if __name__ == "__main__":
    main()
