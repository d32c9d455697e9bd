"""LARS, LARC, LAMB, the optimizers by name, and learning rates as pure functions of the step.

Every optimizer here runs fused kernels, torch's or apex's, which take `found_inf`, a number on the device: where it is 1
they leave parameters and state bit for bit as they were. So a step with NaN or infinite gradients is skipped without the
host ever waiting to know.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.optim.adam import adam

from ssl_pipeline import config
from ssl_pipeline.exits import BadInput


class Options(config.Options):
    """Optimizer and schedule."""

    name: Literal["lars", "larc", "sgd", "adam", "adamw", "lamb"] = "lars"
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
    """Whether biases and norms go without weight decay and LARS's, LARC's or LAMB's adaptation."""
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
    backend: Literal["torch", "apex"] = "torch"
    """Whose kernels: torch's, or NVIDIA apex's of sgd, adam, adamw and lamb, where it is installed."""

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

    @model_validator(mode="after")
    def _backend_has_it(self) -> Options:
        if self.backend == "apex" and self.name in ("lars", "larc"):
            raise ValueError(f"apex has no {self.name}: take backend=torch, or name=sgd, adam, adamw or lamb")
        if self.backend == "apex" and self.name == "lamb" and not self.weight_decay:
            raise ValueError("apex's LAMB adapts only what decays: give weight_decay above 0, or take backend=torch")
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
class Block(NamedTuple):
    """Tensors, and pieces of large ones, that are worked on together: lists of the same length."""

    owners: list[int]
    """The number of each piece's tensor."""
    weights: list[Tensor]
    gradients: list[Tensor]
    buffers: list[Tensor]
    """Of momentum; empty without it."""


class LARS(torch.optim.SGD):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv 1708.03888), multi-tensor, without host sync.

    d = g + decay * w;  q = eta ||w|| / ||d||, or 1 where either norm is 0;  buffer = momentum * buffer + q d;
    w -= lr * buffer. Groups with `adapt` False take q = 1. The arithmetic is facebookresearch/barlowtwins main.py:LARS.

    Two sweeps over memory: d, in the place of g, and the norms; then q d and SGD's fused kernel. Each goes block by block,
    so that on a CPU a block's numbers are read from memory once a sweep. `build` makes the momentum buffers.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.9, trust_coefficient: float = 0.001) -> None:
        super().__init__(params, lr=lr, momentum=momentum, fused=True)
        self.trust_coefficient = trust_coefficient

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = _evaluated(closure)
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for group in self.param_groups:
            blocks, adapt, decay = self._blocks(group), group["adapt"], group["decay"]
            if scale is not None:
                for block in blocks:
                    torch._foreach_div_(block.gradients, scale)
            ratios = self._ratios(blocks, decay).unbind() if adapt and blocks else ()
            for block in blocks:
                if adapt:
                    # Where a list's factors lie on a GPU, torch launches a kernel a tensor: it has no multi-tensor one.
                    torch._foreach_mul_(block.gradients, [ratios[owner] for owner in block.owners])
                torch._fused_sgd_(
                    block.weights,
                    block.gradients,
                    block.buffers,
                    weight_decay=0.0 if adapt else decay,
                    momentum=group["momentum"],
                    lr=group["lr"],
                    dampening=0.0,
                    nesterov=False,
                    maximize=False,
                    is_first_step=False,
                    found_inf=found_inf,
                )
        return loss

    def _blocks(self, group: dict[str, Any]) -> list[Block]:
        """The group's tensors with a gradient, in blocks that hold at most so many numbers of each kind."""
        weights = [p for p in group["params"] if p.grad is not None]
        size = block_size(weights[0].device) if weights else 0
        blocks: list[Block] = []
        filled = 0
        for owner, w in enumerate(weights):
            tensors = [w, in_layout_of(w, w.grad)]
            if group["momentum"]:
                tensors.append(self.state[w]["momentum_buffer"])
            rows: Iterable[Sequence[Tensor]] = [tensors]
            if w.numel() > size:  # cut as they lie in memory, channels_last or not
                rows = zip(*(x.as_strided((x.numel(),), (1,)).split(size) for x in tensors), strict=True)
            for pieces in rows:
                if not blocks or filled + pieces[0].numel() > size:
                    blocks.append(Block([], [], [], []))
                    filled = 0
                filled += pieces[0].numel()
                blocks[-1].owners.append(owner)
                for kind, piece in zip(blocks[-1][1:], pieces, strict=False):  # without momentum no buffer
                    kind.append(piece)
        return blocks

    def _ratios(self, blocks: list[Block], decay: float) -> Tensor:
        """q of each tensor, (T,); makes g + decay w of the gradients."""
        count = blocks[-1].owners[-1] + 1
        norms: list[list[Tensor]] = [[] for _ in range(count)]
        updates: list[list[Tensor]] = [[] for _ in range(count)]
        for block in blocks:
            for owner, *pair in zip(block.owners, *self._decayed(block, decay), strict=True):
                norms[owner].append(pair[0])
                updates[owner].append(pair[1])
        return self._ratio(_joined(norms), _joined(updates), decay)

    def _decayed(self, block: Block, decay: float) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Norms of each piece of the weights and of what is compared with them; adds the decay to the gradients."""
        if decay:
            torch._foreach_add_(block.gradients, block.weights, alpha=decay)
        return torch._foreach_norm(block.weights), torch._foreach_norm(block.gradients)

    def _ratio(self, norms: Tensor, updates: Tensor, decay: float) -> Tensor:
        ratio = self.trust_coefficient * norms / updates
        return torch.where((norms > 0) & (updates > 0), ratio, torch.ones_like(ratio))


class LARC(LARS):
    """LARS with another denominator: q = eta ||w|| / (||g|| + decay ||w|| + eps), without clipping, without host sync.

    A weight or a gradient of zeros is neither scaled nor decayed. The arithmetic is NVIDIA/apex
    apex/parallel/LARC.py:LARC with clip=False around SGD, as facebookresearch/swav and simsiam use it: on biases and
    norms too. Without them (groups with `adapt` False and no decay) it is timm's optim/lars.py:Lars.
    """

    eps = 1e-8

    def _decayed(self, block: Block, decay: float) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        slopes = torch._foreach_norm(block.gradients)
        torch._foreach_add_(block.gradients, block.weights, alpha=decay)
        return torch._foreach_norm(block.weights), slopes

    def _ratio(self, norms: Tensor, updates: Tensor, decay: float) -> Tensor:
        ratio = self.trust_coefficient * norms / (updates + decay * norms + self.eps)
        # A factor of 0 takes the decay from a gradient of zeros; weights of zeros have none.
        ratio = torch.where(updates > 0, ratio, torch.zeros_like(ratio))
        return torch.where(norms > 0, ratio, torch.ones_like(ratio))


class LAMB(torch.optim.Adam):
    """Layer-wise adaptive Adam (You et al. 2020, arXiv 1904.00962, algorithm 2), multi-tensor, without host sync.

    d = Adam's direction with bias correction + decay * w;  q = ||w|| / ||d||, or 1 where either norm is 0;
    w -= lr * q * d. Groups with `adapt` False take q = 1. The arithmetic is timm's optim/lamb.py:Lamb, without its clipping
    of the gradients' norm, which the paper does not have. Needs memory for one more copy of the parameters in a step.
    """

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr, eps=1e-6, fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = _evaluated(closure)
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for group in self.param_groups:
            weights: list[Tensor] = []
            gradients: list[Tensor] = []
            means: list[Tensor] = []
            squares: list[Tensor] = []
            steps: list[Tensor] = []
            self._init_group(group, weights, gradients, means, squares, [], steps)
            if not weights:
                continue
            # A step of rate 1 from 0 is the direction, with its sign turned.
            turned = [torch.zeros_like(w) for w in weights]
            adam(
                turned,
                [in_layout_of(w, g) for w, g in zip(weights, gradients, strict=True)],
                means,
                squares,
                [],
                steps,
                fused=True,
                grad_scale=scale,
                found_inf=found_inf,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=1.0,
                weight_decay=0.0,
                eps=group["eps"],
                maximize=False,
            )
            if group["decay"]:
                torch._foreach_add_(turned, weights, alpha=-group["decay"])
            if group["adapt"]:
                norms, updates = (torch.stack(torch._foreach_norm(some)) for some in (weights, turned))
                ratio = torch.where((norms > 0) & (updates > 0), norms / updates, torch.ones_like(norms))
                torch._foreach_mul_(turned, list(ratio.unbind()))
            torch._fused_sgd_(
                weights,
                turned,
                [],
                weight_decay=0.0,
                momentum=0.0,
                lr=-group["lr"],
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
                found_inf=found_inf,
            )
        return loss


def _evaluated(closure: Any) -> Any:
    """What torch's optimizers return of a step: the loss that `closure` computes anew, if one is given."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def block_size(device: torch.device) -> int:
    """The most numbers of a block: on a CPU what its caches hold of three kinds, on a GPU any number.

    A GPU's time goes with launches and with memory that no cache of its own holds, so there a group is one block.
    """
    return 2**19 * torch.get_num_threads() if device.type == "cpu" else 2**62


def in_layout_of(weight: Tensor, gradient: Tensor) -> Tensor:
    """The gradient, or a copy where it does not lie in memory as the weight does: fused kernels go by addresses alone."""
    if gradient.stride() == weight.stride():
        return gradient
    strides = zip(weight.shape, weight.stride(), gradient.stride(), strict=True)
    same = all(one == other or size == 1 for size, one, other in strides)
    return gradient if same else torch.empty_like(weight).copy_(gradient)


def _joined(norms: list[list[Tensor]]) -> Tensor:
    """Norms of whole tensors, (T,), from those of their pieces."""
    return torch.stack([one[0] if len(one) == 1 else torch.linalg.vector_norm(torch.stack(one)) for one in norms])


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
        if options.name in ("lars", "larc", "lamb") and options.backend == "torch":
            built.append({**kept, "lr": base, "decay": decay, "adapt": group["adapt"] or not options.exclude_1d})
        else:
            built.append({**kept, "lr": base, "weight_decay": decay})
    built = [group for group in built if group["params"]]
    if options.backend == "apex":
        return _apex(built, options)
    optimizer: torch.optim.Optimizer
    if options.name in ("lars", "larc"):
        kind = LARS if options.name == "lars" else LARC
        optimizer = kind(built, options.learning_rate, options.momentum, options.trust_coefficient)
    elif options.name == "sgd":
        nesterov = options.nesterov
        optimizer = torch.optim.SGD(built, options.learning_rate, options.momentum, nesterov=nesterov, fused=True)
    elif options.name == "adam":
        optimizer = torch.optim.Adam(built, options.learning_rate, fused=True)
    elif options.name == "lamb":
        optimizer = LAMB(built, options.learning_rate)
    else:
        optimizer = torch.optim.AdamW(built, options.learning_rate, fused=True)
    if isinstance(optimizer, torch.optim.SGD) and options.momentum:
        # torch's fused kernel makes the buffer in the first step, and leaves it uninitialised if that step is skipped.
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def require_backend(options: Options) -> None:
    """Raises BadInput with the way out where `options.backend` cannot be had on this machine. Imports nothing."""
    if options.backend == "torch":
        return
    way_out = (
        "`APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation git+https://github.com/NVIDIA/apex`, or take "
        "optim.backend=torch"
    )
    if not torch.cuda.is_available():
        raise BadInput("optim.backend = apex needs a GPU with CUDA and torch sees none: take optim.backend=torch")
    found = find_spec("apex")
    if found is None:
        raise BadInput(f"optim.backend = apex and NVIDIA apex is not installed: {way_out}")
    if PathFinder.find_spec("apex.optimizers", found.submodule_search_locations or []) is None:
        raise BadInput(
            "optim.backend = apex and the installed package apex is PyPI's, which is not NVIDIA's: `pip uninstall apex`, "
            f"then {way_out}"
        )
    if find_spec("amp_C") is None:
        raise BadInput(f"optim.backend = apex and the installed apex was built without its CUDA kernels: {way_out}")


def _apex(groups: list[dict[str, Any]], options: Options) -> torch.optim.Optimizer:
    """An optimizer of NVIDIA apex that leaves a step out by `found_inf`, on the device, as torch's fused ones do.

    Only those of its kernels that ask a flag are taken: of Adam the capturable one, of LAMB FusedMixedPrecisionLamb's
    (FusedLAMB's asks nothing), without clipping. These keep rate and number of steps on the device.
    Source of the interface: NVIDIA/apex apex/optimizers, csrc/multi_tensor_{sgd_kernel,adam,lamb_mp}.cu.
    """
    require_backend(options)
    try:
        from apex import optimizers
    except Exception as error:  # built against another torch, say
        raise BadInput(f"apex cannot be imported ({error}): build it anew, or take optim.backend=torch") from error
    optimizer: torch.optim.Optimizer
    if options.name == "sgd":
        optimizer = optimizers.FusedSGD(
            groups, options.learning_rate, momentum=options.momentum, nesterov=options.nesterov
        )
        moments = ["momentum_buffer"]
    else:
        bare = [{key: value for key, value in group.items() if key != "lr"} for group in groups]
        if options.name == "lamb":
            optimizer = optimizers.FusedMixedPrecisionLamb(bare, options.learning_rate, max_grad_norm=math.inf)
        else:
            decoupled = options.name == "adamw"
            optimizer = optimizers.FusedAdam(bare, options.learning_rate, adam_w_mode=decoupled, capturable=True)
        moments = ["exp_avg", "exp_avg_sq"]
        for group in optimizer.param_groups:
            device = group["params"][0].device
            group["lr"] = torch.tensor(group["base_lr"], dtype=torch.float32, device=device)
            # FusedAdam would begin with 1, even where the first step is left out.
            group["step"] = torch.zeros(1, dtype=torch.int, device=device)
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p].update({name: torch.zeros_like(p) for name in moments})
    optimizer.register_step_pre_hook(_hand_over)
    return optimizer


class _Verdict:
    """What apex's optimizers ask of a GradScaler: gradients that are unscaled already, and whether they are finite."""

    def __init__(self, found_inf: Tensor) -> None:
        self.found_inf = found_inf

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[torch.device, Tensor]:
        return {self.found_inf.device: self.found_inf}

    def _get_scale_async(self) -> Tensor:
        return torch.ones_like(self.found_inf)


def _hand_over(optimizer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give apex's optimizer, which is about to step, `found_inf`.

    Kernels ask the flag. Adam and LAMB set it themselves by what they are handed, but Adam only after it has counted the
    step of its first group.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is None:
        found_inf = torch.zeros((), device=optimizer.param_groups[0]["params"][0].device)
    optimizer._dummy_overflow_buf.copy_(found_inf)
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        kwargs = {**kwargs, "grad_scaler": _Verdict(found_inf)}
    return args, kwargs


def load(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put a saved state back, each tensor in the layout of its parameter.

    torch loads any state, and its fused kernels take sizes from the parameter: another one's would be read and written
    beyond its end. Raises BadInput where the state does not fit.
    """
    try:
        difference = misfit(optimizer, state)
        if not difference:
            kept = [{key: x for key, x in group.items() if isinstance(x, Tensor)} for group in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, own in zip(optimizer.param_groups, kept, strict=True):
                for name, x in own.items():  # apex's, on the device
                    group[name] = x.copy_(group[name])
            for p, values in optimizer.state.items():
                for name, value in values.items():
                    values[name] = torch.empty_like(value if name == "step" else p).copy_(value)
    except Exception as error:  # many types, on what is no state of an optimizer
        difference = f"it is no state of an optimizer ({error})"
    if difference:
        raise BadInput(f"the checkpoint does not fit the config's optimizer: {difference}; name another --output")


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Put factor * base rate into every scheduled group; returns the rate of each group by name."""
    rates = {}
    for group in optimizer.param_groups:
        rate = rates[group["name"]] = group["base_lr"] * (factor if group["scheduled"] else 1.0)
        if isinstance(group["lr"], Tensor):  # apex's, on the device
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    return rates


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
