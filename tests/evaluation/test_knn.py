from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from ssl_pipeline import distributed
from ssl_pipeline.evaluation import knn
from ssl_pipeline.evaluation.features import Features
from ssl_pipeline.exits import BadInput
from tests.ranks import on_ranks


def features(values: Any, labels: Any, classes: int = 7) -> Features:
    labels = torch.as_tensor(labels).long()
    return Features(torch.as_tensor(values).float(), labels, torch.arange(len(labels)), classes)


def blobs(count: int, seed: int, classes: int = 7, dim: int = 16, offset: float = 100) -> Features:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((classes, dim))
    labels = rng.integers(0, classes, count)
    points = centres[labels] + 1.5 * rng.standard_normal((count, dim)) + offset  # far from 0: cancellation would show
    return features(points, labels, classes)


def grid(count: int, seed: int) -> Features:
    """Points of small whole numbers: their distances are exact in float64, and most are tied."""
    rng = np.random.default_rng(seed)
    return features(rng.integers(0, 3, (count, 4)), rng.integers(0, 7, count))


def reference(test: torch.Tensor, train: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distances and ids of the k nearest, row by row from differences."""
    found = []
    for row in test.double().numpy():
        distances = np.square(train.double().numpy() - row).sum(axis=1)
        order = np.lexsort((np.arange(len(train)), distances))[:k]
        found.append((distances[order], order))
    distances, ids = zip(*found, strict=True)
    return torch.from_numpy(np.stack(distances)), torch.from_numpy(np.stack(ids))


@pytest.fixture
def searched_again(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each second search was for."""
    counts: list[int] = []
    search: Callable = knn._search_ties
    monkeypatch.setattr(knn, "_search_ties", lambda test, *rest: (counts.append(len(test)), search(test, *rest))[1])
    return counts


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("offset", [0, 100])
def test_majority_vote_is_scikit_learns(k: int, offset: float) -> None:
    train, test = blobs(600, 0, offset=offset), blobs(300, 1, offset=offset)
    theirs = KNeighborsClassifier(k, algorithm="brute").fit(train.values.double(), train.labels)
    predicted = theirs.predict(test.values.double())
    near = knn.nearest(test.values, train, k, test_rows=64, train_rows=100)
    assert (knn.majority_vote(near.labels, 7)[:, 0].numpy() == predicted).all()
    result = knn.evaluate(train, test, k)
    assert result[f"knn{k}_top1"] == pytest.approx(100 * (predicted == test.labels.numpy()).mean())
    assert result[f"knn{k}_top1"] < result[f"knn{k}_top5"] <= 100 or k == 1


@pytest.mark.parametrize("offset", [0, 1e4, 1e7])
def test_neighbours_are_those_of_the_differences(offset: float, searched_again: list[int]) -> None:
    train, test = blobs(500, 0, offset=offset), blobs(60, 1, offset=offset)
    near = knn.nearest(test.values, train, 9, train_rows=64)
    distances, ids = reference(test.values, train.values, 9)
    assert torch.equal(near.ids, ids)
    torch.testing.assert_close(near.distances, distances, rtol=1e-14, atol=0)
    assert torch.equal(near.labels, train.labels[ids])
    assert not searched_again  # the bounds are close enough


def test_features_of_very_different_lengths() -> None:
    rng = np.random.default_rng(0)
    train = features(rng.standard_normal((400, 8)) * 10.0 ** rng.integers(-12, 12, (400, 1)), rng.integers(0, 7, 400))
    test = train.values[::10] * 1.0001
    near = knn.nearest(test, train, 5, train_rows=37)
    assert torch.equal(near.ids, reference(test, train.values, 5)[1])


def test_ties_beyond_the_spare_candidates_go_to_the_lower_id(searched_again: list[int]) -> None:
    train, test = grid(3000, 0), grid(50, 1)
    near = knn.nearest(test.values, train, 40, test_rows=30, train_rows=256)
    distances, ids = reference(test.values, train.values, 40)
    assert torch.equal(near.distances, distances)
    assert torch.equal(near.ids, ids)
    assert searched_again


@pytest.mark.parametrize("row", [0.0, 0.3])
@pytest.mark.parametrize("cosine", [False, True])
def test_a_collapsed_backbone_gives_the_lowest_ids(row: float, cosine: bool, searched_again: list[int]) -> None:
    train = features(torch.full((500, 6), row), torch.arange(500) % 7)
    for test in (train.values[:3], torch.rand(3, 6) + 1):
        near = knn.nearest(test, train, 4, cosine, train_rows=64)
        assert near.ids.tolist() == [[0, 1, 2, 3]] * 3
        assert near.labels.tolist() == [[0, 1, 2, 3]] * 3
    assert searched_again == [3, 3]


def test_many_copies_of_one_row_among_others(searched_again: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    pairs: list[int] = []
    distances: Callable = knn._distances
    monkeypatch.setattr(
        knn, "_distances", lambda test, of, *rest: (pairs.append(len(of)), distances(test, of, *rest))[1]
    )
    train = blobs(900, 0)
    copies = torch.arange(5, 900, 9)
    train.values[copies] = train.values[5].clone()
    near = knn.nearest(train.values[[5, 6]], train, 3, train_rows=128)
    assert near.ids[0].tolist() == copies[:3].tolist()
    assert near.ids[1, 0] == 6
    assert searched_again == [1]  # the other row was settled by its bounds
    assert pairs == [2 * (3 + knn.SPARE), *[1] * 8]  # one copy in each of 8 chunks; all other rows are ruled out


def test_no_bound_exceeds_its_distance() -> None:
    """Against exact rational numbers."""
    rng = np.random.default_rng(0)
    for offset, scale in ((0, 1), (1e3, 1), (1e6, 1e-2), (-1, 1e-7)):
        points = torch.from_numpy((offset + scale * rng.standard_normal((12, 5))).astype(np.float32)).double()
        test, train = points[:5], points[2:]
        bounds = knn._LowerBounds(test)(train.clone())
        for row, some in zip(test.tolist(), bounds.tolist(), strict=True):
            for other, bound in zip(train.tolist(), some, strict=True):
                exact = sum(((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(row, other, strict=True)), Fraction(0))
                assert Fraction(bound) <= exact
        of, places = torch.arange(5).repeat_interleave(10), torch.arange(10).repeat(5)
        direct = knn._distances(test, of, train.float(), places, torch.Tensor.double).reshape(5, 10)
        assert (bounds <= direct).all()


def test_sums_do_not_depend_on_the_number_of_rows() -> None:
    terms = torch.rand(9, 40001, dtype=torch.float64)
    assert torch.equal(knn._sum(terms), torch.cat([knn._sum(row) for row in terms.split(1)]))
    torch.testing.assert_close(knn._sum(terms), terms.sum(dim=1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("cosine", [False, True])
def test_chunks_do_not_matter(cosine: bool) -> None:
    for train, test in ((blobs(300, 0), blobs(40, 1)), (grid(300, 0), grid(40, 1))):
        whole = knn.nearest(test.values, train, 50, cosine)
        for test_rows, train_rows in ((1, 300), (7, 11), (40, 1), (13, 299)):
            parts = knn.nearest(test.values, train, 50, cosine, test_rows, train_rows)
            assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_ties_of_votes_go_to_the_smaller_label_and_of_distance_to_the_lower_id() -> None:
    labels = torch.tensor([[3, 1, 1, 3, 0], [2, 2, 4, 4, 4], [5, 4, 3, 2, 1]])
    assert knn.majority_vote(labels, 6)[:, :3].tolist() == [[1, 3, 0], [4, 2, 0], [1, 2, 3]]
    train = features([[1.0, 0], [0, 1], [-1, 0], [0, -1], [3, 3], [1, 0]], [0] * 6)
    assert knn.nearest(torch.zeros(1, 2), train, 4).ids.tolist() == [[0, 1, 2, 3]]
    assert knn.nearest(torch.tensor([[2.0, 0]]), train, 3).ids.tolist() == [[0, 5, 1]]


def test_cosine_vote_is_the_formula() -> None:
    train, test = blobs(200, 2, offset=1), blobs(50, 3, offset=1)
    a, b = test.values.double().numpy(), train.values.double().numpy()
    similarity = (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    votes = []
    for row in similarity:
        near = np.argsort(-row)[:30]
        votes.append(np.bincount(train.labels.numpy()[near], weights=np.exp(row[near] / 0.07), minlength=7))
    expected = torch.from_numpy(np.argsort(-np.stack(votes), axis=1, kind="stable"))
    near = knn.nearest(test.values, train, 30, cosine=True, test_rows=8)
    np.testing.assert_allclose(1 - near.distances.numpy() / 2, -np.sort(-similarity)[:, :30], rtol=0, atol=1e-14)
    assert torch.equal(knn.cosine_vote(near.labels, 1 - near.distances / 2, 0.07, 7), expected)
    result = knn.evaluate(train, test, 5, [30, 201], 0.07)
    assert result["cosine30_top1"] == knn.accuracy(expected, test.labels, 1)
    assert result["cosine30_top5"] == knn.accuracy(expected, test.labels, 5)
    assert list(result) == ["knn5_top1", "knn5_top5", "cosine30_top1", "cosine30_top5"]  # 201 neighbours of 200


def test_a_low_temperature_leaves_the_nearest_one() -> None:
    near, similarity = torch.tensor([[4, 2, 2]]), torch.tensor([[1.0, 0.99, 0.99]], dtype=torch.float64)
    assert knn.cosine_vote(near, similarity, 1e-4, 6)[0, :2].tolist() == [4, 2]  # exp(10000) is infinite
    assert knn.cosine_vote(near, similarity, 0.1, 6)[0, :2].tolist() == [2, 4]


def test_the_cosine_of_a_row_of_zeros_is_0() -> None:
    train = features([[0.0, 0], [-1, 0], [0, 0], [1, 1], [0, 2]], [0] * 5)
    near = knn.nearest(torch.tensor([[1.0, 0], [0, 0]]), train, 5, cosine=True)
    assert near.ids.tolist() == [[3, 0, 2, 4, 1], [0, 1, 2, 3, 4]]
    cosines = 1 - near.distances / 2
    torch.testing.assert_close(cosines[0], torch.tensor([0.5**0.5, 0, 0, 0, -1], dtype=torch.float64))
    assert cosines[1].tolist() == [0] * 5


def test_accuracy_and_impossible_k() -> None:
    ranking = torch.tensor([[0, 1, 2], [2, 1, 0]])
    assert knn.accuracy(ranking, torch.tensor([1, 2]), 1) == 50
    assert knn.accuracy(ranking, torch.tensor([1, 2]), 2) == 100
    with pytest.raises(BadInput, match="9 neighbours are asked of 4"):
        knn.evaluate(features(torch.zeros(4, 2), [0] * 4), features(torch.zeros(1, 2), [0]), k=9)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    train, test = blobs(50, 0), blobs(5, 1)
    train.values[30, 3] = value
    with pytest.raises(BadInput, match="some features are not finite numbers"):
        knn.evaluate(train, test)


# --------------------------------------------------------------------------------------------------------------- ranks
def _share(whole: Features, empty: int | None) -> Features:
    """Rows r, r + W, ... of the ranks that have any."""
    having = [rank for rank in range(distributed.world_size()) if rank != empty]
    rank = distributed.rank()
    return whole.select(torch.arange(len(whole.labels))[having.index(rank) :: len(having)] if rank != empty else [])


def _cases() -> list[tuple[Features, Features, int]]:
    return [(blobs(121, 0), blobs(50, 1), 20), (grid(400, 0), grid(31, 1), 7), (blobs(7, 0), blobs(4, 1), 6)]


def _of_ranks(empty: int | None) -> list[Any]:
    found: list[Any] = []
    for train, test, k in _cases():
        here = _share(train, empty)
        for cosine in (False, True):
            found += knn.nearest(test.values, here, k, cosine, test_rows=19, train_rows=16)
        found.append(knn.evaluate(here, _share(test, empty), 5, [3, k], 0.07))
    return found


def _refused() -> list[str]:
    told = []
    train, test = blobs(20, 0), blobs(6, 1)
    train.values[1] = torch.nan  # on one rank only
    for k in (5, 21):
        try:
            knn.evaluate(_share(train, None), _share(test, None), k)
        except Exception as error:
            told.append(str(error))
    return told


def _ranks(empty: int | None) -> tuple[list[Any], list[str]]:
    return _of_ranks(empty), _refused()


@pytest.mark.parametrize(("world", "empty"), [(2, None), (3, 1)])
def test_ranks_find_what_one_rank_finds(world: int, empty: int | None) -> None:
    """Shares of every other row; in the second case one of none, and shares smaller than k."""
    alone = _of_ranks(None)
    for rank, (found, told) in enumerate(on_ranks(world, _ranks, empty)):
        for ours, expected in zip(found, alone, strict=True):
            assert torch.equal(ours, expected) if isinstance(expected, torch.Tensor) else ours == expected
        assert ("not finite" in told[0]) == (rank in (0, 1))  # on the rank that has them, and on the main one
        assert told[1] == "21 neighbours are asked of 20 training pictures: give a smaller k"
