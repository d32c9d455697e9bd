"""SparseHead: the penalty lambda * ||W||_{2,1} on the last linear layer of the projection head.

Song et al. 2023, "Towards the Sparseness of Projection Head in Self-Supervised Learning" (arXiv 2307.08913), section 6
and equation 13. The L2,1 norm is the sum over groups of the group's L2 norm. Section 5.2 takes the columns of W (one
group an input feature), section 5.3 speaks of the embedding's dimensions, which are the rows.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline import config


class Options(config.Options):
    """How sparse the head shall be."""

    weight: float = Field(0.0, ge=0)
    """lambda, against the loss as a mean over the batch; 1e-4 in the paper (section 7.1), 0 for no SparseHead."""
    groups: Literal["columns", "rows"] = "columns"
    """`columns`: a group an input of the layer (section 5.2). `rows`: a group an output (section 5.3)."""


def group_norms(weight: Tensor, groups: Literal["columns", "rows"] = "columns") -> Tensor:
    """L2 norm of each group of a linear layer's weight (out, in): (in,) for columns, (out,) for rows.

    The gradient of a group of zeros is zero, a subgradient, not NaN.
    """
    return torch.linalg.vector_norm(weight, dim=0 if groups == "columns" else 1)


def l21_norm(weight: Tensor, groups: Literal["columns", "rows"] = "columns") -> Tensor:
    """||W||_{2,1}, the sum of the group norms."""
    return group_norms(weight, groups).sum()


def penalty(layer: nn.Linear, options: Options) -> tuple[Tensor, dict[str, Tensor]]:
    """lambda * ||W||_{2,1} in the weight's own precision, and what to log of it.

    Must be called outside autocast, which would round the weight. The same on every rank: after
    DistributedDataParallel's mean it stands in the loss exactly once.
    """
    norms = group_norms(layer.weight, options.groups)
    value = options.weight * norms.sum()
    with torch.no_grad():
        largest = norms.max()
        logs = {
            "sparse_penalty": value.detach(),
            "head_group_norm_min": norms.min(),
            "head_group_norm_median": norms.median(),
            "head_group_norm_max": largest,
            "head_groups_inactive": (norms < 0.01 * largest).to(norms.dtype).mean(),
        }
    return value, logs
