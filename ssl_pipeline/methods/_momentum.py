"""An online network with a predictor, and a target network that follows it by moving average.

BYOL's (Grill et al. 2020, arXiv 2006.07733, section 3); SSL-HSIC stands on the same two networks.
"""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline import config, head, methods
from ssl_pipeline.head import ProjectionHead
from ssl_pipeline.methods import Progress, upcast


class MomentumOptions(config.Options):
    """Options of the predictor and of the target."""

    name: str
    predictor_hidden: int = Field(4096, gt=0)
    """Width of the predictor's hidden layer."""
    predictor_output_bias: bool = False
    """Whether the predictor's last linear layer has a bias: no at DeepMind, yes in htdt/self-supervised."""
    momentum: float = Field(0.996, ge=0, le=1)
    """tau_base, the target's momentum at the start; it rises to 1 along a cosine."""
    momentum_per: Literal["step", "epoch"] = "step"
    """Whether the momentum rises every step (DeepMind) or every epoch (htdt/self-supervised)."""


def target_momentum(base: float, done: int, whole: int) -> float:
    """tau = 1 - (1 - base) (1 + cos(pi done / whole)) / 2 (section 3.3)."""
    return 1 - (1 - base) * (math.cos(math.pi * done / whole) + 1) / 2


@torch.no_grad()
def follow(target: list[nn.Module], online: list[nn.Module], weight: Tensor) -> None:
    """Move the parameters of the `target` modules to those of the `online` ones by `weight`, () on their device.

    With weight 0 they stay as they are, bit for bit.
    """
    followers = [p.detach() for module in target for p in module.parameters()]
    leaders = [p.detach() for module in online for p in module.parameters()]
    # Fused kernels go by addresses alone.
    assert all(p.stride() == q.stride() for p, q in zip(followers, leaders, strict=True))
    # p += weight (q - p), as torch's fused SGD by q with a decay of -1 and a rate of -weight: on a GPU one kernel that reads
    # p and q and writes p. A lerp by a weight on the device is a kernel for each tensor.
    torch._fused_sgd_(
        followers,
        leaders,
        [],
        weight_decay=-1.0,
        momentum=0.0,
        lr=-weight,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        found_inf=(weight == 0).float(),
    )


class MomentumMethod(methods.Method):
    """Base of methods with a predictor and a target.

    The target runs in training mode with batch statistics of its own, as in all references; only its parameters are
    averaged.
    """

    def __init__(self, options: MomentumOptions, backbone: nn.Module, head_module: ProjectionHead) -> None:
        super().__init__(options, backbone, head_module)
        shape = head.Options(
            kind="mlp",
            hidden=options.predictor_hidden,
            output=head_module.outputs,
            output_bias=options.predictor_output_bias,
        )
        self.predictor = ProjectionHead(shape, head_module.outputs)
        self.target = nn.ModuleDict({"backbone": copy.deepcopy(backbone), "head": copy.deepcopy(head_module)})
        self.target["head"].sparse = nn.Identity()  # nothing acts on it, and an adaptive weight has one state
        self.target.requires_grad_(False)

    @torch.no_grad()
    def targets(self, views: list[Tensor]) -> list[Tensor]:
        """The target's embeddings (N, K) of each view by itself, not in half precision."""
        return [upcast(self.target["head"](self.target["backbone"](view))) for view in views]

    def predict(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Embeddings, and predictions that are not in half precision, (N, K) a view."""
        embeddings = [self.head(feature) for feature in features]
        return embeddings, [upcast(self.predictor(z)) for z in embeddings]

    def after_update(self, progress: Progress, learning_rates: dict[str, float], finite: Tensor) -> None:
        super().after_update(progress, learning_rates, finite)
        per_step = self.options.momentum_per == "step"
        done, whole = (progress.step, progress.steps) if per_step else (progress.epoch, progress.epochs)
        momentum = target_momentum(self.options.momentum, done, whole)
        weight = finite.float() * (1 - momentum)
        follow([self.target["backbone"], self.target["head"]], [self.backbone, self.head], weight)
