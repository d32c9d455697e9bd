"""BYOL (Grill et al. 2020, arXiv 2006.07733). Reference code: deepmind/deepmind-research byol, htdt/self-supervised."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline.methods import Objective, full_precision
from ssl_pipeline.methods._momentum import MomentumMethod, MomentumOptions


class Options(MomentumOptions):
    name: Literal["byol"]


def byol_loss(prediction1: Tensor, prediction2: Tensor, target1: Tensor, target2: Tensor) -> Tensor:
    """2 - 2 cos, in both directions, added; the mean over the batch (section 3.1, equation 2). All (N, K).

    The prediction of each view is compared with the target projection of the other; targets get no gradient.
    """
    one = F.cosine_similarity(prediction1, target2.detach(), dim=1)
    two = F.cosine_similarity(prediction2, target1.detach(), dim=1)
    return (4 - 2 * one - 2 * two).mean()


class Method(MomentumMethod):
    """Online network with a predictor against a target network that follows it by moving average."""

    per_sample = True

    def objective(self, features: list[Tensor], targets: list[Tensor]) -> Objective:
        embeddings, predictions = self.predict(features)
        with full_precision(features[0]):
            loss = byol_loss(*predictions, *targets)
        return Objective(loss, embeddings[0])
