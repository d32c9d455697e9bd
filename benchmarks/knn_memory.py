"""Peak memory and time of the k-nn evaluation on features of ImageNet's size, which are random.

    python benchmarks/knn_memory.py                 # 10.5 GB of features in a temporary file (TMPDIR), mapped
    python benchmarks/knn_memory.py --where memory
    torchrun --nproc-per-node 2 benchmarks/knn_memory.py

Features are normal numbers about 10, so that what is measured is the work and not the accuracy. Resident memory counts the
pages of a mapped file too; the system may take these back.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time

import numpy as np
import torch
from measure import machine

from ssl_pipeline import distributed
from ssl_pipeline.evaluation import knn
from ssl_pipeline.evaluation.features import Features

IMAGENET = 1_281_167
CLASSES = 1000


def make(rows: int, columns: int, where: str, seed: int) -> Features:
    """This rank's share of random features."""
    world = distributed.start()
    ids = torch.arange(world.rank, rows, world.size)
    if where == "file":
        with tempfile.TemporaryFile(prefix="knn-memory-") as file:  # the mapping outlives the name
            values = torch.from_numpy(np.memmap(file, dtype=np.float32, mode="w+", shape=(len(ids), columns)))
    else:
        values = torch.empty(len(ids), columns)
    generator = torch.Generator().manual_seed(seed * world.size + world.rank)
    for part in values.split(4096):
        part.normal_(10, generator=generator)
    return Features(values, torch.randint(CLASSES, (len(ids),), generator=generator), ids, CLASSES)


def peak() -> float:
    """The greatest resident memory of this process until now, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--where", choices=["file", "memory"], default="file")
    parser.add_argument("--train", type=int, default=IMAGENET)
    parser.add_argument("--test", type=int, default=256)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument(
        "--cosine-k", type=int, nargs="*", default=[10, 20, 100, 200], help="none: the majority vote alone"
    )
    args = parser.parse_args()
    world = distributed.start()
    began = time.monotonic()
    train = make(args.train, args.columns, args.where, seed=0)
    test = make(args.test, args.columns, "memory", seed=1)  # of all ranks together
    print(
        f"rank {world.rank} of {world.size}: train {tuple(train.values.shape)} float32, "
        f"{train.values.nbytes / 1e9:.2f} GB in {args.where}, made in {time.monotonic() - began:.0f} s; "
        f"peak resident memory so far {peak():.2f} GB",
        flush=True,
    )
    began = time.monotonic()
    result = knn.evaluate(train, test, args.k, args.cosine_k)
    print(
        f"rank {world.rank}: majority vote of {args.k}, cosine votes of {args.cosine_k}, for {args.test} rows: "
        f"{time.monotonic() - began:.0f} s; peak resident memory {peak():.2f} GB",
        flush=True,
    )
    if world.is_main:
        print({key: round(value, 2) for key, value in result.items()})
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
        print(f"{memory:.1f} GB of memory, {machine()}")
    distributed.stop()


if __name__ == "__main__":
    main()
