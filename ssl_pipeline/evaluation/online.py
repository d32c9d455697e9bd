"""How good the backbone is while it is trained: a linear probe on detached features, and now and then k-nn and measures
of collapse.

None touches the run: features are detached, the probe has an optimizer of its own, k-nn and measures run the backbone in
evaluation mode and leave its buffers as they were, and nothing draws from torch's generator. A run with them equals one
without, bit for bit.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline import backbone as backbones
from ssl_pipeline import config, distributed, optim
from ssl_pipeline.data.index import Index, read_index
from ssl_pipeline.data.loader import Options as DataOptions
from ssl_pipeline.data.randomness import Purpose, generator
from ssl_pipeline.evaluation import features, knn, measures
from ssl_pipeline.exits import BadInput
from ssl_pipeline.head import ProjectionHead

log = logging.getLogger("ssl_pipeline")


class Options(config.Options):
    """What to measure along the way. Accuracies only where labelled pictures have two classes or more."""

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
    measures_every_epochs: int | None = Field(None, gt=0)
    """Epochs between measures of collapse (`measures.measure`: heldout_representation_*, heldout_embedding_*); None: none."""
    measures_pictures: int = Field(1024, gt=1)
    """Pictures in val/ that are measured, the same ones always, unaugmented; they need no labels."""


class Online(nn.Module):
    """The classifier, and what k-nn and measures look at.

    Args:
        options: what to measure.
        data: where the pictures lie.
        width: of the features.
        architecture: the backbone's options.
        index: the training pictures.
        val: the validation pictures of k-nn, and those of the measures, as `validation_pictures` finds them.
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
        val: tuple[Index | None, Index | None],
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
        self._val, self._held_out = val
        self._knn_every = options.knn_every_epochs if classes > 1 and self._val is not None else None
        self._measures_every = options.measures_every_epochs if self._held_out is not None else None
        if classes < 2 and (options.linear or options.knn_every_epochs):
            what = f"{classes} class" if classes else "no labels"
            log.info("no accuracy is measured while training: the pictures in %s have %s", index.root, what)
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
        """Whether anything is to be measured after `epoch` epochs."""
        return any(every and epoch % every == 0 for every in (self._knn_every, self._measures_every))

    def look(self, epoch: int, backbone: nn.Module, head: ProjectionHead) -> dict[str, float]:
        """What is due after `epoch` epochs, on fixed pictures. All ranks must call it.

        Nothing of a backbone whose features are not finite: a diverged run ends by its own rule, not by this one's.
        """
        found: dict[str, float] = {}
        with _evaluating(backbone, head), torch.compiler.set_stance("force_eager"):  # batches of another size
            if self._knn_every and epoch % self._knn_every == 0:
                found |= self._neighbours(backbone)
            if self._measures_every and epoch % self._measures_every == 0:
                found |= self._measures(backbone, head)
        return found

    def _neighbours(self, backbone: nn.Module) -> dict[str, float]:
        """5-nn top-1 and top-5, in percent."""
        assert self._val is not None
        train, test = (
            features.features_of(backbone, _some(index, count, self.seed), self._source, self.world)
            for index, count in (
                (self.index, self.options.knn_train),
                (self._val, self.options.knn_val),
            )
        )
        if not _finite(train.values, test.values):
            return {}
        found = knn.evaluate(train, test, min(5, self.options.knn_train), [])
        return {f"online_{name}": value for name, value in found.items()}

    def _measures(self, backbone: nn.Module, head: ProjectionHead) -> dict[str, float]:
        """Measures of collapse; the ranks share the forward passes, and the main one, who writes them, does the rest."""
        assert self._held_out is not None
        start = time.monotonic()
        some = _some(self._held_out, self.options.measures_pictures, self.seed)
        both = features.features_of(_Both(backbone, head), some, self._source, self.world).gathered()
        if not _finite(both.values) or not self.world.is_main:
            return {}
        width = backbones.width(backbone)
        z = both.values if self.world.device.type == "mps" else both.values.to(self.world.device)  # has no float64
        found = measures.measure(z[:, :width], z[:, width:])
        log.info("measured %d held-out pictures in %.1f s", len(z), time.monotonic() - start)
        return {f"heldout_{name}": value for name, value in found.items()}

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"model": self.state_dict(), "optimizer": self.optimizer.state_dict()} if self.on else {}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`; from the start where it has none, as after the probe was switched on.

        Raises ValueError, KeyError and the like where it does not fit.
        """
        if not self.on:
            return
        if state:
            self.load_state_dict(state["model"])
            if difference := optim.misfit(self.optimizer, state["optimizer"]):
                raise ValueError(difference)  # optim.load would say that it is the run's optimizer
            optim.load(self.optimizer, state["optimizer"])
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.classifier = nn.Linear(*self._shape)
        self.to(self.world.device)
        self.optimizer = torch.optim.Adam(self.parameters(), self.options.learning_rate, fused=True)


class _Both(nn.Module):
    """Representations and embeddings of pictures side by side, (N, D + K)."""

    def __init__(self, backbone: nn.Module, head: ProjectionHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.num_features = backbones.width(backbone) + head.outputs

    def forward(self, pictures: Tensor) -> Tensor:
        representations = self.backbone(pictures)
        return torch.cat([representations, self.head(representations)], dim=1)


@contextlib.contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    """A context in which modules are in evaluation mode, each part of them being as it was afterwards."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _finite(*values: Tensor) -> bool:
    """Whether the values of all ranks are."""
    here = all(bool(v.isfinite().all()) for v in values)
    return bool(distributed.mean_over_ranks(torch.tensor(float(here))) == 1)


def validation_pictures(options: Options, data: DataOptions) -> tuple[Index | None, Index | None]:
    """What k-nn classifies, and what is measured; None, with a word, where it cannot be: no pretraining ends for it."""
    labelled = held_out = None
    if options.knn_every_epochs is not None:
        try:
            labelled = features.pictures_of(data.root, "val")
        except BadInput as error:
            log.warning("no k-nn while training: %s", error)
    if options.measures_every_epochs is not None:
        try:
            held_out = read_index(data.root / "val")
        except BadInput as error:
            log.warning("no measures while training: %s", error)
    return labelled, held_out


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
