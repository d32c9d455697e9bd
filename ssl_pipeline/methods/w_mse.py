"""W-MSE (Ermolov et al. 2021, arXiv 2007.06346). Reference code: htdt/self-supervised methods/w_mse.py, whitening.py."""

from __future__ import annotations

from itertools import combinations
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ssl_pipeline import config, distributed, methods
from ssl_pipeline.exits import BadInput
from ssl_pipeline.head import Options as HeadOptions
from ssl_pipeline.head import ProjectionHead
from ssl_pipeline.methods import Objective, ViewNeeds, full_precision, to_device, upcast


class Options(config.Options):
    name: Literal["w_mse"]
    w_size: int = Field(128, gt=1)
    """Samples in a slice, which is whitened by itself; at least twice the dimension of the embedding."""
    w_iter: int = Field(1, gt=0)
    """Random partitions of the global batch into slices in a step; the loss is their mean."""
    epsilon: float = Field(0.0, ge=0, lt=1)
    """Share of the identity in every covariance, (1 - epsilon) C + epsilon I: the authors' w_eps."""
    fallback: float = Field(1e-3, gt=0, le=1)
    """Share of the identity, scaled to the slice's variance, in a covariance that has no Cholesky factor."""
    normalize: bool = True
    """Whether whitened embeddings are compared by 2 - 2 cos, or as they are by their mean squared difference."""


def whiten(x: Tensor, epsilon: float = 0.0, fallback: float = 1e-3) -> tuple[Tensor, Tensor]:
    """L^-1 (x - mean) for slices x (..., n, K), with L L^T their covariance, and how many had no L.

    In such a slice, whose samples do not span K dimensions, the covariance C is replaced by
    (1 - fallback) C + fallback v I, v being the mean variance. The number, (), is on the device of x. Without failures this is
    methods/whitening.py:Whitening2d of the reference.
    """
    x = x - x.mean(dim=-2, keepdim=True)
    covariance = x.mT @ x / (x.shape[-2] - 1)
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    if epsilon:
        covariance = (1 - epsilon) * covariance + epsilon * eye
    # Tried first without gradient: a factor that failed would put NaN into the gradient even where it is not chosen.
    failed = torch.linalg.cholesky_ex(covariance.detach()).info > 0
    variance = covariance.detach().diagonal(dim1=-2, dim2=-1).mean(dim=-1).clamp(min=torch.finfo(x.dtype).eps)
    mended = (1 - fallback) * covariance + fallback * variance[..., None, None] * eye
    factor = torch.linalg.cholesky_ex(torch.where(failed[..., None, None], mended, covariance)).L
    return torch.linalg.solve_triangular(factor, x.mT, upper=False).mT, failed.sum()


def w_mse_loss(z: Tensor, orders: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """The loss of the global batch, the same on every rank, and the number of slices whose Cholesky factor failed.

    2 - 2 cos of the whitened embeddings of a sample's views, mean over the batch, the pairs of views and the
    partitions; gradient flows into every view. Each rank whitens its share of the slices. Source: htdt/self-supervised
    methods/w_mse.py:WMSE.forward.

    Args:
        z: (V, N, K), this rank's embeddings of V views, rows in the order of the loader.
        orders: (I, WN), permutations of the global batch, equal on all ranks; every w_size places are a slice.
        options: the method's.
    """
    whole = distributed.gather_in_order(z.transpose(0, 1)).transpose(0, 1)
    mine = orders.reshape(-1, options.w_size)[distributed.rank() :: distributed.world_size()]
    white, failed = whiten(whole[:, mine], options.epsilon, options.fallback)  # (V, slices, w_size, K)
    if options.normalize:
        white = F.normalize(white, dim=-1)
        pairs = [2 - 2 * (one * two).sum(dim=-1) for one, two in combinations(white, 2)]
    else:
        pairs = [(one - two).square().mean(dim=-1) for one, two in combinations(white, 2)]
    share = torch.stack(pairs).sum() / (len(pairs) * orders.numel())
    loss, failures = distributed.global_sum(torch.stack([share, failed.to(share.dtype)]))
    return loss, failures.detach()


class Method(methods.Method):
    """Two views or more, whose embeddings are whitened and then compared: scatter without negatives."""

    def __init__(self, options: Options, backbone: torch.nn.Module, head: ProjectionHead) -> None:
        super().__init__(options, backbone, head)
        _require_samples(options.w_size, head.outputs)

    @staticmethod
    def views(options: Options) -> ViewNeeds:
        return ViewNeeds(least=2, most=None)

    @staticmethod
    def check(options: Options, head: HeadOptions, batch_size: int) -> None:
        if batch_size % options.w_size:
            fits = max(batch_size // options.w_size, 1) * options.w_size
            raise BadInput(
                f"data.batch_size = {batch_size} is no multiple of method.w_size = {options.w_size}: take {fits}"
            )
        if head.kind != "identity":  # else the backbone's width, known when it is built
            _require_samples(options.w_size, head.output)

    def objective(self, features: list[Tensor], targets: list[Tensor]) -> Objective:
        # As in the reference, batch norm sees one view at a time in the backbone and all of them in the head.
        z = upcast(self.head(torch.cat(features))).unflatten(0, (len(features), -1))
        batch = z.shape[1] * distributed.world_size()
        generator = self.generator()
        orders = torch.stack([torch.randperm(batch, generator=generator) for _ in range(self.options.w_iter)])
        with full_precision(z):
            loss, failed = w_mse_loss(z, to_device(orders, z), self.options)
        return Objective(loss, z[0], {"cholesky_failed": failed})


def _require_samples(w_size: int, dimension: int) -> None:
    if w_size < 2 * dimension:
        raise BadInput(
            f"method.w_size = {w_size} is less than twice the embedding's {dimension} dimensions, too few samples to "
            f"whiten: take method.w_size={2 * dimension}, or a head.output of at most {w_size // 2}"
        )
