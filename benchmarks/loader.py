"""What two augmented 224 px views of a photograph cost, ours beside the peers': CPU time of the whole process tree.

    python benchmarks/loader.py FOLDER --output benchmarks/results/loader.md

FOLDER holds photographs at any depth. All contenders make the same batches of the same pictures in one process, in turn,
round after round; a contender's workers stand still while another's turn is. Wall time is not measured: on a shared
machine it is noise. Contenders that are not installed are left out with a word.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from scipy import stats
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
PIL_ROW = "torchvision on PIL, facebookresearch/barlowtwins main.py"


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


def contenders(folder: Path, count: int) -> Iterator[tuple[str, Iterator[Any]]]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if len(paths) < BATCH:
        sys.exit(f"{str(folder)!r} holds {len(paths)} pictures; {BATCH} are needed")
    names = tuple(str(path.relative_to(folder)) for path in paths)
    index = Index(folder, names, np.zeros(len(names), dtype=np.int64), ("all",))
    size = sum(path.stat().st_size for path in paths) / len(paths) / 1024
    print(f"{len(paths)} pictures, {size:.0f} KB on average", file=sys.stderr)
    yield PIL_ROW, workers(paths, BarlowTwins(), count)
    yield "ours: imagenet/barlow_twins", ours(index, count)
    yield "ours, data.exact=true", ours(index, count, exact=True)
    yield "decode alone, by DALI: the limit", dali_decode(index, count)
    try:
        from lightly.transforms import BYOLTransform

        yield "lightly, BYOLTransform", workers(paths, BYOLTransform(), count)
    except ImportError:
        print("lightly is not installed: left out", file=sys.stderr)
    try:
        from omegaconf import OmegaConf
        from solo.data.pretrain_dataloader import FullTransformPipeline, NCropAugmentation, build_transform_pipeline

        def of(blur: float, solarize: float) -> Any:
            color = {"prob": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
            return NCropAugmentation(build_transform_pipeline("imagenet", OmegaConf.create({
                "rrc": {"enabled": True, "crop_min_scale": 0.08, "crop_max_scale": 1.0}, "color_jitter": color,
                "grayscale": {"prob": 0.2}, "gaussian_blur": {"prob": blur}, "solarization": {"prob": solarize},
                "equalization": {"prob": 0.0}, "horizontal_flip": {"prob": 0.5}, "crop_size": 224})), 1)  # fmt: skip

        yield "solo-learn, torchvision", workers(paths, FullTransformPipeline([of(1.0, 0.0), of(0.1, 0.2)]), count)
    except ImportError:
        print("solo-learn is not installed: left out", file=sys.stderr)


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


def measure(sources: dict[str, Iterator[Any]], rounds: int, batches: int) -> dict[str, list[float]]:
    """CPU ms an image of each contender, a value a round. What was made ahead before a turn is made again in it."""
    found: dict[str, list[float]] = {name: [] for name in sources}
    for number in range(rounds + 1):
        for name, source in sources.items():
            start = settled()
            for _ in range(batches):
                next(source)
            cost = 1000 * (settled() - start) / (batches * BATCH)
            if number:  # the first round starts workers and fills caches
                found[name].append(cost)
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    return found


def interval(values: np.ndarray) -> str:
    """Mean and 95 % interval by Student's t."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():.2f} +- {half:.2f}"


def table(found: dict[str, list[float]], pictures: str, count: int, batches: int) -> str:
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())  # fmt: skip
    versions = ", ".join(
        f"{name} {importlib.metadata.version(package)}"
        for name, package in (
            ("torch", "torch"),
            ("torchvision", "torchvision"),
            ("Pillow", "pillow"),
            ("lightly", "lightly"),
        )
        if package != "lightly" or any(row.startswith("lightly") for row in found)
    )
    dali = next(d for d in importlib.metadata.distributions() if d.metadata["Name"].startswith("nvidia-dali-cuda"))
    pil = np.array(found[PIL_ROW])
    lines = [
        "| two 224 px views, the full Barlow Twins augmentation | CPU ms an image | share of the PIL pipeline's |",
        "|---|---|---|",
        *(f"| {name} | {interval(np.array(v))} | {interval(np.array(v) / pil)} |" for name, v in found.items()),
        "",
        f"User and system time of the process tree; mean and 95 % interval over {len(pil)} interleaved rounds of {batches} "
        f"batches of {BATCH}; {pictures}; {count} worker{'s' if count > 1 else ''} or DALI threads; {model}, "
        f"{len(os.sched_getaffinity(0))} core(s); {versions}, DALI {dali.version}, Python {platform.python_version()}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batches", type=int, default=4, help="of a contender in a round")
    parser.add_argument("--workers", type=int, default=1, help="processes of torchvision's, threads of DALI's")
    parser.add_argument("--output", type=Path, help="file in which the table replaces the one between its two marks")
    args = parser.parse_args()
    sources = dict(contenders(args.folder, args.workers))
    count = sum(path.suffix.lower() in EXTENSIONS for path in args.folder.rglob("*"))
    text = table(measure(sources, args.rounds, args.batches), f"{count} photographs", args.workers, args.batches)
    print(text)
    if args.output:
        old = args.output.read_text() if args.output.is_file() else "<!-- table -->\n<!-- end -->\n"
        before, _, rest = old.partition("<!-- table -->")
        args.output.write_text(f"{before}<!-- table -->\n{text}\n<!-- end -->{rest.partition('<!-- end -->')[2]}")


if __name__ == "__main__":
    main()
