"""Views of a picture: what is drawn for each (on the host, by key) and what DALI does with it.

An operation is an options class with two pure functions: `parameters` turns uniform numbers into arrays, one row a
sample, and `nodes` turns a DALI image and those arrays into a DALI image. DALI's own random operators are never used,
and both functions are the same for "cpu" and "gpu".

Jitter and gray are linear in the pixel x and in the mean m of its picture: x -> A x + B m, with 3 x 3 matrices A and B.
Products of such maps are such maps, so consecutive ones become ONE pass over the picture, whatever their order:
(A2, B2) after (A1, B1) is (A2 A1, A2 B1 + B2 (A1 + B1)). The reference (torchvision on PIL) clips to 0..255 after each
operation; this clips once, after the product, or, where `exact` is asked for, after each map in the order that was drawn.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from ssl_pipeline import config
from ssl_pipeline.data import randomness
from ssl_pipeline.exits import BadInput

Probability = Annotated[float, Field(ge=0, le=1)]
Range = tuple[float, float]
Map = tuple[np.ndarray, np.ndarray]
"""(A, B), each (N, 3, 3): x -> A x + B m."""
Arrays = list[Any]
"""Of N rows each: arrays (N, ...), or lists of N arrays where their shapes differ."""

GRAY = np.array([0.299, 0.587, 0.114])
"""Weights of ITU-R 601-2, as PIL's convert("L")."""


def _between(u: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * u


class Operation(config.Options):
    """One step of a view."""

    draws: ClassVar[int] = 0
    """Uniform numbers used for each sample."""

    def parameters(self, u: np.ndarray, sizes: np.ndarray, size: int) -> Arrays:
        """Arrays of N rows from uniform numbers u (N, draws), for pictures of `sizes` (N, 2: height, width)."""
        return []

    def output_sizes(self, sizes: np.ndarray, size: int) -> np.ndarray:
        """Heights and widths after this step, (N, 2)."""
        return sizes

    def nodes(self, images: Any, arguments: list[Any], size: int) -> Any:
        """The DALI graph of this step on uint8 images, (H, W, 3) or (3, H, W) as their layout says."""
        raise AssertionError(f"{type(self).__name__} is applied as part of a linear map")


class _Resize(Operation):
    """A box of the picture, resampled to size x size with an antialiased bicubic or bilinear filter."""

    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    def output_sizes(self, sizes: np.ndarray, size: int) -> np.ndarray:
        return np.full_like(sizes, size)

    def nodes(self, images: Any, arguments: list[Any], size: int) -> Any:
        from nvidia.dali import fn, types

        filters = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}
        start, end = arguments
        return fn.resize(
            images,
            roi_start=start,
            roi_end=end,
            size=[size, size],
            interp_type=filters[self.interpolation],
            antialias=True,
        )


class CropResize(_Resize):
    """Random resized crop, by torchvision's rule: ten attempts at a box of random area and aspect, else the centre.

    Source: pytorch/vision torchvision/transforms/transforms.py:RandomResizedCrop.get_params.
    """

    op: Literal["crop_resize"]
    scale: Range = (0.08, 1.0)
    """Area of the box as a share of the picture's."""
    ratio: Range = (3 / 4, 4 / 3)
    """Width over height of the box."""

    draws: ClassVar[int] = 22

    @field_validator("scale", "ratio")
    @classmethod
    def _ordered(cls, value: Range) -> Range:
        if not 0 < value[0] <= value[1]:
            raise ValueError("two numbers above 0 are needed, the smaller one first")
        return value

    def parameters(self, u: np.ndarray, sizes: np.ndarray, size: int) -> Arrays:
        height, width = sizes[:, :1].astype(float), sizes[:, 1:].astype(float)
        area = _between(u[:, 0:10], *self.scale) * height * width
        aspect = np.exp(_between(u[:, 10:20], math.log(self.ratio[0]), math.log(self.ratio[1])))
        w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        rows = np.arange(len(u))
        first = fits.argmax(axis=1)
        h, w = h[rows, first], w[rows, first]
        height, width = height[:, 0], width[:, 0]
        top = np.floor(u[:, 20] * (height - h + 1))
        left = np.floor(u[:, 21] * (width - w + 1))
        # No attempt fitted: the largest centred box within the bounds of the aspect.
        low, high = self.ratio
        narrow, wide = width / height < low, width / height > high
        h0 = np.where(narrow, np.rint(width / low), height)
        w0 = np.where(wide, np.rint(height * high), width)
        fitted = fits.any(axis=1)
        h, w = np.where(fitted, h, h0), np.where(fitted, w, w0)
        top = np.where(fitted, top, np.floor((height - h) / 2))
        left = np.where(fitted, left, np.floor((width - w) / 2))
        start = np.stack([top, left], axis=1).astype(np.float32)
        return [start, start + np.stack([h, w], axis=1).astype(np.float32)]


class CenterCrop(_Resize):
    """The evaluation's crop: shorter side to `resize` pixels, then the central size x size square, in one resampling."""

    op: Literal["center_crop"]
    resize: int = Field(256, gt=0)
    """Length of the shorter side, in pixels, before the crop."""

    def parameters(self, u: np.ndarray, sizes: np.ndarray, size: int) -> Arrays:
        side = sizes.min(axis=1, keepdims=True) * (size / self.resize)
        start = (sizes - side) / 2
        return [start.astype(np.float32), (start + side).astype(np.float32)]


class Affine(Operation):
    """Rotation, shift and scale about the centre, bilinear, black outside."""

    op: Literal["affine"]
    degrees: float = Field(0.0, ge=0, le=180)
    """The angle is uniform in +- degrees."""
    translate: float = Field(0.0, ge=0, lt=1)
    """Each shift is uniform in +- translate times the side."""
    scale: Range = (1.0, 1.0)

    draws: ClassVar[int] = 4

    def parameters(self, u: np.ndarray, sizes: np.ndarray, size: int) -> Arrays:
        angle = np.deg2rad(_between(u[:, 0], -self.degrees, self.degrees))
        zoom = _between(u[:, 1], *self.scale)
        shift = _between(u[:, 2:4], -self.translate, self.translate) * sizes[:, ::-1]
        centre = sizes[:, ::-1] / 2  # (x, y)
        # DALI's matrix maps an output point p to the input point it shows: R^-1 (p - centre - shift) / zoom + centre.
        cosine, sine = np.cos(angle) / zoom, np.sin(angle) / zoom
        inverse = np.stack([np.stack([cosine, sine], -1), np.stack([-sine, cosine], -1)], axis=1)
        offset = centre - np.einsum("nij,nj->ni", inverse, centre + shift)
        return [np.concatenate([inverse, offset[..., None]], axis=2).astype(np.float32)]

    def nodes(self, images: Any, arguments: list[Any], size: int) -> Any:
        from nvidia.dali import fn, types

        images = _laid_out(images, "HWC")  # warp_affine takes nothing else
        return fn.warp_affine(images, matrix=arguments[0], fill_value=0, interp_type=types.INTERP_LINEAR)


class Flip(Operation):
    """Horizontal flip."""

    op: Literal["flip"]
    probability: Probability = 0.5

    draws: ClassVar[int] = 1

    def parameters(self, u: np.ndarray, sizes: np.ndarray, size: int) -> Arrays:
        return [(u[:, 0] < self.probability).astype(np.int32)]

    def nodes(self, images: Any, arguments: list[Any], size: int) -> Any:
        from nvidia.dali import fn

        return fn.flip(images, horizontal=arguments[0])


class Blur(Operation):
    """Gaussian blur with sigma uniform in `sigma` pixels; the window is the odd number of pixels that covers 6 sigma."""

    op: Literal["blur"]
    probability: Probability = 0.5
    sigma: Range = (0.1, 2.0)

    draws: ClassVar[int] = 2

    def parameters(self, u: np.ndarray, sizes: np.ndarray, size: int) -> Arrays:
        sigma = _between(u[:, 1], *self.sigma)
        # A window of one pixel is the identity, at a twentieth of the cost of the whole view.
        radius = np.where(u[:, 0] < self.probability, np.ceil(3 * sigma), 0).astype(int)
        windows = [_gaussian(s, r) for s, r in zip(sigma, radius, strict=True)]
        return [[window[None, :] for window in windows], [window[:, None] for window in windows]]

    def nodes(self, images: Any, arguments: list[Any], size: int) -> Any:
        from nvidia.dali import fn

        # Not DALI's gaussian_blur, which takes seven times as long on a CPU (benchmarks/results/loader.md).
        for window in arguments:
            images = fn.filter(images, _beside(images, window), border="clamp")
        return images


def _gaussian(sigma: float, radius: int) -> np.ndarray:
    """exp(-x^2 / 2 sigma^2) at the whole numbers up to `radius`, of sum 1: (2 radius + 1,) float32."""
    x = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * np.square(x / max(sigma, 1e-3)))
    return (weights / weights.sum()).astype(np.float32)


def _laid_out(images: Any, layout: Literal["HWC", "CHW"]) -> Any:
    """uint8 images in this layout, whichever they had: faster than DALI's transpose, which must be told that."""
    from nvidia.dali import fn, types

    return fn.crop_mirror_normalize(images, dtype=types.UINT8, output_layout=layout, mean=[0.0], std=[1.0])


def _beside(images: Any, argument: Any) -> Any:
    """The argument on the device of the images, for operators that take both as inputs."""
    return argument.gpu() if images.device == "gpu" else argument


class Solarize(Operation):
    """Pixels of 128 and above become 255 - x, which is x with all bits turned."""

    op: Literal["solarize"]
    probability: Probability = 0.2

    draws: ClassVar[int] = 1

    def parameters(self, u: np.ndarray, sizes: np.ndarray, size: int) -> Arrays:
        # No byte is above 255: a picture that is not solarized takes the same path, without a branch.
        return [np.where(u[:, 0] < self.probability, 127, 255).astype(np.uint8)]

    def nodes(self, images: Any, arguments: list[Any], size: int) -> Any:
        # Bytes all the way: no operand is wider than uint8.
        return images ^ ((images > _beside(images, arguments[0])) * np.uint8(255))


class _Linear(Operation):
    """An operation x -> A x + B m of the pixel x and the mean m of its picture."""

    def steps(self, u: np.ndarray) -> list[Map]:
        """The maps that the reference clips one by one, in the order in which they are applied."""
        raise NotImplementedError

    def matrices(self, u: np.ndarray) -> Map:
        """A and B of all steps together, each (N, 3, 3)."""
        return functools.reduce(lambda whole, step: _compose(step, whole), self.steps(u))


_GRAY_ROWS = np.broadcast_to(GRAY, (3, 3))
"""The matrix that maps a pixel to three equal channels of its luma."""


def _gray_mix(factor: np.ndarray) -> np.ndarray:
    """factor * x + (1 - factor) * gray(x), (N, 3, 3): saturation, and gray at factor 0."""
    return factor[:, None, None] * np.eye(3) + (1 - factor)[:, None, None] * _GRAY_ROWS


def _hue(shift: np.ndarray) -> np.ndarray:
    """A turn of the hue by `shift` of a full circle, (N, 3, 3): a rotation of RGB about its gray axis.

    Exact where the shift is a third of the circle, for then it permutes the channels; nearer to HSV's hue, which is not
    linear, than a rotation in YIQ (on ImageNet photographs, by a shift of 0.1: 5 against 8 of 255; docs/data.md).
    """
    cosine, sine = np.cos(2 * np.pi * shift)[:, None, None], np.sin(2 * np.pi * shift)[:, None, None]
    return cosine * np.eye(3) + (1 - cosine) / 3 + sine / np.sqrt(3) * _CROSS


_CROSS = np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])

_ORDERS = np.array(list(itertools.permutations(range(4))))


class Jitter(_Linear):
    """Colour jitter in one of the 24 orders, by torchvision's ranges: each factor is uniform in 1 +- its option.

    Contrast is about the mean gray of the picture. Source: pytorch/vision
    torchvision/transforms/transforms.py:ColorJitter.
    """

    op: Literal["jitter"]
    brightness: float = Field(0.4, ge=0)
    contrast: float = Field(0.4, ge=0)
    saturation: float = Field(0.4, ge=0)
    hue: float = Field(0.1, ge=0, le=0.5)
    """Half-width of the shift, as a share of the colour circle."""
    probability: Probability = 0.8

    draws: ClassVar[int] = 6

    def steps(self, u: np.ndarray) -> list[Map]:
        brightness = _between(u[:, 1], max(0.0, 1 - self.brightness), 1 + self.brightness)[:, None, None]
        contrast = _between(u[:, 2], max(0.0, 1 - self.contrast), 1 + self.contrast)[:, None, None]
        saturation = _between(u[:, 3], max(0.0, 1 - self.saturation), 1 + self.saturation)
        hue = _between(u[:, 4], -self.hue, self.hue)
        a = np.stack([brightness * np.eye(3), contrast * np.eye(3), _gray_mix(saturation), _hue(hue)], axis=1)
        b = np.zeros_like(a)  # (N, 4, 3, 3)
        b[:, 1] = (1 - contrast) * _GRAY_ROWS
        order = _ORDERS[np.minimum((u[:, 5] * 24).astype(int), 23)]
        rows = np.arange(len(u))
        applied = (u[:, 0] < self.probability)[:, None, None]
        return [
            (np.where(applied, a[rows, turn], np.eye(3)), np.where(applied, b[rows, turn], 0.0)) for turn in order.T
        ]


class Gray(_Linear):
    """The picture in three equal channels of its luma."""

    op: Literal["gray"]
    probability: Probability = 0.2

    draws: ClassVar[int] = 1

    def steps(self, u: np.ndarray) -> list[Map]:
        a = _gray_mix(np.where(u[:, 0] < self.probability, 0.0, 1.0))
        return [(a, np.zeros_like(a))]


def _compose(second: Map, first: Map) -> Map:
    (a2, b2), (a1, b1) = second, first
    return a2 @ a1, a2 @ b1 + b2 @ (a1 + b1)


class Normalize(Operation):
    """(x / 255 - mean) / std, to float32 of layout (3, S, S). Every view ends with it."""

    op: Literal["normalize"]
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def nodes(self, images: Any, arguments: list[Any], size: int) -> Any:
        from nvidia.dali import fn, types

        return fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * m for m in self.mean],
            std=[255 * s for s in self.std],
        )


AnyOperation = Annotated[
    CropResize | CenterCrop | Affine | Flip | Jitter | Gray | Blur | Solarize | Normalize, Field(discriminator="op")
]


class ViewSpec(config.Options):
    """`count` views of a picture, each size x size, made by the operations in order with draws of their own."""

    count: int = Field(1, ge=1)
    size: int = Field(gt=0)
    """Side of the view, in pixels."""
    ops: list[AnyOperation]

    @field_validator("ops")
    @classmethod
    def _ends_normalized(cls, ops: list[Operation]) -> list[Operation]:
        if not ops or not isinstance(ops[-1], Normalize) or any(isinstance(op, Normalize) for op in ops[:-1]):
            raise ValueError("a view's list of operations ends with its one `op: normalize`")
        return ops

    @property
    def normalize(self) -> Normalize:
        """The last operation."""
        last = self.ops[-1]
        assert isinstance(last, Normalize)
        return last

    def parameters(
        self, seed: int, epoch: int, samples: np.ndarray, view: int, sizes: np.ndarray, exact: bool = False
    ) -> Arrays:
        """All arrays of one view, in the order in which `nodes` takes them.

        `samples` (N,) are ids, `view` is the view's place among all views of a picture, `sizes` (N, 2) the heights and
        widths of the decoded pictures; `exact` keeps linear maps apart.
        """
        u = randomness.uniforms(seed, epoch, samples, view, sum(op.draws for op in self.ops))
        arrays: Arrays = []
        place = 0
        for group in self._groups():
            if isinstance(group[0], _Linear):
                maps: list[Map] = []
                for op in group:
                    assert isinstance(op, _Linear)
                    maps += op.steps(u[:, place : place + op.draws])
                    place += op.draws
                if not exact:
                    maps = [functools.reduce(lambda whole, step: _compose(step, whole), maps)]
                arrays += [part.astype(np.float32) for pair in maps for part in pair]
            else:
                (op,) = group
                arrays += op.parameters(u[:, place : place + op.draws], sizes, self.size)
                sizes = op.output_sizes(sizes, self.size)
                place += op.draws
        wrong = (sizes != self.size).any(axis=1)
        if wrong.any():
            height, width = sizes[wrong][0]
            raise BadInput(
                f"a picture of {height} x {width} pixels comes to a view of size {self.size} that resizes nothing: "
                f"add {{op: crop_resize}} or {{op: center_crop, resize: {self.size}}} to the view's ops"
            )
        return arrays

    def nodes(self, images: Any, arguments: Sequence[Any], exact: bool = False) -> Any:
        """The DALI graph from decoded uint8 images (H, W, 3) to float32 views (3, S, S); `exact` as in `parameters`."""
        left = list(arguments)
        for group in self._groups():
            if isinstance(group[0], _Linear):
                counts = [len(op.steps(np.zeros((1, op.draws)))) for op in group if isinstance(op, _Linear)]
                for _ in range(sum(counts) if exact else 1):
                    images = _linear_nodes(images, left.pop(0), left.pop(0))
            else:
                taken = len(group[0].parameters(np.zeros((1, group[0].draws)), np.ones((1, 2)), self.size))
                images = group[0].nodes(images, left[:taken], self.size)
                left = left[taken:]
        return images

    def _groups(self) -> list[list[Operation]]:
        """The operations, with consecutive linear ones together."""
        groups: list[list[Operation]] = []
        for op in self.ops:
            if groups and isinstance(op, _Linear) and isinstance(groups[-1][0], _Linear):
                groups[-1].append(op)
            else:
                groups.append([op])
        return groups


def _linear_nodes(images: Any, a: Any, b: Any) -> Any:
    """A x + B m, rounded and clipped once, of uint8 images: (3, H, W) on a CPU, (H, W, 3) on a GPU."""
    from nvidia.dali import fn, types

    if images.device == "gpu":
        mean = fn.reductions.mean(images, axes=[0, 1], keep_dims=True)
        # Added, not given as coord_transform's T: that argument must lie on the host, where a GPU's mean is not.
        mapped = fn.coord_transform(images, M=a) + fn.coord_transform(mean, M=b)
        return fn.cast(mapped, dtype=types.UINT8)
    # DALI's coord_transform takes twice as long on a CPU as its filter, which here slides nowhere: it is as high as the
    # picture, whose rows are the three channels and, for B m, one of 255.
    planes = _laid_out(images, "CHW")
    mean = fn.reductions.mean(images, axis_names="HW")
    added = fn.coord_transform(fn.reshape(mean, shape=[1, 3]), M=b) / 255.0
    weights = fn.cat(a, fn.reshape(added, shape=[3, 1]), axis=1)
    rows = fn.pad(fn.reshape(planes, shape=[3, -1], layout="HW"), axes=[0], shape=[4], fill_value=255)
    mapped = fn.cat(*(fn.filter(rows, fn.reshape(weights[c], shape=[4, 1]), mode="valid") for c in range(3)), axis=0)
    return fn.reshape(mapped, planes.shape(), layout="CHW")
