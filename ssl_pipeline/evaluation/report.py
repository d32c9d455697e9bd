"""report.html and report.md: our numbers beside the paper's, for a person to look at, and to mail.

report.html is one file that loads nothing. It is made of parts, each a function from groups of runs to html, or to "" where
there is nothing to show: another part is one more function in PARTS.
"""

from __future__ import annotations

import base64
import html
import importlib.metadata
import io
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ssl_pipeline import __version__
from ssl_pipeline.evaluation import tables
from ssl_pipeline.evaluation.tables import Entry, Group, label
from ssl_pipeline.exits import BadInput
from ssl_pipeline.run_folder import RunFolder, duration

NONE, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
TABLES = "Tables 1 to 3 of the paper"
PAPER = "Song et al. 2023, “Towards the Sparseness of Projection Head in Self-Supervised Learning”, arXiv 2307.08913"

LAST_STEP = (
    "step",
    "epoch",
    "loss",
    "embedding_std",
    "embedding_rank",
    "sparse_weight",
    "sparse_penalty",
    "head_groups_inactive",
    "head_groups_zero",
    "head_hoyer",
    "skipped",
    "bad_pictures",
)
"""Keys of metrics.jsonl that are shown of the last logged step."""

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1c1e21",
    "faint": "#5c6168",
    "rule": "#d9dbde",
    "tint": "#f5f6f7",
    "link": "#0b57a4",
}
DARK = {
    "paper": "#17191c",
    "ink": "#e4e5e7",
    "faint": "#a0a5ac",
    "rule": "#3b3f45",
    "tint": "#202327",
    "link": "#8ab8ec",
}
LINES_LIGHT = ("#1c1e21", "#0b62b0", "#c2500a", "#0a7f5c", "#8d4a94", "#8a7400")
LINES_DARK = ("#e4e5e7", "#6db1f2", "#f0935a", "#4cc3a0", "#cf95d6", "#d8c250")
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)))
"""As many as make, with the colours, 42 kinds of line; the first ones differ in gray too."""

STYLE = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 3rem 1.5rem 4rem; max-width: 80rem; font: 1rem/1.55 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); overflow-wrap: break-word; }
h1, h2, h3, summary { line-height: 1.3; text-wrap: balance; }
h1 { font-size: 1.875rem; font-weight: 650; letter-spacing: -.015em; margin: 0 0 .5rem; }
h2 { font-size: 1.3rem; font-weight: 650; margin: 3.5rem 0 1rem; padding-top: 1.25rem; border-top: 1px solid var(--rule); }
h3, summary { font-size: 1.0625rem; font-weight: 600; }
h3 { margin: 2.5rem 0 .5rem; } h2 + h3 { margin-top: 1.25rem; }
p { max-width: 44rem; margin: .5rem 0; }
a { color: var(--link); text-underline-offset: .2em; text-decoration-thickness: 1px; }
small, caption, figcaption, footer, nav, .remarks { color: var(--faint); font-size: .875rem; font-weight: 400; }
nav { margin-top: .75rem; } nav a { margin-right: 1.5rem; white-space: nowrap; }
code { font: .9em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
td code { user-select: all; } td code span { white-space: nowrap; }
.grids { display: flex; flex-wrap: wrap; gap: 1.75rem 4rem; align-items: flex-start; margin: .75rem 0 0; }
.grid { max-width: 100%; margin-left: -.5rem; } .grid + .grids { margin-top: 1.75rem; }
.scroll { overflow-x: auto; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9375rem; font-variant-numeric: tabular-nums lining-nums; }
caption { text-align: left; padding: 0 .5rem .4rem; }
caption span { position: sticky; left: .5rem; display: inline-block; max-width: min(44rem, calc(100vw - 3rem)); }
th, td { padding: .32rem .6rem; text-align: left; vertical-align: baseline; font-weight: 400; }
th:first-child, thead td:first-child { padding-left: .5rem; }
thead th { color: var(--faint); font-size: .8125rem; white-space: nowrap; vertical-align: bottom; }
thead tr:last-child > * { border-bottom: 1px solid var(--faint); }
thead th.over { color: var(--ink); padding-bottom: 0; }
tbody th { position: sticky; left: 0; background: var(--paper); white-space: nowrap; }
tbody tr + tr > *, table:not(:has(thead)) tr > * { border-top: 1px solid var(--rule); }
.number { text-align: right; white-space: nowrap; }
.first { padding-left: 1.75rem; } .none { color: var(--faint); }
td.words { min-width: 8.5rem; } td.words code { white-space: nowrap; }
td.lines { min-width: 17rem; font-size: .875rem; color: var(--faint); }
tr.ours > * { background: var(--tint); } tr.ours th { font-weight: 600; }
th br { display: none; }
th small { display: block; width: 0; min-width: 100%; white-space: normal; overflow-wrap: anywhere; }
.remarks { width: 0; min-width: 100%; margin: .4rem 0 0; padding: 0 .5rem; }
details { margin: .25rem 0; } details .grid { margin: .5rem 0 1.5rem -.5rem; }
summary { cursor: pointer; padding: .35rem 0; } summary small { margin-left: .5rem; }
figure { margin: 0; } figcaption { margin-top: .5rem; max-width: 44rem; }
img { display: block; height: auto; }
.curve img { width: 46rem; max-width: 100%; min-width: 30rem; }
.views { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; margin-top: 1rem; }
.views figure { max-width: 100%; } .views img { max-width: 100%; max-height: 34rem; }
.views figcaption { max-width: 16rem; }
footer { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--rule); }
@media (max-width: 40rem) { body { padding: 1.5rem 1rem 3rem; } h1 { font-size: 1.5rem; } h2 { margin-top: 2.5rem; }
  th, td { padding: .32rem .5rem; } .first { padding-left: 1rem; }
  table:has(.over) tbody th { max-width: 8rem; white-space: normal; }
  td.lines { min-width: 14rem; } }
@media print { body { max-width: none; padding: 0; } .scroll { overflow: visible; } }
"""


def write(
    runs: Sequence[RunFolder], folder: Path | None = None, title: str | None = None, note: str | None = None
) -> list[Path]:
    """Write report.html and report.md: of one run into it, of several into `folder` (default: the current one).

    Raises BadInput where a folder is no run, matplotlib is missing or the files cannot be written.
    """
    alone = len({run.path.resolve() for run in runs}) == 1
    folder = folder or (runs[0].path if alone else Path())
    texts = {"report.html": page(runs, title, note), "report.md": markdown(runs, title, note)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            partial = folder / f".{name}.partial"
            partial.unlink(missing_ok=True)
            with partial.open("x", encoding="utf-8") as file:  # never through a link that another one put there
                file.write(text)
            os.replace(partial, folder / name)
    except OSError as error:
        raise BadInput(
            f"cannot write the report to {str(folder)!r}: {error}; free room or name another folder"
        ) from None
    return [folder / name for name in texts]


def page(runs: Sequence[RunFolder], title: str | None = None, note: str | None = None) -> str:
    """The whole of report.html. Raises BadInput where a folder is no run or matplotlib is missing."""
    found = tables.groups(runs)
    title = title or _title(found)
    parts = [(key, heading, text) for key, heading, part in PARTS if (text := part(found))]
    links = "".join(f'<a href="#{key}">{heading}</a>' for key, heading, _ in parts)
    body = [f"<header><h1>{_escaped(title)}</h1>", *(f"<p>{_escaped(line)}</p>" for line in _notes(found, note))]
    body += [f'<nav aria-label="Parts of this report">{links}</nav></header><main>']
    body += [f'<section id="{key}"><h2>{heading}</h2>{text}</section>' for key, heading, text in parts]
    body.append(f"</main><footer>{_escaped(_made_by())}</footer>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{_escaped(title)}</title><style>{_colours()}{STYLE}</style></head>\n"
        f"<body>{''.join(body)}</body></html>\n"
    )


def markdown(runs: Sequence[RunFolder], title: str | None = None, note: str | None = None) -> str:
    """The whole of report.md: report.html without its pictures. Raises BadInput where a folder is no run."""
    found = tables.groups(runs)
    names, every = _names(found), tables.tables(found)
    lines = [f"# {_plain(title or _title(found))}", *map(_plain, _notes(found, note)), "## Runs"]
    for group in found:
        lines += [f"### {_plain(group.title)}", *(grid.markdown() for grid in _of_group(group, names))]
    lines += [f"## {TABLES}", *map(_plain, _of_the_paper(found, every))]
    for table in every:
        heading, text = f"Table {table.number}: {table.title}", _paper_grid(table, names).markdown()
        folded = f"<details><summary>{heading}: no run of ours</summary>\n\n{text}\n\n</details>"
        lines += [f"### {heading}", text] if table.has_ours else [folded]
    return "\n\n".join([*lines, "---", _plain(_made_by())]) + "\n"


# --------------------------------------------------------------------------------------------------------------- words
def _title(found: Sequence[Group]) -> str:
    count = sum(len(group.entries) for group in found)
    if count == 1:
        return f"{found[0].title}: {_names(found)[found[0].entries[0].run.path]}"
    return f"{count} runs" if len(found) != 1 else f"{found[0].title}: {count} seeds"


def _notes(found: Sequence[Group], note: str | None) -> list[str]:
    measured = any(entry.results for entry in _entries(found))
    return [note] if note else [] if measured else ["No evaluation has written a result yet."]


def _names(found: Sequence[Group]) -> dict[Path, str]:
    """A name of each run, by its path: the folder's, or the whole path where two folders have the same."""
    paths = [entry.run.path for entry in _entries(found)]
    short = [path.resolve().name for path in paths]
    return {path: name if short.count(name) == 1 else str(path) for path, name in zip(paths, short, strict=True)}


def _made_by() -> str:
    def version(library: str) -> str:
        try:
            return f"{library} {importlib.metadata.version(library)}"
        except importlib.metadata.PackageNotFoundError:
            return f"no {library}"

    libraries = ", ".join(map(version, ("torch", "matplotlib")))
    when = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return f"Written by ssl_pipeline {__version__} on {when}, with Python {platform.python_version()}, {libraries}."


def _value(value: Any, digits: int = 2) -> str:
    """A value of a result or of a logged step. Small numbers keep three significant digits."""
    if value is None:
        return NONE
    if isinstance(value, (list, tuple)):
        return f"{len(value)} values"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        small = 0 < abs(value) < 1
        return (f"{value:#.3g}" if small else f"{value:.{digits}f}").replace("-", MINUS)
    if isinstance(value, int):
        return (f"{value:,}" if abs(value) >= 10_000 else str(value)).replace("-", MINUS)
    return str(value)


def _mean(statistic: tables.Statistic | None, digits: int = 2) -> str:
    if statistic is None:
        return NONE
    if statistic.deviation is None:
        return f"{statistic.mean:.{digits}f}"
    return f"{statistic.mean:.{digits}f} ± {statistic.deviation:.{digits}f}"


def _signed(value: float | None, digits: int) -> str:
    if value is None:
        return NONE
    text = f"{value:+.{digits}f}".replace("-", MINUS)
    return text[1:] if float(text[1:]) == 0 else text


def _hours(hours: float) -> str:
    return NONE if hours == 0 else f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


# -------------------------------------------------------------------------------------------------- tables, in two tongues
class Code(str):
    """Words of a command line, or a path."""


class Small(str):
    """Words that stand back."""


Cell = str | list[str | tuple[str, ...]]
"""Words, or lines of words; a line may be words of several kinds."""


@dataclass(frozen=True)
class Grid:
    """A table. The first cell of a row names it; columns whose cells hold no words are set as numbers."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    over: Sequence[tuple[str, int]] = ()
    """Headings over several columns: words (none: no heading) and the number of columns."""
    ours: frozenset[int] = frozenset()
    """Rows to be set apart."""
    remarks: Sequence[str] = ()
    """Small print below."""

    def _is_number(self, column: int) -> bool:
        cells = [row[column] for row in self.rows]
        words = [not isinstance(cell, str) or any(sign.isalpha() for sign in cell.replace("n =", "")) for cell in cells]
        return column > 0 and not any(words)

    def html(self) -> str:
        """The table in a frame of its own that scrolls sideways."""
        starts = {sum(span for _, span in self.over[:place]) for place in range(1, len(self.over))}
        kinds = [
            " ".join(["number"] * self._is_number(column) + ["first"] * (column in starts))
            for column in range(len(self.columns))
        ]
        rows = []
        if self.over:
            cells = [
                f'<th scope="colgroup" class="over first" colspan="{span}">{_escaped(words)}</th>'
                if words
                else f'<td colspan="{span}"></td>'
                for words, span in self.over
            ]
            rows.append(f"<tr>{''.join(cells)}</tr>")
        if any(self.columns):
            cells = [
                f'<th scope="col"{_class(kind)}>{_escaped(name)}</th>' if name else "<td></td>"
                for name, kind in zip(self.columns, kinds, strict=True)
            ]
            rows.append(f"<tr>{''.join(cells)}</tr>")
        head = f"<thead>{''.join(rows)}</thead>" if rows else ""
        rows = []
        for place, (name, *values) in enumerate(self.rows):
            cells = [f'<th scope="row">{_cell(name)}</th>']
            for value, kind in zip(values, kinds[1:], strict=True):
                kind = kind or ("words" if isinstance(value, str) else "lines")
                cells.append(f"<td{_class(f'{kind} none' if value == NONE else kind)}>{_cell(value)}</td>")
            rows.append(f"<tr{_class('ours' if place in self.ours else '')}>{''.join(cells)}</tr>")
        caption = _escaped(self.caption)
        remarks = f'<p class="remarks">{_escaped("; ".join(self.remarks))}</p>' if self.remarks else ""
        return (
            f'<div class="grid"><div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table>'
            f"<caption><span>{caption}</span></caption>{head}<tbody>{''.join(rows)}</tbody></table></div>{remarks}</div>"
        )

    def markdown(self) -> str:
        """The same as a table of GitHub's Markdown; `over` is put before the names of its columns."""
        before = [words for words, span in self.over for _ in range(span)] or [""] * len(self.columns)
        heads = [f"{words}: {name}" if words else name for words, name in zip(before, self.columns, strict=True)]
        align = ["---:" if self._is_number(column) else "---" for column in range(len(self.columns))]
        rows = [[_plain_cell(cell) for cell in row] for row in self.rows]
        lines = [f"| {' | '.join(cells)} |" for cells in ([_plain(head) for head in heads], align, *rows)]
        remarks = "; ".join(map(_plain, self.remarks))
        return "\n".join([_plain(self.caption), "", *lines, *(["", remarks] if remarks else [])])


def _escaped(text: str) -> str:
    return html.escape(text)


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _cell(cell: Cell) -> str:
    def shown(part: str) -> str:
        if isinstance(part, Code):  # no line ends between the hyphens of an option
            words = re.sub("(?<= )--[a-z-]+", r"<span>\g<0></span>", _escaped(part))
            return f"<code>{words}</code>"
        return f"<small>{_escaped(part)}</small>" if isinstance(part, Small) else _escaped(part)

    return "<br>".join(" ".join(map(shown, line)) for line in _lines(cell))


def _lines(cell: Cell) -> list[tuple[str, ...]]:
    lines = [cell] if isinstance(cell, str) else cell
    return [(line,) if isinstance(line, str) else line for line in lines]


def _plain(text: str) -> str:
    """Text in which Markdown and html read no sign."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*|\[\]~]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def _plain_code(text: str) -> str:
    """Code in Markdown, between more backticks than stand in it; a table's bar is escaped even there."""
    text = " ".join(text.split()).replace("|", r"\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"`{text}`"


def _plain_cell(cell: Cell) -> str:
    def shown(part: str) -> str:
        return _plain_code(part) if isinstance(part, Code) else _plain(part)

    return "<br>".join(" ".join(map(shown, line)) for line in _lines(cell))


# ------------------------------------------------------------------------------------------------------- what a run did
def _of_group(group: Group, names: Mapping[Path, str]) -> Iterator[Grid]:
    """Facts, results and the last logged step of a group's runs."""
    several = len(group.entries) > 1
    facts = [_facts(entry) for entry in group.entries]
    unknown = [key for key in facts[0] if all(of[key] == NONE for of in facts)]
    facts = [{key: value for key, value in of.items() if key not in unknown} for of in facts]
    runs = [names[entry.run.path] for entry in group.entries]
    if several:
        rows: list[list[Cell]] = [[name, *values.values()] for name, values in zip(runs, facts, strict=True)]
        yield Grid(f"{_value(group.epochs)} epochs; the runs differ in their seed", ["run", *facts[0]], rows)
    else:
        alone = {"method": group.method, "data set": group.data or NONE, "epochs": _value(group.epochs), **facts[0]}
        yield Grid(f"Run {runs[0]}", ["", ""], [[name, value] for name, value in alone.items()])

    heads = [f"seed {entry.seed}" for entry in group.entries] if several else [""]
    files = list(dict.fromkeys(name for entry in group.entries for name in entry.results))
    for file in files:
        yield from _of_file(file, [entry.results.get(file, {}) for entry in group.entries], heads)

    last = [next(iter(entry.training_rows[::-1]), {}) for entry in group.entries]
    shown = [name for name in LAST_STEP if any(row.get(name) is not None for row in last)]
    if shown:
        rows = [[name, *(_value(row.get(name), digits=4) for row in last)] for name in shown]
        yield Grid("The last logged step", ["", *heads], rows)


def _facts(entry: Entry) -> dict[str, Cell]:
    cost = tables.cost(entry)
    return {
        "seed": str(entry.seed),
        "steps done": f"{entry.done:,}" + ("" if entry.steps is None else f" / {entry.steps:,}"),
        "hardware": "; then ".join(entry.hardware) or NONE,
        "training time": duration(cost.seconds) if cost.seconds else NONE,
        "GPU-hours": _hours(cost.gpu_hours),
        "process-hours": _hours(cost.process_hours),
        "config": Code(entry.run.config),
    }


def _of_file(file: str, of_runs: Sequence[Mapping[str, Any]], heads: Sequence[str]) -> Iterator[Grid]:
    """The tables of one file in results/: one of all runs' plain values, and one a run of nested mappings and of rows."""
    of_runs = [{key: value for key, value in values.items() if key != "recipe"} for values in of_runs]  # in the JSON
    flat = list(
        dict.fromkeys(
            key
            for values in of_runs
            for key, value in values.items()
            if not isinstance(value, Mapping) and not _is_rows(value)
        )
    )
    several = len(heads) > 1
    rows: list[list[Cell]] = []
    remarks: list[str] = []
    recipes = [tables.changed(values) for values in of_runs]
    alike = len({recipe for recipe, values in zip(recipes, of_runs, strict=True) if values}) == 1
    for recipe, head in zip(recipes, heads, strict=True):
        if recipe:
            remarks.append(f"changed{f', {head}' if several else ''}: {', '.join(recipe)}")
    for key in flat:
        if key == "changed":
            continue
        found = [values.get(key) for values in of_runs]
        if any(isinstance(value, str) for value in found):
            shown = [f"{key}, {head}: {_value(value)}" for head, value in zip(heads, found, strict=True)]
            remarks += shown if found.count(found[0]) < len(found) else [f"{key}: {found[0]}"]
        else:
            mean = tables.statistic([number for value in found if (number := tables.number(value)) is not None])
            # Numbers of different recipes are not averaged.
            rows.append([key, *map(_value, found), *([_mean(mean if alike else None)] if several else [])])
    if flat:
        columns = ["", *heads, *(["mean ± deviation"] if several else [])]
        yield Grid(f"results/{file}.json", columns, rows, remarks=remarks)
    for values, head in zip(of_runs, heads, strict=True):
        for key, tried in values.items():
            if _is_rows(tried):
                columns = list(dict.fromkeys(column for row in tried for column in row))
                rows = [[_value(row.get(column)) for column in columns] for row in tried]
                yield Grid(f"results/{file}.json, {key}{f', {head}' if several else ''}", columns, rows)
        nested = {key: _leaves(value) for key, value in values.items() if isinstance(value, Mapping)}
        if nested:
            columns = list(dict.fromkeys(key for leaves in nested.values() for key in leaves))
            rows = [[name, *(_value(leaves.get(column)) for column in columns)] for name, leaves in nested.items()]
            yield Grid(f"results/{file}.json{f', {head}' if several else ''}", ["", *columns], rows)


def _is_rows(value: Any) -> bool:
    """Whether a value is a list of mappings, as the heads of a grid."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _leaves(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Values by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _leaves(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return found


def _runs(found: Sequence[Group]) -> str:
    names = _names(found)
    parts = []
    for group in found:
        if len(found) > 1:
            parts.append(f"<h3>{_escaped(group.title)}</h3>")
        first, *others = (grid.html() for grid in _of_group(group, names))
        # One run's facts are as narrow as its results; those of several need the whole width.
        wide, narrow = (first, others) if len(group.entries) > 1 else ("", [first, *others])
        parts.append(f'{wide}<div class="grids">{"".join(narrow)}</div>')
    return "".join(parts)


# -------------------------------------------------------------------------------------------------------------- figures
@dataclass(frozen=True)
class Panel:
    """Curves of runs that can be compared, in one pair of axes."""

    title: str
    label: str
    """Of the y axis."""
    key: str
    """In metrics.jsonl."""
    entries: Sequence[Entry]


def _curves(found: Sequence[Group], panels: Sequence[Panel], caption: str) -> str:
    """A figure of panels against the step, a line a run; "" where nothing is logged.

    Raises BadInput where matplotlib is missing.
    """
    names = _names(found)
    drawn = []
    for panel in panels:
        lines = {}
        for entry in panel.entries:
            points = [
                (row["step"], row[panel.key]) for row in entry.rows if tables.number(row.get(panel.key)) is not None
            ]
            if points:
                lines[names[entry.run.path]] = points
        if lines:
            drawn.append((panel, lines))
    if not drawn:
        return ""
    light, dark = (_draw(drawn, *colours) for colours in ((LIGHT, LINES_LIGHT), (DARK, LINES_DARK)))
    text = _escaped(caption)
    # Two pictures of the same: a line in a colour for white paper cannot be seen on black.
    return (
        f'<figure class="curve"><div class="scroll" tabindex="0" role="region" aria-label="{text}"><picture>'
        f'<source srcset="{_data(dark)}" media="(prefers-color-scheme: dark)"><img src="{_data(light)}" alt="{text}">'
        f"</picture></div><figcaption>{text}</figcaption></figure>"
    )


def _draw(
    panels: Sequence[tuple[Panel, Mapping[str, Sequence[tuple[int, float]]]]],
    colours: Mapping[str, str],
    lines: Sequence[str],
) -> bytes:
    """A PNG of panels one below the other, each with {name of the line: points}."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise BadInput("the report needs matplotlib: pip install 'ssl-pipeline[demo]'") from None
    heights = [
        2.9 + 0.2 * (len(panel.title) > 0) + 0.21 * -(-len(named) // 2) * (len(named) > 1) for panel, named in panels
    ]
    figure = Figure(figsize=(7.4, sum(heights)), layout=ConstrainedLayoutEngine(hspace=0.08))
    figure.set_facecolor(colours["paper"])
    every = figure.subplots(len(panels), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (panel, named) in zip(every, panels, strict=True):
        drawn = []
        for place, points in enumerate(named.values()):
            kind = {"color": lines[place % len(lines)], "linestyle": DASHES[place % len(DASHES)]}
            drawn += axes.plot(
                *zip(*points, strict=True), linewidth=1.5, marker="o" if len(points) == 1 else None, **kind
            )
        axes.set_title(panel.title, color=colours["ink"], fontsize="medium", loc="left", parse_math=False)
        axes.set_ylabel(panel.label, color=colours["ink"], parse_math=False)
        axes.set_xlabel("step", color=colours["ink"])
        axes.set_facecolor(colours["paper"])
        axes.tick_params(colors=colours["faint"], labelcolor=colours["ink"], length=3)
        axes.grid(color=colours["rule"], linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(colours["faint"])
        axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10], integer=True))
        axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
        if len(named) > 1:
            shown = [f" {name}" for name in named]  # a name that begins with _ would be left out
            below = {"loc": "upper left", "bbox_to_anchor": (-0.01, -0.17), "ncols": 2}
            legend = axes.legend(drawn, shown, **below, frameon=False, handlelength=3.5, fontsize=9)
            for text in legend.get_texts():
                text.set(color=colours["ink"], parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _loss(found: Sequence[Group]) -> str:
    """A panel for each method and data set: losses of different methods have different units."""
    panels: dict[str, list[Entry]] = {}
    for entry in _entries(found):
        bare = label(entry.method.removesuffix("_sparsehead")) + (f" on {label(entry.data)}" if entry.data else "")
        panels.setdefault(bare, []).append(entry)
    caption = "Loss without the penalty, the mean over the steps between two logged ones, against the step."
    return _curves(
        found, [Panel(title * (len(panels) > 1), "loss", "loss", of) for title, of in panels.items()], caption
    )


def _online(found: Sequence[Group]) -> str:
    """A panel for each accuracy and data set."""
    logged = {key for entry in _entries(found) for row in entry.rows for key in row}
    keys = sorted(key for key in logged if key.startswith("online_") and "_top" in key)
    panels: dict[str, list[Entry]] = {}
    for entry in _entries(found):
        panels.setdefault(tables.label(entry.data) if entry.data else "", []).append(entry)
    every = [Panel(data, f"{key.removeprefix('online_')}, %", key, of) for key in keys for data, of in panels.items()]
    return _curves(found, every, "Accuracy of the backbone while it was trained, in percent, against the step.")


def _entries(found: Sequence[Group]) -> list[Entry]:
    return [entry for group in found for entry in group.entries]


def _views(found: Sequence[Group]) -> str:
    names = _names(found)
    figures = []
    for entry in _entries(found):
        if entry.run.views.is_file():
            name = _escaped(names[entry.run.path])
            image = (
                f'<img src="{_data(entry.run.views.read_bytes())}" alt="Augmented views of eight pictures, run {name}">'
            )
            figures.append(f"<figure>{image}<figcaption>{name}</figcaption></figure>")
    intro = "<p>The first pictures as the network sees them: a row a picture, a column a view.</p>"
    return f'{intro}<div class="views">{"".join(figures)}</div>' if figures else ""


# --------------------------------------------------------------------------------------------------- the paper's tables
def _of_the_paper(found: Sequence[Group], parts: Sequence[tables.Table]) -> list[str]:
    """What is to be read before the tables."""
    methods = f"Ours: the mean over seeds ± the deviation of the sample. Difference: ours {MINUS} paper."
    shown = {id(row.group) for table in parts for row in table.rows}
    others = list(dict.fromkeys(group.title for group in found if id(group) not in shown))
    notes = [f"Percent. The paper: {PAPER}. {methods}"]
    return notes + ([f"In none of these tables: {', '.join(others)}."] if others else [])


def _paper_grid(table: tables.Table, names: Mapping[Path, str]) -> Grid:
    columns = ["method", *(name for _ in table.metrics for name in ("paper", "ours", "difference"))]
    rows: list[list[Cell]] = []
    for row in table.rows:
        group = row.group
        name: Cell = tables.label(row.method)
        cells: list[Cell] = []
        for cell in row.cells:
            ours = _mean(cell.ours, table.digits)
            if cell.ours is not None and group is not None and cell.ours.n != len(group.entries):
                ours += f" (n = {cell.ours.n})"
            printed = NONE if cell.paper is None else f"{cell.paper:.{table.digits}f}"
            cells += [printed, f"† {ours}" if cell.foreign else ours, _signed(cell.difference, table.digits)]
        if group is not None:
            of_row = [names[entry.run.path] for entry in group.entries]
            more = f" and {len(of_row) - 3} more" if len(of_row) > 3 else ""
            name = [tables.label(row.method), Small(", ".join(of_row[:3]) + more)]
        epochs = NONE if group is None else _value(group.epochs)
        seeds = NONE if group is None else str(len(group.entries))
        rows.append([name, *cells, epochs, seeds, _row_notes(row, table.metrics)])
    over = [("", 1), *((metric.name, 3) for metric in table.metrics), ("", 3)]
    ours_at = frozenset(place for place, row in enumerate(table.rows) if row.group is not None)
    return Grid(
        table.protocol,
        [*columns, "epochs", "seeds", "notes"],
        rows,
        over,
        ours_at,
    )


def _row_notes(row: tables.Row, metrics: Sequence[tables.Metric]) -> list[str | tuple[str, ...]]:
    """What is to be known of a row's numbers, and what makes those that are missing; what holds of all is said once."""
    found: dict[str, list[str]] = {}
    for cell, metric in zip(row.cells, metrics, strict=True):
        for remark in cell.remarks:
            found.setdefault(f"† {remark}" if cell.foreign else remark, []).append(metric.name)
        if cell.command is not None:
            found.setdefault(Code(cell.command), []).append(metric.name)
    of_all = len(metrics)
    notes: list[str | tuple[str, ...]] = [
        text if len(of) == of_all else (f"{', '.join(of)}:", text) for text, of in found.items()
    ]
    unfinished = {entry.seed: entry.unfinished for entry in (row.group.entries if row.group is not None else ())}
    notes += [f"seed {seed} unfinished: {why}" for seed, why in unfinished.items() if why is not None]
    return notes


def _paper(found: Sequence[Group]) -> str:
    names, every = _names(found), tables.tables(found)
    parts = [f"<p>{_escaped(note)}</p>" for note in _of_the_paper(found, every)]
    for table in every:
        heading, grid = _escaped(f"Table {table.number}: {table.title}"), _paper_grid(table, names).html()
        folded = f"<details><summary>{heading} <small>no run of ours</small></summary>{grid}</details>"
        parts.append(f"<h3>{heading}</h3>{grid}" if table.has_ours else folded)
    return "".join(parts)


PARTS = (
    ("runs", "Runs", _runs),
    ("loss", "Loss", _loss),
    ("online", "Accuracy while training", _online),
    ("views", "Augmented views", _views),
    ("paper", TABLES, _paper),
)
"""(anchor, heading, function from groups to html or "")."""


def _colours() -> str:
    light, dark = ("".join(f"--{name}: {value}; " for name, value in colours.items()) for colours in (LIGHT, DARK))
    return f":root {{ color-scheme: light dark; {light}}}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}"
