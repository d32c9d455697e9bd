"""Fine-tuning on a few labels: 1 % and 10 % of ImageNet by SimCLR's lists, of other data sets by a keyed choice.

Presets under configs/_evaluation/semi_supervised are the methods' own; Barlow Twins' serves every method by default, as in
the paper ("following [59]").
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, PositiveFloat

from ssl_pipeline import config, distributed
from ssl_pipeline.data.index import Index
from ssl_pipeline.data.listing import cache_folder
from ssl_pipeline.data.randomness import balanced_subset
from ssl_pipeline.evaluation import features, supervised
from ssl_pipeline.evaluation.probe import held_out
from ssl_pipeline.exits import BadInput, Status, Stop

log = logging.getLogger("ssl_pipeline")

LISTS = {
    1: ("1percent.txt", "b61c91b8ddb75fabdb02a9bb2ae3bd74", 12_811),
    10: ("10percent.txt", "b0d861160cc9531910d069ff547fc1b6", 128_116),
}
"""google-research/simclr imagenet_subsets: name, md5 and lines of each list."""


class Recipe(supervised.Recipe):
    """How to fine-tune; `optim.learning_rate` is the classifier's rate."""

    backbone_rate: float = Field(gt=0)
    """Base rate of the backbone."""
    synchronise_batch_norm: bool = False
    """Whether batch norm sees the batch of all ranks. Barlow Twins' does not: its statistics are of 256 / 8 pictures."""
    backbone_rates: list[PositiveFloat] = []
    """Of a sweep; empty: a half, one and two times `backbone_rate`."""
    head_rates: list[PositiveFloat] = []
    """Of a sweep; empty: a half, one and two times `optim.learning_rate`."""
    choose_on: Literal["held_out", "val"] = "held_out"
    """What chooses among a sweep: a part of the labelled pictures, after which all of them are trained on at the chosen
    rates; or val, which the result says."""
    held_out: float = Field(0.2, gt=0, lt=1)
    """Share of each class of the labelled pictures that a sweep is chosen on."""


class Options(config.Options):
    """Which part of train keeps its labels."""

    features: features.Options
    percent: float = Field(gt=0, le=100)
    list_path: Path | None = None
    """A file with a picture's name a line. None: for ImageNet, SimCLR's list in `cache()`; else a keyed choice."""
    sweep: bool = False


def names() -> list[str]:
    """Names of SimCLR's lists."""
    return [name for name, _, _ in LISTS.values()]


def cache() -> Path:
    """Where lists are looked for: $SSL_PIPELINE_CACHE, else ssl_pipeline in the user's cache folder."""
    return cache_folder()


def subset(options: Options, seed: int, index: Index) -> tuple[np.ndarray, str]:
    """Ids, ascending, of the pictures that keep their labels, and where the choice comes from.

    Without a list the choice is class-balanced and keyed by `seed`.

    Raises BadInput where the list is missing, is not the known one, or names pictures that are not there.
    """
    path = options.list_path or known_list(options.features.name, options.percent)
    if path is None:
        chosen = balanced_subset(seed, index.labels, options.percent / 100)
        return chosen, f"class-balanced choice of seed {seed}"
    if not path.is_file():
        raise BadInput(f"no list {str(path)!r} of labelled pictures: give the path of a text file with one name a line")
    text = path.read_bytes()
    md5 = hashlib.md5(text, usedforsecurity=False).hexdigest()
    names = [line.strip() for line in text.decode(errors="replace").splitlines() if line.strip()]
    known = LISTS.get(options.percent)  # type: ignore[call-overload]
    official = known is not None and md5 == known[1]
    if options.list_path is None and not official:
        raise BadInput(
            f"{str(path)!r} is not SimCLR's list (md5 {md5}, {len(names)} lines): {_how_to_get(int(options.percent))}"
        )
    if not official:
        log.warning("%s is a list of your own (md5 %s, %d lines), not SimCLR's", path, md5, len(names))
    places: dict[str, list[int]] = {}
    for place, picture in enumerate(index.paths):
        places.setdefault(picture, []).append(place)
        if "/" in picture:
            places.setdefault(picture.rpartition("/")[2], []).append(place)
    missing = [name for name in names if name not in places]
    if missing or not names:
        raise BadInput(
            f"{len(missing)} of the {len(names)} pictures of {str(path)!r} are not in {str(index.root)!r}, as "
            f"{', '.join(missing[:3]) or 'none at all'}: give a list of names relative to it, as {index.paths[0]}"
        )
    several = [name for name in names if len(places[name]) > 1]
    if several:
        raise BadInput(
            f"{str(path)!r} names {several[0]!r}, which {len(places[several[0]])} pictures are called: name each as "
            f"{index.paths[places[several[0]][0]]!r}"
        )
    chosen = np.unique([places[name][0] for name in names])
    if len(np.unique(index.labels[chosen])) < len(index.classes):
        log.warning(
            "%s names pictures of %d classes of %d", path, len(np.unique(index.labels[chosen])), len(index.classes)
        )
    return chosen, f"google-research/simclr {known[0]}" if official and known else f"{path.name}, md5 {md5}"


def known_list(data: str | None, percent: float) -> Path | None:
    """The cached list for ImageNet, None for other data sets. Raises BadInput where it is not there."""
    if data != "imagenet":
        return None
    if percent not in LISTS:
        raise BadInput(f"--percent {percent:g}: ImageNet's lists are of 1 and 10 percent; give another by --list")
    path = cache() / LISTS[int(percent)][0]
    if not path.is_file():
        raise BadInput(f"no list of ImageNet's {percent:g} %: {_how_to_get(int(percent))}")
    return path


def _how_to_get(percent: int) -> str:
    name, md5, _ = LISTS[percent]
    return (
        f"take imagenet_subsets/{name} of github.com/google-research/simclr (md5 {md5}) and put it at {cache() / name}, or "
        "give it by --list; jobs fetch nothing"
    )


def run(options: Options, recipe: Recipe, preset: str, parent: Path) -> tuple[dict[str, Any], list[str]]:
    """(top-1 and top-5 on val of the last and of the best epoch, in percent; the names of the labelled pictures).

    Its folder, or one a point of the sweep, is made in `parent`. Raises BadInput for what cannot work, Stop with status
    75 after a signal.
    """
    source = options.features
    distributed.start()
    index, val, (chosen, origin) = distributed.in_turn(
        lambda: (
            index := features.pictures(source, "train"),
            features.pictures(source, "val"),
            subset(options, recipe.seed, index),
        )
    )
    labelled = index.select(chosen)
    result: dict[str, Any] = {
        "percent": options.percent,
        "labelled_pictures": len(labelled),
        "labelled_percent": 100 * len(labelled) / len(index),
        "batch_size": min(recipe.batch_size, len(labelled)),
        "labelled_by": origin,
        "preset": preset,
        "epochs": recipe.epochs,
    }
    rates = (recipe.backbone_rate, recipe.optim.learning_rate)
    if options.sweep:
        rates, points = _sweep(options, recipe, labelled, val, parent)
        result |= {"chosen_on": "held-out part of the labelled pictures" if recipe.choose_on == "held_out" else "val"}
        result["sweep"] = points
    history, own = _fine_tune(options, recipe, rates, labelled, {"val": val}, parent)
    rows = [row for row in history if "val" in row]
    best = max(rows, key=lambda row: row["val"]["top1"][0])
    result |= {
        "semi_top1": rows[-1]["val"]["top1"][0],
        "semi_top5": rows[-1]["val"]["top5"][0],
        "best_epoch_top1": best["val"]["top1"][0],
        "best_epoch_top5": best["val"]["top5"][0],
        "best_epoch": best["epoch"],
        "best_epoch_chosen_on": "val",
        "backbone_rate": rates[0],
        "learning_rate": rates[1],
        "folder": own,
    }
    return result, list(labelled.paths)


def _sweep(
    options: Options, recipe: Recipe, labelled: Index, val: Index, parent: Path
) -> tuple[tuple[float, float], list[dict[str, float]]]:
    """The best (backbone rate, classifier rate), and what each point of the sweep reached."""
    train, measured, name = labelled, {"val": val}, "val"
    if recipe.choose_on == "held_out":
        kept, held = distributed.together(lambda: held_out(labelled.labels, recipe.held_out, recipe.seed))
        train, measured, name = labelled.select(kept), {"held_out": labelled.select(held)}, "held_out"
    factors = (0.5, 1.0, 2.0)
    backbone_rates = recipe.backbone_rates or [recipe.backbone_rate * factor for factor in factors]
    head_rates = recipe.head_rates or [recipe.optim.learning_rate * factor for factor in factors]
    points = []
    for rates in itertools.product(backbone_rates, head_rates):
        try:
            history, _ = _fine_tune(options, recipe, rates, train, measured, parent)
            top1 = history[-1][name]["top1"][0]
        except Stop as stop:
            if stop.status != Status.NON_FINITE:
                raise
            log.warning("rates %g and %g diverge", *rates)
            top1 = 0.0
        points.append({"backbone_rate": rates[0], "learning_rate": rates[1], f"{name}_top1": top1})
    best = max(points, key=lambda point: point[f"{name}_top1"])
    return (best["backbone_rate"], best["learning_rate"]), points


def _fine_tune(
    options: Options, recipe: Recipe, rates: tuple[float, float], train: Index, measured: dict[str, Index], parent: Path
) -> tuple[supervised.History, str]:
    source = options.features
    network = distributed.together(lambda: features.network(source))
    classes = max(len(index.classes) for index in (train, *measured.values()))
    heads = supervised.classifiers(recipe, network, classes)
    decay = recipe.optim.weight_decay
    groups = [
        {"params": list(network.parameters()), "name": "backbone", "rate": rates[0], "weight_decay": decay},
        supervised.head_group(heads, "head", rates[1], decay),
    ]
    sets = {"train": train, **measured}
    facts = supervised.described("semi_supervised", recipe, source, network, sets, rates=list(rates))
    own = supervised.folder(parent, f"semi_supervised_{options.percent:g}percent", facts)
    module = supervised.Whole(network, heads)
    synchronise = recipe.synchronise_batch_norm
    history = supervised.fit(module, groups, recipe, train, measured, source, own, facts, synchronise=synchronise)
    return history, str(own.path)
