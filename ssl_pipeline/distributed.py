"""Ranks, and the collectives through which gradients flow.

A process group always exists, so that no other file asks whether the job is distributed: without a launcher it has one
rank. torchrun's variables and Slurm's are understood alike.

The scale of gradients, once for all: the backward pass of `all_reduce_sum` and of `gather` SUMS over the ranks, and
DistributedDataParallel then takes the mean. If each rank r computes the loss L_r, the parameters therefore receive the
exact gradient of mean_r L_r, whether the L_r are shares of one loss (SimCLR: each rank's own anchors) or the same
global loss computed on each rank (Barlow Twins, VICReg). Where that sum is known without asking the others no collective
is made in backward: of a loss that all ranks compute alike it is W times each rank's own (`global_sum`).
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import queue
import re
import socket
import threading
import time
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ssl_pipeline.exits import BadInput, RankLost, Status, Stop

T = TypeVar("T")
S = TypeVar("S", bound=Stop)


@dataclass(frozen=True)
class World:
    """Where this process stands: its rank, the number of ranks, the same within its node, and its device."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


def start(timeout: timedelta = timedelta(minutes=10)) -> World:
    """Join the job that the environment describes (torchrun, Slurm, or alone) and return this process's place in it.

    A second call in one process returns the group that is there. `timeout` is that of every collective. Raises BadInput
    where a node has fewer accelerators than ranks, RankLost where ranks do not find each other.
    """
    rank, size, local_rank, local_size = _place()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        device = torch.device("cpu")
    else:
        count = torch.accelerator.device_count()
        # Under srun --gpus-per-task=1 each task sees its own device only, as number 0.
        bound = count == 1 and "RANK" not in os.environ
        if local_size > count and not bound:
            raise BadInput(
                f"{local_size} processes on a node with {count} accelerators; start one process an accelerator"
            )
        device = torch.device(accelerator.type, 0 if bound else local_rank)
        torch.accelerator.set_device_index(device.index)
    if not dist.is_initialized():
        backend = (
            "gloo"
            if accelerator is None
            else f"cpu:gloo,{accelerator.type}:{dist.get_default_backend_for_device(accelerator)}"
        )
        where: dict[str, Any] = {}
        if size == 1:
            where["store"] = dist.HashStore()  # without a launcher there is no address to meet at, and no need of one
        elif "MASTER_PORT" not in os.environ:
            where["store"] = _meet(rank, size, _first_host(os.environ["SLURM_STEP_NODELIST"]), _slurm_ports(), timeout)
        try:
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout, **where)
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise RankLost(f"rank {rank} of {size} does not find the others: {str(error).splitlines()[0]}") from error
    return World(rank, size, local_rank, local_size, device)


def stop() -> None:
    """Leave the job."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _place() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local world size) from torchrun's variables, else Slurm's, else one process."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        size = int(env["WORLD_SIZE"])
        return int(env["RANK"]), size, int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", size))
    # SLURM_STEP_NUM_TASKS exists inside srun only: a plain `python` in an sbatch script or salloc shell is one process.
    if "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        if "MASTER_PORT" in env:
            env.setdefault("MASTER_ADDR", _first_host(env["SLURM_STEP_NODELIST"]))
        local_size = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
        return (
            int(env["SLURM_PROCID"]),
            int(env["SLURM_STEP_NUM_TASKS"]),
            int(env["SLURM_LOCALID"]),
            int(local_size.group()) if local_size else 1,
        )
    return 0, 1, 0, 1


def _first_host(nodes: str) -> str:
    """The first name of a Slurm node list: `gpu[03-05,9],login1` -> `gpu03`."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise BadInput(f"SLURM_STEP_NODELIST = {nodes!r} holds no host name")
    return "".join(part or "" for part in match.groups())


def _slurm_name() -> str:
    env = os.environ
    return ".".join((env["SLURM_JOB_ID"], env.get("SLURM_STEP_ID", "0"), env.get("SLURM_RESTART_COUNT", "0")))


def _slurm_ports() -> list[int]:
    """Ports to try, below those that the system hands out: other ones for each job, step and restart."""
    start = zlib.crc32(_slurm_name().encode())
    return [10000 + (start + number * 4999) % 20000 for number in range(4)]


def _meet(rank: int, size: int, host: str, ports: list[int], timeout: timedelta) -> dist.Store:
    """The store of this job step on `host`, at the first of `ports` that no other program holds.

    Rank 0 opens it, the others look for it and know it by the job's name. Raises Stop where there is none in time.
    """
    end = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        for port in ports:
            store = _open(host, port, size, timeout) if rank == 0 else _find(host, port, size)
            if store is not None:
                store.set_timeout(timeout)
                return store
        if rank == 0:
            break
        time.sleep(0.5)
    raise RankLost(
        f"rank {rank} does not find the other ranks at {host}, ports {', '.join(map(str, ports))}: on the first node other "
        "programs hold them or its network cannot be reached; set MASTER_PORT to another"
    )


def _open(host: str, port: int, size: int, timeout: timedelta) -> dist.Store | None:
    try:
        store = dist.TCPStore(host, port, size, is_master=True, timeout=timeout, wait_for_workers=False)
    except (dist.DistError, RuntimeError):  # the port is taken
        return None
    store.set("ssl_pipeline", _slurm_name())
    return store


def _find(host: str, port: int, size: int, patience: float = 10.0) -> dist.Store | None:
    """This job's store, if that is what listens there within `patience` seconds.

    In a thread, because torch waits for ever for the answer of a program that gives none.
    """
    try:
        _require_listener(host, port, patience)
    except OSError:
        return None
    found: queue.Queue[dist.Store] = queue.Queue()

    def ask() -> None:
        with contextlib.suppress(dist.DistError, RuntimeError):
            limit = timedelta(seconds=patience)
            store = dist.TCPStore(host, port, size, is_master=False, timeout=limit, wait_for_workers=False)
            if store.get("ssl_pipeline") == _slurm_name().encode():
                found.put(store)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return found.get(timeout=patience)
    except queue.Empty:
        return None


def _require_listener(host: str, port: int, patience: float = 10.0) -> None:
    """Raises OSError where nobody listens: torch would try for minutes, and log at length."""
    socket.create_connection((host, port), timeout=patience).close()


def store() -> dist.Store:
    """The job's store, by a new connection: torch's own is held as long as the main thread waits for a key.

    Raises OSError or DistError where it cannot be reached.
    """
    shared = dist.distributed_c10d._get_default_store()
    tcp = shared
    while isinstance(tcp, dist.PrefixStore):
        tcp = tcp.underlying_store
    if isinstance(tcp, dist.TCPStore):
        _require_listener(tcp.host, tcp.port)
    own = shared.clone() if hasattr(shared, "clone") else shared  # the oldest torch that we take has no clone
    return dist.PrefixStore("ssl_pipeline", own)


def rank() -> int:
    """This process's rank."""
    return dist.get_rank()


def world_size() -> int:
    """The number of ranks."""
    return dist.get_world_size()


# --------------------------------------------------------------------------------------------------------- collectives
# torch 2.14 renamed them and warns of the old names. gloo's reduce-scatter is an all-reduce of which each rank keeps a part.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _summed(x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _summed(gradient)


class _GlobalSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * dist.get_world_size()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return gather_values(x).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        own = gradient.new_empty((len(gradient) // dist.get_world_size(), *gradient.shape[1:]))
        _reduce_scatter(own, gradient.contiguous())
        return own


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of x over all ranks; in backward, the sum of the gradients over all ranks."""
    return _AllReduceSum.apply(x)


def global_sum(x: Tensor) -> Tensor:
    """The sum of x over all ranks, for a loss that all ranks compute alike from such sums.

    Their gradients of the sum are equal then, and in backward W times the own one is their sum, without a collective.
    """
    return _GlobalSum.apply(x)


def gather(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order, (N, ...) -> (W * N, ...); in backward, the sum over ranks of this rank's rows."""
    return _Gather.apply(x)


def gather_in_order(x: Tensor) -> Tensor:
    """`gather`, with the rows in the order of the global batch, of which rank r has rows r, r + W, ... (data/loader.py)."""
    return gather(x).unflatten(0, (dist.get_world_size(), -1)).transpose(0, 1).flatten(0, 1)


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of x over all ranks, without gradient."""
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def gather_values(x: Tensor) -> Tensor:
    """x of all ranks, stacked: (...) -> (W, ...), without gradient."""
    x = x.detach().contiguous()
    whole = x.new_empty((dist.get_world_size(), *x.shape))
    _all_gather(whole.view(-1), x.view(-1))
    return whole


def gather_rows(x: Tensor) -> list[Tensor]:
    """x (N_r, ...) of all ranks, in rank order, with different numbers of rows; without gradient."""
    counts = gather_values(torch.tensor(len(x))).tolist()
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def broadcast_buffers(module: nn.Module) -> None:
    """Give all ranks the buffers of the main one."""
    if dist.get_world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def gather_json(value: Any) -> list[Any]:
    """Plain data of all ranks, in rank order."""
    text = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
    lengths = gather_values(torch.tensor(len(text))).tolist()
    row = torch.zeros(max(lengths), dtype=torch.uint8)
    row[: len(text)] = torch.from_numpy(text.copy())
    rows = gather_values(row).numpy()
    return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths, strict=True)]


def union(numbers: Collection[int]) -> set[int]:
    """All numbers, 0 and above, that any rank holds."""
    most = torch.tensor(len(numbers))
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    if not int(most):
        return set()
    row = torch.full((int(most),), -1)
    row[: len(numbers)] = torch.tensor(sorted(numbers), dtype=torch.int64)
    return set(gather_values(row).flatten().tolist()) - {-1}


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of each channel of x (N, C, ...) over the whole batch of all ranks, and its count.

    Differentiable. Two collectives: the variance is taken about the mean, since E[x^2] - E[x]^2 cancels in fp32. All
    ranks must hold equally many rows.
    """
    axes = [axis for axis in range(x.dim()) if axis != 1]
    count = x.numel() // x.shape[1] * dist.get_world_size()
    mean = all_reduce_sum(x.sum(axes)) / count
    centred = x - mean.reshape(1, -1, *[1] * (x.dim() - 2))
    return mean, all_reduce_sum(centred.square().sum(axes)) / count, count


class BatchNorm(_BatchNorm):
    """Batch normalisation over all ranks on any device, with torch's names of parameters and buffers.

    torch's own SyncBatchNorm raises on the CPU. Takes inputs (N, C) or (N, C, H, W). Layers that the replaced norm held
    (timm's BatchNormAct2d holds dropout and activation) are applied to its output.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(f"expected an input of 2 or 4 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training:
            x = F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
            return self._held(x)
        # Half-precision activations are summed in fp32, as in torch's kernels.
        x = input if input.dtype == torch.float64 else input.float()
        mean, variance, count = batch_statistics(x)
        if self.running_mean is not None and self.running_var is not None and self.momentum is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                unbiased = variance * (count / max(count - 1, 1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        shape = (1, -1, *[1] * (x.dim() - 2))
        x = (x - mean.reshape(shape)) * (variance + self.eps).rsqrt().reshape(shape)
        if self.affine:
            x = x * self.weight.reshape(shape) + self.bias.reshape(shape)
        return self._held(x.to(input.dtype))

    def _held(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


def _global_batch_norm(module: nn.Module) -> nn.Module:
    """`module` with every batch norm replaced by `BatchNorm`; the parameters and buffers are the same objects."""
    if isinstance(module, _BatchNorm) and not isinstance(module, BatchNorm):
        new = BatchNorm(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
        new._parameters, new._buffers, new.training = module._parameters, module._buffers, module.training
        new._modules = module._modules
        return new
    for name, child in module.named_children():
        setattr(module, name, _global_batch_norm(child))
    return module


def synchronise_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with batch statistics over all ranks: torch's SyncBatchNorm on an accelerator, ours elsewhere."""
    if dist.get_world_size() == 1:
        return module  # one rank's batch is the whole batch: torch's fused kernel is the same, and faster
    # timm's converter is torch's, and keeps the activations within timm's norms.
    return _global_batch_norm(module) if device.type == "cpu" else convert_sync_batchnorm(module)


def wrap(
    module: nn.Module,
    device: torch.device,
    synchronise: bool = True,
    static_graph: bool = False,
    compression: Literal["none", "bf16"] = "none",
) -> nn.Module:
    """`module` on its device, with batch norm over all ranks (unless not to `synchronise`) and gradients averaged.

    `static_graph` is DistributedDataParallel's; `compression` is of the gradients while they are on their way. Buffers are
    not broadcast: the statistics of synchronised batch norm are equal on all ranks by construction.
    """
    module = module.to(device)
    if synchronise:
        module = synchronise_batch_norm(module, device)
    if dist.get_world_size() == 1:
        return module
    # torch 2.14 renamed the option and warns of the old name.
    new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if new_name else "broadcast_buffers": False}
    options |= {"gradient_as_bucket_view": True, "static_graph": static_graph}
    devices = None if device.type == "cpu" else [device.index]
    wrapped = DistributedDataParallel(module, device_ids=devices, **options)
    if device.type == "cpu":
        wrapped.register_comm_hook(torch.bfloat16 if compression == "bf16" else None, _mean_in_rank_order)
    elif compression == "bf16":
        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped


def averaging(model: nn.Module, now: bool) -> contextlib.AbstractContextManager:
    """A context for a pass through a wrapped model, whose gradients are averaged over the ranks, or if not `now` add up on
    each rank until a later one's are."""
    wait = not now and isinstance(model, DistributedDataParallel)
    return model.no_sync() if wait else contextlib.nullcontext()  # type: ignore[operator]


def _mean_in_rank_order(sent_as, bucket):  # type: ignore[no-untyped-def] # DDP refuses annotations that are strings
    """DDP's mean of the gradients on the CPU, the same to the last bit wherever in a bucket a number stands. The ranks send
    them to each other as they are, or as another type, and the mean is taken in their own.

    gloo's own order of summation follows that place, and DDP orders its buckets anew after its first step: beyond two
    ranks the first step after a resume would round otherwise than in a run that was never stopped.
    """
    sent = bucket.buffer().to(sent_as or bucket.buffer().dtype)
    parts = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    work = dist.all_gather(parts, sent, async_op=True)

    def mean(_: Any) -> Tensor:
        total = parts[0].to(bucket.buffer().dtype)
        for part in parts[1:]:
            total += part
        return total.div_(len(parts))

    return work.get_future().then(mean)


# ----------------------------------------------------------------------------------------------------- one for all ranks
def together(action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it raises on any, all ranks stop, instead of waiting for those that left."""
    caught: Exception | None = None
    result: T | None = None
    try:
        result = action()
    except Exception as error:
        caught = error
    status = Status.DONE if caught is None else caught.status if isinstance(caught, Stop) else Status.CRASH
    worst = torch.tensor(int(status))
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if not worst.item():
        return result  # type: ignore[return-value]
    told = gather_json(
        None if caught is None else f"rank {rank()} on {socket.gethostname()}: {caught or type(caught).__name__}"
    )
    if isinstance(caught, Stop):
        caught.of_all = True
    if caught is not None:
        raise caught
    # The main rank, whose output people read, says it too; the others leave in silence.
    elsewhere = Stop(next((text for text in told if text), ""))
    elsewhere.status = Status(int(worst.item()))
    raise of_all(elsewhere)


def of_all(stop: S) -> S:
    """`stop`, which every rank is about to raise, as this one shall: its sentence is the main rank's alone."""
    stop.of_all = True
    if rank() != 0:
        stop.args = ("",)
    return stop


def in_turn(action: Callable[[], T]) -> T:
    """`together`, the main rank first, then one rank of every other node, then the rest: what the first ones leave in a
    cache the others find there, whether nodes share it or not."""
    world = start()
    turn = 0 if world.is_main else 1 if world.local_rank == 0 else 2
    results = [together(action if now == turn else _nothing) for now in range(3)]
    return results[turn]  # type: ignore[return-value]


def _nothing() -> None:
    """The turn of others."""
