"""report.html: one self-contained file that a person looks at, and mails."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_pipeline import __version__
from ssl_pipeline.exits import BadInput
from ssl_pipeline.run_folder import RunFolder, read_lines

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .9rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid; }
tbody tr + tr td { border-top: 1px solid #8886; } img { max-width: 100%; height: auto; background: #fff; }
figure { margin: 1rem 0; overflow-x: auto; } figcaption { font-size: .9rem; opacity: .8; } code { font-size: .9em; }
"""


def write(
    run: RunFolder, title: str, columns: Sequence[str], rows: Mapping[str, Sequence[float | None]], note: str
) -> Path:
    """Write RUN/report.html: a table of `rows` under `columns`, the loss curve, and the augmented views.

    Raises BadInput where matplotlib is missing.
    """
    metrics = read_lines(run.metrics)
    last = metrics[-1] if metrics else {}
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(note)}</p>",
        _table(columns, rows),
        _figure(_loss_curve(metrics), "Loss, the mean over the steps between two logged ones, against the step."),
    ]
    if run.views.is_file():
        parts.append(
            _figure(run.views.read_bytes(), "Views of the first pictures as the network sees them: a row a picture.")
        )
    facts = (
        "step",
        "epoch",
        "loss",
        "embedding_std",
        "sparse_penalty",
        "head_groups_inactive",
        "skipped",
        "bad_pictures",
    )
    shown = {name: last[name] for name in facts if last.get(name) is not None}
    parts.append("<h2>The last logged step</h2>" + _table(["", "value"], {k: [v] for k, v in shown.items()}, digits=4))
    parts.append(
        f"<p><small>ssl_pipeline {__version__}; run folder <code>{html.escape(str(run.path))}</code></small></p>"
    )
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )
    path = run.path / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def of_run(run: RunFolder) -> Path:
    """Write RUN/report.html from what lies in RUN/results. Raises BadInput where the folder is no run."""
    method = run.read_config()["method"]["name"]
    rows = {
        f"{name}: {key}": [value]
        for name, values in run.read_results().items()
        for key, value in values.items()
        if isinstance(value, (int, float))
    }
    note = "Accuracies in percent on the held-out pictures." if rows else "No evaluation has written a result yet."
    return write(run, f"{method}: {run.path.name}", ["evaluation", "%"], rows, note)


def _table(columns: Sequence[str], rows: Mapping[str, Sequence[float | None]], digits: int = 1) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><td>{html.escape(name)}</td>{''.join(f'<td>{_number(v, digits)}</td>' for v in values)}</tr>"
        for name, values in rows.items()
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"


def _figure(png: bytes, caption: str) -> str:
    source = base64.b64encode(png).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{source}"><figcaption>{text}</figcaption></figure>'


def _loss_curve(metrics: Sequence[Mapping[str, Any]]) -> bytes:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput("the report needs matplotlib: pip install 'ssl-pipeline[demo]'") from None
    points = [(row["step"], row["loss"]) for row in metrics if row.get("loss") is not None]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([step for step, _ in points], [loss for _, loss in points], color="black", linewidth=1.5)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
