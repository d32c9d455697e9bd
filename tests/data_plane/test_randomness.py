import numpy as np

from ssl_pipeline.data import randomness


def test_a_draw_is_a_function_of_its_key_alone() -> None:
    samples = np.array([5, 900_000, 7])
    whole = randomness.uniforms(3, 11, samples, view=1, count=9)
    assert np.array_equal(whole[1], randomness.uniforms(3, 11, samples[1:2], 1, 9)[0])
    assert np.array_equal(whole[::-1], randomness.uniforms(3, 11, samples[::-1], 1, 9))
    for other in (
        randomness.uniforms(4, 11, samples, 1, 9),
        randomness.uniforms(3, 12, samples, 1, 9),
        randomness.uniforms(3, 11, samples, 2, 9),
        randomness.uniforms(3, 11, samples + 1, 1, 9),
    ):
        assert not np.isclose(whole, other).any()


def test_draws_are_uniform_and_independent_between_views_samples_and_epochs() -> None:
    ids = np.arange(5000)
    a = randomness.uniforms(0, 0, ids, 0, 4)
    assert abs(a.mean() - 0.5) < 0.01
    assert abs(a.var() - 1 / 12) < 0.003
    for b in (randomness.uniforms(0, 0, ids, 1, 4), randomness.uniforms(0, 1, ids, 0, 4), np.roll(a, 1, axis=0)):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.03


def test_orders_are_permutations_of_their_own() -> None:
    orders = [randomness.permutation(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)]
    assert all(np.array_equal(np.sort(order), np.arange(1000)) for order in orders)
    assert len({order.tobytes() for order in orders}) == 4
    assert np.array_equal(orders[0], randomness.permutation(0, 0, 1000))


def test_windows_of_shards_hold_their_samples_alone() -> None:
    shards = np.repeat(np.arange(10), [5, 90, 40, 1, 0, 33, 60, 7, 80, 20])
    orders = [randomness.windowed_permutation(seed, epoch, shards, 4) for seed in (0, 1) for epoch in (0, 1)]
    assert len({order.tobytes() for order in orders}) == 4
    assert np.array_equal(orders[0], randomness.windowed_permutation(0, 0, shards, 4))
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(len(shards)))
        of = shards[order]
        spans = [(np.flatnonzero(of == shard)[[0, -1]]) for shard in np.unique(shards)]
        crossing = [sum(first <= place <= last for first, last in spans) for place in range(len(of))]
        assert max(crossing) <= 4
    # One window is a permutation of all: where a sample comes is uniform, whatever its shard.
    places = np.mean([randomness.windowed_permutation(s, 0, shards, 10).argsort() for s in range(400)], axis=0)
    assert abs(places / (len(shards) - 1) - 0.5).max() < 5 * (1 / 12 / 400) ** 0.5
