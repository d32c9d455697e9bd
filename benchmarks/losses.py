"""Time and memory of NT-Xent, Barlow Twins' loss and VICReg's, forward and backward, beside others' formulas.

    python benchmarks/losses.py

fp32 on one rank; inputs are random, two views that are near to each other. The others' are written down from what they
publish: lightly-ai/lightly lightly/loss/ntx_ent_loss.py, facebookresearch/barlowtwins main.py, facebookresearch/vicreg
main_vicreg.py. Values and gradients are compared before anything is measured. Memory is what is held beyond the inputs, in a
process of its own. Of a rank of a large group the work is done on candidates that are given, so that no group is needed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline import distributed
from ssl_pipeline.methods.barlow_twins import barlow_twins_loss
from ssl_pipeline.methods.simclr import exponential_sums, nt_xent_gradient, nt_xent_loss
from ssl_pipeline.methods.vicreg import vicreg_loss

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TEMPERATURE = 0.1
CANDIDATES = 2 * 32_768
"""Of a global batch of 32,768."""


# ------------------------------------------------------------------------------------------------------------- theirs
def lightly_nt_xent(z1: Tensor, z2: Tensor) -> Tensor:
    """All similarities at once, the diagonals cut out by a mask."""
    one, two = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    rows = len(one)
    off = ~torch.eye(rows, dtype=torch.bool, device=one.device)
    in_one, in_two = ((z @ z.T / TEMPERATURE)[off].view(rows, -1) for z in (one, two))
    across, back = one @ two.T / TEMPERATURE, two @ one.T / TEMPERATURE
    logits = torch.cat([torch.cat([across, in_one], dim=1), torch.cat([back, in_two], dim=1)])
    return F.cross_entropy(logits, torch.arange(rows, device=one.device).repeat(2))


def off_diagonal(matrix: Tensor) -> Tensor:
    """All elements but the diagonal, as the official codes take them."""
    side = len(matrix)
    return matrix.flatten()[:-1].view(side - 1, side + 1)[:, 1:].flatten()


def official_barlow_twins(z1: Tensor, z2: Tensor) -> Tensor:
    """Batch norm without affine, the whole correlation matrix, squared in place."""
    one, two = (F.batch_norm(z, None, None, training=True) for z in (z1, z2))
    c = (one.T @ two).div_(len(z1))
    on = c.diagonal().add_(-1).pow_(2).sum()
    return on + 0.0051 * off_diagonal(c).pow_(2).sum()


def official_vicreg(z1: Tensor, z2: Tensor) -> Tensor:
    """Both whole covariance matrices."""
    invariance = F.mse_loss(z1, z2)
    one, two = (z - z.mean(dim=0) for z in (z1, z2))
    spread = sum(F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean() / 2 for z in (one, two))
    covariance = sum(off_diagonal(z.T @ z / (len(z) - 1)).pow_(2).sum() / z.shape[1] for z in (one, two))
    return 25 * invariance + 25 * spread + covariance


# -------------------------------------------------------------------------------------------------------------- in turn
Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, tuple[tuple[int, int], Loss]] = {
    "nt_xent ours": ((4096, 128), lambda a, b: nt_xent_loss(a, b, TEMPERATURE)),
    "nt_xent theirs": ((4096, 128), lightly_nt_xent),
    "barlow_twins ours": ((256, 8192), lambda a, b: barlow_twins_loss(a, b, 0.0051)),
    "barlow_twins theirs": ((256, 8192), official_barlow_twins),
    "vicreg ours": ((256, 8192), lambda a, b: vicreg_loss(a, b, 25, 25, 1)[0]),
    "vicreg theirs": ((256, 8192), official_vicreg),
}
RANKS = {"512 anchors": 512, "8192 anchors": 8192}


def action(name: str) -> Callable[[], Tensor]:
    """Forward and backward of a loss, which returns its value and leaves the gradients in the inputs; or a rank's work."""
    generator = torch.Generator().manual_seed(0)
    if name in RANKS:
        return lambda: a_rank(RANKS[name], generator)
    shape, loss = LOSSES[name]
    base = torch.randn(shape, generator=generator)
    views = [(base + 0.5 * torch.randn(shape, generator=generator)).to(DEVICE).requires_grad_() for _ in range(2)]

    def both_ways() -> Tensor:
        for view in views:
            view.grad = None
        value = loss(*views)
        value.backward()
        return value.detach()

    both_ways.views = views  # type: ignore[attr-defined]
    return both_ways


def a_rank(own: int, generator: torch.Generator) -> Tensor:
    """What NT-Xent asks of a rank with so many anchors among CANDIDATES: sums, then the gradient. All hold its sums here."""
    candidates = F.normalize(torch.randn(CANDIDATES, 128, generator=generator), dim=1).to(DEVICE)
    sums = exponential_sums(candidates, own, TEMPERATURE)
    return nt_xent_gradient(candidates, sums.repeat(CANDIDATES // own), own, TEMPERATURE)


def require_equal(method: str) -> None:
    """Raises AssertionError where our value or gradients are not theirs."""
    found = []
    for whose in ("ours", "theirs"):
        act = action(f"{method} {whose}")
        found.append([act(), *(view.grad for view in act.views)])  # type: ignore[attr-defined]
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), method


def peak(name: str) -> int:
    """Bytes that an action holds at most, in a process of its own."""
    command = [sys.executable, __file__, "--peak", name]
    environment = os.environ | measure.FREED_AT_ONCE
    return int(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def print_peak(name: str) -> None:
    """The other side of `peak`."""
    distributed.start()
    torch.randn(64, 64, device=DEVICE).requires_grad_().square().mm(torch.eye(64, device=DEVICE)).sum().backward()
    print(measure.peak_bytes(action(name)))
    distributed.stop()


def rows() -> list[measure.Row]:
    distributed.start()
    found = []
    for method, what, peer, rounds, most_time, most_memory in (
        ("nt_xent", "NT-Xent, 2N = 8192, K = 128", "lightly", 3, 0.5, 0.2),
        ("barlow_twins", "Barlow Twins, N = 256, K = 8192", "facebookresearch/barlowtwins", 3, 0.1, None),
        ("vicreg", "VICReg, N = 256, K = 8192", "facebookresearch/vicreg", 1, None, None),
    ):
        require_equal(method)
        names = [f"{method} {whose}" for whose in ("ours", "theirs")]
        seconds = measure.interleaved({name: action(name) for name in names}, rounds)
        found.append(measure.ratio(f"{what}: time", *(seconds[name] for name in names), peer, most_time))
        memory = [[peak(name)] for name in names]
        found.append(measure.ratio(f"{what}: memory", memory[0], memory[1], peer, most_memory, "MB"))
    for name in RANKS:
        start = time.perf_counter()
        megabytes = peak(name) / 1e6
        detail = f"{time.perf_counter() - start:.0f} s with the start of the process"
        what = f"NT-Xent, {name} of a rank, {CANDIDATES} candidates of all, K = 128: memory"
        found.append(measure.measured(what, [megabytes], "MB", 1000, detail))
    distributed.stop()
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print_peak(sys.argv[2])
    else:
        measure.main(__doc__, rows)
