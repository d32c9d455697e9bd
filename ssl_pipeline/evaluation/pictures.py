"""Pictures of a representation and of its head, in one style: functions from what lies in results/*.json to a PNG.

    with figure(7.4, 3.2, palette) as made:      # matplotlib's settings are this file's within, and as before after it
        axes = made.subplots()
        axes.plot(steps, loss, label="loss")     # the next colour and the next dashes
        return png(made)

The same data can be drawn for white and for black paper: LIGHT and DARK. Nothing is told by colour alone.
"""

from __future__ import annotations

import contextlib
import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ssl_pipeline.evaluation import measures
from ssl_pipeline.exits import BadInput, printable


@dataclass(frozen=True)
class Palette:
    """Colours, as #rrggbb."""

    paper: str
    ink: str
    """Words, and what matters most."""
    faint: str
    """Words and lines that stand back."""
    rule: str
    tint: str
    """Paper of what is set apart."""
    link: str
    lines: tuple[str, ...]
    """Of lines, in this order."""
    classes: tuple[str, ...]
    """Of the markers CLASS_MARKERS, in this order: full ones step in luminance, hollow ones and strokes stand out."""


LIGHT = Palette(
    paper="#ffffff",
    ink="#1c1e21",
    faint="#5c6168",
    rule="#d9dbde",
    tint="#f5f6f7",
    link="#0b57a4",
    lines=(
        "#1c1e21",
        "#0b62b0",
        "#c2500a",
        "#0a7f5c",
        "#8d4a94",
        "#8a7400",
        "#b3123f",
        "#4b5fd1",
        "#3d8400",
        "#7a5a44",
    ),
    classes=(
        "#14213d",
        "#0b62b0",
        "#b3123f",
        "#1c1e21",
        "#2c9460",
        "#8d4a94",
        "#f2d13c",
        "#c2500a",
        "#8fb0f5",
        "#3d6b00",
    ),
)
DARK = Palette(
    paper="#17191c",
    ink="#e4e5e7",
    faint="#a0a5ac",
    rule="#3b3f45",
    tint="#202327",
    link="#8ab8ec",
    lines=(
        "#e4e5e7",
        "#6db1f2",
        "#f0935a",
        "#4cc3a0",
        "#cf95d6",
        "#d8c250",
        "#f57a97",
        "#9aa8ff",
        "#a9c653",
        "#c9a68d",
    ),
    classes=(
        "#f4f4f4",
        "#6db1f2",
        "#4a63c8",
        "#e4e5e7",
        "#d9863a",
        "#cf95d6",
        "#8f2f6a",
        "#f0935a",
        "#58d0a8",
        "#a9c653",
    ),
)
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)))
"""As many as make, with the colours, 70 kinds of line; the first ones differ in gray too."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*", ">")
"""One a run."""
FULL, HOLLOW, STROKES = "full", "hollow", "strokes"
CLASS_MARKERS = (
    *(("o", FULL), ("s", HOLLOW), ("^", FULL), ("x", STROKES), ("D", FULL)),
    *(("v", HOLLOW), ("*", FULL), ("+", STROKES), ("P", FULL), ("o", HOLLOW)),
    *(("s", FULL), ("^", HOLLOW), ("X", FULL), ("D", HOLLOW), ("v", FULL)),
    *(("*", HOLLOW), ("p", FULL), ("P", HOLLOW), ("<", FULL), (">", HOLLOW)),
)
"""One a class, so that classes differ in gray: full ones and such that are not by turns."""

DPI = 200
"""Of the PNGs: an inch is 100 pixels of a page, so they are sharp on a screen of twice as many."""


# ---------------------------------------------------------------------------------------------------------------- style
@contextlib.contextmanager
def figure(width: float, height: float, palette: Palette = LIGHT) -> Iterator[Any]:
    """An empty matplotlib.figure.Figure of so many inches, which grows no window; what is made within has the one style.

    Lines get colour and dashes by turns. Words are no TeX: for a logarithmic axis take `log_scale`, whose numbers are
    plain. Raises BadInput where matplotlib is missing.
    """
    require_matplotlib()
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", _settings(palette)]):  # whatever the user's matplotlibrc says
        yield Figure(figsize=(round(width * DPI) / DPI, round(height * DPI) / DPI))  # whole pixels


def require_matplotlib() -> None:
    """Raises BadInput with the way out where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BadInput("pictures need matplotlib: pip install 'ssl-pipeline[demo]'") from None


def _settings(palette: Palette) -> dict[str, Any]:
    from cycler import cycler

    kinds = math.lcm(len(palette.lines), len(DASHES))
    return {
        "figure.facecolor": palette.paper,
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.hspace": 0.08,
        "savefig.dpi": DPI,
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "font.size": 10,
        "text.color": palette.ink,
        "text.parse_math": False,
        "axes.facecolor": palette.paper,
        "axes.edgecolor": palette.faint,
        "axes.labelcolor": palette.ink,
        "axes.titlecolor": palette.ink,
        "axes.titlesize": "medium",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.prop_cycle": cycler(
            color=[palette.lines[place % len(palette.lines)] for place in range(kinds)],
            linestyle=[DASHES[place % len(DASHES)] for place in range(kinds)],
        ),
        "axes.unicode_minus": True,
        "grid.color": palette.rule,
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.5,
        "xtick.color": palette.faint,
        "ytick.color": palette.faint,
        "xtick.labelcolor": palette.ink,
        "ytick.labelcolor": palette.ink,
        "xtick.major.size": 3,
        "ytick.major.size": 3,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "legend.handlelength": 3.5,
        "hatch.linewidth": 0.6,
    }


def png(made: Any) -> bytes:
    """A figure's PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def log_scale(axes: Any, which: str = "y") -> None:
    """Make the "x" or "y" axis logarithmic, its numbers as 10⁻³, or plain between 0.01 and 1,000."""
    from matplotlib.ticker import NullFormatter

    axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis.set_major_formatter(lambda value, _: _power(value))
    axis.set_minor_formatter(NullFormatter())


def _power(value: float) -> str:
    if value <= 0:
        return f"{value:g}"
    exponent = round(math.log10(value))
    if -2 <= exponent <= 3:
        return f"{value:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def source(name: str, step: int | None, split: str | None, count: int | None = None) -> str:
    """What a picture is of, as the pictures' `source` has it: "dense, step 44, val, N = 360". None is left out."""
    words = [_short(name, 60), step is not None and f"step {step}", split, count is not None and f"N = {count:,}"]
    return ", ".join(word for word in words if word)


def _say_source(made: Any, words: str, palette: Palette) -> None:
    """A faint line below all else; none for no words."""
    if words:
        made.supxlabel(textwrap.fill(words, 105), x=0.01, ha="left", fontsize=8, color=palette.faint)


# ------------------------------------------------------------------------------------------------------------- pictures
def group_norms(layers: Sequence[Mapping[str, Any]], palette: Palette = LIGHT, source: str = "") -> bytes:
    """The norm of each group of each layer, the largest first, and the threshold over which a group is active.

    Of each layer, the last one of the head being the last here too: whether its `groups` are "columns" or "rows", their
    descending `norms`, the `threshold` and the number of `active` ones. Norms within two decades are bars from 0. Others need a
    logarithmic axis, where a bar's foot would mean nothing: they are a line of steps, and a zero has no step.
    """
    with figure(7.4, 2.9 * len(layers) + 0.2 * bool(source), palette) as made:
        every = made.subplots(len(layers), squeeze=False)[:, 0]
        for number, (axes, layer) in enumerate(zip(every, layers, strict=True), start=1):
            norms, threshold, active = np.asarray(layer["norms"]), layer["threshold"], layer["active"]
            positive = norms[norms > 0]
            bars = not len(positive) or bool(positive[0] < 100 * positive[-1])
            strong: dict[str, Any] = {"fill": True, "linewidth": 0.0, "color": palette.lines[1]}
            # Hatched, so that they differ in gray.
            weak: dict[str, Any] = {"fill": True, "linewidth": 0.0, "facecolor": palette.rule, "hatch": "////"}
            if not bars:
                log_scale(axes)
                strong = {"baseline": None, "linewidth": 2.0, "color": palette.lines[1]}
                weak = {"baseline": None, "linewidth": 2.0, "linestyle": (0, (1, 0.6))}
            weak["edgecolor"] = palette.ink
            zeros = len(norms) - len(positive)
            words = f"not active: {len(norms) - active:,}" + (f", of them 0: {zeros:,}" if zeros else "")
            edges = np.arange(len(norms) + 1) + 0.5
            shown = norms if bars else np.where(norms > 0, norms, np.nan)
            if active:
                axes.stairs(shown[:active], edges[: active + 1], label=f"active: {active:,}", **strong)
            if active < len(norms):
                axes.stairs(shown[active:], edges[active:], label=words, **weak)
            if threshold > 0:
                axes.axhline(threshold, color=palette.ink, linestyle="--", label="threshold: 1 % of the largest")
            if bars:
                axes.set_ylim(0, 1.05 * norms[0] if len(positive) else 1)
            else:
                axes.set_ylim(min(positive[-1], threshold) / 2, positive[0] * 1.5)
            axes.set_xlim(edges[0], edges[-1])
            axes.set(xlabel="group, the largest first", ylabel="L2 norm of the group")
            which = "last layer" if number == len(layers) else f"linear layer {number}"
            axes.set_title(f"{which} of the head, {len(norms):,} groups ({layer['groups']} of W)")
            axes.grid(visible=False, axis="x")
            _legend(axes, columns=3)
        _say_source(made, source, palette)
        return png(made)


def cosines(spaces: Mapping[str, Mapping[str, Any]], palette: Palette = LIGHT, source: str = "") -> bytes:
    """Histograms of cosines, a panel a space ("representation", "embedding").

    Of each space: `edges` (B + 1,) of the bins, and counts (B,) of the `positive` pairs, two views of one picture, and of
    the `negative` ones, views of two pictures, with `positive_mean` and `negative_mean`.
    """
    with figure(7.4, 3.1 * len(spaces) + 0.2 * bool(source), palette) as made:
        every = made.subplots(len(spaces), squeeze=False)[:, 0]
        for axes, (name, space) in zip(every, spaces.items(), strict=True):
            edges = np.asarray(space["edges"])
            kinds: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
                (
                    "negative",
                    "views of two pictures",
                    ":",
                    {"fill": True, "facecolor": palette.rule, "edgecolor": palette.faint, "linewidth": 1.0},
                ),
                ("positive", "two views of a picture", "--", {"color": palette.lines[1], "linewidth": 2.0}),
            )
            for key, words, dashes, look in kinds:
                counts = np.asarray(space[key], dtype=float)
                if not counts.any():
                    continue
                first, last = np.flatnonzero(counts)[[0, -1]]
                share = 100 * counts / counts.sum()
                mean = space[f"{key}_mean"]
                axes.stairs(
                    share[first : last + 1],
                    edges[first : last + 2],
                    label=f"{words}, N = {counts.sum():,.0f} pairs",
                    **look,
                )
                line = {"color": look.get("color", palette.ink), "linewidth": 1.2, "linestyle": dashes}
                axes.axvline(mean, label=f"their mean: {_number(mean)}", **line)
            title = f"{name}, bins of {edges[1] - edges[0]:.2g}"
            axes.set(ylabel="share of pairs per bin, %", title=title, xlabel="cosine of the two views")
            _legend(axes, columns=2)
        _say_source(made, source, palette)
        return png(made)


def projection(data: Mapping[str, Any], palette: Palette = LIGHT, source: str = "") -> bytes:
    """Representations in two dimensions, a marker and a colour a class.

    `points` (N, 2) and the `axes`' two names; `labels` (N,), places in `classes`, or -1, for what stands back. A unit is
    as long on both axes; the picture is as high as the points need, within bounds.
    """
    points, labels = np.asarray(data["points"]).reshape(-1, 2), np.asarray(data["labels"], dtype=int)
    names = [_short(name) for name in data["classes"]]
    columns = max(min(105 // (max(map(len, names), default=0) + 8), 5), 1)
    wide, high = np.ptp(points, axis=0) if len(points) else (0.0, 0.0)
    panel = 6.6 * float(np.clip(high / wide if wide else 1.0, 0.4, 1.0))
    rows = math.ceil((len(names) + bool(names and (labels < 0).any())) / columns)
    with figure(7.4, panel + 0.9 + 0.19 * rows + 0.2 * bool(source), palette) as made:
        axes = made.subplots()
        area = float(np.clip(12_000 / max(len(points), 1), 12, 40))
        others = labels < 0
        if others.any():
            words = f"other classes: {others.sum():,}" if names else None
            colour = palette.rule if names else palette.lines[1]
            axes.scatter(*points[others].T, s=area / 2, color=colour, linewidths=0, label=words)
        for place, name in enumerate(names):
            colour = palette.classes[place % len(palette.classes)]
            marker, kind = CLASS_MARKERS[place % len(CLASS_MARKERS)]
            look: dict[str, Any] = {
                FULL: {"facecolors": colour, "edgecolors": palette.ink, "linewidths": 0.3},
                HOLLOW: {
                    "facecolors": "none",
                    "edgecolors": palette.classes[1 + place % 10 // 2 * 2],
                    "linewidths": 1.0,
                },
                STROKES: {"color": colour, "linewidths": 1.1},
            }[kind]
            size = area * (1.8 if marker == "*" else 1)
            axes.scatter(*points[labels == place].T, s=size, marker=marker, label=f" {name}", **look)
        first, second = data["axes"]
        second = textwrap.fill(second, max(round(13 * panel), 20))
        axes.set(xlabel=first, ylabel=second, title=data.get("title") or f"representations of {len(points):,} pictures")
        axes.margins(0.03)
        axes.set_aspect("equal", adjustable="datalim")
        if names:
            _legend(axes, columns, handlelength=1.5, markerscale=math.sqrt(32 / area))
        _say_source(made, source, palette)
        return png(made)


MARK, NO_MARK = "\N{CHECK MARK}", "\N{MULTIPLICATION SIGN}"


def neighbours(
    rows: Sequence[Mapping[str, Any]],
    thumbnails: Mapping[int, np.ndarray | None],
    palette: Palette = LIGHT,
    source: str = "",
) -> bytes:
    """A page of thumbnails: a row a query, and its nearest by cosine to the right of it, the nearest first.

    Of each row: `id`, its `class` (None where nothing is labelled), and its `neighbours`: mappings of `id`, `cosine` and
    `class`. `thumbnails` (H, W, 3) uint8 by id; the cell of one that is None, or not there, is empty. A neighbour of the
    query's class has a solid frame and a check mark, one of another class a dotted frame, a cross and its class below.
    """
    k = max((len(row["neighbours"]) for row in rows), default=0)
    labelled = any(row.get("class") is not None for row in rows)
    gap, high = (
        0.35,
        1.42 if labelled else 1.25,
    )  # between the query and its neighbours; of a row; in widths of a thumbnail
    foot = 0.3 if source else 0.05
    wide = k + 1 + gap
    scale = 7.4 / (wide + 0.1)
    with figure(7.4, scale * (high * len(rows) + 0.45 + foot), palette) as made:
        made.set_layout_engine("none")
        axes = made.add_axes((0, 0, 1, 1), frameon=False)
        axes.set(xlim=(-0.05, wide + 0.05), ylim=(high * len(rows) + foot, -0.45), xticks=[], yticks=[])
        size = 7.5 * min(1.0, scale / 0.75)
        words = {"fontsize": size, "ha": "center", "va": "top"}
        axes.text(0.46, -0.12, "query", **{**words, "va": "bottom"})
        order = f"nearest by cosine, the nearest first ({MARK} same class, {NO_MARK} another)"
        if source:
            axes.text(0, high * len(rows), source, color=palette.faint, fontsize=size, va="top")
        axes.text(
            1 + gap, -0.12, order if labelled else order.partition(" (")[0], **{**words, "va": "bottom", "ha": "left"}
        )
        for place, row in enumerate(rows):
            top = high * place
            _thumbnail(axes, thumbnails.get(row["id"]), 0.0, top, palette, edge=palette.ink, linewidth=1.0)
            if row.get("class") is not None:
                axes.text(0.46, top + 0.98, _short(row["class"], 13), **words)
            for column, one in enumerate(row["neighbours"]):
                left = 1 + gap + column
                note = f"{_number(one['cosine'])}"
                look: dict[str, Any] = {"edge": palette.rule, "linewidth": 0.8}
                if row.get("class") is not None:
                    same = one.get("class") == row["class"]
                    note += f" {MARK}" if same else f" {NO_MARK}\n{_short(one.get('class') or 'no class', 12)}"
                    look = (
                        {"edge": palette.lines[1], "linewidth": 2.0}
                        if same
                        else {"edge": palette.lines[2], "linewidth": 1.2, "linestyle": ":"}
                    )
                _thumbnail(axes, thumbnails.get(one["id"]), left, top, palette, **look)
                axes.text(left + 0.46, top + 0.98, note, **words)
        return png(made)


def views(rows: Sequence[np.ndarray], palette: Palette = LIGHT, source: str = "") -> bytes:
    """Views of pictures as training sees them: a row a view (N, H, W, 3) uint8, a column a picture."""
    columns = max((len(row) for row in rows), default=0)
    left, top, foot = 0.75, 0.3, 0.3 if source else 0.05  # in inches
    side = (7.35 - left) / max(columns, 1)
    with figure(7.4, side * len(rows) + top + foot, palette) as made:
        made.set_layout_engine("none")
        axes = made.add_axes((0, 0, 1, 1), frameon=False)
        axes.set(xlim=(0, 7.4), ylim=(side * len(rows) + top + foot, 0), xticks=[], yticks=[])
        for column in range(columns):
            middle = left + side * (column + 0.46)
            axes.text(middle, top - 0.06, f"picture {column + 1}", fontsize=8, ha="center", va="bottom")
        for number, row in enumerate(rows):
            high = top + side * number
            axes.text(left - 0.1, high + side * 0.46, f"view {number + 1}", fontsize=8, ha="right", va="center")
            for column, picture in enumerate(row):
                _thumbnail(axes, picture, left + side * column, high, palette, palette.rule, 0.92 * side, linewidth=0.5)
        if source:
            axes.text(0.06, side * len(rows) + top + 0.06, source, color=palette.faint, fontsize=8, va="top")
        return png(made)


def _thumbnail(
    axes: Any,
    picture: np.ndarray | None,
    left: float,
    top: float,
    palette: Palette,
    edge: str,
    side: float = 0.92,
    **line: Any,
) -> None:
    """A picture in the middle of a square cell, and the cell's frame."""
    from matplotlib.patches import Rectangle

    if picture is not None:
        height, width = (side * length / max(picture.shape[:2]) for length in picture.shape[:2])
        x, y = left + (side - width) / 2, top + (side - height) / 2
        axes.imshow(picture, extent=(x, x + width, y + height, y), interpolation="antialiased", aspect="auto")
    cell = Rectangle(
        (left, top), side, side, facecolor=palette.tint if picture is None else "none", edgecolor=edge, **line
    )
    axes.add_patch(cell)
    if picture is None:
        axes.text(
            left + side / 2, top + side / 2, "unreadable", fontsize=5.5, ha="center", va="center", color=palette.faint
        )


def _legend(axes: Any, columns: int, **more: Any) -> None:
    """A legend below the x axis and its label, so that it hides nothing."""
    from matplotlib.transforms import ScaledTranslation

    below = axes.transAxes + ScaledTranslation(0, -0.47, axes.figure.dpi_scale_trans)
    axes.legend(
        loc="upper left", bbox_to_anchor=(-0.01, 0), bbox_transform=below, ncols=columns, borderaxespad=0, **more
    )


def _number(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "\N{MINUS SIGN}")  # -0.0 + 0.0 is 0.0


def _short(name: str, most: int = 24) -> str:
    """A name that fits beside or below a picture."""
    shown = printable(name)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def spectrum(runs: Mapping[str, Mapping[str, Mapping[str, Any]]], palette: Palette = LIGHT, source: str = "") -> bytes:
    """Eigenvalues of covariances, sorted, in log10: a curve a run and layer, as Figures 1 and 3 of arXiv 2307.08913.

    Of each run by its name the layers "r" and "z", or one of them: their descending `eigenvalues`, and `rank` of them over
    lambda_max * D * eps(float32). On the left as they are, as in the paper; on the right relative to each curve's
    lambda_max: a head of small weights lowers a curve and does not bend it. There the rank's threshold is one thin line
    for each D. A run has a colour and a marker; r is solid, z dashed. Under lambda_max * D * eps(float64) an eigenvalue is
    rounding: such ones and zeros lie on the lowest line, which says so.
    """
    single, double = (float(np.finfo(kind).eps) for kind in (np.float32, np.float64))
    curves = [
        (place, name, layer, np.asarray(of["eigenvalues"], dtype=float), of["rank"])
        for place, (name, layers) in enumerate(runs.items())
        for layer, of in layers.items()
    ]
    widths = sorted({len(values) for *_, values, _ in curves})
    extra = 0.2 * (len(curves) + 1 + bool(source))
    with figure(7.4, 3.7 + extra, palette) as made:
        for axes, relative in zip(made.subplots(1, 2), (False, True), strict=True):
            tops = [1.0 if relative else values[0] for *_, values, _ in curves if values[0] > 0]
            floors = [
                (1.0 if relative else values[0]) * len(values) * double for *_, values, _ in curves if values[0] > 0
            ]
            floor = min(floors, default=double)
            lowest = False
            for place, name, layer, values, rank in curves:
                shown = values / values[0] if relative and values[0] > 0 else values
                rounding = values <= values[0] * len(values) * double  # of the curve's own largest
                step = max(len(values) // 8, 1)
                effective = measures.effective_rank(torch.from_numpy(values))
                axes.plot(
                    np.arange(1, len(values) + 1), np.log10(np.where(rounding, floor, shown)),
                    color=palette.lines[place % len(palette.lines)], linestyle="-" if layer == "r" else "--",
                    marker=MARKERS[place % len(MARKERS)], markersize=4,
                    markevery=((place * step // max(len(runs), 1)) % step, step),
                    label=f"{_short(name, 40)}, {layer}: rank {rank}, eff. {effective:.1f} of {len(values)}",
                )  # fmt: skip
                lowest |= bool(rounding.any())
            if relative:
                for place, width in enumerate(widths):
                    least = np.log10(width * single)
                    words = "" if place else "D · ε of float32, over which the rank counts"
                    axes.plot([1, width], [least, least], color=palette.ink, linestyle=":", linewidth=1.0, label=words)
            if lowest:
                axes.axhline(np.log10(floor), color=palette.faint, linewidth=1.0, zorder=1)
                axes.annotate("0, or rounding of float64", (0.01, np.log10(floor)),
                              xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
                              color=palette.faint, fontsize=9)  # fmt: skip
                axes.set_ylim(bottom=np.log10(floor) - 0.02 * np.log10(max(tops, default=1.0) / floor))
            axes.set(
                xlabel="eigenvalue index, sorted",
                ylabel="log10 λ/λmax" if relative else "log10 λ",
                title="relative to each curve's largest" if relative else "eigenvalues λ of the covariance",
            )
        made.legend(*axes.get_legend_handles_labels(), loc="outside upper left")
        _say_source(made, source, palette)
        return png(made)
