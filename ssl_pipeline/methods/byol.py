"""BYOL (Grill et al. 2020, arXiv 2006.07733). Reference code: deepmind/deepmind-research byol, htdt/self-supervised."""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline import config, head, methods
from ssl_pipeline.head import ProjectionHead
from ssl_pipeline.methods import Objective, Progress, full_precision, upcast


class Options(config.Options):
    name: Literal["byol"]
    predictor_hidden: int = Field(4096, gt=0)
    """Width of the predictor's hidden layer."""
    predictor_output_bias: bool = False
    """Whether the predictor's last linear layer has a bias: no at DeepMind, yes in htdt/self-supervised."""
    momentum: float = Field(0.996, ge=0, le=1)
    """tau_base, the target's momentum at the start; it rises to 1 along a cosine."""
    momentum_per: Literal["step", "epoch"] = "step"
    """Whether the momentum rises every step (DeepMind) or every epoch (htdt/self-supervised)."""


def byol_loss(prediction1: Tensor, prediction2: Tensor, target1: Tensor, target2: Tensor) -> Tensor:
    """2 - 2 cos, in both directions, added; the mean over the batch (section 3.1, equation 2). All (N, K).

    The prediction of each view is compared with the target projection of the other; targets get no gradient.
    """
    one = F.cosine_similarity(prediction1, target2.detach(), dim=1)
    two = F.cosine_similarity(prediction2, target1.detach(), dim=1)
    return (4 - 2 * one - 2 * two).mean()


def target_momentum(base: float, done: int, whole: int) -> float:
    """tau = 1 - (1 - base) (1 + cos(pi done / whole)) / 2 (section 3.3)."""
    return 1 - (1 - base) * (math.cos(math.pi * done / whole) + 1) / 2


class Method(methods.Method):
    """Online network with a predictor against a target network that follows it by moving average.

    The target runs in training mode with batch statistics of its own, as in both references; only its parameters are
    averaged.
    """

    def __init__(self, options: Options, backbone: nn.Module, head_module: ProjectionHead) -> None:
        super().__init__(options, backbone, head_module)
        shape = head.Options(
            kind="mlp",
            hidden=options.predictor_hidden,
            output=head_module.outputs,
            output_bias=options.predictor_output_bias,
        )
        self.predictor = ProjectionHead(shape, head_module.outputs)
        self.target = nn.ModuleDict({"backbone": copy.deepcopy(backbone), "head": copy.deepcopy(head_module)})
        self.target.requires_grad_(False)

    def objective(self, views: list[Tensor]) -> Objective:
        features = [self.backbone(view) for view in views]
        embeddings = [self.head(feature) for feature in features]
        predictions = [upcast(self.predictor(z)) for z in embeddings]
        with torch.no_grad():
            targets = [upcast(self.target["head"](self.target["backbone"](view))) for view in views]
        with full_precision(views[0]):
            loss = byol_loss(*predictions, *targets)
        return Objective(loss, features[0], embeddings[0])

    def after_update(self, progress: Progress, learning_rates: dict[str, float], finite: Tensor) -> None:
        per_step = self.options.momentum_per == "step"
        done, whole = (progress.step, progress.steps) if per_step else (progress.epoch, progress.epochs)
        momentum = target_momentum(self.options.momentum, done, whole)
        pairs = [(self.target["backbone"], self.backbone), (self.target["head"], self.head)]
        target = [p.detach() for module, _ in pairs for p in module.parameters()]
        online = [p.detach() for _, module in pairs for p in module.parameters()]
        # A weight of 0 leaves the target bit for bit as it was when the update was skipped.
        weight = finite.to(target[0].dtype) * (1 - momentum)
        torch._foreach_lerp_(target, online, [weight.to(t.dtype) for t in target])
