"""A step of the optimizers and of the moving average, beside those of others.

ResNet-50, alone and with Barlow Twins' head of 8192-8192-8192, fp32, made-up gradients. Before anything is timed a step of
both contenders, from the same weights, is compared.

- LARS, LARC: timm.optim.lars.Lars, whose arithmetic is LARC's, and at this weight decay LARS's but for a part in 10^8.
- SGD: torch.optim.SGD as it is by default.
- The moving average: the loop over parameters of lucidrains/byol-pytorch (byol_pytorch.py:update_moving_average) and
  htdt/self-supervised (methods/byol.py), and torch's multi-tensor lerp by a weight on the device.
- Passes: the step's time over that of reading or writing every weight once, which is a third of `a += b`'s. (A copy is no
  measure on a CPU, which reads what it is about to write.) A step of LARS cannot do with fewer than 7: gradient and weight
  are read for the norms, and again, with the momentum, for the update, which writes two. A moving average has 3.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import measure
import timm
import torch
from measure import Row
from timm.optim.lars import Lars
from torch import Tensor, nn

from ssl_pipeline import optim
from ssl_pipeline.methods._momentum import follow

ROUNDS = 7
OPTIONS = {"learning_rate": 0.2, "weight_decay": 1e-6, "momentum": 0.9}


def network(head: bool) -> nn.Module:
    """ResNet-50, with Barlow Twins' projector behind it or alone."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [timm.create_model("resnet50", num_classes=0)]
    for width in (2048, 8192, 8192) if head else ():
        layers += [nn.Linear(width, 8192, bias=False), nn.BatchNorm1d(8192)]
    return nn.Sequential(*layers).to("cuda" if torch.cuda.is_available() else "cpu")


def split(parameters: list[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Weights; biases and norms."""
    return [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]


def ours(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    matrices, vectors = split(parameters)
    groups = [
        {"params": matrices, "name": "matrices", "decay": True, "adapt": True, "lr": "scheduled"},
        {"params": vectors, "name": "vectors", "decay": False, "adapt": False, "lr": "scheduled"},
    ]
    optimizer = optim.build(groups, optim.Options(name=name, **OPTIONS), 256)  # type: ignore[arg-type]
    flag = torch.zeros((), device=parameters[0].device)
    optimizer.grad_scale, optimizer.found_inf = None, flag  # type: ignore[attr-defined]
    return optimizer


def theirs(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    matrices, vectors = split(parameters)
    kind: Any = torch.optim.SGD if name == "sgd" else Lars
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return kind(groups, lr=OPTIONS["learning_rate"], momentum=0.9, weight_decay=OPTIONS["weight_decay"])


def require_same(build: Callable[[list[nn.Parameter]], torch.optim.Optimizer], other: Any, parameters: Any) -> None:
    """Raises AssertionError where one step of both, from here, gives weights that differ by more than 1e-6."""
    found = []
    kept = [(p.detach().clone(), p.grad.clone()) for p in parameters]
    for one in (build, other):
        one(parameters).step()
        found.append([p.detach().clone() for p in parameters])
        with torch.no_grad():
            for p, (weight, gradient) in zip(parameters, kept, strict=True):
                p.copy_(weight)
                p.grad.copy_(gradient)
    for a, b, (weight, _) in zip(*found, kept, strict=True):
        assert float((a - b).abs().max()) <= 1e-6 * max(1.0, float(weight.abs().max()))
    assert any(not torch.equal(a, weight) for a, (weight, _) in zip(found[0], kept, strict=True))


@torch.no_grad()
def peers_average(target: nn.Module, online: nn.Module, weight: float) -> None:
    for p, q in zip(target.parameters(), online.parameters(), strict=True):
        p.data = p.data * (1 - weight) + q.data * weight


@torch.no_grad()
def lerp(target: nn.Module, online: nn.Module, weight: Tensor) -> None:
    followers = list(target.parameters())
    torch._foreach_lerp_(followers, list(online.parameters()), [weight] * len(followers))


def require_same_average(online: nn.Module) -> None:
    """Raises AssertionError where the ways move a target, an eighth towards `online`, to places that differ by a rounding."""
    started = copy.deepcopy(online)
    with torch.no_grad():
        for p in started.parameters():
            p.mul_(0.5)
    weight = torch.tensor(0.125, device=next(online.parameters()).device)
    expected = copy.deepcopy(started)
    peers_average(expected, online, 0.125)
    for way in (lambda target: follow([target], [online], weight), lambda target: lerp(target, online, weight)):
        target = copy.deepcopy(started)
        way(target)
        torch.testing.assert_close(list(target.parameters()), list(expected.parameters()), rtol=1e-5, atol=1e-7)
        del target


def rows() -> list[Row]:
    found = []
    for head, where, bound in ((False, "ResNet-50", None), (True, "ResNet-50 with an 8192-8192-8192 head", 0.65)):
        online = network(head)
        parameters = list(online.parameters())
        for p in parameters:
            p.grad = torch.randn_like(p) * 1e-3
        for name in ("lars", "larc", "sgd"):
            require_same(partial(ours, name), partial(theirs, name), parameters)
        steps: dict[str, Callable[[], object]] = {name: ours(name, parameters).step for name in ("lars", "larc", "sgd")}
        steps |= {"timm's Lars": theirs("lars", parameters).step, "torch's SGD": theirs("sgd", parameters).step}
        # Not zeros, whose pages a CPU is not given before it writes to them.
        flat = torch.ones(sum(p.numel() for p in parameters), device=parameters[0].device)
        steps["a += b"] = partial(flat.add_, torch.ones_like(flat))
        seconds = measure.interleaved(steps, ROUNDS)
        pass_ = statistics.median(seconds["a += b"]) / 3
        gigabytes = flat.numel() * flat.element_size() / 1e9
        found += [
            measure.ratio(f"a step of LARS, {where}", seconds["lars"], seconds["timm's Lars"], "timm's Lars", bound),
            measure.ratio(f"a step of LARC, {where}", seconds["larc"], seconds["timm's Lars"], "timm's Lars", None),
            measure.ratio(f"a step of SGD, {where}", seconds["sgd"], seconds["torch's SGD"], "torch's SGD", None),
            measure.measured(
                f"a step of LARS, {where}: passes over memory", [s / pass_ for s in seconds["lars"]], "passes", None,
                f"limit 7; a pass is {pass_ * 1e3:.3g} ms, {gigabytes / pass_:.3g} GB/s",
            ),
        ]  # fmt: skip
        del steps, flat  # a gigabyte and more
        for p in parameters:
            p.grad = None
        require_same_average(online)
        target, weight = copy.deepcopy(online), torch.tensor(0.004, device=parameters[0].device)
        seconds = measure.interleaved(
            {
                "ours": partial(follow, [target], [online], weight),
                "lerp": partial(lerp, target, online, weight),
                "loop": partial(peers_average, target, online, 0.004),
            },
            ROUNDS,
        )
        found += [
            measure.ratio(f"moving average, {where}", seconds["ours"], seconds["loop"], "the peers' loop", None),
            measure.ratio(f"moving average, {where}, beside a lerp", seconds["ours"], seconds["lerp"], "torch's lerp", None),
            measure.measured(
                f"moving average, {where}: passes over memory", [s / pass_ for s in seconds["ours"]], "passes", None, "limit 3"
            ),
        ]  # fmt: skip
    return found


if __name__ == "__main__":
    measure.main(__doc__, rows)
