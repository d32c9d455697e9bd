import io
import itertools
import subprocess
import sys
from collections.abc import Callable

import matplotlib
import matplotlib.colors
import matplotlib.text
import numpy as np
import pytest
import scipy.stats
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from ssl_pipeline.evaluation import pictures
from ssl_pipeline.evaluation.pictures import DARK, LIGHT, Palette

RNG = np.random.default_rng(0)
EDGES = np.linspace(-1, 1, 201).tolist()
NORMS = [*np.linspace(2, 0.3, 20).tolist(), 1e-3, 1e-5, 0.0]
LAYER = {"name": "head.layers.3", "groups": "columns", "norms": NORMS, "threshold": 0.02, "active": 20}


def space(positive: float, negative: float) -> dict:
    found = {"edges": EDGES, "positive_mean": positive, "negative_mean": negative}
    for key, mean in (("positive", positive), ("negative", negative)):
        found[key] = np.histogram(np.clip(RNG.normal(mean, 0.1, 500), -1, 1), EDGES)[0].tolist()
    return found


def projected(classes: int, unlabelled: bool = False) -> dict:
    labels = np.arange(120) % (classes + 1) - 1
    return {
        "points": RNG.normal(size=(120, 2)).tolist(),
        "labels": [-1] * 120 if unlabelled else labels.tolist(),
        "classes": []
        if unlabelled
        else ["$\\frac$\n", *(f"class of a long name, number {i}" for i in range(1, classes))],
        "axes": [
            "first principal component (31 % of the variance)",
            "second principal component (9 % of the variance)",
        ],
    }


def row(query: int, others: list[int], kind: Callable[[int], str | None]) -> dict:
    found = [{"id": one, "cosine": 0.9 - 0.1 * place, "class": kind(one)} for place, one in enumerate(others)]
    return {"id": query, "class": kind(query), "neighbours": found}


THUMBNAILS = {i: np.full((40, 30 + i, 3), 20 * i, dtype=np.uint8) for i in range(9)} | {3: None}
ROWS = [
    row(0, [2, 3, 1], lambda i: "even" if i % 2 == 0 else "odd"),
    row(5, [4, 6, 7], lambda i: "even" if i % 2 == 0 else "odd"),
]
UNLABELLED = [row(0, [2, 3, 1], lambda _: None)]
SOURCE = "dense, step 44, val, N = 360"
BARS = {**LAYER, "norms": [*NORMS[:20], 0.0, 0.0, 0.0]}
FLAT = {**projected(3), "points": [[10 * x, y] for x, y in RNG.normal(size=(120, 2)).tolist()]}
VIEWS = [RNG.integers(0, 255, (8, side, side, 3), dtype=np.uint8) for side in (32, 32, 12)]
EIGENVALUES = {layer: {"eigenvalues": np.geomspace(1, 1e-9, 32).tolist(), "rank": 20} for layer in ("r", "z")}

DRAWN: dict[str, Callable[[Palette], bytes]] = {
    "group_norms": lambda palette: pictures.group_norms([LAYER, {**LAYER, "name": "head.layers.0"}], palette),
    "zero head": lambda palette: pictures.group_norms([{**LAYER, "norms": [0.0] * 4, "threshold": 0.0, "active": 0}], palette),
    "cosines": lambda palette: pictures.cosines({"representation": space(0.8, 0.5), "embedding": space(0.7, 0.0)}, palette),
    "all alike": lambda palette: pictures.cosines({"representation": space(1.0, 1.0)}, palette),
    "ten classes": lambda palette: pictures.projection(projected(10), palette),
    "twenty classes": lambda palette: pictures.projection(projected(20), palette),
    "no classes": lambda palette: pictures.projection(projected(0, unlabelled=True), palette),
    "neighbours": lambda palette: pictures.neighbours(ROWS, THUMBNAILS, palette),
    "unlabelled": lambda palette: pictures.neighbours(UNLABELLED, THUMBNAILS, palette),
    "spectrum": lambda palette: pictures.spectrum({"run": EIGENVALUES}, palette),
    "spectra": lambda palette: pictures.spectrum({f"run {i} of a long name": EIGENVALUES for i in range(6)}, palette, SOURCE * 6),
    "norms and source": lambda palette: pictures.group_norms([LAYER, BARS], palette, SOURCE),
    "cosines and source": lambda palette: pictures.cosines({"representation": space(0.8, 0.5)}, palette, SOURCE),
    "projection and source": lambda palette: pictures.projection(FLAT, palette, SOURCE),
    "neighbours and source": lambda palette: pictures.neighbours(ROWS, THUMBNAILS, palette, SOURCE),
    "views and source": lambda palette: pictures.views(VIEWS, palette, SOURCE),
    "views": lambda palette: pictures.views(VIEWS, palette),
}  # fmt: skip


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list:
    """The figures that were drawn."""
    found: list = []
    png = pictures.png

    def kept(made: object) -> bytes:
        found.append(made)
        return png(made)

    monkeypatch.setattr(pictures, "png", kept)
    return found


def luminance(colour: object) -> float:
    """Relative luminance of a colour, from 0, black, to 1 (WCAG 2.1)."""
    rgb = np.asarray(matplotlib.colors.to_rgb(colour))
    return float(np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])


def contrast(one: object, other: object) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("name", DRAWN)
def test_pictures_are_whole(name: str, palette: Palette, figures: list) -> None:
    """Of twice a page's pixels, not blank, on the palette's paper; no words cut off, and none under a legend."""
    picture = Image.open(io.BytesIO(DRAWN[name](palette))).convert("RGB")
    assert picture.width == 1480
    pixels = np.asarray(picture)
    paper = (255 * np.asarray(matplotlib.colors.to_rgb(palette.paper))).round().astype(np.uint8)
    share = (pixels != paper).any(axis=2).mean()
    assert 0.01 < share < 0.95
    assert (pixels[-1] == paper).all()  # a row of half a pixel would be darker
    (figure,) = figures
    figure.set_dpi(pictures.DPI)
    renderer = FigureCanvasAgg(figure).get_renderer()
    ink = figure.get_tightbbox(renderer)  # of all that is drawn, in inches
    assert min(ink.x0, ink.y0) > -0.005
    assert ink.x1 < figure.get_figwidth() + 0.005
    assert ink.y1 < figure.get_figheight() + 0.005
    for axes in figure.axes:
        if axes.get_legend() is not None:
            legend = axes.get_legend().get_window_extent(renderer)
            assert not legend.overlaps(axes.xaxis.label.get_window_extent(renderer))
            assert not legend.overlaps(axes.get_window_extent(renderer))
        if not name.startswith(("neighbours", "unlabelled", "views")):
            assert axes.get_xlabel()
            assert axes.get_ylabel()
            assert axes.get_title(loc="left")
            beside = axes.yaxis.label.get_window_extent(renderer)
            assert 0 <= beside.y0 < beside.y1 <= figure.bbox.height
    said = [*figure.findobj(matplotlib.text.Text)]
    assert any(SOURCE in words.get_text() for words in said) == name.endswith(("source", "spectra"))


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_nothing_is_told_by_colour_alone(palette: Palette, figures: list) -> None:
    for colour in (palette.ink, palette.faint, *palette.lines):
        assert contrast(colour, palette.paper) >= 3.5, colour
    for words in (palette.ink, palette.faint, palette.link):
        assert contrast(words, palette.paper) >= 4.5
    with pictures.figure(4, 3, palette) as made:
        lines = [made.subplots().plot([0, 1])[0]]
        lines += [made.axes[0].plot([0, 1])[0] for _ in range(69)]
    looks = [(line.get_color(), str(line._unscaled_dash_pattern)) for line in lines]
    assert len(set(looks)) == 70
    assert len({dashes for _, dashes in looks[:7]}) == 7
    DRAWN["twenty classes"](palette)
    DRAWN["ten classes"](palette)
    twenty, ten = ([c for c in figure.axes[0].collections if str(c.get_label()).startswith(" ")] for figure in figures)
    for clouds in (twenty, ten):
        shapes = {(c.get_paths()[0].vertices.tobytes(), len(c.get_facecolor())) for c in clouds}  # hollow: no face
        assert len(shapes) == len(clouds)
    assert (len(ten), len(twenty)) == (10, 20)
    kinds = [kind for _, kind in pictures.CLASS_MARKERS]
    full = [c for c, kind in zip(ten, kinds, strict=False) if kind == pictures.FULL]
    steps = sorted(luminance(c.get_facecolor()[0][:3]) + 0.05 for c in full)
    assert len(full) == 5
    assert all(lighter / darker > 1.4 for darker, lighter in itertools.pairwise(steps))
    for cloud, kind in zip(ten, kinds, strict=False):  # a full one has an edge of ink
        assert contrast(cloud.get_edgecolor()[0][:3], palette.paper) >= (3.5 if kind != pictures.FULL else 10)
    pictures.group_norms([LAYER, BARS], palette)
    strong, weak = figures[-1].axes[1].patches
    assert contrast(strong.get_facecolor()[:3], palette.rule) >= 2
    assert weak.get_hatch()
    strong, weak = figures[-1].axes[0].patches
    assert (strong.get_linestyle(), weak.get_linestyle()) == ("solid", (0, (1, 0.6)))
    DRAWN["cosines"](palette)
    negative, positive = figures[-1].axes[0].patches
    assert (negative.get_fill(), positive.get_fill()) == (True, False)
    assert contrast(negative.get_facecolor()[:3], positive.get_edgecolor()[:3]) >= 2
    means = figures[-1].axes[0].lines
    assert len({line.get_linestyle() for line in means}) == 2


def test_neighbours_of_the_class_have_a_mark_and_a_frame(figures: list) -> None:
    pictures.neighbours(ROWS, THUMBNAILS)
    pictures.neighbours(UNLABELLED, THUMBNAILS)
    words = [text.get_text() for text in figures[0].axes[0].texts]
    yes, no = pictures.MARK, pictures.NO_MARK
    assert yes != no
    found = [word.split() for word in words if word[0].isdigit()]
    odd, even = ("0.80", no, "odd"), ("0.90", no, "even")
    assert [*map(tuple, found)] == [("0.90", yes), odd, ("0.70", no, "odd"), even, ("0.80", no, "even"), ("0.70", yes)]
    assert words.count("unreadable") == 1
    frames = figures[0].axes[0].patches
    assert [frame.get_linestyle() for frame in frames] == ["solid", "solid", ":", ":", "solid", ":", ":", "solid"]
    assert len(figures[0].axes[0].images) == 7
    bare = [text.get_text() for text in figures[1].axes[0].texts]
    assert bare == ["query", "nearest by cosine, the nearest first", "0.90", "unreadable", "0.80", "0.70"]
    assert {frame.get_linestyle() for frame in figures[1].axes[0].patches} == {"solid"}


def test_bars_stand_on_zero_and_what_has_no_zero_has_no_bars(figures: list) -> None:
    pictures.group_norms([LAYER, BARS])
    steps, bars = figures[0].axes
    assert (steps.get_yscale(), bars.get_yscale()) == ("log", "linear")
    for axes, wanted in ((steps, [*NORMS[:-1], np.nan]), (bars, BARS["norms"])):
        strong, weak = axes.patches
        np.testing.assert_array_equal([*strong.get_data().values, *weak.get_data().values], wanted)
        assert (strong.get_data().edges[0], weak.get_data().edges[0]) == (0.5, 20.5)
        assert axes.lines[0].get_ydata() == [0.02, 0.02]
        bottom, top = axes.get_ylim()
        assert top > 2
        assert strong.get_fill() == weak.get_fill() == (axes is bars)
        assert strong.get_data().baseline == (0 if axes is bars else None)
        assert bottom == 0 if axes is bars else 0 < bottom < 1e-5
    titles = [axes.get_title(loc="left") for axes in figures[0].axes]
    assert titles == [f"{which} of the head, 23 groups (columns of W)" for which in ("linear layer 1", "last layer")]
    words = [[text.get_text() for text in axes.get_legend().get_texts()][1] for axes in (steps, bars)]
    assert words == ["not active: 3, of them 0: 1", "not active: 3, of them 0: 3"]


def test_spectra_are_drawn_as_they_are_and_relative_to_the_largest(figures: list) -> None:
    values = RNG.uniform(0.1, 1, 64)
    values = -np.sort(-values)
    small = {"eigenvalues": (values / 1000).tolist(), "rank": 64}
    large = {"eigenvalues": (values * 7).tolist(), "rank": 64}
    none = {"eigenvalues": [0.0] * 64, "rank": 0}
    pictures.spectrum({"dense": {"r": large, "z": small}, "dead": {"z": none}}, source=SOURCE)
    absolute, relative = figures[0].axes
    lines = [line.get_ydata() for line in absolute.lines[:2]]
    np.testing.assert_allclose(lines, np.log10([values * 7, values / 1000]))
    *shown, dead, floor, _ = relative.lines  # the last is that of float64
    np.testing.assert_allclose([line.get_ydata() for line in shown], [np.log10(values / values[0])] * 2, atol=1e-12)
    np.testing.assert_allclose(dead.get_ydata(), np.log10(64 * np.finfo(np.float64).eps))
    np.testing.assert_allclose(floor.get_ydata(), np.log10(64 * np.finfo(np.float32).eps))
    effective = np.exp(scipy.stats.entropy(values))
    said = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert said[:3] == [
        f"dense, r: rank 64, eff. {effective:.1f} of 64",
        f"dense, z: rank 64, eff. {effective:.1f} of 64",
        "dead, z: rank 0, eff. 0.0 of 64",
    ]
    assert len(said) == 4


def test_rounding_of_a_large_spectrum_is_none_of_a_small_one(figures: list) -> None:
    """On the left, too: 1e-13 of 1,000 is nothing and 1e-13 of 1 is something."""
    large, small = ({"eigenvalues": [top, 1e-13], "rank": 1} for top in (1000.0, 1.0))
    pictures.spectrum({"large": {"r": large}, "small": {"r": small}})
    for axes, second in zip(figures[0].axes, (-13, -13), strict=True):
        lowest = np.log10(2 * np.finfo(np.float64).eps)
        np.testing.assert_allclose([line.get_ydata()[1] for line in axes.lines[:2]], [lowest, second])


def test_a_projection_fills_its_panel(figures: list) -> None:
    """Of points twice as wide as high, at one scale on both axes."""
    points = RNG.uniform([-4, -2], [4, 2], (500, 2))
    pictures.projection({**projected(10), "points": points.tolist(), "labels": [0] * 500})
    (axes,) = figures[0].axes
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert np.ptp(points, axis=0).prod() > 0.75 * (right - left) * (top - bottom)
    box = axes.get_window_extent()
    assert box.width / (right - left) == pytest.approx(box.height / (top - bottom), rel=1e-3)
    assert axes.get_title(loc="left") == "representations of 500 pictures"


def test_views_are_named(figures: list) -> None:
    pictures.views(VIEWS)
    words = [text.get_text() for text in figures[0].axes[0].texts]
    assert words == [f"picture {i}" for i in range(1, 9)] + ["view 1", "view 2", "view 3"]
    shown = [image.get_array() for image in figures[0].axes[0].images]
    assert all(np.array_equal(one, other) for one, other in zip(shown, itertools.chain(*VIEWS), strict=True))


def test_sources() -> None:
    assert pictures.source("dense", 44, "val", 1360) == "dense, step 44, val, N = 1,360"
    assert pictures.source("a\nb", 0, None) == "a\\nb, step 0"
    assert pictures.source("backbone.pth", None, "train", 3) == "backbone.pth, train, N = 3"


def test_histograms_are_shares_of_the_pairs(figures: list) -> None:
    counts = [0] * 200
    pairs = {"edges": EDGES, "positive": [*counts[:198], 3, 1], "negative": [1, 1, *counts[2:]],
             "positive_mean": 0.985, "negative_mean": -0.99}  # fmt: skip
    pictures.cosines({"embedding": pairs})
    negative, positive = figures[0].axes[0].patches
    assert positive.get_data().values.tolist() == [75.0, 25.0]
    np.testing.assert_allclose(positive.get_data().edges, [0.98, 0.99, 1.0])
    assert negative.get_data().values.tolist() == [50.0, 50.0]
    words = {text.get_text() for text in figures[0].axes[0].get_legend().get_texts()}
    assert words == {
        "views of two pictures, N = 2 pairs",
        "two views of a picture, N = 4 pairs",
        "their mean: \N{MINUS SIGN}0.99",
        "their mean: 0.98",
    }
    assert figures[0].axes[0].get_title(loc="left") == "embedding, bins of 0.01"


def test_matplotlib_is_left_as_it_was() -> None:
    """And what a user sets there changes no picture."""
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False, "text.usetex": True, "figure.dpi": 7}):
        held = dict(matplotlib.rcParams)
        twice = [pictures.group_norms([LAYER]) for _ in range(2)]
        assert dict(matplotlib.rcParams) == held
    assert twice[0] == twice[1] == pictures.group_norms([LAYER])
    with pytest.raises(ZeroDivisionError), pictures.figure(1, 1):
        1 / 0  # noqa: B018
    assert matplotlib.rcParams["text.parse_math"]


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.01, "0.01"), (1, "1"), (1000, "1000"), (1e4, "10⁴"), (1e-3, "10⁻³"), (1e-12, "10⁻¹²"), (0, "0")],
)
def test_numbers_of_a_logarithmic_axis(value: float, said: str) -> None:
    with pictures.figure(2, 2) as made:
        axes = made.subplots()
        pictures.log_scale(axes, "x")
        assert axes.xaxis.get_major_formatter()(value, 0) == said
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")


@pytest.mark.slow
def test_without_a_display_and_without_matplotlib() -> None:
    script = (
        "import sys\nfrom ssl_pipeline.evaluation import pictures\nfrom ssl_pipeline.exits import BadInput\n"
        "assert 'matplotlib' not in sys.modules\n{}\n"
        "layer = {{'name': 'a', 'groups': 'rows', 'norms': [1.0], 'threshold': 0.01, 'active': 1}}\n"
        "try:\n    print(len(pictures.group_norms([layer])) > 1000, 'matplotlib.pyplot' in sys.modules)\n"
        "except BadInput as error:\n    print(error)\n"
    )
    for lines, said in (
        ("", "True False\n"),
        ("sys.modules['matplotlib'] = None", "pictures need matplotlib: pip install 'ssl-pipeline[demo]'\n"),
    ):
        code = script.format(lines)
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": ":".join(sys.path)},
            check=False,
        )
        assert done.stdout == said, done.stderr
