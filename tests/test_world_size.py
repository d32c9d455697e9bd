"""Whole runs of several ranks: stopped by a signal, and gone on with by another number of ranks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_pipeline import pretrain
from ssl_pipeline.exits import Status
from ssl_pipeline.methods import Method
from ssl_pipeline.preemption import SIGNALS
from ssl_pipeline.pretrain import PretrainConfig
from ssl_pipeline.run_folder import saved_steps
from tests.ranks import on_ranks
from tests.test_pretrain import SEED, assert_same_run, options, series, stopped, weights

pytestmark = pytest.mark.slow

NORMS = ("batchnorm2d", "groupnorm1")
ENDS = {4: 3, 2: 7, 1: 12}
"""Step at which so many ranks end; an epoch is 10."""

DRAW = random.Random(SEED)
STOPS = {
    method: (DRAW.choice([*range(2, 10), *range(11, 16)]), DRAW.choice(SIGNALS), DRAW.randrange(2))
    for method in ("byol", "swav")
}
"""With targets and a queue: after which step, in mid-epoch, by which signal to which rank a run of two is stopped."""
TOLD = f"stopped by {STOPS}: SSL_PIPELINE_TEST_SEED={SEED}"


# ----------------------------------------------------------------------------------------------------- run on the ranks
def in_order(*calls: tuple[Any, ...]) -> list[int]:
    return [int(function(*arguments)) for function, *arguments in calls]


def in_float64(chosen: PretrainConfig, run: Path) -> Status:
    """A run in which no other order of summation is amplified into another run (docs/design.md, "Rounding")."""
    build = pretrain.build_method

    def built(chosen: PretrainConfig) -> Method:
        method = build(chosen).double()
        method.register_forward_pre_hook(lambda _, inputs: ([view.double() for view in inputs[0]], *inputs[1:]))
        return method

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "build_method", built)
        return pretrain.pretrain(chosen, run)


# ----------------------------------------------------------------------------------------------------------- on the host
def changing(data: Path, folder: Path, norm: str, ranks: int) -> tuple[PretrainConfig, Path]:
    """Until its end in ENDS. Without batch norm each rank that is lost is made up for by a micro-batch."""
    shared = [f"backbone.arguments.norm_layer={norm}", "optim.learning_rate=0.3", f"max_steps={ENDS[ranks]}"]
    return options(data, *shared, *([f"optim.accumulate={4 // ranks}"] if norm == NORMS[1] else [])), folder / norm


@pytest.fixture(scope="module")
def folder(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of several ranks in as few processes as may be: to start them takes longer than to run."""
    folder = tmp_path_factory.mktemp("ranks")
    print(TOLD)
    whole, parts, again = [], [], []
    for method, (step, number, rank) in STOPS.items():
        common = ["max_steps=16", "monitor.every_steps=5", "optim.name=adam", "optim.learning_rate=1e-3"]
        chosen = options(few_digits, *common, method=method)
        whole.append((pretrain.pretrain, chosen, folder / method / "whole"))
        parts.append((stopped, chosen, folder / method / "parts", step, number, rank))
        again.append((pretrain.pretrain, chosen, folder / method / "parts"))

    def change(ranks: int) -> list[tuple[Any, ...]]:
        return [(in_float64, *changing(few_digits, folder, norm, ranks)) for norm in NORMS]

    assert on_ranks(2, in_order, *whole, *parts) == [[0, 0, Status.STOPPED, Status.STOPPED]] * 2, TOLD
    for method, (step, *_) in STOPS.items():
        assert saved_steps(folder / method / "parts" / "checkpoints")[-1] == step, TOLD
    assert on_ranks(4, in_order, *change(4)) == [[0, 0]] * 4
    assert on_ranks(2, in_order, *change(2), *again) == [[0, 0, 0, 0]] * 2, TOLD
    assert in_order(*change(1)) == [0, 0]
    return folder


@pytest.mark.parametrize("method", STOPS)
def test_two_ranks_of_which_one_is_stopped_at_any_step_go_on_as_if_not(folder: Path, method: str) -> None:
    assert [row["step"] for row in series(folder / method / "parts")] == [5, 10, 15, 16], TOLD
    assert_same_run(folder / method / "whole", folder / method / "parts", TOLD)


@pytest.mark.parametrize("norm", NORMS)
def test_four_ranks_then_two_then_one_are_one(folder: Path, few_digits: Path, tmp_path: Path, norm: str) -> None:
    whole, _ = changing(few_digits, folder, norm, 1)
    undivided = whole.model_copy(update={"optim": whole.optim.model_copy(update={"accumulate": 1})})
    assert in_float64(undivided, tmp_path) == Status.DONE
    one, changed = series(tmp_path), series(folder / norm)
    assert [row["step"] for row in changed] == list(range(1, 13))
    for first, second in zip(one, changed, strict=True):
        assert first.keys() == second.keys()
        # Of the rows of a rank. All else is equal but for fp32, in which the probe is trained and numbers are added up.
        own = {"embedding_std", "embedding_rank", "sparse_share"} if first["step"] <= ENDS[2] else set()
        for key in first.keys() - own:
            assert second[key] == pytest.approx(first[key], rel=1e-6), (key, first["step"])
    after, expected = weights(folder / norm), weights(tmp_path)
    assert after.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(after[name], value, rtol=1e-8, atol=1e-8, msg=name)
    start = pretrain.build_method(undivided).head.layers[0].weight
    assert (expected["head.layers.0.weight"] - start).norm() > 0.1 * start.norm()  # no agreement of standstills
