"""A loader without DALI, for machines that have none: the project's own, of which torch makes the views.

Order, files read, replacement of what is unreadable, augmentation parameters and state are those of
`ssl_pipeline.data.loader.Loader`; only the DALI graph is replaced, by the same operations on the run's device with the
same parameters (tests/gpu/test_views.py compares the pixels). It is here to measure and test what comes after the loader,
and is no part of the pipeline.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ssl_pipeline import pretrain
from ssl_pipeline.data import augment, loader
from ssl_pipeline.data.augment import ViewSpec
from ssl_pipeline.data.loader import Batch, Loader
from ssl_pipeline.evaluation import features

WITHOUT_DALI = (
    (loader, "require_dali", lambda: None),
    (pretrain, "require_dali", lambda: None),
)


class TorchLoader(Loader):
    """`Loader`, with torch in the place of DALI. Decoded pictures are kept, so that it suits small ones only."""

    _decoded: dict[int, np.ndarray]

    def _build(self) -> Any:
        self._decoded = getattr(self, "_decoded", {})
        for _ in range(self.prefetch):
            self._schedule()
        return self

    def _take(self) -> Batch:
        if self._pipeline is None:
            self._next = (self.epoch, self.consumed // self.batch_size)
            self._pipeline = self._build()
        encoded, *left = self._feed()
        prepared = self._inside.popleft()
        device = self.world.device
        pictures = [self._picture(int(i), data) for i, data in zip(prepared.ids, encoded, strict=True)]
        height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
        pixels = np.zeros((len(pictures), height, width, 3), dtype=np.uint8)
        inside = np.zeros((len(pictures), height, width, 1), dtype=bool)
        for row, mask, picture in zip(pixels, inside, pictures, strict=True):
            row[: picture.shape[0], : picture.shape[1]] = picture
            mask[: picture.shape[0], : picture.shape[1]] = True
        x, where = (_to(torch.from_numpy(a), device).permute(0, 3, 1, 2).float() for a in (pixels, inside))
        views = []
        for view in self.views:
            made, left = make_view(view, x, where, left, self.exact)
            views.append(made)
        return Batch(views, _to(torch.from_numpy(self.index.labels[prepared.ids]), device), prepared.ids)

    def _picture(self, sample: int, encoded: np.ndarray) -> np.ndarray:
        if sample not in self._decoded:
            with Image.open(io.BytesIO(encoded.tobytes())) as picture:
                self._decoded[sample] = np.asarray(picture.convert("RGB"))
        return self._decoded[sample]


def _to(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def make_view(
    view: ViewSpec, x: Tensor, inside: Tensor, arrays: Sequence[Any], exact: bool = False
) -> tuple[Tensor, list[Any]]:
    """One view (N, 3, S, S) of pictures x (N, 3, H, W) in 0..255, and those of `arrays` that it did not take.

    `inside` (N, 1, H, W) is 1 where a picture smaller than the largest has pixels.
    """
    left = list(arrays)
    for group in view._groups():
        op = group[0]
        if isinstance(op, augment._Linear):
            maps = sum(len(one.steps(np.zeros((1, one.draws)))) for one in group) if exact else 1  # type: ignore[attr-defined]
            for _ in range(maps):
                a, b = (_to(torch.from_numpy(np.stack(left.pop(0))), x.device) for _ in range(2))
                mean = (x * inside).sum((2, 3)) / inside.sum((2, 3))
                x = _bytes(torch.einsum("nij,njhw->nihw", a, x) + torch.einsum("nij,nj->ni", b, mean)[..., None, None])
        elif isinstance(op, augment._Resize):
            boxes = [_to(torch.from_numpy(np.stack(left.pop(0))), x.device) for _ in range(2)]
            rows, columns = (
                _resampling(boxes[0][:, axis], boxes[1][:, axis], x.shape[2 + axis], view.size, op.interpolation)
                for axis in (0, 1)
            )
            x = _bytes(rows[:, None] @ x @ columns[:, None].mT)
            inside = torch.ones_like(x[:, :1])
        elif isinstance(op, augment.Flip):
            flipped = _to(torch.from_numpy(np.stack(left.pop(0))), x.device).bool()
            x = torch.where(flipped[:, None, None, None], x.flip(3), x)
        elif isinstance(op, augment.Affine):
            x = _bytes(_warped(x, _to(torch.from_numpy(np.stack(left.pop(0))), x.device)))
        elif isinstance(op, augment.Blur):
            x = _bytes(_filtered(_filtered(x, left.pop(0), 1), left.pop(0), 0))
        elif isinstance(op, augment.Solarize):
            threshold = _to(torch.from_numpy(np.stack(left.pop(0))), x.device)[:, None, None, None]
            x = torch.where(x > threshold, 255 - x, x)
        elif isinstance(op, augment.Normalize):
            mean, std = (_to(255 * torch.tensor(v)[:, None, None], x.device) for v in (op.mean, op.std))
            x = (x - mean) / std
        else:
            raise NotImplementedError(type(op).__name__)
    return x.contiguous(), left


def _bytes(x: Tensor) -> Tensor:
    return x.round().clamp(0, 255)


def _resampling(start: Tensor, end: Tensor, length: int, size: int, interpolation: str) -> Tensor:
    """Weights (N, size, length) by which the pixels between start (N,) and end (N,) come to `size` pixels.

    PIL's: a filter as wide as a pixel, or as an output pixel where that is wider; cubic with a = -0.5, or linear.
    """
    scale = (end - start)[:, None, None] / size
    centres = start[:, None, None] + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    places = torch.arange(length, device=start.device) + 0.5
    t = ((places - centres) / scale.clamp(min=1)).abs()
    if interpolation == "bicubic":
        near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
        weights = torch.where(t < 1, near, torch.where(t < 2, far, 0.0))
    else:
        weights = (1 - t).clamp(min=0)
    weights = weights * ((places > start[:, None, None]) & (places < end[:, None, None]))
    return weights / weights.sum(-1, keepdim=True)


def _warped(x: Tensor, matrix: Tensor) -> Tensor:
    """x (N, 3, H, W) where each output point p shows the point `matrix` (N, 2, 3) of (p, 1), bilinear, black outside."""
    height, width = x.shape[2:]
    down, right = (torch.arange(length, device=x.device) + 0.5 for length in (height, width))
    points = torch.stack([right.expand(height, -1), down[:, None].expand(-1, width), torch.ones_like(x[0, 0])], -1)
    shown = torch.einsum("nij,hwj->nhwi", matrix, points)
    within = torch.stack([2 * shown[..., 0] / width - 1, 2 * shown[..., 1] / height - 1], -1)
    return F.grid_sample(x, within, mode="bilinear", padding_mode="zeros", align_corners=False)


def _filtered(x: Tensor, windows: Sequence[np.ndarray], axis: int) -> Tensor:
    """x (N, 3, H, W), each picture with its window along the columns (axis 0) or the rows (axis 1), edges repeated."""
    radius = max(window.size for window in windows) // 2
    kernels = np.zeros((len(windows), 2 * radius + 1), dtype=np.float32)
    for row, window in zip(kernels, windows, strict=True):
        row[radius - window.size // 2 : radius + window.size // 2 + 1] = window.ravel()
    weight = _to(torch.from_numpy(kernels), x.device).repeat_interleave(3, 0)[:, None]
    padded = F.pad(x, (radius, radius, 0, 0) if axis else (0, 0, radius, radius), mode="replicate")
    stacked = padded.flatten(0, 1)[None]
    return F.conv2d(stacked, weight[:, :, None] if axis else weight[..., None], groups=stacked.shape[1]).view_as(x)


@contextlib.contextmanager
def loading_with(kind: type[Loader]) -> Iterator[None]:
    """A context in which runs and evaluations load with `kind`."""
    with contextlib.ExitStack() as stack:
        for place in (pretrain, features):
            stack.enter_context(mock.patch.object(place, "Loader", kind))
        if kind is not Loader:
            for place, name, value in WITHOUT_DALI:
                stack.enter_context(mock.patch.object(place, name, value))
        yield
