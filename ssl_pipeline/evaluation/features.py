"""Features of a frozen backbone: a run's, any file with torchvision's names, or one at random initialisation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline import backbone as backbones
from ssl_pipeline import config, distributed
from ssl_pipeline.data import loader
from ssl_pipeline.data.augment import ViewSpec
from ssl_pipeline.data.index import class_names, image_folder
from ssl_pipeline.data.loader import Loader
from ssl_pipeline.exits import BadInput
from ssl_pipeline.run_folder import RunFolder

log = logging.getLogger("ssl_pipeline")


class Options(config.Options):
    """Which backbone sees which pictures."""

    weights: Path | None
    """File of the backbone's weights; None: random initialisation, the one that pretraining with `seed` starts from."""
    seed: int = 0
    backbone: backbones.Options
    root: Path
    """Folder with train/<class>/ and val/<class>/."""
    view: ViewSpec
    """The un-augmented view."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Share of unreadable pictures at which an evaluation stops; fewer are left out."""
    batch_size: int = Field(256, gt=0)
    threads: int | None = Field(None, gt=0)
    readers: int = Field(4, gt=0)


def options(source: Path, values: Mapping[str, Any] | None = None, random_init: bool = False) -> Options:
    """Options for a run folder or a file of weights.

    `values` are those of a pretraining config, from which backbone, data and evaluation view are taken; by default the
    run's own. A file's backbone may also be described by the JSON beside it. Raises BadInput where something is missing.
    """
    run = RunFolder(source)
    weights = source
    if source.is_dir():
        values = run.read_config() if values is None else values
        weights = run.backbone
        if not random_init and not weights.is_file():
            raise BadInput(f"{source} has no backbone.pth yet: its first checkpoint writes it")
    elif not source.is_file():
        raise BadInput(f"{str(source)!r} is neither a run folder nor a file of weights")
    if values is None:
        raise BadInput(f"{source} is a bare file of weights: give --config NAME for its data set and evaluation view")
    described = backbones.options_beside(weights) if not random_init else None
    data = config.validate(loader.Options, values.get("data", {}), prefix="data.")
    return Options(
        weights=None if random_init else weights,
        seed=int(values.get("seed", 0)),
        backbone=described or config.validate(backbones.Options, values.get("backbone", {}), prefix="backbone."),
        root=data.root,
        view=data.evaluation_view,
        max_bad_fraction=data.max_bad_fraction,
        threads=data.threads,
        readers=data.readers,
    )


@torch.no_grad()
def extract(options: Options, split: str) -> tuple[Tensor, Tensor]:
    """Features (N, D) float32 of all readable pictures of `split`, in the order of their ids, and labels (N,); on the host.

    The backbone is in evaluation mode; features are neither normalised nor projected.
    """
    world = distributed.start()
    index = image_folder(options.root / split)
    for other in ("train", "val"):
        if (options.root / other).is_dir() and class_names(options.root / other) != list(index.classes):
            raise BadInput(
                f"{str(options.root / other)!r} and {str(options.root / split)!r} hold different class folders, so their "
                "labels would not mean the same: give both the same ones"
            )
    if options.weights is None:
        torch.manual_seed(options.seed)
        network = backbones.build(options.backbone)
    else:
        network = backbones.load(options.weights, options.backbone)
    network = network.to(world.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    pictures = Loader(
        index,
        [options.view],
        options.batch_size,
        seed=0,
        world=distributed.World(0, 1, 0, 1, world.device),
        threads=options.threads,
        readers=options.readers,
        training=False,
    )
    features, labels = [], []
    for step, batch in enumerate(pictures):
        itself = torch.from_numpy(
            batch.ids == pictures.ids(0, step)
        )  # false where another stands in for an unreadable one
        found = network(batch.views[0].contiguous(memory_format=torch.channels_last)).float().cpu()
        features.append(found[itself])
        labels.append(batch.labels.cpu()[itself])
    if len(pictures.bad) > options.max_bad_fraction * len(index):
        raise BadInput(
            f"of {len(index)} pictures in {str(options.root / split)!r} more than data.max_bad_fraction = "
            f"{options.max_bad_fraction} cannot be read: mend them or raise it; {pictures.bad_summary()}"
        )
    if pictures.bad:
        log.warning("%s is measured without %d of %d pictures", options.root / split, len(pictures.bad), len(index))
    return torch.cat(features), torch.cat(labels)
