"""report.html and report.md of run folders that are made up here."""

import base64
import io
import json
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageColor

from ssl_pipeline import __version__, config
from ssl_pipeline.evaluation import pictures, report, tables
from ssl_pipeline.exits import BadInput, printable
from ssl_pipeline.pretrain import completed
from ssl_pipeline.run_folder import RunFolder

MINUS, NONE, TIMES = "\N{MINUS SIGN}", "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg==")
Make = Callable[..., RunFolder]


def made(
    root: Path, folder: str, name: str = "cifar10/simclr_sparsehead", *overrides: str, **results: Any
) -> RunFolder:
    """A run of 40 steps with a picture of its views."""
    run = RunFolder(root / folder)
    run.path.mkdir()
    run.config.write_text(config.dump_yaml(config.load(name, overrides).values))
    rows: list[dict[str, Any]] = [
        {"step": step, "epoch": 0, "loss": 5 - step / 20, "skipped": 0, "images_per_second": 512.0}
        for step in (10, 20, 30, 40)
    ]
    rows[1:1] = [{"step": 15, "epoch": 0, "online_knn5_top1": 31.0}]
    rows[2] |= {"loss": None, "images_per_second": None}
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.record("start", step=0, steps=40, epochs=1000, ranks=2, host="node1", nodes=None, device="NVIDIA H100")
    Image.fromarray(np.zeros((8, 4, 3), np.uint8)).save(run.views)
    for file, values in results.items():
        run.write_result(file, values)
    return run


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`made` in an empty folder."""
    return partial(made, tmp_path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunFolder]:
    """Two seeds of one config, a run that was measured by another protocol, and one whose data set no table has."""
    root = tmp_path_factory.mktemp("runs")
    linear = [{"linear_top1": value, "linear_top5": 99.0, "weights": f"{value}.pth"} for value in (92.0, 92.5)]
    return [
        made(root, "s0", linear_probe=linear[0], knn={"knn5_top1": 90.5}),
        made(root, "s1", "cifar10/simclr_sparsehead", "seed=1", linear_probe=linear[1]),
        made(root, "bt", "cifar10/barlow_twins", linear_probe={"linear_top1": 90.0, "protocol": "logistic"}),
        made(root, "digits", "digits/byol", summary={"random_init": {"knn5": 85.28}, "pretrained": {"knn5": 96.94}}),
    ]


@pytest.fixture(scope="module")
def text(runs: list[RunFolder]) -> str:
    """Their report.html."""
    return report.page(runs)


class Page(HTMLParser):
    """The elements of a page: (tag, attributes, text directly in it); asserts that all are closed in their order."""

    VOID = {"meta", "img", "br", "source", "link", "input", "hr"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = (tag, dict(attrs), [])
        self.found.append(element)
        if tag not in self.VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open[-1][2].append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes, _ in self.found if name == tag]

    def words(self, tag: str) -> list[str]:
        return ["".join(text) for name, _, text in self.found if name == tag]


def picture(source: str | None) -> Image.Image:
    """What an address that holds its picture shows."""
    kind, encoded = re.fullmatch("data:image/(png|jpeg);base64,(.*)", source or "").groups()  # type: ignore[union-attr]
    return Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)), formats=[kind])


def row(markdown: str, table: str, method: str) -> list[str]:
    """The cells of a method's row in one of the paper's tables."""
    _, _, rest = markdown.partition(f"Table {table}")
    (line,) = (
        line
        for line in rest.partition("Table ")[0].splitlines()
        if re.match(rf"\| {re.escape(method)}(<br>| \|)", line)
    )
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_our_numbers_stand_beside_the_papers(runs: list[RunFolder]) -> None:
    text = report.markdown(runs)
    name, *cells = row(text, "1: CIFAR-10", "SimCLR + SparseHead")
    assert name == "SimCLR + SparseHead<br>s0, s1"
    deviation = np.std([92.0, 92.5], ddof=1)
    linear = ["92.75", f"92.25 ± {deviation:.2f}", f"{MINUS}0.50"]
    assert cells == [*linear, "90.32", "90.50 (n = 1)", "+0.18", "1000", "2", ""]
    _, *cells = row(text, "1: CIFAR-10", "Barlow Twins")
    assert cells[:3] == ["90.88", "† 90.00", f"{MINUS}0.88"]
    assert cells[-1].startswith("linear: † protocol logistic, not the paper's (small)<br>5-nn: `ssl-pipeline knn ")
    _, *cells = row(text, "1: CIFAR-10", "BYOL")
    assert cells[-1] == "`ssl-pipeline pretrain cifar10/byol --output runs/cifar10_byol`"
    assert "In none of these tables: BYOL on digits." in text


def test_every_number_of_the_paper_is_in_both(make: Make) -> None:
    values = yaml.safe_load((Path(tables.__file__).parent / "paper_results.yaml").read_text())
    del values["linear_and_knn"]["columns"]
    run = make("run", "digits/simclr")
    markdown, page = report.markdown([run]), report.page([run])
    for table, digits in (("linear_and_knn", 2), ("semi_supervised", 1), ("detection", 1)):
        numbers = [n for method in values[table].values() for row in method.values() for n in row if n is not None]
        assert len(numbers) >= 28
        for number in numbers:
            assert f"| {number:.{digits}f} |" in markdown
            assert f">{number:.{digits}f}</td>" in page


def test_parts_without_a_run_of_ours_are_folded(runs: list[RunFolder], text: str) -> None:
    folded = Page(text).words("summary")
    assert [text.strip() for text in folded][:2] == ["Table 1: CIFAR-100", "Table 1: STL-10"]
    assert len(folded) == 9
    assert text.index("<h3>Table 1: CIFAR-10</h3>") < text.index("<details>")
    assert report.markdown(runs).count("<details>") == 9


def test_the_page_is_whole_and_loads_nothing(text: str) -> None:
    page = Page(text)
    assert "://" not in text  # no sign of base64
    assert "@import" not in text
    assert "url(" not in text
    assert not page.all("script")
    assert not page.all("link")
    for attributes in page.all("img") + page.all("source"):
        picture(attributes.get("src") or attributes.get("srcset")).verify()
    assert all(attributes["alt"] for attributes in page.all("img"))
    assert all(attributes.get("scope") in ("row", "col", "colgroup") for attributes in page.all("th"))
    assert len(page.all("table")) == len(page.all("caption")) == text.count('class="scroll"') - len(page.all("picture"))
    links = {attributes["href"] for attributes in page.all("a")}
    assert links == {f"#{attributes['id']}" for attributes in page.all("section")}
    assert f"ssl_pipeline {__version__}" in text


def test_rows_of_every_table_are_as_long_as_its_head(text: str) -> None:
    for rest in text.split("<table>")[1:]:
        table = Page("<table>" + rest.partition("</table>")[0] + "</table>")
        widths, width = [], 0
        for tag, attributes, _ in table.found:
            if tag == "tr":
                widths.append(width)
                width = 0
            elif tag in ("th", "td"):
                width += int(attributes.get("colspan") or 1)
        assert len({*widths[1:], width}) == 1


def test_each_run_shows_what_it_did(runs: list[RunFolder]) -> None:
    text = report.markdown(runs)
    for name in ("s0", "s1", "bt", "digits"):
        assert f"`{runs[0].path.parent / name / 'config.yaml'}`" in text
    # Of 40 steps of 512 pictures at 512 images/s, 10 have no speed.
    what = "SimCLR + SparseHead on CIFAR-10, 1000 epochs"
    facts = f"| s1<br>{what} | 92.50 | {NONE} | finished | 1 | 40 / 40 | 2 {TIMES} NVIDIA H100 on node1 | 0 min 30 s | 0.0167 |"
    assert facts in text.splitlines()
    assert "| linear_top1 | 92.00 | 92.50 | 92.25 ± 0.35 |" in text
    assert "weights, s0: 92.0.pth; weights, s1: 92.5.pth" in text
    assert "| random_init | 85.28 |" in text
    assert "| knn5_top1 | 90.50 | \N{EN DASH} | 90.50 |" in text
    assert "| loss | 3.0000 |" in text


def test_curves_and_views_are_pictures(runs: list[RunFolder], text: str) -> None:
    page = Page(text)
    assert page.words("h2") == [
        "Summary", "Results", "Loss", "Accuracy while training", "Tables 1 to 3 of the paper", "Augmented views", "Config",
        "Environment",
    ]  # fmt: skip
    assert len(page.all("picture")) == 2
    sources = [attributes["src"] for attributes in page.all("img")]
    views = [picture(source) for source in sources[2:]]
    assert [(view.format, view.size) for view in views] == [("JPEG", (4, 8))] * len(runs)
    assert all(np.asarray(view).max() < 8 for view in views)  # black, as they were made
    assert [a["media"] for a in page.all("source")] == ["screen and (prefers-color-scheme: dark)"] * 2
    # The two pictures of a curve are its light and its dark form, on paper of the page's own colour.
    ends = [picture(source).convert("RGB").getpixel((0, 0)) for source in (sources[0], page.all("source")[0]["srcset"])]
    assert ends == [ImageColor.getrgb(palette.paper) for palette in (pictures.LIGHT, pictures.DARK)]


def test_a_changed_recipe_is_told_and_not_averaged_with_another(make: Make) -> None:
    changed = {"linear_top1": 60.0, "changed": ["epochs=2"]}
    runs = [
        make("a", linear_probe=changed),
        make("b", "cifar10/simclr_sparsehead", "seed=1", linear_probe={"linear_top1": 92.0}),
    ]
    text = report.markdown(runs)
    assert f"| linear_top1 | 60.00 | 92.00 | {report.NONE} |" in text
    assert "changed, seed 0: epochs=2" in text
    assert "| changed |" not in text
    assert row(text, "1: CIFAR-10", "SimCLR + SparseHead")[2] == "92.00 (n = 1)"
    runs[1].write_result("linear_probe", changed | {"linear_top1": 62.0})
    text = report.markdown(runs)
    assert "| linear_top1 | 60.00 | 62.00 | 61.00 ± 1.41 |" in text
    _, _, mean, *_, notes = row(text, "1: CIFAR-10", "SimCLR + SparseHead")
    assert mean == "† 61.00 ± 1.41"
    assert notes.startswith("linear: † changed: epochs=2<br>")


def test_the_figure_of_accuracies_shows_no_losses(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(
        report, "_curves", lambda _, panels, *__, **___: drawn.extend(panel.key for panel in panels) or ""
    )
    run = make("run")
    with run.metrics.open("a") as file:
        file.write('{"step": 40, "online_loss": 2.5, "online_top1": 40.0}\n')
    report._online(tables.groups([run]))
    assert drawn == ["online_knn5_top1", "online_top1"]


def test_accuracies_while_training_are_named_as_what_they_are(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    labels: list[str] = []
    monkeypatch.setattr(
        report, "_draw", lambda panels, *_: labels.extend(panel.label for panel, _ in panels) or (PNG, PNG)
    )
    run = make("run")
    with run.metrics.open("a") as file:
        file.write('{"step": 40, "online_top1": 40.0, "online_top5": 80.0}\n')
    captions = Page(f"<p>{report._online(tables.groups([run]))}</p>").words("figcaption")
    assert labels == ["5-nn top-1, %", "online linear top-1, %", "online linear top-5, %"]
    assert captions[0].startswith("Nearest neighbours on some held-out pictures")
    assert "probe" not in captions[0]
    assert captions[1].startswith("Online linear probe on augmented training batches")
    assert "not a result" in captions[1]


def test_a_figure_is_laid_out_once_and_marks_few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[list[str]] = []
    png = pictures.png

    def noting(figure: Any) -> bytes:
        marks.append([line.get_marker() for axes in figure.axes for line in axes.lines])
        return png(figure)

    monkeypatch.setattr(pictures, "png", noting)
    panels = [
        (report.Panel("", f"panel {count}", "", ()), {"a": [(step, step / 3) for step in range(count)]})
        for count in (1, 3, report.FEW, 40)
    ]
    seen = []
    for image, palette in zip(report._draw(panels, ["a"], 2), (pictures.LIGHT, pictures.DARK), strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
        seen.append((pixels != ImageColor.getrgb(palette.paper)).any(axis=2))
    assert marks == [["o", "o", "None", "None"]] * 2
    assert (seen[0] == seen[1]).mean() > 0.999  # every line at the same place on either paper
    assert seen[0].mean() > 0.01


def test_configs_of_one_title_are_told_apart_in_one_table_of_results(make: Make) -> None:
    """Runs that differ in the learning rate, one of them with two seeds."""
    rates = [("slow", 0.1, 0), ("fast", 0.5, 0), ("again", 0.5, 1)]
    runs = [
        make(
            name,
            "digits/simclr",
            f"optim.learning_rate={rate}",
            f"seed={seed}",
            knn={"ranks": 2, "knn5_top1": 50 + rate},
        )
        for name, rate, seed in rates
    ]
    text = report.markdown(runs).partition("## Results")[2].partition("\n## ")[0]
    head = "SimCLR on digits: "
    assert f"|  | {head}slow | {head}fast | {head}again | {head}mean ± deviation |" in text
    assert "| knn5_top1 | 50.10 | 50.50 | 50.50 | 50.50 ± 0.00 |" in text
    assert "| ranks |" not in text
    assert "\nranks: 2\n" in text
    assert "|  | slow | fast | again |\n" in text  # of the last logged step
    assert text.count("results/knn.json") == 1
    pair = report.markdown(runs[:2]).partition("## Results")[2]
    assert "|  | slow | fast |\n| --- | ---: | ---: |\n| knn5_top1 | 50.10 | 50.50 |" in pair
    runs[0].write_result("knn", {"ranks": 1, "knn5_top1": 50.0})
    assert "ranks, slow: 1; ranks, fast: 2" in report.markdown(runs[:2])


def test_a_run_that_has_only_begun(make: Make) -> None:
    run = make("run")
    for path in (run.metrics, run.jobs, run.views):
        path.unlink()
    page, text = report.page([run]), report.markdown([run])
    assert "No evaluation has written a result yet." in page
    assert "No evaluation has written a result yet." in text
    assert "Not begun: 0 steps." in page
    assert Page(page).words("h2") == ["Summary", "Tables 1 to 3 of the paper", "Config"]
    assert "## Environment" not in text
    run.metrics.write_text(
        '{"step": 5, "online_knn5_top1": 30.0}\n{"step": 6, "loss": null, "images_per_second": null}\n'
    )
    assert Page(report.page([run])).words("h2")[1:3] == ["Results", "Accuracy while training"]


def test_results_of_every_shape_are_shown(make: Make) -> None:
    heads = [{"learning_rate": 0.1, "val_top1": 70.0}, {"learning_rate": 0.3, "val_top1": 71.0}]
    probe = {
        "linear_top1": 71.0,
        "heads": heads,
        "converged": True,
        "chosen_on": "val",
        "tried": {"0.1": 70.0, "a": {"b": 1}},
    }
    run = make("run", linear_probe=probe, odd=[1, 2, 3])
    text = report.markdown([run])
    assert "| converged | yes |\n\nchosen_on: val" in text
    assert "| learning_rate | val_top1 |" in text
    assert "| 70.00 |" in text
    assert "|  | 0.1 | a.b |\n| --- | ---: | ---: |\n| tried | 70.00 | 1 |" in text
    assert "| value | 3 values |" in text
    config_alone = make("weights")
    for path in (config_alone.metrics, config_alone.jobs, config_alone.views):
        path.unlink()
    config_alone.config.write_text(config.dump_yaml({"method": {"name": "weights.pth"}, "data": {"root": "x"}}))
    assert "weights.pth, \N{EN DASH} epochs" in report.markdown([config_alone])
    assert "weights.pth" in report.page([config_alone])


def test_what_files_say_is_escaped(make: Make) -> None:
    name = "<b>&$x_|`*`"
    evil = '<script>alert("1")</script>'
    run = make(name, **{evil.replace("/", ""): {evil: evil, "x": 1.0, "rows": {evil: {"<i>": 2.0}}}})
    text = report.page([run], title=evil, note=f"{evil} &")
    page = Page(text)
    for tag in ("script", "b", "i"):
        assert not page.all(tag)
    assert page.words("h1") == [evil]
    assert name in page.words("th")
    markdown = report.markdown([run], title=evil, note=evil)
    assert "<script>" not in re.sub("`[^`]*`", "", markdown)
    # Bars do not end a cell: every line of a table has as many as its head.
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_a_command_in_markdown_can_be_copied(make: Make) -> None:
    assert report._plain_code("ssl-pipeline knn runs/a_b_c") == "`ssl-pipeline knn runs/a_b_c`"
    assert report._plain_code("a ` b `` c") == "``` a ` b `` c ```"
    assert report._plain("linear_top1 _x_ *") == r"linear_top1 \_x\_ \*"


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [(-0.004, 2, "0.00"), (0.0, 1, "0.0"), (1.25, 2, "+1.25"), (-0.55, 1, f"{MINUS}0.6"), (None, 2, "\N{EN DASH}")],
)
def test_differences_have_a_sign(value: float | None, digits: int, shown: str) -> None:
    assert report._signed(value, digits) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(3, "3"), (97000, "97,000"), (91.239, "91.24"), (0.00123, "0.00123"),
        (0.93, "0.930"), (-2.5, f"{MINUS}2.50"), ([1, 2], "2 values"),
     (True, "yes"), (0.0, "0.00"), ("a", "a"), (2.19902e12, "2.20e+12")],
)  # fmt: skip
def test_values_are_written_to_be_read(value: Any, shown: str) -> None:
    assert report._value(value) == shown


def test_one_run_has_its_report_in_its_folder_and_several_where_one_says(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = make("one", knn={"knn5_top1": 1.0}), make("other", "cifar10/byol")
    assert report.write([one, RunFolder(one.path / ".")]) == [one.path / "report.html", one.path / "report.md"]
    assert Page((one.path / "report.html").read_text()).words("h1") == ["SimCLR + SparseHead on CIFAR-10: one"]
    paths = report.write([one, other], tmp_path / "new" / "folder", title="Two", note="Of them.")
    assert [path.parent for path in paths] == [tmp_path / "new" / "folder"] * 2
    assert paths[1].read_text().startswith("# Two\n\nOf them.\n")
    monkeypatch.chdir(tmp_path)
    assert report.write([one, other]) == [Path("report.html"), Path("report.md")]
    assert (tmp_path / "report.html").is_file()
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="file.: Not a directory; name another folder by --output"):
        report.write([one], tmp_path / "file")
    with pytest.raises(BadInput, match="is no run folder"):
        report.write([one, RunFolder(tmp_path)])


def test_runs_of_one_name_are_told_apart(make: Make, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    runs = [make("a/run"), make("b/run", "cifar10/byol"), make("c")]
    heads = Page(report.page(runs)).words("th")
    assert {f"{tmp_path}/a/run", f"{tmp_path}/b/run", "c"} <= set(heads)
    assert "run" not in heads[1:]


def test_without_matplotlib_a_sentence_says_so(make: Make) -> None:
    run = make("run")
    program = (
        "import sys; sys.modules['matplotlib'] = None; from pathlib import Path\n"
        "from ssl_pipeline.evaluation import report; from ssl_pipeline.exits import BadInput\n"
        "from ssl_pipeline.run_folder import RunFolder\n"
        "try: report.page([RunFolder(Path(sys.argv[1]))])\n"
        "except BadInput as error: print(error)"
    )
    words = [sys.executable, "-c", program, str(run.path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == "pictures need matplotlib: pip install 'ssl-pipeline[demo]'\n"


# ------------------------------------------------------------------------------------- how it ended, where, with what options
@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([("end", {"status": 0, "step": 40})], "finished"),
        ([("end", {"status": 75, "step": 20})], "stopped by a signal"),
        ([("end", {"status": 75}), ("start", {"step": 20, "steps": 80, "ranks": 2})], "broken off"),
        ([("end", {"status": 76})], "ended by an alarm or non-finite numbers"),
        ([("rank_lost", {"reason": "rank 1"})], "a rank was lost"),
        ([("failed", {"verb": "pretrain", "status": 9})], "ended with status 9"),
        ([("end", {"status": 75}), ("failed", {"verb": "knn", "status": 1})], "stopped by a signal"),
    ],
)
def test_the_summary_says_how_it_ended(make: Make, events: list[tuple[str, dict[str, Any]]], state: str) -> None:
    run = make("run")
    if state != "finished":
        run.metrics.write_text(run.metrics.read_text().partition('{"step": 30')[0])
    for name, values in events:
        run.record(name, **values)
    text = report.page([run])
    assert f"{state[0].upper()}{state[1:]}: " in Page(text).words("p")[1 if "No evaluation" in text else 0]
    assert f"| {state} |" in report.markdown([run])


def test_a_run_that_is_being_written_is_running(make: Make) -> None:
    run = make("run")
    run.metrics.unlink()
    program = (
        "import sys, time; from pathlib import Path; from ssl_pipeline.run_folder import RunFolder\n"
        "run = RunFolder(Path(sys.argv[1])); run.open_for_writing(run.read_config()); print('open', flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", program, str(run.path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert tables.read(run).state == "running"
        process.kill()


def test_the_numbers_of_the_summary_are_the_runs_own(make: Make) -> None:
    run = make(
        "run", linear_probe={"linear_top1": 90.0, "changed": ["epochs=2"]}, linear_probe_random_init={"linear_top1": 30.0},
        knn_epoch_0100={"knn5_top1": 50.0}, knn={"knn5_top1": 91.0}, detection={"box": {"AP": 38.5}},
    )  # fmt: skip
    numbers = {"linear top-1": (90.0, True), "5-nn": (91.0, False), "box AP": (38.5, False)}
    assert tables.headlines(tables.read(run)) == numbers
    page = Page(report.page([run]))
    assert dict(zip(page.words("dt"), page.words("dd"), strict=True)) == {
        "linear top-1": "† 90.00", "5-nn": "91.00", "box AP": "38.50", "GPU-hours": "0.0167"
    }  # fmt: skip
    bare = make("bare")
    assert tables.headlines(tables.read(bare)) == {"5-nn while training": (31.0, False)}


def cells(markdown: str, name: str) -> list[str]:
    """The cells of a row beside its name."""
    (line,) = (line for line in markdown.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split(" | ")][1:]


def test_configs_are_compared_among_runs_or_with_the_packaged_one(make: Make) -> None:
    own = ["optim.learning_rate=0.5", "data.root=elsewhere"]
    one = make("one", "cifar10/simclr", *own)
    text = report.markdown([one], complete=completed)
    packaged = config.load("cifar10/simclr").values["optim"]["learning_rate"]
    assert "What differs from cifar10/simclr, the nearest packaged config" in text
    assert cells(text, "optim.learning_rate") == [str(packaged), "0.5"]
    assert "data.root" not in text
    assert "Equal to the packaged config digits/byol." in report.page([make("two", "digits/byol")], complete=completed)
    other = make("other", "cifar10/simclr", "seed=3", *own)
    older = config.load("cifar10/simclr", own).values
    other.config.write_text(
        config.dump_yaml(older | {"seed": 3})
    )  # without the options that it leaves at their defaults
    text = report.markdown([one, other], complete=completed)
    section = text.partition("## Config")[2].partition("## Environment")[0]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| ")]
    assert rows == ["| option", "| ---", "| seed", "| nearest packaged config", "| file"]
    assert cells(section, "seed") == ["0", "3"]
    assert cells(section, "nearest packaged config") == ["cifar10/simclr, 1 differ", "cifar10/simclr, 2 differ"]
    other.config.write_text(one.config.read_text())
    assert "The configs of all runs are equal." in report.markdown([one, other])


def test_the_environment_tells_of_machines_and_restarts(make: Make) -> None:
    run, other = make("run"), make("other", "cifar10/byol")
    run.record("end", status=75, step=20)
    run.record("start", step=20, steps=40, ranks=4, host="node2", versions={"torch": "9.9", "python": "3.11"})
    run.record("rollback", step=30, to=20)
    text = report.markdown([run, other])
    for name, values in {
        "host": ["node1, then node2", "node1"],
        "ranks": ["2, then 4", "2"],
        "version of torch": ["9.9", NONE],
        "starts": ["2", "1"],
        "of these from a checkpoint": ["1", NONE],
        "stopped by a signal": ["1", NONE],
        "rolled back": ["1", NONE],
    }.items():
        assert cells(text.partition("## Environment")[2], name) == values


# ------------------------------------------------------------------------------------------------ what analyses have found
def analysed(points: int = 12) -> dict[str, Any]:
    """Results of `analyze` and, under `spectrum`, of `spectrum`, as these write them."""
    eigenvalues = [2.0**-n for n in range(8)]
    layer = {"count": 100, "dimensions": 8, "rank": 8, "eigenvalues": eigenvalues}
    histogram = {"edges": [-1.0, 0.0, 1.0], "positive": [1, 3], "negative": [2, 2]}
    shown = {
        "cosines": {"representation": histogram | {"positive_mean": 0.5, "negative_mean": 0.0}},
        "projection": {"axes": ["x", "y"], "points": [[n, -n] for n in range(points)], "labels": [0] * points,
                       "classes": ["cat"]},
        "group_norms": [{"name": "last", "groups": "columns", "norms": [2.0, 1.0], "threshold": 0.02, "active": 2}],
        "spectrum": {"r": layer},
    }  # fmt: skip
    numbers = {"representation_rankme": 6.5, "embedding_rankme": 3.25, "head_groups": 2.0, "pictures_measured": 100}
    return {"analysis": {**numbers, "pictures": shown}, "spectrum": {"split": "val", "r": layer, "z": layer}}


def test_analyses_are_drawn_for_light_and_dark(make: Make) -> None:
    one, other = make("one", **analysed(2000)), make("other", "cifar10/byol", analysis=analysed(2000)["analysis"])
    for path, width, height in ((one.views, 460, 1828), (one.results / "neighbours.png", 1480, 1740)):
        noise = np.random.default_rng(0).normal(128, 40, (height // 20, width // 20, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(path)
    text = report.page([one, other])
    assert len(text) < 1.5e6  # so that of four runs it can be mailed
    heads = [*Page(text).words("h2")]
    assert heads[5:11] == ["Measures", "Spectra", "Head", "Cosines", "Neighbours", "Projection"]
    parts = {part: text.partition(f'<section id="{part}">')[2].partition("</section>")[0] for part, *_ in report.PARTS}
    counts = {part: len(Page(parts[part]).all("picture")) for part in ("spectra", "head", "cosines", "projection")}
    assert counts == {"spectra": 1, "head": 2, "cosines": 2, "projection": 2}
    for part in counts:
        for attributes in Page(parts[part]).all("source"):
            assert picture(attributes["srcset"]).convert("L").getpixel((0, 0)) < 60
    assert len(Page(parts["neighbours"]).all("img")) == 1
    markdown = report.markdown([one, other])
    assert cells(markdown, "rankme") == ["6.50", "3.25", "6.50", "3.25"]
    assert cells(markdown, "groups") == ["2", "2"]
    assert cells(markdown, "one, z") == ["100", "8", "8"]
    assert cells(markdown, "other, r") == ["100", "8", "8"]
    assert "results/analysis.json" not in markdown  # it has parts of its own


@pytest.mark.parametrize("broken", [{"r": "x"}, {"r": {"eigenvalues": "x"}}, {"r": {"eigenvalues": []}}, {"r": [1]}, 3])
def test_what_cannot_be_drawn_is_said(make: Make, broken: Any) -> None:
    pictures = dict.fromkeys(("cosines", "projection", "group_norms"), broken)
    run = make(
        "run", spectrum=broken, analysis={"representation_rankme": "x", "head_groups": None, "pictures": pictures}
    )
    run.views.write_bytes(b"no picture")
    page = Page(report.page([run]))
    captions = page.words("figcaption")
    assert sum("cannot be drawn" in caption for caption in captions) >= 3
    assert "run: views.png is no picture" in captions


def test_a_png_with_garbage_after_its_data_is_no_picture(make: Make) -> None:
    """Of which Pillow raises a SyntaxError."""
    run = make("run")
    buffer = io.BytesIO()
    Image.effect_noise((60, 60), 90).save(buffer, "PNG")
    whole = buffer.getvalue()
    place = whole.index(b"IDAT")
    data = whole[place : place + 500]
    chunk = (len(data) - 4).to_bytes(4, "big") + data + zlib.crc32(data).to_bytes(4, "big")
    run.views.write_bytes(whole[: place - 4] + chunk + bytes(range(32)))
    assert "run: views.png is no picture" in Page(report.page([run])).words("figcaption")


def test_names_and_values_that_are_no_unicode_are_shown_as_escapes(make: Make, tmp_path: Path) -> None:
    """A folder's name in bytes that are no UTF-8, and half a surrogate pair in a result's JSON."""
    run = make(b"of\xff".decode(errors="surrogateescape"), knn={"knn5_top1": 50.0, "note": "half \ud800"})
    with run.metrics.open("a") as file:
        file.write(json.dumps({"step": 40, "heldout_\ud800": 1.0}) + "\n")
    for path in report.write([run, make("other")], tmp_path / "out"):  # two, so that the curves have a legend
        text = path.read_text(encoding="utf-8").replace("\\\\", "\\")
        assert r"of\udcff" in text
        assert r"half \ud800" in text
    assert printable("of\udcff") == r"of\udcff"


def test_held_out_measures_have_a_panel_each(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[str]] = []
    monkeypatch.setattr(
        report, "_draw", lambda panels, *_: drawn.append([panel.label for panel, _ in panels]) or (PNG, PNG)
    )
    run = make("run")
    assert report._held_out(tables.groups([run])) == ""
    spaces, names = ("embedding", "representation"), ("std", "rankme", "odd", "lidar")
    row = {f"heldout_{space}_{name}": None if name == "odd" else 2.5 for space in spaces for name in names}
    with run.metrics.open("a") as file:
        file.write(json.dumps({"step": 40, **row}) + "\n")
    text = report._held_out(tables.groups([run]))
    assert (text.count("<picture>"), text.count("<details>")) == (2, 1)
    first, folded = drawn
    assert first == ["representation rankme", "embedding rankme", "representation std", "embedding std"]
    assert folded == ["representation lidar", "embedding lidar"]
