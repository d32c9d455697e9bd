"""SimCLR (Chen et al. 2020, arXiv 2002.05709). Reference code: google-research/simclr, htdt/self-supervised."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ssl_pipeline import config, distributed, methods
from ssl_pipeline.methods import Objective, full_precision, upcast, with_gradients


class Options(config.Options):
    name: Literal["simclr"]
    temperature: float = Field(0.5, ge=0.02)
    """tau of equation 1; 0.1 on ImageNet, 0.5 on small data. From 0.02 on fp32 holds sums of exp(1 / tau)."""
    views_together: bool = True
    """Whether the backbone sees both views as one batch, as google-research/simclr does on ImageNet, or one after the
    other, as htdt/self-supervised does on small data. It matters to batch norm. The head sees them as one batch."""


def block_size(device: torch.device) -> int:
    """Similarities held at a time: on a CPU what its caches hold (4 MB), on a GPU (128 MB, and as much again in between)
    enough that computing them takes longer than launching the kernels."""
    return 2**20 if device.type == "cpu" else 2**25


def _blocks(candidates: Tensor, own: int, temperature: float) -> Iterator[tuple[slice, slice, Tensor]]:
    """exp(cos / tau) of anchors, the first `own` candidates, and all candidates: rows, columns, and a block of them.

    Of the square of the anchors, which is symmetric, the blocks on and above the diagonal. What an anchor has with
    itself is 0.
    """
    anchors = candidates[:own] / temperature
    size = block_size(candidates.device)
    side = min(math.isqrt(size), own)
    rows = [slice(i, min(i + side, own)) for i in range(0, own, side)]
    width = size // side
    others = [slice(j, min(j + width, len(candidates))) for j in range(own, len(candidates), width)]
    for number, i in enumerate(rows):
        for j in rows[number:] + others:
            block = (anchors[i] @ candidates[j].T).exp_()
            block.diagonal(i.start - j.start).zero_()  # empty but for the blocks on the diagonal
            yield i, j, block


def exponential_sums(candidates: Tensor, own: int, temperature: float) -> Tensor:
    """sum_j exp(c_i c_j / tau) of the first `own` candidates with all others but themselves, (own,).

    candidates: (M, K), unit vectors. Nothing of size own x M is held.
    """
    sums = candidates.new_zeros(own)
    for i, j, block in _blocks(candidates, own, temperature):
        sums[i] += block.sum(dim=1)
        if i.start < j.start < own:
            sums[j] += block.sum(dim=0)
    return sums


def nt_xent_gradient(candidates: Tensor, sums: Tensor, own: int, temperature: float) -> Tensor:
    """Of the sum of all ranks' NT-Xent losses, the gradient by this rank's anchors, (own, K).

    Args:
        candidates: (M, K), unit vectors of all ranks, this rank's `own` first: both views, one after the other.
        sums: (M,), all candidates' `exponential_sums`.
        own: this rank's number of anchors.
        temperature: tau.

    A candidate c_i is an anchor against all c_j and a candidate of all of them as anchors; with P_ij the softmax of anchor
    i at candidate j, and [i, j] for two views of one sample, its gradient is sum_j (P_ij + P_ji - 2 [i, j]) c_j / (own tau).
    """
    inverse = 1 / sums
    gradient = candidates.new_zeros(own, candidates.shape[1])
    for i, j, block in _blocks(candidates, own, temperature):
        block *= inverse[i, None] + inverse[j]
        if j.start < own:
            for distance in (own // 2, -own // 2):
                block.diagonal(i.start - j.start + distance).sub_(2)  # before the product, which may be rounded
            if i.start < j.start:
                gradient[j].addmm_(block.T, candidates[i])
        gradient[i].addmm_(block, candidates[j])
    return gradient.div_(own * temperature)


def nt_xent_loss(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent, equation 1, as the mean over this rank's 2N anchors against the 2WN - 1 candidates of all ranks.

    z1, z2: (N, K) embeddings of two views, not normalised. The mean over ranks is the loss of the global batch.
    Equals htdt/self-supervised methods/contrastive.py; google-research/simclr's value is twice this one.

    The similarities are computed twice, in blocks, and never kept. Since all ranks' sums are gathered in between, each
    rank has the whole gradient of its own rows, those that it gets as the others' candidates among it, and backward needs
    no collective.
    """
    anchors = F.normalize(torch.cat([z1, z2]), dim=1)
    own = len(anchors)
    with torch.no_grad():
        candidates = _own_first(anchors)
        sums = exponential_sums(candidates, own, temperature)
        cosines = (anchors * anchors.roll(own // 2, dims=0)).sum(dim=1)
        loss = (sums.log() - cosines / temperature).mean()
    if not anchors.requires_grad:
        return loss
    with torch.no_grad():
        gradient = nt_xent_gradient(candidates, _own_first(sums), own, temperature)
    return with_gradients(loss, [anchors], [gradient])


def _own_first(x: Tensor) -> Tensor:
    """x (N, ...) of all ranks, this one's rows before all others, (WN, ...)."""
    whole, rank = distributed.gather_values(x), distributed.rank()
    return torch.cat([x, *whole[:rank], *whole[rank + 1 :]])


class Method(methods.Method):
    """Two views, one head, NT-Xent."""

    def represent(self, views: list[Tensor]) -> list[Tensor]:
        if self.options.views_together:
            return list(self.backbone(torch.cat(views)).chunk(2))
        return super().represent(views)

    def objective(self, features: list[Tensor], targets: list[Tensor]) -> Objective:
        z1, z2 = self.head(torch.cat(features)).chunk(2)
        with full_precision(z1):
            loss = nt_xent_loss(upcast(z1), upcast(z2), self.options.temperature)
        return Objective(loss, z1)
