"""The products of all pairs of columns over the global batch, which Barlow Twins and VICReg drive to zero."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_pipeline import distributed
from ssl_pipeline.methods import with_gradients


def column_products(x: Tensor, y: Tensor, divisor: float) -> tuple[Tensor, Tensor]:
    """Of C = X^T Y / divisor (K, K): its diagonal, (K,), and sum_{i != j} C_ij^2, (), the same on every rank.

    X and Y (B, K) are the global batch, of which each rank gives its rows x, y (N, K); y may be x itself. What comes in to
    backward must be equal on all ranks.

    Where the batch is under half the dimension C is never made: ||X^T Y||_F^2 = sum((X X^T) * (Y Y^T)), of which each rank
    makes its own rows (N, B); what travels is the batch and not C. The diagonal is then taken out by subtraction, which
    costs a bit at most: of rank B - 1 and with equal numbers on its diagonal, C has squares that sum to more than twice the
    diagonal's. Where few columns hold all variance, as in a collapse, squares that are small beside the diagonal's are lost
    in rounding. Of a larger batch C may be near to the identity; it is made, and its diagonal zeroed. Where the user lets
    torch round the factors of products (TF32), these are so rounded; all sums, and the diagonal, are in the precision of x.
    """
    world = distributed.world_size()
    diagonal = distributed.global_sum((x * y).sum(dim=0)) / divisor
    inputs = [x] if y is x else [x, y]
    with torch.no_grad():
        if 2 * len(x) * world < x.shape[1]:
            whole = [distributed.gather_values(part).flatten(0, 1) for part in inputs]
            grams = [part @ rows.T for part, rows in zip(inputs, whole, strict=True)]
            total = distributed.global_sum((grams[0] * grams[-1]).sum()) / divisor**2
            squares = (total - diagonal.square().sum()).clamp(min=0)  # NaN stays
            # y C^T and x C, without the diagonal's part.
            halves = [
                (gram @ rows / divisor).sub_(other * diagonal)
                for gram, rows, other in zip(grams[::-1], whole, [y, x][: len(inputs)], strict=True)
            ]
        else:
            products = distributed.global_sum((x.T @ y).div_(divisor)).fill_diagonal_(0)
            squares = torch.linalg.vector_norm(products, dim=1).square().sum()  # no second matrix, and sums of sums
            halves = [y @ products.T, x @ products][: len(inputs)]
        # Of both factors: where x is y, they are one.
        gradients = [half.mul_(4 * world / (len(inputs) * divisor)) for half in halves]
    return diagonal, with_gradients(squares, inputs, gradients)
