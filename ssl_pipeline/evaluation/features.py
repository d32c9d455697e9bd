"""Features of a frozen backbone: a run's, any file of weights, a named one, or one at random initialisation.

And the embeddings that a run's trained head makes of them.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline import backbone as backbones
from ssl_pipeline import checkpoint, config, distributed
from ssl_pipeline.data import loader
from ssl_pipeline.data.augment import CenterCrop, CropResize, Flip, ViewSpec
from ssl_pipeline.data.index import Index, read_index
from ssl_pipeline.data.loader import Loader
from ssl_pipeline.exits import BadInput, StorageFailure
from ssl_pipeline.head import Options as HeadOptions
from ssl_pipeline.head import ProjectionHead
from ssl_pipeline.run_folder import RunFolder

log = logging.getLogger("ssl_pipeline")


class Options(config.Options):
    """Which backbone sees which pictures."""

    weights: str | None
    """File of the backbone's weights, or a name as timm:resnet50.a1_in1k; None: random initialisation, the one that
    pretraining with `seed` starts from."""
    seed: int = 0
    backbone: backbones.Options
    root: Path
    """Folder with train/<class>/ and val/<class>/, or with tar shards in train/ and val/."""
    name: str | None = None
    """Of the data set."""
    view: ViewSpec
    """The un-augmented view."""
    labelled_view: ViewSpec | None = None
    """The view for training on labels; None: `crop_and_flip(view)`."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Share of unreadable pictures at which an evaluation stops; fewer are left out."""
    batch_size: int = Field(256, gt=0)
    """Pictures at a time, over all ranks; does not matter to the result."""
    memory: float = Field(12.0, ge=0)
    """Gigabytes of features that a rank holds in memory; more lie in a temporary file (TMPDIR), mapped into it."""
    threads: int | None = Field(None, gt=0)
    readers: int = Field(4, gt=0)


def options(source: Path, values: Mapping[str, Any] | None = None, random_init: bool = False) -> Options:
    """Options for a run folder, a file of weights, or a name of weights.

    `values` are those of a pretraining config, from which backbone, data and evaluation view are taken; by default the
    run's own. A file's backbone may also be described by the JSON beside it. Raises BadInput where something is missing.
    """
    run = RunFolder(source)
    weights = str(source)
    named = backbones.named(weights)
    if source.is_dir():
        values = run.read_config() if values is None else values
        weights = str(run.backbone)
        if not random_init and not run.backbone.is_file():
            raise BadInput(f"{source} has no backbone.pth yet: its first checkpoint writes it")
    elif named is None and not source.is_file():
        raise BadInput(f"{str(source)!r} is neither a run folder nor a file of weights")
    if values is None:
        raise BadInput(f"{source} is bare weights: give --config NAME for the data set and its evaluation view")
    described = named or (backbones.options_beside(Path(weights)) if not random_init else None)
    data = config.validate(loader.Options, values.get("data", {}), prefix="data.")
    found = {
        "weights": None if random_init else weights,
        "seed": values.get("seed", 0),
        "backbone": described or config.validate(backbones.Options, values.get("backbone", {}), prefix="backbone."),
        "root": data.root,
        "name": data.name,
        "view": data.evaluation_view,
        "labelled_view": data.labelled_view,
        "max_bad_fraction": data.max_bad_fraction,
        "threads": data.threads,
        "readers": data.readers,
    }
    return config.validate(Options, found)


def network(options: Options) -> nn.Module:
    """The backbone with its weights, on the host, in evaluation mode. Raises BadInput where they do not fit."""
    if options.weights is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            return backbones.build(options.backbone).eval()
    return backbones.load(options.weights, options.backbone).eval()


class Trained(NamedTuple):
    """What a run has trained, on the host, in evaluation mode."""

    backbone: nn.Module
    head: ProjectionHead
    step: int
    """Steps done."""


def trained(run: RunFolder) -> Trained:
    """The backbone and the projection head of a run's newest good checkpoint.

    The backbone is the one that backbone.pth holds. For SSL-HSIC that is the moving average of the online one; of its
    head there is no average, so the online head is taken, as for every method: the one that is trained and that SparseHead
    acts on. All ranks must call it. Raises BadInput where there is no checkpoint, or it does not fit the run's config.
    """
    values = distributed.together(run.read_config)
    state = checkpoint.read_together(run.checkpoints)
    if state is None:
        raise BadInput(
            f"{str(run.path)!r} has no checkpoint, and backbone.pth holds no head: its representation alone can be measured, "
            f"by giving {str(run.backbone)!r}"
        )
    shape = config.validate(backbones.Options, values.get("backbone", {}), prefix="backbone.")
    head_shape = config.validate(HeadOptions, values.get("head", {}), prefix="head.")
    network = backbones.build(shape)
    head = ProjectionHead(head_shape, backbones.width(network))
    model = state["model"]
    evaluated = "average." if any(name.startswith("average.") for name in model) else "backbone."
    try:
        network.load_state_dict(_below(model, evaluated))
        head.layers.load_state_dict(_below(model, "head.layers."))
    except RuntimeError as error:
        raise BadInput(
            f"the checkpoint of step {state['step']} in {run.checkpoints} does not fit {run.config}: "
            f"{' '.join(str(error).split())[:300]}; was one of them replaced?"
        ) from None
    return Trained(network.eval(), head.eval(), state["step"])


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def crop_and_flip(view: ViewSpec) -> ViewSpec:
    """torchvision's RandomResizedCrop and flip in the size, filter and normalisation of an evaluation view."""
    crops = [op for op in view.ops if isinstance(op, CenterCrop)]
    interpolation = crops[0].interpolation if crops else "bilinear"
    crop = CropResize(op="crop_resize", interpolation=interpolation)
    return ViewSpec(size=view.size, ops=[crop, Flip(op="flip"), view.normalize])


def pictures(options: Options, split: str) -> Index:
    """The labelled pictures of `split`. Raises BadInput where they have no labels, and where train and val do not have the
    same classes."""
    return pictures_of(options.root, split)


def pictures_of(root: Path, split: str) -> Index:
    """The labelled pictures of root/split, as `pictures`."""
    index = read_index(root / split)
    if not index.classes:
        raise _unlabelled(root / split)
    for other in ("train", "val"):
        folder = root / other
        if other == split or not folder.is_dir():
            continue
        names = list(read_index(folder).classes)
        if not names:
            raise _unlabelled(folder)
        fewer, more = sorted((names, list(index.classes)), key=len)
        if index.spans is not None and all(name.isdecimal() for name in more):
            more = more[: len(fewer)]  # numbers in shards are labels as they stand: one split may lack the last ones
        if fewer != more:
            raise BadInput(
                f"{str(folder)!r} and {str(root / split)!r} hold different classes, so their labels would not mean "
                "the same: give both the same ones"
            )
    return index


def _unlabelled(folder: Path) -> BadInput:
    return BadInput(
        f"the pictures in {str(folder)!r} have no labels, and this needs them: lay them out as "
        f"{folder.name}/<class>/<picture>, or measure on another data set by --data FOLDER"
    )


@dataclass(frozen=True)
class Features:
    """This rank's share of a split's features: ids r, r + W, ... in this order, without unreadable pictures."""

    values: Tensor
    """(n, D) float32 on the host, perhaps mapped from a file; neither normalised nor projected."""
    labels: Tensor
    """(n,) int64."""
    ids: Tensor
    """(n,) int64, ascending: places in the split's index."""
    classes: int
    """Number of classes of the data set."""

    def gathered(self) -> Features:
        """All ranks' shares on every rank, in the order of the ids. All ranks must call it."""
        if distributed.world_size() == 1:
            return self
        ids = torch.cat(distributed.gather_rows(self.ids))
        order = ids.argsort()
        values = torch.cat(distributed.gather_rows(self.values))[order]
        return Features(values, torch.cat(distributed.gather_rows(self.labels))[order], ids[order], self.classes)

    def select(self, rows: Tensor) -> Features:
        """Some of the rows."""
        return Features(self.values[rows], self.labels[rows], self.ids[rows], self.classes)


def extract(options: Options, split: str) -> Features:
    """This rank's features of the readable pictures of `split`. All ranks must call it."""
    return extract_each(options, (split,))[0]


def extract_each(options: Options, splits: Sequence[str] = ("train", "val")) -> list[Features]:
    """`extract` of each of `splits`, by one network."""
    world = distributed.start()
    indexes = distributed.in_turn(lambda: [pictures(options, split) for split in splits])
    model = distributed.together(lambda: network(options))
    model = model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return [features_of(model, index, options, world) for index in indexes]


def features_of(model: nn.Module, index: Index, options: Options, world: distributed.World) -> Features:
    """This rank's features of the readable pictures of `index`, by a model in evaluation mode on the rank's device.

    Raises BadInput, on all ranks alike, where too many cannot be read.
    """
    count = len(range(world.rank, len(index), world.size))
    width = backbones.width(model)
    values = distributed.together(lambda: room(count, width, options.memory))
    labels = torch.empty(count, dtype=torch.int64)
    ids = torch.empty(count, dtype=torch.int64)
    filled = 0
    for part in stream(model, None, index, options, world):
        rows = slice(filled, filled + len(part.ids))
        values[rows], labels[rows], ids[rows] = part.r.cpu(), part.labels, part.ids
        filled += len(part.ids)
    return Features(values[:filled], labels[:filled], ids[:filled], len(index.classes))


class Part(NamedTuple):
    """Some n of the pictures of this rank."""

    r: Tensor
    """Representations (n, D), float32, on the rank's device."""
    z: Tensor | None
    """Embeddings (n, K), float32, on the rank's device; None without a head."""
    labels: Tensor
    """(n,) int64, on the host; -1: none."""
    ids: Tensor
    """(n,) int64, on the host: places in the index."""


@torch.no_grad()
def stream(
    backbone: nn.Module, head: nn.Module | None, index: Index, options: Options, world: distributed.World
) -> Iterator[Part]:
    """The readable pictures of `index` that are this rank's, r, r + W, ... in this order, some at a time.

    Backbone and head are in evaluation mode on the rank's device; pictures are not augmented. All ranks must go through
    to the end. There it raises BadInput, on all ranks alike, where too many cannot be read.
    """
    data = Loader(
        index,
        [options.view],
        max(options.batch_size // world.size, 1) * world.size,
        seed=0,
        world=world,
        threads=options.threads,
        readers=options.readers,
        training=False,
    )
    for step, batch in enumerate(data):
        wanted = data.ids(0, step)
        itself = torch.from_numpy(batch.ids == wanted)  # false where another stands in for an unreadable one
        r = backbone(batch.views[0].contiguous(memory_format=torch.channels_last)).float()[itself.to(world.device)]
        yield Part(
            r, head(r).float() if head is not None else None, batch.labels.cpu()[itself],
            torch.from_numpy(wanted)[itself],
        )  # fmt: skip
    data.close()
    data.require_readable(options.max_bad_fraction)
    bad = len(data.all_bad())
    if bad and world.is_main:
        log.warning("%s is measured without %d of %d pictures", index.root, bad, len(index))


def room(rows: int, columns: int, gigabytes: float) -> Tensor:
    """An empty (rows, columns) float32 tensor in memory, or in a temporary file where that would be more."""
    if rows * columns * 4 <= gigabytes * 1e9:
        return torch.empty(rows, columns)
    with tempfile.TemporaryFile(prefix="features-") as file:  # the mapping outlives the name
        try:
            os.posix_fallocate(file.fileno(), 0, rows * columns * 4)  # a full disk would kill the process later
        except OSError as error:
            raise StorageFailure(
                f"no room for {rows * columns * 4 / 1e9:.1f} GB of features in {tempfile.gettempdir()}: {error.strerror}; set "
                "TMPDIR to a folder with room, or start more ranks"
            ) from None
        return torch.from_numpy(np.memmap(file, dtype=np.float32, mode="r+", shape=(rows, columns)))  # type: ignore[call-overload]
