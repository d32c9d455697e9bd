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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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
    """Of lines and classes, in this order."""


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
)
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)))
"""As many as make, with the colours, 70 kinds of line; the first ones differ in gray too."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*", ">")
"""One a class, so that classes differ in gray."""

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


# ------------------------------------------------------------------------------------------------------------- pictures
def group_norms(layers: Sequence[Mapping[str, Any]], palette: Palette = LIGHT) -> bytes:
    """A bar a group of each layer, the largest first, and the threshold over which a group is active.

    Of each layer: its `name`, whether its `groups` are "columns" or "rows", their descending `norms`, the `threshold` and
    the number of `active` ones. A group of zeros has no bar.
    """
    with figure(7.4, 2.9 * len(layers), palette) as made:
        every = made.subplots(len(layers), squeeze=False)[:, 0]
        for axes, layer in zip(every, layers, strict=True):
            norms, threshold, active = np.asarray(layer["norms"]), layer["threshold"], layer["active"]
            edges = np.arange(len(norms) + 1) + 0.5
            bars = {"fill": True, "linewidth": 0.0}
            if active:
                axes.stairs(
                    norms[:active], edges[: active + 1], color=palette.lines[1], **bars, label=f"active: {active}"
                )
            if active < len(norms):
                # Hatched, so that they differ in gray.
                weak = {**bars, "facecolor": palette.rule, "edgecolor": palette.ink, "hatch": "////"}
                axes.stairs(norms[active:], edges[active:], **weak, label=f"not active: {len(norms) - active}")
            if threshold > 0:
                axes.axhline(threshold, color=palette.ink, linestyle="--", label="threshold: 1 % of the largest")
                positive = norms[norms > 0]
                log_scale(axes)
                axes.set_ylim(min(positive[-1], threshold) / 2, positive[0] * 1.5)
            axes.set_xlim(edges[0], edges[-1])
            axes.set(
                xlabel=f"group, the largest first (one of the {layer['groups']} of W)", ylabel="L2 norm of the group"
            )
            axes.set_title(f"{layer['name']}: {len(norms)} groups")
            axes.grid(visible=False, axis="x")
            _legend(axes, columns=3)
        return png(made)


def cosines(spaces: Mapping[str, Mapping[str, Any]], palette: Palette = LIGHT) -> bytes:
    """Histograms of cosines, a panel a space ("representation", "embedding").

    Of each space: `edges` (B + 1,) of the bins, and counts (B,) of the `positive` pairs, two views of one picture, and of
    the `negative` ones, views of two pictures, with `positive_mean` and `negative_mean`.
    """
    with figure(7.4, 2.9 * len(spaces), palette) as made:
        every = made.subplots(len(spaces), squeeze=False)[:, 0]
        for axes, (name, space) in zip(every, spaces.items(), strict=True):
            edges = np.asarray(space["edges"])
            kinds: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
                (
                    "negative",
                    "views of two pictures",
                    ":",
                    {"fill": True, "facecolor": palette.rule, "edgecolor": palette.faint},
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
                    share[first : last + 1], edges[first : last + 2], label=f"{words}: mean {_number(mean)}", **look
                )
                axes.axvline(mean, color=look.get("color", palette.ink), linewidth=1, linestyle=dashes)
            axes.set(
                ylabel=f"pairs a bin of {edges[1] - edges[0]:.2g}, %", title=name, xlabel="cosine of the two views"
            )
            _legend(axes, columns=2)
        return png(made)


def projection(data: Mapping[str, Any], palette: Palette = LIGHT) -> bytes:
    """Representations in two dimensions, coloured by class.

    `points` (N, 2) and the `axes`' two names; `labels` (N,), places in `classes`, or -1, for what stands back.
    """
    points, labels = np.asarray(data["points"]).reshape(-1, 2), np.asarray(data["labels"], dtype=int)
    classes = data["classes"]
    with figure(7.4, 5.6, palette) as made:
        axes = made.subplots()
        area = float(np.clip(12_000 / max(len(points), 1), 9, 40))
        others = labels < 0
        if others.any():
            words = f"other classes: {others.sum():,}" if classes else None
            colour = palette.rule if classes else palette.lines[1]
            axes.scatter(*points[others].T, s=area / 2, color=colour, linewidths=0, label=words)
        for place, name in enumerate(classes):
            colour, marker = palette.lines[place % len(palette.lines)], MARKERS[place % len(MARKERS)]
            hollow = place >= len(MARKERS)  # classes 11 to 20 differ from 1 to 10 in gray too
            look = {"facecolors": "none" if hollow else colour, "edgecolors": colour if hollow else palette.paper}
            size = area * (1.8 if marker == "*" else 1)
            line = 0.8 if hollow else 0.3
            of_class = points[labels == place].T
            axes.scatter(*of_class, s=size, marker=marker, linewidths=line, alpha=0.9, label=f" {_short(name)}", **look)
        first, second = data["axes"]
        axes.set(xlabel=first, ylabel=second, title=data.get("title", ""))
        axes.set_aspect("equal", adjustable="datalim")
        if classes:
            legend = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.02), "borderaxespad": 0.3, "handlelength": 1.5}
            axes.legend(**legend, markerscale=math.sqrt(30 / area), title="class", alignment="left")
        return png(made)


MARK, NO_MARK = "\N{CHECK MARK}", "\N{MULTIPLICATION SIGN}"


def neighbours(
    rows: Sequence[Mapping[str, Any]], thumbnails: Mapping[int, np.ndarray | None], palette: Palette = LIGHT
) -> bytes:
    """A page of thumbnails: a row a query, and its nearest by cosine to the right of it, the nearest first.

    Of each row: `id`, its `class` (None where nothing is labelled), and its `neighbours`: mappings of `id`, `cosine` and
    `class`. `thumbnails` (H, W, 3) uint8 by id; the cell of one that is None, or not there, is empty. A neighbour of the
    query's class has a solid frame and a check mark, one of another class a dotted frame and a cross.
    """
    k = max((len(row["neighbours"]) for row in rows), default=0)
    gap, high = 0.35, 1.34  # between the query and its neighbours; of a row; in widths of a thumbnail
    wide = k + 1 + gap
    scale = 7.4 / (wide + 0.1)
    with figure(7.4, scale * (high * len(rows) + 0.5), palette) as made:
        made.set_layout_engine("none")
        axes = made.add_axes((0, 0, 1, 1), frameon=False)
        axes.set(xlim=(-0.05, wide + 0.05), ylim=(high * len(rows) + 0.05, -0.45), xticks=[], yticks=[])
        size = 7.5 * min(1.0, scale / 0.75)
        words = {"fontsize": size, "ha": "center", "va": "top"}
        axes.text(0.46, -0.12, "query", **{**words, "va": "bottom"})
        order = f"nearest by cosine, the nearest first ({MARK} same class, {NO_MARK} another)"
        labelled = any(row.get("class") is not None for row in rows)
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
                    note += f" {MARK if same else NO_MARK}"
                    look = (
                        {"edge": palette.lines[1], "linewidth": 2.0}
                        if same
                        else {"edge": palette.lines[2], "linewidth": 1.2, "linestyle": ":"}
                    )
                _thumbnail(axes, thumbnails.get(one["id"]), left, top, palette, **look)
                axes.text(left + 0.46, top + 0.98, note, **words)
        return png(made)


def _thumbnail(
    axes: Any, picture: np.ndarray | None, left: float, top: float, palette: Palette, edge: str, **line: Any
) -> None:
    """A picture in the middle of a square cell of 0.92, and the cell's frame."""
    from matplotlib.patches import Rectangle

    side = 0.92
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


def _legend(axes: Any, columns: int) -> None:
    """A legend below the x axis and its label, so that it hides nothing."""
    from matplotlib.transforms import ScaledTranslation

    below = axes.transAxes + ScaledTranslation(0, -0.47, axes.figure.dpi_scale_trans)
    axes.legend(loc="upper left", bbox_to_anchor=(-0.01, 0), bbox_transform=below, ncols=columns, borderaxespad=0)


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def _short(name: str, most: int = 24) -> str:
    """A name that fits beside or below a picture."""
    shown = printable(name)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def spectrum(runs: Mapping[str, Mapping[str, Mapping[str, Any]]], palette: Palette = LIGHT) -> bytes:
    """Eigenvalues of covariances, sorted, in log10: a curve a run and layer, as Figures 1 and 3 of arXiv 2307.08913.

    Of each run by its name the layers "r" and "z", or one of them: their descending `eigenvalues`, and `rank` of them over
    lambda_max * D * eps(float32), which is the thin line of each curve. A run has a colour and a marker; r is solid, z
    dashed. Under lambda_max * D * eps(float64) an eigenvalue is rounding: such ones and zeros lie on the lowest line,
    which says so.
    """
    single, double = (float(np.finfo(kind).eps) for kind in (np.float32, np.float64))
    curves = [
        (place, name, layer, np.asarray(of["eigenvalues"], dtype=float), of["rank"])
        for place, (name, layers) in enumerate(runs.items())
        for layer, of in layers.items()
    ]
    tops = [values[0] for *_, values, _ in curves if values[0] > 0]
    floor = min((values[0] * len(values) * double for *_, values, _ in curves if values[0] > 0), default=double)
    lowest = False
    with figure(7.4, 4.2 + 0.2 * math.ceil(len(curves) / 2), palette) as made:
        axes = made.subplots()
        for place, name, layer, values, rank in curves:
            colour = palette.lines[place % len(palette.lines)]
            step = max(len(values) // 8, 1)
            axes.plot(
                np.arange(1, len(values) + 1), np.log10(np.maximum(values, floor)), color=colour,
                linestyle="-" if layer == "r" else "--", marker=MARKERS[place % len(MARKERS)], markersize=4,
                markevery=((place * step // max(len(runs), 1)) % step, step),
                label=f"{_short(name, 40)}, {layer}: rank {rank} of {len(values)}",
            )  # fmt: skip
            if values[0] > 0:
                least = np.log10(values[0] * len(values) * single)
                axes.plot([1, len(values)], [least, least], color=colour, linestyle=":", linewidth=0.6)
            lowest |= bool((values <= floor).any())
        axes.plot(
            [], [], color=palette.ink, linestyle=":", linewidth=0.6, label="λmax · D · ε of float32, of each curve"
        )
        if lowest:
            axes.axhline(np.log10(floor), color=palette.faint, linewidth=1.0, zorder=1)
            words = "0, or rounding of float64"
            axes.annotate(words, (0.005, np.log10(floor)), xycoords=("axes fraction", "data"), xytext=(0, 3),
                          textcoords="offset points", color=palette.faint, fontsize=9)  # fmt: skip
            axes.set_ylim(bottom=np.log10(floor) - 0.02 * np.log10(max(tops, default=1.0) / floor))
        axes.set(xlabel="eigenvalue index, sorted", ylabel="log10 eigenvalue of the covariance")
        made.legend(loc="outside lower left", ncols=2)
        return png(made)
