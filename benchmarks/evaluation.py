"""What measuring costs beside what is measured: the online probe's share of a training step and, by name, what takes longer.

    python benchmarks/evaluation.py            # the online probe
    python benchmarks/evaluation.py grid       # a grid of heads over ResNet-50 beside one head, four minutes on two cores
    python benchmarks/evaluation.py held_out   # measures of held-out pictures beside an epoch, on data/cifar10

Each is taken beside the same step without it, interleaved.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import measure
import numpy as np
import torch
import torch.nn.functional as F
from measure import Row

from ssl_pipeline import backbone as backbones
from ssl_pipeline import config, distributed
from ssl_pipeline.data.index import Index, read_index
from ssl_pipeline.evaluation import online, probe, supervised
from ssl_pipeline.pretrain import PretrainConfig, build_method

ROUNDS = 3


def grid() -> list[Row]:
    """A step of the linear probe over ResNet-50 at 224 px, 1000 classes: 20 heads, and 20 heads fused, beside one."""
    batch = 64
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
    seconds = measure.interleaved(actions, ROUNDS)
    what = "linear probe, ResNet-50 at 224 px, batch 64"
    return [
        measure.ratio(f"{what}, {name}", found, seconds["1 head"], "1 head", 1.3, "s")
        for name, found in seconds.items()
        if name != "1 head"
    ]


def probe_online(name: str, batch: int, size: int, classes: int) -> Row:
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

    actions = {"step": step, "online": lambda: measured.step(features, labels, finite)}
    seconds = measure.interleaved(actions, ROUNDS)
    what = f"online probe, {name}, batch {batch} of {size} px, {classes} classes"
    return measure.ratio(what, seconds["online"], seconds["step"], "a step without optimizer", 0.02)


def held_out() -> list[Row]:
    """The share of an epoch that the measures of held-out pictures take: reading, forward passes and measures, against
    steps of as many pictures as the training set has (forward, backward; neither reading nor the optimizer).
    """
    name, data = "cifar10/simclr", Path("data/cifar10")
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
    seconds = measure.interleaved(look, ROUNDS)
    epochs = [4 * step * (len(index) // batch) for step in seconds["step"]]
    what = f"measures of {options.online.measures_pictures} held-out pictures, {name}, {len(index)} pictures"
    return [measure.ratio(what, seconds["look"], epochs, "an epoch", 0.02, "s")]


def rows() -> list[Row]:
    return [probe_online("cifar10/simclr", 32, 32, 10), probe_online("imagenet/simclr", 8, 224, 1000)]


if __name__ == "__main__":
    measure.main(__doc__, rows, grid=grid, held_out=held_out)
