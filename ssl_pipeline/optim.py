"""LARS, LARC, the optimizers by name, and learning rates as pure functions of the step.

Every optimizer here runs torch's fused kernels, which take `found_inf`, a number on the device: above 0 they leave
parameters and state bit for bit as they were. So a step with NaN or infinite gradients is skipped without the host
ever waiting to know.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ssl_pipeline import config
from ssl_pipeline.exits import BadInput


class Options(config.Options):
    """Optimizer and schedule."""

    name: Literal["lars", "larc", "sgd", "adam", "adamw"] = "lars"
    """`lars`: as in Barlow Twins, VICReg and BYOL. `larc`: as in SwAV; its recipe has `exclude_1d` false."""
    learning_rate: float = Field(0.2, gt=0)
    """Base rate; with `scale_with_batch` it is for 256 pictures."""
    learning_rate_1d: float | None = Field(None, gt=0)
    """Base rate of biases and norms (0.0048 in facebookresearch/barlowtwins). None: as all others."""
    scale_with_batch: bool = False
    """Whether rates are multiplied by batch size / 256 (Goyal et al. 2017)."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of lars, larc and sgd."""
    nesterov: bool = False
    """Of sgd."""
    weight_decay: float = Field(1e-6, ge=0)
    exclude_1d: bool = True
    """Whether biases and norms go without weight decay and LARS's or LARC's adaptation."""
    trust_coefficient: float = Field(0.001, gt=0)
    """eta of lars and larc."""
    schedule: Literal["cosine", "drops", "constant"] = "cosine"
    """`cosine`: linear warm-up, then a half cosine to `final_factor`. `drops`: warm-up, then constant, times
    `drop_factor` at `drop_epochs` before the end. `constant`: warm-up, then constant."""
    warmup_epochs: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    """Given instead of `warmup_epochs`."""
    warmup_start_factor: float = Field(0.0, ge=0, le=1)
    """Of the cosine: first rate of the warm-up as a share of the base rate."""
    warmup_inclusive: bool = False
    """Of the cosine: whether the last step of the warm-up has the base rate already, which the cosine's first step then
    repeats (facebookresearch/swav), or comes one step short of it (all others)."""
    cosine_per: Literal["step", "epoch"] = "step"
    """How often the cosine moves on; facebookresearch/simsiam and the linear probes take `epoch`."""
    final_factor: float = Field(0.0, ge=0, le=1)
    """Last rate of the cosine as a share of the base rate."""
    drop_epochs: list[int] = [50, 25]
    """Epochs before the end."""
    drop_factor: float = Field(0.2, gt=0)
    accumulate: int = Field(1, ge=1)
    """Micro-batches into which each rank divides its part of a batch, for one that does not fit into memory. The gradient is
    that of the whole batch; batch norm sees a micro-batch of all ranks at a time (docs/reliability.md)."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Options:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum above 0: give momentum, or nesterov=false")
        return self

    @model_validator(mode="after")
    def _warmup_is_the_cosines(self) -> Options:
        if self.schedule != "cosine" and (self.warmup_start_factor or self.warmup_inclusive):
            raise ValueError(
                f"warmup_start_factor and warmup_inclusive are the cosine's and schedule = {self.schedule} has a warm-up "
                "of its own: leave them out, or take schedule=cosine"
            )
        return self


# ---------------------------------------------------------------------------------------------------------------- rates
def warmup_cosine(
    step: int, steps: int, warmup: int, final_factor: float = 0.0, start_factor: float = 0.0, inclusive: bool = False
) -> float:
    """Share of the base rate in force during `step` (0-based).

    start_factor + (1 - start_factor) step / warmup at first, where an `inclusive` warm-up divides by warmup - 1; then
    q + final_factor (1 - q) with q = (1 + cos(pi (step - warmup) / (steps - warmup))) / 2.
    Source: facebookresearch/barlowtwins main.py:adjust_learning_rate; with final_factor 0, deepmind-research
    byol/utils/schedules.py:learning_schedule; inclusive, facebookresearch/swav main_swav.py:main.
    """
    if step < warmup:
        return start_factor + (1 - start_factor) * step / max(warmup - inclusive, 1)
    q = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
    return q + final_factor * (1 - q)


def warmup_drops(step: int, warmup: int, epoch: int, epochs: int, drops: Iterable[int], factor: float) -> float:
    """(step + 1) / warmup at first; afterwards times `factor` for each of `drops` epochs before the end that passed.

    Source: htdt/self-supervised train.py.
    """
    if step < warmup:
        return (step + 1) / warmup
    return factor ** sum(epoch >= epochs - drop for drop in drops)


def rate_factor(options: Options, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Share of the base rate in force during `step`."""
    warmup = warmup_length(options, steps_per_epoch)
    if options.schedule == "cosine":
        if options.cosine_per == "epoch" and step >= warmup:
            step = max(step // steps_per_epoch * steps_per_epoch, warmup)
        start, inclusive = options.warmup_start_factor, options.warmup_inclusive
        return warmup_cosine(step, steps_per_epoch * epochs, warmup, options.final_factor, start, inclusive)
    drops = options.drop_epochs if options.schedule == "drops" else []
    return warmup_drops(step, warmup, step // steps_per_epoch, epochs, drops, options.drop_factor)


def warmup_length(options: Options, steps_per_epoch: int) -> int:
    """Steps of the warm-up."""
    return options.warmup_steps or round(options.warmup_epochs * steps_per_epoch)


def base_rate(options: Options, batch_size: int, rate: float | None = None) -> float:
    """The rate at factor 1, for a global batch."""
    rate = options.learning_rate if rate is None else rate
    return rate * batch_size / 256 if options.scale_with_batch else rate


# ----------------------------------------------------------------------------------------------------------- optimizers
class LARS(torch.optim.SGD):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv 1708.03888), multi-tensor, without host sync.

    d = g + decay * w;  q = eta ||w|| / ||d||, or 1 where either norm is 0;  buffer = momentum * buffer + q d;
    w -= lr * buffer. Groups with `adapt` False take q = 1. The arithmetic is facebookresearch/barlowtwins main.py:LARS;
    the second half is SGD's, so this scales the gradients in place and lets SGD's fused kernel do the rest.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.9, trust_coefficient: float = 0.001) -> None:
        super().__init__(params, lr=lr, momentum=momentum, fused=True)
        self.trust_coefficient = trust_coefficient

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            gradients = [p.grad for p in weights]
            self._scale(gradients, weights, group["decay"], group["adapt"])
        return super().step(closure)

    def _scale(self, gradients: list[Tensor], weights: list[Tensor], decay: float, adapt: bool) -> None:
        """Put q d in the place of the gradients."""
        if decay:
            torch._foreach_add_(gradients, weights, alpha=decay)
        if adapt:
            norms = torch.stack(torch._foreach_norm(weights))
            updates = torch.stack(torch._foreach_norm(gradients))
            ratio = self.trust_coefficient * norms / updates
            ratio = torch.where((norms > 0) & (updates > 0), ratio, torch.ones_like(ratio))
            torch._foreach_mul_(gradients, list(ratio.unbind()))


class LARC(LARS):
    """LARS with another denominator: q = eta ||w|| / (||g|| + decay ||w|| + eps), without clipping, without host sync.

    A weight or a gradient of zeros is neither scaled nor decayed. The arithmetic is NVIDIA/apex
    apex/parallel/LARC.py:LARC with clip=False around SGD, as facebookresearch/swav and simsiam use it: on biases and
    norms too. Without them (groups with `adapt` False and no decay) it is timm's optim/lars.py:Lars.
    """

    eps = 1e-8

    def _scale(self, gradients: list[Tensor], weights: list[Tensor], decay: float, adapt: bool) -> None:
        if not adapt:
            super()._scale(gradients, weights, decay, adapt)
            return
        norms = torch.stack(torch._foreach_norm(weights))
        slopes = torch.stack(torch._foreach_norm(gradients))
        ratio = self.trust_coefficient * norms / (slopes + decay * norms + self.eps)
        # A factor of 0 takes the decay from a gradient of zeros; weights of zeros have none.
        ratio = torch.where(slopes > 0, ratio, torch.zeros_like(ratio))
        ratio = torch.where(norms > 0, ratio, torch.ones_like(ratio))
        torch._foreach_add_(gradients, weights, alpha=decay)
        torch._foreach_mul_(gradients, list(ratio.unbind()))


def build(groups: list[dict[str, Any]], options: Options, batch_size: int) -> torch.optim.Optimizer:
    """The optimizer of a method's `parameter_groups()`. Each group remembers its `base_lr` and whether it is scheduled.

    A group whose `lr` is "constant" keeps the base rate, scaled with the batch, for the whole run: no warm-up, no decay.
    A group may have a `rate` and a `weight_decay` of its own in the place of the options'.
    """
    built = []
    for group in groups:
        scheduled = group["lr"] == "scheduled"
        rate = group.get("rate", options.learning_rate_1d if group["name"].endswith("vectors") else None)
        base = base_rate(options, batch_size, rate) if group["lr"] in ("scheduled", "constant") else group["lr"]
        decayed = group["decay"] or not options.exclude_1d
        decay = group.get("weight_decay", options.weight_decay) if decayed else 0.0
        kept: dict[str, Any] = {
            "params": group["params"],
            "name": group["name"],
            "scheduled": scheduled,
            "base_lr": base,
        }
        if options.name in ("lars", "larc"):
            built.append({**kept, "lr": base, "decay": decay, "adapt": group["adapt"] or not options.exclude_1d})
        else:
            built.append({**kept, "lr": base, "weight_decay": decay})
    built = [group for group in built if group["params"]]
    optimizer: torch.optim.Optimizer
    if options.name in ("lars", "larc"):
        kind = LARS if options.name == "lars" else LARC
        optimizer = kind(built, options.learning_rate, options.momentum, options.trust_coefficient)
    elif options.name == "sgd":
        nesterov = options.nesterov
        optimizer = torch.optim.SGD(built, options.learning_rate, options.momentum, nesterov=nesterov, fused=True)
    elif options.name == "adam":
        optimizer = torch.optim.Adam(built, options.learning_rate, fused=True)
    else:
        optimizer = torch.optim.AdamW(built, options.learning_rate, fused=True)
    if isinstance(optimizer, torch.optim.SGD) and options.momentum:
        # torch's fused kernel makes the buffer in the first step, and leaves it uninitialised if that step is skipped.
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def load(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put a saved state back, each tensor in the layout of its parameter.

    torch loads any state, and its fused kernels take sizes from the parameter: another one's would be read and written
    beyond its end. Raises BadInput where the state does not fit.
    """
    try:
        difference = misfit(optimizer, state)
        if not difference:
            optimizer.load_state_dict(state)
            for p, values in optimizer.state.items():
                for name, value in values.items():
                    values[name] = torch.empty_like(value if name == "step" else p).copy_(value)
    except Exception as error:  # many types, on what is no state of an optimizer
        difference = f"it is no state of an optimizer ({error})"
    if difference:
        raise BadInput(f"the checkpoint does not fit the config's optimizer: {difference}; name another --output")


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Put factor * base rate into every scheduled group; returns the rate of each group by name."""
    for group in optimizer.param_groups:
        if group["scheduled"]:
            group["lr"] = group["base_lr"] * factor
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def misfit(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> str:
    """What is wrong with a saved state dict of the optimizer, in a few words; empty if nothing is. torch loads any."""
    groups, own = (
        [(group.get("name"), len(group["params"])) for group in one["param_groups"]]
        for one in (state, optimizer.state_dict())
    )
    if groups != own:
        return f"its groups (name, tensors) are {groups}, not {own}"
    adam = isinstance(optimizer, torch.optim.Adam)  # makes a tensor's state in the first step that it has a gradient
    for number, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        values = state["state"].get(number, {})
        names = {"step", "exp_avg", "exp_avg_sq"} if adam else set(optimizer.state.get(p, ()))
        if set(values) != names and not (adam and not values):
            return f"tensor {number} has {sorted(values)}, not {sorted(names)}"
        for name, value in values.items():
            if getattr(value, "shape", None) != (() if name == "step" else p.shape):
                return f"{name} of tensor {number} is {tuple(value.shape)}, not {tuple(p.shape)}"
    return ""


def gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All gradients that the optimizer will use."""
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
