"""report.html and report.md of run folders that are made up here."""

import base64
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from ssl_pipeline import __version__, config
from ssl_pipeline.evaluation import report, tables
from ssl_pipeline.exits import BadInput
from ssl_pipeline.run_folder import RunFolder

MINUS = "\N{MINUS SIGN}"
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
        source = attributes.get("src") or attributes.get("srcset") or ""
        png = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
        Image.open(io.BytesIO(png)).verify()
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
    assert re.search(
        r"^\| s1 \| 1 \| 40 / 40 \| 2 \S+ NVIDIA H100 on node1 \| 0 min 30 s \| 0.0167 \|", text, re.MULTILINE
    )
    assert "| linear_top1 | 92.00 | 92.50 | 92.25 ± 0.35 |" in text
    assert "weights, seed 0: 92.0.pth; weights, seed 1: 92.5.pth" in text
    assert "| random_init | 85.28 |" in text
    assert "| knn5_top1 | 90.50 | \N{EN DASH} | 90.50 |" in text
    assert "| loss | 3.0000 |" in text


def test_curves_and_views_are_pictures(runs: list[RunFolder], text: str) -> None:
    page = Page(text)
    assert page.words("h2") == [
        "Runs", "Loss", "Accuracy while training", "Augmented views", "Tables 1 to 3 of the paper"
    ]  # fmt: skip
    assert len(page.all("picture")) == 2
    views = [base64.b64encode(run.views.read_bytes()).decode() for run in runs]
    sources = [str(attributes["src"]) for attributes in page.all("img")]
    assert [source.partition(",")[2] for source in sources[2:]] == views
    assert [a["media"] for a in page.all("source")] == ["(prefers-color-scheme: dark)"] * 2
    # The two pictures of a curve are its light and its dark form.
    curves = (sources[0], str(page.all("source")[0]["srcset"]))
    images = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in curves]
    ends = [np.asarray(image.convert("L"))[0, 0] for image in images]
    assert ends[0] > 200
    assert ends[1] < 60


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
    monkeypatch.setattr(report, "_curves", lambda _, panels, __: drawn.extend(panel.key for panel in panels) or "")
    run = make("run")
    with run.metrics.open("a") as file:
        file.write('{"step": 40, "online_loss": 2.5, "online_top1": 40.0}\n')
    report._online(tables.groups([run]))
    assert drawn == ["online_knn5_top1", "online_top1"]


def test_a_run_that_has_only_begun(make: Make) -> None:
    run = make("run")
    for path in (run.metrics, run.jobs, run.views):
        path.unlink()
    page, text = report.page([run]), report.markdown([run])
    assert "No evaluation has written a result yet." in page
    assert "No evaluation has written a result yet." in text
    assert Page(page).words("h2") == ["Runs", "Tables 1 to 3 of the paper"]
    run.metrics.write_text(
        '{"step": 5, "online_knn5_top1": 30.0}\n{"step": 6, "loss": null, "images_per_second": null}\n'
    )
    assert Page(report.page([run])).words("h2")[1] == "Accuracy while training"


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
    assert "| epochs | \N{EN DASH} |" in report.markdown([config_alone])
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
    assert f"Run {name}" in ["".join(words) for tag, _, words in page.found if tag == "span"]
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
     (True, "yes"), (0.0, "0.00"), ("a", "a")],
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
    with pytest.raises(BadInput, match="cannot write the report to"):
        report.write([one], tmp_path / "file")
    with pytest.raises(BadInput, match="is no run folder"):
        report.write([one, RunFolder(tmp_path)])


def test_runs_of_one_name_are_told_apart(make: Make, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    runs = [make("a/run"), make("b/run", "cifar10/byol"), make("c")]
    captions = [caption for caption in Page(report.page(runs)).words("span") if caption.startswith("Run ")]
    assert captions == [f"Run {tmp_path}/a/run", f"Run {tmp_path}/b/run", "Run c"]


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
    assert done.stdout == "the report needs matplotlib: pip install 'ssl-pipeline[demo]'\n"
