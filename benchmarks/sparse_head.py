"""What the options of SparseHead do to the head and to the representation: SimCLR on a tenth of CIFAR-10, on a CPU.

    ssl-pipeline prepare-data cifar10 data/cifar10
    python benchmarks/sparse_head.py --data data/cifar10

The rows are runs of benchmarks/small_table.py's recipe, resumed and kept in the same way. SimCLR's loss normalises the
embeddings, and its head ends with a batch norm, so no multiple of the last layer's weight changes the loss.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from measure import machine
from small_table import SHORT, Row, digest, measure, tenth

from ssl_pipeline import checkpoint, config, sparse_head
from ssl_pipeline.pretrain import PretrainConfig, build_method
from ssl_pipeline.run_folder import RunFolder


def sparse(label: str, **options: object) -> Row:
    """SimCLR with these options of head.sparse."""
    narrow = "backbone.arguments={layers: [1, 1, 1, 1], channels: [16, 32, 64, 128]}"
    overrides = [*SHORT, narrow, "seed=0", *(f"head.sparse.{key}={value}" for key, value in options.items())]
    return Row(label, "cifar10/simclr", 0, overrides)


ROWS = [
    sparse("no SparseHead"),
    *(sparse(f"penalty, {w}", weight=w) for w in ("1e-4", "1e-3", "1e-2", "1e-1")),
    *(sparse(f"scale_invariant, {w}", weight=w, mode="scale_invariant") for w in ("1e-3", "1e-2", "1e-1")),
    *(sparse(f"proximal, {w}", weight=w, mode="proximal") for w in ("1e-1", "1")),
    sparse("penalty, 1e-2, cosine from 0", weight="1e-2", schedule="cosine"),
    sparse("penalty of the 64 rows, 1e-2", weight="1e-2", groups="rows"),
    sparse("penalty of all layers, 1e-2", weight="1e-2", where="all"),
    sparse("scale_invariant, adaptive to 25 %", weight="1e-3", mode="scale_invariant", schedule="adaptive", target=0.25,
           gain=0.1),
    sparse("penalty 1e-2, 4 inner steps of 0.5", weight="1e-2", inner_steps=4, inner_lr=0.5),
    sparse("proximal 1e-2, 4 inner steps of 0.5", weight="1e-2", mode="proximal", inner_steps=4, inner_lr=0.5),
]  # fmt: skip


def head(row: Row, run: Path) -> dict[str, float]:
    """Of the last layer's weight: its norms as shares of those at the start, and how sparse its groups are."""
    options = config.validate(PretrainConfig, config.load(row.config, [*row.overrides, "data.root=."]).values)
    method = build_method(options)
    assert method.head.last_layer is not None
    first = method.head.last_layer.weight.detach().clone()
    state = checkpoint.read_newest(RunFolder(run).checkpoints)
    assert state is not None
    method.load_state_dict(state["model"])
    last = method.head.last_layer.weight.detach()
    groups = options.head.sparse.groups
    norms = sparse_head.group_norms(last, groups)
    return {
        "frobenius": (last.norm() / first.norm()).item(),
        "l21": (norms.sum() / sparse_head.l21_norm(first, groups)).item(),
        "hoyer": sparse_head.hoyer_sparsity(norms).item(),
        "inactive": 100 * (1 - sparse_head.active(norms).float().mean().item()),
        "zero": 100 * (norms == 0).float().mean().item(),
    }


def table(done: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "# What the options of SparseHead do",
        "",
        "`python benchmarks/sparse_head.py --data data/cifar10`: SimCLR by the recipe of [small_table.md](small_table.md) with",
        "half the channels (16 to 128), one seed. Norms of the last layer's weight W, (64, 1024), are shares of those at the",
        "start; Hoyer sparsity of its groups is 0 where all have one norm and 1 where one is left; inactive groups have a norm",
        "of at most 1 % of the largest. Numbers after a mode are lambda. Groups are the 1,024 columns but in the row that says",
        "otherwise, and always the last layer's. The loss is without the penalty, and before the inner steps. What each is:",
        "[sparsehead.md](../../docs/sparsehead.md).",
        "",
        "| SparseHead | Frobenius | L2,1 | Hoyer | inactive, % | zero, % | loss | 5-nn | linear | seconds | commit | config |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        found = [r for r in done if (r["label"], r["config"]) == (row.label, digest(row))]
        if found:
            (r,) = found
            lines.append(
                f"| {row.label} | {r['frobenius']:.3f} | {r['l21']:.3f} | {r['hoyer']:.3f} | {r['inactive']:.1f} | "
                f"{r['zero']:.1f} | {r['loss']:.3f} | {r['knn5']:.2f} | {r['linear']:.2f} | {r['seconds']} | {r['commit']} | "
                f"{r['config']} |"
            )
        else:
            lines.append(f"| {row.label} | not run | - | - | - | - | - | - | - | - | - | {digest(row)} |")
    lines += ["", machine(), "Seconds are of pretraining alone, on a machine that did other work at the same time."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path("data/cifar10"), help="laid out by prepare-data (%(default)s)"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/small_table"), help="may be small_table.py's (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "sparse_head.md")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    data = tenth(args.data, args.work / "data")
    record = args.work / "sparse_head.json"
    done = json.loads(record.read_text()) if record.is_file() else []
    for row in ROWS:
        if not any((r["label"], r["config"]) == (row.label, digest(row)) for r in done):
            result = measure(row, data, args.work)
            done.append(result | head(row, Path(result["run"])))
            record.write_text(json.dumps(done, indent=2) + "\n")
        args.output.write_text(table(done))
    print(args.output.read_text())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
