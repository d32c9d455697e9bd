"""How good the backbone is while it is trained: a linear probe on detached features, and now and then k-nn.

Neither touches the run: features are detached, the probe has an optimizer of its own, k-nn runs the backbone in evaluation
mode and leaves its buffers as they were, and nothing draws from torch's generator. A run with them equals one without, bit
for bit.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline import backbone as backbones
from ssl_pipeline import config, distributed, optim
from ssl_pipeline.data.index import Index
from ssl_pipeline.data.loader import Options as DataOptions
from ssl_pipeline.data.randomness import Purpose, generator
from ssl_pipeline.evaluation import features, knn
from ssl_pipeline.exits import BadInput

log = logging.getLogger("ssl_pipeline")


class Options(config.Options):
    """What to measure along the way, on labelled pictures; nothing where these have fewer than two classes."""

    linear: bool = True
    """A linear classifier on the first view's features: online_top1, online_top5 and online_loss of each logged step."""
    learning_rate: float = Field(1e-3, gt=0)
    """Of the classifier's Adam, constant: features of any scale are met."""
    knn_every_epochs: int | None = Field(None, gt=0)
    """Epochs between 5-nn measurements (online_knn5_top1); None: none."""
    knn_train: int = Field(10_000, gt=0)
    """Training pictures searched, the same ones always."""
    knn_val: int = Field(5_000, gt=0)
    """Validation pictures classified, the same ones always."""


class Online(nn.Module):
    """The classifier, and what k-nn looks at.

    Args:
        options: what to measure.
        data: where the pictures lie.
        width: of the features.
        architecture: the backbone's options.
        index: the training pictures.
        val: the validation pictures, as `validation_pictures` finds them.
        seed: key of the classifier's weights and of the subsets.
        world: this process's place.
    """

    def __init__(
        self,
        options: Options,
        data: DataOptions,
        width: int,
        architecture: backbones.Options,
        index: Index,
        val: Index | None,
        seed: int,
        world: distributed.World,
    ) -> None:
        super().__init__()
        self.options, self.world, self.seed = options, world, seed
        classes = len(index.classes)
        labelled = np.flatnonzero(index.labels >= 0)
        self.partly = len(labelled) < len(index)
        self.index = index.select(labelled) if self.partly else index
        self.on = options.linear and classes > 1
        self.every = options.knn_every_epochs if classes > 1 and val is not None else None
        if classes < 2 and (options.linear or options.knn_every_epochs):
            what = f"{classes} class" if classes else "no labels"
            log.info("nothing is evaluated while training: the pictures in %s have %s", index.root, what)
        self._val = val
        self._source = features.Options(
            weights=None, backbone=architecture, root=data.root, view=data.evaluation_view,
            max_bad_fraction=1.0, threads=data.threads, readers=data.readers,
        )  # fmt: skip
        self._shape = width, classes
        self.optimizer: torch.optim.Optimizer
        self.load({})

    def step(self, representations: Tensor, labels: Tensor, finite: Tensor) -> dict[str, Tensor]:
        """Train the classifier on features (N, D) and labels (N,) of this rank; top-1, top-5 (percent) and loss before.

        Pictures without a label (-1) do not count: all values are means over the labelled pictures of all ranks.
        Like the run's own update it is left out where `finite`, a boolean on the device, is false. No host sync.
        """
        if not self.on:
            return {}
        counted: Tensor | int = len(labels)
        if self.partly:  # the mean over ranks, since ranks have different numbers of them; 1 in a step without any
            counted = distributed.mean_over_ranks((labels >= 0).sum().float()).clamp(min=1 / self.world.size)
        with torch.autocast(representations.device.type, enabled=False), torch.enable_grad():
            logits = self.classifier(representations.detach().float())
            loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / counted
            gradients = torch.autograd.grad(loss, list(self.parameters()))
        for p, gradient in zip(self.parameters(), gradients, strict=True):
            p.grad = distributed.mean_over_ranks(gradient) if self.world.size > 1 else gradient
        self.optimizer.grad_scale, self.optimizer.found_inf = None, (~finite).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        return {
            "online_loss": loss.detach(),
            "online_top1": 100 * right[:, 0].float().sum() / counted,
            "online_top5": 100 * right.any(dim=1).float().sum() / counted,
        }

    def due(self, epoch: int) -> bool:
        """Whether k-nn is to be measured after `epoch` epochs."""
        return self.every is not None and epoch % self.every == 0

    def neighbours(self, backbone: nn.Module) -> dict[str, float]:
        """5-nn top-1 and top-5, in percent, on the fixed subsets. All ranks must call it."""
        assert self._val is not None
        modes = [(module, module.training) for module in backbone.modules()]
        backbone.eval()
        try:
            train, test = (
                features.features_of(backbone, _some(index, count, self.seed), self._source, self.world)
                for index, count in (
                    (self.index, self.options.knn_train),
                    (self._val, self.options.knn_val),
                )
            )
        finally:
            for module, mode in modes:
                module.training = mode
        finite = (train.values.isfinite().all() & test.values.isfinite().all()).float()
        if distributed.mean_over_ranks(finite) < 1:
            return {}  # a diverged run ends by its own rule, not by this one's
        found = knn.evaluate(train, test, min(5, self.options.knn_train), [])
        return {f"online_{name}": value for name, value in found.items()}

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"model": self.state_dict(), "optimizer": self.optimizer.state_dict()} if self.on else {}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`; from the start where it has none, as after the probe was switched on."""
        if not self.on:
            return
        if state:
            self.load_state_dict(state["model"])
            optim.load(self.optimizer, state["optimizer"])
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.classifier = nn.Linear(*self._shape)
        self.to(self.world.device)
        self.optimizer = torch.optim.Adam(self.parameters(), self.options.learning_rate, fused=True)


def validation_pictures(options: Options, data: DataOptions) -> Index | None:
    """What k-nn classifies; None, with a warning, where it cannot: no pretraining ends for it."""
    if options.knn_every_epochs is None:
        return None
    try:
        return features.pictures_of(data.root, "val")
    except BadInput as error:
        log.warning("no k-nn while training: %s", error)
        return None


def tell_of_missing_val(root: Path, index: Index) -> None:
    """Say at the start of a run on labelled pictures that no evaluation of it will find its own."""
    if index.classes and not (root / "val").is_dir():
        test = f", and {str(root / 'test')!r} is there: name it val, or lay a link" if (root / "test").is_dir() else ""
        log.info("no folder %r%s; without it evaluations need --data FOLDER", str(root / "val"), test)


def _some(index: Index, count: int, seed: int) -> Index:
    """The same `count` pictures always, in the order of their ids."""
    if count >= len(index):
        return index
    return index.select(np.sort(generator(seed, Purpose.SUBSET, 2**63).permutation(len(index))[:count]))
