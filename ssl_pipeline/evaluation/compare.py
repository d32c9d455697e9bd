"""Two runs side by side: what differs in config, versions, devices and pictures, and at which step their metrics part.

`differing` and `environment` serve the report too, for any number of runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ssl_pipeline.evaluation import tables
from ssl_pipeline.evaluation.tables import Entry
from ssl_pipeline.exits import BadInput, printable
from ssl_pipeline.monitor import TIME_KEYS
from ssl_pipeline.run_folder import RunFolder, checkpoint_file, saved_steps

NONE = "-"
"""Stands for a value that there is not, as printed."""

ABSENT = "absent"
"""Stands for the value of a key that a run does not have."""

TOLERANCE = 1e-3
FINAL = ("step", "loss", "embedding_std", "embedding_rank", "online_top1")
"""Keys of metrics.jsonl whose last values are set side by side."""

SHOWN = 12
"""Rows of a printed table, above which the rest is counted."""


def compare(
    runs: Sequence[RunFolder],
    complete: tables.Complete = dict,
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """What two runs differ in, as plain data that JSON can hold; pairs are in the order of the runs.

    Args:
        runs: two.
        complete: see tables.Complete.
        tolerance: relative, above 0.

    Returns:
        `runs`: path, name, steps done and to do, steps at which it was resumed or rolled back to; `config`, `environment`
        and `pictures`: pairs by key, of what differs; `metrics`: see `metrics`; `final`: see `final`; `same_folder`: whether
        both are one run folder.

    Raises BadInput where a folder is no run, or the tolerance no number above 0.
    """
    if not 0 < tolerance < math.inf:
        raise BadInput(f"--tolerance {tolerance:g} is no relative difference: give a number above 0, as 1e-3")
    entries = [tables.read(run, complete) for run in runs]
    around = [environment(entry) for entry in entries]
    pictures = [values.pop("pictures", None) for values in around]
    return {
        "runs": [_described(entry) for entry in entries],
        "config": differing([entry.options for entry in entries]),
        "environment": differing(around, absent=None),
        "pictures": pictures,
        "metrics": metrics(entries[0].rows, entries[1].rows, tolerance),
        "final": final(entries),
        "same_folder": len({run.path.resolve() for run in runs}) == 1,
    }


def differing(sides: Sequence[Mapping[str, Any]], absent: Any = ABSENT) -> dict[str, list[Any]]:
    """Of mappings with the same keys, or some of them, the keys whose values are not all equal."""
    keys = sorted({key for side in sides for key in side})
    found = {key: [side.get(key, absent) for side in sides] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def environment(entry: Entry) -> dict[str, Any]:
    """Versions, hosts, devices, ranks and the digest of the pictures, by the starts of a run, or by its last checkpoint.

    A value that changed from one start to the next is a list, in the order of the starts. What is not known is left out.
    """
    known: dict[str, list[Any]] = {}

    def add(name: str, value: Any) -> None:
        of = known.setdefault(name, [])
        if value is not None and value not in of:
            of.append(value)

    starts = list(entry.starts)
    if not any("versions" in start for start in starts):  # of a version that did not record them
        starts.append(_of_checkpoint(entry.run))
    for start in starts:
        versions = start.get("versions")
        for library, version in (versions if isinstance(versions, Mapping) else {}).items():
            add(f"version of {library}", version)
        for name in ("host", "nodes", "device", "ranks", "accumulate", "pictures"):
            add(name, start.get(name))
    return {name: values[0] if len(values) == 1 else values for name, values in known.items() if values}


def _of_checkpoint(run: RunFolder) -> dict[str, Any]:
    """Versions and pictures of a run's last checkpoint, the tensors of which are not read; none where it is damaged."""
    steps = saved_steps(run.checkpoints)
    try:
        path = checkpoint_file(run.checkpoints, steps[-1])
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {"versions": state["versions"], "pictures": state["loader"].get("pictures")}
    except Exception:  # none, or whatever torch raises of a file that is not whole
        return {}


def _described(entry: Entry) -> dict[str, Any]:
    going_back = [event for event in entry.events if event.get("event") == "rollback"]
    return {
        "path": str(entry.run.path),
        "what": tables.Group((entry,)).title,
        "done": entry.done,
        "steps": entry.steps,
        "resumed_after": [start["step"] for start in entry.starts if start.get("step", 0) > 0],
        "rolled_back_to": [event.get("to") for event in going_back],
    }


# -------------------------------------------------------------------------------------------------------------- metrics
def metrics(
    rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], tolerance: float = TOLERANCE
) -> dict[str, Any]:
    """Where two series of metrics.jsonl part. Keys that are functions of time (monitor.TIME_KEYS) are left out.

    The relative difference of a and b is |a - b| / max(|a|, |b|); of a number and anything else it is infinite.

    Returns:
        `steps`: logged steps that both have; `equal_up_to`: the last of them up to which every key that both have is the
        same number to the last bit, None where it is not even the first; `parts_at`: the next one, with the pairs that
        differ there, or None; `beyond`: for each key that ever differs by more than `tolerance`, the first such step and
        its pair; `only`: for each side the keys that it alone has; `missing`: for each side the steps that it lacks and
        the other has, up to the last step of the shorter one; `last`: the last step of each side.
    """
    sides = [_series(side) for side in (rows, others)]
    keys = [dict.fromkeys(key for values in side.values() for key in values) for side in sides]
    last = [max(side, default=0) for side in sides]
    both = sorted(sides[0].keys() & sides[1].keys())
    equal, parts, beyond = None, None, {}
    for step in both:
        a, b = (side[step] for side in sides)
        pairs = {key: [a[key], b[key]] for key in a if key in b and a[key] != b[key]}
        if pairs and parts is None:
            parts = {"step": step, "values": pairs}
        if parts is None:
            equal = step
        for key, pair in pairs.items():
            if key not in beyond and relative(*pair) > tolerance:
                beyond[key] = {"step": step, "values": pair}
    return {
        "steps": len(both),
        "tolerance": tolerance,
        "equal_up_to": equal,
        "parts_at": parts,
        "beyond": beyond,
        "only": [[key for key in keys[i] if key not in keys[1 - i]] for i in (0, 1)],
        "missing": [
            sorted(step for step in sides[1 - i].keys() - sides[i].keys() if step <= min(last)) for i in (0, 1)
        ],
        "last": last,
    }


def final(entries: Sequence[Entry]) -> dict[str, list[Any]]:
    """Where runs have come to: values of the last logged step, and accuracies and effective ranks of the results.

    Keys as `loss` of metrics.jsonl, and as `linear_probe.linear_top1` of results/linear_probe.json; None where a run has none.
    """
    sides = []
    for entry in entries:
        last = next(iter(entry.training_rows[::-1]), {})
        logged = {key: last[key] for key in FINAL if tables.number(last.get(key)) is not None}
        results = {
            f"{name}.{key}": value
            for name, values in entry.results.items()
            for key, value in values.items()
            if key.endswith(("_top1", "_top5", "effective_rank")) and tables.number(value) is not None
        }
        sides.append(logged | results)
    keys = dict.fromkeys(key for side in sides for key in side)
    return {key: [side.get(key) for side in sides] for key in keys}


def _series(rows: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """Values by step. What is not finite is told by its name, which equals itself and is in JSON."""
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        values = {key: value for key, value in row.items() if key not in ("step", *TIME_KEYS)}
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else repr(v) for k, v in values.items()}
        found.setdefault(row["step"], {}).update(finite)
    return found


def relative(a: Any, b: Any) -> float:
    """Relative difference of two values; infinite where they differ and one is no number."""
    x, y = tables.number(a), tables.number(b)
    if x is None or y is None:
        return 0.0 if a == b else math.inf
    return abs(x - y) / max(abs(x), abs(y)) if x != y else 0.0


# ---------------------------------------------------------------------------------------------------------------- words
def described(found: Mapping[str, Any]) -> str:
    """The same as text, for a terminal."""
    lines = ["A and B are the same run folder"] if found["same_folder"] else []
    for name, run in zip("AB", found["runs"], strict=True):
        steps = f"{run['done']:,} steps" + ("" if run["steps"] is None else f" of {run['steps']:,}")
        lines.append(f"{name}  {run['path']}: {run['what']}, {steps}{_interruptions(run)}")
    lines += ["", *_section("config", found["config"], "no option differs")]
    lines += ["", *_section("environment", found["environment"], "nothing that is known differs")]
    lines += ["", f"pictures: {_pictures(found['pictures'])}", "", *_metrics(found)]
    if found["final"]:
        rows = [
            [printable(key), *(NONE if value is None else _short(value) for value in pair)]
            for key, pair in found["final"].items()
        ]
        lines += ["", "final values: of the last logged step, and of results/", *_aligned([["", "A", "B"], *rows])]
    return "\n".join(lines)


def _interruptions(run: Mapping[str, Any]) -> str:
    after, back = run["resumed_after"], run["rolled_back_to"]
    said = f", resumed after step {_steps(after)}" if after else ""
    return said + (f", rolled back to step {_steps(back)}" if back else "")


def _steps(steps: Sequence[Any]) -> str:
    more = f" and {len(steps) - 5} more" if len(steps) > 5 else ""
    return ", ".join(map(str, steps[:5])) + more


def _section(name: str, pairs: Mapping[str, Sequence[Any]], none: str) -> list[str]:
    if not pairs:
        return [f"{name}: {none}"]
    rows = [[key, *map(shown, values)] for key, values in pairs.items()]
    return [f"{name}: what differs", *_aligned([["", "A", "B"], *rows])]


def shown(value: Any) -> str:
    """A value of a config, of the environment or of metrics.jsonl, as it is written in JSON; words are bare."""
    return printable(value) if isinstance(value, str) else json.dumps(value)


def _short(value: Any) -> str:
    """A value of metrics.jsonl or of a result, with at most 8 digits."""
    return f"{value:.8g}" if isinstance(value, float) else shown(value)


def _pictures(pair: Sequence[Any]) -> str:
    if None in pair:
        return "not known of " + " and ".join(name for name, value in zip("AB", pair, strict=True) if value is None)
    a, b = pair
    return f"the same ({shown(a)})" if a == b else f"A {shown(a)}; B {shown(b)}"


def _metrics(found: Mapping[str, Any]) -> list[str]:
    of, parts = found["metrics"], found["metrics"]["parts_at"]
    if not of["steps"]:
        lines = ["metrics: no logged step is in both"]
    elif parts is None:
        lines = [
            f"metrics: equal to the last bit in all {of['steps']} logged steps that both have, up to {of['equal_up_to']}"
        ]
    else:
        until = (
            f"from the first logged step ({parts['step']}) on they differ"
            if of["equal_up_to"] is None
            else f"equal to the last bit up to step {of['equal_up_to']}; at step {parts['step']} they part"
        )
        lines = [f"metrics: {until}; {of['steps']} logged steps are in both"]
        rows = [[key, *map(_short, pair), f"{relative(*pair):.1e}"] for key, pair in parts["values"].items()]
        lines += _aligned([["", "A", "B", "relative"], *rows])
    if of["beyond"]:
        first = sorted(of["beyond"].items(), key=lambda item: item[1]["step"])
        rows = [[key, str(at["step"]), *map(_short, at["values"])] for key, at in first]
        lines += ["", f"first step at which a key differs by more than {of['tolerance']:g} of its value"]
        lines += _aligned([["", "step", "A", "B"], *rows])
    elif parts is not None:
        lines.append(f"no key ever differs by more than {of['tolerance']:g} of its value")
    notes = [
        f"{len(steps)} logged step{'s' if len(steps) > 1 else ''} missing in {name}: {_steps(steps)}"
        for name, steps in zip("AB", of["missing"], strict=True)
        if steps
    ]
    notes += [f"only {name} has {', '.join(keys)}" for name, keys in zip("AB", of["only"], strict=True) if keys]
    if of["last"][0] != of["last"][1]:
        notes.append(f"the last logged step is {of['last'][0]} in A and {of['last'][1]} in B")
    if "monitor.every_steps" in found["config"]:
        notes.append(
            "monitor.every_steps differs: logged values are means over other intervals, and differ for that alone"
        )
    return lines + ([""] if notes else []) + notes


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows with their columns one below the other, SHOWN of them."""
    kept = rows[: SHOWN + 1]
    widths = [max(len(row[place]) for row in kept) for place in range(len(rows[0]))]
    lines = ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in kept]
    more = len(rows) - len(kept)
    return [line.rstrip() for line in lines] + ([f"  and {more} more: --json has them"] if more else [])
