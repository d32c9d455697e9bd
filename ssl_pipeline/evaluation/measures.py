"""Measures of collapse: how many dimensions representations and embeddings fill, how they spread, what the head reads.

Pure functions of tensors, computed in float64 on the device of their input; they read no file and build no network.
Inputs must be finite. Constant features and a single sample give numbers too, never NaN: each function says which.
docs/analysis.md has all of them in one table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline import distributed
from ssl_pipeline.methods import embedding_std
from ssl_pipeline.sparse_head import Groups, active, group_norms, hoyer_sparsity

EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
CHUNK = 1024
"""Rows whose distances to all others are held at a time."""


class Covariance:
    """Mean and covariance of rows that come batch by batch, in float64; holds (D, D) numbers, never the rows.

    Stable where the mean is large against the deviations, since a batch is centred before it is squared: the update of
    Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".

    Args:
        width: D.
        device: where it is added up; batches are brought there.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self._squares = torch.zeros(width, width, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Count the rows of x (B, D), of any precision; B may be 0."""
        if not len(x):
            return
        x = x.to(self.mean.device, torch.float64)
        centred, mean = _centred(x)
        self._merge(len(x), mean, centred.T @ centred)

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        total = self.count + count
        apart = mean - self.mean
        self._squares += squares + torch.outer(apart, apart) * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total

    def over_ranks(self) -> Covariance:
        """That of the rows of all ranks, the same on each. All ranks must call it."""
        counts = distributed.gather_values(torch.tensor(self.count)).tolist()
        whole = Covariance(len(self.mean), self.mean.device)
        means = distributed.gather_values(self.mean)
        for count, mean in zip(counts, means, strict=True):
            if count:
                whole._merge(count, mean, torch.zeros_like(self._squares))
        whole._squares += distributed.all_reduce_sum(self._squares)
        return whole

    def matrix(self) -> Tensor:
        """C = 1/N sum (z - mean)(z - mean)^T, (D, D); zeros for one row or none.

        With 1/N as in Jing et al. 2022 (arXiv 2110.09348), section 3; the measures of its eigenvalues do not know scale.
        """
        return self._squares / max(self.count, 1)

    def second_moment(self) -> Tensor:
        """1/N sum z z^T, (D, D), about zero: its eigenvalues times N are the squared singular values of Z (N, D)."""
        return self.matrix() + torch.outer(self.mean, self.mean)


# ------------------------------------------------------------------------------------------------------- of a spectrum
def eigenvalues(matrix: Tensor) -> Tensor:
    """Eigenvalues (D,) of a symmetric matrix (D, D) without negative ones, descending, in float64.

    Rounding makes some that are zero negative, of about -lambda_max * D * 2e-16; these are set to 0.
    """
    return torch.linalg.eigvalsh(matrix.double()).flip(0).clamp(min=0)


def effective_rank(values: Tensor) -> float:
    """exp(-sum p log p) with p = sigma / sum sigma of the singular values (D,) of a matrix: from 1 to its rank; 0 for none.

    Given the eigenvalues of a covariance, which are its singular values, it is the effective rank of the covariance;
    their square roots would give that of the centred features, which is larger.
    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality", definition 1.
    """
    return _exp_entropy(values.double())


def rankme(values: Tensor, count: int) -> float:
    """exp(-sum p log p), p_k = sigma_k / sum sigma + 1e-7, over the min(N, D) singular values of the uncentred Z (N, D).

    `values` are the eigenvalues (D,) of the second moment about zero, of `count` = N rows: sigma = sqrt(N * value). A
    sigma below some 1e-8 of the largest is lost to the squares in float64, less than the 1e-7 that each p is given.
    1 for constant features, as they are not centred; 0 where all are 0.
    Source: Garrido et al. 2023, "RankMe" (arXiv 2210.02885), equation 1.
    """
    return _exp_entropy(values.double()[:count].sqrt(), eps=1e-7)


def participation_ratio(values: Tensor) -> float:
    """(sum lambda)^2 / sum lambda^2 of a covariance's eigenvalues (D,): from 1 to D, k where k are equal; 0 where all are 0.

    Source: Gao et al. 2017, "A theory of multineuronal dimensionality, dynamics and measurement" (bioRxiv 214262).
    Of a batch in training it is `embedding_rank` (`methods.participation_ratio`).
    """
    values = _shares(values.double())
    squares = float(values.square().sum())
    return 1 / squares if squares else 0.0


def condition_number(values: Tensor) -> float:
    """lambda_max / lambda_min of a covariance's eigenvalues (D,), at most 1 / (D * 2.2e-16), which stands for singular.

    An eigenvalue under lambda_max * D * 2.2e-16 is rounding; a covariance of zeros counts as singular.
    Source: Golub and Van Loan, "Matrix Computations", section 2.6.2, for the 2-norm of a symmetric matrix.
    """
    shares = _shares(values.double())
    smallest = float(shares[-1] / shares[0]) if float(shares[0]) else 0.0
    return 1 / max(smallest, len(values) * EPS64)


def ranks(values: Tensor) -> dict[str, int]:
    """How many of the descending eigenvalues (D,) are above lambda_max times a threshold; 0 each where all are 0.

    `rank` has D * eps of float32, the default of numpy's matrix_rank for the covariance in that precision (Press et al.,
    "Numerical Recipes", section 2.6); `rank_1e-6`, `rank_1e-4` and `rank_1e-2` have that number.
    """
    thresholds = {"rank": len(values) * EPS32, "rank_1e-6": 1e-6, "rank_1e-4": 1e-4, "rank_1e-2": 1e-2}
    return {name: int((values > values[0] * threshold).sum()) for name, threshold in thresholds.items()}


def _shares(values: Tensor) -> Tensor:
    """values / their sum; zeros where all are 0."""
    total = values.sum()
    return values / total if float(total) else torch.zeros_like(values)


def _exp_entropy(values: Tensor, eps: float = 0.0) -> float:
    """exp(-sum p log p) with p = values / their sum + eps; 0 where all are 0."""
    if not float(values.sum()):
        return 0.0
    return float(torch.special.entr(_shares(values) + eps).sum().exp())


# -------------------------------------------------------------------------------------------------------- of the vectors
def alignment(z1: Tensor, z2: Tensor, alpha: float = 2) -> float:
    """mean ||u1 - u2||^alpha over positive pairs (N, D), u = z / ||z||: from 0, all alike, to 2^alpha.

    Source: Wang and Isola 2020 (arXiv 2005.10242), section 4.1.2 and figure 5.
    """
    return float((_unit(z1) - _unit(z2)).norm(dim=1).pow(alpha).mean())


def uniformity(z: Tensor, t: float = 2, chunk: int = CHUNK) -> float:
    """log mean exp(-t ||u - v||^2) over the pairs of different rows of z (N, D), u = z / ||z||: from -4t to 0.

    0 is a collapse to a point, and what a single row gives; the lower, the more uniform on the sphere.
    Source: Wang and Isola 2020 (arXiv 2005.10242), section 4.1.2 and figure 5.
    """
    u = _unit(z)
    if len(u) < 2:
        return 0.0
    total = 0.0
    for squares in _distances(u, chunk):
        total += float((-t * squares).exp().sum())  # 0 for the row itself, at an infinite distance
    return math.log(total / (len(u) * (len(u) - 1)))


def cosines(z1: Tensor, z2: Tensor) -> dict[str, float]:
    """Of two views (N, D) of N pictures: `positive_cosine`, the mean of the pairs (z1_i, z2_i), and `negative_cosine` and
    `negative_cosine_std`, mean and deviation of the N (N - 1) others; these are 0 for a single picture.

    The second moment of N^2 cosines is that of two (D, D) matrices, so nothing of N x N is held.
    """
    u, v = _unit(z1), _unit(z2)
    positive = (u * v).sum(dim=1)
    pairs = max(len(u) * (len(u) - 1), 1)
    mean = float(u.sum(dim=0) @ v.sum(dim=0) - positive.sum()) / pairs
    square = float(((u.T @ u) * (v.T @ v)).sum() - positive.square().sum()) / pairs
    deviation = math.sqrt(max(square - mean**2, 0.0))
    return {"positive_cosine": float(positive.mean()), "negative_cosine": mean, "negative_cosine_std": deviation}


def minmax_distance_ratio(z: Tensor, chunk: int = CHUNK) -> float:
    """M = (d_max - d_min) / d_min (Song et al. 2023, equation 9), the mean over the anchors z of the rows (N, D).

    "the maximum and minimum distances between the embedding vector z and the other samples", Euclidean, of vectors as they
    are and not normalised. The paper prints it for one z; the mean is ours. An anchor on which another row lies has a
    d_min of 0 and is left out; 0 where that leaves no anchor: all rows are one, or there is one row.
    """
    centred, _ = _centred(z.double())  # a common offset would cost digits
    ratios = []
    for squares in _distances(centred, chunk):
        smallest = squares.min(dim=1).values.sqrt()
        largest = squares.nan_to_num(posinf=0).max(dim=1).values.sqrt()
        apart = (smallest > 0) & smallest.isfinite()
        ratios.append(((largest - smallest) / smallest)[apart])
    found = torch.cat(ratios)
    return float(found.mean()) if len(found) else 0.0


def minmax_course(dimensions: Iterable[int], samples: int = 512, seed: int = 0) -> dict[int, float]:
    """`minmax_distance_ratio` of `samples` i.i.d. standard normal vectors by their dimension d; Lemma 5.7: it goes to 0.

    For large d the squared distances are about 2d + sqrt(8d) times a normal variable, so it falls as 1 / sqrt(d).
    """
    found = {}
    for d in dimensions:
        drawn = torch.randn(samples, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found[d] = minmax_distance_ratio(drawn)
    return found


def lidar(views: Tensor, delta: float = 1e-4) -> float:
    """Linear discriminant analysis rank of q > 1 views of each of n pictures, (n, q, D): from 1 to min(n - 1, D).

    exp(-sum p log p) with p = lambda / sum lambda + 1e-7 of the eigenvalues lambda of S_w^-1/2 S_b S_w^-1/2, a picture being a
    class: S_b is the covariance of the pictures' means, S_w the mean covariance of a picture's views, of q - 1 degrees of
    freedom, plus delta I. 0 where all pictures have one mean. The authors take about 1,000 pictures of 50 views; with two
    S_w is noisy and the value lower.
    Source: Thilak et al. 2023 (arXiv 2312.04000), section 4; delta as in rbalestr-lab/stable-pretraining callbacks/lidar.py.
    """
    views = views.double()
    n, q, width = views.shape
    means = views.mean(dim=1)
    within = (views - means[:, None]).flatten(0, 1)
    inside = within.T @ within / (n * (q - 1)) + delta * torch.eye(width, dtype=views.dtype, device=views.device)
    # The same eigenvalues as with the symmetric root: those of S_w^-1 S_b.
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(inside), (means - means.mean(dim=0)).T, upper=False)
    return _exp_entropy(_padded(_squared_singular_values(whitened.T), width), eps=1e-7)


# ------------------------------------------------------------------------------------------------------------ of the head
def head_measures(weight: Tensor, groups: Groups = "columns") -> dict[str, float]:
    """Of a linear layer's weight (out, in) and its groups as SparseHead's option `groups` names them:
    `group_norm_min`, `group_norm_median`, `group_norm_max`, `groups` (how many), `groups_active` and `groups_zero` (how
    many have a norm over 1 % of the largest, and none), `hoyer` (`sparse_head.hoyer_sparsity`).
    """
    norms = group_norms(weight.detach().double(), groups)
    return {
        "group_norm_min": float(norms.min()),
        "group_norm_median": float(norms.median()),
        "group_norm_max": float(norms.max()),
        "groups": float(len(norms)),
        "groups_active": float(active(norms).sum()),
        "groups_zero": float((norms == 0).sum()),
        "hoyer": float(hoyer_sparsity(norms)),
    }


@dataclass(frozen=True)
class FeaturesRead:
    """Which of the backbone's D features the head reads, from what its first layer gives them."""

    order: Tensor
    """(D,) int64: the features, most read first."""
    share: Tensor
    """(D,) float64: ||W_:j|| / sum ||W_:j|| of feature order[0], order[1], ..., descending; zeros for W = 0."""
    active: Tensor
    """int64, ascending: features whose column is over 1 % of the largest (`sparse_head.active`)."""


def features_read(weight: Tensor) -> FeaturesRead:
    """Which features the head's first layer (out, D) reads. Of a linear head `active` are SparseHead's groups.

    Norms of columns compare features only as far as these are of one scale: multiply the columns by the features'
    deviations, `weight * deviations`, for what reaches the head's first layer.
    """
    norms = group_norms(weight.detach().double())
    share, order = _shares(norms).sort(descending=True, stable=True)
    return FeaturesRead(order, share, active(norms).nonzero().flatten())


# ------------------------------------------------------------------------------------------------------------ all of them
def measure(representations: Tensor, embeddings: Tensor | None) -> dict[str, float]:
    """All measures of N pictures' representations (N, D) and embeddings (N, K), keys `representation_*`, `embedding_*`.

    With q > 1 views of each picture, (N, q, D) and (N, q, K): those of the first view, alignment and cosines of the first
    two, and LiDAR of all. All values are finite. Without embeddings there are those of the representations alone.
    """
    both = {"representation": representations, "embedding": embeddings}
    return {
        f"{of}_{name}": value
        for of, z in both.items()
        if z is not None
        for name, value in _measures(z.double()).items()
    }


def _measures(views: Tensor) -> dict[str, float]:
    z = views[:, 0] if views.dim() == 3 else views
    count, width = z.shape
    # Eigenvalues of Covariance's two matrices, by N x N numbers where that is less.
    centred, uncentred = (_padded(_squared_singular_values(x), width) / count for x in (_centred(z)[0], z))
    found = {
        "effective_rank": effective_rank(centred),
        "rankme": rankme(uncentred, count),
        "participation_ratio": participation_ratio(centred),
        "condition_number": condition_number(centred),
        **ranks(centred),
        "uniformity": uniformity(z),
        "minmax_distance_ratio": minmax_distance_ratio(z),
        "std": float(embedding_std(z)) if count > 1 else 0.0,
    }
    if views.dim() == 3 and views.shape[1] > 1:
        found |= {"alignment": alignment(z, views[:, 1]), **cosines(z, views[:, 1]), "lidar": lidar(views)}
    return found


def _centred(z: Tensor) -> tuple[Tensor, Tensor]:
    """z (N, D) less its mean (D,), and that. Of equal rows exactly zeros, and the row."""
    shifted = z - z[0]
    mean = shifted.mean(dim=0)
    return shifted - mean, z[0] + mean


def _unit(z: Tensor) -> Tensor:
    """Rows of length 1 in float64; zeros stay zeros."""
    return F.normalize(z.double(), dim=1)


def _distances(z: Tensor, chunk: int) -> Iterator[Tensor]:
    """Squared distances of some rows of z (N, D) at a time to all, (chunk, N).

    A row is at an infinite distance to itself. What rounding cannot tell from 0 is 0.
    """
    lengths = z.square().sum(dim=1)
    for start in range(0, len(z), chunk):
        rows = z[start : start + chunk]
        sums = lengths[start : start + chunk, None] + lengths
        squares = torch.addmm(sums, rows, z.T, alpha=-2)
        squares[squares <= sums * (z.shape[1] * EPS64)] = 0
        squares.diagonal(start).fill_(math.inf)
        yield squares


def _squared_singular_values(z: Tensor) -> Tensor:
    """Those of z (N, D), descending, (min(N, D),): eigenvalues of z z^T or z^T z, whichever is smaller."""
    return eigenvalues(z @ z.T if len(z) < z.shape[1] else z.T @ z)


def _padded(values: Tensor, width: int) -> Tensor:
    """With zeros for the dimensions that N rows cannot fill."""
    return F.pad(values, (0, width - len(values)))
