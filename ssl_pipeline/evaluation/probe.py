"""The linear probe of ImageNet: classifiers on a frozen backbone, trained on random crops and flips.

Presets under configs/_evaluation/linear_probe are the methods' own. A grid of rates and weight decays is trained side by
side in one pass: the backbone, which costs nearly all, runs once for all of them.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat

from ssl_pipeline import distributed
from ssl_pipeline.data.randomness import balanced_subset
from ssl_pipeline.evaluation import features, supervised
from ssl_pipeline.exits import BadInput, Stop


class Recipe(supervised.Recipe):
    """The probe's recipe, and the grid."""

    learning_rates: list[PositiveFloat] = []
    """Base rates of the grid; empty: `optim.learning_rate` alone. Scaled with the batch where `optim` says so."""
    weight_decays: list[NonNegativeFloat] = []
    """Of the grid; empty: `optim.weight_decay` alone."""
    choose_on: Literal["held_out", "val"] = "held_out"
    """What chooses among the grid: a part of train that is then not trained on, or val, which the result says."""
    held_out: float = Field(0.02, gt=0, lt=1)
    """Share of each class of train, rounded, at least one picture, that a grid is chosen on."""
    fused: bool = False
    """One matrix product for all classifiers: less time on many, numbers that differ in the last bits."""


def run(source: features.Options, recipe: Recipe, preset: str, parent: Path) -> dict[str, Any]:
    """Top-1 and top-5 on val of the last epoch and of the best one, in percent; its folder is made in `parent`.

    Raises BadInput for what cannot work, Stop with status 75 after a signal.
    """
    world = distributed.start()
    index, val = distributed.in_turn(lambda: (features.pictures(source, "train"), features.pictures(source, "val")))
    network = distributed.together(lambda: features.network(source))
    grid = list(
        itertools.product(
            recipe.learning_rates or [recipe.optim.learning_rate], recipe.weight_decays or [recipe.optim.weight_decay]
        )
    )
    measured = {"val": val}
    train = index
    if len(grid) > 1 and recipe.choose_on == "held_out":
        kept, held = distributed.together(lambda: held_out(index.labels, recipe.held_out, recipe.seed))
        train, measured = index.select(kept), {"held_out": index.select(held), "val": val}
    classes = max(len(index.classes), len(val.classes))
    heads = supervised.classifiers(recipe, network, classes, len(grid), recipe.fused)
    groups = [
        supervised.head_group(head, f"head_{number}", rate, decay)
        for number, (head, (rate, decay)) in enumerate(zip(heads.each, grid, strict=True))
    ]
    facts = supervised.described("linear_probe", recipe, source, network, {"train": index, "val": val})
    own = supervised.folder(parent, "linear_probe", facts)
    module = supervised.Frozen(network.to(world.device), heads)
    history = supervised.fit(module, groups, recipe, train, measured, source, own, facts, synchronise=False)
    if supervised.digest(network) != facts["weights"]:
        raise Stop(
            "the frozen backbone changed while the probe was trained: a defect of this program; no result is written"
        )
    return {**_result(history, grid, recipe), "protocol": "imagenet", "preset": preset, "folder": str(own.path)}


def held_out(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places to train on and places held out, of labels (N,), by class. Raises BadInput where a class has one picture."""
    held = balanced_subset(seed, labels, share)
    kept = np.setdiff1d(np.arange(len(labels)), held)
    if len(np.unique(labels[kept])) < len(np.unique(labels)):
        raise BadInput(
            "a class has too few pictures to hold one out: give one learning rate and one weight decay, or choose on val, "
            "which the result then says"
        )
    return kept, held


def _result(history: supervised.History, grid: list[tuple[float, float]], recipe: Recipe) -> dict[str, Any]:
    last = history[-1]
    chooser = "held_out" if "held_out" in last else "val"
    chosen = max(range(len(grid)), key=lambda head: last[chooser]["top1"][head])
    rows = [row for row in history if "val" in row]
    best = max(rows, key=lambda row: row["val"]["top1"][chosen])
    result: dict[str, Any] = {
        "linear_top1": last["val"]["top1"][chosen],
        "linear_top5": last["val"]["top5"][chosen],
        "best_epoch_top1": best["val"]["top1"][chosen],
        "best_epoch_top5": best["val"]["top5"][chosen],
        "best_epoch": best["epoch"],
        "best_epoch_chosen_on": "val",
        "epochs": recipe.epochs,
        "learning_rate": grid[chosen][0],
        "weight_decay": grid[chosen][1],
    }
    if len(grid) > 1:
        result["chosen_on"] = "held-out part of train" if chooser == "held_out" else "val"
        result["heads"] = [
            {
                "learning_rate": rate,
                "weight_decay": decay,
                **{f"{name}_top1": last[name]["top1"][head] for name in ("held_out", "val") if name in last},
            }
            for head, (rate, decay) in enumerate(grid)
        ]
    return result
