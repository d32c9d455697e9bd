"""The paper's tables from run folders that are made up here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ssl_pipeline import config
from ssl_pipeline.evaluation import tables
from ssl_pipeline.exits import BadInput
from ssl_pipeline.run_folder import RunFolder

PAPER = yaml.safe_load((Path(tables.__file__).parent / "paper_results.yaml").read_text())
GPU = "NVIDIA H100 80GB HBM3"
Make = Callable[..., RunFolder]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run folder: its config, results, rows of metrics.jsonl and events of jobs.jsonl."""

    def made(
        folder: str, name: str = "cifar10/simclr_sparsehead", *overrides: str, rows: Any = (), events: Any = (), **results: Any
    ) -> RunFolder:  # fmt: skip
        run = RunFolder(tmp_path / folder)
        run.path.mkdir()
        run.config.write_text(config.dump_yaml(config.load(name, overrides).values))
        for path, lines in ((run.metrics, rows), (run.jobs, events)):
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        for file, values in results.items():
            run.write_result(file, values)
        return run

    return made


def table(runs: list[RunFolder], title: str) -> tables.Table:
    return next(t for t in tables.tables(tables.groups(runs)) if t.title == title)


def ours(runs: list[RunFolder], title: str) -> tables.Row:
    (row,) = (row for row in table(runs, title).rows if row.group is not None)
    return row


def test_mean_and_deviation_over_seeds(make: Make) -> None:
    linear, knn = [92.31, 92.84, 91.97], [90.1, 90.45, 90.2]
    runs = [
        make(f"s{seed}", "cifar10/simclr_sparsehead", f"seed={seed}", f"data.root=/somewhere/{seed}", "data.threads=9",
             linear_probe={"linear_top1": linear[seed], "linear_top5": 99.0}, knn={"knn5_top1": knn[seed]})
        for seed in (2, 0, 1)
    ]  # fmt: skip
    (group,) = tables.groups(runs)
    assert [entry.seed for entry in group.entries] == [0, 1, 2]
    assert (group.method, group.data, group.epochs) == ("simclr_sparsehead", "cifar10", 1000)
    for cell, values, printed in zip(
        ours(runs, "CIFAR-10").cells,
        (linear, knn),
        PAPER["linear_and_knn"]["simclr_sparsehead"]["cifar10"],
        strict=True,
    ):
        assert cell.ours is not None
        assert cell.ours.n == 3
        assert cell.ours.mean == pytest.approx(np.mean(values))
        assert cell.ours.deviation == pytest.approx(np.std(values, ddof=1))
        assert cell.paper == printed
        assert cell.difference == pytest.approx(np.mean(values) - printed)


def test_one_seed_has_no_deviation(make: Make) -> None:
    (cell, _) = ours([make("run", knn={"knn5_top1": 90.0}, linear_probe={"linear_top1": 92.0})], "CIFAR-10").cells
    assert cell.ours == tables.Statistic(92.0, None, 1)


@pytest.mark.parametrize(
    ("overrides", "together"),
    [
        (["seed=1"], True),
        (["seed=1", "data.root=elsewhere", "monitor.every_steps=7", "data.prefetch=9"], True),
        (["seed=1", "epochs=200"], False),
        (["seed=1", "head.sparse.weight=1e-3"], False),
        (["seed=1", "data.name=cifar100"], False),  # changeable, and yet other pictures
        (["seed=1", "max_steps=10"], False),  # changeable, and yet not as long
        (["seed=1", "data.protocol=imagenet"], False),  # changeable, and yet measured otherwise
        (["seed=1", "data.evaluation_view={size: 40, ops: [{op: normalize}]}"], False),
        (["seed=1", "data.labelled_view={size: 32, ops: [{op: flip}, {op: normalize}]}"], False),
        ([], False),  # the same seed again is no second draw
    ],
)
def test_who_belongs_together(make: Make, overrides: list[str], together: bool) -> None:
    found = tables.groups([make("a"), make("b", "cifar10/simclr_sparsehead", *overrides)])
    assert len(found) == (1 if together else 2)


def test_runs_without_the_name_of_their_data_are_of_one_group_only_with_one_root(make: Make) -> None:
    def nameless(folder: str, seed: int, root: str) -> RunFolder:
        run = make(folder, "cifar10/simclr", f"seed={seed}", f"data.root={root}", knn={"knn5_top1": 50.0})
        values = run.read_config()
        del values["data"]["name"]  # as older runs are
        run.config.write_text(config.dump_yaml(values))
        return run

    runs = [nameless("a", 0, "x"), nameless("b", 1, "x"), nameless("c", 2, "y")]
    found = tables.groups(runs)
    assert [[entry.seed for entry in group.entries] for group in found] == [[0, 1], [2]]
    assert not any(t.has_ours for t in tables.tables(found))


def test_a_run_given_twice_counts_once(make: Make) -> None:
    run = make("run")
    again = RunFolder(run.path / ".." / "run")
    (group,) = tables.groups([run, again])
    assert len(group.entries) == 1


def test_only_the_evaluations_of_the_final_backbone_count(make: Make) -> None:
    others = ("knn_random_init", "knn_epoch_0100", "linear_probe@flowers", "summary")
    run = make("run", **{name: {"knn5_top1": 1.0, "linear_top1": 1.0} for name in others})
    row = ours([run], "CIFAR-10")
    assert [cell.ours for cell in row.cells] == [None, None]
    run.write_result("knn", {"knn20_top1": 80.0})  # another k than the paper's
    assert ours([run], "CIFAR-10").cells[1].ours is None


def test_what_is_missing_names_the_command_that_makes_it(make: Make, tmp_path: Path) -> None:
    run = make("a run", knn={"knn5_top1": 90.0})
    found = table([run], "CIFAR-10")
    cells = {row.method: row.cells for row in found.rows}
    assert cells["simclr_sparsehead"][0].command == f"ssl-pipeline linear-probe '{tmp_path}/a run'"
    assert cells["simclr_sparsehead"][1].command is None
    assert cells["byol"][0].command == "ssl-pipeline pretrain cifar10/byol --output runs/cifar10_byol"
    # A method that nobody wrote has no command, whatever is written by others meanwhile.
    for row in found.rows:
        packaged = f"cifar10/{row.method}" in config.packaged_names()
        assert row.group is not None or (row.cells[0].command is not None) == packaged
        assert packaged or row.cells[0].remarks == ("no packaged config yet",)
    big = make("big", "imagenet/byol")
    for percent in (1, 10):
        row = ours([big], f"ImageNet, {percent} % of the labels")
        assert {cell.command for cell in row.cells} == {f"ssl-pipeline semi-supervised {big.path} --percent {percent}"}
    (box, *_) = ours([big], "COCO, box").cells
    assert (box.command, box.remarks) == (f"ssl-pipeline train-detectron2 {big.path}", ())
    done = make(
        "done", "imagenet/byol", detection={"box": {"AP": 39.0, "AP50": 59.0}, "preset": "coco_mask_rcnn_c4_1x"}
    )
    found = ours([done], "COCO, box").cells
    assert [cell.ours and cell.ours.mean for cell in found] == [39.0, 59.0, None]
    assert (found[0].foreign, found[0].remarks) == (False, ("preset coco_mask_rcnn_c4_1x",))
    shorter = make("shorter", "imagenet/byol", detection={"box": {"AP": 9.0}, "changed": ["SOLVER.MAX_ITER=9"]})
    assert ours([shorter], "COCO, box").cells[0].foreign


@pytest.mark.parametrize(
    ("name", "title", "protocol", "foreign"),
    [
        ("cifar10/byol", "CIFAR-10", "small", False),
        ("cifar10/byol", "CIFAR-10", "logistic", True),
        ("imagenet/byol", "ImageNet", "imagenet", False),
        ("imagenet/byol", "ImageNet", "small", True),
        ("cifar10/byol", "CIFAR-10", None, False),  # before results named their protocol
        ("imagenet/byol", "ImageNet", None, True),
    ],
)
def test_another_protocol_than_the_papers_is_marked(
    make: Make, name: str, title: str, protocol: str | None, foreign: bool
) -> None:
    result = {"linear_top1": 70.0, "linear_top5": 90.0} | ({"protocol": protocol} if protocol else {})
    cell = ours([make("run", name, linear_probe=result)], title).cells[0]
    assert cell.ours == tables.Statistic(70.0, None, 1)
    assert cell.foreign == foreign
    assert any((protocol or "small") in remark for remark in cell.remarks) == foreign


def test_numbers_of_two_protocols_are_not_averaged(make: Make) -> None:
    protocols = ("logistic", "small", "logistic")
    runs = [
        make(
            f"s{seed}", "cifar10/byol", f"seed={seed}", linear_probe={"linear_top1": 80.0 + seed, "protocol": protocol}
        )
        for seed, protocol in enumerate(protocols)
    ]
    cell = ours(runs, "CIFAR-10").cells[0]
    assert (cell.ours, cell.foreign) == (tables.Statistic(81.0, None, 1), False)


@pytest.mark.parametrize(
    ("name", "overrides", "remark"),
    [
        ("cifar10/byol", [], None),
        ("cifar10/byol", ["data.name=stl10"], None),
        ("cifar10/byol", ["data.name=tiny_imagenet"], None),
        ("imagenet/byol", ["data.name=imagenet100"], None),
        ("cifar10/byol", ["data.name=imagenet100"], "backbone resnet18, not the paper's (resnet50)"),
        ("imagenet/byol", [], None),
        ("cifar10/byol", ["backbone.name=resnet50"], "backbone resnet50, not the paper's (resnet18)"),
        ("imagenet/byol", ["backbone.name=resnet18"], "backbone resnet18, not the paper's (resnet50)"),
        (
            "cifar10/byol",
            ["backbone.arguments={layers: [1, 1, 1, 1]}"],
            "backbone resnet18 (layers=[1, 1, 1, 1]), not the paper's (resnet18)",
        ),
    ],
)
def test_another_backbone_than_the_papers_is_marked(
    make: Make, name: str, overrides: list[str], remark: str | None
) -> None:
    numbers = {"box": {"AP": 39.1}, "mask": {"AP": 35.5}}
    files: dict[str, dict[str, Any]] = {
        "knn": {"knn5_top1": 60.0},
        "semi_supervised_1percent": {"semi_top1": 50.0},
        "detection": numbers,
    }
    run = make("run", name, *overrides, **files)
    data = tables.read(run).data
    protocol = "imagenet" if data in ("imagenet", "imagenet100") else "small"
    run.write_result("linear_probe", {"linear_top1": 70.0, "protocol": protocol})
    parts = [part for part in tables.tables(tables.groups([run])) if part.has_ours]
    cells = [cell for part in parts for row in part.rows if row.group for cell in row.cells if cell.ours]
    assert len(cells) == {"imagenet": 4, "imagenet100": 1}.get(str(data), 2)
    assert {(cell.foreign, cell.remarks) for cell in cells} == {(remark is not None, (remark,) if remark else ())}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], None),
        (["head.sparse.mode=proximal", "head.sparse.weight=1"], "weight 1, mode proximal"),
        (["head.sparse.groups=rows"], "groups rows"),
        (["head.sparse.weight=0", "head.sparse.inner_steps=4"], "weight 0, inner_steps 4"),
    ],
)
def test_a_sparsehead_that_is_not_the_papers_is_marked(make: Make, overrides: list[str], words: str | None) -> None:
    runs = [make("run", "cifar10/simclr_sparsehead", *overrides, knn={"knn5_top1": 90.0})]
    row = ours(runs, "CIFAR-10")
    assert row.method == "simclr_sparsehead"
    (cell,) = [cell for cell in row.cells if cell.ours is not None]
    assert cell.foreign == (words is not None)
    assert cell.remarks == (() if words is None else (f"SparseHead: {words}, not the paper's",))
    expected = "SimCLR + SparseHead" + (f" ({words})" if words else "") + " on CIFAR-10"
    assert tables.groups(runs)[0].title == expected


def test_a_changed_recipe_is_marked_and_not_averaged_with_another(make: Make) -> None:
    changes: list[Any] = [
        ["learning_rates=[0.1,0.3]", "epochs=2"],
        ["epochs=2", "learning_rates=[0.1,0.3]"],
        ["epochs=3"],
    ]
    runs = [
        make(f"s{seed}", "cifar10/byol", f"seed={seed}", linear_probe={"linear_top1": 80.0 + seed, "changed": changed})
        for seed, changed in enumerate(changes)
    ]
    cell = ours(runs, "CIFAR-10").cells[0]
    assert cell.ours is not None
    assert (cell.ours.mean, cell.ours.n, cell.foreign) == (80.5, 2, True)
    assert cell.remarks == ("changed: epochs=2, learning_rates=[0.1,0.3]",)
    # One of the paper's protocol goes before two that are not, with an empty list or none.
    for values in ({"changed": []}, {}):
        runs[2].write_result("linear_probe", {"linear_top1": 90.0, **values})
        assert ours(runs, "CIFAR-10").cells[0] == tables.Cell(cell.paper, tables.Statistic(90.0, None, 1))


def test_a_superseded_result_is_none(make: Make) -> None:
    run = make("run", knn={"knn5_top1": 90.0})
    (run.results / "superseded.jsonl").write_text('{"knn5_top1": 10.0}\n{"knn5_top1": 20.0}\n')
    assert list(tables.read(run).results) == ["knn"]


def test_imagenets_other_tables(make: Make) -> None:
    detection = {"box": {"AP": 39.1, "AP50": 59.0, "AP75": 43.0}, "mask": {"AP": 35.5, "AP50": 56.0, "AP75": 37.5}}
    run = make(
        "run",
        "imagenet/byol_sparsehead",
        semi_supervised_1percent={
            "semi_top1": 54.0,
            "semi_top5": 78.0,
            "preset": "byol",
            "chosen_on": "val",
            "best_epoch_top1": 60.0,
            "best_epoch_chosen_on": "val",
        },
        detection=detection,
    )
    for kind, values in detection.items():
        for cell, value, printed in zip(
            ours([run], f"COCO, {kind}").cells,
            values.values(),
            PAPER["detection"]["byol_sparsehead"][kind],
            strict=True,
        ):
            assert cell.difference == pytest.approx(value - printed)
    cell = ours([run], "ImageNet, 1 % of the labels").cells[1]
    assert cell.paper == 78.5
    assert cell.ours == tables.Statistic(78.0, None, 1)
    assert cell.remarks == ("preset byol", "chosen on: val")


def test_a_backbone_that_is_no_run_of_ours_has_a_row_too(tmp_path: Path) -> None:
    """Its folder has a config of method, backbone and data alone."""
    run = RunFolder(tmp_path)
    run.config.write_text(
        config.dump_yaml({"method": {"name": "weights.pth"}, "data": {"name": "imagenet", "root": "x"}})
    )
    run.write_result("linear_probe", {"linear_top1": 71.0, "linear_top5": 90.0, "protocol": "imagenet"})
    row = table([run], "ImageNet").rows[-1]
    assert (row.method, row.group and row.group.epochs) == ("weights.pth", None)
    assert [cell.ours and cell.ours.mean for cell in row.cells] == [71.0, 90.0]


def test_every_number_of_the_paper_is_in_its_place() -> None:
    at = {t.title: {row.method: [cell.paper for cell in row.cells] for row in t.rows} for t in tables.tables([])}
    names = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "stl10": "STL-10", "tiny_imagenet": "Tiny ImageNet",
             "imagenet100": "ImageNet-100", "imagenet": "ImageNet"}  # fmt: skip
    want: dict[str, dict[str, Any]] = {}
    for method, row in PAPER["linear_and_knn"].items():
        if method != "columns":
            for data, numbers in row.items():
                want.setdefault(names[data], {})[method] = numbers
    for method, row in PAPER["semi_supervised"].items():
        for percent, numbers in row.items():
            want.setdefault(f"ImageNet, {percent} % of the labels", {})[method] = numbers
    for method, row in PAPER["detection"].items():
        for kind, numbers in row.items():
            want.setdefault(f"COCO, {kind}", {})[method] = numbers
    assert at == want


def test_a_method_that_the_paper_has_not_gets_a_row(make: Make) -> None:
    run = make("run", "cifar10/simclr", knn={"knn5_top1": 88.0})
    values = run.read_config()
    values["method"]["name"] = "another"
    run.config.write_text(config.dump_yaml(values))
    row = table([run], "CIFAR-10").rows[-1]
    assert row.method == "another"
    assert row.cells[1] == tables.Cell(None, tables.Statistic(88.0, None, 1))


def test_parts_with_runs_come_first(make: Make) -> None:
    titles = [t.title for t in tables.tables(tables.groups([make("a", "cifar100/byol"), make("b", "digits/byol")]))]
    assert titles[:2] == ["CIFAR-100", "CIFAR-10"]


def row(step: int, rate: float | None = 100.0) -> dict[str, Any]:
    return {"step": step, "epoch": 0, "loss": 1.0, "images_per_second": rate}


def start(step: int, ranks: int, **more: Any) -> dict[str, Any]:
    return {"event": "start", "step": step, "steps": 100, "ranks": ranks, "host": "node1", "nodes": None, **more}


def test_gpu_hours_with_a_restart_on_other_ranks(make: Make) -> None:
    """Batches of 512: 10 steps at 51.2 images/s are 100 s."""
    rows = [
        row(10, 51.2),
        {"step": 10, "epoch": 1, "online_knn5_top1": 40.0},  # no row of training
        row(20, 51.2),
        row(30, None),  # the first one after a start has no speed
        {**row(40, 25.6), "loss": None},  # all its steps were skipped, and took their time
        {"step": 45, "epoch": 2, "online_knn5_top1": 60.0},
        row(50, 51.2),
        {"step": 60, "loss": 1.0},
        row(70, 51.2),
    ]
    events = [{"event": "submitted"}, start(0, 2, device=GPU), {"event": "end", "step": 25}, start(25, 8, device=GPU)]
    entry = tables.read(make("run", rows=rows, events=[*events, start(70, 1, device="cpu")]))
    cost = tables.cost(entry)
    assert cost.seconds == pytest.approx(100 + 100 + 200 + 100 + 100)
    assert cost.gpu_hours == pytest.approx((2 * 200 + 8 * 400) / 3600)
    assert cost.process_hours == 0
    assert entry.hardware == [f"{ranks} \N{MULTIPLICATION SIGN} {GPU} on node1" for ranks in (2, 8)] + [
        "1 process, CPU on node1"
    ]


@pytest.mark.parametrize("device", [{}, {"device": "cpu"}, {"device": None}])
def test_without_a_gpu_they_are_process_hours(make: Make, device: dict[str, Any]) -> None:
    cost = tables.cost(tables.read(make("run", rows=[row(10, 51.2)], events=[start(0, 4, **device)])))
    assert (cost.gpu_hours, cost.process_hours) == (0, pytest.approx(4 * 100 / 3600))


def test_a_run_without_anything_costs_nothing(make: Make) -> None:
    entry = tables.read(make("run", rows=[{"step": 5, "online_knn5_top1": 3.0}, {"no": "step"}]))
    assert tables.cost(entry) == tables.Cost(0, 0, 0)
    assert (entry.done, entry.steps, entry.hardware) == (5, None, [])


def test_unfinished_runs_say_so(make: Make) -> None:
    events = [start(0, 1)]
    assert tables.read(make("a", rows=[row(40)], events=events)).unfinished == "step 40 of 100"
    assert tables.read(make("b", rows=[row(100)], events=events)).unfinished is None
    assert tables.read(make("c", events=[*events, {"event": "end", "step": 100}])).unfinished is None
    cut = make("d", "cifar10/simclr", "max_steps=100", rows=[row(100)], events=events)
    assert tables.read(cut).unfinished == "max_steps = 100"


def test_what_is_no_run_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no run folder: it has no config\.yaml"):
        tables.groups([RunFolder(tmp_path / "nothing")])
    run = make("run", knn={})
    (run.results / "knn.json").write_text('{"knn5_top1": 4')
    with pytest.raises(BadInput, match="is no JSON"):
        tables.groups([run])
    run.config.write_text("epochs: 4\n")
    with pytest.raises(BadInput, match="names no method"):
        tables.groups([run])


def test_values_that_are_no_numbers_are_missing(make: Make) -> None:
    run = make("run", knn={"knn5_top1": None}, linear_probe={"linear_top1": float("nan")})
    assert [cell.ours for cell in ours([run], "CIFAR-10").cells] == [None, None]
    odd = make("odd", "imagenet/byol", detection={"box": 3, "mask": {"AP": True}})
    assert [cell.ours for title in ("COCO, box", "COCO, mask") for cell in ours([odd], title).cells] == [None] * 6
