import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from ssl_pipeline import config, demo
from ssl_pipeline.evaluation import linear
from ssl_pipeline.exits import Status


def test_the_whole_way(few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with a tiny network on a tenth of the data: every part of it, not its numbers."""
    load = config.load

    def small(name: str, overrides: Sequence[str] = ()) -> config.Tree:
        more = ["data.batch_size=32", "epochs=2", "backbone.arguments={layers: [1,1,1,1], channels: [8,8,8,8]}"]
        return load(name, [*overrides, *more])

    monkeypatch.setattr(config, "load", small)
    recipe = linear.Recipe
    monkeypatch.setattr(linear, "Recipe", lambda: recipe(epochs=10))
    assert demo.demo("barlow_twins", tmp_path / "run", few_digits) == Status.DONE
    summary = json.loads((tmp_path / "run" / "results" / "summary.json").read_text())
    for key in ("random_init", "pretrained"):
        assert list(summary[key]) == ["knn5", "linear", "linear_1_per_class", "linear_10_per_class"]
        assert all(0 <= value <= 100 for value in summary[key].values())
    found = json.loads((tmp_path / "run" / "results" / "analysis.json").read_text())
    assert found["pictures_in_two_views"] == 60
    assert {"spectrum", "group_norms", "cosines", "projection", "neighbours"} == found["pictures"].keys()
    assert len(list((tmp_path / "run" / "results").glob("*.png"))) == 6
    page = (tmp_path / "run" / "report.html").read_text()
    assert (
        page.count("data:image/png;base64,") == 2 * 8
    )  # loss, accuracy, two of measures, what was analysed; light and dark
    assert page.count("data:image/jpeg;base64,") == 2  # views and neighbours
    assert "://" not in page
    assert f"{summary['pretrained']['knn5']:.2f}" in page
    assert "barlow_twins + SparseHead" in page
