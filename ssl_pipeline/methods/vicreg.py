"""VICReg (Bardes et al. 2022, arXiv 2105.04906). Reference code: facebookresearch/vicreg main_vicreg.py."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ssl_pipeline import config, distributed, methods
from ssl_pipeline.methods import Objective, full_precision, upcast
from ssl_pipeline.methods._column_products import column_products


class Options(config.Options):
    name: Literal["vicreg"]
    invariance_weight: float = Field(25.0, ge=0)
    """lambda of equation 6."""
    variance_weight: float = Field(25.0, ge=0)
    """mu of equation 6, on the mean over both views as in the reference; equation 6 has their sum."""
    covariance_weight: float = Field(1.0, ge=0)
    """nu of equation 6."""


def variance_and_covariance(z: Tensor, eps: float = 1e-4) -> tuple[Tensor, Tensor]:
    """(v, c) of the embeddings z (N, K) of one view, over the global batch of B rows, the same on every rank.

    v = mean_i max(0, 1 - sqrt(C_ii + eps)) (equation 1), c = sum_{i != j} C_ij^2 / K (equation 4), with the covariance
    C = Z^T Z / (B - 1) of the centred Z (B, K).
    """
    # A constant to autograd: a function of C has no gradient by the mean, since the rows of the centred Z sum to zero.
    centred = z - distributed.mean_over_ranks(z.mean(dim=0))
    variances, squares = column_products(centred, centred, len(z) * distributed.world_size() - 1)
    return F.relu(1 - (variances + eps).sqrt()).mean(), squares / z.shape[1]


def vicreg_loss(
    z1: Tensor, z2: Tensor, invariance_weight: float, variance_weight: float, covariance_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Equation 6 of z1, z2 (N, K), head outputs of two views, and its three terms before their weights, to be logged.

    The invariance is the mean of (z1 - z2)^2 over this rank's elements: equation 5 divided by K. The variance is the mean
    over both views, the covariance their sum. All as in the reference; the mean over ranks is the loss of the global
    batch.
    """
    variance1, covariance1 = variance_and_covariance(z1)
    variance2, covariance2 = variance_and_covariance(z2)
    invariance, variance, covariance = F.mse_loss(z1, z2), (variance1 + variance2) / 2, covariance1 + covariance2
    loss = invariance_weight * invariance + variance_weight * variance + covariance_weight * covariance
    terms = {"invariance": invariance, "variance": variance, "covariance": covariance}
    return loss, {name: term.detach() for name, term in terms.items()}


class Method(methods.Method):
    """Two views, each forwarded by itself: drawn together, each dimension spread, dimensions decorrelated.

    Where it fails `variance` rises to 1 (every dimension constant) or, with spread dimensions that say the same,
    `covariance` stays high.
    """

    def objective(self, features: list[Tensor], targets: list[Tensor]) -> Objective:
        z1, z2 = (upcast(self.head(feature)) for feature in features)
        weights = (self.options.invariance_weight, self.options.variance_weight, self.options.covariance_weight)
        with full_precision(z1):
            loss, terms = vicreg_loss(z1, z2, *weights)
        return Objective(loss, z1, terms)
