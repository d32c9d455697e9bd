"""SparseHead: the penalty lambda * ||W||_{2,1} on the last linear layer of the projection head, and what goes further.

Song et al. 2023, "Towards the Sparseness of Projection Head in Self-Supervised Learning" (arXiv 2307.08913), section 6
and equations 12 and 13. The L2,1 norm is the sum over groups of the group's L2 norm. Section 5.2 takes the columns of W
(one group an input feature), section 5.3 speaks of the embedding's dimensions, which are the rows. The paper is the
default of every option here; docs/sparsehead.md has the formulas of the others and what they did in a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ssl_pipeline import config

Groups = Literal["columns", "rows"]

ACTIVE = 0.01
"""A group is active if its norm is over this share of the largest of its layer."""
LEAST_WEIGHT, MOST_WEIGHT = 1e-7, 1e-1
"""Between these an adaptive weight stays."""


class Options(config.Options):
    """How sparse the head shall be."""

    weight: float = Field(0.0, ge=0)
    """lambda, against the loss as a mean over the batch; 1e-4 in the paper (section 7.1), 0 for no SparseHead."""
    groups: Groups = "columns"
    """`columns`: a group an input of the layer (section 5.2). `rows`: a group an output (section 5.3)."""
    where: Literal["last", "all"] = "last"
    """`last`: the head's last linear layer, as in the paper. `all`: each of its linear layers, added up."""
    mode: Literal["penalty", "scale_invariant", "proximal"] = "penalty"
    """`penalty`: lambda ||W||_{2,1} in the loss, as in the paper. `scale_invariant`: lambda ||W||_{2,1} / ||W||_F in the
    loss. `proximal`: group soft-thresholding by learning rate * lambda after each update, so that groups become zero."""
    schedule: Literal["constant", "linear", "cosine", "adaptive"] = "constant"
    """Of lambda. `linear` and `cosine`: from `first_factor` * weight to weight within `ramp` of the run. `adaptive`:
    from weight, such that the share of active groups comes to `target`."""
    first_factor: float = Field(0.0, ge=0)
    """Of linear and cosine: the weight in the first step as a share of `weight`; above 1 it falls."""
    ramp: float = Field(1.0, gt=0, le=1)
    """Of linear and cosine: share of the run's steps after which the weight is `weight`."""
    target: float = Field(0.5, gt=0, le=1)
    """Of adaptive: wanted share of active groups, those with a norm over 1 % of the largest of their layer."""
    gain: float = Field(0.01, gt=0)
    """Of adaptive: log(lambda) += gain * (active share - target) after each step."""
    inner_steps: int = Field(0, ge=0)
    """K > 0: the bilevel form (equations 12 and 13, first order). The head is trained by K steps of SGD a step on fixed
    features, on loss + penalty; all else by the optimizer on the loss alone, with the head held."""
    inner_lr: float = Field(0.1, gt=0)
    """Learning rate of the inner steps, the same for the whole run."""

    @model_validator(mode="after")
    def _nothing_is_without_effect(self) -> Options:
        """Who gives an option that another one switches off would train for weeks without it."""
        needs = {
            "mode": ("weight above 0, as weight=1e-4", self.weight > 0),
            "where": ("weight above 0, as weight=1e-4", self.weight > 0),
            "schedule": ("weight above 0, as weight=1e-4", self.weight > 0),
            "first_factor": ("schedule=linear or cosine", self.schedule in ("linear", "cosine")),
            "ramp": ("schedule=linear or cosine", self.schedule in ("linear", "cosine")),
            "target": ("schedule=adaptive", self.schedule == "adaptive"),
            "gain": ("schedule=adaptive", self.schedule == "adaptive"),
            "inner_lr": ("inner_steps above 0", self.inner_steps > 0),
        }
        for key, (way_out, met) in needs.items():
            value = getattr(self, key)
            if not met and value != type(self).model_fields[key].default:
                raise ValueError(f"{key} = {value} has no effect without {way_out}: give that too, or leave {key} out")
        return self

    @model_validator(mode="after")
    def _adaptive_starts_in_range(self) -> Options:
        if self.schedule == "adaptive" and not LEAST_WEIGHT <= self.weight <= MOST_WEIGHT:
            raise ValueError(
                f"schedule = adaptive moves the weight between {LEAST_WEIGHT:g} and {MOST_WEIGHT:g}, and weight = "
                f"{self.weight:g} is not between them: start it at 1e-4, or take schedule=constant"
            )
        return self


# ------------------------------------------------------------------------------------------------------------ pure parts
class _GroupNorms(torch.autograd.Function):
    """L2 norms along a dimension of a matrix. On a CPU torch's own takes three times as long over columns, and more memory."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dim: int) -> Tensor:
        norms = weight.square().sum(dim=dim).sqrt()
        ctx.save_for_backward(weight, norms)
        ctx.dim = dim
        return norms

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight, norms = ctx.saved_tensors
        return weight * torch.where(norms > 0, gradient / norms, 0.0).unsqueeze(ctx.dim), None


def group_norms(weight: Tensor, groups: Groups = "columns") -> Tensor:
    """L2 norm of each group of a linear layer's weight (out, in): (in,) for columns, (out,) for rows.

    The gradient of a group of zeros is zero, a subgradient, not NaN.
    """
    return _GroupNorms.apply(weight, 0 if groups == "columns" else 1)  # type: ignore[no-any-return]


def l21_norm(weight: Tensor, groups: Groups = "columns") -> Tensor:
    """||W||_{2,1}, the sum of the group norms."""
    return group_norms(weight, groups).sum()


def scale_invariant_norm(weight: Tensor, groups: Groups = "columns") -> Tensor:
    """||W||_{2,1} / ||W||_F: from 1, a single group, to the square root of their number, all alike. 0 for W = 0.

    A multiple of W has the same value, so it falls by sparsity alone (Hoyer 2004, JMLR 5, on the ratio of L1 and L2).
    """
    norms = group_norms(weight, groups)
    return norms.sum() / _frobenius(norms)


def _frobenius(norms: Tensor) -> Tensor:
    """The Frobenius norm, over 0, of the matrix whose groups have these norms."""
    return torch.linalg.vector_norm(norms).clamp(min=torch.finfo(norms.dtype).tiny)


def hoyer_sparsity(norms: Tensor) -> Tensor:
    """(sqrt(G) - L1 / L2) / (sqrt(G) - 1) of the norms (G,) of groups: 0 where all are alike, 1 where one or none is left.

    Source: Hoyer 2004, "Non-negative matrix factorization with sparseness constraints", JMLR 5, section 3.1.
    """
    root = math.sqrt(len(norms))
    ratio = norms.sum() / _frobenius(norms)
    return ((root - ratio) / max(root - 1, torch.finfo(norms.dtype).eps)).clamp(max=1)


def active(norms: Tensor) -> Tensor:
    """Which groups of a layer have a norm over 1 % of the largest, (G,) boolean; none in a layer of zeros."""
    return norms > ACTIVE * norms.max()


@torch.no_grad()
def soft_threshold(weight: Tensor, threshold: float | Tensor, groups: Groups = "columns") -> None:
    """W_g *= max(0, 1 - threshold / ||W_g||) for each group g, in place: the proximal operator of threshold * L2,1.

    A threshold of 0 leaves every bit. Source: Yuan and Lin 2006, J. R. Statist. Soc. B 68, equation 2.4; Parikh and Boyd
    2014, "Proximal Algorithms", section 6.5.4.
    """
    norms = group_norms(weight, groups)
    factor = (1 - threshold / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(min=0)
    weight.mul_(factor if groups == "columns" else factor[:, None])


def weight_at(options: Options, done: float) -> float:
    """lambda where `done`, from 0 to 1, of the run's steps are done, by a schedule that is no function of the weights.

    weight * (f + (1 - f) s) with f = first_factor and x = min(done / ramp, 1): s = x, or (1 - cos(pi x)) / 2, or 1.
    """
    x = min(done / options.ramp, 1)
    s = {"linear": x, "cosine": (1 - math.cos(math.pi * x)) / 2}.get(options.schedule, 1.0)
    return options.weight * (options.first_factor + (1 - options.first_factor) * s)


# -------------------------------------------------------------------------------------------------------------- a module
class SparseHead(nn.Module):
    """What acts on the linear layers of a head; its state is the adaptive weight.

    `layers` of its functions are the head's `sparse_layers`; `done` is the share of the run's steps that are done. Must be
    called outside autocast, which would round the weights. All is the same on every rank: after
    DistributedDataParallel's mean the penalty stands in the loss exactly once.
    """

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        if options.schedule == "adaptive":
            self.register_buffer("log_weight", torch.tensor(math.log(options.weight)))

    def weight(self, done: float) -> float | Tensor:
        """lambda; on the device where it is adaptive."""
        return self.log_weight.exp() if self.options.schedule == "adaptive" else weight_at(self.options, done)  # type: ignore[operator]

    def penalty(self, layers: Sequence[nn.Linear], done: float) -> Tensor:
        """lambda times the norm, (): what the loss gets, or, if proximal, what the threshold stands for."""
        return self._penalty([group_norms(layer.weight, self.options.groups) for layer in layers], done)

    def _penalty(self, each: Sequence[Tensor], done: float) -> Tensor:
        """The same of layers whose groups have these norms."""
        scale_invariant = self.options.mode == "scale_invariant"
        totals = [norms.sum() / (_frobenius(norms) if scale_invariant else 1) for norms in each]
        return self.weight(done) * torch.stack(totals).sum()

    @property
    def in_the_loss(self) -> bool:
        """Whether the penalty is added to a loss, and not a threshold after its step."""
        return self.options.weight > 0 and self.options.mode != "proximal"

    def threshold(self, layers: Sequence[nn.Linear], done: float, step_size: float | Tensor) -> None:
        """After a step of gradient descent of `step_size`: the proximal one, if that is the mode.

        Exact for SGD without momentum. LARS and Adam move each layer or weight by a step of its own, and momentum by
        gradients of before: there it is a heuristic that takes the rate for the step.
        """
        if self.options.weight > 0 and self.options.mode == "proximal":
            for layer in layers:
                soft_threshold(layer.weight, step_size * self.weight(done), self.options.groups)

    @torch.no_grad()
    def adapt(self, layers: Sequence[nn.Linear], finite: Tensor) -> None:
        """After a step: move an adaptive weight; not where the step was skipped, `finite` being false."""
        if self.options.schedule == "adaptive":
            share = (
                torch.cat([active(group_norms(layer.weight, self.options.groups)) for layer in layers]).float().mean()
            )
            moved = self.log_weight + self.options.gain * (share - self.options.target)  # type: ignore[operator]
            moved = moved.clamp(math.log(LEAST_WEIGHT), math.log(MOST_WEIGHT))
            self.log_weight.copy_(torch.where(finite, moved, self.log_weight))  # type: ignore[operator, arg-type]

    @torch.no_grad()
    def logs(self, layers: Sequence[nn.Linear], done: float, loss: Tensor) -> dict[str, Tensor]:
        """What to watch, of all layers together: norms of the groups, and, with SparseHead, the penalty beside `loss`."""
        each = [group_norms(layer.weight, self.options.groups) for layer in layers]
        norms = torch.cat(each)
        found = {
            "head_group_norm_min": norms.min(),
            "head_group_norm_median": norms.median(),
            "head_group_norm_max": norms.max(),
            "head_groups_inactive": 1 - torch.cat([active(n) for n in each]).to(norms.dtype).mean(),
            "head_groups_zero": (norms == 0).to(norms.dtype).mean(),
            "head_hoyer": torch.stack([hoyer_sparsity(n) for n in each]).mean(),
        }
        if self.options.weight > 0:
            penalty = self._penalty(each, done)
            weight = self.weight(done)
            found["sparse_weight"] = weight.clone() if isinstance(weight, Tensor) else torch.full_like(penalty, weight)
            found["sparse_penalty"] = penalty
            found["sparse_share"] = penalty / (loss.detach().abs() + penalty)
        return found
