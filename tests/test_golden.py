"""That every one of the authors' values is checked, and by which test."""

import inspect
from collections.abc import Callable

import pytest

from tests import golden, test_optim, test_sparse_head
from tests.methods import test_golden as values
from tests.methods import test_ssl_hsic

# Tests with a row an entry: the entries are read from the rows.
BY_ROWS: list[Callable[..., None]] = [
    values.test_loss_and_gradients_are_the_authors_own,
    values.test_swav_with_its_queue_is_the_authors_own,
    values.test_sinkhorn_is_the_authors_own,
    values.test_target_momentum_is_the_authors_own,
    test_ssl_hsic.test_the_law_of_amplitudes_is_the_authors_own,
    test_sparse_head.test_norm_and_gradient_are_the_definition,
    test_optim.test_lars_is_the_authors_own,
    test_optim.test_larc_is_the_authors_own,
    test_optim.test_warmup_cosine_is_barlow_twins,
    test_optim.test_inclusive_warmup_is_swav,
    test_optim.test_the_cosine_of_epochs_and_the_predictors_constant_rate_are_simsiams,
    test_optim.test_warmup_cosine_is_byol,
    test_optim.test_drops_are_the_small_data_protocol,
]
# Tests of a single entry, which their source, or a helper's, names.
BY_NAME: dict[str, list[Callable[..., object]]] = {
    "hsic_label_weights": [test_ssl_hsic.test_the_sample_is_weighed_by_the_authors_own_label_kernel],
    "dist_vicreg_W2_n8_D16": [values.test_vicreg_on_two_ranks_is_the_authors_own_and_the_gradient_of_one_rank],
    "dist_barlow_W2_n8_D16": [
        values.test_barlow_twins_on_two_ranks_has_the_exact_gradient_and_its_divisor_the_official_one
    ],
    "dist_simclr_W2_n8_D16": [values.test_simclr_on_two_ranks_is_the_authors_own],
    "dist_sinkhorn_W2_n8_K11": [values.test_sinkhorn_on_two_ranks_is_the_authors_own],
}


def rows_of(test: Callable[..., None]) -> set[str]:
    """The entries for which pytest runs a test: the first of its parameters."""
    (mark,) = [mark for mark in test.pytestmark if mark.name == "parametrize"]  # type: ignore[attr-defined]
    return {row if isinstance(row, str) else row[0] for row in mark.args[1]}


def test_every_entry_is_checked_by_one_test(capsys: pytest.CaptureFixture[str]) -> None:
    checked: dict[str, str] = {}
    for test in BY_ROWS:
        found = rows_of(test)
        assert found
        assert found.isdisjoint(checked)
        checked |= dict.fromkeys(found, test.__name__)
    for name, tests in BY_NAME.items():
        assert all(f'"{name}"' in inspect.getsource(test) for test in tests)
        assert name not in checked
        checked[name] = tests[0].__name__
    assert checked.keys() == golden.entries().keys()
    with capsys.disabled():
        print(f"{len(checked)} golden entries, each checked by its test")
