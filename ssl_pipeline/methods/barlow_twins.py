"""Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230). Reference code: facebookresearch/barlowtwins main.py."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline import config, distributed, methods
from ssl_pipeline.head import ProjectionHead
from ssl_pipeline.methods import Objective, full_precision, upcast
from ssl_pipeline.methods._column_products import column_products


class Options(config.Options):
    name: Literal["barlow_twins"]
    off_diagonal_weight: float = Field(0.0051, ge=0)
    """lambda of equation 1."""
    gradient_divisor: float = Field(1.0, gt=0)
    """The official code all-reduces the correlation matrix in place, out of autograd's sight, so that its gradient is
    1/W of the true one on W ranks, and its rate for biases was tuned with that (W = 16 by its README). This divides the
    whole gradient, SparseHead's penalty included, by a number that does not depend on the ranks used here."""


def standardize(z: Tensor, eps: float = 1e-5) -> Tensor:
    """z (N, K) with zero mean and unit biased variance of each column over the global batch: batch norm without affine."""
    mean, variance, _ = distributed.batch_statistics(z)
    return (z - mean) * (variance + eps).rsqrt()


def barlow_twins_loss(z1: Tensor, z2: Tensor, off_diagonal_weight: float) -> Tensor:
    """sum_i (C_ii - 1)^2 + lambda sum_{i != j} C_ij^2 (equation 1) of the global batch, the same on every rank.

    z1, z2: (N, K) head outputs of two views, before any normalisation.
    """
    one, two = standardize(torch.cat([z1, z2], dim=1)).chunk(2, dim=1)
    diagonal, squares = column_products(one, two, len(z1) * distributed.world_size())
    return (diagonal - 1).square().sum() + off_diagonal_weight * squares


class Method(methods.Method):
    """Two views, each forwarded by itself; their cross-correlation is pulled to the identity."""

    def __init__(self, options: Options, backbone: nn.Module, head: ProjectionHead) -> None:
        super().__init__(options, backbone, head)
        self.gradient_scale = 1 / options.gradient_divisor

    def objective(self, features: list[Tensor], targets: list[Tensor]) -> Objective:
        z1, z2 = (upcast(self.head(feature)) for feature in features)
        with full_precision(z1):
            loss = barlow_twins_loss(z1, z2, self.options.off_diagonal_weight)
        return Objective(loss, z1)
