"""SwAV (Caron et al. 2020, arXiv 2006.09882). Reference code: facebookresearch/swav main_swav.py, src/resnet50.py."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline import config, distributed, methods
from ssl_pipeline.exits import BadInput
from ssl_pipeline.head import Options as HeadOptions
from ssl_pipeline.head import ProjectionHead
from ssl_pipeline.methods import Objective, Progress, ViewNeeds, full_precision, upcast

ASSIGNING = 2
"""Views whose assignments all others predict: the first two, of full size (section 3.2)."""


class Options(config.Options):
    name: Literal["swav"]
    prototypes: int = Field(3000, gt=1)
    """K, the number of prototypes, which are no part of the head: SparseHead leaves them alone."""
    temperature: float = Field(0.1, gt=0)
    """tau of equation 2."""
    epsilon: float = Field(0.05, ge=0.025)
    """Smoothness of the assignments (equation 3). Below 0.025 fp32 cannot hold exp(-2 / epsilon)."""
    sinkhorn_iterations: int = Field(3, gt=0)
    queue_length: int = Field(0, ge=0)
    """Embeddings of earlier batches, a view, of all ranks together, that are assigned along with the batch; for batches
    that are small beside the number of prototypes (3840 at 256 in the official code). A multiple of the batch size.
    0: no queue."""
    queue_start_epoch: int = Field(15, ge=0)
    """Epoch, from 0, in which the queue begins to fill."""
    freeze_prototypes_steps: int = Field(313, ge=0)
    """Steps at the start in which the prototypes stay as they were drawn: an epoch in the official code (313 steps of
    4096 pictures, 5005 of 256)."""


def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Assignments (..., N, K) of N rows a rank to K prototypes, every prototype with the same share of all ranks' rows.

    Sinkhorn and Knopp's iterations on exp(scores / epsilon) (section 3.1, equation 3), no gradient; each row sums to 1.
    Scores are cosines. Ranks may hold any part of the rows, in any order: a row's assignment depends on the set of all rows
    alone.
    Equals facebookresearch/swav main_swav.py:distributed_sinkhorn, whose constant factors the last division undoes.
    """
    with torch.no_grad():
        shares = ((scores - 1) / epsilon).exp_()  # 1: the largest there can be, so that no exponential is too large
        for _ in range(iterations):
            shares /= distributed.global_sum(shares.sum(dim=-2, keepdim=True))
            shares /= shares.sum(dim=-1, keepdim=True)
        return shares


def swav_loss(scores: Tensor, assignments: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the assignments of A views and the predictions of all others (equations 1 and 2), as a mean.

    Args:
        scores: (V, N, K), cosines of V views' embeddings and the prototypes.
        assignments: (A, N, K) of the first A views, constant.
        temperature: tau.

    The mean over this rank's rows, over the V - 1 other views, over the A views. The mean over ranks is the loss of the
    global batch.
    """
    views, rows, _ = scores.shape
    of_others = assignments.sum(dim=0).repeat(views, 1, 1)
    of_others[: len(assignments)] -= assignments
    cross_entropies = -(of_others * F.log_softmax(scores / temperature, dim=-1)).sum()
    return cross_entropies / (len(assignments) * (views - 1) * rows)


class Method(methods.Method):
    """Each view predicts which prototypes the two views of full size are assigned to; the others may be smaller.

    Consecutive views of one size go through the backbone as one batch, so batch norm sees each size by itself; the head
    sees all views at once. The prototypes have unit length before every forward pass: they are put back onto the sphere,
    without gradient, at the start and after every update.

    The queue is a buffer with the entries of all ranks, newest batch first, the same on every rank; each rank computes
    the scores of its own part. So it is whole in the checkpoint, may be gone on with on another number of ranks, and holds
    the same set of embeddings, hence gives the same assignments, on any number of ranks; the order within a batch alone
    differs. A step that is skipped while it fills leaves a batch of zeros in use for one step: zeros lie as near to one
    prototype as to another, and Sinkhorn spreads them evenly.

    Where it fails all embeddings lie alike to all prototypes: the loss stays at ln K, and `loss_over_ln_k` at 1.
    """

    queue: Tensor

    def __init__(self, options: Options, backbone: nn.Module, head: ProjectionHead) -> None:
        super().__init__(options, backbone, head)
        self.prototypes = nn.Linear(head.outputs, options.prototypes, bias=False)
        self._normalise_prototypes()
        if options.queue_length:
            self.register_buffer("queue", torch.zeros(ASSIGNING, options.queue_length, head.outputs))

    @staticmethod
    def views(options: Options) -> ViewNeeds:
        return ViewNeeds(least=ASSIGNING, most=None, one_size=False, largest_first=ASSIGNING)

    @staticmethod
    def check(options: Options, head: HeadOptions, batch_size: int) -> None:
        length = options.queue_length
        if length % batch_size:
            below, above = length // batch_size * batch_size, -(-length // batch_size) * batch_size
            raise BadInput(
                f"method.queue_length = {length} is no multiple of data.batch_size = {batch_size}: take "
                f"{below or 'no queue, 0,'} or {above}"
            )

    def represent(self, views: list[Tensor]) -> list[Tensor]:
        groups = [list(group) for _, group in itertools.groupby(views, key=lambda view: view.shape[1:])]
        return [part for group in groups for part in self.backbone(torch.cat(group)).chunk(len(group))]

    def objective(self, features: list[Tensor], targets: list[Tensor]) -> Objective:
        z = self.head(torch.cat(features))
        rows = len(features[0])
        with full_precision(z):
            embeddings = F.normalize(upcast(z), dim=1)
            scores = self.prototypes(embeddings).unflatten(0, (len(features), rows))
            assignments = self._assign(embeddings[: ASSIGNING * rows].detach(), scores[:ASSIGNING].detach())
            loss = swav_loss(scores, assignments, self.options.temperature)
        ratio = loss.detach() / math.log(self.options.prototypes)
        return Objective(loss, z[:rows], {"loss_over_ln_k": ratio})

    @torch.no_grad()
    def _assign(self, embeddings: Tensor, scores: Tensor) -> Tensor:
        """Assignments (A, N, K) of a batch's embeddings (A N, C), among those of the queue where it is full."""
        rows = scores.shape[1]
        batch = rows * distributed.world_size()
        length = self.options.queue_length
        # How full it is follows from the steps: asking the queue itself would be a wait for the device.
        start = self.options.queue_start_epoch * (self.progress.steps // self.progress.epochs)
        filling = length > 0 and self.progress.step >= start
        everything = scores
        if filling and (self.progress.step - start) * batch >= length:
            mine = self.queue.chunk(distributed.world_size(), dim=1)[distributed.rank()]
            everything = torch.cat([self.prototypes(mine), scores], dim=1)
        if filling:
            newest = distributed.gather(embeddings.unflatten(0, (ASSIGNING, rows)).transpose(0, 1)).transpose(0, 1)
            self.queue.copy_(torch.cat([newest, self.queue], dim=1)[:, :length])
        return sinkhorn(everything, self.options.epsilon, self.options.sinkhorn_iterations)[:, -rows:]

    def before_update(self, progress: Progress) -> None:
        if self._resting(progress):
            self.prototypes.weight.grad = None  # not zeros: momentum and weight decay rest too

    def after_update(self, progress: Progress, learning_rates: dict[str, float], finite: Tensor) -> None:
        super().after_update(progress, learning_rates, finite)
        if not self._resting(progress):
            self._normalise_prototypes(finite)

    def _resting(self, progress: Progress) -> bool:
        return progress.step < self.options.freeze_prototypes_steps

    @torch.no_grad()
    def _normalise_prototypes(self, where: Tensor | None = None) -> None:
        weight = self.prototypes.weight
        unit = F.normalize(weight, dim=1)
        weight.copy_(unit if where is None else torch.where(where, unit, weight))
