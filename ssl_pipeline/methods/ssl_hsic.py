"""SSL-HSIC (Li et al. 2021, arXiv 2106.08320). Reference code: deepmind/ssl_hsic kernels.py, experiment.py."""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from scipy.special import kve  # type: ignore[import-untyped]
from torch import Tensor, nn

from ssl_pipeline import distributed
from ssl_pipeline.head import ProjectionHead
from ssl_pipeline.methods import Objective, Progress, full_precision, to_device
from ssl_pipeline.methods._momentum import MomentumMethod, MomentumOptions, follow


class Options(MomentumOptions):
    name: Literal["ssl_hsic"]
    momentum: float = Field(0.99, ge=0, le=1)
    """tau_base, the target's momentum at the start; it rises to 1 along a cosine."""
    regularization: float = Field(3.0, ge=0)
    """gamma, the weight of sqrt HSIC(Z, Z): the authors' regul_weight."""
    random_features: int = Field(512, gt=0)
    """Fourier features by which the kernel is approximated, drawn anew in every step."""
    scale_learning_rate: float = Field(3e-4, ge=0)
    """Adam's rate for the kernel's scale; 0 leaves it at 1."""
    scale_samples: int = Field(1024, gt=0)
    """Embeddings drawn, on either side, for the pairs by which the kernel's scale is trained."""
    ema_decay: float = Field(0.999, gt=0, lt=1)
    """Decay of the moving average of the online backbone, which is what backbone.pth holds."""


# ------------------------------------------------------------------------------------------------------ random features
class Frequencies(NamedTuple):
    """A draw of random Fourier features."""

    weight: Tensor
    """(F, K)."""
    offset: Tensor
    """(F,), in radians."""


@cache
def amplitude_law(dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """Amplitudes a of the frequencies of the inverse multiquadric kernel in `dimension`, and their probabilities.

    p(a) ~ a^v K_v(a) with v = (dimension - 1) / 2 and K the modified Bessel function of the second kind, on the grid
    of kernels.py:imq_amplitude_frequency_and_probs. K_v overflows at small a, so its logarithm is built up from the
    orders below 2 by the ratios K_(v+1) / K_v = 2 v / a + K_(v-1) / K_v.
    """
    amplitudes = np.linspace(1e-12, 100, 10_000)
    order = (dimension - 1) / 2
    lowest = order % 1
    logarithm = np.log(kve(lowest, amplitudes)) - amplitudes
    ratio = kve(lowest + 1, amplitudes) / kve(lowest, amplitudes)
    for step in range(round(order - lowest)):
        logarithm += np.log(ratio)
        ratio = 2 * (lowest + step + 1) / amplitudes + 1 / ratio
    logarithm += order * np.log(amplitudes)
    density = np.exp(logarithm - logarithm.max())
    return amplitudes, density / density.sum()


def draw_frequencies(count: int, dimension: int, generator: torch.Generator) -> Frequencies:
    """`count` frequencies of the inverse multiquadric kernel 1 / sqrt(1 + d^2) in `dimension`, on the host, fp32."""
    amplitudes, probabilities = amplitude_law(dimension)
    cumulative = torch.from_numpy(probabilities.cumsum()).clamp(max=1)
    place = torch.searchsorted(cumulative, torch.rand(count, generator=generator, dtype=torch.float64))
    amplitude = torch.from_numpy(amplitudes)[place.clamp(max=len(amplitudes) - 1)].float()
    directions = F.normalize(torch.randn(count, dimension, generator=generator), dim=1)
    return Frequencies(directions * amplitude[:, None], 2 * math.pi * torch.rand(count, generator=generator))


def fourier_features(x: Tensor, frequencies: Frequencies, scale: Tensor) -> Tensor:
    """f(x) (..., F) of x (..., K), with E f(x) f(y)^T = c / sqrt(c^2 + |x - y|^2), c being the scale."""
    weight, offset = (part.to(x.dtype) for part in frequencies)
    return (2 / len(offset)) ** 0.5 * torch.cos((x / scale) @ weight.T + offset)


# ------------------------------------------------------------------------------------------------------------- the loss
# Both estimates are of sums over samples, of which each rank adds up its own: the same number on every rank.
def hsic_xy(features: Tensor) -> Tensor:
    """HSIC(Z, Y) of features (V, N, F) of each rank's N samples in V sets, Y being the sample's identity.

    Source: kernels.py:rff_approximate_hsic_xy. As there, pairs of a set with itself are among the pairs of one sample, so
    that embeddings that are all one have 1 / (V - 1) and not 0: a collapse shows in HSIC(Z, Z), not in this.
    """
    sets, batch = len(features), features.shape[1] * distributed.world_size()
    of_samples = features.sum(dim=0)
    sums = distributed.global_sum(torch.cat([of_samples.sum(dim=0), of_samples.square().sum()[None]]))
    return sums[-1] / (batch * sets * (sets - 1)) - sums[:-1].square().sum() / (batch * sets) ** 2


def root_hsic_xx(first: Tensor, second: Tensor) -> Tensor:
    """sqrt HSIC(Z, Z) from two independent draws of features (V, N, F): ||sum of centred products||_F / (V W N).

    The root of kernels.py:rff_approximate_hsic_xx. A norm, not the root of a square: its gradient is 0, not NaN, where
    all embeddings are one.
    """
    both = torch.stack([first.flatten(0, 1), second.flatten(0, 1)])
    # A constant to autograd: the sum of products of centred rows has no gradient by either mean.
    one, two = both - distributed.mean_over_ranks(both.mean(dim=1, keepdim=True))
    products = distributed.global_sum(one.T @ two)
    return torch.linalg.vector_norm(products) / (len(one) * distributed.world_size())


def ssl_hsic_loss(
    hidden: Tensor, frequencies: tuple[Frequencies, Frequencies], scale: Tensor, regularization: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """gamma sqrt HSIC(Z, Z) - HSIC(Z, Y) (kernels.py:HSICLoss), and both parts, detached.

    Args:
        hidden: (V, N, K), unit vectors: V sets of this rank's embeddings, as `gather_sets` makes them.
        frequencies: two independent draws, equal on all ranks. HSIC(Z, Y) uses the first.
        scale: c of the kernel, (), without gradient.
        regularization: gamma.
    """
    one, two = (fourier_features(hidden, draw, scale) for draw in frequencies)
    xy, root_xx = hsic_xy(one), root_hsic_xx(one, two)
    return regularization * root_xx - xy, {"hsic_xy": xy.detach(), "hsic_xx": root_xx.detach().square()}


def gather_sets(predictions: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Predictions and target projections, (N, K) each, as unit vectors (V, N, K). No gradient flows into targets."""
    return torch.stack([F.normalize(x, dim=1) for x in (*predictions, *(x.detach() for x in targets))])


# ------------------------------------------------------------------------------------------------------ kernel's scale
def log_slope(squared: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """mean log |dk / d(d^2)| of the kernel c / sqrt(c^2 + d^2) at squared distances, and its derivative by c. Both ().

    The steeper the kernel, the better it tells the embeddings apart. Slopes below 1e-7 count as 1e-7, as in
    kernels.py:HSICLoss.
    """
    whole = squared + scale.square()
    slope = torch.log(scale.abs() / 2) - 1.5 * torch.log(whole)
    low = slope < math.log(1e-7)
    derivative = 1 / scale - 3 * scale / whole
    return slope.clamp(min=math.log(1e-7)).mean(), derivative.masked_fill(low, 0).mean()


class Method(MomentumMethod):
    """Two views; BYOL's networks; embeddings that depend on the sample's identity, by a kernel whose scale is trained."""

    kernel_scale: Tensor
    scale_gradient: Tensor
    scale_moments: Tensor
    updates: Tensor

    def __init__(self, options: Options, backbone: nn.Module, head_module: ProjectionHead) -> None:
        super().__init__(options, backbone, head_module)
        self.average = copy.deepcopy(backbone).requires_grad_(False)
        self.register_buffer("kernel_scale", torch.ones(()))
        # Of the mean log slope, left by the step's forward pass for its update.
        self.register_buffer("scale_gradient", torch.zeros(()))
        # Adam's running means of the gradient and of its square.
        self.register_buffer("scale_moments", torch.zeros(2))
        # Steps that were not skipped: Adam's and the average's count.
        self.register_buffer("updates", torch.zeros(()))

    def objective(self, features: list[Tensor], targets: list[Tensor]) -> Objective:
        embeddings, predictions = self.predict(features)
        generator = self.generator()
        with full_precision(features[0]):
            hidden = gather_sets(predictions, targets)
            sets, rows, dimension = hidden.shape
            one, two = (
                Frequencies(*(to_device(x, hidden) for x in draw_frequencies(count, dimension, generator)))
                for count in [self.options.random_features] * 2
            )
            loss, logs = ssl_hsic_loss(hidden, (one, two), self.kernel_scale, self.options.regularization)
            each = max(self.options.scale_samples // sets, 1)
            places = torch.randint(rows * distributed.world_size(), (2, sets, each), generator=generator)
            slope = self._measure_slope(hidden.detach(), to_device(places, hidden))
        logs |= {"kernel_scale": self.kernel_scale.clone(), "kernel_log_slope": slope}
        return Objective(loss, embeddings[0], logs)

    @torch.no_grad()
    def _measure_slope(self, hidden: Tensor, places: Tensor) -> Tensor:
        """The mean log slope over all pairs of two samples of the embeddings; keeps its derivative by the scale.

        hidden: (V, N, K). places: (2, V, M), those drawn on either side among the V sets of the global batch.
        """
        owner, row = places % distributed.world_size(), places // distributed.world_size()  # data/loader.py's order
        drawn = hidden[torch.arange(len(hidden), device=hidden.device)[:, None], row]
        left, right = distributed.global_sum(drawn.masked_fill((owner != distributed.rank())[..., None], 0))
        squared = (2 - 2 * left.flatten(0, 1) @ right.flatten(0, 1).T).clamp(min=0)
        slope, gradient = log_slope(squared, self.kernel_scale)
        # Equal on all ranks but for rounding; the mean keeps the ranks' scales equal to the last bit.
        self.scale_gradient.copy_(distributed.mean_over_ranks(gradient))
        return slope

    @torch.no_grad()
    def after_update(self, progress: Progress, learning_rates: dict[str, float], finite: Tensor) -> None:
        super().after_update(progress, learning_rates, finite)
        count = self.updates + 1
        gradient = -self.scale_gradient
        moments = torch.stack(
            [self.scale_moments[0].lerp(gradient, 0.1), self.scale_moments[1].lerp(gradient**2, 0.001)]
        )
        mean, square = moments / torch.stack([-torch.expm1(count * math.log(beta)) for beta in (0.9, 0.999)])
        scale = self.kernel_scale - self.options.scale_learning_rate * mean / (square.sqrt() + 1e-8)
        self.scale_moments.copy_(torch.where(finite, moments, self.scale_moments))
        self.kernel_scale.copy_(torch.where(finite, scale, self.kernel_scale))
        # The average's weights, which begin with those at the start, sum to 1: haiku's zero_debias.
        decay = math.log(self.options.ema_decay)
        weight = (1 - self.options.ema_decay) / -torch.expm1(decay * (count + 1))
        follow([self.average], [self.backbone], torch.where(finite, weight, 0))
        self.updates.copy_(torch.where(finite, count, self.updates))
        pairs = list(zip(self.average.buffers(), self.backbone.buffers(), strict=True))
        for kind in {average.dtype for average, _ in pairs}:  # of one kind, one kernel copies many
            some = [pair for pair in pairs if pair[0].dtype == kind]
            torch._foreach_copy_([average for average, _ in some], [online for _, online in some])

    def evaluated_backbone(self) -> nn.Module:
        """The average of the online backbone's parameters, with its own batch statistics."""
        return self.average
