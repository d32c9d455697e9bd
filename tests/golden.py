"""The authors' own values: tests/data/golden.json, produced by running the official code at the named commits."""

from __future__ import annotations

import json
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


def assert_gradient(gradient: Tensor, summary: dict[str, Any], rtol: float = 1e-7) -> None:
    """A gradient against its summary of norm, sum and some elements."""
    flat = gradient.detach().numpy().ravel()
    close = {"rtol": rtol, "atol": 1e-12}
    np.testing.assert_allclose(np.linalg.norm(flat), summary["l2"], **close)
    np.testing.assert_allclose(flat.sum(), summary["sum"], rtol=rtol, atol=1e-10)
    np.testing.assert_allclose(flat[:8], summary["first8"], **close)
    np.testing.assert_allclose(flat[-4:], summary["last4"], **close)
