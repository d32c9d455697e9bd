"""The projection head: from the representation r (N, D) to the embedding z (N, K)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from ssl_pipeline import config, sparse_head


class Options(config.Options):
    """The head's kind and sizes; each method's config gives its authors' own."""

    kind: Literal["identity", "linear", "mlp"] = "mlp"
    """`identity`: z = r. `linear`: one linear layer. `mlp`: `layers` of them, batch norm and ReLU between."""
    layers: int = Field(2, ge=2)
    """Linear layers of an mlp."""
    hidden: int = Field(2048, gt=0)
    """Width of an mlp's hidden layers."""
    output: int = Field(128, gt=0)
    """K, the dimension of the embedding."""
    hidden_bias: bool = True
    """Whether the hidden linear layers, which a batch norm follows, have a bias."""
    output_bias: bool = True
    """Whether the last linear layer has a bias."""
    output_norm: Literal["none", "plain", "scale", "affine"] = "none"
    """Batch norm after the last linear layer: none, without scale and offset, with a scale only, or with both.

    SimSiam's projector ends with `plain`. Its last linear layer has a bias that stays as it was drawn
    (facebookresearch/simsiam simsiam/builder.py); the norm subtracts it with the mean, so output_bias=false is the same."""
    init_std: float | None = Field(None, gt=0)
    """Standard deviation of normal initial weights of all linear layers. None: torch's default."""
    sparse: sparse_head.Options = sparse_head.Options()

    @model_validator(mode="after")
    def _something_to_be_sparse(self) -> Options:
        for key in ("weight", "inner_steps"):
            value = getattr(self.sparse, key)
            if self.kind == "identity" and value > 0:
                raise ValueError(
                    f"head.sparse.{key} = {value} needs a linear layer, and head.kind = identity has none: "
                    f"take head.kind=linear or mlp, or head.sparse.{key}=0"
                )
        return self


class ProjectionHead(nn.Module):
    """Maps (N, D) to (N, K); K is its attribute `outputs`. SparseHead, `sparse`, acts on its `sparse_layers`."""

    def __init__(self, options: Options, inputs: int) -> None:
        super().__init__()
        self.options = options
        self.outputs = inputs if options.kind == "identity" else options.output
        layers: list[nn.Module] = []
        if options.kind == "mlp":
            for _ in range(options.layers - 1):
                layers += [
                    nn.Linear(inputs, options.hidden, bias=options.hidden_bias),
                    nn.BatchNorm1d(options.hidden),
                    nn.ReLU(inplace=True),
                ]
                inputs = options.hidden
        if options.kind != "identity":
            layers.append(nn.Linear(inputs, options.output, bias=options.output_bias))
            if options.output_norm != "none":
                norm = nn.BatchNorm1d(options.output, affine=options.output_norm != "plain")
                if options.output_norm == "scale":
                    norm.bias.requires_grad_(False)
                layers.append(norm)
        self.layers = nn.Sequential(*layers)
        self.sparse = sparse_head.SparseHead(options.sparse)
        if options.init_std is not None:
            for layer in layers:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=options.init_std)

    @property
    def last_layer(self) -> nn.Linear | None:
        """The last linear layer, or None for an identity."""
        linear = self._linear_layers()
        return linear[-1] if linear else None

    @property
    def sparse_layers(self) -> list[nn.Linear]:
        """The linear layers that `sparse.where` names; none for an identity."""
        linear = self._linear_layers()
        return linear if self.options.sparse.where == "all" else linear[-1:]

    def _linear_layers(self) -> list[nn.Linear]:
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)
