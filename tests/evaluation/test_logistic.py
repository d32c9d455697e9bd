import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.datasets import load_digits, make_blobs
from sklearn.linear_model import LogisticRegression

from ssl_pipeline import config, distributed
from ssl_pipeline.evaluation import logistic
from ssl_pipeline.evaluation.features import Features
from ssl_pipeline.exits import BadInput
from tests.ranks import on_ranks


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Products of small matrices are faster so."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def features(values: Any, labels: Any, classes: int = 10) -> Features:
    labels = torch.as_tensor(labels).long()
    return Features(torch.as_tensor(values).float(), labels, torch.arange(len(labels)), classes)


def pixels() -> tuple[Features, Features]:
    data = load_digits()
    mixed = np.random.default_rng(0).permutation(len(data.target))  # the last digits are other writers'
    x, y = data.data[mixed] / 16, data.target[mixed]
    return features(x[:900], y[:900]), features(x[900:], y[900:])


def blobs(count: int = 600) -> tuple[Features, Features]:
    """Overlapping clusters, unscaled and not centred."""
    x, y = make_blobs(count, n_features=12, centers=10, cluster_std=6.0, random_state=3)
    return features(x[: count // 2] + 5, y[: count // 2]), features(x[count // 2 :] + 5, y[count // 2 :])


def objective(train: Features, c: float, weight: np.ndarray, bias: np.ndarray) -> float:
    logits = train.values.double().numpy() @ weight.T + bias
    own = logits[np.arange(len(logits)), train.labels.numpy()]
    return float(c * (logsumexp(logits, axis=1) - own).sum() + 0.5 * np.square(weight).sum())


@pytest.mark.parametrize("c", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("data", [pixels, blobs])
def test_it_is_scikit_learns(data: Any, c: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logistic, "ROWS", 256)
    train, test = data()
    theirs = LogisticRegression(C=c, tol=1e-8, max_iter=20000).fit(train.values.double(), train.labels)
    fitted = logistic.fit(train, c, 10)
    assert fitted.converged
    assert fitted.loss == pytest.approx(objective(train, c, theirs.coef_, theirs.intercept_), rel=1e-4)
    assert fitted.loss == pytest.approx(objective(train, c, fitted.weight.numpy(), fitted.bias.numpy()), rel=1e-12)
    found = logistic.evaluate(logistic.Recipe(c=[c]), train, test)
    expected = 100 * theirs.score(test.values.double(), test.labels)
    assert found["linear_top1"] == pytest.approx(expected, abs=0.1)
    top5 = np.argsort(-theirs.decision_function(test.values.double()), axis=1)[:, :5] == test.labels.numpy()[:, None]
    assert found["linear_top5"] == pytest.approx(100 * top5.any(axis=1).mean(), abs=0.5)
    assert (found["c"], found["chosen_on"], found["converged"]) == (c, "given", True)


def test_the_gradient_is_that_of_the_objective() -> None:
    train, _ = blobs(100)
    weight, bias = torch.randn(10, 12, dtype=torch.float64) / 9, torch.randn(10, dtype=torch.float64)
    rows = torch.arange(3, 40)
    loss, *gradients = logistic._cross_entropies(train, rows, weight, bias)
    by = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    logits = train.values[rows].double() @ by[0].T + by[1]
    expected = torch.nn.functional.cross_entropy(logits, train.labels[rows], reduction="sum")
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradients, list(torch.autograd.grad(expected, by)))


def test_c_is_the_one_that_is_best_on_what_is_held_out() -> None:
    train, test = blobs()
    recipe = logistic.Recipe(c=[1.0, 1e-5, 1e-3], held_out=0.2, seed=4)
    found = logistic.evaluate(recipe, train, test)
    held = logistic._held_out(recipe, train).numpy()
    counts = np.bincount(train.labels.numpy())
    assert np.bincount(train.labels.numpy()[held]).tolist() == [round(0.2 * count) for count in counts]
    x, y = train.values.double().numpy(), train.labels.numpy()
    scores = {}
    for c in sorted(recipe.c):
        theirs = LogisticRegression(C=c, tol=1e-8, max_iter=20000).fit(x[~held], y[~held])
        scores[f"{c:g}"] = 100 * theirs.score(x[held], y[held])
    assert found["held_out_top1"] == pytest.approx(scores)
    assert len(set(scores.values())) == 3
    assert f"{found['c']:g}" == max(scores, key=scores.__getitem__)
    assert found["chosen_on"] == "held-out part of train"
    alone = logistic.evaluate(logistic.Recipe(c=[found["c"]]), train, test)  # all of train is fitted in the end
    assert found["linear_top1"] == alone["linear_top1"]


def test_the_choice_does_not_see_the_test_labels() -> None:
    train, test = blobs(300)
    recipe = logistic.Recipe(c=[1e-5, 1e-3, 0.1])
    found = logistic.evaluate(recipe, train, test)
    mixed = features(test.values, test.labels[torch.randperm(len(test.labels))])
    other = logistic.evaluate(recipe, train, mixed)
    assert other["linear_top1"] < found["linear_top1"] - 20
    assert (other["c"], other["held_out_top1"]) == (found["c"], found["held_out_top1"])


def test_another_seed_holds_out_other_pictures() -> None:
    train, _ = blobs()
    first, again, other = (logistic._held_out(logistic.Recipe(seed=seed), train) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_class_with_a_single_picture_cannot_be_held_out() -> None:
    train, test = features(torch.rand(5, 3), [0, 0, 1, 2, 2], 3), features(torch.rand(3, 3), [0, 1, 2], 3)
    with pytest.raises(BadInput, match=r"class 1 has a single picture in train.*give one C, as recipe.c=\[0.1\]"):
        logistic.evaluate(logistic.Recipe(c=[0.1, 1]), train, test)
    assert "linear_top1" in logistic.evaluate(logistic.Recipe(c=[1]), train, test)
    two = features(torch.rand(4, 3), [0, 0, 1, 1], 3)
    assert int(logistic._held_out(logistic.Recipe(held_out=0.9), two).sum()) == 2  # one of each stays


def test_a_best_c_at_the_end_of_the_grid_and_too_few_iterations_are_told(caplog: pytest.LogCaptureFixture) -> None:
    train, test = blobs(300)
    with caplog.at_level(logging.WARNING, "ssl_pipeline"):
        logistic.evaluate(logistic.Recipe(c=[1e-7, 1e-6]), train, test)
    assert "is at an end of the grid 1e-07, 1e-06: widen it there" in caplog.text
    assert "did not come to its tolerance" not in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "ssl_pipeline"):
        found = logistic.evaluate(logistic.Recipe(c=[10], max_iterations=3), train, test)
    assert "L-BFGS with C = 10 did not come to its tolerance 1e-06 in 3 iterations" in caplog.text
    assert "grid" not in caplog.text
    assert not found["converged"]


def test_a_start_near_the_minimum_saves_iterations() -> None:
    train, _ = blobs()
    near = logistic.fit(train, 1.0, 10)
    assert not logistic.fit(train, 1.1, 10, max_iterations=12).converged
    assert logistic.fit(train, 1.0, 10, near, max_iterations=12).converged


def test_input_that_does_not_do() -> None:
    for spoiled in (0, 1):
        data = blobs(100)
        data[spoiled].values[7, 2] = torch.nan
        with pytest.raises(BadInput, match="some features are not finite numbers"):
            logistic.evaluate(logistic.Recipe(c=[1]), *data)
    for wrong in ({"c": []}, {"c": [0]}, {"held_out": 1}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            config.validate(logistic.Recipe, wrong)


def test_features_are_copied_to_the_device_once_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logistic, "ROWS", 7)
    train, _ = blobs(100)
    rows = torch.tensor([1, 4, 6, *range(9, 41)])
    host, meta = torch.device("cpu"), torch.device("meta")
    # On the host all rows are worked on where they lie.
    kept, chosen = logistic._resident(train, None, host)
    for (values, labels), first in zip(logistic._chunks(kept, chosen), range(0, 50, 7), strict=True):
        assert values.data_ptr() == train.values[first:].data_ptr()
        assert torch.equal(labels, train.labels[first : first + 7])
    some = [torch.cat(part) for part in zip(*logistic._chunks(train, rows), strict=True)]
    assert torch.equal(some[0], train.values[rows])
    assert torch.equal(some[1], train.labels[rows])

    copied, chosen = logistic._resident(train, rows, meta)
    assert chosen is None
    assert (copied.values.device, copied.values.shape, copied.values.dtype) == (meta, (35, 12), torch.float32)
    assert (copied.labels.device, copied.labels.shape) == (meta, (35,))

    # Another device's memory, played by the host's.
    class Elsewhere:
        type = "elsewhere"

    empty, room = torch.empty, [True]

    def allocate(*shape: int, dtype: torch.dtype, device: Any) -> torch.Tensor:
        if not room[0]:
            raise torch.OutOfMemoryError("no room")
        return empty(*shape, dtype=dtype)

    monkeypatch.setattr(torch, "empty", allocate)
    elsewhere: Any = Elsewhere()
    copied, _ = logistic._resident(train, rows, elsewhere)
    assert torch.equal(copied.values, train.values[rows])
    assert torch.equal(copied.labels, train.labels[rows])
    assert torch.equal(copied.ids, train.ids[rows])
    room[0] = False
    kept, chosen = logistic._resident(train, rows, elsewhere)
    assert kept is train
    assert chosen is rows


# --------------------------------------------------------------------------------------------------------------- ranks
def _of_ranks() -> list[Any]:
    rank, world = distributed.rank(), distributed.world_size()
    train, test = blobs()
    share = train.select(torch.arange(len(train.labels))[rank::world])
    fitted = logistic.fit(share, 0.1, 10)
    recipe = logistic.Recipe(c=[1e-5, 1e-3, 0.1])
    found = logistic.evaluate(recipe, share, test.select(torch.arange(len(test.labels))[rank::world]))
    held = share.ids[logistic._held_out(recipe, share)]
    return [found, fitted.loss, fitted.weight, fitted.bias, held]


def test_ranks_fit_what_one_rank_fits() -> None:
    (alone, loss, weight, bias, held), (_, test) = _of_ranks(), blobs()
    ranks = on_ranks(2, _of_ranks)
    for found, *fitted, _ in ranks:
        assert found == alone
        assert fitted[0] == pytest.approx(loss, rel=1e-6)
        assert fitted[0] == ranks[0][1]
        ours, theirs = ((test.values.double() @ w.T + b).argmax(dim=1) for w, b in (fitted[1:], (weight, bias)))
        assert torch.equal(ours, theirs)
        assert all(torch.equal(a, b) for a, b in zip(fitted[1:], ranks[0][2:4], strict=True))
    assert torch.equal(torch.cat([rank[4] for rank in ranks]).sort().values, held)


def _failing() -> list[str]:
    """What each rank raises where one fails in its share of the third evaluation, or the main one in L-BFGS."""
    train, _ = blobs(200)
    share = train.select(torch.arange(len(train.labels))[distributed.rank() :: 2])
    own, minimize = logistic._own_cross_entropies, logistic.scipy.optimize.minimize
    told = []
    for failing in (0, 1, "L-BFGS"):
        evaluated: list[int] = []

        def spoiled(*args: Any, failing: Any = failing, evaluated: list[int] = evaluated) -> torch.Tensor:
            evaluated.append(1)
            if distributed.rank() == failing and len(evaluated) == 3:
                raise torch.OutOfMemoryError(f"rank {failing} has no room")
            return own(*args)

        def fails(*args: Any, **more: Any) -> None:
            minimize(*args, **more)
            raise MemoryError("L-BFGS has no room")

        logistic._own_cross_entropies = spoiled
        logistic.scipy.optimize.minimize = fails if failing == "L-BFGS" else minimize
        try:
            logistic.fit(share, 0.1, 10)
            told.append("nothing")
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def test_where_one_rank_fails_all_stop() -> None:
    first, second = on_ranks(2, _failing)
    assert first[0] == "OutOfMemoryError: rank 0 has no room"
    assert second[0] == "Stop: "
    assert first[1].startswith("Stop: rank 1 on ")
    assert first[1].endswith("rank 1 has no room")
    assert second[1] == "OutOfMemoryError: rank 1 has no room"
    assert (first[2], second[2]) == ("MemoryError: L-BFGS has no room", "Stop: ")
