"""Bytes sent a step, memory a rank and predicted efficiency of the eight methods: the tables of docs/scaling.md.

    python benchmarks/scaling.py                            print them: seconds, no GPU, no training
    python benchmarks/scaling.py --output docs/scaling.md   put them between that page's markers
    python benchmarks/scaling.py --check                    count a real step of each method on 1, 2 and 4 gloo processes

Nothing here was measured on a GPU. What is sent follows from the code and is counted (`--check`, tests/test_scaling.py);
how long it takes follows from `Cluster`, whose numbers are assumptions, each with its source.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_pipeline import backbone, compute, config, distributed, optim, pretrain
from ssl_pipeline.data.index import Index
from ssl_pipeline.evaluation.online import Online
from ssl_pipeline.methods import Method, Progress
from ssl_pipeline.monitor import Monitor
from ssl_pipeline.preemption import Preemption
from ssl_pipeline.pretrain import PretrainConfig

METHODS = ("simclr", "byol", "barlow_twins", "simsiam", "vicreg", "w_mse", "ssl_hsic", "swav")
FLOAT = 4
"""Bytes of a number in fp32: losses, batch statistics and gradients."""
HALF = 2


# ------------------------------------------------------------------------------------------------------ the config, read
@dataclass(frozen=True)
class Setting:
    """What the formulas are functions of."""

    options: PretrainConfig
    model: Method
    """On no memory."""
    rows: int
    """N: pictures of a step on one rank."""
    ranks: int
    """W."""
    scale: int = 1
    """By which views are smaller than the config's."""

    @property
    def views(self) -> list[int]:
        """The size of each of the V views, in pixels."""
        return [view.size // self.scale for view in self.options.data.views for _ in range(view.count)]

    @property
    def method(self) -> Any:
        """The method's options."""
        return self.options.method

    @property
    def dimension(self) -> int:
        """K: the embedding's."""
        return self.model.head.outputs


def setting(name: str, ranks: int, rows: int | None = None) -> Setting:
    """The packaged config `name`; `rows` a rank, or else its own batch divided among the ranks."""
    options, model = _built(name)
    return Setting(options, model, rows or options.data.batch_size // ranks, ranks)


@cache
def _built(name: str, *overrides: str) -> tuple[PretrainConfig, Method]:
    options = config.validate(PretrainConfig, config.load(name, list(overrides)).values)
    with torch.device("meta"):
        return options, pretrain.build_method(options)


def channels(part: nn.Module) -> list[int]:
    """C of each batch norm."""
    return [norm.num_features for norm in part.modules() if isinstance(norm, _BatchNorm)]


@dataclass(frozen=True)
class Passes:
    """How often a step goes through each part; every batch norm in it makes its collectives as often."""

    backbone: int
    head: int
    predictor: int = 0
    target: int = 0
    """Through the target's backbone and head: forward alone."""


def passes(at: Setting) -> Passes:
    """Of a step that is not divided into micro-batches."""
    views = len(at.views)
    if at.method.name == "simclr":
        return Passes(1 if at.method.views_together else views, 1)
    if at.method.name == "swav":  # consecutive views of one size together
        return Passes(len(list(itertools.groupby(at.views))), 1)
    if at.method.name == "w_mse":
        return Passes(views, 1)
    if at.method.name == "simsiam":
        return Passes(views, views, predictor=views)
    if at.method.name in ("byol", "ssl_hsic"):
        return Passes(views, views, predictor=views, target=views)
    return Passes(views, views)


# ---------------------------------------------------------------------------------------------------------- what is sent
@dataclass(frozen=True)
class Collective:
    """Calls of one kind."""

    what: str
    kind: str
    """all_reduce, all_gather or reduce_scatter."""
    when: str
    """forward, backward, gradients (DistributedDataParallel's, within backward), update, or logged (once an interval)."""
    payload: int
    """Bytes of the tensor that a rank gives: what is reduced, its own share of what is gathered, all that is scattered."""
    count: int = 1
    group: int | None = None
    """Ranks that take part; None for all."""

    def sent(self, ranks: int) -> float:
        """Bytes that a rank sends by the ring algorithm, in all calls."""
        return self.count * self.payload * {
            "all_reduce": 2 * (ranks - 1) / ranks,  # a reduce_scatter and an all_gather
            "all_gather": ranks - 1,  # each share goes past every other rank
            "reduce_scatter": (ranks - 1) / ranks,
        }[self.kind]  # fmt: skip


def traffic(at: Setting, gpu: bool = True) -> list[Collective]:
    """The collectives of a step. `gpu`: as on a GPU (torch's SyncBatchNorm, DDP's all_reduce), or as on the CPU."""
    return [*batch_norm(at, gpu), *LOSSES[at.method.name](at), *gradients(at, gpu), *every_step(at)]


def batch_norm(at: Setting, gpu: bool) -> list[Collective]:
    """Synchronised batch norm, of every layer of every pass.

    torch's gathers (mean, inverse deviation, count) forward and reduces two sums backward; ours, on the CPU, reduces the
    sum and then the squares about the mean, and the gradients of both.
    """
    if at.ranks == 1:
        return []
    model, times = at.model, passes(at)
    parts = [
        ("backbone", channels(model.backbone), times.backbone, True),
        ("head", channels(model.head), times.head, True),
        ("predictor", channels(getattr(model, "predictor", nn.Identity())), times.predictor, True),
        ("target", channels(getattr(model, "target", nn.Identity())), times.target, False),
    ]
    found = []
    for part, widths, count, trained in parts:
        what = f"batch norm, {part}"
        for width in widths if count else []:
            if gpu:
                found.append(Collective(what, "all_gather", "forward", FLOAT * (2 * width + 1), count))
                found += [Collective(what, "all_reduce", "backward", FLOAT * 2 * width, count)] * trained
            else:
                found.append(Collective(what, "all_reduce", "forward", FLOAT * width, 2 * count))
                found += [Collective(what, "all_reduce", "backward", FLOAT * width, 2 * count)] * trained
    return found


def gradients(at: Setting, gpu: bool) -> list[Collective]:
    """DistributedDataParallel's: all_reduce on a GPU, all_gather and a sum in rank order on the CPU."""
    if at.ranks == 1:
        return []
    kind = "all_reduce" if gpu else "all_gather"
    part = 2 if at.options.compute.gradient_compression == "bf16" else 1
    return [Collective("gradients", kind, "gradients", size // part) for size in buckets(at.model)]


def buckets(model: nn.Module) -> list[int]:
    """Bytes of DistributedDataParallel's buckets: 1 MiB and then 25 MiB, filled from the last parameter on."""
    trained = [p for p in model.parameters() if p.requires_grad]
    full, sizes = [1 << 20, 25 << 20], [0]
    for p in reversed(trained):
        sizes[-1] += FLOAT * p.numel()
        if sizes[-1] >= full[min(len(sizes), 2) - 1]:
            sizes.append(0)
    return [size for size in sizes if size]


def every_step(at: Setting) -> list[Collective]:
    """What the loop itself sends: the online classifier's gradients, and whether any rank was signalled."""
    width, classes = backbone.width(at.model.backbone), CLASSES.get(at.options.data.name, 0)
    found = [Collective("signals", "all_reduce", "update", 8)]
    if at.options.online.linear and classes and at.ranks > 1:
        found += [
            Collective("online classifier", "all_reduce", "update", FLOAT * classes * width),
            Collective("online classifier", "all_reduce", "update", FLOAT * classes),
        ]
    return found


CLASSES = {"imagenet": 1000}
"""Of the data sets by the configs' names; others are not asked for."""


def logged_step(scalars: int, interval: int) -> list[Collective]:
    """What a logged step sends besides: sums of so many scalars, three numbers of each step since, the clocks, and how many
    unreadable pictures are new."""
    return [
        Collective("monitor", "all_reduce", "logged", FLOAT * (scalars + 3 + 3 * interval)),
        Collective("monitor", "all_gather", "logged", 16),
        Collective("unreadable pictures", "all_reduce", "logged", 8),
    ]


# Losses of one step, by method. N rows a rank, V views, K dimensions, W ranks; all in fp32.
def _reduced(size: int, backward: bool = False) -> list[Collective]:
    """An all-reduce of so many bytes, and of its gradient where that is no multiple of each rank's own."""
    found = [Collective("loss", "all_reduce", "forward", size)]
    return found + [Collective("loss", "all_reduce", "backward", size)] * backward


def _gathered(size: int) -> list[Collective]:
    """An all-gather of so many bytes a rank, without gradient."""
    return [Collective("loss", "all_gather", "forward", size)]


def _simclr(at: Setting) -> list[Collective]:
    """Both views' embeddings, and each anchor's sum of exponentials; the gradient is made from them without another."""
    return _gathered(FLOAT * 2 * at.rows * at.dimension) + _gathered(FLOAT * 2 * at.rows)


def _column_products(at: Setting, factors: int) -> list[Collective]:
    """The diagonal of a matrix (K, K), and its squares: from the factors' rows where the batch is under K / 2, or else itself."""
    found = _reduced(FLOAT * at.dimension)
    if 2 * at.rows * at.ranks < at.dimension:
        return found + factors * _gathered(FLOAT * at.rows * at.dimension) + _reduced(FLOAT)
    return found + _reduced(FLOAT * at.dimension**2)


def _barlow_twins(at: Setting) -> list[Collective]:
    """Mean and variance of both views at once, with their gradients, and the correlation matrix."""
    return 2 * _reduced(FLOAT * 2 * at.dimension, backward=True) + _column_products(at, factors=2)


def _vicreg(at: Setting) -> list[Collective]:
    """The mean and the covariance matrix, of each view."""
    return 2 * (_reduced(FLOAT * at.dimension) + _column_products(at, factors=1))


def _w_mse(at: Setting) -> list[Collective]:
    """All views' embeddings, the gradients of all rows back to their ranks, and the shares of the loss."""
    whole = Collective("loss", "reduce_scatter", "backward", FLOAT * at.rows * at.ranks * len(at.views) * at.dimension)
    return [*_gathered(FLOAT * at.rows * len(at.views) * at.dimension), whole, *_reduced(2 * FLOAT)]


def _ssl_hsic(at: Setting) -> list[Collective]:
    """Sums and means of F random features, and their products (F, F); the embeddings drawn for the kernel's scale."""
    features, sets = at.method.random_features, 4  # two views' predictions, and their targets
    drawn = 2 * sets * max(at.method.scale_samples // sets, 1)
    sizes = [features + 1, 2 * features, features**2, drawn * at.dimension, 1]
    return [one for size in sizes for one in _reduced(FLOAT * size)]


def _swav(at: Setting) -> list[Collective]:
    """The prototypes' shares in each of Sinkhorn's iterations, for two views; embeddings for a queue."""
    found = at.method.sinkhorn_iterations * _reduced(FLOAT * 2 * at.method.prototypes)
    return found + _gathered(FLOAT * at.rows * 2 * at.dimension) * bool(at.method.queue_length)


LOSSES: dict[str, Callable[[Setting], list[Collective]]] = {
    "simclr": _simclr, "byol": lambda at: [], "barlow_twins": _barlow_twins, "simsiam": lambda at: [],
    "vicreg": _vicreg, "w_mse": _w_mse, "ssl_hsic": _ssl_hsic, "swav": _swav,
}  # fmt: skip


# ------------------------------------------------------------------------------------------- counting a real step (gloo)
COUNTED = {
    "all_reduce": ("all_reduce", 0), "all_gather": ("all_gather", 1), "all_gather_into_tensor": ("all_gather", 1),
    "all_gather_single": ("all_gather", 1), "reduce_scatter": ("reduce_scatter", 1),
    "reduce_scatter_tensor": ("reduce_scatter", 1), "reduce_scatter_single": ("reduce_scatter", 1),
    "broadcast": ("broadcast", 0), "reduce": ("reduce", 0), "all_to_all_single": ("all_to_all", 1), "gather": ("gather", 0),
    "scatter": ("scatter", 0),
}  # fmt: skip
"""Functions of torch.distributed, the kind of each, and which of its arguments a rank gives."""
Count = Counter[tuple[str, str, int]]
"""Calls by kind, when and payload."""


@contextlib.contextmanager
def counting(when: list[str]) -> Iterator[Count]:
    """A context that counts the collectives of this process, by `when[0]` unless in a backward pass."""
    found: Count = Counter()
    nested: list[str] = []

    def counted(kind: str, place: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            if not nested:  # one may call another, as all_gather_into_tensor does under a newer name
                x = given[place] if place < len(given) else named.get("tensor", named.get("input_tensor"))
                x = torch.cat([part.flatten() for part in x]) if isinstance(x, list) else x
                # DDP calls its hook from C++, within the backward pass.
                hook = sys._getframe(1).f_code.co_name == distributed._mean_in_rank_order.__name__
                backward = torch._C._current_graph_task_id() != -1
                found[kind, "gradients" if hook else "backward" if backward else when[0], x.nbytes] += 1
            nested.append(kind)
            try:
                return original(*given, **named)
            finally:
                nested.pop()

        return call

    with in_place_of_collectives(lambda name, original: counted(*COUNTED[name], original)):
        yield found


@contextlib.contextmanager
def in_place_of_collectives(new: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """A context in which each function of COUNTED is another, made of its name and itself, wherever the package calls it."""
    places = [(dist, name, name) for name in COUNTED if hasattr(dist, name)]
    held = {id(getattr(dist, name)): name for _, name, _ in places}
    places += [(distributed, own, held[id(x)]) for own, x in vars(distributed).items() if id(x) in held]
    originals = [getattr(module, attribute) for module, attribute, _ in places]
    for (module, attribute, name), original in zip(places, originals, strict=True):
        setattr(module, attribute, new(name, original))
    try:
        yield
    finally:
        for (module, attribute, _), original in zip(places, originals, strict=True):
            setattr(module, attribute, original)


def as_count(collectives: Iterable[Collective]) -> Count:
    """Formulas in the form of a count."""
    found: Count = Counter()
    for one in collectives:
        found[one.kind, one.when, one.payload] += one.count
    return found


TINY = [
    "backbone.name=resnet18",
    "backbone.stem=small_maxpool",
    "backbone.arguments={layers: [1, 1, 1, 1], channels: [8, 16, 32, 64]}",
    "data.batch_size=64",
    "head.hidden=480",
    "optim.warmup_epochs=0",
]
"""The packaged ImageNet configs, so small that a step takes a moment. Two buckets of gradients."""
CASES = {
    "simclr": ["head.output=40"],
    "byol": ["method.predictor_hidden=512", "head.output=40"],
    "byol, bf16 gradients": ["method.predictor_hidden=512", "head.output=40", "compute.gradient_compression=bf16"],
    "barlow_twins": ["head.output=40"],
    "barlow_twins, few rows": ["head.output=136"],
    "simsiam": ["method.predictor_hidden=56", "head.output=72"],
    "vicreg": ["head.output=40"],
    "vicreg, few rows": ["head.output=136"],
    "w_mse": ["method.w_size=32", "head.output=16"],
    "ssl_hsic": ["method.predictor_hidden=512", "method.random_features=32", "head.output=40"],
    "swav": ["method.prototypes=24", "method.queue_length=128", "method.queue_start_epoch=0", "head.output=24"],
}
"""Methods, and what is tiny in their heads and losses. Few rows: under half the dimension."""


def tiny(case: str, ranks: int) -> Setting:
    """A case's ImageNet config on a tiny network and views of 32 px in the place of 224."""
    options, model = _built(f"imagenet/{case.split(',')[0]}", *TINY, *CASES[case])
    return Setting(options, model, options.data.batch_size // ranks, ranks, scale=7)


def noise(at: Setting) -> list[Tensor]:
    """Views (N, 3, S, S)."""
    return [torch.randn(at.rows, 3, size, size) for size in at.views]


def count_step(case: str, gpu: bool = False) -> tuple[Count, Count]:
    """(counted, by the formulas) of one real training step of this process's rank, logged, on the tiny network.

    The step is the loop's. `gpu`: with torch's SyncBatchNorm, whose CUDA kernels have stand-ins; DDP's hook stays the CPU's.
    """
    world = distributed.start()
    at = tiny(case, world.size)
    options, steps = at.options, 40
    torch.manual_seed(world.rank)
    module = pretrain.build_method(options)
    with torch_batch_norm() if gpu else contextlib.nullcontext(), tempfile.TemporaryDirectory() as folder:
        model = compute.wrap(module, options.compute, world.device)
        optimizer = optim.build(module.parameter_groups(), options.optim, options.data.batch_size)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        classes = tuple(map(str, range(CLASSES["imagenet"])))
        index = Index(Path(folder), ("",) * 1000, np.arange(1000), classes)
        width = backbone.width(module.backbone)
        online = Online(options.online, options.data, width, options.backbone, index, (None, None), options.seed, world)
        watch = Monitor(options.monitor, Path(folder) / f"{world.rank}.jsonl", Path(folder) / f"{world.rank}", world,
                        options.data.batch_size, steps)  # fmt: skip
        module.train()
        labels = torch.arange(at.rows)
        when = ["update"]
        with contextlib.closing(watch), Preemption() as preemption:
            for step in range(2):  # DDP makes its buckets anew after its first step
                progress = Progress(step, steps, 0, 1)
                rates = optim.set_rates(optimizer, 0.001)  # the real rates are not for noise
                module.before_forward(progress)
                views = noise(at)
                with counting(when) as counted:
                    when[0] = "forward"
                    output = pretrain._forward_backward(module, model, views, 1, torch.bfloat16, scaler)
                    when[0] = "update"
                    module.before_update(progress)
                    norm = nn.utils.get_total_norm(optim.gradients(optimizer))
                    finite = torch.isfinite(norm)
                    optimizer.step()
                    module.after_update(progress, rates, finite)
                    optimizer.zero_grad()
                    seen = online.step(output.features, labels, finite)
                    scalars = output.logs | {"gradient_norm": norm} | seen
                    watch.add(scalars, finite)
                    when[0] = "logged"
                    with contextlib.redirect_stderr(None):
                        watch.log(step + 1, 0, rates, len(distributed.union([])))
                    when[0] = "update"
                    preemption.requested()
                assert bool(finite), case
    wanted = [one for one in traffic(at, gpu) if one.what != "gradients"]
    formulas = as_count([*wanted, *gradients(at, gpu=False), *logged_step(len(scalars), 1)])
    return in_buckets(counted), in_buckets(formulas)


def in_buckets(found: Count) -> Count:
    """A count whose gradients are their sum, once for each bucket: the order in which they come, which depends on the graph,
    decides which of two neighbours closes a bucket."""
    merged: Count = Counter()
    total = sum(payload * count for (_, when, payload), count in found.items() if when == "gradients")
    for (kind, when, payload), count in found.items():
        merged[kind, when, total if when == "gradients" else payload] += count
    return merged


@contextlib.contextmanager
def torch_batch_norm() -> Iterator[None]:
    """A context in which torch's SyncBatchNorm serves on the CPU: its own code and collectives, its five kernels replaced.

    The stand-ins give the right shapes and the statistics of this rank alone; nothing is to be learned by them.
    """

    def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        var, mean = torch.var_mean(x.float(), [axis for axis in range(x.dim()) if axis != 1], correction=0)
        return mean, (var + eps).rsqrt()

    def reduce(dy: Tensor, x: Tensor, mean: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        total = dy.float().sum([axis for axis in range(dy.dim()) if axis != 1])
        return total, total.clone(), total.clone(), total.clone()

    kernels: dict[str, Callable[..., Any]] = {
        "batch_norm_stats": stats,
        "batch_norm_gather_stats_with_counts": lambda x, mean, *rest: stats(x, 1e-5),
        "batch_norm_elemt": lambda x, weight, bias, mean, invstd, eps: x * 1,
        "batch_norm_backward_reduce": reduce,
        "batch_norm_backward_elemt": lambda dy, *rest: dy * 1,
    }
    sync_batch_norm = torch.nn.modules.batchnorm.sync_batch_norm

    def forward(self: distributed.BatchNorm, x: Tensor) -> Tensor:  # what nn.SyncBatchNorm does, which refuses the CPU
        statistics = self.weight, self.bias, self.running_mean, self.running_var
        return self._held(sync_batch_norm.apply(x, *statistics, self.eps, 0.1, dist.group.WORLD, dist.get_world_size()))

    saved, ours = {name: getattr(torch, name) for name in kernels}, distributed.BatchNorm.forward
    for name, kernel in kernels.items():
        setattr(torch, name, kernel)
    distributed.BatchNorm.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for name, kernel in saved.items():
            setattr(torch, name, kernel)
        distributed.BatchNorm.forward = ours  # type: ignore[method-assign]


def check_here() -> None:
    """Count on this process's rank; the main one prints a table. Raises AssertionError where a count is not the formula's."""
    rows = []
    for case, gpu in itertools.product(CASES, (False, True)):
        counted, formulas = count_step(case, gpu)
        difference = f"{case}: counted {counted - formulas} and not {formulas - counted}"
        assert counted == formulas, difference
        total = sum(payload * (1 if when == "gradients" else count) for (_, when, payload), count in counted.items())
        rows.append((case, "torch's" if gpu else "ours", counted.total(), total))
    if distributed.rank() == 0:
        print(f"{distributed.world_size()} ranks: every collective as by the formulas")
        print(markdown(("", "batch norm", "collectives", "payload, bytes"), rows))
    distributed.stop()


def check() -> int:
    """`check_here` on 1, 2 and 4 gloo processes; the exit status."""
    for ranks in (1, 2, 4):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run([*launcher, __file__, "--count"], env=os.environ | threads, check=False)
        if done.returncode:
            return done.returncode
    return 0


# ----------------------------------------------------------------------------------------------------------- memory a rank
@contextlib.contextmanager
def fake(ranks: int) -> Iterator[None]:
    """A context in which tensors have no memory and collectives of so many ranks do nothing."""
    size, rank = dist.get_world_size, dist.get_rank
    dist.get_world_size, dist.get_rank = lambda *_: ranks, lambda *_: 0
    try:
        with in_place_of_collectives(lambda *_: lambda *_, **__: None), FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        dist.get_world_size, dist.get_rank = size, rank


def saved_bytes(forward: Callable[[], Any], given: Iterable[Tensor]) -> int:
    """Bytes of all storages that `forward` keeps for its backward pass, but those of the tensors `given`."""
    kept: dict[int, Any] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no other gets its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        held = forward()
    known = {x.untyped_storage()._cdata for x in given}
    size = sum(storage.nbytes() for place, storage in kept.items() if place not in known)
    del held
    return size


def autocast(options: PretrainConfig) -> torch.autocast:
    """The loop's."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(options.precision)
    return torch.autocast("cpu", dtype=half, enabled=half is not None)


@cache
def activations(architecture: str, precision: str, size: int) -> tuple[int, int]:
    """(bytes whatever the number of rows, bytes a view of S px) that the backbone keeps for backward.

    The former are the weights in half precision.
    """
    options = backbone.Options.model_validate_json(architecture)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    found = []
    with fake(1):
        network = backbone.build(options).train()
        for rows in (2, 4):
            x = torch.empty(rows, 3, size, size)
            with torch.autocast("cpu", dtype=half, enabled=half is not None):
                found.append(saved_bytes(lambda x=x: network(x), [x, *network.parameters()]))
    each = (found[1] - found[0]) // 2
    return found[0] - 2 * each, each


def _empty(x: Tensor | None) -> Any:
    if x is None:
        return None
    new = torch.empty(x.shape, dtype=x.dtype)
    return nn.Parameter(new, x.requires_grad) if isinstance(x, nn.Parameter) else new


def objective_bytes(at: Setting) -> int:
    """What head, predictor and loss keep."""
    model = copy.copy(at.model)
    model._buffers, model._modules = dict(model._buffers), dict(model._modules)
    own = [name for name in model._modules if name not in ("backbone", "target", "average")]
    model._modules.update({name: copy.deepcopy(model._modules[name]) for name in own})
    with fake(at.ranks):
        for part in (model, *(part for name in own for part in model._modules[name].modules())):  # type: ignore[union-attr]
            part._parameters.update({name: _empty(p) for name, p in part._parameters.items()})
            part._buffers.update({name: _empty(b) for name, b in part._buffers.items()})
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(at.options.precision, torch.float32)
        features = [torch.empty(at.rows, backbone.width(model.backbone), dtype=half).requires_grad_() for _ in at.views]
        targets = [torch.empty(at.rows, at.dimension) for _ in at.views]
        with autocast(at.options):
            return saved_bytes(lambda: model.objective(features, targets).loss, [*model.parameters(), *model.buffers()])


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, without what libraries hold for themselves."""

    trained: int
    """Trained parameters, fp32. DistributedDataParallel's buckets are the gradients' own memory."""
    copies: int
    """Targets and averages, fp32."""
    moments: int
    """The optimizer's state."""
    buffers: int
    """Batch statistics and queues, and the copy that is put back if a step is skipped."""
    fixed: int
    """The backbone's weights in half precision, as long as autocast holds them."""
    views: int
    """What the backbone keeps for backward."""
    objective: int
    """What head, predictor and loss keep."""

    @property
    def total(self) -> int:
        return 2 * self.trained + self.copies + self.moments + self.buffers + self.fixed + self.views + self.objective


def memory(at: Setting) -> Memory:
    """Of a step that is not divided into micro-batches, in the middle of it: all that backward needs, and gradients."""
    model, options = at.model, at.options
    trained = sum(FLOAT * p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(FLOAT * p.numel() for p in model.parameters())
    per_view = [activations(options.backbone.model_dump_json(), options.precision, size) for size in at.views]
    return Memory(
        trained=trained,
        copies=whole - trained,
        moments=trained * (2 if options.optim.name in ("adam", "adamw", "lamb") else 1),
        buffers=2 * sum(b.numel() * b.element_size() for b in model.buffers()),
        fixed=per_view[0][0],
        views=at.rows * sum(each for _, each in per_view),
        objective=objective_bytes(at),
    )


def most_rows(at: Setting, room: float) -> int:
    """The most rows, in steps of 16, whose step has room in so many bytes, were memory a straight line from N to 2 N rows."""
    here, twice = memory(at).total, memory(replace(at, rows=2 * at.rows)).total
    return int(at.rows * (1 + (room - here) / (twice - here))) // 16 * 16


# ------------------------------------------------------------------------------------------------------ time, on paper
@dataclass(frozen=True)
class Cluster:
    """A machine, by numbers that are assumptions; docs/scaling.md has the source of each."""

    views: float = 3400.0
    """Views of 224 px that a ResNet-50 goes forward and backward with in a second, in eager PyTorch, bf16, channels_last."""
    half: float = 400e12
    """Operations a second of the heads' matrix products, bf16."""
    single: float = 40e12
    """Operations a second of the losses' matrix products, fp32."""
    memory: float = 2.5e12
    """Bytes a second of the optimizer."""
    pass_: float = 15e-3
    """Seconds of the host for one pass forward and backward through a ResNet-50: it can be no faster, however few the rows."""
    wait: float = 30e-6
    """Seconds that the device idles at each synchronised norm, since torch's waits for it before it goes on."""
    node: int = 8
    inside: float = 370e9
    """Bytes a second that a rank sends within a node."""
    between: float = 320e9
    """The same where there are several nodes: 8 x 400 Gb/s, 80 % of it."""
    latency: float = 2.0
    """Factor on the latencies of NCCL's own model."""


H100 = Cluster()
LOW = replace(H100, views=6900.0, pass_=5e-3)
"""Where the step is as fast as MLPerf's, and what is sent binds the sooner."""
HIGH = replace(H100, latency=1.0, wait=10e-6)
"""Where latencies are those of NCCL's own model."""
A100 = replace(H100, views=2470.0, inside=235e9, between=160e9, half=150e12, single=15e12, memory=1.4e12)
V100 = replace(H100, views=1180.0, inside=130e9, between=40e9, half=60e12, single=12e12, memory=0.7e12, pass_=25e-3)

# Microseconds: before the first hop, a hop by NVLink, a hop between nodes; then the share of the bandwidth that is reached and
# the most of it, in bytes a second, in one node and in several.
PROTOCOLS = {
    "ring": [(6.6, 0.6, 2.7, 0.25, (88e9, 20e9)), (14.0, 1.9, 4.0, 0.92, None), (8.4, 3.4, 14.0, 1.0, None)],
    "tree": [(6.8, 0.6, 5.0, 0.24, (88e9, 20e9)), (14.0, 1.25, 8.5, 0.85, None)],
    "switch": [(25.0, 0.0, 14.0, 1.0, None)],
}
"""NCCL's LL, LL128 and Simple by ring and tree, and Simple by NVLS and NVLSTree. Source: NVIDIA/nccl v2.22.3-1
src/graph/tuning.cc."""


def seconds(one: Collective, ranks: int, on: Cluster) -> float:
    """Of all calls of a collective, one after the other, by the fastest of NCCL's algorithms."""
    return one.count * _seconds(one.kind, one.payload, min(one.group or ranks, ranks), on)


@cache
def _seconds(kind: str, payload: int, ranks: int, on: Cluster) -> float:
    if ranks == 1:
        return 0.0
    nodes, local = -(-ranks // on.node), min(ranks, on.node)
    where, bus = (1, on.between) if nodes > 1 else (0, on.inside)
    sent = Collective("", kind, "", payload).sent(ranks)
    reduces = kind == "all_reduce"
    found = []
    for base, near, far, share, most in PROTOCOLS["ring"]:
        steps, across = (2 * (ranks - 1), 2 * nodes) if reduces else (ranks - 1, nodes - 1)
        across = across if nodes > 1 else 0
        # Between nodes every hop of a ring posts to the network card: 1 us, 3 where whole buffers are handed on.
        hop = max(near, 3.0 if near > 3 else 1.0) if nodes > 1 else near
        bandwidth = min(share * bus, most[where] if most else math.inf)
        found.append((base + (steps - across) * hop + across * far, sent / bandwidth))
    for base, near, far, share, most in PROTOCOLS["tree"] if reduces else []:
        bandwidth = min(share * bus, most[where] if most else math.inf)
        found.append((base + 2 * ((local - 1) * near + math.log2(nodes) * far), 2 * payload / bandwidth))
    for base, _, far, share, _most in PROTOCOLS["switch"] if reduces else []:
        found.append((base + 2 * math.log2(nodes) * far, 2 * payload / (share * bus)))
    return min(1e-6 * on.latency * latency + transfer for latency, transfer in found)


@dataclass(frozen=True)
class Step:
    """Seconds of a step."""

    compute: float
    """Backbone, heads, loss and optimizer; or the host, where that takes longer."""
    batch_norm: float
    loss: float
    gradients: float
    """What backward does not hide of them."""
    others: float
    """The online classifier's gradients."""

    @property
    def sent(self) -> float:
        return self.batch_norm + self.loss + self.gradients + self.others

    @property
    def total(self) -> float:
        return self.compute + self.sent


def loss_operations(at: Setting) -> float:
    """Multiplications and additions of the loss's matrix products on a rank, forward and backward."""
    rows, whole, width, views = at.rows, at.rows * at.ranks, at.dimension, len(at.views)
    few = 2 * whole < width
    products = {
        "simclr": lambda: 3 * 2 * rows * 2 * whole * width,  # the similarities twice, and their gradient
        "barlow_twins": lambda: 4 * rows * whole * width if few else 3 * rows * width**2,
        "vicreg": lambda: 4 * rows * (whole if few else width) * width,
        "w_mse": lambda: 3 * views * rows * width * (width + width / 2),
        "ssl_hsic": lambda: 3 * 4 * rows * at.method.random_features * (2 * width + at.method.random_features),
        "swav": lambda: 3 * views * rows * width * at.method.prototypes,
    }.get(at.method.name, lambda: 0)()
    return 2 * products


def working(at: Setting, on: Cluster) -> float:
    """Seconds of a rank's own work, the host's where it takes longer than the device's."""
    model, times = at.model, passes(at)
    online = sum((size / 224) ** 2 for size in at.views)
    target = online / 3 if times.target else 0.0  # forward alone
    head = sum(p.numel() for p in [*model.head.parameters(), *getattr(model, "predictor", nn.Identity()).parameters()])
    trained = sum(FLOAT * p.numel() for p in model.parameters() if p.requires_grad)
    device = at.rows * (online + target) / on.views + 6 * head * at.rows * len(at.views) / on.half
    device += loss_operations(at) / on.single + 7 * trained / on.memory
    return max(device, on.pass_ * (times.backbone + times.target / 3))


def exposed(at: Setting, sent: list[Collective], on: Cluster) -> float:
    """Seconds of the gradients' all-reduces that backward does not hide.

    They share one communicator with batch norm, whose next all-reduce waits for those that began before it. So a bucket
    hides behind the work between two norms; the head's buckets are ready at once; nothing is left to hide the last.
    """
    each = [seconds(one, at.ranks, on) for one in sent if one.when == "gradients"]
    calls = sum(one.count for one in sent if one.what.startswith("batch norm") and one.when == "backward")
    work = 2 / 3 * working(at, on)
    if not calls:
        return each[-1] + max(0.0, sum(each[:-1]) - work)
    model = at.model
    behind = sum(FLOAT * p.numel() for p in model.parameters() if p.requires_grad)
    behind -= sum(FLOAT * p.numel() for p in model.backbone.parameters())
    sizes = [one.payload for one in sent if one.when == "gradients"]
    burst = next((n for n in range(len(sizes)) if sum(sizes[: n + 1]) > behind), len(sizes) - 1)
    slack = work / calls
    return max(0.0, sum(each[:burst]) - slack) + sum(max(0.0, one - slack) for one in each[burst:-1]) + each[-1]


def step(at: Setting, on: Cluster = H100, sent: list[Collective] | None = None) -> Step:
    """Predicted; `sent` in the place of the step's own collectives."""
    sent = traffic(at) if sent is None else sent
    norms = [one for one in sent if one.what.startswith("batch norm")]
    loss = [one for one in sent if one.what == "loss"]
    others = [one for one in sent if one.what == "online classifier"]
    waits = on.wait * sum(one.count for one in norms if one.kind == "all_gather")
    return Step(
        working(at, on),
        sum(seconds(one, at.ranks, on) for one in norms) + waits,
        sum(seconds(one, at.ranks, on) for one in loss),
        exposed(at, sent, on) if at.ranks > 1 else 0.0,
        sum(seconds(one, at.ranks, on) for one in others),
    )


def efficiency(at: Setting, on: Cluster = H100, sent: list[Collective] | None = None) -> float:
    """Pictures a second of a rank, over those of one GPU alone with 256 rows."""
    alone = replace(at, ranks=1, rows=256)
    return (at.rows / step(at, on, sent).total) / (256 / working(alone, on))


SIZES = (8, 16, 64, 256, 1024)


def binds(name: str, rows: int, share: float, on: Cluster = H100) -> str:
    """The fewest ranks, a power of two from 8 on, at which what is sent takes more than `share` of a step."""
    for ranks in [2**n for n in range(3, 13)]:
        found = step(setting(name, ranks, rows), on)
        if found.sent > share * found.total:
            return f"{ranks}"
    return "> 4096"


# -------------------------------------------------------------------------------------------------------------- the tables
def markdown(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table."""
    lines = [list(head), *([str(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def short(number: float) -> str:
    """Three digits."""
    return f"{number:.3g}" if number < 1000 else f"{number:.0f}"


def sent_table() -> str:
    """What a rank sends."""
    rows = []
    for name in METHODS:
        cells: list[object] = [name]
        for start in ("gradients", "batch norm", "loss"):
            of = [
                [one for one in traffic(setting(f"imagenet/{name}", ranks, 64)) if one.what.startswith(start)]
                for ranks in (16, 1024)
            ]
            sizes = [sum(one.sent(ranks) for one in some) for some, ranks in zip(of, (16, 1024), strict=True)]
            cells += [sum(one.count for one in of[0]), *(short(size / 1e6) for size in sizes)]
        rows.append(cells)
    head = ["64 rows a rank"]
    for what in ("gradients", "batch norm", "loss"):
        head += [f"{what}: calls", "MB sent, 16 ranks", "MB sent, 1024"]
    return markdown(head, rows)


def memory_table() -> str:
    """What a rank holds."""
    rows = []
    for name in METHODS:
        at = setting(f"imagenet/{name}", 16, 128)
        found, far = memory(at), memory(replace(at, ranks=1024))
        states = found.trained + found.moments + found.trained + found.copies + found.buffers
        rows.append(
            [name, short(found.trained / 4e6), short(states / 1e6), short(found.fixed / 1e6),
             short(found.views / at.rows / 1e6), short(found.objective / 1e6), short(far.objective / 1e6),
             short(found.total / 1e9), most_rows(at, 72e9), short((found.trained + found.copies + found.moments) / 1e6)]
        )  # fmt: skip
    head = ("128 rows a rank", "trained, M", "states, MB", "bf16 weights, MB", "a picture, MB", "head and loss, 16 ranks, MB",
            "the same, 1024", "in all, 16 ranks, GB", "most rows in 72 GB", "pinned on the host of rank 0, MB")  # fmt: skip
    return markdown(head, rows)


def milliseconds(found: Step) -> str:
    """The parts of a step."""
    parts = (found.compute, found.batch_norm, found.loss, found.gradients, found.others)
    return " + ".join(f"{1000 * part:.3g}" if part < 1 else f"{1000 * part:.0f}" for part in parts)


def span(at: Setting) -> str:
    """The least and the most of the predicted efficiency."""
    low, high = sorted(efficiency(at, on) for on in (LOW, HIGH))
    return f"{100 * low:.0f} to {high:.0%}"


def time_table(rows: int | None) -> str:
    """Milliseconds and efficiency by ranks: of the config's own batch, or of so many rows a rank."""
    lines = []
    for name in METHODS:
        batch = setting(f"imagenet/{name}", 1).options.data.batch_size
        line: list[object] = [f"{name}, {batch}" if rows is None else name]
        for ranks in SIZES:
            if rows is None and batch // ranks < 16:
                line.append("-")
                continue
            at = setting(f"imagenet/{name}", ranks, rows)
            line.append(f"{milliseconds(step(at))}: **{efficiency(at):.0%}** ({span(at)})")
        lines.append(line)
    first = "own batch" if rows is None else f"{rows} rows a rank"
    return markdown([first, *(f"{ranks} GPUs" for ranks in SIZES)], lines)


def binds_table() -> str:
    """Where what is sent begins to bind."""
    lines = []
    for name in METHODS:
        line: list[object] = [name]
        for rows in (64, 256):
            for share in (0.1, 0.5):
                where = [binds(f"imagenet/{name}", rows, share, on) for on in (H100, LOW, HIGH)]
                line.append(f"{where[0]} ({where[1]} to {where[2]})" if len(set(where)) > 1 else where[0])
        at = step(setting(f"imagenet/{name}", 1024, 64))
        parts = {
            "batch norm": at.batch_norm,
            "loss": at.loss,
            "gradients": at.gradients,
            "online classifier": at.others,
        }
        first, second = sorted(parts, key=parts.__getitem__, reverse=True)[:2]
        line.append(f"{first} {parts[first] / at.total:.0%}, {second} {parts[second] / at.total:.0%}")
        lines.append(line)
    head = ("", "64 rows: over 10 %", "over 50 %", "256 rows: over 10 %", "over 50 %", "of a step of 64 rows on 1024")
    return markdown(head, lines)


def halved(sent: list[Collective]) -> list[Collective]:
    """With gradients sent in bf16."""
    return [replace(one, payload=one.payload // 2) if one.when == "gradients" else one for one in sent]


def reduced(sent: list[Collective]) -> list[Collective]:
    """With batch norm's statistics all-reduced as sums, not gathered: the payload does not grow with the ranks."""
    return [replace(one, kind="all_reduce") if one.what.startswith("batch norm") else one for one in sent]


def together(sent: list[Collective]) -> list[Collective]:
    """With both views through backbone, head and target as one batch: half as many calls of the same size."""
    return [replace(one, count=max(one.count // 2, 1)) if one.what.startswith("batch norm") else one for one in sent]


def help_table() -> str:
    """What would help."""

    def all_(sent: list[Collective]) -> list[Collective]:
        return halved(reduced(together(sent)))

    def in_nodes(sent: list[Collective]) -> list[Collective]:
        return [replace(one, group=8) if one.what.startswith("batch norm") else one for one in sent]

    changes: list[tuple[str, Callable[[list[Collective]], list[Collective]]]] = [
        ("as it is", lambda sent: sent),
        ("gradients in bf16", halved),
        ("batch norm's sums all-reduced, and no wait", reduced),
        ("both views as one batch", together),
        ("all three", all_),
        ("batch norm over the 8 GPUs of a node", in_nodes),
        ("batch norm of each rank by itself", lambda s: [one for one in s if not one.what.startswith("batch norm")]),
    ]
    lines = []
    for label, change in changes:
        line: list[object] = [label]
        for name, ranks in itertools.product(("byol", "barlow_twins"), (16, 256, 1024)):
            at = setting(f"imagenet/{name}", ranks, 64)
            line.append(f"{efficiency(at, H100, change(traffic(at))):.0%}")
        lines.append(line)
    head = [
        "64 rows a rank",
        *(f"{n}, {r} GPUs" for n, r in itertools.product(("BYOL", "Barlow Twins"), (16, 256, 1024))),
    ]
    return markdown(head, lines)


def published_table() -> str:
    """The model beside published figures."""
    supervised = setting("imagenet/simclr", 8, 128)  # two views of 128 are a step of 256 pictures
    alone = 256 / A100.views
    reduce_ = [seconds(Collective("", "all_reduce", "", size), 8, A100) for size in buckets(supervised.model.backbone)]
    rest = max(0.0, sum(reduce_[:-1]) - 2 / 3 * alone) + reduce_[-1]
    barlow = setting("imagenet/barlow_twins", 32)
    hours = 1000 * 1_281_167 / 2048 * step(barlow, V100).total / 3600
    lines = [
        ("ResNet-50, supervised, 8 A100 over one (NVIDIA DeepLearningExamples)", "84 %", f"{alone / (alone + rest):.1%}"),
        ("Barlow Twins, 1000 epochs, 32 V100 (Zbontar et al. 2021)", "124 h", f"{hours:.0f} h"),
        ("all-reduce of 128 bytes, two nodes of 8 H100 (NVIDIA/nccl issue 1453)", "62 us",
         f"{1e6 * _seconds('all_reduce', 128, 16, H100):.0f} us"),
        ("all-reduce of 128 bytes, two nodes of 8 H20 (NVIDIA/nccl issue 1244)", "47 us",
         f"{1e6 * _seconds('all_reduce', 128, 16, H100):.0f} us"),
        ("all-reduce of 8 bytes, one node of 8 A100, one ring (NVIDIA/nccl-tests issue 123)", "34 us",
         f"{1e6 * _seconds('all_reduce', 8, 8, H100):.0f} us"),
        ("all-reduce of 32 MiB, two nodes of 8 H20 (NVIDIA/nccl issue 1244)", "0.30 ms",
         f"{1e3 * _seconds('all_reduce', 32 << 20, 16, H100):.2f} ms"),
    ]  # fmt: skip
    return markdown(("", "published", "the model"), lines)


TABLES: dict[str, Callable[[], str]] = {
    "sent": sent_table, "memory": memory_table, "own batch": lambda: time_table(None), "64 rows": lambda: time_table(64),
    "binds": binds_table, "help": help_table, "published": published_table,
}  # fmt: skip


def filled(text: str) -> str:
    """A page with each table in the place between its markers, `<!-- NAME -->` and `<!-- end -->`."""
    for name, table in TABLES.items():
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert between.search(text), f"no markers for {name}"
        text = between.sub(lambda found, table=table: f"{found[1]}{table()}\n{found[2]}", text)
    return text


def main() -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="page whose tables are written anew")
    parser.add_argument("--check", action="store_true", help="count real steps on 1, 2 and 4 gloo processes")
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    distributed.start()
    if arguments.count:
        check_here()
        return 0
    if arguments.check:
        return check()
    if arguments.output is not None:
        arguments.output.write_text(filled(arguments.output.read_text()))
        return 0
    for name, table in TABLES.items():
        print(f"{name}\n\n{table()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
