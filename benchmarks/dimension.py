"""The min-max distance ratio (equation 9) by dimension: Lemma 5.7 on random data, and what a sparse head does to it.

    python benchmarks/dimension.py
    python benchmarks/dimension.py --run runs/cifar10_simclr --run runs/cifar10_simclr_sparsehead

Lemma 5.7 says that the ratio of i.i.d. data goes to 0 as the dimension grows, Theorem 5.8 that SparseHead's lambda bounds it
from below. Of each run given, the embeddings of validation pictures are made anew with the k groups of the last layer that
have the largest norms, all others being 0, so that they lie in at most k dimensions.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssl_pipeline import distributed, methods, sparse_head
from ssl_pipeline.data.index import read_index
from ssl_pipeline.evaluation import features, measures
from ssl_pipeline.exits import BadInput
from ssl_pipeline.head import ProjectionHead
from ssl_pipeline.run_folder import RunFolder

DIMENSIONS = [2**power for power in range(1, 13)]


def random_part(dimensions: list[int], samples: int, seeds: int) -> str:
    """Mean and deviation over seeds, and their product with sqrt(d), which levels off."""
    courses = [measures.minmax_course(dimensions, samples, seed) for seed in range(seeds)]
    lines = ["| d | ratio | deviation over seeds | ratio x sqrt(d) |", "|---|---|---|---|"]
    for d in dimensions:
        found = [course[d] for course in courses]
        mean, spread = statistics.mean(found), statistics.stdev(found) if seeds > 1 else 0.0
        lines.append(f"| {d} | {mean:.4g} | {spread:.2g} | {mean * d**0.5:.3g} |")
    return "\n".join(lines)


@torch.no_grad()
def by_groups(head: ProjectionHead, r: Tensor) -> list[tuple[int, float, float]]:
    """Groups of the last layer that are kept, largest norm first; ratio and participation ratio of the embeddings of
    representations r (N, D). The head is left with all of them.
    """
    layer, groups = head.last_layer, head.options.sparse.groups
    if layer is None:
        raise BadInput("the run's head is an identity, without groups: name a run with a linear layer")
    place = next(i for i, part in enumerate(head.layers) if part is layer)
    hidden, weight = head.layers[:place](r), layer.weight.clone()
    norms = sparse_head.group_norms(weight, groups)
    order, active = norms.argsort(descending=True), int(sparse_head.active(norms).sum())
    found = []
    for count in sorted({*(k for k in DIMENSIONS if k < len(norms)), max(active, 1), len(norms)}):
        kept = torch.zeros_like(norms).index_fill(0, order[:count], 1)
        layer.weight.copy_(weight * (kept if groups == "columns" else kept[:, None]))
        z = head.layers[place:](hidden)
        found.append((count, measures.minmax_distance_ratio(z), float(methods.participation_ratio(z.double()))))
    return found


def run_part(run: RunFolder, pictures: int) -> str:
    """A table of one run, on validation pictures that are evenly spaced in their order."""
    world = distributed.start()
    options = features.options(run.path)
    backbone, head, step = features.trained(run)
    index = read_index(options.root / "val")
    index = index.select(np.unique(np.linspace(0, len(index) - 1, min(pictures, len(index))).astype(np.int64)))
    r = features.features_of(backbone.to(world.device), index, options, world).values
    found = by_groups(head, r)
    assert head.last_layer is not None
    sparse = head.options.sparse
    own = measures.head_measures(head.last_layer.weight, sparse.groups)
    lines = [
        f"{run.path.name} at step {step}, lambda {sparse.weight:g} ({sparse.mode}): {own['groups_active']:.0f} of "
        f"{own['groups']:.0f} {sparse.groups} are active, Hoyer sparsity {own['hoyer']:.3f}. Ratio of the representations of "
        f"{len(r)} pictures: {measures.minmax_distance_ratio(r):.3f}.",
        "",
        "| groups kept | ratio of the embeddings | participation ratio |",
        "|---|---|---|",
        *(f"| {count} | {ratio:.3f} | {filled:.2f} |" for count, ratio, filled in found),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, action="append", default=[], help="run folder; may be given again")
    parser.add_argument("--pictures", type=int, default=2000, help="validation pictures of a run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=512, help="random vectors")
    parser.add_argument("--most", type=int, default=DIMENSIONS[-1], help="largest dimension")
    args = parser.parse_args()
    print(random_part([d for d in DIMENSIONS if d <= args.most], args.samples, args.seeds))
    for run in args.run:
        print("", run_part(RunFolder(run), args.pictures), sep="\n")


if __name__ == "__main__":
    main()
