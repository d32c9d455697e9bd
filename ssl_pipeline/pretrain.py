"""The pretraining loop, and the config of a run.

To be read from `pretrain` downwards. The loop knows no method, no launcher and no device: the method is a module that
returns its loss, the collectives hide the ranks, and autocast and the fused optimizers hide the device. Nothing in a
step waits for the device; the host reads numbers only at logged steps and checkpoints.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ssl_pipeline import (
    __version__,
    backbone,
    checkpoint,
    cluster,
    compute,
    config,
    distributed,
    methods,
    optim,
    recovery,
)
from ssl_pipeline.alarms import Alarms
from ssl_pipeline.alarms import Options as AlarmOptions
from ssl_pipeline.backbone import Options as BackboneOptions
from ssl_pipeline.checkpoint import Options as CheckpointOptions
from ssl_pipeline.compute import Options as ComputeOptions
from ssl_pipeline.data.index import Index, pretraining_index
from ssl_pipeline.data.loader import Loader, require_dali, require_shuffle
from ssl_pipeline.data.loader import Options as DataOptions
from ssl_pipeline.evaluation.online import Online, tell_of_missing_val, validation_pictures
from ssl_pipeline.evaluation.online import Options as OnlineOptions
from ssl_pipeline.exits import BadInput, Status, Stop
from ssl_pipeline.head import Options as HeadOptions
from ssl_pipeline.head import ProjectionHead
from ssl_pipeline.methods import Method, Output, Progress
from ssl_pipeline.monitor import Monitor
from ssl_pipeline.monitor import Options as MonitorOptions
from ssl_pipeline.optim import Options as OptimOptions
from ssl_pipeline.preemption import Preemption
from ssl_pipeline.preflight import preflight
from ssl_pipeline.recovery import Options as RecoveryOptions
from ssl_pipeline.run_folder import RunFolder, saved_steps
from ssl_pipeline.sparse_head import Options as SparseOptions
from ssl_pipeline.watchdog import Options as WatchdogOptions
from ssl_pipeline.watchdog import Watchdog

log = logging.getLogger("ssl_pipeline")


class PretrainConfig(config.Options):
    """A whole pretraining run; its parts stand beside what they configure."""

    method: config.MethodOptions
    backbone: BackboneOptions = BackboneOptions()
    head: HeadOptions = HeadOptions()
    data: DataOptions
    optim: OptimOptions = OptimOptions()
    epochs: int = Field(gt=0)
    """Length of the run, and of its schedules."""
    max_steps: int | None = Field(None, gt=0)
    """End after this many steps, the schedules still running over `epochs`. The same run may be given a later end."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of autocast; losses, batch statistics and the penalty are fp32 always."""
    channels_last: bool = True
    seed: int = Field(0, ge=0, lt=2**63)
    """Key of initial weights, order and augmentation."""
    checkpoint: CheckpointOptions = CheckpointOptions()
    monitor: MonitorOptions = MonitorOptions()
    online: OnlineOptions = OnlineOptions()
    distributed: WatchdogOptions = WatchdogOptions()
    recovery: RecoveryOptions = RecoveryOptions()
    alarms: AlarmOptions = AlarmOptions()
    compute: ComputeOptions = ComputeOptions()

    @model_validator(mode="after")
    def _method_fits(self) -> PretrainConfig:
        name = self.method.name  # type: ignore[attr-defined]
        sizes = [view.size for view in self.data.views for _ in range(view.count)]
        method = methods.get(name)
        method.views(self.method).check(name, sizes)
        method.check(self.method, self.head, self.data.batch_size)
        if self.head.sparse.inner_steps and self.precision == "fp16":
            raise BadInput(
                "head.sparse.inner_steps are not scaled as fp16's gradients must be: take precision=bf16 or fp32"
            )
        per_sample = method.per_sample and not self.head.sparse.inner_steps
        compute.require_possible(self.compute, self.optim.accumulate, per_sample)
        return self


def pretrain(options: PretrainConfig, output: Path) -> Status:
    """Run, or go on with, the pretraining of `options` in the run folder `output`.

    Returns DONE, also where the run was finished before, or STOPPED after a signal. Raises Stop for all else, Requeued
    among them where preflight gave the job back.
    """
    world = distributed.start(timedelta(seconds=options.distributed.timeout))
    run = RunFolder(output)
    if not world.is_main:
        log.setLevel(logging.WARNING)  # one rank tells how the run goes

    def read_pictures() -> tuple[Index | None, BadInput | None]:
        require_dali()
        optim.require_backend(options.optim)
        try:
            compute.require_compiler(options.compute, world.device)
            begun = bool(saved_steps(run.checkpoints))
            index = pretraining_index(options.data.root, options.data.unlabelled, begun)
        except BadInput as error:  # perhaps on this node alone
            return None, error
        require_shuffle(options.data.shuffle, index)
        require_possible(options, world.size, len(index))
        return index, None

    def open_run() -> None:
        if world.is_main:
            run.open_for_writing(options.model_dump(mode="json"), completed, write=False)
            cluster.require_progress(run.events())

    with contextlib.closing(run), Watchdog(run, world, options.distributed.timeout) as watchdog:
        index, error = distributed.in_turn(read_pictures)  # one lists a folder, the others find its listing
        text = config.dump_yaml(options.model_dump(mode="json"))
        listing = index.digest() if index is not None else "missing"
        digests = {"config": hashlib.sha256(text.encode()).hexdigest()[:12], "data listing": listing}
        preflight(world, run, digests, error)
        assert index is not None  # or preflight had raised
        tell_of_missing_val(options.data.root, index)
        distributed.together(open_run)
        keep, most = options.checkpoint.keep, options.checkpoint.max_failed_saves
        try:
            with checkpoint.Writer(run.checkpoints, keep, most) as writer:
                return _train(options, index, run, world, writer, watchdog)
        except Stop as stop:
            if world.is_main:
                run.record("end", status=int(stop.status), reason=str(stop))
            raise


def build_method(options: PretrainConfig) -> Method:
    """The method with freshly initialised weights, a function of the seed. The backbone is initialised first."""
    torch.manual_seed(options.seed)
    network = backbone.build(options.backbone)
    projection = ProjectionHead(options.head, backbone.width(network))
    return methods.build(options.method, network, projection, options.seed)


def require_possible(options: PretrainConfig, ranks: int, samples: int) -> None:
    """Raises BadInput where batch size, ranks, micro-batches, number of samples and warm-up do not go together."""
    batch = options.data.batch_size
    if ranks > batch:
        raise BadInput(f"{ranks} ranks are more than data.batch_size = {batch}: start at most {batch} processes")
    if batch % ranks:
        raise BadInput(
            f"data.batch_size = {batch} cannot be divided by {ranks} ranks: "
            f"take {batch // ranks * ranks} or {(batch // ranks + 1) * ranks}"
        )
    rows, parts = batch // ranks, options.optim.accumulate
    if rows % parts:
        fits = _division(rows, ranks, parts) or next(
            (n for n in range(parts, 0, -1) if _division(rows, ranks, n) == n), 1
        )
        raise BadInput(f"optim.accumulate = {parts} does not divide the {rows} pictures of each rank: take {fits}")
    if samples < batch:
        raise BadInput(
            f"{str(options.data.root / 'train')!r} has {samples} pictures, fewer than data.batch_size = {batch}: "
            "give a smaller batch size"
        )
    per_epoch = samples // batch
    warmup = optim.warmup_length(options.optim, per_epoch)
    if warmup >= per_epoch * options.epochs:
        raise BadInput(
            f"the warm-up of {warmup} steps does not end within the run's {per_epoch * options.epochs}: "
            "lower optim.warmup_epochs (or optim.warmup_steps) or raise epochs"
        )


def _division(rows: int, ranks: int, least: int) -> int | None:
    """The smallest number of micro-batches, at least so many, that divides each rank's rows and leaves batch norm two."""
    return next((n for n in range(least, rows + 1) if rows % n == 0 and n < rows * ranks), None)


def _train(
    options: PretrainConfig,
    index: Index,
    run: RunFolder,
    world: distributed.World,
    writer: checkpoint.Writer,
    watchdog: Watchdog,
) -> Status:
    device = world.device
    data = Loader.for_training(options.data, index, seed=options.seed, world=world, timeout=options.distributed.timeout)
    steps = len(data) * options.epochs
    end = min(steps, options.max_steps or steps)
    state = checkpoint.read_together(run.checkpoints)
    step = state["step"] if state else 0
    distributed.together(lambda: checkpoint.put_back(state, "loader", data.require_same_pictures) if state else None)

    method = distributed.together(lambda: build_method(options))

    def take_up() -> None:
        if world.is_main:  # only now: nothing of a config that was refused shall stay
            run.describe(options.model_dump(mode="json"))
            checkpoint.set_aside(run.checkpoints, step)

    distributed.together(take_up)
    if world.is_main:
        run.record(
            "start",
            job=cluster.job_id(),
            restart=int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            nodes=os.environ.get("SLURM_JOB_NODELIST"),
            host=socket.gethostname(),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            ranks=world.size,
            accumulate=options.optim.accumulate,
            compute=options.compute.model_dump(mode="json"),
            step=step,
            steps=end,
            epochs=options.epochs,
            versions=_versions(),
            pictures=data.pictures,
        )
    if step >= end:
        log.info("%s is finished: %d steps are done; nothing to do", run.path, step)
        return Status.DONE

    if options.channels_last:
        method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = compute.wrap(method, options.compute, device)
    before = compute.Copies(method.changed_by_forward())
    optimizer = optim.build(method.parameter_groups(), options.optim, options.data.batch_size)
    width = backbone.width(method.backbone)
    val = distributed.in_turn(lambda: validation_pictures(options.online, options.data))
    online = Online(options.online, options.data, width, options.backbone, index, val, options.seed, world)
    scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(options.precision)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    if options.precision == "fp16" and device.type == "cpu":
        log.warning("precision fp16 on a CPU is slow and meant for tests; bf16 is the fast one")
    if device.type == "cpu" and os.environ.get("SLURM_GPUS_ON_NODE"):
        log.warning(
            "the job has GPUs and torch sees none: this runs on the CPU; is torch built for CUDA, and for this driver?"
        )
    log.info("%d rank%s, %s, %s", world.size, "s" if world.size > 1 else "", device, options.precision)
    if options.compute.compile != "none":
        log.info("compiling (compute.compile=%s): the first step takes a minute or more", options.compute.compile)
    if options.optim.accumulate > 1:
        log.info("accumulating %s", _accumulation(options, method, world.size))
    distributed.together(lambda: _require_room(method, options, run) if world.is_main else None)

    adaptive = options.head.sparse.schedule == "adaptive"
    alarms = Alarms(options.alarms, options.method.name, adaptive)  # type: ignore[attr-defined]
    watch = distributed.together(
        lambda: Monitor(options.monitor, run.metrics, run.tensorboard, world, options.data.batch_size, end,
                        start_step=step, remedy=data.remedy)
    )  # fmt: skip
    trained = _Trained(method, optimizer, scaler, data, watch, alarms, online, world)
    if state:
        distributed.together(lambda: trained.load_state_dict(state))
        data.try_bad_again()
        log.info("going on with %s after step %d of %d", run.path, step, end)
        state.clear()  # gives its memory back
    skips = recovery.SkipLog(run.nonfinite, fp16=options.precision == "fp16")
    if world.is_main:
        skips.drop_after(step - watch.unread, data.rollbacks)

    def save(final: bool) -> None:
        data.require_readable(options.data.max_bad_fraction)  # what is over the limit must not be gone on from
        state = {
            "step": step,
            **trained.state_dict(),
            "config": options.model_dump(mode="json"),
            "versions": _versions(),
        }
        bare = [run.backbone]
        if options.checkpoint.backbone_due(step, len(data)):
            bare.append(run.backbones / f"epoch_{step // len(data):04d}.pth")

        def write_bare(weights: dict[str, Tensor]) -> None:
            for path in bare:
                backbone.write(weights, options.backbone, path)

        # The bare backbones first: a run whose last checkpoint exists has its backbone too.
        writer.save(state, method.evaluated_backbone().state_dict(), write_bare, final)

    method.train()
    watch.tick(step)
    timeout = timedelta(seconds=options.distributed.timeout)
    with contextlib.closing(watch), contextlib.closing(skips), Preemption(timeout) as preemption:
        while step < end:
            for batch in watch.timed(data):
                watchdog.beat(step)
                if step == 0 and world.is_main:
                    specs = [view.normalize for view in data.views]
                    watch.show_views(run.views, batch.views, [(spec.mean, spec.std) for spec in specs])

                progress = Progress(step, steps, data.epoch, options.epochs)
                factor = optim.rate_factor(options.optim, step, len(data), options.epochs)
                rates = optim.set_rates(optimizer, factor)
                before.take()
                method.before_forward(progress)

                views = [view.contiguous(memory_format=layout) for view in batch.views]
                output = _forward_backward(method, model, views, options.optim.accumulate, half, scaler)

                # From here on everything is predicated on `finite`, which only the device knows.
                method.before_update(progress)
                scaler.unscale_(optimizer)
                norm = nn.utils.get_total_norm(optim.gradients(optimizer))
                finite = torch.isfinite(norm)
                optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()  # type: ignore[attr-defined]
                optimizer.step()  # not the scaler's step, which would decide anew what is finite
                scaler.update()
                before.put_back_unless(finite)
                method.after_update(progress, rates, finite)
                optimizer.zero_grad()
                seen = online.step(output.features, batch.labels, finite)
                watch.add(output.logs | {"gradient_norm": norm} | seen, finite)
                step += 1

                last = step == end
                if last or step % options.monitor.every_steps == 0:
                    values = watch.log(step, data.epoch, rates, len(data.all_bad()))
                    data.require_readable(options.data.max_bad_fraction)
                    if world.is_main:
                        skips.tell(step, watch.skipped, data)
                    if watch.in_a_row >= options.recovery.max_skipped:  # on all ranks: they share the gradients' norm
                        writer.wait()
                        step = _roll_back(options, run, step, trained)
                        save(final=False)
                        writer.wait()  # at once: a kill must not forget it
                        watchdog.beat(step)
                        break  # out of the epoch's old order
                    if alarm := alarms.look(step, data.epoch, values):
                        save(final=True)
                        raise distributed.of_all(alarm)
                if step % len(data) == 0 and online.due(step // len(data)):
                    found = online.look(step // len(data), method.evaluated_backbone(), method.head)
                    watch.note(step, data.epoch, found)
                    watch.tick(step)
                    watchdog.beat(step)
                stop = preemption.requested()
                if last or stop or options.checkpoint.due(step, len(data)):
                    with watch.held():
                        save(final=last or stop)
                    if stop and not last:
                        log.info("stopped by a signal after step %d; the same command goes on from here", step)
                        return _ended(run, world, Status.STOPPED, step)
                if last:
                    break
    if data.bad and world.is_main:  # whom the last logged step told of all
        log.warning("%s", data.bad_summary())
    log.info("%s is finished: %d steps; backbone in %s", run.path, step, run.backbone)
    return _ended(run, world, Status.DONE, step)


def completed(old: dict[str, Any]) -> dict[str, Any]:
    """The config of a run that an older version began, with what it did not have at its default, which changes nothing."""
    try:
        return config.validate(PretrainConfig, old).model_dump(mode="json")
    except BadInput:
        return old


def _versions() -> dict[str, str]:
    return {
        "ssl_pipeline": __version__,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def _ended(run: RunFolder, world: distributed.World, status: Status, step: int) -> Status:
    if world.is_main:
        run.record("end", status=int(status), step=step)
    return status


# ----------------------------------------------------------------------------------------------------- parts of the loop
def _forward_backward(
    method: Method,
    model: nn.Module,
    views: list[Tensor],
    accumulate: int,
    half: torch.dtype | None,
    scaler: torch.amp.GradScaler,
) -> Output:
    """The output of a step and, on the parameters of `method`, which `model` wraps, the gradient of its loss.

    A loss that is a mean over samples takes one micro-batch after the other; in any other the samples meet, so it takes
    one pass, of which the method divides the part that needs the memory.
    """
    passes, parts = (accumulate, 1) if method.per_sample else (1, accumulate)
    outputs = []
    for number, some in enumerate(zip(*(view.chunk(passes) for view in views), strict=True), start=1):
        with distributed.averaging(model, now=number == passes), _enough_memory(len(views[0]), accumulate):
            with torch.autocast(views[0].device.type, dtype=half, enabled=half is not None):
                output = model(list(some), parts)
            # Begun with 1, or NaN where the loss is not finite: then the gradients of all ranks are NaN too.
            scaler.scale(output.loss / passes).backward(output.loss.detach() * 0 + 1)
        outputs.append(output)
    return method.join(outputs)


@contextlib.contextmanager
def _enough_memory(rows: int, accumulate: int) -> Iterator[None]:
    """A context for passes over so many rows in micro-batches. Raises BadInput where the device has no room for them."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        more = _division(rows, distributed.world_size(), accumulate + 1)
        way_out = (
            f"give the same command with optim.accumulate={more} or more ranks, or free what other programs hold there"
            if more
            else "take more ranks, a smaller network, or a smaller data.batch_size with another --output"
        )
        seen = str(error).partition(". Including")[0]
        divided = f"in {accumulate} micro-batches" if accumulate > 1 else "undivided"
        raise BadInput(f"{seen}, for a step of {rows} pictures on this rank, {divided}: {way_out}") from error


def _accumulation(options: PretrainConfig, method: Method, ranks: int) -> str:
    """What a division into micro-batches means, in words."""
    batch, parts = options.data.batch_size, options.optim.accumulate
    where = "" if method.per_sample else "outside of the head "
    return (
        f"{parts} micro-batches of {batch // ranks // parts} on each rank: batch norm {where}sees {batch // parts} pictures "
        f"at a time, the loss all {batch}"
    )


def _require_room(method: Method, options: PretrainConfig, run: RunFolder) -> None:
    """Raises StorageFailure where the checkpoints to be kept, and the one being written, do not fit."""
    size = _checkpoint_bytes(method, options)
    there = sum(path.stat().st_size for path in run.checkpoints.glob("*.pt"))
    checkpoint.require_room(run.path, (options.checkpoint.keep + 1) * size - there)


def _checkpoint_bytes(method: Method, options: PretrainConfig) -> int:
    moments = 2 if options.optim.name in ("adam", "adamw", "lamb") else 1
    trained = sum(p.numel() * p.element_size() for group in method.parameter_groups() for p in group["params"])
    return checkpoint.state_bytes(method.state_dict()) + moments * trained


@dataclass(frozen=True)
class _Trained:
    """All that training changes, as one state: what `save` writes, a resume and a rollback put back."""

    method: Method
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    data: Loader
    watch: Monitor
    alarms: Alarms
    online: Online
    world: distributed.World

    def state_dict(self) -> dict[str, Any]:
        """Parts of a checkpoint, whose table is in checkpoint.py. All ranks must call it."""
        return {
            "method": self.method.options.name,
            "model": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loader": self.data.state_dict(),
            "monitor": self.watch.state_dict(),
            "alarms": self.alarms.state_dict(),
            "online": self.online.state(),
            **_random_states(self.world.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put a checkpoint's state back. Raises BadInput where it belongs to another method or other shapes."""

        def load_model(weights: dict[str, Tensor]) -> None:
            difference = backbone.compare(weights, self.method.state_dict())
            if difference:
                raise BadInput(f"the checkpoint does not fit the config's network: {difference}; name another --output")
            self.method.load_state_dict(weights)

        def load_scaler(values: dict[str, Any]) -> None:  # torch takes anything, and fails in the first step
            self.scaler.load_state_dict({key: type(own)(values[key]) for key, own in self.scaler.state_dict().items()})

        def set_random(rows: Tensor) -> None:
            if len(rows) == self.world.size:
                # A clone: torch 2.14 crashes on a tensor that begins within another one.
                torch.set_rng_state(rows[self.world.rank].clone())

        def set_random_on_device(rows: Tensor) -> None:
            device = self.world.device
            if len(rows) == self.world.size:
                torch.get_device_module(device).set_rng_state(rows[self.world.rank].clone(), device)

        name = self.method.options.name
        if state.get("method") != name:
            raise BadInput(
                f"the checkpoint is of method {state.get('method')} and the config of {name}: name another --output"
            )
        checkpoint.put_back(state, "model", load_model)
        checkpoint.put_back(state, "optimizer", lambda values: optim.load(self.optimizer, values))
        checkpoint.put_back(state, "scaler", load_scaler)
        checkpoint.put_back(state, "loader", self.data.load_state_dict)
        checkpoint.put_back(state, "monitor", self.watch.load_state_dict)
        checkpoint.put_back(state, "alarms", self.alarms.load_state_dict, optional=True)
        checkpoint.put_back(state, "online", self.online.load, optional=True)
        checkpoint.put_back(state, "random", set_random)
        checkpoint.put_back(state, f"random_{self.world.device.type}", set_random_on_device, optional=True)


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """States of torch's generators, a row a rank: the host's and, where there is one, the device's. A collective."""
    states = {"random": distributed.gather_values(torch.get_rng_state())}
    if device.type != "cpu":
        own = torch.get_device_module(device).get_rng_state(device)
        states[f"random_{device.type}"] = distributed.gather_values(own)
    return states


def _roll_back(options: PretrainConfig, run: RunFolder, step: int, trained: _Trained) -> int:
    """Go back to the last good checkpoint, or to the start where there is none, the rest of its epoch in another order.

    Returns its step. Raises NonFinite where that was done `recovery.max_rollbacks` times.
    """
    data, watch, world = trained.data, trained.watch, trained.world
    rollbacks, in_a_row = data.rollbacks + 1, watch.in_a_row
    if rollbacks > options.recovery.max_rollbacks:
        raise distributed.of_all(recovery.gave_up(options.recovery, run, step, in_a_row, options.precision))
    found = checkpoint.read_together(run.checkpoints, checkpoint.worth_going_back_to)
    state = found or _first_state(options, world.device)
    there: int = state["step"]
    distributed.together(lambda: trained.load_state_dict(state))

    def drop() -> None:
        if world.is_main:  # the checkpoints first: a run that is killed here drops the rest when it goes on
            checkpoint.remove_after(run.checkpoints, there)
            checkpoint.remove_backbones_after(run.backbones, there // len(data))
        watch.rewind(there)

    distributed.together(drop)
    data.rekey(rollbacks)
    if world.is_main:
        run.record("rollback", step=step, to=there, rollbacks=rollbacks, skipped=in_a_row)
        log.warning(
            "loss or gradients were not finite for %d steps in a row: back from step %d to %s, rollback %d of at most %d; "
            "the rest of that epoch comes in another order",
            in_a_row, step, f"the checkpoint of step {there}" if found else "the start, for want of a checkpoint",
            rollbacks, options.recovery.max_rollbacks,
        )  # fmt: skip
    return there


def _first_state(options: PretrainConfig, device: torch.device) -> dict[str, Any]:
    """What a checkpoint of step 0 would hold."""
    method = build_method(options)
    optimizer = optim.build(method.parameter_groups(), options.optim, options.data.batch_size)
    return {
        "step": 0,
        "method": method.options.name,
        "model": method.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": torch.amp.GradScaler(device.type, enabled=options.precision == "fp16").state_dict(),
        "loader": {"epoch": 0, "consumed": 0, "bad": {}},
        "monitor": {"names": [], "sums": None},
        "random": [],  # build_method has seeded it
    }


# --------------------------------------------------------------------------------------------------- without running it
def consequences(options: PretrainConfig, ranks: int) -> dict[str, Any]:
    """What follows from a config on a number of ranks: batch, steps, rates, parameters, head, views. Runs nothing."""
    root = options.data.root / "train"
    index = pretraining_index(options.data.root, options.data.unlabelled) if root.is_dir() else None
    samples = len(index) if index is not None else None
    if index is not None:
        require_shuffle(options.data.shuffle, index)
    with torch.device("meta"):
        method = build_method(options)
    batch = options.data.batch_size
    steps = "unknown"
    if samples is not None:
        require_possible(options, ranks, samples)
        whole = samples // batch * options.epochs
        cut = options.max_steps is not None and options.max_steps < whole
        steps = f"{options.max_steps} (max_steps; the schedule spans {whole})" if cut else str(whole)
    elif batch % (ranks * options.optim.accumulate):
        require_possible(options, ranks, batch)
    last = method.head.last_layer
    counts = {name: sum(p.numel() for p in m.parameters()) for name, m in method.named_children()}
    rate = optim.base_rate(options.optim, batch)
    rate_1d = optim.base_rate(options.optim, batch, options.optim.learning_rate_1d)
    return {
        "global batch": batch,
        "batch per rank": f"{batch // ranks} on {ranks} rank{'s' if ranks > 1 else ''}"
        + (f", {_accumulation(options, method, ranks)}" if options.optim.accumulate > 1 else ""),
        "training pictures": samples if samples is not None else f"unknown: no folder {str(root)!r}",
        "steps per epoch": samples // batch if samples else "unknown",
        "steps": steps,
        "learning rate": rate if rate == rate_1d else f"{rate} (biases and norms {rate_1d})",
        "parameters": ", ".join(f"{name} {count:,}" for name, count in counts.items()),
        "head": f"{options.head.kind} {backbone.width(method.backbone)} -> {method.head.outputs}",
        "last layer": "none" if last is None else f"{last.in_features} -> {last.out_features}",
        "SparseHead": _described(options.head.sparse),
        "views": "; ".join(
            f"{v.count} of {v.size} px: {', '.join(op.op for op in v.ops)}"  # type: ignore[attr-defined]
            for v in options.data.views
        ),
    }


def _described(options: SparseOptions) -> str:
    norm = {"penalty": "L2,1", "scale_invariant": "L2,1 / Frobenius", "proximal": "L2,1 by its proximal step"}[
        options.mode
    ]
    parts = [f"{options.weight} x {norm} of {options.groups}" if options.weight else "off"]
    parts += ["every linear layer of the head"] if options.weight and options.where == "all" else []
    if options.schedule in ("linear", "cosine"):
        parts.append(f"{options.schedule} from {options.first_factor} times that within {options.ramp:.0%} of the run")
    elif options.schedule == "adaptive":
        parts.append(f"adapted to {options.target:.0%} active groups with gain {options.gain}")
    parts += [f"{options.inner_steps} inner steps of rate {options.inner_lr}"] if options.inner_steps else []
    return ", ".join(parts)


def cost(options: PretrainConfig, pictures: int | None = None) -> dict[str, int]:
    """Bytes of one checkpoint, and pictures that the whole run sees. Runs nothing.

    `pictures` is the size of the training set where it is not here; without both the run sees 0.
    """
    with torch.device("meta"):
        method = build_method(options)
    root = options.data.root / "train"
    batch = options.data.batch_size
    there = root.is_dir()
    samples = len(pretraining_index(options.data.root, options.data.unlabelled)) if there else pictures or 0
    steps = samples // batch * options.epochs
    return {
        "checkpoint_bytes": _checkpoint_bytes(method, options),
        "images": min(steps, options.max_steps or steps) * batch,
    }
