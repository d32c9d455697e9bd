"""Batches of augmented views: the host reads bytes and draws parameters by key, DALI decodes once and makes the views.

The order of epoch e is a permutation keyed by (seed, e); of each global batch, rank r takes every W-th place. What a
loader must remember is therefore (epoch, global samples consumed, unreadable ids): the same numbers on every rank.
"""

from __future__ import annotations

import io
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from ssl_pipeline import config, distributed
from ssl_pipeline.data import randomness
from ssl_pipeline.data.augment import ViewSpec
from ssl_pipeline.data.index import Index
from ssl_pipeline.data.listing import FORMATS
from ssl_pipeline.distributed import World
from ssl_pipeline.exits import BadInput

log = logging.getLogger("ssl_pipeline")


Decode = Literal["cpu", "mixed"]
Augment = Literal["cpu", "gpu"]


class Options(config.Options):
    """What to train on, and how it is measured."""

    name: str | None = None
    """Of the data set, as in the paper's tables: cifar10, imagenet. Not a path."""
    root: Path
    """Folder with train/<class>/<picture> and val/<class>/<picture>."""
    unlabelled: list[str] | None = None
    """Folders below `root`, beside train, whose pictures are pretrained on too; no evaluation sees them."""
    views: list[ViewSpec] = Field(min_length=1)
    """The training views of each picture."""
    decode: Decode | None = None
    """Where pictures are decoded: `cpu`, or `mixed`, Huffman codes on the CPU and the rest on the GPU. None: by the device."""
    augment: Augment | None = None
    """Where views are made of decoded pictures. None: by the device."""
    exact: bool = False
    """Clip colours after each operation, as the reference does, not once after all: one pass more each (docs/data.md)."""
    evaluation_view: ViewSpec
    """The one un-augmented view for evaluations."""
    labelled_view: ViewSpec | None = None
    """The view for training on labels (linear probe on pictures, fine-tuning). None: random resized crop, with the size,
    filter and normalisation of `evaluation_view`, and flip."""
    protocol: Literal["small", "imagenet"] = "small"
    """Which linear probe is the data set's own: `small`, Adam on features; `imagenet`, SGD on augmented pictures."""
    batch_size: int = Field(gt=0)
    """Pictures in a step, over all ranks."""
    shuffle: Literal["global", "shards"] = "global"
    """Order of an epoch: of all samples, or, for disks that seek badly, of shards and then of the samples in a window."""
    shuffle_window: int = Field(64, gt=0)
    """Shards among which samples are mixed with `shuffle: shards`. Classes mix no further than that."""
    threads: int | None = Field(None, gt=0)
    """DALI threads a rank; by default the node's cores over its ranks."""
    readers: int = Field(4, gt=0)
    """Files read at a time, a rank. More hide the latency of a network file system."""
    prefetch: int = Field(2, gt=0)
    """Batches made ahead, a rank."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Share of unreadable pictures at which a run stops."""


@dataclass(frozen=True)
class Batch:
    """N pictures of this rank, on its device."""

    views: list[Tensor]
    """V tensors (N, 3, S, S), float32."""
    labels: Tensor
    """(N,) int64; -1: none."""
    ids: np.ndarray
    """(N,) int64: which samples these are, after replacement of unreadable ones. On the host."""


@dataclass(frozen=True)
class _Prepared:
    """One batch as the host gives it to DALI."""

    ids: np.ndarray
    arrays: list[Any]


def picture_size(data: np.ndarray) -> tuple[int, int]:
    """(height, width) from the header of an encoded picture. Raises ValueError saying why it is none."""
    try:
        with Image.open(io.BytesIO(data.tobytes()), formats=FORMATS) as picture:
            width, height = picture.size
    except Exception as error:  # PIL raises many types on damaged headers; all mean the same here
        raise ValueError(f"no picture: {type(error).__name__}" if len(data) else "the file is empty") from None
    return height, width


def _threads(options_threads: int | None, world: World) -> int:
    # Under srun --cpus-per-task the affinity is this task's own share already.
    return options_threads or min(len(os.sched_getaffinity(0)), max(1, (os.cpu_count() or 1) // world.local_size))


def require_dali() -> None:
    """Raises BadInput with the way out where DALI is missing."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        raise BadInput(
            "NVIDIA DALI is not installed: `pip install 'ssl-pipeline[cuda13]'` for drivers of CUDA 13 and for machines "
            "without a GPU, `pip install 'ssl-pipeline[cuda12]'` for drivers of CUDA 12"
        ) from None


def require_shuffle(shuffle: str, index: Index) -> None:
    """Raises BadInput where a folder of pictures is to be read shard by shard."""
    if shuffle == "shards" and index.spans is None:
        raise BadInput(
            f"data.shuffle = shards reads tar shards, and {str(index.root)!r} is a folder of pictures: make shards of it with "
            "`ssl-pipeline pack-shards`, or give data.shuffle=global"
        )


def placement(decode: Decode | None, augment: Augment | None, device: torch.device) -> tuple[Decode, Augment]:
    """Where the two halves of the work are done on this device. Raises BadInput where they cannot be done there."""
    gpu = device.type == "cuda"
    if not gpu and (decode == "mixed" or augment == "gpu"):
        asked = "data.decode=mixed" if decode == "mixed" else "data.augment=gpu"
        raise BadInput(f"{asked} needs a GPU and torch sees none here: leave it out, or run where there is one")
    if decode == "mixed" and augment == "cpu":
        raise BadInput(
            "data.decode=mixed leaves pictures on the GPU, out of reach of data.augment=cpu: take decode=cpu"
        )
    if not gpu:
        return "cpu", "cpu"
    return decode or ("cpu" if augment == "cpu" else "mixed"), augment or "gpu"


class Loader:
    """An endless sequence of epochs; `for batch in loader` yields the rest of the current one.

    Args:
        index: the samples.
        views: what to make of each picture.
        batch_size: pictures in a step, over all ranks; the world size must divide it.
        seed: key of the order and of every augmentation parameter.
        world: this process's place.
        threads: DALI threads; None: the node's cores over its ranks.
        readers: files read at a time.
        prefetch: batches made ahead.
        exact: colours are clipped after each operation of a view.
        decode, augment: where; None: by the device (`placement`).
        training: shuffled, incomplete last batch dropped, epoch after epoch. Otherwise: one pass in the order of the
            ids, nothing dropped; rank r has samples r, r + W, ...
        shuffle: `global` or, of shards, `shards`, as in Options.
        window: shards in a window of the latter.
    """

    def __init__(
        self,
        index: Index,
        views: Sequence[ViewSpec],
        batch_size: int,
        *,
        seed: int,
        world: World,
        threads: int | None = None,
        readers: int = 4,
        prefetch: int = 2,
        exact: bool = False,
        decode: Decode | None = None,
        augment: Augment | None = None,
        training: bool = True,
        shuffle: Literal["global", "shards"] = "global",
        window: int = 64,
    ) -> None:
        require_dali()
        require_shuffle(shuffle, index)
        self.decode, self.augment = placement(decode, augment, world.device)
        self.index = index
        self.views = [view for view in views for _ in range(view.count)]
        self.batch_size = batch_size
        self.seed = seed
        self.world = world
        self.threads = _threads(threads, world)
        self.prefetch = prefetch
        self.exact = exact
        self.training = training
        self.shuffle = shuffle
        self.window = window
        self.epoch = 0
        self.consumed = 0
        """Samples of this epoch that all ranks together have been given."""
        self.bad: dict[int, str] = {}
        """Unreadable samples that this rank met or was told of by `all_bad`, with the reason."""
        self._shared: set[int] = set()
        self._bad_lock = threading.Lock()
        self.readers = readers
        self._waited = {"reading": 0.0, "all": 0.0}
        """Seconds that the caller waited since the last `remedy`: for bytes, and altogether."""
        self._reader_pool = ThreadPoolExecutor(readers, thread_name_prefix="read")
        self._assembler = ThreadPoolExecutor(1, thread_name_prefix="assemble")
        self._order: tuple[int, np.ndarray] | None = None
        self._pipeline: Any = None
        self._ahead: deque[Future[_Prepared]] = deque()
        self._inside: deque[_Prepared] = deque()
        self._next: tuple[int, int] | None = (0, 0)

    @classmethod
    def for_training(
        cls, options: Options, index: Index, *, seed: int, world: World, batch_size: int | None = None
    ) -> Loader:
        """The loader that `options` describe; `batch_size` in place of theirs."""
        return cls(
            index,
            options.views,
            batch_size or options.batch_size,
            seed=seed,
            world=world,
            threads=options.threads,
            readers=options.readers,
            prefetch=options.prefetch,
            exact=options.exact,
            decode=options.decode,
            augment=options.augment,
            shuffle=options.shuffle,
            window=options.shuffle_window,
        )

    def __len__(self) -> int:
        """Steps an epoch."""
        if self.training:
            return len(self.index) // self.batch_size
        return -(-len(self.index) // self.batch_size)

    def _steps_here(self) -> int:
        """Steps an epoch in which this rank has a sample; in a pass without shuffling the last one may have too few."""
        rest = len(self.index) - (len(self) - 1) * self.batch_size
        return len(self) - (not self.training and rest <= self.world.rank)

    # ------------------------------------------------------------------------------------------------------- its state
    def state_dict(self) -> dict[str, Any]:
        """Where the next batch lies, and what is unreadable: the same on all ranks, which must all call it."""
        return {"epoch": self.epoch, "consumed": self.consumed, "bad": dict(sorted(self.all_bad().items()))}

    def all_bad(self) -> dict[int, str]:
        """Unreadable samples that any rank met, with the reason; names those that are new. All ranks must call it."""
        with self._bad_lock:
            new = {sample: reason for sample, reason in self.bad.items() if sample not in self._shared}
        if distributed.union(list(new)):
            found = {int(s): reason for row in distributed.gather_json(list(new.items())) for s, reason in row}
            with self._bad_lock:
                self.bad = found | self.bad
            self._shared |= set(found)
            # Here, by one rank: two may meet the same file before they can tell each other.
            for sample, reason in sorted(found.items()) if self.world.is_main else ():
                log.warning("unreadable picture %s: %s; another takes its place", self.index.name(sample), reason)
        with self._bad_lock:
            return dict(self.bad)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; what was made ahead is dropped."""
        self.epoch, self.consumed = state["epoch"], state["consumed"]
        self.bad = dict(state["bad"])
        self._shared = set(self.bad)
        self._discard()

    # -------------------------------------------------------------------------------------------------------- iteration
    def __iter__(self) -> Iterator[Batch]:
        while self.consumed // self.batch_size < self._steps_here():
            start = time.monotonic()
            batch = self._take()
            self._waited["all"] += time.monotonic() - start
            self.consumed += self.batch_size
            yield batch
        self.epoch, self.consumed = self.epoch + 1, 0

    def _take(self) -> Batch:
        if self._pipeline is None:
            self._next = (self.epoch, self.consumed // self.batch_size)
            self._pipeline = self._build()
        try:
            outputs = self._run()
        except RuntimeError as error:
            outputs = self._without_the_undecodable(error)
        prepared = self._inside.popleft()
        device = self.world.device
        views = [_to_torch(output, device) for output in outputs]
        labels = torch.from_numpy(self.index.labels[prepared.ids])
        if device.type != "cpu":
            labels = labels.pin_memory().to(device, non_blocking=True)
        return Batch(views, labels, prepared.ids)

    def _run(self) -> Any:
        """DALI's outputs, ordered on torch's stream: without one, DALI would make the host wait."""
        device = self.world.device
        return self._pipeline.run(torch.cuda.current_stream(device) if device.type == "cuda" else None)

    def _build(self) -> Any:
        from nvidia.dali import fn, pipeline_def, types

        gpu = self.world.device.type == "cuda"
        one = np.zeros(1, dtype=np.int64)
        counts = [len(view.parameters(0, 0, one, 0, np.full((1, 2), view.size), self.exact)) for view in self.views]

        @pipeline_def(
            batch_size=-(-self.batch_size // self.world.size),
            num_threads=self.threads,
            device_id=self.world.device.index if gpu else None,
            prefetch_queue_depth=self.prefetch,
            exec_dynamic=True,
            seed=0,  # no operator of this graph draws anything
        )
        def graph() -> Any:
            inputs = fn.external_source(source=self._feed, num_outputs=1 + sum(counts), batch=True)
            # PIL, and so every published recipe, ignores the EXIF orientation; the header's size is then the picture's.
            images = fn.decoders.image(inputs[0], device=self.decode, output_type=types.RGB, adjust_orientation=False)
            if (self.decode, self.augment) == ("cpu", "gpu"):
                images = images.gpu()
            outputs, place = [], 1
            for view, count in zip(self.views, counts, strict=True):
                outputs.append(view.nodes(images, inputs[place : place + count], self.exact))
                place += count
            return tuple(output.gpu() if gpu and self.augment == "cpu" else output for output in outputs)

        for _ in range(self.prefetch):
            self._schedule()
        pipeline = graph()
        pipeline.build()
        return pipeline

    def _feed(self) -> list[Any]:
        """DALI's callback: the next batch that the host prepared."""
        if not self._ahead:
            raise StopIteration
        start = time.monotonic()
        prepared = self._ahead.popleft().result()
        self._waited["reading"] += time.monotonic() - start
        self._schedule()
        self._inside.append(prepared)
        return prepared.arrays

    def _schedule(self) -> None:
        if self._next is None:
            return
        epoch, step = self._next
        self._ahead.append(self._assembler.submit(self._prepare, epoch, step))
        if step + 1 < self._steps_here():
            self._next = (epoch, step + 1)
        else:
            self._next = (epoch + 1, 0) if self.training else None

    def remedy(self) -> str:
        """Which setting to try where training waits for this loader, by which half of it was waited for since last asked."""
        reading = self._waited["reading"] > 0.5 * self._waited["all"]
        self._waited = {"reading": 0.0, "all": 0.0}
        if reading:
            return f"reading files is what takes long: try data.readers={2 * self.readers}"
        if self.world.device.type == "cuda" and self.augment == "cpu":
            return "making views is what takes long: try data.augment=gpu"
        if self.world.device.type == "cuda" and self.decode == "cpu":
            return "decoding is what takes long: try data.decode=mixed"
        cores = _threads(None, self.world)
        if self.threads < cores:
            return f"decoding and making views is what takes long: try data.threads={cores}"
        return (
            f"decoding and making views is what takes long, and data.threads={self.threads} has all cores of this rank: try "
            "more cores a rank (--cpus-per-task), or store smaller pictures"
        )

    def close(self) -> None:
        """Give back the pipeline and the threads; the loader is not used again, but for what it counted."""
        self._discard()
        self._reader_pool.shutdown(wait=False)
        self._assembler.shutdown(wait=False)

    def _discard(self) -> None:
        """Forget what was made ahead."""
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._inside.clear()
        self._pipeline = None

    # ----------------------------------------------------------------------------------------------------- on the host
    def ids(self, epoch: int, step: int) -> np.ndarray:
        """Ids of this rank's samples in a step, before any replacement."""
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._epoch_order(epoch))
        whole = self._order[1][step * self.batch_size : (step + 1) * self.batch_size]
        return whole[self.world.rank :: self.world.size]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """Ids of the whole epoch, of all ranks, (N,) int64."""
        if not self.training:
            return np.arange(len(self.index))
        if self.shuffle == "shards":
            assert self.index.spans is not None
            return randomness.windowed_permutation(self.seed, epoch, self.index.spans[:, 0], self.window)
        return randomness.permutation(self.seed, epoch, len(self.index))

    def _prepare(self, epoch: int, step: int) -> _Prepared:
        wanted = self.ids(epoch, step)
        read = list(self._reader_pool.map(lambda sample: self._read(epoch, int(sample)), wanted))
        ids = np.array([sample for sample, _, _ in read], dtype=np.int64)
        sizes = np.array([size for _, _, size in read], dtype=np.int64).reshape(-1, 2)
        arrays: list[Any] = [[data for _, data, _ in read]]
        for place, view in enumerate(self.views):
            # Keyed by the wanted id, not by the replacement's: a view of a good picture never depends on a bad one.
            arrays += view.parameters(self.seed, epoch, wanted, place, sizes, self.exact)
        return _Prepared(ids, arrays)

    def _read(self, epoch: int, wanted: int) -> tuple[int, np.ndarray, tuple[int, int]]:
        sample = wanted
        for attempt in range(1000):
            if sample not in self.bad:
                try:
                    data = self.index.read(sample)
                    return sample, data, picture_size(data)
                except (OSError, ValueError) as error:
                    self._mark_bad(sample, str(error))
            sample = randomness.replacement(self.seed, epoch, wanted, attempt, len(self.index))
        raise BadInput(f"no readable picture in 1000 attempts under {str(self.index.root)!r}; {self.bad_summary()}")

    def _mark_bad(self, sample: int, reason: str) -> None:
        with self._bad_lock:
            self.bad.setdefault(sample, reason)

    def require_readable(self, most: float) -> None:
        """Raises BadInput, on all ranks alike, where all of them together met more than this share of unreadable pictures.

        All ranks must call it.
        """
        bad = len(self.all_bad())
        if bad > most * len(self.index):
            raise BadInput(
                f"{bad} of {len(self.index)} pictures in {str(self.index.root)!r} are unreadable, more than "
                f"data.max_bad_fraction = {most}; mend them or raise data.max_bad_fraction; {self.bad_summary()}"
            )

    def bad_summary(self, most: int = 20) -> str:
        """One line with the unreadable pictures in `bad`."""
        with self._bad_lock:
            bad = sorted(self.bad.items())
        names = [f"{self.index.paths[sample]} ({reason})" for sample, reason in bad[:most]]
        more = f" and {len(bad) - most} more" if len(bad) > most else ""
        return f"{len(bad)} unreadable: {', '.join(names)}{more}"

    def _without_the_undecodable(self, error: RuntimeError) -> Any:
        """After a decode error DALI's pipeline is dead and does not always name the file: find it, and build anew."""
        suspects = [pair for prepared in self._inside for pair in zip(prepared.ids, prepared.arrays[0], strict=True)]
        found = undecodable([data for _, data in suspects], self.decode, self.world.device, self.threads)
        if not found:
            raise error
        for place in found:
            self._mark_bad(int(suspects[place][0]), "DALI cannot decode it")
        self._discard()
        self._next = (self.epoch, self.consumed // self.batch_size)
        self._pipeline = self._build()
        try:
            return self._run()
        except RuntimeError as again:
            return self._without_the_undecodable(again)  # ends: each round marks at least one more file


def undecodable(pictures: Sequence[np.ndarray], decode: Decode, device: torch.device, threads: int = 1) -> list[int]:
    """Places of the encoded pictures that DALI does not decode, by that decoder: bisected.

    One in n costs about 2 log2 n small pipelines and two decodings of all; each in a pipeline of its own would cost n.
    """
    if not pictures or decodes(pictures, decode, device, threads):
        return []
    if len(pictures) == 1:
        return [0]
    half = len(pictures) // 2
    second = undecodable(pictures[half:], decode, device, threads)
    return undecodable(pictures[:half], decode, device, threads) + [half + place for place in second]


def decodes(pictures: Sequence[np.ndarray], decode: Decode, device: torch.device, threads: int = 1) -> bool:
    """Whether DALI decodes all of these encoded pictures, by that decoder."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=len(pictures), num_threads=threads, device_id=device.index, prefetch_queue_depth=1)
    def graph() -> Any:
        encoded = fn.external_source(source=lambda: list(pictures), batch=True)
        return fn.decoders.image(encoded, device=decode, output_type=types.RGB, adjust_orientation=False)

    try:
        pipeline = graph()
        pipeline.build()
        pipeline.run()
    except RuntimeError:
        return False
    return True


def _to_torch(output: Any, device: torch.device) -> Tensor:
    """A torch tensor of DALI's output, which DALI does not write to again."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    dense = output.as_tensor()
    if device.type == "cpu":
        return torch.from_dlpack(dense)  # not copied: the dynamic executor leaves an output to whoever holds it
    # Copied: whether DALI gives memory back in the order of torch's stream, nobody has tried here.
    tensor = torch.empty(dense.shape(), dtype=torch.float32, device=device)
    feed_ndarray(dense, tensor, cuda_stream=torch.cuda.current_stream(device))
    return tensor
