"""Training on labels, for the evaluations that see pictures: classifiers on a frozen backbone, or the whole network.

One loop for both. It has a folder of its own, RUN/evaluations/<name>-<digest>/, which is a run folder like any other: the
same command goes on there after a stop, and another recipe or other weights have another folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssl_pipeline import backbone as backbones
from ssl_pipeline import checkpoint, cluster, config, distributed, optim
from ssl_pipeline.data.augment import ViewSpec
from ssl_pipeline.data.index import Index
from ssl_pipeline.data.loader import Loader
from ssl_pipeline.evaluation.features import Options as FeatureOptions
from ssl_pipeline.evaluation.features import crop_and_flip
from ssl_pipeline.exits import BadInput, NonFinite, Status, Stop
from ssl_pipeline.monitor import Monitor
from ssl_pipeline.monitor import Options as MonitorOptions
from ssl_pipeline.optim import Options as OptimOptions
from ssl_pipeline.preemption import Preemption
from ssl_pipeline.run_folder import RunFolder, write_json

log = logging.getLogger("ssl_pipeline")

History = list[dict[str, Any]]
"""An object an epoch: {epoch, loss: [a classifier], <set>: {top1: [...], top5: [...]}}, in percent."""


class Recipe(config.Options):
    """How to train on labels."""

    epochs: int = Field(gt=0)
    batch_size: int = Field(256, gt=0)
    """Over all ranks, at most; all pictures where there are fewer. Pictures that do not fill the last batch of an epoch are
    left out of it."""
    optim: OptimOptions
    """`learning_rate` and `weight_decay` are the classifier's."""
    head_init: Literal["normal", "zero"] = "normal"
    """Of the classifier's weight: N(0, 0.01), or 0. Its bias starts at 0."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the backbone's autocast; the classifier and its loss are fp32 always."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Key of initial weights, order, augmentation and of what is held out."""
    evaluate_every: int = Field(1, gt=0)
    """Epochs between measurements; the last epoch is measured always."""


class Classifiers(nn.Module):
    """H linear classifiers of the same features, which start alike: (N, D) -> H tensors (N, C).

    Args:
        count: H.
        width: D.
        classes: C.
        init: `normal` or `zero`.
        seed: key of the initial weights.
        fused: one matrix product for all, instead of one each. The numbers then differ in their last bits.
    """

    def __init__(self, count: int, width: int, classes: int, init: str, seed: int, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused
        with torch.random.fork_rng(devices=[]):
            self.each = nn.ModuleList(nn.Linear(width, classes) for _ in range(count))
            for one in self.each:
                torch.manual_seed(seed)
                nn.init.normal_(one.weight, std=0.01) if init == "normal" else nn.init.zeros_(one.weight)  # type: ignore[arg-type]
                nn.init.zeros_(one.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> list[Tensor]:
        if not self.fused:
            return [one(features) for one in self.each]
        weight = torch.cat([one.weight for one in self.each])  # type: ignore[misc]
        bias = torch.cat([one.bias for one in self.each])  # type: ignore[misc]
        return list(F.linear(features, weight, bias).chunk(len(self.each), dim=1))


class Frozen(nn.Module):
    """Classifiers on a backbone in evaluation mode that is not trained: images (N, 3, S, S) -> H tensors (N, C)."""

    def __init__(self, backbone: nn.Module, classifiers: Classifiers) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.classifiers = classifiers

    @property
    def trained(self) -> nn.Module:
        """What a checkpoint holds."""
        return self.classifiers

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            features = self.backbone(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.classifiers(features.float())


class Whole(nn.Module):
    """A backbone and a classifier, trained together: images (N, 3, S, S) -> one tensor (N, C), in a list."""

    def __init__(self, backbone: nn.Module, classifiers: Classifiers) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifiers = classifiers

    @property
    def trained(self) -> nn.Module:
        """What a checkpoint holds."""
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.backbone(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.classifiers(features.float())


def digest(module: nn.Module) -> str:
    """A short name of all weights and buffers: equal where they are bit-identical."""
    found = hashlib.sha256()
    for name, value in module.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def described(
    evaluation: str, recipe: Recipe, source: FeatureOptions, network: nn.Module, sets: Mapping[str, Index], **more: Any
) -> dict[str, Any]:
    """All that decides what a training comes to: the config of its folder."""
    return {
        "evaluation": evaluation,
        "recipe": recipe.model_dump(mode="json"),
        "backbone": source.backbone.model_dump(mode="json"),
        "weights": digest(network),
        "view": (source.labelled_view or crop_and_flip(source.view)).model_dump(mode="json"),
        "evaluation_view": source.view.model_dump(mode="json"),
        "pictures": {name: index.labelled_digest() for name, index in sets.items()},
        **more,
    }


def folder(parent: Path, name: str, facts: Mapping[str, Any]) -> RunFolder:
    """The folder of an evaluation that all of `facts` decide."""
    text = json.dumps(facts, sort_keys=True)
    return RunFolder(parent / "evaluations" / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}")


def possible_batch(recipe: Recipe, samples: int, ranks: int) -> int:
    """The recipe's batch size or, where there are fewer pictures, the most that the ranks can share.

    Raises BadInput where batch size, ranks, pictures and warm-up do not go together.
    """
    batch = recipe.batch_size
    if batch % ranks:
        raise BadInput(
            f"recipe.batch_size = {batch} cannot be divided by {ranks} ranks: start another number of processes"
        )
    if samples < ranks:
        raise BadInput(f"{samples} labelled pictures are fewer than {ranks} ranks: start fewer processes")
    batch = min(batch, samples // ranks * ranks)
    if optim.warmup_length(recipe.optim, samples // batch) >= samples // batch * recipe.epochs:
        raise BadInput("the warm-up does not end within the training: lower recipe.optim.warmup_steps or warmup_epochs")
    return batch


def fit(
    module: Frozen | Whole,
    groups: Sequence[Mapping[str, Any]],
    recipe: Recipe,
    train: Index,
    measured: Mapping[str, Index],
    source: FeatureOptions,
    run: RunFolder,
    facts: Mapping[str, Any],
    *,
    synchronise: bool = True,
) -> History:
    """Train the classifiers of `module` on `train`, measuring them on each set of `measured` after each epoch.

    `groups` are the optimizer's, with base rates and weight decays of their own; `facts` are the folder's config. Goes on
    where the folder's newest checkpoint is; a finished one is only read. Without `synchronise` batch norm in training
    mode has each rank's own statistics. Raises Stop with status 75 after a signal, with 76 where no classifier's loss is
    finite. All ranks must call it.
    """
    world = distributed.start()
    finished = run.path / "history.json"

    def open_run() -> None:
        if world.is_main:
            run.open_for_writing(facts)
            cluster.require_progress(run.events())

    distributed.together(open_run)
    try:
        if distributed.gather_json(finished.is_file())[0]:
            return json.loads(distributed.gather_json(finished.read_text() if world.is_main else "")[0])  # type: ignore[no-any-return]
        status = Status.CRASH
        try:
            if world.is_main:
                step, epochs = (checkpoint.saved_steps(run.checkpoints) or [0])[-1], recipe.epochs
                steps = len(train) // possible_batch(recipe, len(train), world.size) * epochs
                run.record("start", job=cluster.job_id(), host=socket.gethostname(), ranks=world.size, step=step,
                           steps=steps, epochs=epochs)  # fmt: skip
            history = _fit(module, groups, recipe, train, measured, source, run, world, synchronise)
            status = Status.DONE
        except Stop as stop:
            status = stop.status
            raise
        finally:
            if world.is_main:
                run.record("end", status=int(status))
        distributed.together(lambda: _finish(run, finished, history) if world.is_main else None)
        return history
    finally:
        run.close()


def _finish(run: RunFolder, finished: Path, history: History) -> None:
    write_json(finished, history)
    for step in checkpoint.saved_steps(run.checkpoints):
        checkpoint.checkpoint_file(run.checkpoints, step).unlink()


def _fit(
    module: Frozen | Whole,
    groups: Sequence[Mapping[str, Any]],
    recipe: Recipe,
    train: Index,
    measured: Mapping[str, Index],
    source: FeatureOptions,
    run: RunFolder,
    world: distributed.World,
    synchronise: bool,
) -> History:
    device = world.device
    view = source.labelled_view or crop_and_flip(source.view)
    batch_size = distributed.together(lambda: possible_batch(recipe, len(train), world.size))
    if batch_size < recipe.batch_size:
        log.warning("%d labelled pictures: the batch is of %d, not %d", len(train), batch_size, recipe.batch_size)
    data = _loader(train, view, batch_size, recipe.seed, source, world)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = distributed.wrap(module, device, synchronise)
    trained = module.trained
    optimizer = optim.build(
        [{"decay": True, "adapt": True, "lr": "scheduled", **group} for group in groups],
        recipe.optim,
        batch_size,
    )
    half = torch.bfloat16 if recipe.precision == "bf16" else None
    steps = len(data) * recipe.epochs
    step, history = 0, []
    losses = torch.zeros(len(module.classifiers.each), device=device)  # of the newest step

    state = checkpoint.read_together(run.checkpoints)
    begun = state["step"] if state else 0
    distributed.together(lambda: checkpoint.set_aside(run.checkpoints, begun) if distributed.rank() == 0 else None)
    if state:
        trained.load_state_dict(state["model"])
        optim.load(optimizer, state["optimizer"])
        data.load_state_dict(state["loader"])
        data.try_bad_again()
        step, history, losses = state["step"], state["history"], state["losses"].to(device)
        log.info("going on with %s after step %d of %d", run.path, step, steps)
    watch = Monitor(
        MonitorOptions(tensorboard=False),
        run.metrics,
        run.tensorboard,
        world,
        batch_size,
        steps,
        start_step=step,
    )
    if state:
        watch.load_state_dict(state["monitor"])

    def save() -> None:
        state = {
            "step": step,
            "model": trained.state_dict(),
            "optimizer": optimizer.state_dict(),
            "loader": data.state_dict(),
            "monitor": watch.state_dict(),
            "history": history,
            "losses": distributed.mean_over_ranks(losses),
        }
        distributed.together(lambda: checkpoint.write(run.checkpoints, state, 1) if world.is_main else None)

    always = torch.ones((), dtype=torch.bool, device=device)
    model.train()
    watch.tick(step)
    with Preemption() as preemption:
        while step < steps:
            epoch = data.epoch
            for batch in watch.timed(data):
                rates = optim.set_rates(optimizer, optim.rate_factor(recipe.optim, step, len(data), recipe.epochs))
                with torch.autocast(device.type, dtype=half, enabled=half is not None):
                    logits = model(batch.views[0].contiguous(memory_format=torch.channels_last))
                losses = torch.stack([F.cross_entropy(one.float(), batch.labels) for one in logits])
                losses.sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                losses = losses.detach()
                watch.add({"loss": losses.mean()}, always)
                step += 1
                if step % 50 == 0 or step == steps:
                    watch.log(step, epoch, rates, len(data.all_bad()))
                if preemption.requested() and step < steps:
                    save()
                    watch.close()
                    data.close()
                    stop = Stop(f"stopped by a signal after step {step} of {steps}; the same command goes on from here")
                    stop.status = Status.STOPPED
                    raise stop
            data.require_readable(source.max_bad_fraction)
            row: dict[str, Any] = {"epoch": data.epoch, "loss": _finite(distributed.mean_over_ranks(losses))}
            if data.epoch % recipe.evaluate_every == 0 or step == steps:
                if not synchronise:
                    distributed.broadcast_buffers(module)
                model.eval()
                row |= {name: measure(module, index, source, recipe, world) for name, index in measured.items()}
                model.train()
                first = {f"{name}_top1": max(row[name]["top1"]) for name in measured}
                watch.note(step, data.epoch, first)
                if world.is_main:
                    best = "best " if len(losses) > 1 else ""
                    log.info("epoch %d of %d: %s", data.epoch, recipe.epochs,
                             ", ".join(f"{best}{name} {value:.2f} %" for name, value in first.items()))  # fmt: skip
            history.append(row)
            if all(loss is None for loss in row["loss"]):
                raise NonFinite(
                    f"no loss is finite after epoch {data.epoch}: lower the rates (recipe.optim.learning_rate)"
                )
            save()
            watch.tick(step)
    watch.close()
    data.close()
    return history


def _finite(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _loader(
    index: Index, view: ViewSpec, batch_size: int, seed: int, source: FeatureOptions, world: distributed.World,
    training: bool = True,
) -> Loader:  # fmt: skip
    threads, readers = source.threads, source.readers
    return Loader(
        index, [view], batch_size, seed=seed, world=world, threads=threads, readers=readers, training=training
    )


@torch.no_grad()
def measure(
    module: nn.Module, index: Index, source: FeatureOptions, recipe: Recipe, world: distributed.World
) -> dict[str, list[float]]:
    """top1 and top5 of each classifier on the readable pictures of `index`, in percent, by all ranks together.

    `module` is in evaluation mode.
    """
    batch_size = max(recipe.batch_size // world.size, 1) * world.size
    data = _loader(index, source.view, batch_size, 0, source, world, training=False)
    half = torch.bfloat16 if recipe.precision == "bf16" else None
    right: Tensor | None = None
    count = 0
    for step, batch in enumerate(data):
        itself = torch.from_numpy(batch.ids == data.ids(0, step)).to(world.device)
        with torch.autocast(world.device.type, dtype=half, enabled=half is not None):
            logits = module(batch.views[0].contiguous(memory_format=torch.channels_last))
        # (H, N, 5); a classifier of NaN is never right
        ranking = torch.stack([one.topk(min(5, one.shape[1]), dim=1).indices for one in logits])
        hits = (ranking == batch.labels[:, None]) & itself[:, None]
        hits &= torch.stack([one.isfinite().all(dim=1) for one in logits])[..., None]
        found = torch.stack([hits[..., 0].sum(1), hits.any(dim=2).sum(1)])  # (2, H)
        right = found if right is None else right + found
        count += int(itself.sum())
    data.close()
    data.require_readable(source.max_bad_fraction)
    heads = len(module.classifiers.each)  # type: ignore[arg-type,union-attr]
    total = torch.zeros(2 * heads + 1, dtype=torch.int64)
    if right is not None:
        total[:-1], total[-1] = right.flatten().cpu(), count
    whole = distributed.gather_values(total).sum(dim=0)
    percent = 100 * whole[:-1].double() / whole[-1]
    return {"top1": percent[:heads].tolist(), "top5": percent[heads:].tolist()}


def head_group(classifier: nn.Module, name: str, rate: float, weight_decay: float) -> dict[str, Any]:
    """The optimizer's group of one classifier; weight decay and adaptation take its bias too."""
    return {"params": list(classifier.parameters()), "name": name, "rate": rate, "weight_decay": weight_decay}


def classifiers(recipe: Recipe, network: nn.Module, classes: int, count: int = 1, fused: bool = False) -> Classifiers:
    """The classifiers of a recipe on a network's features."""
    return Classifiers(count, backbones.width(network), classes, recipe.head_init, recipe.seed, fused)
