import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from ssl_pipeline.evaluation import knn
from ssl_pipeline.exits import BadInput


def blobs(count: int, seed: int, classes: int = 7, dim: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((classes, dim))
    labels = rng.integers(0, classes, count)
    points = centres[labels] + 1.5 * rng.standard_normal((count, dim)) + 100  # far from 0: cancellation would show
    return torch.from_numpy(points.astype(np.float32)), torch.from_numpy(labels)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_majority_vote_is_scikit_learns(k: int) -> None:
    (train, labels), (test, test_labels) = blobs(600, 0), blobs(300, 1)
    theirs = KNeighborsClassifier(k, algorithm="brute").fit(train.double(), labels).predict(test.double())
    ranking = knn.majority_vote(labels[knn.euclidean_neighbours(test, train, k, chunk=64)], 7)
    assert (ranking[:, 0].numpy() == theirs).all()
    result = knn.evaluate(train, labels, test, test_labels, k)
    assert result[f"knn{k}_top1"] == pytest.approx(100 * (theirs == test_labels.numpy()).mean())
    assert result[f"knn{k}_top1"] < result[f"knn{k}_top5"] <= 100 or k == 1


def test_ties_of_votes_go_to_the_smaller_label_and_of_distance_to_the_lower_place() -> None:
    labels = torch.tensor([[3, 1, 1, 3, 0], [2, 2, 4, 4, 4], [5, 4, 3, 2, 1]])
    assert knn.majority_vote(labels, 6)[:, :3].tolist() == [[1, 3, 0], [4, 2, 0], [1, 2, 3]]
    points = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1], [3, 3], [1, 0]])
    assert knn.euclidean_neighbours(torch.zeros(1, 2), points, 4).tolist() == [[0, 1, 2, 3]]
    assert knn.euclidean_neighbours(torch.tensor([[2.0, 0]]), points, 3).tolist() == [[0, 5, 1]]


def test_cosine_vote_is_the_formula() -> None:
    (train, labels), (test, _) = blobs(200, 2), blobs(20, 3)
    ranking = knn.cosine_vote(test, train, labels, k=30, temperature=0.07, classes=7, chunk=8)
    a, b = test.double().numpy(), train.double().numpy()
    similarity = (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    for row, got in zip(similarity, ranking, strict=True):
        near = np.argsort(-row)[:30]
        votes = np.bincount(labels.numpy()[near], weights=np.exp(row[near] / 0.07), minlength=7)
        assert got[0] == votes.argmax()


def test_accuracy_and_impossible_k() -> None:
    ranking = torch.tensor([[0, 1, 2], [2, 1, 0]])
    assert knn.accuracy(ranking, torch.tensor([1, 2]), 1) == 50
    assert knn.accuracy(ranking, torch.tensor([1, 2]), 2) == 100
    with pytest.raises(BadInput, match="9 neighbours are asked of 4"):
        knn.evaluate(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long), torch.zeros(1, 2), torch.zeros(1).long(), k=9)
