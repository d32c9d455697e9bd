"""The interface of NVIDIA/apex apex/optimizers (commit 6424da3): signatures, state, what lies on the device, who asks which
flag, and that FusedAdam counts the step of its first group before it sets the flag."""

from typing import Any

import torch
from torch import Tensor


class FusedSGD(torch.optim.Optimizer):
    """Its kernel does nothing where `_dummy_overflow_buf` is not 0."""

    def __init__(
        self,
        params: Any,
        lr: Any = None,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        wd_after_momentum: bool = False,
        materialize_master_grads: bool = True,
        set_grad_none: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults)
        self._dummy_overflow_buf = torch.tensor([0], dtype=torch.int)

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            assert isinstance(rate, float)
            trained = [p for p in group["params"] if p.grad is not None]
            first = bool(trained) and "momentum_buffer" not in self.state[trained[-1]]
            for p in trained:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p.data))
                if self._dummy_overflow_buf.item():
                    continue
                change = p.grad + group["weight_decay"] * p.data
                if momentum:
                    buffer.copy_(change if first else momentum * buffer + (1 - group["dampening"]) * change)
                    change = change + momentum * buffer if group["nesterov"] else buffer
                p.data -= rate * change


class FusedAdam(torch.optim.Optimizer):
    """Its kernel asks the flag only where it is capturable."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        rate = torch.tensor(lr, dtype=torch.float32) if capturable else lr
        defaults = {
            "lr": rate,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.adam_w_mode, self.capturable = adam_w_mode, capturable
        if capturable:
            for group in self.param_groups:
                group["lr"] = group["lr"].to(device=group["params"][0].device)
            self._step_supports_amp_scaling = True
        self._dummy_overflow_buf = torch.tensor([0], dtype=torch.int)

    def step(
        self,
        closure: Any = None,
        grads: Any = None,
        output_params: Any = None,
        scale: Any = None,
        grad_norms: Any = None,
        grad_scaler: Any = None,
    ) -> None:
        for group in self.param_groups:
            device = group["params"][0].device
            if "step" in group:
                group["step"] += (self._dummy_overflow_buf != 1).to(torch.int) if self.capturable else 1
            else:
                group["step"] = torch.tensor([1], dtype=torch.int, device=device) if self.capturable else 1
            flag, inverse = torch.zeros(1), torch.ones(1)
            if self.capturable:
                if grad_scaler is not None:
                    flag = grad_scaler._check_inf_per_device(self)[device]
                    inverse = grad_scaler._get_scale_async().double().reciprocal().float()
                self._dummy_overflow_buf.copy_(flag)
                assert isinstance(group["lr"], Tensor)
                assert (group["lr"].dtype, group["step"].dtype) == (torch.float32, torch.int)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"] = torch.zeros_like(p.data).float()
                    state["exp_avg_sq"] = torch.zeros_like(p.data).float()
                if self.capturable and self._dummy_overflow_buf.item() == 1:
                    continue
                direction = _direction(p, p.grad * inverse, state, group, decoupled=self.adam_w_mode)
                p.data -= group["lr"] * direction


class FusedMixedPrecisionLamb(torch.optim.Optimizer):
    """All of its kernels ask the flag. A group's own rate is lost when it is built."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        step: int = 0,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        grad_averaging: bool = True,
        max_grad_norm: float = 1.0,
        use_nvlamb: bool = False,
        reduced_precision_dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {
            "lr": torch.tensor(lr, dtype=torch.float32),
            "step": torch.tensor([step], dtype=torch.int),
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "grad_averaging": grad_averaging,
            "max_grad_norm": max_grad_norm,
        }
        super().__init__(params, defaults)
        self._dummy_overflow_buf = torch.tensor([0], dtype=torch.int)
        self._step_supports_amp_scaling = True
        self.adam_w_mode, self.use_nvlamb = adam_w_mode, use_nvlamb

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for name, default in self.defaults.items():
            if isinstance(default, Tensor):
                self.param_groups[-1][name] = default.clone()

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:
        device = self.param_groups[0]["params"][0].device
        flag, scale = torch.zeros(1), torch.ones(1)
        if grad_scaler is not None:
            flag, scale = grad_scaler._check_inf_per_device(self)[device], grad_scaler._get_scale_async()
        self._dummy_overflow_buf.copy_(flag)
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm, most = torch.stack([g.norm() for g in gradients]).norm(), self.defaults["max_grad_norm"] * scale
        clip = norm / most if norm > most else torch.ones(1)
        for group in self.param_groups:
            assert (group["lr"].dtype, group["step"].dtype) == (torch.float32, torch.int)
            group["step"] += (self._dummy_overflow_buf != 1).to(torch.int)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p.data), torch.zeros_like(p.data)
                if self._dummy_overflow_buf.item():
                    continue
                direction = _direction(p, p.grad / scale / clip, state, group, decoupled=self.adam_w_mode)
                factor = p.norm() / direction.norm()
                adapted = (self.use_nvlamb or group["weight_decay"]) and 0 < factor < float("inf")
                p.data -= group["lr"] * (factor if adapted else 1) * direction


def _direction(p: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any], decoupled: bool) -> Tensor:
    """Adam's, with the decay in the gradient or beside it."""
    (beta1, beta2), step, decay = group["betas"], int(group["step"]), group["weight_decay"] * p.data
    gradient = gradient if decoupled else gradient + decay
    state["exp_avg"].copy_(beta1 * state["exp_avg"] + (1 - beta1) * gradient)
    state["exp_avg_sq"].copy_(beta2 * state["exp_avg_sq"] + (1 - beta2) * gradient**2)
    mean, square = state["exp_avg"] / (1 - beta1**step), state["exp_avg_sq"] / (1 - beta2**step)
    direction = mean / (square.sqrt() + group["eps"])
    return direction + decay if decoupled else direction
