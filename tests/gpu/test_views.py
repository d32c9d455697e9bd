"""Views made on the device against those made on the CPU, with the same parameters; and the loader that makes them.

On the CPU alone both sides are the same, which shows that the tests run. The bounds are in steps of 0..255.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.torch_views import TorchLoader, make_view
from ssl_pipeline import config, distributed
from ssl_pipeline.data import loader
from ssl_pipeline.data.augment import ViewSpec
from ssl_pipeline.data.index import image_folder
from ssl_pipeline.data.loader import Loader
from ssl_pipeline.pretrain import PretrainConfig
from tests.gpu.conftest import smooth

pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI, which is not installed")

RAW = {"op": "normalize", "mean": [0, 0, 0], "std": [1, 1, 1]}
# Each operation with its options, and how far its pixels may lie apart on the average and at the most.
OPERATIONS: dict[str, tuple[dict[str, Any], float, float]] = {
    "flip": ({"op": "flip"}, 0, 0),
    "solarize": ({"op": "solarize", "probability": 0.5}, 0, 0),
    # One product is summed in another order, so that some values round to the other side.
    "jitter": ({"op": "jitter", "probability": 1.0}, 0.05, 1),
    "gray": ({"op": "gray", "probability": 0.5}, 0.05, 1),
    "crop_resize": ({"op": "crop_resize"}, 0.2, 3),  # the GPU's resampling may round between its two passes
    "bilinear": ({"op": "center_crop", "resize": 120, "interpolation": "bilinear"}, 0.2, 3),
    "blur": ({"op": "blur", "probability": 0.5}, 0.2, 2),  # rounded once a pass
    "affine": ({"op": "affine", "degrees": 30, "translate": 0.1, "scale": [0.8, 1.2]}, 0.2, 8),  # at the black border
}
SIZE = 96


def view(*operations: dict[str, Any]) -> ViewSpec:
    return config.validate(ViewSpec, {"size": SIZE, "ops": [*operations, RAW]})


def drawn(spec: ViewSpec, pictures: np.ndarray, exact: bool) -> list[Any]:
    sizes = np.array([picture.shape[:2] for picture in pictures])
    return spec.parameters(3, 0, np.arange(len(pictures)), 0, sizes, exact)


def by_dali(spec: ViewSpec, pictures: np.ndarray, device: torch.device, exact: bool = False) -> np.ndarray:
    """The view's pixels in 0..255, (N, 3, S, S), made on the device from decoded pictures."""
    from nvidia.dali import fn, pipeline_def

    arrays = drawn(spec, pictures, exact)

    @pipeline_def(batch_size=len(pictures), num_threads=1, device_id=device.index, exec_dynamic=True)
    def graph() -> Any:
        inputs = fn.external_source(source=lambda: [list(pictures), *arrays], num_outputs=1 + len(arrays), batch=True,
                                    layout=["HWC", *[""] * len(arrays)])  # fmt: skip
        images = inputs[0].gpu() if device.type == "cuda" else inputs[0]
        return spec.nodes(images, inputs[1:], exact)

    pipeline = graph()
    pipeline.build()
    (output,) = pipeline.run()
    return 255 * np.asarray(output.as_cpu().as_tensor())


def pictures(size: int = SIZE) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([smooth(rng, size, size) for _ in range(16)])


def apart(found: np.ndarray, expected: np.ndarray, mean: float, most: float) -> None:
    difference = np.abs(found - expected)
    assert difference.mean() <= mean + 1e-4
    assert difference.max() <= most + 1e-3


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_on_the_device_is_the_cpus(device: torch.device, name: str, exact: bool) -> None:
    operation, mean, most = OPERATIONS[name]
    given = pictures()
    on_cpu = by_dali(view(operation), given, torch.device("cpu"), exact)
    assert np.abs(on_cpu - given.transpose(0, 3, 1, 2)).mean() > 0.5  # it does something
    apart(by_dali(view(operation), given, device, exact), on_cpu, mean, most * (4 if exact else 1))


@pytest.mark.parametrize("recipe", ["imagenet/barlow_twins", "imagenet/simclr", "cifar10/simclr"])
def test_the_recipes_views_on_the_device_are_the_cpus(device: torch.device, recipe: str) -> None:
    given = pictures(160)
    for spec in config.validate(PretrainConfig, config.load(recipe, ["data.root=."]).values).data.views:
        cpu, other = (by_dali(spec, given, where) / 255 for where in (torch.device("cpu"), device))
        # In steps of 0..255 before the division by a deviation of 0.2. Solarizing turns a rounding at 128 upside down.
        steps = 255 * 0.2 * np.abs(cpu - other)
        assert steps.mean() <= 0.5
        assert (steps > 8).mean() <= 1e-3


@pytest.mark.parametrize("recipe", ["imagenet/barlow_twins", "imagenet/simclr", "cifar10/simclr", "digits/simclr"])
def test_torch_in_the_place_of_dali_makes_the_same_views(device: torch.device, recipe: str) -> None:
    """benchmarks/torch_views.py, by which the loop is tested and measured where DALI is absent."""
    given = pictures(32 if recipe.startswith("digits") else 160)  # whose views resize nothing
    for spec in config.validate(PretrainConfig, config.load(recipe, ["data.root=."]).values).data.views:
        x = torch.from_numpy(given).to(device).permute(0, 3, 1, 2).float()
        found, left = make_view(spec, x, torch.ones_like(x[:, :1]), drawn(spec, given, False))
        assert left == []
        steps = 255 * 0.2 * np.abs(found.cpu().numpy() - by_dali(spec, given, torch.device("cpu")) / 255)
        assert steps.mean() <= 0.5
        assert (steps > 8).mean() <= 2e-3


def batches(root: Path, device: torch.device, **overrides: Any) -> Iterator[loader.Batch]:
    world = replace(distributed.start(), device=device)
    specs = [
        view({"op": "crop_resize"}, {"op": "flip"}, {"op": "jitter"}, {"op": "gray"}, {"op": "blur"}) for _ in range(2)
    ]
    data = overrides.pop("kind", Loader)(image_folder(root / "train"), specs, 16, seed=1, world=world, **overrides)
    for _ in range(2):
        yield from data
    data.close()


PLACES = [("mixed", "gpu"), ("cpu", "gpu"), ("cpu", "cpu")]


@pytest.mark.parametrize(("decode", "augment"), PLACES)
def test_the_loader_on_the_device_gives_the_cpus_batches(
    device: torch.device, photos: Path, decode: str, augment: str
) -> None:
    """Two epochs of six steps. All batches are kept until the end: what DALI wrote to again would no longer be the same."""
    places = {"decode": decode, "augment": augment} if device.type == "cuda" else {}
    here, there = (
        list(batches(photos, where, **given)) for where, given in ((device, places), (torch.device("cpu"), {}))
    )
    assert len(here) == len(there) == 6
    for a, b in zip(here, there, strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        assert a.labels.device == a.views[0].device == device
        assert a.labels.tolist() == b.labels.tolist()
        for one, other in zip(a.views, b.views, strict=True):
            assert one.shape == (16, 3, SIZE, SIZE)
            steps = 255 * (one.cpu() - other).abs()
            # A GPU's decoder sums the cosine transform and widens the colours otherwise: about 1 step, more at edges.
            assert steps.mean() <= 2
            assert (steps > 16).float().mean() <= 5e-3


def test_the_loader_without_dali_gives_its_batches(device: torch.device, photos: Path) -> None:
    here, there = batches(photos, device, kind=TorchLoader), batches(photos, torch.device("cpu"))
    for a, b in zip(here, there, strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        assert a.labels.tolist() == b.labels.tolist()
        for one, other in zip(a.views, b.views, strict=True):
            steps = 255 * (one.cpu() - other).abs()
            assert steps.mean() <= 1.5  # PIL's decoder against DALI's
            assert (steps > 16).float().mean() <= 5e-3


def test_a_picture_that_the_device_cannot_decode_is_replaced(
    device: torch.device, photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "train" / "0"
    folder.mkdir(parents=True)
    for number, path in enumerate(sorted((photos / "train" / "0").iterdir())[:16]):
        data = path.read_bytes()
        (folder / path.name).write_bytes(data[: len(data) // 8] if number == 5 else data)
    data = Loader(image_folder(tmp_path / "train"), [view({"op": "crop_resize"})], 16, seed=0,
                  world=replace(distributed.start(), device=device))  # fmt: skip
    (batch,) = data
    bad = data.all_bad()
    data.close()
    assert not bad or (set(bad) == {5} and 5 not in batch.ids)  # a decoder may give what there is of a cut JPEG
    assert batch.views[0].isfinite().all()
