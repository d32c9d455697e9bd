"""The authors' own values: tests/data/golden.json, produced by running the official code at the named commits."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PATH = Path(__file__).parent / "data" / "golden.json"


@cache
def entries() -> dict[str, dict[str, Any]]:
    return {entry["id"]: entry for entry in json.loads(PATH.read_text())["entries"]}


def select(prefix: str) -> list[str]:
    return [name for name in entries() if name.startswith(prefix)]


def views(entry: dict[str, Any]) -> list[Tensor]:
    """The inputs of an entry, drawn by its recipe and compared with its check."""
    recipe = entry["inputs"]["recipe"]
    rng = np.random.default_rng(recipe["seed"])
    draws = [rng.standard_normal((recipe["N"], recipe["D"])) for _ in range(recipe["V"])]
    scale, shift = np.linspace(*recipe["scale"], recipe["D"]), np.linspace(*recipe["shift"], recipe["D"])
    rho = recipe["rho"]
    made = [draws[0] * scale + shift]
    made += [(rho * draws[0] + np.sqrt(1 - rho**2) * other) * scale + shift for other in draws[1:]]
    for array, check in zip(made, entry["inputs"].get("check", [{}] * len(made)), strict=True):
        if not check:  # the distributed entries share a recipe that others check
            continue
        assert list(array.shape) == check["shape"]
        np.testing.assert_allclose(array.sum(), check["sum"], rtol=1e-10)
        np.testing.assert_allclose(array.ravel()[:2], check["first"], rtol=1e-12)
    return [torch.from_numpy(array).requires_grad_() for array in made]


def permutations(entry: dict[str, Any]) -> Tensor:
    """The permutations of the batch that an entry's `perm_recipe` names, (iterations, N)."""
    inputs = entry["inputs"]
    (seed,) = re.findall(r"default_rng\((\d+)\); one rng.permutation\(N\) per iteration", inputs["perm_recipe"])
    rng = np.random.default_rng(int(seed))
    orders = np.stack([rng.permutation(inputs["recipe"]["N"]) for _ in range(entry["hyper"]["w_iter"])])
    assert orders[0, :6].tolist() == inputs["perm0_first"]
    return torch.from_numpy(orders)


def fourier(entry: dict[str, Any]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Two draws of Fourier features, weight (F, D) and offset (F,), and the places of two samples, (2, V, 256)."""
    inputs, count = entry["inputs"], entry["hyper"]["num_rff_features"]
    shape = inputs["recipe"]
    (seed,) = re.findall(r"rng=default_rng\((\d+)\); for set 1 then set 2: amp=", inputs["rff_recipe"])
    rng = np.random.default_rng(int(seed))
    draws = []
    for _ in range(2):
        amplitude = rng.uniform(0.1, 10, (count, 1))
        directions = rng.standard_normal((count, shape["D"]))
        weight = directions / np.linalg.norm(directions, axis=1, keepdims=True) * amplitude
        draws.append((torch.from_numpy(weight), torch.from_numpy(2 * np.pi * rng.uniform(0, 1, (1, count))[0])))
    places = np.stack([rng.integers(0, shape["N"], 256) for _ in range(8)])
    return draws, torch.from_numpy(places).view(2, 4, 256)


def assert_gradient(gradient: Tensor, summary: dict[str, Any], rtol: float = 1e-7) -> None:
    """A gradient against its summary of norm, sum and some elements."""
    flat = gradient.detach().numpy().ravel()
    close = {"rtol": rtol, "atol": 1e-12}
    np.testing.assert_allclose(np.linalg.norm(flat), summary["l2"], **close)
    np.testing.assert_allclose(flat.sum(), summary["sum"], rtol=rtol, atol=1e-10)
    np.testing.assert_allclose(flat[:8], summary["first8"], **close)
    np.testing.assert_allclose(flat[-4:], summary["last4"], **close)
