"""The measurements of `make gpu-check`, each a generator of rows; benchmarks/gpu.py runs each in a process of its own.

PYTHONPATH=. python benchmarks/gpu_measurements.py simclr --tiny
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import io
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure
from benchmarks.measure import Row
from benchmarks.torch_views import TorchLoader, loading_with
from ssl_pipeline import backbone, compute, config, distributed, methods, monitor, optim, pretrain
from ssl_pipeline.data.index import image_folder
from ssl_pipeline.data.loader import Batch, Loader
from ssl_pipeline.data.prepare import prepare
from ssl_pipeline.evaluation import features, knn
from ssl_pipeline.exits import BadInput
from ssl_pipeline.methods.barlow_twins import barlow_twins_loss
from ssl_pipeline.methods.simclr import nt_xent_loss
from ssl_pipeline.methods.vicreg import vicreg_loss
from ssl_pipeline.pretrain import PretrainConfig
from ssl_pipeline.run_folder import read_lines

SKIP_STATUS = 5
"""Exit status where there is nothing to do here; the last line says why."""


# ------------------------------------------------------------------------------------------------ what the parts share
class Skip(Exception):
    """Nothing to do here; the sentence says why."""


class Enough(Exception):
    """Ends a run that was measured for long enough."""


PEAKS = {  # dense bf16 (V100, T4: fp16) operations a second, from NVIDIA's data sheets; the longest name that fits counts
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12,
    "A100": 312e12, "A30": 165e12, "A40": 150e12, "A10": 125e12, "RTX A6000": 155e12, "L40S": 362e12, "L4": 121e12,
    "V100": 125e12, "T4": 65e12,
}  # fmt: skip


def peak_of(name: str) -> float | None:
    """The most operations a second that a GPU of this name can do, if it is known; of a slice of one (MIG) it is not."""
    if "MIG" in name.split():
        return None
    fits = [key for key in PEAKS if re.search(rf"\b{key}\b", name)]
    return PEAKS[max(fits, key=len)] if fits else None


def half() -> str:
    """The precision of autocast here: old GPUs have no bf16."""
    return "bf16" if not torch.cuda.is_available() or torch.cuda.is_bf16_supported(False) else "fp16"


def recipe(name: str, root: Path, batch: int, tiny: bool, *overrides: str) -> Any:
    """A packaged config with a batch that fits one GPU; if tiny, with a network and pictures that fit a test."""
    words = [f"data.root={root}", f"data.batch_size={batch}", f"precision={half()}", "monitor.tensorboard=false"]
    words += ["checkpoint.every_epochs=1000"]  # an epoch of few pictures is over in a few steps
    if tiny:
        words += [
            "backbone={name: resnet18, stem: small, arguments: {layers: [1, 1, 1, 1], channels: [8, 16, 32, 64]}}"
        ]
        words += ["head.hidden=64", "head.output=32"]
    tree = config.load(name, [*words, *overrides])
    if tiny:
        for view in [*tree.values["data"]["views"], tree.values["data"]["evaluation_view"]]:
            view["size"] = 32
    return config.validate(PretrainConfig, tree.values, tree)


def pictures_of(root: Path, count: int) -> Path:
    """`count` one-pixel pictures in two classes, for runs whose views do not come from pictures."""
    data = io.BytesIO()
    Image.new("RGB", (1, 1)).save(data, "png")
    for number in range(count):
        folder = root / "train" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(data.getvalue())
    return root


class Resident(TorchLoader):
    """Views that lie on the device: random numbers, the same in every step."""

    batch: Batch | None = None

    def _take(self) -> Batch:
        if self.batch is None:
            device, count = self.world.device, self.batch_size // self.world.size
            views = [torch.randn(count, 3, view.size, view.size, device=device) for view in self.views]
            ids = self.ids(0, 0)
            self.batch = Batch(views, torch.from_numpy(self.index.labels[ids]).to(device), ids)
        return self.batch


def train(options: Any, kind: type, turn: Callable[[int, Any], None]) -> None:
    """The real loop, by the loader `kind`. `turn` gets the number of each step, before it, and the loader; it ends the
    run by Enough."""

    class Turning(kind):  # type: ignore[misc, valid-type]
        steps = 0

        def _take(self) -> Any:
            turn(self.steps, self)
            self.steps += 1
            return super()._take()

    with tempfile.TemporaryDirectory() as folder, loading_with(Turning), contextlib.suppress(Enough):
        pretrain.pretrain(options, Path(folder) / "run")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Rounds:
    """Seconds of `steps` steps of the loop, and, in turn with them, of as many of others, `rounds` times.

    Args:
        others: makes them, from the loader, after the loop's own memory was read.
    """

    def __init__(
        self, steps: int, rounds: int, warmup: int, others: Callable[[Any], Mapping[str, Callable[[], object]]]
    ) -> None:
        self.steps, self.rounds, self.warmup, self._make = steps, rounds, warmup, others
        self.seconds: dict[str, list[float]] = {"ours": []}
        self.memory = 0
        self._others: Mapping[str, Callable[[], object]] | None = None
        self._start: float | None = None

    def __call__(self, step: int, loader: Any) -> None:
        if step < self.warmup or (step - self.warmup) % self.steps:
            return
        now = measure.clock()
        if self._start is not None:
            self.seconds["ours"].append(now - self._start)
        if self._others is None:
            self.memory = peak_memory()
            self._others = self._make(loader)
            self.seconds |= {name: [] for name in self._others}
            for action in self._others.values():
                for _ in range(self.warmup):  # as many as ours had
                    action()
        if len(self.seconds["ours"]) == self.rounds:
            self._others = {}  # gives its memory back
            raise Enough
        for name, action in self._others.items():
            start = measure.clock()
            for _ in range(self.steps):
                action()
            self.seconds[name].append(measure.clock() - start)
        self._start = measure.clock()

    def each(self, name: str) -> list[float]:
        """Seconds of one step, of each round."""
        return [seconds / self.steps for seconds in self.seconds[name]]


def peak_memory() -> int:
    """The most bytes of the device that were in use; of a CPU, what is."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else measure.resident_bytes()


def as_large_as_fits(batch: int, action: Callable[[int], Any]) -> Any:
    """What `action` gives for a batch, halved until there is memory for it."""
    while True:
        try:
            return action(batch)
        except (torch.OutOfMemoryError, BadInput) as error:
            full = isinstance(error, torch.OutOfMemoryError) or isinstance(error.__cause__, torch.OutOfMemoryError)
            if not full or batch <= 8:
                raise
            print(f"no memory for a batch of {batch}: {error}")
        batch //= 2
        gc.collect()
        torch.cuda.empty_cache()


class Marks:
    """Where the time of a step goes: marks on the device's own clock, after the step's parts."""

    def __init__(self) -> None:
        self._gpu = torch.cuda.is_available()
        self._marks: list[tuple[str, Any]] = []
        self.flops = 0

    def mark(self, name: str) -> None:
        if self._gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    def after(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            finally:
                self.mark(name)

        return wrapper

    @contextlib.contextmanager
    def placed(self, method: str) -> Iterator[None]:
        """A context in which runs of `method` are marked, and the operations of a first step counted."""
        kind = methods.get(method)
        objective, build, step = kind.objective, optim.build, pretrain._forward_backward
        marked = self.after("head and loss", objective)

        def head_and_loss(*args: Any, **kwargs: Any) -> Any:
            self.mark("backbone, forward")
            return marked(*args, **kwargs)

        def build_marked(*args: Any, **kwargs: Any) -> Any:
            optimizer = build(*args, **kwargs)
            update = self.after("optimizer", optimizer.step)

            def step_marked() -> None:
                self.mark("norm of the gradients")
                update()

            optimizer.step = step_marked
            return optimizer

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.flops:
                return step(*args, **kwargs)
            with FlopCounterMode(display=False) as counter:
                output = step(*args, **kwargs)
            self.flops = counter.get_total_flops()
            return output

        with (
            mock.patch.object(kind, "objective", head_and_loss),
            mock.patch.object(optim, "build", build_marked),
            mock.patch.object(pretrain, "_forward_backward", self.after("backward", counted)),
            mock.patch.object(monitor.Monitor, "add", self.after("all else", monitor.Monitor.add)),
        ):
            yield

    def shares(self, skip: int) -> dict[str, float]:
        """Of each part of the steps after the first `skip`, its share of their time."""
        if self._gpu:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        ends = [number for number, (name, _) in enumerate(self._marks) if name == "all else"]
        kept = self._marks[ends[skip - 1] :]
        for (_, before), (name, now) in itertools.pairwise(kept):
            seconds[name] = seconds.get(name, 0) + (before.elapsed_time(now) / 1e3 if self._gpu else now - before)
        return {name: value / sum(seconds.values()) for name, value in seconds.items()}


# ----------------------------------------------------------------------------------------------------------- throughput
def official_barlow_twins(options: Any, views: Sequence[Any], device: Any) -> Callable[[], None]:
    """A step of the official loop, on the same network and views: fp16 autocast and GradScaler, contiguous layout, cuDNN's
    search for the fastest convolutions, SyncBatchNorm, C = z1^T z2 in place, and LARS as a loop over the parameters.

    Source: facebookresearch/barlowtwins main.py: main_worker, BarlowTwins, LARS.
    """
    network = backbone.build(options.backbone)
    width, hidden, output = backbone.width(network), options.head.hidden, options.head.output
    projector = nn.Sequential(
        nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True),
        nn.Linear(hidden, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True),
        nn.Linear(hidden, output, bias=False),
    )  # fmt: skip
    norm = nn.BatchNorm1d(output, affine=False)
    model = nn.ModuleList([network, projector, norm]).to(device)
    if device.type != "cpu":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    network, projector, norm = model
    one, two = (view.contiguous() for view in views)
    on_gpu = device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=on_gpu)
    momenta = {p: torch.zeros_like(p) for p in model.parameters()}

    def lars(rate: float, decay: float = 1e-6, eta: float = 0.001, momentum: float = 0.9) -> None:
        for p, buffer in momenta.items():
            if p.grad is None:
                continue
            update = p.grad
            if p.ndim != 1:
                update = update.add(p, alpha=decay)
                weight_norm, update_norm = torch.norm(p), torch.norm(update)
                unit = torch.ones_like(weight_norm)
                ratio = torch.where(update_norm > 0, eta * weight_norm / update_norm, unit)
                update = update.mul(torch.where(weight_norm > 0, ratio, unit))
            buffer.mul_(momentum).add_(update)
            p.add_(buffer, alpha=-rate)

    class Lars(torch.optim.Optimizer):  # as an optimizer, since the scaler asks on the host whether to step
        def __init__(self) -> None:
            super().__init__(list(momenta), {"lr": 0.2})

        @torch.no_grad()
        def step(self) -> None:  # type: ignore[override]
            lars(0.2)

    optimizer = Lars()

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.float16 if on_gpu else torch.bfloat16):
            z1, z2 = projector(network(one)), projector(network(two))
            c = norm(z1).T @ norm(z2)
            c.div_(len(one))
            on = torch.diagonal(c).add_(-1).pow_(2).sum()
            side = c.shape[0]
            off = c.flatten()[:-1].view(side - 1, side + 1)[:, 1:].flatten().pow_(2).sum()
            loss = on + 0.0051 * off
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    def searching() -> None:  # as its main_worker sets it; the loop that is measured in turn does not
        before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        try:
            step()
        finally:
            torch.backends.cudnn.benchmark = before

    return searching


def throughput(name: str, arguments: argparse.Namespace, official: bool) -> Iterator[Row]:
    """Images a second of a recipe of imagenet/ on views that lie on the device, and where the time of a step goes."""
    tiny = arguments.tiny
    steps, rounds, warmup = (1, 2, 2) if tiny else (10, 3, 6)

    def of(batch: int) -> tuple[int, Rounds, Marks]:
        with tempfile.TemporaryDirectory() as folder:
            options = recipe(f"imagenet/{name}", pictures_of(Path(folder), 4 * batch), batch, tiny, "epochs=1000")

            def others(loader: Resident) -> dict[str, Callable[[], None]]:
                given = Resident._take(loader).views
                return {"official": official_barlow_twins(options, given, loader.world.device)} if official else {}

            loop, marks = Rounds(steps, rounds, warmup, others), Marks()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            train(options, Resident, loop)
            with marks.placed(name):  # by itself, since marks cost a little time
                train(options, Resident, Rounds(steps, 1, warmup, lambda _: {}))
            return batch, loop, marks

    batch, loop, marks = as_large_as_fits(8 if tiny else 256, of)
    images = [batch / seconds for seconds in loop.each("ours")]
    what, detail = f"{name}, ResNet-50, 224 px", f"batch {batch}, {half()}"
    yield measure.measured(f"{what}: images/s of the loop", images, "images/s", detail=detail)
    if official:
        yield measure.ratio(f"{what}: a step", loop.each("ours"), loop.each("official"), "the official loop", None)
    yield measure.measured(f"{what}: peak memory", [loop.memory / 2**30], "GiB", detail=detail)
    peak = peak_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else 1e12
    if peak is not None:
        rates = [100 * marks.flops / batch * rate / peak for rate in images]
        detail = f"{marks.flops / batch / 1e9:.1f} GFLOP an image, peak {peak / 1e12:.0f} TFLOP/s"
        yield measure.measured(f"{what}: model FLOP utilisation", rates, "%", detail=detail)
    for part, share in sorted(marks.shares(warmup).items(), key=lambda pair: -pair[1]):
        yield measure.measured(f"{what}: share of {part}", [100 * share], "%")


def barlow_twins(arguments: argparse.Namespace) -> Iterator[Row]:
    """Against the official loop."""
    return throughput("barlow_twins", arguments, official=True)


def simclr(arguments: argparse.Namespace) -> Iterator[Row]:
    """By itself."""
    return throughput("simclr", arguments, official=False)


def compiled(arguments: argparse.Namespace) -> Iterator[Row]:
    """The step of Barlow Twins without torch.compile, and with it, one after the other."""
    try:
        compute.require_compiler(compute.Options(compile="default"), distributed.start().device)
    except BadInput as lacking:
        raise Skip(str(lacking)) from lacking
    steps, rounds, warmup = (1, 2, 2) if arguments.tiny else (10, 3, 8)
    # If tiny, without the code generator, which takes a CPU half a minute.
    compile, eager = nn.Module.compile, {"backend": "aot_eager"} if arguments.tiny else {}

    def of(batch: int) -> dict[str, Rounds]:
        found = {}
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(nn.Module, "compile", lambda self, **given: compile(self, **(eager or given))),
        ):
            root = pictures_of(Path(folder), 4 * batch)
            for mode, words in (("off", []), ("default", ["compute.compile=default"])):
                found[mode] = Rounds(steps, rounds, warmup, lambda _: {})
                options = recipe("imagenet/barlow_twins", root, batch, arguments.tiny, "epochs=1000", *words)
                train(options, Resident, found[mode])
        return found

    found = as_large_as_fits(8 if arguments.tiny else 256, of)
    ours, plain = (found[mode].each("ours") for mode in ("default", "off"))
    yield measure.ratio("barlow_twins, ResNet-50, 224 px: a compiled step", ours, plain, "the same uncompiled", None)


# ---------------------------------------------------------------------------------------------------------------- loader
def _jpeg(job: tuple[str, int, int, int]) -> None:
    """A picture of soft shapes and noise, of about 110 KB at 500 x 375, as ImageNet's are."""
    path, width, height, number = job
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    picture = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    noise = rng.normal(0, 14, (-(-height // 2), -(-width // 2), 3))
    picture += np.kron(noise, np.ones((2, 2, 1)))[:height, :width]
    Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(path, quality=94)


def loader(arguments: argparse.Namespace) -> Iterator[Row]:
    """Views of JPEGs a second by placement, and Barlow Twins trained from them."""
    tiny = arguments.tiny
    count, width, height = (32, 80, 60) if tiny else (1024, 500, 375)
    steps, rounds, warmup = (1, 2, 2) if tiny else (8, 3, 6)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for label in range(2):
            (root / "train" / str(label)).mkdir(parents=True)
        jobs = [(str(root / "train" / str(n % 2) / f"{n}.jpg"), width, height, n) for n in range(count)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy and PIL let other threads run
            list(pool.map(_jpeg, jobs))
        size = statistics.mean(Path(path).stat().st_size for path, *_ in jobs)
        world = distributed.start()
        index = image_folder(root / "train")
        for decode, augment in (("mixed", "gpu"), ("cpu", "gpu"), ("cpu", "cpu")):
            places = [f"data.decode={decode}", f"data.augment={augment}"] if world.device.type == "cuda" else []
            options = recipe("imagenet/barlow_twins", root, 8 if tiny else 256, tiny, "epochs=1000", *places)
            data = Loader.for_training(options.data, index, seed=0, world=world)
            endless = (batch for _ in iter(int, 1) for batch in data)
            rates = []
            for number in range(rounds + 1):
                start = time.perf_counter()
                for _ in range(steps):
                    next(endless)
                if world.device.type == "cuda":
                    torch.cuda.synchronize()
                rates += [steps * options.data.batch_size / (time.perf_counter() - start)] if number else []
            data.close()
            detail = f"{data.threads} threads, JPEGs of {size / 1e3:.0f} KB"
            what = f"loader alone, decode={decode} augment={augment}"
            yield measure.measured(what, rates, "images/s", detail=detail)

        def of(batch: int) -> tuple[int, Rounds, Marks]:
            loop, marks = Rounds(steps, rounds, warmup, lambda _: {}), Marks()

            def turn(step: int, given: Loader) -> None:
                marks.mark("between two steps")
                loop(step, given)

            class Marked(Loader):
                def _take(self) -> Batch:
                    batch = super()._take()
                    marks.mark("waiting for the loader")
                    return batch

            with marks.placed("barlow_twins"):
                train(recipe("imagenet/barlow_twins", root, batch, tiny, "epochs=1000"), Marked, turn)
            return batch, loop, marks

        batch, loop, marks = as_large_as_fits(8 if tiny else 256, of)
    what = "barlow_twins, ResNet-50, 224 px, from JPEGs"
    images = [batch / seconds for seconds in loop.each("ours")]
    yield measure.measured(f"{what}: images/s of the loop", images, "images/s", detail=f"batch {batch}")
    waits = marks.shares(warmup).get("waiting for the loader", 0.0)
    yield measure.measured(f"{what}: share of waiting for the loader", [100 * waits], "%")


# ---------------------------------------------------------------------------------------------------------------- losses
Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES: list[tuple[str, Loss, int, int]] = [
    ("NT-Xent, 8,192 embeddings", lambda a, b: nt_xent_loss(a, b, 0.1), 4096, 128),
    ("NT-Xent, 32,768 embeddings", lambda a, b: nt_xent_loss(a, b, 0.1), 16384, 128),
    ("Barlow Twins, 256 of 8,192", lambda a, b: barlow_twins_loss(a, b, 0.0051), 256, 8192),
    ("Barlow Twins, 2,048 of 8,192", lambda a, b: barlow_twins_loss(a, b, 0.0051), 2048, 8192),
    ("VICReg, 2,048 of 8,192", lambda a, b: vicreg_loss(a, b, 25, 25, 1)[0], 2048, 8192),
]
"""Loss, rows of each of two views, and their width."""


def losses(arguments: argparse.Namespace) -> Iterator[Row]:
    """Forward and backward of losses in float32: milliseconds, and memory beyond the embeddings."""
    device = distributed.start().device
    smaller = 64 if arguments.tiny else 1
    for name, loss, count, width in LOSSES:
        shape = max(count // smaller, 8), max(width // smaller, 8)
        views = [torch.randn(*shape, device=device, requires_grad=True) for _ in range(2)]

        def once(loss: Loss = loss, views: list[Tensor] = views) -> None:
            torch.autograd.grad(loss(*views), views)

        try:
            once()
            memory = measure.peak_bytes(once)
            times = [1e3 * seconds for seconds in measure.interleaved({"ours": once}, 5)["ours"]]
        except torch.OutOfMemoryError as error:
            print(f"{name}: {error}")
            torch.cuda.empty_cache()
            continue
        yield measure.measured(f"{name}: forward and backward", times, "ms", detail=f"memory {memory / 1e6:.0f} MB")


# --------------------------------------------------------------------------------------------------------------- CIFAR-10
def find_cifar(data: Path | None, work: Path) -> tuple[Path, str]:
    """A folder in the one layout and its name: CIFAR-10 from `data`, or scikit-learn's digits. Raises Skip."""
    if data is not None and (data / "train").is_dir() and (data / "val").is_dir():
        return data, "cifar10"
    archives = sorted(data.glob("cifar10[._]*")) if data is not None else []
    if archives:
        prepare("cifar10", work / "cifar10", archives)
        return work / "cifar10", "cifar10"
    if importlib.util.find_spec("sklearn") is None:
        raise Skip(
            "no CIFAR-10: give --data FOLDER with cifar10*.tar, or train/ and val/, in it; nor scikit-learn's digits"
        )
    prepare("digits", work / "digits")
    return work / "digits", "digits"


def cifar10(arguments: argparse.Namespace) -> Iterator[Row]:
    """SimCLR by the small-data recipe, with a schedule as long as the time; 5-nn of it and of random weights."""
    end = time.monotonic() + arguments.seconds
    kind = Loader if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali") else TorchLoader
    loads = "views by DALI" if kind is Loader else "views by torch, for want of DALI"
    with tempfile.TemporaryDirectory() as folder:
        root, name = find_cifar(None if arguments.tiny else arguments.data, Path(folder))
        batch = 64 if arguments.tiny else 512
        per_epoch = sum(1 for path in (root / "train").rglob("*") if path.is_file()) // batch
        short = ["optim.schedule=cosine", "optim.warmup_steps=0", "optim.warmup_epochs=1", "monitor.every_steps=20",
                 "online.measures_every_epochs=null"]  # fmt: skip

        def chosen(epochs: int) -> PretrainConfig:
            cut = ["max_steps=4"] if arguments.tiny else []
            return recipe(f"{name}/simclr", root, batch, arguments.tiny, *short, *cut, f"epochs={epochs}")

        # The first epoch decodes pictures, which TorchLoader then keeps.
        warmup, steps = (1, 1) if arguments.tiny else (per_epoch, per_epoch // 2)
        trial = Rounds(steps, 1, warmup, lambda _: {})
        start = time.monotonic()
        train(chosen(1000), kind, trial)
        first = time.monotonic() - start
        an_epoch = trial.each("ours")[0] * per_epoch
        # Two evaluations, each of which reads all pictures once, as the first epoch did.
        left = end - time.monotonic() - 2 * first
        epochs = 2 if arguments.tiny else max(2, int(0.85 * (left - first) / an_epoch))
        run = Path(folder) / "run"
        with loading_with(kind):
            start = time.monotonic()
            pretrain.pretrain(chosen(epochs), run)
            took = time.monotonic() - start
            rows = [row for row in read_lines(run / "metrics.jsonl") if row.get("images_per_second")]
            rates = [row["images_per_second"] for row in rows][-9:] or [batch * per_epoch / an_epoch]
            what = "simclr, ResNet-18, 32 px, from files: images/s of the loop"
            yield measure.measured(what, rates, "images/s", detail=f"{name}, batch {batch}, {loads}")
            found = {}
            for weights in ("trained", "random"):
                given = features.options(run, random_init=weights == "random")
                found[weights] = knn.run(knn.Options(features=given, cosine_k=[]))["knn5_top1"]
                if weights == "trained":
                    detail = f"{name}, {epochs} epochs in {took:.0f} s, {loads}"
                    yield measure.measured("simclr, short run: 5-nn top-1", [found[weights]], "%", detail=detail)
            yield measure.measured(
                "simclr, short run: 5-nn top-1 of random weights", [found["random"]], "%", detail=name
            )


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], Iterable[Row]]] = {
    one.__name__: one for one in (barlow_twins, simclr, loader, losses, compiled, cifar10)
}


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MEASUREMENTS)
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU does in seconds")
    parser.add_argument("--seconds", type=float, default=300.0, help="that cifar10 has")
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10")
    parser.add_argument("--json", type=Path, help="file for the rows, written after each")
    arguments = parser.parse_args()
    rows = []
    try:
        for row in MEASUREMENTS[arguments.name](arguments):
            rows.append(row)
            if arguments.json is not None:
                arguments.json.write_text(json.dumps([asdict(one) for one in rows]))
    except Skip as reason:
        print(reason)
        return SKIP_STATUS
    print(measure.table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
