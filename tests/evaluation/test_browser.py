"""report.html in a headless Chromium: what a reader sees, and that nothing is asked of the network."""

import base64
import io
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from ssl_pipeline.evaluation import pictures, report
from tests.evaluation.browser import Browser, browser, chromium
from tests.evaluation.test_report import analysed, made

WIDE, NARROW = 1400, 390


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every part in it: of two seeds, and of a run with a long name and a long command."""
    root = tmp_path_factory.mktemp("runs")
    runs = [
        made(
            root, "s0", linear_probe={"linear_top1": 92.0, "changed": ["epochs=2"], "weights": "a/" * 60}, **analysed()
        ),
        made(root, "s1", "cifar10/simclr_sparsehead", "seed=1", knn={"knn5_top1": 90.5}, **analysed()),
        made(root, "a" * 90, "cifar10/byol", knn={f"key{n}": float(n) for n in range(12)}),
    ]
    for run in runs:
        with run.metrics.open("a") as file:
            file.write('{"step": 40, "heldout_rankme": 2.5}\n')
        Image.fromarray(np.zeros((300, 700, 3), np.uint8)).save(run.views)
    Image.fromarray(np.zeros((1740, 1480, 3), np.uint8)).save(runs[0].results / "neighbours.png")
    path, _ = report.write(runs, root / "report")
    return path


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    """A running browser."""
    program = chromium()
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no Chromium here: apt-get install chromium")
    with browser(program) as running:
        yield running


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_the_report_is_whole(chrome: Browser, page: Path, width: int, dark: bool) -> None:
    chrome.open(page, width, dark)
    assert chrome.value("document.querySelectorAll('section').length") == len(report.PARTS)
    broken = "[...document.images].filter(image => !image.complete || !image.naturalWidth).length"
    assert chrome.value(broken) == 0
    # What is too wide scrolls in a frame of its own, the page never.
    assert chrome.value("document.documentElement.scrollWidth") == width
    assert chrome.complaints() == []
    assert chrome.requests() == []
    paper = ImageColor.getrgb((pictures.DARK if dark else pictures.LIGHT).paper)
    pixels = np.asarray(Image.open(io.BytesIO(chrome.screenshot()), formats=["PNG"]).convert("RGB"))
    assert pixels.shape[1] == width
    assert (pixels == paper).all(axis=2).mean() > 0.5
    # Drawings are those of this scheme: their corner is the page's paper.
    shown = chrome.value("document.querySelector('.curve img').currentSrc")
    drawn = Image.open(io.BytesIO(base64.b64decode(shown.partition(",")[2])), formats=["PNG"])
    assert drawn.convert("RGB").getpixel((0, 0)) == paper


def test_everything_is_reached_by_the_keyboard(chrome: Browser, page: Path) -> None:
    chrome.open(page, NARROW, dark=False)
    hidden = "[...document.querySelectorAll('*')].filter(e => e.scrollWidth > e.clientWidth + 1 && e.tabIndex < 0 && "
    hidden += "['auto', 'scroll'].includes(getComputedStyle(e).overflowX)).map(e => e.className)"
    assert chrome.value(hidden) == []  # what scrolls can be focused, and then by the arrow keys
    assert chrome.value("document.querySelectorAll('.scroll').length") > 10
    chrome.value("document.querySelector('nav a').focus()")
    for kind in ("keyDown", "keyUp"):
        chrome.ask("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
    assert chrome.value("document.activeElement.getAttribute('href')") == "#results"
    chrome.value("document.querySelector('summary').focus()")
    for kind in ("keyDown", "keyUp"):
        enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        chrome.ask("Input.dispatchKeyEvent", type=kind, **enter)
    assert chrome.value("document.querySelector('details').open") is True


def test_paper_is_white_and_shows_what_is_folded(chrome: Browser, page: Path) -> None:
    chrome.open(page, 800, dark=True, media="print")
    assert chrome.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert (
        chrome.value("document.querySelector('details table').checkVisibility({contentVisibilityAuto: true})") is True
    )
    assert chrome.value("document.querySelector('nav').checkVisibility()") is False


def test_the_policy_forbids_the_network(chrome: Browser, page: Path, tmp_path: Path) -> None:
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "text/css")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        attack = (
            f'<img src="{here}/img"><link rel="stylesheet" href="{here}/css"><script src="{here}/js"></script>'
            f'<script>fetch("{here}/fetch"); document.title = "ran"</script><iframe src="{here}/frame"></iframe>'
            f'<p style="background: url({here}/style)">x</p><style>p {{ background: url({here}/sheet) }}</style>'
        )
        text = page.read_text().replace("<main>", f"<main>{attack}", 1)
        policy = text.partition('<meta http-equiv="Content-Security-Policy"')
        bare = policy[0] + policy[2].partition(">")[2]
        try:
            for name, content in (("forbidden.html", text), ("allowed.html", bare)):
                (tmp_path / name).write_text(content)
                asked.clear()
                chrome.open(tmp_path / name, WIDE, dark=False)
                if name == "forbidden.html":
                    assert asked == []
                    assert chrome.value("document.title") != "ran"
                    assert len(chrome.complaints()) >= 5  # each refusal is told
            assert {"/img", "/css", "/js", "/frame"} <= set(asked)  # so the attack is one
            assert chrome.value("document.title") == "ran"
        finally:
            server.shutdown()
