"""A flat folder of pictures without labels is pretrained on, from files and from shards; what needs labels says so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ssl_pipeline import pretrain
from ssl_pipeline.data.index import read_index
from ssl_pipeline.data.pack import pack
from ssl_pipeline.evaluation import features
from ssl_pipeline.exits import BadInput, Status
from ssl_pipeline.run_folder import read_lines
from tests.test_pretrain import options


@pytest.fixture
def flat(few_digits: Path, tmp_path: Path) -> Path:
    """The training digits without classes, some of them deeper than others."""
    for number, path in enumerate(sorted((few_digits / "train").rglob("*.png"))):
        target = tmp_path / "flat" / "train" / ("more/and more" if number % 3 == 0 else "") / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return tmp_path / "flat"


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_lines(run / "metrics.jsonl") if "loss" in row]


def test_it_pretrains_from_files_and_shards_alike(flat: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chosen = ("max_steps=3", "online.knn_every_epochs=1", "monitor.every_steps=1")
    caplog.set_level("INFO")
    assert pretrain.pretrain(options(flat, *chosen), tmp_path / "run") == Status.DONE
    assert caplog.text.count("no accuracy is measured while training: the pictures in") == 1
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert not [key for row in rows for key in row if key.startswith("online")]
    pack(flat, tmp_path / "out", shard_size=100_000, processes=1)
    assert pretrain.pretrain(options(tmp_path / "out", *chosen), tmp_path / "shards") == Status.DONE
    assert losses(tmp_path / "shards") == losses(tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 3
    order = (*chosen, "data.shuffle=shards", "data.shuffle_window=2")
    assert pretrain.pretrain(options(tmp_path / "out", *order), tmp_path / "windows") == Status.DONE
    assert losses(tmp_path / "windows") != losses(tmp_path / "run")
    for refused in (lambda: pretrain.consequences(options(flat, *order), 1),
                    lambda: pretrain.pretrain(options(flat, *order), tmp_path / "no")):  # fmt: skip
        with pytest.raises(BadInput, match=r"data.shuffle = shards reads tar shards, and .*/train' is a folder"):
            refused()
    with pytest.raises(BadInput, match=r"the pictures in .*flat/train' have no labels, and this needs them"):
        features.extract(features.options(tmp_path / "run"), "train")


def test_a_split_without_labels_is_named(flat: Path, few_digits: Path, tmp_path: Path) -> None:
    shutil.copytree(few_digits / "train", tmp_path / "half" / "train")
    shutil.copytree(flat / "train", tmp_path / "half" / "val")
    for split in ("train", "val"):
        with pytest.raises(BadInput, match=r"the pictures in .*half/val' have no labels"):
            features.pictures_of(tmp_path / "half", split)
    assert read_index(tmp_path / "half" / "train").classes
