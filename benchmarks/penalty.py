"""What SparseHead's penalty costs: forward and backward of ||W||_{2,1} over the last layer of an 8192-8192-8192 head.

The peer is the formula as one writes it, W.square().sum(0).sqrt().sum(), by autograd. The machine's limit is two readings
of W and one writing of its gradient.
"""

from __future__ import annotations

import measure
import torch
from measure import Row
from torch import Tensor

from ssl_pipeline import sparse_head

WIDTH = 8192


def rows() -> list[Row]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    layer = torch.nn.Linear(WIDTH, WIDTH, bias=False, device=device)
    own = sparse_head.SparseHead(sparse_head.Options(weight=1e-4))
    other = torch.empty_like(layer.weight)

    def ours() -> Tensor:
        layer.weight.grad = None
        value = own.penalty([layer], 0.0)
        value.backward()
        return value.detach()

    def formula() -> Tensor:
        layer.weight.grad = None
        value = 1e-4 * layer.weight.square().sum(dim=0).sqrt().sum()
        value.backward()
        return value.detach()

    def passes() -> None:
        with torch.no_grad():
            other.copy_(layer.weight)
            torch.sum(other)

    found = [(action(), layer.weight.grad) for action in (ours, formula)]
    torch.testing.assert_close(*found)
    seconds = measure.interleaved({"ours": ours, "formula": formula, "passes": passes}, rounds=7)
    what = f"SparseHead of a {WIDTH} x {WIDTH} layer, forward and backward"
    return [
        measure.ratio(what, seconds["ours"], seconds["formula"], "the formula by autograd", 1.0),
        measure.ratio(
            f"{what}, beside the limit", seconds["ours"], seconds["passes"], "a copy and a sum of W, the limit", None
        ),
    ]


if __name__ == "__main__":
    measure.main(__doc__, rows)
