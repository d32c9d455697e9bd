"""What docs/scaling.md says is sent, held and predicted: the formulas against real steps, and the page against the formulas."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import scaling
from ssl_pipeline import distributed, pretrain
from ssl_pipeline.methods import Progress
from tests.ranks import on_ranks

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
CASES = [*((case, False) for case in scaling.CASES), ("simclr", True), ("byol", True)]


def differences(cases: list[tuple[str, bool]]) -> list[tuple[str, str]]:
    """Of each of scaling.CASES (with torch's batch norm?) what was counted and is not in the formulas, or the reverse."""
    found = []
    for case, gpu in cases:
        counted, formulas = scaling.count_step(case, gpu)
        assert counted.total() > 2
        found.append((str(dict(counted - formulas)), str(dict(formulas - counted))))
    return found


@pytest.mark.slow
def test_a_step_sends_what_the_formulas_say() -> None:
    for found in on_ranks(2, differences, CASES):
        assert dict(zip(CASES, found, strict=True)) == dict.fromkeys(CASES, ("{}", "{}"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_step_sends_what_the_formulas_say_on_other_numbers_of_ranks(ranks: int) -> None:
    for found in on_ranks(ranks, differences, CASES):
        assert dict(zip(CASES, found, strict=True)) == dict.fromkeys(CASES, ("{}", "{}"))


def test_a_ring_sends() -> None:
    # Rank r of W sends W - 1 blocks of 1/W when it scatters what it reduces, as many again when it gathers.
    for ranks in (1, 2, 8):
        block = 12 / ranks
        assert scaling.Collective("", "reduce_scatter", "", 12).sent(ranks) == pytest.approx(block * (ranks - 1))
        assert scaling.Collective("", "all_reduce", "", 12, 3).sent(ranks) == pytest.approx(6 * block * (ranks - 1))
        assert scaling.Collective("", "all_gather", "", 12).sent(ranks) == 12 * (ranks - 1)


@pytest.mark.parametrize("method", scaling.METHODS)
def test_a_step_keeps_what_is_predicted(method: str) -> None:
    at = replace(scaling.tiny(method, 1), rows=64)
    module = pretrain.build_method(at.options).train()
    module.before_forward(Progress(0, 40, 0, 1))
    views = scaling.noise(at)
    given = [*views, *module.parameters(), *module.buffers()]
    with scaling.autocast(at.options):
        features = module.represent(views)
        targets = module.targets(views)
        kept = scaling.saved_bytes(lambda: module.objective(module.represent(views), targets).loss, given)
    predicted = scaling.memory(at)
    assert len(features) == len(at.views)
    assert predicted.fixed + predicted.views + predicted.objective == pytest.approx(kept, rel=0.01)


def test_the_largest_part_grows_with_rows_and_pixels() -> None:
    architecture = scaling.setting("imagenet/simclr", 1).options.backbone.model_dump_json()
    (fixed, whole), (_, small) = (scaling.activations(architecture, "bf16", size) for size in (224, 96))
    assert small / whole == pytest.approx((96 / 224) ** 2, rel=1e-3)
    assert fixed == pytest.approx(2 * 23.5e6, rel=0.01)  # the weights of a ResNet-50 in bf16


def test_predictions_are_possible() -> None:
    for name, on in itertools.product(scaling.METHODS, (scaling.H100, scaling.LOW, scaling.HIGH)):
        found = [scaling.efficiency(scaling.setting(f"imagenet/{name}", ranks, 64), on) for ranks in (1, 8, 64, 1024)]
        assert found == sorted(found, reverse=True)
        assert 0 < found[-1] < found[0] <= 1.02
    link = replace(scaling.H100, latency=0.0)
    slow, fast = (scaling.seconds(scaling.Collective("", "all_reduce", "", 10**9), 16, on) for on in (
        replace(link, between=link.between / 2), link))  # fmt: skip
    assert math.isclose(slow, 2 * fast)


def test_the_page_has_the_tables_that_the_script_makes() -> None:
    assert scaling.filled(PAGE.read_text()) == PAGE.read_text()
    assert distributed.world_size() == 1
