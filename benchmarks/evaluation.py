"""What a grid of heads and the online probe cost, each beside the same step without it, interleaved; medians.

python benchmarks/evaluation.py                        # four minutes on two cores
python benchmarks/evaluation.py --data data/cifar10    # what measures of held-out pictures cost while training
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F

from ssl_pipeline import __version__, config, distributed
from ssl_pipeline import backbone as backbones
from ssl_pipeline.data.index import Index, read_index
from ssl_pipeline.evaluation import online, probe, supervised
from ssl_pipeline.pretrain import PretrainConfig, build_method


def interleaved(actions: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each action in each round, the first round not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def grid(batch: int, rounds: int) -> None:
    """A step of the linear probe over ResNet-50 at 224 px, 1000 classes: 1 head, 20 heads, 20 heads fused."""
    world = distributed.start()
    values = config.load("_evaluation/linear_probe/barlow_twins").values
    recipe = config.validate(probe.Recipe, values)
    network = backbones.build(backbones.Options(name="resnet50")).eval()
    images = torch.randn(batch, 3, 224, 224, device=world.device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), device=world.device)

    def step(count: int, fused: bool) -> Callable[[], None]:
        heads = supervised.classifiers(recipe, network, 1000, count, fused)
        module = supervised.Frozen(network, heads).to(world.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        groups = [{"params": list(head.parameters()), "lr": 0.3} for head in heads.each]
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-6, fused=True)

        def run() -> None:
            sum(F.cross_entropy(one, labels) for one in module(images)).backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()

        return run

    actions = {"1 head": step(1, False), "20 heads": step(20, False), "20 heads, fused": step(20, True)}
    seconds = interleaved(actions, rounds, world.device)
    base = seconds["1 head"]
    for name, found in seconds.items():
        ratios = [a / b for a, b in zip(found, base, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"| {name} | {statistics.median(found):.2f} s | {statistics.median(ratios):.2f} | {spread} |")


def probe_online(name: str, batch: int, size: int, classes: int, rounds: int) -> None:
    """The online probe's share of a training step (forward, backward, of two views of a picture)."""
    world = distributed.start()
    options = config.validate(PretrainConfig, config.load(name).values)
    method = build_method(options).to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    index = Index(Path(), (), np.zeros(0, dtype=np.int64), tuple(str(number) for number in range(classes)))
    width = backbones.width(method.backbone)
    measured = online.Online(online.Options(), options.data, width, options.backbone, index, (None, None), 0, world)
    views = [
        torch.randn(batch, 3, size, size, device=world.device).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    ]
    labels = torch.randint(classes, (batch,), device=world.device)
    features = torch.randn(batch, width, device=world.device)
    finite = torch.ones((), dtype=torch.bool, device=world.device)

    def step() -> None:
        with torch.autocast(world.device.type, dtype=torch.bfloat16):
            method(views).loss.backward()
        method.zero_grad()

    seconds = interleaved(
        {"step": step, "online": lambda: measured.step(features, labels, finite)}, rounds, world.device
    )
    shares = [100 * a / b for a, b in zip(seconds["online"], seconds["step"], strict=True)]
    whole, own = statistics.median(seconds["step"]), statistics.median(seconds["online"])
    print(
        f"| {name}, batch {batch} of {size} px, {classes} classes | {whole:.2f} s | {1000 * own:.1f} ms | "
        f"{statistics.median(shares):.2f} % | {min(shares):.2f} to {max(shares):.2f} % |"
    )


def held_out(name: str, data: Path, rounds: int) -> None:
    """The share of an epoch that the measures of held-out pictures take: reading, forward passes and measures, against
    steps of as many pictures as the training set has (forward, backward; neither reading nor the optimizer).
    """
    world = distributed.start()
    chosen = [f"data.root={data}", "online.linear=false", "online.measures_every_epochs=1"]
    options = config.validate(PretrainConfig, config.load(name, chosen).values)
    method = build_method(options).to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    index, batch, width = read_index(data / "train"), options.data.batch_size, backbones.width(method.backbone)
    val = online.validation_pictures(options.online, options.data)
    measured = online.Online(options.online, options.data, width, options.backbone, index, val, 0, world)
    size = options.data.views[0].size
    views = [
        torch.randn(batch // 4, 3, size, size, device=world.device).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    ]

    def quarter() -> None:
        with torch.autocast(world.device.type, dtype=torch.bfloat16):
            method(views).loss.backward()
        method.zero_grad()

    look = {"step": quarter, "look": lambda: measured.look(1, method.evaluated_backbone(), method.head)}
    seconds = interleaved(look, rounds, world.device)
    epochs = [4 * step * (len(index) // batch) for step in seconds["step"]]
    shares = [100 * a / b for a, b in zip(seconds["look"], epochs, strict=True)]
    print(
        f"| {name}, {len(index)} pictures, {options.online.measures_pictures} held out | {statistics.median(epochs):.0f} s | "
        f"{statistics.median(seconds['look']):.1f} s | {statistics.median(shares):.2f} % | "
        f"{min(shares):.2f} to {max(shares):.2f} % |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64, help="of the grid")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as prepare-data lays it out: held-out measures alone")
    args = parser.parse_args()
    device = distributed.start().device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} cores"
    print(
        f"{where}, {platform.machine()}; torch {torch.__version__}, timm {timm.__version__}, ssl_pipeline {__version__}\n"
    )
    if args.data:
        print("| pretraining | an epoch | held-out measures | their share | spread |\n|---|---|---|---|---|")
        held_out("cifar10/simclr", args.data, args.rounds)
        return
    print(
        f"| linear probe, ResNet-50 at 224 px, batch {args.batch} | step | ratio to 1 head | spread |\n|---|---|---|---|"
    )
    grid(args.batch, args.rounds)
    print("\n| pretraining | step without optimizer | online probe | its share | spread |\n|---|---|---|---|---|")
    probe_online("cifar10/simclr", 256, 32, 10, args.rounds)
    probe_online("imagenet/simclr", 16, 224, 1000, args.rounds)


if __name__ == "__main__":
    main()
