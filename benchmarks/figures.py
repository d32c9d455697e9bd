"""The paper's Figures 1 and 3 in small, on a CPU: six short runs on CIFAR-10, their spectra, two pictures and a table.

    ssl-pipeline prepare-data cifar10 data/cifar10
    python benchmarks/figures.py --data data/cifar10

A run is one pretraining by configs/cifar10/figure*.yaml and one `spectrum`, by the same verbs as by hand. Runs that are
done are not done again, and one that was stopped goes on. Six runs of one and a half to six minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from measure import machine
from small_table import Row, commit, digest, seconds, tenth, verb

from ssl_pipeline import config
from ssl_pipeline.evaluation import measures
from ssl_pipeline.run_folder import read_lines

FIGURES = {
    "figure1": ["figure1_identity", "figure1_linear", "figure1_mlp"],
    "figure3": ["figure3_dense", "figure3_sparse", "figure3_sparser"],
}
"""The runs of each figure, by their configs below configs/cifar10."""
RANKS = ("rank", "rank_1e-6", "rank_1e-4", "rank_1e-2")


def measure(name: str, data: Path, work: Path) -> tuple[Path, dict[str, Any]]:
    """Pretrain one run, or go on with it; its folder, and what is told of it."""
    row = Row(name, f"cifar10/{name}", 0, [])
    key, made_by = digest(row), commit()
    run = work / key / name
    verb("pretrain", row.config, f"data.root={data}", "--output", run)
    logged = [line for line in read_lines(run / "metrics.jsonl") if "loss" in line]
    batch = config.load(row.config).values["data"]["batch_size"]
    told = {"config": key, "commit": made_by, "date": time.strftime("%Y-%m-%d"), "seconds": seconds(logged, batch)}
    record = run / "told.json"  # of when it was made, not of when it was drawn again
    if not record.is_file():
        record.write_text(json.dumps({**told, "steps": logged[-1]["step"], "loss": logged[-1]["loss"]}))
    return run, json.loads(record.read_text())


def rows(name: str, result: dict[str, Any], told: dict[str, Any]) -> list[str]:
    """The table's lines of a run: a layer each."""
    lines = []
    for layer in ("r", "z"):
        of = result[layer]
        numbers = " | ".join(str(of[key]) for key in RANKS)
        effective = measures.effective_rank(torch.tensor(of["eigenvalues"], dtype=torch.float64))
        lines.append(
            f"| {name} | {layer} | {of['dimensions']} | {numbers} | {effective:.1f} | {of['eigenvalues'][0]:.3g} | "
            f"{told['loss']:.3f} | {told['steps']} | {told['seconds']} | {told['date']} | {told['commit']} | {told['config']} |"
        )
    return lines


def page(done: dict[str, list[str]], drawn: list[str], train: int, val: int) -> str:
    """The results as Markdown: `done` has the lines of each run, `drawn` the figures; pictures of a class of each split."""
    columns = (
        "run", "layer", "D", "rank", "1e-6", "1e-4", "1e-2", "effective rank", "lambda_max", "loss", "steps", "seconds",
        "date", "commit", "config",
    )  # fmt: skip
    lines = [
        "# Figures 1 and 3 in small, on CIFAR-10",
        "",
        "`python benchmarks/figures.py --data data/cifar10`: SimCLR on a narrow ResNet for one epoch of",
        f"{10 * train:,} pictures in batches of 128, seed 0, bf16; spectra of r and z on {10 * val:,} test pictures,",
        "unaugmented. The paper trains ResNet-18 and ResNet-50 for 2000 epochs on STL-10: nothing here is its result.",
        "[How to read it](../../docs/figures.md#reading).",
        "",
        "`rank` counts eigenvalues above lambda_max * D * eps(float32), the next three those above that share of lambda_max.",
        "Effective rank: exp of the entropy of the eigenvalues' shares (Roy and Vetterli 2007).",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    for name in (name for names in FIGURES.values() for name in names):
        lines += done.get(name, [f"| {name} | r, z | not run |" + " - |" * 12])
    for figure in drawn:
        lines += ["", f"![The spectra of {figure}'s runs]({figure}.png)", f"([CSV]({figure}.csv))"]
    lines += ["", machine(), "Seconds are of pretraining alone."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path("data/cifar10"), help="laid out by prepare-data (%(default)s)"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/figures"), help="the runs (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="(%(default)s)")
    for split, count in (("train", 4000), ("val", 1000)):
        parser.add_argument(f"--{split}", type=int, default=count, help="pictures of a class (%(default)s)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    data = tenth(args.data, args.work / f"data_{args.train}_{args.val}", args.train, args.val)
    work = args.work / data.name.replace("data", "runs")
    done: dict[str, list[str]] = {}
    drawn: list[str] = []
    for figure, names in FIGURES.items():
        made = {name: measure(name, data, work) for name in names}
        verb("spectrum", *(run for run, _ in made.values()), "--output", work / figure)
        for ending in ("png", "csv"):
            shutil.copyfile(work / figure / f"spectrum.{ending}", args.output / f"{figure}.{ending}")
        spectra = json.loads((work / figure / "spectrum.json").read_text())
        done |= {name: rows(name, spectra[run.name], told) for name, (run, told) in made.items()}
        drawn.append(figure)
        (args.output / "figures.md").write_text(page(done, drawn, args.train, args.val))
    print((args.output / "figures.md").read_text())


if __name__ == "__main__":
    main()
