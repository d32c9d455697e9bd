"""The moving average of BYOL's target and of SSL-HSIC's backbone."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_pipeline.methods._momentum import follow


def pair(layout: torch.memory_format, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Two networks of one shape and other weights."""
    torch.manual_seed(0)
    online = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 7, 1), nn.BatchNorm2d(7), nn.Linear(7, 301))
    target = copy.deepcopy(online)
    for p in target.parameters():
        nn.init.normal_(p)
    return online.to(dtype, memory_format=layout), target.to(dtype, memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_follow_is_the_published_loop(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """As in lucidrains/byol-pytorch byol_pytorch.py:EMA and htdt/self-supervised methods/byol.py."""
    online, target = pair(layout, dtype)
    tau = 0.75  # exact in any precision
    expected = [p * tau + q * (1 - tau) for p, q in zip(target.parameters(), online.parameters(), strict=True)]
    leaders = copy.deepcopy(online.state_dict())
    follow([target], [online], torch.tensor(1 - tau))
    tolerance = {"rtol": 1e-14, "atol": 1e-15} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(list(target.parameters()), expected, **tolerance)
    assert all(torch.equal(value, leaders[key]) for key, value in online.state_dict().items())


def test_with_weight_0_not_a_bit_changes() -> None:
    online, target = pair(torch.contiguous_format, torch.float32)
    with torch.no_grad():
        next(target.parameters()).view(-1)[:3] = torch.tensor([-0.0, 0.0, -0.0])
        next(online.parameters()).view(-1)[:4] = torch.tensor([1.0, -1.0, -1.0, float("nan")])
    before = [p.detach().clone().view(torch.int32) for p in target.parameters()]
    follow([target], [online], torch.tensor(0.0))
    after = [p.detach().view(torch.int32) for p in target.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_one_kernel_moves_all_tensors() -> None:
    online, target = pair(torch.contiguous_format, torch.float32)
    called: list[str] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    weight = torch.tensor(0.5)
    with Calls():
        follow([target], [online], weight)
    assert [name for name in called if name != "detach"] == ["neg", "eq", "_to_copy", "_fused_sgd_"]
