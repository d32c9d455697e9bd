"""Batches of augmented views: the host reads bytes and draws parameters by key, DALI decodes once and makes the views.

The order of epoch e is a permutation keyed by (seed, e); of each global batch, rank r takes every W-th place. What a
loader must remember is therefore (epoch, global samples consumed, unreadable ids, where the run was rolled back to): the
same numbers on every rank. A digest tells whether ids still mean the same pictures.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import logging
import math
import os
import shlex
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
from PIL import Image, UnidentifiedImageError
from pydantic import Field
from torch import Tensor

from ssl_pipeline import config, distributed
from ssl_pipeline.data import randomness
from ssl_pipeline.data.augment import ViewSpec
from ssl_pipeline.data.index import Index
from ssl_pipeline.data.listing import FORMATS
from ssl_pipeline.distributed import World
from ssl_pipeline.exits import BadInput, StorageFailure

log = logging.getLogger("ssl_pipeline")

PATIENCE, OF_TIMEOUT = 240.0, 0.4
"""Seconds for which a storage that does not answer is asked again, fewer than lie between a job's signal and the end of its
slot (slurm/pretrain_imagenet.sh); and the share that they may be of those for which ranks wait for each other."""

OUTAGE = frozenset(
    {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO, errno.EAGAIN, errno.EBUSY,
     errno.ENOMEM, errno.ENOBUFS, errno.EMFILE, errno.ENFILE, errno.ENOLCK, errno.ENOTCONN, errno.ESHUTDOWN,
     errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
     errno.ENETUNREACH}
)  # fmt: skip
"""Errors of the storage, the network or this machine, which say nothing of the picture that was asked for."""


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
    """Shards among which samples are mixed with `shuffle: shards`. Classes mix no further than that; the bytes of two such
    windows should fit into a node's memory."""
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


_Read = tuple[int, np.ndarray, tuple[int, int]]
"""Id of a sample, its bytes, and its picture's height and width."""


class _Outage(Exception):
    """The storage did not give all pictures of a step's batch: those in `failed` not, those in `read`, by the wanted id."""

    def __init__(self, epoch: int, step: int, read: dict[int, _Read], failed: dict[int, OSError]) -> None:
        self.epoch, self.step, self.read, self.failed = epoch, step, read, failed
        self.time = time.monotonic()


def picture_size(data: np.ndarray) -> tuple[int, int]:
    """(height, width) from the header of an encoded picture. Raises ValueError saying why DALI must not be given it.

    A PNG must have its last chunk: nvImageCodec looks for it before it decodes (src/parsers/png.cpp), and where a file is
    refused that early DALI's decoder leaves the batch while its threads still work on it
    (dali/operators/imgcodec/image_decoder.h:SetupImpl), which may end the process. What is damaged behind the header of
    another format is refused when no thread works any more.
    """
    encoded = data.tobytes()
    if not encoded:
        raise ValueError("the file is empty")
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as picture:
            width, height = picture.size
            kind = picture.format
    except Image.DecompressionBombError:
        raise ValueError("more than 178,956,970 pixels") from None
    except UnidentifiedImageError:
        raise ValueError("no picture") from None
    except Exception:  # PIL raises many types on damaged headers; all mean the same here
        raise ValueError("its header is damaged or cut") from None
    if kind == "PNG" and not _has_its_end(encoded):
        raise ValueError("truncated")
    return height, width


def _has_its_end(png: bytes) -> bool:
    place = 8
    while place + 8 <= len(png):
        if png[place + 4 : place + 8] == b"IEND":
            return True
        place += 12 + int.from_bytes(png[place : place + 4], "big")
    return False


def refusal(data: np.ndarray) -> str:
    """In words, why DALI does not decode a picture that has a size: PIL's opinion of it."""
    try:
        with Image.open(io.BytesIO(data.tobytes()), formats=FORMATS) as picture:
            picture.load()
    except Exception as error:  # many types
        return "truncated" if "truncated" in str(error) else "damaged"
    return "DALI cannot decode it"


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
        timeout: float = math.inf,
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
        self.timeout = timeout
        self.epoch = 0
        self.consumed = 0
        """Samples of this epoch that all ranks together have been given."""
        self.rekeyed: tuple[tuple[int, int, int], ...] = ()
        """(epoch, samples of it consumed, rollbacks so far) of each place from which on an epoch's order was drawn anew."""
        self.bad: dict[int, str] = {}
        """Unreadable samples that this rank met or was told of by `all_bad`, with the reason."""
        self._shared: set[int] = set()
        self._bad_lock = threading.Lock()
        self.readers = readers
        self._waited = {"reading": 0.0, "all": 0.0}
        """Seconds that the caller waited since the last `remedy`: for bytes, and altogether."""
        self._reader_pool = ThreadPoolExecutor(readers, thread_name_prefix="read")
        self._assembler = ThreadPoolExecutor(1, thread_name_prefix="assemble")
        self._order: tuple[Any, np.ndarray] | None = None
        self._pipeline: Any = None
        self._ahead: deque[Future[_Prepared]] = deque()
        self._inside: deque[_Prepared] = deque()
        self._next: tuple[int, int] | None = (0, 0)
        self._outage_over = -math.inf
        """When the storage last answered again."""
        self._fetched: tuple[Any, int, set[int]] = (None, 0, set())
        """Of which epoch, up to which place of its order, the system was told to read which shards."""

    @classmethod
    def for_training(
        cls,
        options: Options,
        index: Index,
        *,
        seed: int,
        world: World,
        batch_size: int | None = None,
        timeout: float = math.inf,
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
            timeout=timeout,
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
        bad = dict(sorted(self.all_bad().items()))
        return {
            "epoch": self.epoch,
            "consumed": self.consumed,
            "bad": bad,
            "rekeyed": [list(key) for key in self.rekeyed],
            "pictures": self.pictures,
        }

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
        """Go on where `state` was taken; what was made ahead is dropped. Raises BadInput as `require_same_pictures`."""
        self.require_same_pictures(state)
        self.epoch, self.consumed = int(state["epoch"]), int(state["consumed"])
        self.rekeyed = tuple((int(epoch), int(done), int(count)) for epoch, done, count in state.get("rekeyed", []))
        self.bad = {int(sample): str(reason) for sample, reason in state["bad"].items()}
        self._shared = set(self.bad)
        self._discard()

    def require_same_pictures(self, state: dict[str, Any]) -> None:
        """Raises BadInput where ids mean other pictures than in `state`; one of an older version does not know."""
        if state.get("pictures", self.pictures) != self.pictures:
            raise BadInput(
                f"the pictures in {str(self.index.root)!r} are not those that this was begun with ({state['pictures']} then, "
                f"{self.pictures} now): names, labels{' or shards' if self.shuffle == 'shards' else ''} have changed; put them "
                "back (for a lost one an empty file of its name will do), or begin anew with another --output"
            )

    @property
    def rollbacks(self) -> int:
        """How often the run was rolled back to a checkpoint, by the last `rekey`."""
        return self.rekeyed[-1][2] if self.rekeyed else 0

    def rekey(self, rollbacks: int) -> None:
        """From here on the rest of this epoch, or of the next one where this one is through, comes in an order of its own.

        What was consumed stays consumed: every sample still comes at most once an epoch.
        """
        if self.consumed // self.batch_size >= len(self):
            self.epoch, self.consumed = self.epoch + 1, 0
        self.rekeyed = (*self.rekeyed, (self.epoch, self.consumed, rollbacks))
        self._discard()

    @functools.cached_property
    def pictures(self) -> str:
        """What the ids mean and, of shards that are shuffled, what their order depends on."""
        digest = self.index.labelled_digest()
        if self.shuffle == "shards":
            assert self.index.spans is not None
            digest += "-" + hashlib.sha256(self.index.spans[:, 0].tobytes()).hexdigest()[:12]
        return f"{len(self.index)} pictures, {digest}"

    def try_bad_again(self) -> None:
        """Ask once more for what is in `bad`, after `load_state_dict`: what can be read now takes part from here on.

        Where the files are as they were, nothing changes. All ranks must call it, with the same `bad`.
        """
        mine = sorted(self.bad)[self.world.rank :: self.world.size]
        good: list[int] = []
        for start in range(0, len(mine), 64):
            some = mine[start : start + 64]
            read = [
                (i, data)
                for i, data in zip(some, self._reader_pool.map(self._once, some), strict=True)
                if data is not None
            ]
            broken = undecodable([data for _, data in read], self.decode, self.world.device, self.threads)
            good += [i for place, (i, _) in enumerate(read) if place not in broken]
        again = distributed.union(good)
        self.bad = {sample: reason for sample, reason in self.bad.items() if sample not in again}
        self._shared = set(self.bad)
        if again and self.world.is_main:
            names = ", ".join(self.index.paths[sample] for sample in sorted(again)[:20])
            more = f" and {len(again) - 20} more" if len(again) > 20 else ""
            log.warning(
                "pictures that could not be read before can be read now, and take part again from here: %s%s",
                names,
                more,
            )

    def _once(self, sample: int) -> np.ndarray | None:
        """The bytes of a sample, None where they are not a picture's or cannot be read."""
        try:
            data = self.index.read(sample)
            picture_size(data)
        except (OSError, ValueError):
            return None
        return data

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
        prepared = self._ready(self._ahead.popleft())
        self._waited["reading"] += time.monotonic() - start
        self._schedule()
        self._inside.append(prepared)
        return prepared.arrays

    def _ready(self, future: Future[_Prepared]) -> _Prepared:
        """The batch, once it is prepared; what the storage does not give is asked for again, for PATIENCE seconds or
        until the other ranks have waited OF_TIMEOUT of their timeout.

        Here, in the thread that needs it, and not in the readers': the end of the program would wait for these. Raises
        StorageFailure.
        """
        began, pause, patience = None, 0.1, min(PATIENCE, OF_TIMEOUT * self.timeout)
        while True:
            try:
                prepared = future.result()
            except _Outage as outage:
                sample, error = next(iter(outage.failed.items()))
                what = f"rank {self.world.rank} cannot read {self.index.name(sample)}: {error.strerror or error}"
                if began is None:
                    if outage.time > self._outage_over:  # not of a batch that was prepared meanwhile
                        began = outage.time
                        log.warning("%s; asking again for %.0f s", what, patience)
                elif time.monotonic() - began < patience:
                    time.sleep(pause)
                    pause = min(2 * pause, patience / 8)
                elif self._others_are_read(outage):
                    for sample, error in outage.failed.items():
                        self._mark_bad(sample, str(error))
                else:
                    raise StorageFailure(
                        f"{what}, nor others, for {patience:.0f} s: see that the storage answers; the same command goes on"
                    ) from None
                future = self._assembler.submit(self._prepare, outage.epoch, outage.step, outage.read)
            else:
                if began is not None:
                    self._outage_over = time.monotonic()
                    log.warning("rank %d reads again after %.1f s", self.world.rank, self._outage_over - began)
                return prepared

    def _others_are_read(self, outage: _Outage) -> bool:
        """Whether the storage gives pictures from all over, so that those which it does not give are at fault themselves."""
        spread = np.unique(np.linspace(0, len(self.index) - 1, 16).astype(int)).tolist()
        others = [sample for sample in spread if sample not in outage.failed and sample not in self.bad]
        for sample in others:
            try:
                self.index.read(sample)
            except OSError as error:
                if self._is_outage(error):
                    return False
        return bool(others)

    def _is_outage(self, error: OSError) -> bool:
        """Whether not the picture is to blame but what holds it: also where the whole folder is gone, as when unmounted."""
        if error.errno is None or error.errno in OUTAGE:
            return error.errno is not None
        try:
            with os.scandir(self.index.root) as entries:
                return next(entries, None) is None
        except OSError:
            return True

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
        return self.batch_ids(epoch, step)[self.world.rank :: self.world.size]

    def batch_ids(self, epoch: int, step: int) -> np.ndarray:
        """Ids of all ranks' samples in a step, before any replacement."""
        kept, rekeyed = self._order, tuple(key for key in self.rekeyed if key[0] == epoch)
        if kept is None or kept[0] != (epoch, rekeyed):  # asked by two threads: each goes on with what it has in hand
            self._order = kept = ((epoch, rekeyed), self._epoch_order(epoch, rekeyed))
        return kept[1][step * self.batch_size : (step + 1) * self.batch_size]

    def _epoch_order(self, epoch: int, rekeyed: tuple[tuple[int, int, int], ...]) -> np.ndarray:
        """Ids of the whole epoch, of all ranks, (N,) int64."""
        order = np.arange(len(self.index))
        if not self.training:
            return order
        for _, consumed, rollbacks in ((epoch, 0, 0), *rekeyed):
            rest = order[consumed:]
            order = np.concatenate([order[:consumed], rest[self._permutation(epoch, rest, rollbacks)]])
        return order

    def _permutation(self, epoch: int, samples: np.ndarray, rollbacks: int) -> np.ndarray:
        if self.shuffle == "shards":
            assert self.index.spans is not None
            shards = self.index.spans[samples, 0]
            return randomness.windowed_permutation(self.seed, epoch, shards, self.window, rollbacks)
        return randomness.permutation(self.seed, epoch, len(samples), rollbacks)

    def _prepare(self, epoch: int, step: int, before: dict[int, _Read] | None = None) -> _Prepared:
        """A batch of this rank; `before` is what was read of it before. Raises _Outage."""
        wanted = self.ids(epoch, step)
        if self.shuffle == "shards":
            self._fetch_ahead(step)
        done = dict(before or {})
        failed: dict[int, OSError] = {}

        def one(sample: int) -> None:
            if len(failed) < self.readers and (found := self._read(epoch, sample, failed)) is not None:
                done[sample] = found

        list(self._reader_pool.map(one, [sample for sample in wanted.tolist() if sample not in done]))
        if failed:
            raise _Outage(epoch, step, done, failed)
        read = [done[sample] for sample in wanted.tolist()]
        ids = np.array([sample for sample, _, _ in read], dtype=np.int64)
        sizes = np.array([size for _, _, size in read], dtype=np.int64).reshape(-1, 2)
        arrays: list[Any] = [[data for _, data, _ in read]]
        for place, view in enumerate(self.views):
            # Keyed by the wanted id, not by the replacement's: a view of a good picture never depends on a bad one.
            arrays += view.parameters(self.seed, epoch, wanted, place, sizes, self.exact)
        return _Prepared(ids, arrays)

    def _fetch_ahead(self, step: int) -> None:
        """Have the shards of the next window read as a whole while the samples of this one are picked from memory.

        Ranks of a node share its memory, and this work.
        """
        assert self.index.spans is not None
        assert self._order is not None
        key, order = self._order
        of, first = self.index.spans[:, 0], step * self.batch_size
        known, place, told = self._fetched
        if known != key:
            place, told = first, set()
        end = first + self.batch_size + len(of) * self.window // len(self.index.shards)
        new = [shard for shard in dict.fromkeys(of[order[place:end]].tolist()) if shard not in told]
        self._fetched = (key, max(place, end), told | set(new))
        if mine := new[self.world.local_rank :: self.world.local_size]:
            threading.Thread(target=self.index.fetch, args=(mine,), name="fetch", daemon=True).start()

    def _read(self, epoch: int, wanted: int, failed: dict[int, OSError]) -> _Read | None:
        """The wanted sample or the one that stands in for it; None where the storage does not answer, noted in `failed`."""
        sample = wanted
        for attempt in range(1000):
            if sample not in self.bad:
                try:
                    data = self.index.read(sample)
                    return sample, data, picture_size(data)
                except (OSError, ValueError) as error:
                    if isinstance(error, OSError) and self._is_outage(error):
                        failed[sample] = error
                        return None
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
            root = shlex.quote(str(self.index.root))
            raise distributed.of_all(
                BadInput(
                    f"{bad} of {len(self.index)} pictures in {str(self.index.root)!r} are unreadable, more than "
                    f"data.max_bad_fraction = {most}; mend them (`ssl-pipeline check-data {root}` finds all) "
                    f"or raise data.max_bad_fraction; {self.bad_summary()}"
                )
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
            self._mark_bad(int(suspects[place][0]), refusal(suspects[place][1]))
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
    # No more at a time than the decoder looks at in one thread: with others at work a refusal may end the process.
    most = 4 * (threads + 1)
    if len(pictures) > most:
        pieces = range(0, len(pictures), most)
        return [s + place for s in pieces for place in undecodable(pictures[s : s + most], decode, device, threads)]
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
