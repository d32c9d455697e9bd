"""Runs as plain data: groups that differ in their seed alone, what they cost, and the paper's three tables beside them.

The paper is Song et al. 2023, arXiv 2307.08913; its numbers lie in paper_results.yaml. Nothing is rendered here.
"""

from __future__ import annotations

import functools
import json
import math
import re
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_pipeline import config
from ssl_pipeline.exits import BadInput, Status
from ssl_pipeline.run_folder import CHANGEABLE, RunFolder, read_lines
from ssl_pipeline.sparse_head import Options as SparseOptions

NAMES = {
    "simclr": "SimCLR",
    "byol": "BYOL",
    "barlow_twins": "Barlow Twins",
    "simsiam": "SimSiam",
    "w_mse": "W-MSE",
    "swav": "SwAV",
    "ssl_hsic": "SSL-HSIC",
    "vicreg": "VICReg",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "stl10": "STL-10",
    "tiny_imagenet": "Tiny ImageNet",
    "imagenet100": "ImageNet-100",
    "imagenet": "ImageNet",
}
"""How methods and data sets are written in prose."""

EVALUATIONS = {
    "knn": "knn {run}",
    "linear_probe": "linear-probe {run}",
    "semi_supervised_1percent": "semi-supervised {run} --percent 1",
    "semi_supervised_10percent": "semi-supervised {run} --percent 10",
    "detection": "train-detectron2 {run}",
}
"""Results by which the tables are filled, and the command that writes each."""

Complete = Callable[[dict[str, Any]], Mapping[str, Any]]
"""Adds to the config of a run that an older version began the options which that did not have, at their defaults."""

MEASUREMENT = ("data.evaluation_view", "data.labelled_view", "data.protocol")
"""Keys that a run may change, because they do not change the pretraining; they change what the evaluations measure."""


ENDS = {
    Status.DONE: "finished",
    Status.STOPPED: "stopped by a signal",
    Status.NON_FINITE: "ended by an alarm or non-finite numbers",
    Status.STORAGE: "ended by its storage",
    Status.RANK_LOST: "a rank was lost",
}
"""Exit statuses of a training, in words."""

HEADLINES = (
    ("linear_probe", "linear_top1", "linear top-1"),
    ("knn", "knn5_top1", "5-nn"),
    ("semi_supervised", "semi_top1", "fine-tuned top-1"),
    ("detection", "box.AP", "box AP"),
    ("detection", "mask.AP", "mask AP"),
    ("summary", "pretrained.linear", "linear top-1"),
    ("summary", "pretrained.knn5", "5-nn"),
)
"""Numbers by which a run is known: how its file in results/ begins, the key in it, and what it is called."""


def label(name: str) -> str:
    """A method or a data set as written in prose: `byol_sparsehead` -> `BYOL + SparseHead`."""
    bare = name.removesuffix("_sparsehead")
    return NAMES.get(bare, bare) + (" + SparseHead" if bare != name else "")


# ---------------------------------------------------------------------------------------------------------------- a run
@dataclass(frozen=True)
class Entry:
    """A run as the report sees it."""

    run: RunFolder
    options: Mapping[str, Any]
    """Its config, by dotted keys."""
    results: Mapping[str, Mapping[str, Any]]
    """What the evaluations wrote, by the name of the file."""
    rows: Sequence[Mapping[str, Any]]
    """metrics.jsonl."""
    events: Sequence[Mapping[str, Any]]
    """jobs.jsonl."""
    packaged: tuple[str, Mapping[str, Any]] | None = None
    """The packaged config that differs least from its own among those of its method and data set: name and options."""

    @property
    def method(self) -> str:
        """The name of its row in the paper's tables."""
        sparse = any((self.options.get(f"head.sparse.{key}") or 0) > 0 for key in ("weight", "inner_steps"))
        return f"{self.options.get('method.name')}{'_sparsehead' if sparse else ''}"

    @property
    def own_sparsehead(self) -> str | None:
        """How its SparseHead differs from the paper's; None where it does not, or there is none."""
        paper = {**SparseOptions().model_dump(), "weight": 1e-4}
        own = [
            f"{key} {value}"
            for key in paper
            if (value := self.options.get(f"head.sparse.{key}", paper[key])) != paper[key]
        ]
        return ", ".join(own) if own and self.method.endswith("_sparsehead") else None

    @property
    def data(self) -> str | None:
        """The name of its data set; None where the config has none."""
        return self.options.get("data.name")

    @property
    def seed(self) -> int:
        return self.options.get("seed", 0)

    @property
    def starts(self) -> list[Mapping[str, Any]]:
        """Events of this kind."""
        return [event for event in self.events if event.get("event") == "start"]

    @property
    def training_rows(self) -> list[Mapping[str, Any]]:
        """Rows of metrics.jsonl that the loop logged; others hold online accuracies alone."""
        return [row for row in self.rows if "loss" in row or "images_per_second" in row]

    @property
    def done(self) -> int:
        """Steps done, by the last logged one; where nothing was logged, by the last start or end."""
        told = [event["step"] for event in self.events if event.get("event") in ("start", "end") and "step" in event]
        return max((row["step"] for row in self.rows), default=told[-1] if told else 0)

    @property
    def steps(self) -> int | None:
        """Steps at which the run ends; None before its first start."""
        return self.starts[-1].get("steps") if self.starts else None

    @property
    def unfinished(self) -> str | None:
        """Why its numbers are not those of the whole schedule; None where they are."""
        if self.steps is not None and self.done < self.steps:
            return f"step {self.done:,} of {self.steps:,}"
        end = self.options.get("max_steps")
        return None if end is None else f"max_steps = {end}"

    @property
    def state(self) -> str:
        """How its training ended, or that it did not."""
        kinds = ("start", "end", "failed", "rank_lost")
        told = [e for e in self.events if e.get("event") in kinds and e.get("verb", "pretrain") == "pretrain"]
        if not self.starts:
            return "not begun"
        if self.steps is not None and self.done >= self.steps:
            return "finished"
        last = told[-1]
        if last["event"] == "rank_lost":
            return "a rank was lost"
        if last["event"] == "start":
            return "running" if self.run.is_locked() else "broken off"
        status = last.get("status")
        return ENDS[status] if status in tuple(ENDS) else f"ended with status {status}"

    @property
    def hardware(self) -> list[str]:
        """What it ran on, in the order of its starts."""
        found: dict[str, None] = {}
        for start in self.starts:
            if start.get("step", 0) < start.get(
                "steps", math.inf
            ):  # a finished run that is started again computes nothing
                found[_hardware(start)] = None
        return list(found)


def read(run: RunFolder, complete: Complete = dict) -> Entry:
    """Raises BadInput where the folder is no run, holds links, or a result is no JSON."""
    run.require_plain()
    options = config.flatten(complete(run.read_config()))
    if options.get("method.name") is None:
        raise BadInput(f"{run.config} names no method: it is no config of a pretraining")
    try:
        results = run.read_results()
    except (ValueError, RecursionError) as error:
        raise BadInput(f"a file in {run.results} is no JSON ({error}): evaluate again or remove it") from None
    rows = [row for row in read_lines(run.metrics) if isinstance(row, dict) and isinstance(row.get("step"), int)]
    return Entry(
        run=run,
        options=options,
        results={name: values if isinstance(values, dict) else {"value": values} for name, values in results.items()},
        rows=rows,
        events=[event for event in run.events() if isinstance(event, dict)],
        packaged=_nearest_packaged(options, complete),
    )


def _nearest_packaged(options: Mapping[str, Any], complete: Complete) -> tuple[str, Mapping[str, Any]] | None:
    data, method = options.get("data.name"), options["method.name"]
    found = []
    for name in _packaged():
        if name.startswith(f"{data}/"):
            values = config.flatten(complete(config.load(name).values))
            if values["method.name"] == method:
                differing = sum(options.get(key) != values.get(key) for key in options.keys() | values.keys())
                found.append((differing, name, values))
    return min(found, key=lambda one: one[:2])[1:] if found else None


def _is_gpu(start: Mapping[str, Any]) -> bool:
    device = start.get("device")
    return device is not None and "cpu" not in device.lower()


def _hardware(start: Mapping[str, Any]) -> str:
    ranks = start.get("ranks", 1)
    what = (
        f"{ranks} \N{MULTIPLICATION SIGN} {start['device']}"
        if _is_gpu(start)
        else f"{ranks} process{'' if ranks == 1 else 'es'}"
    )
    what += ", CPU" if start.get("device") and not _is_gpu(start) else ""
    where = start.get("nodes") or start.get("host")
    return f"{what} on {where}" if where else what


@dataclass(frozen=True)
class Cost:
    """What training took, from the logged speeds; evaluations, starts and saving are not in it."""

    seconds: float
    gpu_hours: float
    process_hours: float
    """Of processes of which no GPU is known."""


def cost(entry: Entry) -> Cost:
    """Steps between logged rows, times the global batch, over images a second; hours are times the ranks of that start.

    Steps that were done again after a stop count once, and intervals without a speed not at all: it is a lower bound.
    """
    seconds = gpu_hours = process_hours = 0.0
    previous = 0
    for row in entry.training_rows:
        rate = row.get("images_per_second")
        if rate:
            took = max(row["step"] - previous, 0) * entry.options.get("data.batch_size", 0) / rate
            start: Mapping[str, Any] = next((s for s in reversed(entry.starts) if s.get("step", 0) < row["step"]), {})
            hours = took / 3600 * start.get("ranks", 1)
            seconds += took
            gpu_hours += hours if _is_gpu(start) else 0.0
            process_hours += 0.0 if _is_gpu(start) else hours
        previous = row["step"]
    return Cost(seconds, gpu_hours, process_hours)


def headlines(entry: Entry) -> dict[str, tuple[float, bool]]:
    """The numbers by which a run is known: {name: (percent, whether the recipe was changed)}.

    Without results, the last accuracy on held-out pictures while it was trained. Baselines and earlier epochs are left out.
    """
    found = {}
    for before, key, name in HEADLINES:
        for file, values in entry.results.items():
            if not file.startswith(before) or "random_init" in file or re.search(r"_epoch_\d", file):
                continue
            value: Any = values
            for part in key.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if (percent := number(value)) is not None:
                more = file.removeprefix(before).strip("_").replace("_", " ")
                found[f"{name}, {more}" if more else name] = (percent, bool(changed(values)))
    if not found:
        last = next((row for row in reversed(entry.rows) if number(row.get("online_knn5_top1")) is not None), None)
        found = {"5-nn while training": (last["online_knn5_top1"], False)} if last else {}
    return found


# ---------------------------------------------------------------------------------------------------------- over seeds
@dataclass(frozen=True)
class Statistic:
    """Of one number over seeds."""

    mean: float
    deviation: float | None
    """Of the sample (n - 1); None for n = 1."""
    n: int


def statistic(values: Sequence[float]) -> Statistic | None:
    """None of no values."""
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    return Statistic(mean, statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, by ascending seed. No seed is in it twice."""

    entries: tuple[Entry, ...]

    @property
    def method(self) -> str:
        return self.entries[0].method

    @property
    def data(self) -> str | None:
        return self.entries[0].data

    @property
    def epochs(self) -> int | None:
        return self.entries[0].options.get("epochs")

    @property
    def title(self) -> str:
        """As `SimCLR + SparseHead on CIFAR-10`."""
        own = self.entries[0].own_sparsehead
        return label(self.method) + (f" ({own})" if own else "") + (f" on {label(self.data)}" if self.data else "")


def groups(runs: Iterable[RunFolder], complete: Complete = dict) -> list[Group]:
    """Groups in the order of their first run; a run given twice is used once.

    The runs of a group agree in all keys but the seed, data.root and those that run_folder lets a run change. Some
    must agree nevertheless, because they decide what a number means: data.name (without one, data.root), max_steps and
    those of MEASUREMENT.
    """
    paths = {run.path.resolve(): run for run in runs}
    found: dict[tuple[str, int], list[Entry]] = {}
    for entry in (read(run, complete) for run in paths.values()):
        kept = {"data.name", "max_steps"} if entry.data is not None else {"data.name", "data.root", "max_steps"}
        same = {
            key: value
            for key, value in entry.options.items()
            if key in kept
            or key.startswith(MEASUREMENT)
            or not (key in ("seed", "data.root") or key.startswith(CHANGEABLE))
        }
        key = json.dumps(same, sort_keys=True, default=str)
        turn = 0  # the same seed again is no second draw: it begins another group
        while any(other.seed == entry.seed for other in found.get((key, turn), [])):
            turn += 1
        found.setdefault((key, turn), []).append(entry)
    return [Group(tuple(sorted(entries, key=lambda entry: entry.seed))) for entries in found.values()]


def number(value: Any) -> float | None:
    """The value where it is a finite number, which a truth value is not."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if known else None


def changed(values: Mapping[str, Any]) -> tuple[str, ...]:
    """What the command line changed in the recipe of a result, as `epochs=2`, in one order."""
    found = values.get("changed") or []
    return tuple(sorted(map(str, found if isinstance(found, list) else [found])))


# ---------------------------------------------------------------------------------------------------- the paper's tables
@dataclass(frozen=True)
class Metric:
    """A number of the paper's tables."""

    name: str
    place: int
    """In the paper's list of the row."""
    result: str
    """The file in results/."""
    keys: tuple[str, ...]
    """Where it stands in that file."""


@dataclass(frozen=True)
class Cell:
    """A number of the paper, and ours. One of `ours`, `command` and `remarks` is there."""

    paper: float | None
    ours: Statistic | None = None
    remarks: tuple[str, ...] = ()
    """What must be known of ours, or why there is none."""
    foreign: bool = False
    """Ours was made by another protocol than the paper's: its evaluation, the recipe of it, or the backbone."""
    command: str | None = None
    """What makes ours."""

    @property
    def difference(self) -> float | None:
        """Ours - the paper's."""
        return None if self.paper is None or self.ours is None else self.ours.mean - self.paper


@dataclass(frozen=True)
class Row:
    """A method, and one group of runs of it or none."""

    method: str
    group: Group | None
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """A part of one of the paper's tables: one data set, or one kind of detection."""

    number: int
    title: str
    protocol: str
    """How the paper measured."""
    metrics: tuple[Metric, ...]
    digits: int
    """Decimal places of the paper's numbers."""
    rows: tuple[Row, ...]

    @property
    def has_ours(self) -> bool:
        """Whether any of the given runs belongs here."""
        return any(row.group is not None for row in self.rows)


@functools.cache
def paper() -> dict[str, dict[str, dict[str, list[float | None]]]]:
    """paper_results.yaml: {table: {method: {data set, percent or kind: numbers}}}."""
    path = Path(__file__).with_name("paper_results.yaml")
    values = config.parse_yaml(path.read_text(encoding="utf-8"), str(path))
    values["linear_and_knn"] = {name: row for name, row in values["linear_and_knn"].items() if name != "columns"}
    return values


@functools.cache
def _packaged() -> frozenset[str]:
    return frozenset(config.packaged_names())


def tables(found: Sequence[Group]) -> list[Table]:
    """The paper's Tables 1 to 3 in parts, with the groups beside them; parts to which a group belongs come first."""
    linear = ("linear_probe", "linear_top1"), ("linear_probe", "linear_top5")
    parts = []
    for data in next(iter(paper()["linear_and_knn"].values())):
        if _protocol(data) == "imagenet":
            names, keys, how = (
                ("linear top-1", "linear top-5"),
                linear,
                "ResNet-50; linear classifier on the frozen backbone",
            )
        else:
            names, keys = ("linear", "5-nn"), (linear[0], ("knn", "knn5_top1"))
            how = "ResNet-18; top-1 of a linear classifier and of 5 nearest neighbours on the frozen backbone"
        metrics = [Metric(n, i, file, (key,)) for i, (n, (file, key)) in enumerate(zip(names, keys, strict=True))]
        epochs = 2000 if data == "stl10" else 1000
        parts.append(_table(1, label(data), f"{how}; {epochs} epochs", "linear_and_knn", data, data, metrics, 2, found))
    for percent in ("1", "10"):
        metrics = [
            Metric(f"top-{n}", i, f"semi_supervised_{percent}percent", (f"semi_top{n}",)) for i, n in enumerate((1, 5))
        ]
        how = f"ResNet-50, 1000 epochs; fine-tuned on {percent} % of the labels"
        title = f"ImageNet, {percent} % of the labels"
        parts.append(_table(2, title, how, "semi_supervised", percent, "imagenet", metrics, 1, found))
    for kind in ("box", "mask"):
        metrics = [Metric(name, i, "detection", (kind, name)) for i, name in enumerate(("AP", "AP50", "AP75"))]
        how = "pretrained on ImageNet; Mask R-CNN, C4, 1x schedule"
        parts.append(_table(3, f"COCO, {kind}", how, "detection", kind, "imagenet", metrics, 1, found))
    return sorted(parts, key=lambda part: not part.has_ours)


def _table(
    number: int, title: str, protocol: str, table: str, column: str, data: str, metrics: Sequence[Metric], digits: int,
    found: Sequence[Group],
) -> Table:  # fmt: skip
    ours: dict[str, list[Group | None]] = {}
    for group in found:
        if group.data == data:
            ours.setdefault(group.method, []).append(group)
    rows = []
    for method in [*paper()[table], *(name for name in ours if name not in paper()[table])]:
        numbers = paper()[table].get(method, {}).get(column, [None] * len(metrics))
        for of_row in ours.get(method, [None]):
            cells = [_cell(numbers[metric.place], metric, method, data, of_row) for metric in metrics]
            rows.append(Row(method, of_row, tuple(cells)))
    return Table(number, title, protocol, tuple(metrics), digits, tuple(rows))


def _cell(printed: float | None, metric: Metric, method: str, data: str, group: Group | None) -> Cell:
    if group is None:
        name = f"{data}/{method}"
        if name not in _packaged():
            return Cell(printed, remarks=("no packaged config yet",))
        return Cell(printed, command=f"ssl-pipeline pretrain {name} --output runs/{data}_{method}")
    # Numbers that were made in different ways are not averaged: those of the paper's protocol, or the most, are taken.
    kinds: dict[tuple[bool, tuple[str, ...]], list[float]] = {}
    for entry in group.entries:
        values: Any = entry.results.get(metric.result, {})
        kind = _kind(metric.result, values, entry, data)
        for key in metric.keys:
            values = values.get(key) if isinstance(values, Mapping) else None
        value = number(values)
        if value is not None:
            kinds.setdefault(kind, []).append(value)
    if kinds:
        (foreign, remarks), numbers = max(kinds.items(), key=lambda item: (not item[0][0], len(item[1])))
        return Cell(printed, statistic(numbers), remarks, foreign)
    run = group.entries[0].run.path
    return Cell(printed, command=f"ssl-pipeline {EVALUATIONS[metric.result].format(run=shlex.quote(str(run)))}")


def _protocol(data: str) -> str:
    """The paper's protocol of linear classifiers on a data set."""
    return "imagenet" if data in ("imagenet", "imagenet100") else "small"


def _network(data: str) -> str:
    """The paper's backbone on a data set."""
    return "resnet50" if data in ("imagenet", "imagenet100") else "resnet18"


def _other_backbone(entry: Entry, data: str) -> str | None:
    """The backbone of a run as `resnet18 (layers=[1, 1, 1, 1])` where it is not the paper's; None where it is."""
    name = entry.options.get("backbone.name")
    before = "backbone.arguments."
    arguments = [f"{k.removeprefix(before)}={v}" for k, v in entry.options.items() if k.startswith(before)]
    if name in (None, _network(data)) and not arguments:  # weights brought in by hand may have no name
        return None
    return f"{name} ({', '.join(arguments)})" if arguments else name


def _kind(result: str, values: Mapping[str, Any], entry: Entry, data: str) -> tuple[bool, tuple[str, ...]]:
    """Whether a result was made by another protocol than the paper's, and what else must be known of it."""
    protocol = values.get("protocol", "small")  # the only one there was before results named theirs
    remarks = []
    if result == "linear_probe" and protocol != _protocol(data):
        remarks.append(f"protocol {protocol}, not the paper's ({_protocol(data)})")
    if (backbone := _other_backbone(entry, data)) is not None:
        remarks.append(f"backbone {backbone}, not the paper's ({_network(data)})")
    if entry.own_sparsehead is not None:
        remarks.append(f"SparseHead: {entry.own_sparsehead}, not the paper's")
    if changed(values):
        remarks.append(f"changed: {', '.join(changed(values))}")
    foreign = bool(remarks)
    remarks += [f"preset {values['preset']}"] if values.get("preset") is not None else []
    remarks += [f"chosen on: {values['chosen_on']}"] if values.get("chosen_on") is not None else []
    return foreign, tuple(remarks)
