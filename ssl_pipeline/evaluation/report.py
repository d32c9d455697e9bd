"""report.html and report.md: our numbers beside the paper's, for a person to look at, and to mail.

report.html is one file that loads nothing, and forbids the browser to. It is made of parts, each a function from groups of
runs to html, or to "" where there is nothing to show: another part is one more function in PARTS.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.metadata
import io
import itertools
import logging
import math
import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ssl_pipeline import __version__
from ssl_pipeline.evaluation import pictures, tables
from ssl_pipeline.evaluation.compare import differing, environment, shown
from ssl_pipeline.evaluation.pictures import DARK, LIGHT
from ssl_pipeline.evaluation.tables import Entry, Group, label
from ssl_pipeline.exits import BadInput, Status, printable
from ssl_pipeline.run_folder import RunFolder, duration, refused, require_writable

log = logging.getLogger("ssl_pipeline")

NONE, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
TABLES = "Tables 1 to 3 of the paper"
PAPER = "Song et al. 2023, “Towards the Sparseness of Projection Head in Self-Supervised Learning”, arXiv 2307.08913"

FIRST_MEASURES = ("_effective_rank", "_rankme", "_std", "_uniformity")
"""Of the held-out measures, those whose curves are not folded."""

WIDTH = 11.5
"""Of a figure of curves in inches, 100 pixels of the page each."""

FEW = 6
"""Points of a curve, below which each is marked."""

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
.lead { font-size: 1.125rem; }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1.25rem 0 0; }
.tiles div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.tiles + .remarks { padding: 0; }
.tiles dt { color: var(--faint); font-size: .875rem; }
.tiles dd { margin: 0; font-size: 1.75rem; font-weight: 600; line-height: 1.2; font-variant-numeric: tabular-nums; }
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
th small { display: block; width: 0; min-width: max(100%, 11rem); white-space: normal; overflow-wrap: anywhere; }
.remarks { width: 0; min-width: max(100%, min(18rem, 100vw - 3rem)); margin: .4rem 0 0; padding: 0 .5rem; }
details { margin: .25rem 0; } details .grid { margin: .5rem 0 1.5rem -.5rem; }
summary { cursor: pointer; padding: .35rem 0; } summary small { margin-left: .5rem; }
figure { margin: 0; } figcaption { margin-top: .5rem; max-width: 44rem; }
img { display: block; height: auto; }
.curve img { width: 72rem; max-width: 100%; min-width: 46rem; } .curve + .curve { margin-top: 2rem; }
.drawn { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); gap: 2rem 2.5rem; }
.drawn figure { max-width: 46rem; min-width: 0; } .drawn img { width: 100%; } .drawn .scroll img { min-width: 30rem; }
.drawn + .grid, p + .drawn { margin-top: 1rem; }
.views { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; margin-top: 1rem; }
.views figure { max-width: 100%; } .views img { max-width: 100%; max-height: 34rem; }
.views figcaption { max-width: 16rem; }
footer { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--rule); }
@media (max-width: 40rem) { body { padding: 1.5rem 1rem 3rem; } h1 { font-size: 1.5rem; } h2 { margin-top: 2.5rem; }
  th, td { padding: .32rem .5rem; } .first { padding-left: 1rem; }
  table:has(.over) tbody th { max-width: 8rem; white-space: normal; } table:has(.over) th small { min-width: 100%; }
  td.lines { min-width: 14rem; } }
@media print { :root { color-scheme: light; } body { max-width: none; padding: 0; font-size: .8125rem; }
  .scroll { overflow: visible; } nav { display: none; }
  h2, h3, summary, caption { break-after: avoid; } figure, tr, .tiles, .remarks { break-inside: avoid; }
  .curve img, .drawn .scroll img { min-width: 0; } tbody th, caption span { position: static; }
  details::details-content { content-visibility: visible; height: auto; } }
"""


def write(
    runs: Sequence[RunFolder],
    folder: Path | None = None,
    title: str | None = None,
    note: str | None = None,
    complete: tables.Complete = dict,
) -> list[Path]:
    """Write report.html and report.md: of one run into it, of several into `folder` (default: the current one).

    Raises BadInput where a folder is no run or matplotlib is missing, and as `run_folder.refused`.
    """
    alone = len({run.path.resolve() for run in runs}) == 1
    folder = folder or (runs[0].path if alone else Path())
    require_writable(folder)
    texts = {"report.html": page(runs, title, note, complete), "report.md": markdown(runs, title, note, complete)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            partial = folder / f".{name}.partial"
            partial.unlink(missing_ok=True)
            with partial.open("x", encoding="utf-8", errors="backslashreplace") as file:  # never through another's link
                file.write(text)
            os.replace(partial, folder / name)
    except OSError as error:
        raise refused(folder, error) from None
    return [folder / name for name in texts]


def page(
    runs: Sequence[RunFolder], title: str | None = None, note: str | None = None, complete: tables.Complete = dict
) -> str:
    """The whole of report.html. Raises BadInput where a folder is no run or matplotlib is missing."""
    found = tables.groups(runs, complete)
    title = title or _title(found)
    parts = []
    for key, heading, part in PARTS:
        log.info("report: %s", heading)
        parts += [(key, heading, text)] if (text := part(found)) else []
    links = "".join(f'<a href="#{key}">{heading}</a>' for key, heading, _ in parts)
    body = [f"<header><h1>{_escaped(title)}</h1>", *(f"<p>{_escaped(line)}</p>" for line in _notes(found, note))]
    body += [f'<nav aria-label="Parts of this report">{links}</nav></header><main>']
    body += [f'<section id="{key}"><h2>{heading}</h2>{text}</section>' for key, heading, text in parts]
    body.append(f"</main><footer>{_escaped(_made_by())}</footer>")
    style = f"{_colours()}{STYLE}"
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    allowed = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{allowed}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{_escaped(title)}</title><style>{style}</style></head>\n"
        f"<body>{''.join(body)}</body></html>\n"
    )


def markdown(
    runs: Sequence[RunFolder], title: str | None = None, note: str | None = None, complete: tables.Complete = dict
) -> str:
    """The whole of report.md: report.html without its pictures. Raises BadInput where a folder is no run."""
    found = tables.groups(runs, complete)
    names, every = _names(found), tables.tables(found)
    lines = [f"# {_plain(title or _title(found))}", *map(_plain, _notes(found, note))]
    lines += ["## Summary", _summary_grid(found).markdown()]
    for heading, grids in (
        ("Results", _results_grids(found)),
        ("Measures", _measures_grids(found)),
        ("Spectra", _spectra_grids(found)),
    ):
        lines += [f"## {heading}", *(grid.markdown() for grid in grids)] if grids else []
    lines += ["## Config", *map(_plain, _config_notes(found)), *(grid.markdown() for grid in _config_grids(found))]
    around = _environment_grid(found)
    lines += ["## Environment", around.markdown()] if around.rows else []
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
        small, large = 0 < abs(value) < 1, 1e6 <= abs(value) < math.inf
        return (f"{value:#.3g}" if small else f"{value:.2e}" if large else f"{value:.{digits}f}").replace("-", MINUS)
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


# ------------------------------------------------------------------------------------------------------------- summary
def _summary_grid(found: Sequence[Group]) -> Grid:
    """A row a run: what it is, how it ended, its numbers, what it took."""
    names, entries = _names(found), _entries(found)
    numbers = [tables.headlines(entry) for entry in entries]
    heads = list(dict.fromkeys(name for of in numbers for name in of))
    facts = [_facts(entry) for entry in entries]
    known = [key for key in facts[0] if any(of[key] != NONE for of in facts)]
    rows: list[list[Cell]] = []
    for entry, of, fact in zip(entries, numbers, facts, strict=True):
        what = f"{tables.Group((entry,)).title}, {_value(entry.options.get('epochs'))} epochs"
        values = [_headline(of[name]) if name in of else NONE for name in heads]
        name: Cell = [names[entry.run.path], Small(what)]
        rows.append([name, *values, entry.state, *(fact[key] for key in known)])
    marked = any(changed for of in numbers for _, changed in of.values())
    remarks = ["Percent, on held-out pictures"] * bool(heads) + ["† the recipe of this number was changed"] * marked
    return Grid("The runs", ["run", *heads, "state", *known], rows, remarks=remarks)


def _headline(number: tuple[float, bool]) -> str:
    value, changed = number
    return f"{'† ' * changed}{value:.2f}"


def _facts(entry: Entry) -> dict[str, str]:
    cost = tables.cost(entry)
    return {
        "seed": str(entry.seed),
        "steps done": f"{entry.done:,}" + ("" if entry.steps is None else f" / {entry.steps:,}"),
        "hardware": "; then ".join(entry.hardware) or NONE,
        "training time": duration(cost.seconds) if cost.seconds else NONE,
        "GPU-hours": _hours(cost.gpu_hours),
        "process-hours": _hours(cost.process_hours),
    }


def _summary(found: Sequence[Group]) -> str:
    """Of one run a sentence and its numbers; of several a table."""
    grid = _summary_grid(found)
    if len(grid.rows) > 1:
        return grid.html()
    (entry,) = _entries(found)
    numbers, facts = tables.headlines(entry), _facts(entry)
    took = f" in {facts['training time']}" if facts["training time"] != NONE else ""
    on = f" on {facts['hardware']}" if facts["hardware"] != NONE else ""
    lead = [
        found[0].title,
        str(entry.options.get("backbone.name") or "a backbone without a name"),
        f"{_value(entry.options.get('epochs'))} epochs",
        f"seed {entry.seed}.",
    ]
    text = f"{', '.join(lead)} {entry.state[:1].upper()}{entry.state[1:]}: {facts['steps done']} steps{took}{on}."
    tiles = {name: _headline(number) for name, number in numbers.items()}
    hours = {key: facts[key] for key in ("GPU-hours", "process-hours") if facts[key] != NONE}
    cells = [
        f"<div><dt>{_escaped(name)}</dt><dd>{_escaped(value)}</dd></div>" for name, value in (tiles | hours).items()
    ]
    remarks = f'<p class="remarks">{_escaped("; ".join(grid.remarks))}</p>' if grid.remarks else ""
    return f'<p class="lead">{_escaped(text)}</p><dl class="tiles">{"".join(cells)}</dl>{remarks}'


# ------------------------------------------------------------------------------------------------------- what a run did
def _results_grids(found: Sequence[Group]) -> list[Grid]:
    """Results and the last logged step, a column a run; of several seeds of one config their mean too."""
    names, entries = _names(found), _entries(found)
    if len(found) > 1:
        heads = [[names[entry.run.path] for entry in group.entries] for group in found]
    else:
        heads = [[f"seed {entry.seed}" for entry in group.entries] if len(entries) > 1 else [""] for group in found]
    every = dict.fromkeys(name for entry in entries for name in entry.results)
    files = [name for name in every if not name.startswith(("spectrum", "analysis"))]  # which have parts of their own
    grids = [grid for file in files for grid in _of_file(file, found, heads)]

    last = [next(iter(entry.training_rows[::-1]), {}) for entry in entries]
    shown = [name for name in LAST_STEP if any(row.get(name) is not None for row in last)]
    if shown:
        rows = [[name, *(_value(row.get(name), digits=4) for row in last)] for name in shown]
        grids.append(Grid("The last logged step", ["", *(head for of in heads for head in of)], rows))
    return grids


def _of_file(file: str, found: Sequence[Group], heads: Sequence[Sequence[str]]) -> Iterator[Grid]:
    """The tables of one file in results/: one of all runs' plain values, and one a run of nested mappings and of rows."""
    of_groups = [
        [{k: v for k, v in entry.results.get(file, {}).items() if k != "recipe"} for entry in group.entries]
        for group in found
    ]  # the recipe is in the JSON
    of_runs = list(zip(itertools.chain(*heads), itertools.chain(*of_groups), strict=True))
    several = len(of_runs) > 1
    flat = dict.fromkeys(
        key
        for _, values in of_runs
        for key, value in values.items()
        if key != "changed" and not isinstance(value, Mapping) and not _is_rows(value)
    )
    remarks = [
        f"changed{f', {head}' if several else ''}: {', '.join(recipe)}"
        for head, values in of_runs
        if (recipe := tables.changed(values))
    ]
    rows: list[list[Cell]] = []
    for key in flat:
        known = [(head, value) for head, values in of_runs if (value := values.get(key)) is not None]
        if key == "ranks" or any(isinstance(value, str) for _, value in known):  # how it was measured, not what
            alike = len({_value(value) for _, value in known}) == 1
            remarks += (
                [f"{key}: {_value(known[0][1])}"] if alike else [f"{key}, {head}: {_value(v)}" for head, v in known]
            )
        else:
            rows.append([key, *(cell for group in of_groups for cell in _values_and_mean(key, group))])
    if rows or remarks:
        columns = ["", *(c for of in heads for c in (*of, *["mean ± deviation"] * (len(of) > 1)))]
        spans = [(group.title, len(of) + (len(of) > 1)) for group, of in zip(found, heads, strict=True)]
        over = [("", 1), *spans] if len(found) > 1 and any(span > 1 for _, span in spans) else []
        yield Grid(f"results/{file}.json", columns, rows, over, remarks=remarks)
    for head, values in of_runs:
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


def _values_and_mean(key: str, seeds: Sequence[Mapping[str, Any]]) -> list[str]:
    """A key's value of each seed and, of several, their mean; numbers of different recipes are not averaged."""
    found = [values.get(key) for values in seeds]
    if len(found) == 1:
        return [_value(found[0])]
    alike = len({tables.changed(values) for values in seeds if values}) == 1
    mean = tables.statistic([number for value in found if (number := tables.number(value)) is not None])
    return [*map(_value, found), _mean(mean if alike else None)]


def _is_rows(value: Any) -> bool:
    """Whether a value is a list of mappings, as the heads of a grid."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _leaves(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Values by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _leaves(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return found


def _results(found: Sequence[Group]) -> str:
    grids = "".join(grid.html() for grid in _results_grids(found))
    return f'<div class="grids">{grids}</div>' if grids else ""


# ------------------------------------------------------------------------------------------------ config and environment
def _config_notes(found: Sequence[Group]) -> list[str]:
    """What is to be read before the tables of differences."""
    entries = _entries(found)
    if len(entries) > 1:
        equal = not differing([entry.options for entry in entries])
        return ["The configs of all runs are equal."] if equal else []
    (packaged,) = (entry.packaged for entry in entries)
    if packaged is None:
        return ["No packaged config is of this method and data set."]
    return [] if _from_packaged(entries[0]) else [f"Equal to the packaged config {packaged[0]}."]


def _from_packaged(entry: Entry) -> dict[str, list[Any]]:
    """Options that differ from those of the nearest packaged config; where the pictures lie says nothing."""
    assert entry.packaged is not None
    pairs = differing([entry.packaged[1], entry.options])
    return {key: values for key, values in pairs.items() if key != "data.root"}


def _config_grids(found: Sequence[Group]) -> list[Grid]:
    """Of several runs the options that differ, aligned; of one, what differs from the nearest packaged config."""
    names, entries = _names(found), _entries(found)
    if len(entries) > 1:
        pairs = differing([entry.options for entry in entries])
        columns = ["option", *(names[entry.run.path] for entry in entries)]
        rows: list[list[Cell]] = [[key, *map(_option, values)] for key, values in pairs.items()]
        of: list[Cell] = []
        for entry in entries:
            nearest = entry.packaged and entry.packaged[0]
            of.append(NONE if nearest is None else f"{nearest}, {len(_from_packaged(entry))} differ")
        rows.append(["nearest packaged config", *of])
        files: list[Cell] = [Code(entry.run.config) for entry in entries]
        return [Grid("Options that differ among the runs", columns, [*rows, ["file", *files]])]
    (entry,) = entries
    file = f"All options: {entry.run.config}"
    if entry.packaged is None or not (pairs := _from_packaged(entry)):
        return [Grid("The config of this run", ["", ""], [["file", Code(entry.run.config)]])]
    rows = [[key, *map(_option, values)] for key, values in pairs.items()]
    name = entry.packaged[0]
    return [
        Grid(
            f"What differs from {name}, the nearest packaged config", ["option", name, "this run"], rows, remarks=[file]
        )
    ]


def _option(value: Any) -> str:
    return shown(value).replace("-", MINUS) if isinstance(value, (int, float)) else shown(value)


def _config(found: Sequence[Group]) -> str:
    notes = "".join(f"<p>{_escaped(note)}</p>" for note in _config_notes(found))
    return notes + "".join(grid.html() for grid in _config_grids(found))


def _environment_grid(found: Sequence[Group]) -> Grid:
    """A column a run: versions, machines, starts and ends, hours."""
    names, entries = _names(found), _entries(found)
    sides = [{**environment(entry), **_history(entry)} for entry in entries]
    keys = dict.fromkeys(key for side in sides for key in side)
    rows: list[list[Cell]] = [[key, *(_known(side.get(key)) for side in sides)] for key in keys]
    return Grid("Where and how it ran", ["", *(names[entry.run.path] for entry in entries)], rows)


def _known(value: Any) -> str:
    """A value, or the values of one start after another."""
    if value is None:
        return NONE
    return ", then ".join(map(shown, value)) if isinstance(value, list) else shown(value)


def _history(entry: Entry) -> dict[str, Any]:
    """How often it started and ended, and what that took; what never happened is left out."""
    cost = tables.cost(entry)
    events = [event for event in entry.events if isinstance(event.get("event"), str)]
    times = [str(event["time"])[:16].replace("T", " ") for event in entry.starts + _ends(entry) if "time" in event]
    counts = {
        "starts": len(entry.starts),
        "of these from a checkpoint": sum(bool(start.get("step")) for start in entry.starts),
        "stopped by a signal": sum(end.get("status") == Status.STOPPED for end in _ends(entry)),
        "rolled back": sum(event["event"] == "rollback" for event in events),
        "ranks lost": sum(event["event"] == "rank_lost" for event in events),
        "nodes excluded": sum(event["event"] == "excluded" for event in events),
    }
    hours = {"GPU-hours": cost.gpu_hours, "process-hours": cost.process_hours}
    return {
        **({"first start": f"{times[0]} UTC", "last start or end": f"{times[-1]} UTC"} if times else {}),
        **{name: count for name, count in counts.items() if count},
        **({"training time": duration(cost.seconds)} if cost.seconds else {}),
        **{name: _hours(value) for name, value in hours.items() if value},
    }


def _ends(entry: Entry) -> list[Mapping[str, Any]]:
    return [event for event in entry.events if event.get("event") == "end"]


def _environment(found: Sequence[Group]) -> str:
    grid = _environment_grid(found)
    return grid.html() if grid.rows else ""


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


def _curves(found: Sequence[Group], panels: Sequence[Panel], caption: str, columns: int = 1) -> str:
    """A figure of panels against the step, a line a run, of one look in all panels; "" where nothing is logged.

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
    text = _escaped(caption)
    picture = _picture(*_draw(drawn, list(names.values()), columns), caption)
    return (
        f'<figure class="curve"><div class="scroll" tabindex="0" role="region" aria-label="{text}">{picture}</div>'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _picture(light: bytes, dark: bytes, words: str) -> str:
    """Two PNGs of the same: a line in a colour for white paper cannot be seen on black. Paper is white in print."""
    return (
        f'<picture><source srcset="{_data(dark)}" media="screen and (prefers-color-scheme: dark)">'
        f'<img src="{_data(light)}" alt="{_escaped(words)}"></picture>'
    )


def _draw(
    panels: Sequence[tuple[Panel, Mapping[str, Sequence[tuple[int, float]]]]], names: Sequence[str], columns: int = 1
) -> tuple[bytes, bytes]:
    """PNGs of panels, each with {name of the line: points}, for white and black paper; `names` are those of all lines."""
    columns = min(columns, len(panels))
    shown = [name for name in names if any(name in named for _, named in panels)]
    keys = 0.21 * math.ceil(len(shown) / 3) * (len(shown) > 1)
    made, places = [], None
    for palette in (LIGHT, DARK):
        with pictures.figure(WIDTH, 2.9 * math.ceil(len(panels) / columns) + keys, palette) as figure:
            import matplotlib
            from matplotlib.ticker import MaxNLocator

            looks = list(matplotlib.rcParams["axes.prop_cycle"])
            every = list(figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False).flat)
            lines = {}
            for axes, (panel, named) in zip(every, panels, strict=False):
                for name, points in named.items():
                    look = looks[names.index(name) % len(looks)]
                    marker = "o" if len(points) < FEW else None
                    (lines[name],) = axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, **look)
                axes.set(title=printable(panel.title), ylabel=printable(panel.label), xlabel="step")
                axes.xaxis.set_major_locator(MaxNLocator(12 // columns, steps=[1, 2, 5, 10], integer=True))
                axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
            for axes in every[len(panels) :]:
                axes.set_visible(False)
            if len(shown) > 1:  # a name that begins with _ would be left out
                figure.legend(
                    [lines[name] for name in shown],
                    [f" {printable(name)}" for name in shown],
                    loc="outside lower left",
                    ncols=3,
                )
            if places is not None:  # laying out takes most of the time
                figure.set_layout_engine("none")
                for axes, place in zip(every, places, strict=True):
                    axes.set_position(place)
            made.append(pictures.png(figure))
            places = [axes.get_position() for axes in every]
    return made[0], made[1]


def _data(png: bytes) -> str:
    """Address of a drawing: a PNG of at most 128 colours, which halves it. The best compression would take seconds."""
    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(png), formats=["PNG"]).convert("RGB")
    image.quantize(128, dither=Image.Dither.NONE).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _photo(png: bytes) -> str:
    """Address of pictures, twice as large as they are shown: a JPEG. Raises what Pillow does where it is no PNG."""
    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(png), formats=["PNG"]).convert("RGB")
    image.thumbnail((1200, 1000))
    image.save(buffer, "JPEG", quality=75, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _loss(found: Sequence[Group]) -> str:
    """A panel for each method and data set: losses of different methods have different units."""
    panels: dict[str, list[Entry]] = {}
    for entry in _entries(found):
        bare = label(entry.method.removesuffix("_sparsehead")) + (f" on {label(entry.data)}" if entry.data else "")
        panels.setdefault(bare, []).append(entry)
    caption = "Loss without the penalty, the mean over the steps between two logged ones, against the step."
    return _curves(
        found, [Panel(title * (len(panels) > 1), "loss", "loss", of) for title, of in panels.items()], caption, 2
    )


def _online(found: Sequence[Group]) -> str:
    """Of each kind of accuracy a figure, with a panel for each accuracy and data set."""
    logged = {key for entry in _entries(found) for row in entry.rows for key in row}
    keys = sorted(key for key in logged if key.startswith("online_") and "_top" in key)
    panels: dict[str, list[Entry]] = {}
    for entry in _entries(found):
        panels.setdefault(tables.label(entry.data) if entry.data else "", []).append(entry)
    figures = []
    for neighbours, caption in ((True, ONLINE_KNN), (False, ONLINE_LINEAR)):
        of_kind = [key for key in keys if key.startswith("online_knn") == neighbours]
        every = [
            Panel(data * (len(panels) > 1), _accuracy(key), key, of) for key in of_kind for data, of in panels.items()
        ]
        figures.append(_curves(found, every, caption, columns=2))
    return "".join(figures)


def _accuracy(key: str) -> str:
    """`online_knn5_top1` as `5-nn top-1, %`, and `online_top1` as `online linear top-1, %`."""
    what, _, top = key.removeprefix("online_").rpartition("top")
    neighbours = what.removeprefix("knn").removesuffix("_")
    return f"{f'{neighbours}-nn' if neighbours else 'online linear'} top-{top}, %"


def _held_out(found: Sequence[Group]) -> str:
    """A panel for each measure, of the representation beside that of the embedding; but the first ones, folded."""
    logged = {key for entry in _entries(found) for row in entry.rows for key in row if key.startswith("heldout_")}
    order = sorted(
        logged, key=lambda key: (key.partition("_")[2].partition("_")[2], key.startswith("heldout_embedding_"))
    )
    every = [Panel("", key.removeprefix("heldout_").replace("_", " "), key, _entries(found)) for key in order]
    first = [panel for panel in every if panel.key.endswith(FIRST_MEASURES)]
    others = [panel for panel in every if panel not in first]
    words = "Measured on held-out pictures while it was trained, against the step."
    shown, folded = (_curves(found, panels, words, columns=4) for panels in (first, others))
    many = f"<details><summary>The other measures</summary>{folded}</details>"
    return shown + many if shown and folded else shown + folded


def _entries(found: Sequence[Group]) -> list[Entry]:
    return [entry for group in found for entry in group.entries]


def _of_kind(entry: Entry, kind: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Results of a run whose file is of this name, or begins with it, and what follows."""
    for file, values in entry.results.items():
        if file == kind or file.startswith(f"{kind}_"):
            yield file.removeprefix(kind).replace("_", " "), values


def _layers(found: Sequence[Group]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Spectra by the name of the run, of the layers r and z: those measured alone, and where there is none an analysis's."""
    names = _names(found)
    lines: dict[str, dict[str, Mapping[str, Any]]] = {}
    for entry in _entries(found):
        analysed = [(more, _inside(values, "pictures", "spectrum")) for more, values in _of_kind(entry, "analysis")]
        for more, values in [*_of_kind(entry, "spectrum")] or analysed:
            layers = {layer: of for layer in ("r", "z") if isinstance(of := _inside(values, layer), Mapping) and of}
            lines |= {names[entry.run.path] + more: layers} if layers else {}
    return lines


def _spectra_grids(found: Sequence[Group]) -> list[Grid]:
    every = {f"{name}, {layer}": of for name, layers in _layers(found).items() for layer, of in layers.items()}
    columns = list(dict.fromkeys(key for of in every.values() for key, value in of.items() if key != "eigenvalues"))
    rows: list[list[Cell]] = [[name, *(_value(of.get(key)) for key in columns)] for name, of in every.items()]
    return [Grid("Eigenvalues above a share of the largest", ["", *columns], rows)] if rows else []


def _spectra(found: Sequence[Group]) -> str:
    """One picture of all spectra."""
    if not (lines := _layers(found)):
        return ""
    words = "Eigenvalues of the covariance of the representations r and the embeddings z, the largest first."
    grids = "".join(grid.html() for grid in _spectra_grids(found))
    return f'<div class="drawn">{_figure(partial(pictures.spectrum, lines), words)}</div>{grids}'


def _measures_grids(found: Sequence[Group]) -> list[Grid]:
    """What analyses measured: of representation and embedding, and of the head, a run beside the other."""
    names = _names(found)
    every = [(names[e.run.path] + more, values) for e in _entries(found) for more, values in _of_kind(e, "analysis")]
    spaces = ("representation", "embedding")
    of_space: list[tuple[str, str, dict[str, Any]]] = []
    of_head: list[tuple[str, dict[str, Any]]] = []
    for name, values in every:
        of = {space: _beginning(values, f"{space}_") for space in spaces}
        of_space += [(name, space, numbers) for space, numbers in of.items() if numbers]
        of_head += [(name, numbers)] if (numbers := _beginning(values, "head_")) else []
    grids = []
    if of_space:
        keys = dict.fromkeys(key for *_, numbers in of_space for key in numbers)
        rows: list[list[Cell]] = [
            [key.replace("_", " "), *(_value(of.get(key)) for *_, of in of_space)] for key in keys
        ]
        spans = Counter(name for name, *_ in of_space)
        over = [("", 1), *spans.items()]
        grids.append(Grid("Measured on held-out pictures", ["", *(space for _, space, _ in of_space)], rows, over))
    if of_head:
        keys = dict.fromkeys(key for _, numbers in of_head for key in numbers)
        rows = [[key.replace("_", " "), *(_value(of.get(key)) for _, of in of_head)] for key in keys]
        grids.append(Grid("The last layer of the head", ["", *(name for name, _ in of_head)], rows))
    return grids


def _beginning(values: Mapping[str, Any], before: str) -> dict[str, Any]:
    """Numbers whose key begins so, by the rest of it; counts, which results hold as floats, without decimals."""
    found = {
        k.removeprefix(before): v for k, v in values.items() if k.startswith(before) and tables.number(v) is not None
    }
    return {key: int(value) if value == int(value) and abs(value) < 1e6 else value for key, value in found.items()}


def _measures(found: Sequence[Group]) -> str:
    grids = "".join(grid.html() for grid in _measures_grids(found))
    return f'<div class="grids">{grids}</div>' if grids else ""


def _inside(values: Any, *keys: str) -> Any:
    """What lies in nested mappings; {} where it does not."""
    for key in keys:
        values = values.get(key, {}) if isinstance(values, Mapping) else {}
    return values


def _analysed(key: str, words: str, draw: Callable[..., bytes]) -> Callable[[Sequence[Group]], str]:
    """A part with a picture a run of what lies in its analysis.json under `pictures`."""

    def part(found: Sequence[Group]) -> str:
        names = _names(found)
        figures = []
        for entry in _entries(found):
            for more, values in _of_kind(entry, "analysis"):
                if data := _inside(values, "pictures", key):
                    figures.append(_figure(partial(draw, data), f"{names[entry.run.path]}{more}"))
        return f'<p>{words}</p><div class="drawn">{"".join(figures)}</div>' if figures else ""

    return part


def _figure(draw: Callable[[pictures.Palette], bytes], words: str) -> str:
    """A picture with words below; where it cannot be drawn they say so."""
    try:
        frame = f'<div class="scroll" tabindex="0" role="region" aria-label="{_escaped(words)}">'
        picture = f"{frame}{_picture(draw(LIGHT), draw(DARK), words)}</div>"
    except BadInput:
        raise
    except Exception:  # whatever matplotlib raises of numbers that another version, or a stranger, has written
        picture, words = "", f"{words}: what lies in results/ cannot be drawn; evaluate again"
    return f"<figure>{picture}<figcaption>{_escaped(words)}</figcaption></figure>"


def _stored(found: Sequence[Group], file: Callable[[RunFolder], Path], intro: str, kind: str) -> str:
    """A PNG a run that lies in its folder."""
    names = _names(found)
    figures = []
    for entry in _entries(found):
        path, name = file(entry.run), names[entry.run.path]
        if path.is_file():
            try:
                image = f'<img src="{_photo(path.read_bytes())}" alt="{_escaped(f"{intro}, run {name}")}">'
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # Pillow's, of damaged files
                image, name = "", f"{name}: {path.name} is no picture"
            figures.append(f"<figure>{image}<figcaption>{_escaped(name)}</figcaption></figure>")
    return f'<p>{intro}</p><div class="{kind}">{"".join(figures)}</div>' if figures else ""


def _views(found: Sequence[Group]) -> str:
    intro = "The first pictures as the network sees them: a row a picture, a column a view"
    return _stored(found, lambda run: run.views, intro, "views")


def _neighbours(found: Sequence[Group]) -> str:
    intro = "Held-out pictures, and those whose representations are nearest by cosine"
    return _stored(found, lambda run: run.results / "neighbours.png", intro, "drawn")


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


ONLINE_KNN = "Nearest neighbours on some held-out pictures while it was trained, in percent, against the step."
ONLINE_LINEAR = (
    "Online linear probe on augmented training batches, in percent, against the step; not a result: "
    "the means over batches of a classifier that is trained along with the backbone."
)
COSINES = "Cosines of two views of a picture, and of views of two pictures, on held-out pictures."
PARTS = (
    ("summary", "Summary", _summary),
    ("results", "Results", _results),
    ("loss", "Loss", _loss),
    ("online", "Accuracy while training", _online),
    ("heldout", "Measures while training", _held_out),
    ("paper", TABLES, _paper),
    ("measures", "Measures", _measures),
    ("spectra", "Spectra", _spectra),
    ("head", "Head", _analysed("group_norms", "Norms of the groups of the head's layers.", pictures.group_norms)),
    ("cosines", "Cosines", _analysed("cosines", COSINES, pictures.cosines)),
    ("neighbours", "Neighbours", _neighbours),
    ("projection", "Projection", _analysed("projection", "Representations of held-out pictures.", pictures.projection)),
    ("views", "Augmented views", _views),
    ("config", "Config", _config),
    ("environment", "Environment", _environment),
)
"""(anchor, heading, function from groups to html or "")."""


def _colours() -> str:
    light, dark = (
        "".join(f"--{name}: {value}; " for name, value in asdict(palette).items() if isinstance(value, str))
        for palette in (LIGHT, DARK)
    )
    return f":root {{ color-scheme: light dark; {light}}}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}"
