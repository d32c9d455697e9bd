"""SimCLR (Chen et al. 2020, arXiv 2002.05709). Reference code: google-research/simclr, htdt/self-supervised."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ssl_pipeline import config, distributed, methods
from ssl_pipeline.methods import Objective, full_precision, upcast


class Options(config.Options):
    name: Literal["simclr"]
    temperature: float = Field(0.5, gt=0)
    """tau of equation 1; 0.1 on ImageNet, 0.5 on small data."""
    views_together: bool = True
    """Whether the backbone sees both views as one batch, as google-research/simclr does on ImageNet, or one after the
    other, as htdt/self-supervised does on small data. It matters to batch norm. The head sees them as one batch."""


def nt_xent_loss(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent, equation 1, as the mean over this rank's 2N anchors against the 2WN - 1 candidates of all ranks.

    z1, z2: (N, K) embeddings of two views, not normalised. The mean over ranks is the loss of the global batch.
    Equals htdt/self-supervised methods/contrastive.py; google-research/simclr's value is twice this one.
    """
    rows = len(z1)
    anchors = F.normalize(torch.cat([z1, z2]), dim=1)
    candidates = torch.cat([distributed.gather(half) for half in anchors.chunk(2)])  # (2WN, K)
    logits = anchors @ candidates.T / temperature
    total = rows * distributed.world_size()
    here = torch.arange(rows, device=z1.device) + rows * distributed.rank()
    itself = torch.cat([here, here + total])
    partner = torch.cat([here + total, here])
    logits = logits.scatter(1, itself[:, None], float("-inf"))
    return F.cross_entropy(logits, partner)


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
