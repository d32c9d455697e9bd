from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssl_pipeline import config
from ssl_pipeline.data.index import read_index
from ssl_pipeline.data.randomness import balanced_subset
from ssl_pipeline.evaluation import semi_supervised
from ssl_pipeline.evaluation.semi_supervised import Options
from ssl_pipeline.exits import BadInput
from tests.evaluation.test_supervised import source, tuning_recipe


def test_the_keyed_choice_is_balanced_and_a_function_of_the_seed() -> None:
    labels = np.repeat([0, 1, 2], [500, 100, 30])
    chosen = balanced_subset(0, labels, 0.1)
    assert np.bincount(labels[chosen]).tolist() == [50, 10, 3]
    assert (chosen == np.sort(chosen)).all()
    assert (chosen == balanced_subset(0, labels, 0.1)).all()
    assert (chosen != balanced_subset(1, labels, 0.1)).any()
    assert np.bincount(labels[balanced_subset(0, labels, 0.001)]).tolist() == [1, 1, 1]  # none is lost
    both = np.concatenate([labels, np.repeat(3, 40)])  # another class changes no other's choice
    assert (balanced_subset(0, both, 0.1)[: len(chosen)] == chosen).all()


def options(root: Path, **changed: Any) -> Options:
    return Options(
        features=source(root, name=changed.pop("name", "digits")), percent=changed.pop("percent", 10), **changed
    )


def test_a_list_names_the_pictures(few_digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = read_index(few_digits / "train")
    names = [index.paths[place].rpartition("/")[2] for place in (150, 3, 77)]
    (tmp_path / "mine.txt").write_text("\n".join(names) + "\n\n")
    chosen, origin = semi_supervised.subset(options(few_digits, list_path=tmp_path / "mine.txt"), 0, index)
    assert chosen.tolist() == [3, 77, 150]
    assert origin.startswith("mine.txt, md5 ")
    assert "is a list of your own" in caplog.text
    assert "names pictures of 3 classes of 10" in caplog.text
    (tmp_path / "other.txt").write_text("\n".join([names[0], "n01440764_10026.JPEG"]))
    with pytest.raises(
        BadInput,
        match=r"1 of the 2 pictures of .*other.txt' are not in .*, as n01440764_10026.JPEG: give a list of names relative",
    ):
        semi_supervised.subset(options(few_digits, list_path=tmp_path / "other.txt"), 0, index)
    doubled = replace(index, paths=("0/a.png", "1/a.png", "1/b.png"), labels=np.array([0, 1, 1]))
    (tmp_path / "both.txt").write_text("1/a.png\n1/b.png\n")
    assert semi_supervised.subset(options(few_digits, list_path=tmp_path / "both.txt"), 0, doubled)[0].tolist() == [
        1,
        2,
    ]
    (tmp_path / "bare.txt").write_text("b.png\na.png\n")
    with pytest.raises(BadInput, match=r"names 'a.png', which 2 pictures are called: name each as '0/a.png'"):
        semi_supervised.subset(options(few_digits, list_path=tmp_path / "bare.txt"), 0, doubled)
    with pytest.raises(BadInput, match="no list 'nowhere.txt' of labelled pictures"):
        semi_supervised.subset(options(few_digits, list_path=Path("nowhere.txt")), 0, index)


def test_imagenets_lists_are_simclrs_checked_and_never_fetched(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_PIPELINE_CACHE", str(tmp_path))
    index = read_index(few_digits / "train")
    imagenet = options(few_digits, name="imagenet", percent=1)
    with pytest.raises(
        BadInput, match=r"no list of ImageNet's 1 %: take imagenet_subsets/1percent.txt .*b61c91b8.* --list"
    ):
        semi_supervised.subset(imagenet, 0, index)
    text = "\n".join(path.rpartition("/")[2] for path in index.paths[::16]).encode()
    (tmp_path / "1percent.txt").write_bytes(text)
    with pytest.raises(BadInput, match=r"1percent.txt' is not SimCLR's list \(md5 .*, 10 lines\)"):
        semi_supervised.subset(imagenet, 0, index)
    md5 = hashlib.md5(text, usedforsecurity=False).hexdigest()
    monkeypatch.setitem(semi_supervised.LISTS, 1, ("1percent.txt", md5, 10))
    chosen, origin = semi_supervised.subset(imagenet, 0, index)
    assert chosen.tolist() == list(range(0, 160, 16))
    assert origin == "google-research/simclr 1percent.txt"
    with pytest.raises(BadInput, match=r"--percent 5: ImageNet's lists are of 1 and 10 percent"):
        semi_supervised.subset(options(few_digits, name="imagenet", percent=5), 0, index)


def test_a_sweep_chooses_on_held_out_labels_and_then_trains_on_all(few_digits: Path, tmp_path: Path) -> None:
    recipe = tuning_recipe(epochs=1, batch_size=8, backbone_rates=[1e-4, 1e-2], head_rates=[0.1], held_out=0.25)
    asked = options(few_digits, percent=50, sweep=True)
    result, names = semi_supervised.run(asked, recipe, "barlow_twins", tmp_path)
    assert len(names) == result["labelled_pictures"] == 80
    assert [point["backbone_rate"] for point in result["sweep"]] == [1e-4, 1e-2]
    assert all(set(point) == {"backbone_rate", "learning_rate", "held_out_top1"} for point in result["sweep"])
    best = max(result["sweep"], key=lambda point: point["held_out_top1"])
    assert result["backbone_rate"] == best["backbone_rate"]
    assert result["chosen_on"] == "held-out part of the labelled pictures"
    folders = sorted((tmp_path / "evaluations").iterdir())
    assert len(folders) == 3
    seen = [json.loads((folder / "history.json").read_text())[0] for folder in folders]
    assert sorted("val" in row for row in seen) == [False, False, True]  # the points saw no test label
    on_val = recipe.model_copy(update={"choose_on": "val"})
    assert semi_supervised.run(asked, on_val, "barlow_twins", tmp_path)[0]["chosen_on"] == "val"


def test_the_default_sweep_surrounds_the_preset(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def noted(options: Any, recipe: Any, rates: tuple[float, float], *_: Any) -> Any:
        tried.append(rates)
        top1 = -abs(rates[0] - 0.0025) - abs(rates[1] - 1.0)
        return [{"epoch": 1, "held_out": {"top1": [top1]}, "val": {"top1": [50.0], "top5": [60.0]}}], "folder"

    monkeypatch.setattr(semi_supervised, "_fine_tune", noted)
    result, _ = semi_supervised.run(
        options(few_digits, percent=50, sweep=True), tuning_recipe(), "barlow_twins", tmp_path
    )
    assert tried[:-1] == [(b, h) for b in (0.0025, 0.005, 0.01) for h in (0.25, 0.5, 1.0)]
    assert tried[-1] == (0.0025, 1.0)
    assert (result["backbone_rate"], result["learning_rate"]) == (0.0025, 1.0)


def test_percent_is_a_share() -> None:
    for percent in (0, 101):
        with pytest.raises(BadInput, match="`percent`"):
            config.validate(Options, {"features": source(Path()), "percent": percent})
