import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_pipeline import config, demo
from ssl_pipeline.evaluation import linear, report
from ssl_pipeline.exits import Status
from ssl_pipeline.run_folder import RunFolder


def test_the_whole_way(few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with a tiny network on a tenth of the data: every part of it, not its numbers."""
    load = config.load

    def small(name: str, overrides: list[str]) -> config.Tree:
        more = ["data.batch_size=32", "epochs=2", "backbone.arguments={layers: [1,1,1,1], channels: [8,8,8,8]}"]
        return load(name, [*overrides, *more])

    monkeypatch.setattr(config, "load", small)
    options = linear.Options
    monkeypatch.setattr(linear, "Options", lambda features: options(features=features, epochs=10))
    assert demo.demo("barlow_twins", tmp_path / "run", few_digits) == Status.DONE
    summary = json.loads((tmp_path / "run" / "results" / "summary.json").read_text())
    for key in ("random_init", "pretrained"):
        assert list(summary[key]) == ["knn5", "linear", "linear_1_per_class", "linear_10_per_class"]
        assert all(0 <= value <= 100 for value in summary[key].values())
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page.replace("http-equiv", "")
    assert f"{summary['pretrained']['knn5']:.1f}" in page
    assert "barlow_twins + SparseHead" in page


def test_a_report_escapes_what_it_is_given(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(run.views)
    page = report.write(run, "<script>alert(1)</script>", ["a", "<b>"], {"<i>x</i>": [1.0, None]}, "&").read_text()
    assert "<script>" not in page
    assert "<i>x" not in page
    assert "&lt;b&gt;" in page
