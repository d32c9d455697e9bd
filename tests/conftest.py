"""Data that every test may use, and an account of what was skipped.

Pictures are scikit-learn's digits and its two photographs. SSL_PIPELINE_TEST_DATA may name a folder with
imagenet_sample.tar and the like; tests that use it add to the others and replace none.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from ssl_pipeline import distributed
from ssl_pipeline.data.prepare import prepare

EXPECTED_SKIPS = Path(__file__).parent / "expected_skips.txt"


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits in the one layout."""
    out = tmp_path_factory.mktemp("data") / "digits"
    prepare("digits", out)
    return out


@pytest.fixture(scope="session")
def few_digits(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 training and 6 validation pictures of each digit."""
    root = tmp_path_factory.mktemp("data") / "few"
    for split, count in (("train", 16), ("val", 6)):
        for folder in sorted((digits / split).iterdir()):
            (root / split / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[:count]:
                shutil.copyfile(path, root / split / folder.name / path.name)
    return root


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 JPEGs of many sizes cut from scikit-learn's two photographs: train/ and val/, a class a photograph."""
    root = tmp_path_factory.mktemp("data") / "photos"
    rng = np.random.default_rng(0)
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        for number in range(36):
            height, width = rng.integers(40, 400, 2)
            top, left = rng.integers(0, photo.shape[0] - height), rng.integers(0, photo.shape[1] - width)
            folder = root / ("train" if number < 32 else "val") / name
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(photo[top : top + height, left : left + width])
            picture.save(folder / f"{number:03d}.jpg", quality=90)
    return root


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of additional real pictures, or a skip."""
    folder = os.environ.get("SSL_PIPELINE_TEST_DATA")
    if not folder:
        pytest.skip("SSL_PIPELINE_TEST_DATA names no folder of additional pictures")
    return Path(folder)


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """`ssl-pipeline` in a process of its own, in an empty folder."""

    def run(*words: object, ranks: int = 1) -> subprocess.CompletedProcess:
        launcher = [sys.executable, "-m"]
        if ranks > 1:
            launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
        line = [*launcher, "ssl_pipeline", *map(str, words)]
        return subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)

    return run


@pytest.fixture(autouse=True, scope="session")
def _alone() -> Iterator[None]:
    distributed.start()
    yield
    distributed.stop()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    distributed.start()  # again, where a test ran a verb to its end
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    """A verb that ran in this process leaves a level, and a handler of a stream that pytest closes."""
    yield
    log = logging.getLogger("ssl_pipeline")
    log.handlers.clear()
    log.setLevel(logging.NOTSET)


# ---------------------------------------------------------------------------------------------------- what was skipped
_skipped: list[tuple[str, str]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skipped.append((report.nodeid, reason))


def _unexpected() -> list[str]:
    patterns = [line.split("#")[0].strip() for line in EXPECTED_SKIPS.read_text().splitlines()]
    patterns = [pattern for pattern in patterns if pattern]
    return [node for node, _ in _skipped if not any(fnmatch.fnmatchcase(node, pattern) for pattern in patterns)]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if _unexpected() and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for node, reason in _skipped:
        terminalreporter.write_line(f"skipped: {node}: {reason}")
    for node in _unexpected():
        terminalreporter.write_line(f"UNEXPECTED SKIP, which fails the suite: {node} is not in {EXPECTED_SKIPS.name}")
