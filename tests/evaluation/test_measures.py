"""Each measure against an independent value: numpy and scipy, closed forms, loops written plainly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_pipeline import distributed, methods, sparse_head
from ssl_pipeline.evaluation import measures
from ssl_pipeline.evaluation.measures import Covariance, eigenvalues
from tests.ranks import on_ranks

SHAPES = [(50, 7), (7, 20)]
"""More rows than dimensions, and fewer."""


def some(count: int, width: int, seed: int = 0, offset: float = 1.0) -> Tensor:
    """Correlated float32 rows off the origin, of unequal deviations."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, width, generator=g) @ torch.randn(width, width, generator=g)
    return mixed + offset * torch.arange(width)


def covariance(z: Tensor, batch: int = 16) -> Covariance:
    found = Covariance(z.shape[1])
    for rows in z.split(batch):
        found.add(rows)
    return found


def singular_values(z: Tensor, centred: bool = True) -> np.ndarray:
    a = z.double().numpy()
    return np.linalg.svd(a - a.mean(axis=0) if centred else a, compute_uv=False)


def roy_and_vetterli(sigma: np.ndarray) -> float:
    p = [s / sum(sigma) for s in sigma]
    return math.exp(-sum(x * math.log(x) for x in p if x > 0))


# ---------------------------------------------------------------------------------------------------------- covariance
@pytest.mark.parametrize("batch", [1, 3, 16, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_covariance_in_a_stream_is_that_of_the_whole(shape: tuple[int, int], batch: int) -> None:
    z = some(*shape)
    found = covariance(z, batch)
    found.add(z[:0])
    assert found.count == len(z)
    a = z.double().numpy()
    np.testing.assert_allclose(found.matrix(), np.cov(a.T, bias=True), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.second_moment(), a.T @ a / len(a), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.mean, a.mean(axis=0), rtol=1e-14)


def test_the_covariance_is_stable_far_from_the_origin() -> None:
    near = torch.randint(-8, 9, (200, 5), generator=torch.Generator().manual_seed(0)).double()
    far = covariance(near + 2.0**26, 7)  # exact numbers; E[z^2] - E[z]^2 in float64 has an error of about 1
    np.testing.assert_allclose(far.matrix(), np.cov(near.numpy().T, bias=True), rtol=1e-6, atol=1e-6)


def of_this_rank() -> list[Tensor]:
    """Over ranks: unequal shares, and none on the first rank."""
    world = distributed.start()
    z = some(50, 7)
    share = {1: [z], 2: [z[:35], z[35:]]}[world.size][world.rank]
    whole, alone = covariance(share).over_ranks(), covariance(z if world.rank == world.size - 1 else z[:0]).over_ranks()
    assert whole.count == alone.count == 50
    return [whole.matrix(), whole.second_moment(), alone.matrix(), alone.second_moment()]


def test_two_ranks_have_the_covariance_of_one() -> None:
    one = of_this_rank()
    ranks = on_ranks(2, of_this_rank)
    for mine, *theirs in zip(one, *ranks, strict=True):
        assert torch.equal(*theirs)
        torch.testing.assert_close(mine, theirs[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one[0], one[2])


def test_eigenvalues_descend_and_are_never_negative() -> None:
    z = some(5, 30)
    found = eigenvalues(covariance(z).matrix())
    assert torch.equal(found, found.sort(descending=True).values)
    assert float(found.min()) == 0 > float(torch.linalg.eigvalsh(covariance(z).matrix()).min())
    np.testing.assert_allclose(found[:5], singular_values(z) ** 2 / 5, rtol=1e-9, atol=1e-11)


# -------------------------------------------------------------------------------------------------------- of a spectrum
@pytest.mark.parametrize("shape", SHAPES)
def test_measures_of_the_spectrum_are_their_published_formulas(shape: tuple[int, int]) -> None:
    z = some(*shape)
    count, width = shape
    found = measures.measure(z, z)
    variances = np.zeros(width)
    sigma = singular_values(z)
    variances[: len(sigma)] = sigma**2 / count
    if count <= width:
        variances[count - 1] = 0  # centring takes one
    assert found["representation_effective_rank"] == pytest.approx(roy_and_vetterli(variances), rel=1e-9)
    assert found["representation_participation_ratio"] == pytest.approx(variances.sum() ** 2 / (variances**2).sum())
    p = singular_values(z, centred=False)
    p = p / p.sum() + 1e-7
    assert found["representation_rankme"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-7)
    if count > width:
        covered = np.linalg.cond(np.cov(z.double().numpy().T))
        assert found["representation_condition_number"] == pytest.approx(covered, rel=1e-9)
    else:
        assert found["representation_condition_number"] == pytest.approx(1 / (width * 2.0**-52))
    assert found["representation_rank"] == np.linalg.matrix_rank(z.double().numpy() - z.double().numpy().mean(axis=0))
    # The same of a stream.
    streamed = covariance(z)
    values, moments = eigenvalues(streamed.matrix()), eigenvalues(streamed.second_moment())
    assert measures.effective_rank(values) == pytest.approx(found["representation_effective_rank"], rel=1e-9)
    assert measures.participation_ratio(values) == pytest.approx(found["representation_participation_ratio"])
    assert measures.rankme(moments, count) == pytest.approx(found["representation_rankme"], rel=1e-6)
    # The one that is logged at each step.
    step = methods.participation_ratio(z.double())
    assert measures.participation_ratio(values) == pytest.approx(float(step))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_k_equal_directions_are_k_dimensions(rank: int) -> None:
    """Z = Q R^T with orthonormal columns off the ones vector: covariance and second moment are k times a projection."""
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(40, rank))
    q = np.linalg.qr(columns - columns.mean(axis=0))[0]
    r = np.linalg.qr(rng.normal(size=(12, rank)))[0]
    z = torch.from_numpy(100 * q @ r.T)
    found = measures.measure(z, z)
    for name in ("effective_rank", "participation_ratio", "rank", "rank_1e-6", "rank_1e-4", "rank_1e-2"):
        assert found[f"embedding_{name}"] == pytest.approx(rank), name
    assert found["embedding_rankme"] == pytest.approx(rank, rel=1e-4)
    assert found["embedding_condition_number"] > 1e12


def test_ranks_count_above_shares_of_the_largest() -> None:
    values = torch.tensor([5.0, 5e-2 * 1.01, 5e-4 * 0.99, 5e-6 * 1.01, 5e-6 * 0.99, 0.0], dtype=torch.float64)
    eps = np.finfo(np.float32).eps
    assert measures.ranks(values) == {"rank": 5, "rank_1e-6": 4, "rank_1e-4": 2, "rank_1e-2": 2}
    edge = torch.tensor([1.0, 3 * eps * 1.01, 3 * eps * 0.99], dtype=torch.float64)
    assert measures.ranks(edge)["rank"] == 2
    a = np.diag(edge.numpy()).astype(np.float32)
    assert np.linalg.matrix_rank(a, hermitian=True) == 2
    assert measures.condition_number(edge) == pytest.approx(1 / (3 * eps * 0.99), rel=1e-6)


# ------------------------------------------------------------------------------------------------------- of the vectors
def two_views(count: int = 23, width: int = 5) -> tuple[Tensor, Tensor]:
    z1 = some(count, width)
    return z1, z1 + 0.3 * some(count, width, seed=1)


def unit(v: np.ndarray) -> np.ndarray:
    return v / math.sqrt(sum(x * x for x in v))


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_measures_of_vectors_are_loops_over_pairs(chunk: int) -> None:
    z1, z2 = two_views()
    a, b = z1.double().numpy(), z2.double().numpy()
    u, v = [unit(x) for x in a], [unit(x) for x in b]
    n = len(a)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    for alpha in (2, 1):
        plain = sum(np.linalg.norm(x - y) ** alpha for x, y in zip(u, v, strict=True)) / n
        assert measures.alignment(z1, z2, alpha) == pytest.approx(plain, rel=1e-12)
    for t in (2, 0.5):
        plain = math.log(sum(math.exp(-t * np.linalg.norm(u[i] - u[j]) ** 2) for i, j in pairs) / len(pairs))
        assert measures.uniformity(z1, t, chunk) == pytest.approx(plain, rel=1e-12)
    ratios = []
    for i in range(n):
        distances = [np.linalg.norm(a[i] - a[j]) for j in range(n) if j != i]
        ratios.append((max(distances) - min(distances)) / min(distances))
    assert measures.minmax_distance_ratio(z1, chunk) == pytest.approx(np.mean(ratios), rel=1e-10)
    negatives = [float(u[i] @ v[j]) for i, j in pairs]
    found = measures.cosines(z1, z2)
    assert found["positive_cosine"] == pytest.approx(np.mean([x @ y for x, y in zip(u, v, strict=True)]), rel=1e-12)
    assert found["negative_cosine"] == pytest.approx(np.mean(negatives), rel=1e-12)
    assert found["negative_cosine_std"] == pytest.approx(np.std(negatives), rel=1e-10)


def test_chunks_bound_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    z = some(300, 4)
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest.append(result.numel())
            return result

    with Sizes():
        measures.uniformity(z, chunk=10)
        measures.minmax_distance_ratio(z, chunk=10)
        measures.cosines(z, z)
    assert max(largest) <= 300 * 10


def test_uniform_on_the_sphere_and_isotropic_have_their_closed_forms() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2500, 3, generator=g)
    # On S^2 the cosine of two points is uniform on [-1, 1]: E exp(-t (2 - 2c)) = (1 - exp(-4t)) / (4t).
    assert measures.uniformity(z) == pytest.approx(math.log((1 - math.exp(-8)) / 8), abs=0.02)
    found = measures.measure(z, 7 * torch.randn(2500, 16, generator=g) @ torch.eye(16, 20))
    assert found["representation_std"] == pytest.approx(1, abs=0.02)
    assert found["embedding_effective_rank"] == pytest.approx(16, abs=0.1)
    assert found["embedding_participation_ratio"] == pytest.approx(16, abs=0.2)
    assert found["embedding_rank_1e-2"] == 16
    # Squared distances of N(0, I_d) have mean 2d and variance 8d: for large d a sample's ratio is near its range of these.
    course = measures.minmax_course([2, 16, 128, 1024, 8192], samples=64)
    assert list(course.values()) == sorted(course.values(), reverse=True)
    assert course[2] > 5 > 0.1 > course[8192]
    assert course[1024] / course[8192] == pytest.approx(math.sqrt(8), rel=0.15)  # 1 / sqrt(d)
    assert measures.minmax_course([16], 64, seed=1) != measures.minmax_course([16], 64) == {16: course[16]}


def test_lidar_is_the_generalised_eigenproblem() -> None:
    g = torch.Generator().manual_seed(0)
    views = some(30, 6)[:, None] + torch.randn(30, 5, 6, generator=g)
    a = views.double().numpy()
    means = a.mean(axis=1)
    between, within = np.zeros((6, 6)), 1e-4 * np.eye(6)
    for x in range(30):
        d = means[x] - means.mean(axis=0)
        between += np.outer(d, d) / 30
        for i in range(5):
            d = a[x, i] - means[x]
            within += np.outer(d, d) / (30 * 4)
    p = scipy.linalg.eigh(between, within, eigvals_only=True)
    p = p / p.sum() + 1e-7
    assert measures.lidar(views) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-9)
    few = views[:4]  # fewer pictures than dimensions
    assert 1 <= measures.lidar(few) <= 3.001
    # Dimensions in which views differ more than pictures count for less; RankMe and effective rank see them as they are.
    noisy = views.clone()
    noisy[..., :4] += 1000 * torch.randn(30, 5, 4, generator=g)
    assert measures.lidar(noisy) < measures.lidar(views)
    identical = some(40, 3)[:, None].expand(-1, 2, -1)
    assert measures.lidar(identical) == pytest.approx(
        measures.effective_rank(eigenvalues(covariance(some(40, 3)).matrix())), rel=1e-4
    )  # within = delta I


def test_views_add_what_needs_two() -> None:
    z1, z2 = two_views()
    views = torch.stack([z1, z2], dim=1)
    one, two = measures.measure(z1, z1), measures.measure(views, views)
    assert {name: two[name] for name in one} == one
    assert measures.measure(z1, None) == {name: value for name, value in one.items() if "representation" in name}
    assert {name.removeprefix("embedding_") for name in two.keys() - one.keys() if "embedding" in name} == {
        "alignment", "positive_cosine", "negative_cosine", "negative_cosine_std", "lidar",
    }  # fmt: skip
    assert two["embedding_alignment"] == measures.alignment(z1, z2)
    # ||u - v||^2 = 2 - 2 cos
    assert two["embedding_alignment"] == pytest.approx(2 - 2 * two["embedding_positive_cosine"], rel=1e-12)
    assert two["embedding_lidar"] == measures.lidar(views)


# ------------------------------------------------------------------------------------------------------- odd inputs
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e6 / 3])
@pytest.mark.parametrize("count", [1, 2, 37])
def test_constant_features_and_one_sample_give_what_is_said(value: float, count: int) -> None:
    z = torch.full((count, 6), value) * torch.arange(1, 7)
    found = measures.measure(z, torch.stack([z, z, z], dim=1))
    assert all(math.isfinite(x) for x in found.values())
    for of in ("representation", "embedding"):
        own = {k.removeprefix(f"{of}_"): v for k, v in found.items() if k.startswith(of)}
        zero = ["effective_rank", "participation_ratio", "rank", "rank_1e-6", "rank_1e-4", "rank_1e-2"]
        assert [own[name] for name in zero] == [0] * 6
        assert own["minmax_distance_ratio"] == 0
        assert own["uniformity"] == pytest.approx(0, abs=1e-12)
        assert own["std"] == pytest.approx(0, abs=1e-7)
        assert own["condition_number"] == pytest.approx(1 / (6 * 2.0**-52))
        assert own["rankme"] == pytest.approx(1 if value else 0, rel=1e-4)
    assert found["embedding_lidar"] == found["embedding_alignment"] == 0
    assert found["embedding_negative_cosine_std"] == pytest.approx(0, abs=1e-7)
    streamed = covariance(z, 5)
    assert measures.effective_rank(eigenvalues(streamed.matrix())) == 0
    assert Covariance(3).matrix().eq(0).all()  # of no rows


def test_equal_rows_are_no_anchors() -> None:
    z = torch.tensor([[0.0, 0], [0, 0], [3, 4], [6, 8]]) + 1e3
    # (0,0) twice: left out; of (3,4) all are 5 away; of (6,8) 5 and 10.
    assert measures.minmax_distance_ratio(z) == pytest.approx((0 + 1) / 2, rel=1e-9)
    twice = some(20, 50).repeat(2, 1)  # squared distances of 1e-13 by rounding
    assert measures.minmax_distance_ratio(twice) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_computed_as_float64(dtype: torch.dtype) -> None:
    z1, z2 = (z.to(dtype) for z in two_views())
    low, high = torch.stack([z1, z2], dim=1), torch.stack([z1, z2], dim=1).double()
    assert measures.measure(low, low) == measures.measure(high, high)
    assert torch.equal(covariance(z1).matrix(), covariance(z1.double()).matrix())


# ----------------------------------------------------------------------------------------------------------- of the head
@pytest.mark.parametrize("groups", ["columns", "rows"])
def test_measures_of_the_head_are_of_its_groups(groups: sparse_head.Groups) -> None:
    w = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    w[:, 2] = 0
    w[:, 5] *= 1e-3
    w[1] = 0
    a = w.double().numpy()
    norms = [math.sqrt(sum(x * x for x in group)) for group in (a.T if groups == "columns" else a)]
    found = measures.head_measures(w, groups)
    count = len(norms)
    assert found["group_norm_min"] == 0
    assert found["group_norm_max"] == pytest.approx(max(norms))
    assert found["group_norm_median"] == pytest.approx(sorted(norms)[(count - 1) // 2])
    assert found["groups"] == count
    assert found["groups_zero"] == 1
    assert found["groups_active"] == (6 if groups == "columns" else 5)
    hoyer = (math.sqrt(count) - sum(norms) / math.sqrt(sum(x * x for x in norms))) / (math.sqrt(count) - 1)
    assert found["hoyer"] == pytest.approx(hoyer)


def test_features_read_are_ordered_by_their_share() -> None:
    w = torch.tensor([[3.0, 0, 1, 0], [4, 0, 0, 0.02]])
    found = measures.features_read(w)
    assert found.order.tolist() == [0, 2, 3, 1]
    assert found.share.tolist() == pytest.approx([5 / 6.02, 1 / 6.02, 0.02 / 6.02, 0])
    assert found.active.tolist() == [0, 2]
    nothing = measures.features_read(torch.zeros(2, 3))
    assert (nothing.share.tolist(), nothing.active.tolist()) == ([0, 0, 0], [])
    assert measures.head_measures(torch.zeros(2, 3))["hoyer"] == 1
