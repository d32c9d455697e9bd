"""What two augmented 224 px views of a photograph cost, ours beside the peers': CPU time of the whole process tree.

The photographs are 200 of ImageNet's where the folder that SSL_PIPELINE_TEST_DATA names has imagenet_sample.tar; else
they are made here, of as many pixels and bytes. All contenders make the same batches of the same pictures in one process,
in turn, round after round; a contender's workers stand still while another's turn is. Wall time is not measured: on a
shared machine it is noise. lightly and solo-learn take part where they are installed.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import random
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from measure import Row
from PIL import Image, ImageFilter, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from ssl_pipeline import config, distributed
from ssl_pipeline.data.bench import process_tree_seconds
from ssl_pipeline.data.index import EXTENSIONS, Index
from ssl_pipeline.data.loader import Loader
from ssl_pipeline.pretrain import PretrainConfig

BATCH = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ROUNDS, BATCHES = 5, 3
"""Batches of a contender in each round."""


# -------------------------------------------------------------------------------------------------------- the contenders
class Pictures(Dataset):
    """RGB pictures by PIL, through a transform."""

    def __init__(self, paths: list[Path], transform: Callable[[Image.Image], Any]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> Any:
        with self.paths[place].open("rb") as file:
            return self.transform(Image.open(file).convert("RGB"))


class Forever(Sampler):
    """Places in a shuffled order, again and again: workers never have to be started anew."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng(0)
        while True:
            yield from rng.permutation(self.count).tolist()


class PilBlur:
    """Of the official code: with probability p, ImageFilter.GaussianBlur of a radius uniform in 0.1 to 2."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, picture: Image.Image) -> Image.Image:
        if random.random() < self.p:  # noqa: S311
            return picture.filter(ImageFilter.GaussianBlur(random.random() * 1.9 + 0.1))  # noqa: S311
        return picture


class PilSolarize:
    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, picture: Image.Image) -> Image.Image:
        return ImageOps.solarize(picture) if random.random() < self.p else picture  # noqa: S311


class BarlowTwins:
    """The two views of facebookresearch/barlowtwins main.py:Transform, by its operations and probabilities."""

    def __init__(self) -> None:
        self.views = [self._view(1.0, 0.0), self._view(0.1, 0.2)]

    @staticmethod
    def _view(blur: float, solarize: float) -> transforms.Compose:
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(224, interpolation=InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(p=0.5),
                transforms.RandomApply(
                    [transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8
                ),
                transforms.RandomGrayscale(p=0.2),
                PilBlur(blur),
                PilSolarize(solarize),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __call__(self, picture: Image.Image) -> list[torch.Tensor]:
        return [view(picture) for view in self.views]


def one_thread(_: int) -> None:
    torch.set_num_threads(1)


def workers(paths: list[Path], transform: Callable[[Image.Image], Any], count: int) -> Iterator[Any]:
    data = Pictures(paths, transform)
    return iter(
        DataLoader(data, BATCH, sampler=Forever(len(paths)), num_workers=count, worker_init_fn=one_thread)
    )  # prefetches two batches a worker and then waits


def ours(index: Index, threads: int, exact: bool = False) -> Iterator[Any]:
    options = config.validate(PretrainConfig, config.load("imagenet/barlow_twins", ["data.root=."]).values).data
    data = Loader(index, options.views, BATCH, seed=0, world=distributed.start(), threads=threads, exact=exact)
    while True:
        yield from data


def dali_decode(index: Index, threads: int) -> Iterator[Any]:
    from nvidia.dali import fn, pipeline_def, types

    order = iter(Forever(len(index)))

    @pipeline_def(batch_size=BATCH, num_threads=threads, device_id=None)
    def graph() -> Any:
        encoded = fn.external_source(source=lambda: [index.read(next(order)) for _ in range(BATCH)], batch=True)
        return fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False)

    pipeline = graph()
    pipeline.build()
    while True:
        yield pipeline.run()


def contenders(folder: Path) -> dict[str, Iterator[Any]]:
    """Endless batches of the photographs in `folder`, by name; ours and the official pipeline by one worker each."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    names = tuple(str(path.relative_to(folder)) for path in paths)
    index = Index(folder, names, np.zeros(len(names), dtype=np.int64), ("all",))
    found = {
        "pil": workers(paths, BarlowTwins(), 1),
        "ours": ours(index, 1),
        "exact": ours(index, 1, exact=True),
        "decode": dali_decode(index, 1),
    }
    try:
        from lightly.transforms import BYOLTransform

        found[f"lightly {importlib.metadata.version('lightly')}, BYOLTransform"] = workers(paths, BYOLTransform(), 1)
    except ImportError:
        pass
    try:
        from omegaconf import OmegaConf
        from solo.data.pretrain_dataloader import FullTransformPipeline, NCropAugmentation, build_transform_pipeline

        def of(blur: float, solarize: float) -> Any:
            color = {"prob": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
            return NCropAugmentation(build_transform_pipeline("imagenet", OmegaConf.create({
                "rrc": {"enabled": True, "crop_min_scale": 0.08, "crop_max_scale": 1.0}, "color_jitter": color,
                "grayscale": {"prob": 0.2}, "gaussian_blur": {"prob": blur}, "solarization": {"prob": solarize},
                "equalization": {"prob": 0.0}, "horizontal_flip": {"prob": 0.5}, "crop_size": 224})), 1)  # fmt: skip

        found["solo-learn, torchvision"] = workers(paths, FullTransformPipeline([of(1.0, 0.0), of(0.1, 0.2)]), 1)
    except ImportError:
        pass
    return found


# ------------------------------------------------------------------------------------------------------- the photographs
def photographs(folder: Path) -> str:
    """Put 200 photographs into `folder`; what they are, in words."""
    given = Path(os.environ.get("SSL_PIPELINE_TEST_DATA", "")) / "imagenet_sample.tar"
    if given.is_file():
        with tarfile.open(given) as archive:
            for member in archive.getmembers():
                source = archive.extractfile(member)
                if source is not None and Path(member.name).suffix.lower() in EXTENSIONS:
                    (folder / Path(member.name).name).write_bytes(source.read())
        kind = "photographs of ImageNet"
    else:
        for number in range(200):
            (folder / f"{number:03d}.jpg").write_bytes(like_a_photograph(number))
        kind = "synthetic photographs"
    sizes = [path.stat().st_size for path in folder.iterdir()]
    return f"{len(sizes)} {kind}, {sum(sizes) / len(sizes) / 1e3:.0f} KB on average"


def like_a_photograph(seed: int, width: int = 500, height: int = 400, size: int = 110_000) -> bytes:
    """A JPEG of about `size` bytes, 4:2:0, whose amplitudes fall as 1 / frequency, as those of natural pictures do
    (Field 1987, J. Opt. Soc. Am. A 4, 2379), its colours less than its brightness."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(height), np.fft.rfftfreq(width), indexing="ij"))
    frequency[0, 0] = 1.0
    planes = [
        np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / frequency, (height, width)) for _ in range(3)
    ]
    light, *colors = (plane / plane.std() for plane in planes)
    picture = np.stack([128 + 50 * light, *(128 + 15 * color for color in colors)], axis=-1)
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8), mode="YCbCr")
    for quality in range(98, 50, -4):
        encoded = io.BytesIO()
        image.save(encoded, "jpeg", quality=quality)
        if encoded.tell() <= size:
            break
    return encoded.getvalue()


# ----------------------------------------------------------------------------------------------------------- the measure
def settled() -> float:
    """CPU seconds of the process tree, once nobody works ahead any more."""
    before = process_tree_seconds()
    while True:
        time.sleep(0.3)
        now = process_tree_seconds()
        if now - before <= 0.01:  # one tick of Linux' clock
            return now
        before = now


def seconds_an_image(sources: dict[str, Iterator[Any]]) -> dict[str, list[float]]:
    """CPU seconds of each contender, a value a round. What was made ahead before a turn is made again in it."""
    found: dict[str, list[float]] = {name: [] for name in sources}
    for number in range(ROUNDS + 1):
        for name, source in sources.items():
            start = settled()
            for _ in range(BATCHES):
                next(source)
            cost = (settled() - start) / (BATCHES * BATCH)
            if number:  # the first round starts workers and fills caches
                found[name].append(cost)
    return found


def rows() -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="loader-") as name:
        pictures = photographs(Path(name))
        found = seconds_an_image(contenders(Path(name)))
    pil, official = found.pop("pil"), "barlowtwins main.py, on PIL"
    told = {
        "ours": ("two views of a photograph, imagenet/barlow_twins", 0.6),
        "exact": ("the same with data.exact=true", None),
        "decode": ("its decoding alone by DALI, the limit", None),
    }
    result = []
    for name, values in found.items():
        what, bound = told.get(name, (name, None))
        result.append(measure.ratio(what, values, pil, official, bound))
    return [replace(row, detail=f"{row.detail} an image; {pictures}") for row in result]


if __name__ == "__main__":
    measure.main(__doc__, rows)
