"""What the tests of a GPU share. Each runs on the CPU too, where there is no GPU: so it is known to run at all.

They need torch, pytest and what the package needs, but neither scikit-learn nor DALI (tests/gpu/test_views.py skips
without it): `python -m pytest --confcutdir=tests/gpu tests/gpu`, which is what `make gpu-check` does, leaves
tests/conftest.py out.
"""

from __future__ import annotations

import os

# Before CUDA starts: without it cuBLAS may sum in another order in another run (docs/gpu.md).
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_pipeline import distributed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, or else the CPU."""
    return distributed.start().device


@pytest.fixture(autouse=True, scope="session")
def _alone() -> Iterator[None]:
    distributed.start()
    yield
    distributed.stop()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    distributed.start()
    torch.manual_seed(0)


def smooth(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A picture (height, width, 3) uint8 of soft shapes with some noise, as photographs are."""
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    picture = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    return np.clip(picture + rng.normal(0, 4, picture.shape), 0, 255).astype(np.uint8)


def lay_out(root: Path, count: int, height: int, width: int, kind: str = "png") -> Path:
    """root/{train,val}/{0,1}/: `count` pictures a class in train, a quarter in val; the classes differ in brightness."""
    rng = np.random.default_rng(0)
    for split, number in (("train", count), ("val", max(count // 4, 4))):
        for label in (0, 1):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for i in range(number):
                picture = smooth(rng, height, width) // 2 + 100 * np.uint8(label)
                Image.fromarray(picture).save(folder / f"{i:04d}.{kind}", quality=90)
    return root


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 training pictures of 16 px."""
    return lay_out(tmp_path_factory.mktemp("small") / "data", 80, 16, 16)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 JPEGs of 200 x 260 pixels, and some in val."""
    return lay_out(tmp_path_factory.mktemp("photos") / "data", 24, 200, 260, "jpg")
