"""SimSiam (Chen and He 2021, arXiv 2011.10566). Reference code: facebookresearch/simsiam simsiam/builder.py, main_simsiam.py."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline import config, head, methods
from ssl_pipeline.head import ProjectionHead
from ssl_pipeline.methods import Objective, full_precision, upcast


class Options(config.Options):
    name: Literal["simsiam"]
    predictor_hidden: int = Field(512, gt=0)
    """Width of the predictor's hidden layer: a quarter of the embedding's in the paper, a bottleneck."""
    predictor_rate: Literal["constant", "scheduled"] = "constant"
    """Whether the predictor's learning rate stays at the base rate, `--fix-pred-lr` of main_simsiam.py (section 4.2 finds
    it better: the predictor shall follow the latest representations), or takes the schedule of all others."""


def simsiam_loss(prediction1: Tensor, prediction2: Tensor, projection1: Tensor, projection2: Tensor) -> Tensor:
    """-(cos(p1, z2) + cos(p2, z1)) / 2, the mean over the batch (equations 1 to 4), from -1 to 1. All (N, K).

    The prediction of each view is compared with the projection of the other; projections get no gradient.
    """
    one = F.cosine_similarity(prediction1, projection2.detach(), dim=1)
    two = F.cosine_similarity(prediction2, projection1.detach(), dim=1)
    return -(one + two).mean() / 2


class Method(methods.Method):
    """Two views through one network; a predictor on the one side, no gradient on the other.

    Where it fails the loss falls to -1 and the embeddings to few dimensions, `embedding_rank`. The
    norm at the head's end keeps each dimension's deviation, so that `embedding_std` falls to 0 (figure 2) only when
    all embeddings are equal to the last digit.
    """

    per_sample = True

    def __init__(self, options: Options, backbone: nn.Module, head_module: ProjectionHead) -> None:
        super().__init__(options, backbone, head_module)
        shape = head.Options(kind="mlp", hidden=options.predictor_hidden, output=head_module.outputs, hidden_bias=False)
        self.predictor = ProjectionHead(shape, head_module.outputs)

    def objective(self, features: list[Tensor], targets: list[Tensor]) -> Objective:
        embeddings = [self.head(feature) for feature in features]
        predictions = [upcast(self.predictor(z)) for z in embeddings]
        projections = [upcast(z) for z in embeddings]
        with full_precision(features[0]):
            loss = simsiam_loss(*predictions, *projections)
        return Objective(loss, projections[0])

    def parameter_groups(self) -> list[dict[str, Any]]:
        if self.options.predictor_rate == "scheduled":
            return super().parameter_groups()
        predictor = {id(p) for p in self.predictor.parameters()}
        groups = []
        for group in super().parameter_groups():
            groups.append({**group, "params": [p for p in group["params"] if id(p) not in predictor]})
            own = [p for p in group["params"] if id(p) in predictor]
            groups.append({**group, "params": own, "name": f"predictor_{group['name']}", "lr": "constant"})
        return groups
