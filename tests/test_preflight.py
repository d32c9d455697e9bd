from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ssl_pipeline import distributed, preflight
from ssl_pipeline.exits import BadInput, Stop
from ssl_pipeline.run_folder import RunFolder
from tests.ranks import on_ranks


def report(host: str, self_test: str = "", **same: str) -> dict:
    return {"host": host, "self_test": self_test, "device": "", "same": {"torch": "2.14.1", **same}}


def test_nodes_that_agree_have_no_findings() -> None:
    assert preflight.findings([report(host) for host in ("n1", "n1", "n2", "n2")]) == ({}, [])


def test_single_nodes_at_fault_are_named() -> None:
    reports = [
        report("n1"),
        report("n2", "its device fails: no"),
        report("n3", torch="2.0"),
        report("n4"),
        report("n5"),
    ]
    bad, undecided = preflight.findings(reports)
    assert undecided == []
    assert bad == {"n2": "its device fails: no", "n3": "torch is 2.0, elsewhere 2.14.1"}


def test_links_of_under_half_the_median_are_slow() -> None:
    links = {"n1": 1e9, "n2": 1e9, "n3": 1e9, "n4": 0.9e9, "n5": 0.49e9}
    assert preflight.slow_nodes(links) == {"n5": "its link carries 0.49 GB/s, the median node's 1.00"}
    assert preflight.slow_nodes({"n1": 1e9, "n2": 1e8}) == {}  # of two nodes nobody knows which one is slow


def test_ranks_that_share_a_gpu_are_named() -> None:
    reports = [
        report("n1") | {"device": "GPU-1"},
        report("n1") | {"device": "GPU-1"},
        report("n2") | {"device": "GPU-1"},
    ]
    assert preflight.findings(reports) == ({}, ["2 ranks on n1 share device GPU-1"])


def test_without_a_majority_nobody_is_blamed() -> None:
    bad, undecided = preflight.findings([report("n1", config="a"), report("n2", config="b")])
    assert bad == {}
    assert undecided == ["the nodes differ in config: a on n1, b on n2"]


def test_where_all_of_several_nodes_are_bad_none_is_left_out() -> None:
    assert preflight.findings([report("n1", "fails"), report("n2", "fails")]) == (
        {},
        ["node n1: fails", "node n2: fails"],
    )
    assert preflight.findings([report("n1", "fails")]) == ({"n1": "fails"}, [])  # a one-node job may find another node


@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 8, 33])
def test_each_node_meets_both_neighbours_in_rounds_of_disjoint_pairs(nodes: int) -> None:
    rounds = preflight.pairs(nodes)
    for found in rounds:
        ends = [end for pair in found for end in pair]
        assert len(set(ends)) == len(ends)
    met = sorted(end for found in rounds for pair in found for end in pair)
    assert met == sorted(list(range(nodes)) * (2 if nodes > 2 else 1))
    assert len(rounds) <= 3


def test_one_node_has_no_links() -> None:
    assert preflight.pairs(1) == []


def test_the_self_test_finds_a_device_that_multiplies_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    assert preflight.self_test(device) == ""
    right = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: right(a, b) + torch.eye(256))
    assert preflight.self_test(device) == "its device multiplies matrices wrongly"

    def fails(a: torch.Tensor, b: torch.Tensor) -> None:
        raise RuntimeError("uncorrectable ECC error")

    monkeypatch.setattr(torch.Tensor, "__matmul__", fails)
    assert preflight.self_test(device) == "its device fails: uncorrectable ECC error"


def _preflight(folder: str, fault: str) -> str:
    world = distributed.start()
    if fault:
        os.environ["SLURMD_NODENAME"] = f"n{world.rank}"  # two nodes are pretended
    missing = BadInput("no folder 'data'") if fault in ("none has it", f"n{world.rank} misses it") else None
    same = {
        "config": str(world.rank) if fault == "they differ" else "",
        "data listing": "missing" if missing else "abc",
    }
    try:
        preflight.preflight(world, RunFolder(Path(folder)), same, missing)
    except Stop as stop:
        return f"{int(stop.status)} {stop}"
    return "passed"


def test_preflight_over_two_ranks(tmp_path: Path) -> None:
    assert on_ranks(2, _preflight, str(tmp_path), "") == ["passed", "passed"]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("they differ", "78 preflight failed: the nodes differ in config: 0 on n0, 1 on n1: start one process a GPU"),
        ("n1 misses it", "78 preflight failed: node n1: no folder 'data': leave out by --exclude=n1"),
        ("none has it", "2 no folder 'data'"),
    ],
)
def test_what_preflight_finds_one_rank_says(tmp_path: Path, fault: str, said: str) -> None:
    first, second = on_ranks(2, _preflight, str(tmp_path), fault)
    assert first.startswith(said)
    assert second.strip() == first.split()[0]
