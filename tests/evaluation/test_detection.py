"""What of detection does not need Detectron2; tests/evaluation/test_detectron2.py has the rest."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from ssl_pipeline import backbone as backbones
from ssl_pipeline import cli, config
from ssl_pipeline.evaluation import detection
from ssl_pipeline.exits import BadInput


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detectron2 is not installed, whether it is or not."""
    monkeypatch.setitem(sys.modules, "detectron2", None)
    monkeypatch.delitem(sys.modules, "ssl_pipeline.evaluation.detectron2", raising=False)
    monkeypatch.delattr("ssl_pipeline.evaluation.detectron2", raising=False)


@pytest.mark.usefixtures("without")
def test_without_detectron2_one_sentence_says_how_to_get_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = backbones.Options(name="resnet18")
    backbones.save(backbones.build(options), options, tmp_path / "backbone.pth")
    words = ["train-detectron2", str(tmp_path / "backbone.pth"), "--output", str(tmp_path / "out")]
    assert cli.main(words, signals=False) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "Detectron2 is not installed here" in told
    assert "pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2@02b5c4e" in told
    assert not (tmp_path / "out").exists()


def test_bad_words_are_answered_before_anything_is_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train-detectron2", str(tmp_path / "none.pth"), "recipe.epochs=3"], signals=False) == 2
    assert "'recipe.epochs=3' is no option of Detectron2: give KEY.SUB=value" in capsys.readouterr().err
    assert cli.main(["train-detectron2", str(tmp_path / "none.pth")], signals=False) == 2
    assert "is neither a run folder nor a file of weights" in capsys.readouterr().err
    (tmp_path / "some.pth").write_bytes(b"")
    assert cli.main(["train-detectron2", str(tmp_path / "some.pth")], signals=False) == 2
    assert "is no run: give --output FOLDER" in capsys.readouterr().err


def test_presets_by_name_and_by_path(tmp_path: Path) -> None:
    for name in config.presets("detectron2"):
        assert detection.preset_file(name).stem == name
    (tmp_path / "mine.yaml").write_text("")
    assert detection.preset_file(str(tmp_path / "mine.yaml")) == tmp_path / "mine.yaml"
    with pytest.raises(BadInput, match="neither a file nor one of coco_mask_rcnn_c4_1x, .*voc_faster_rcnn_c4_24k"):
        detection.preset_file("coco_mask_rcnn_c4_3x")


@pytest.mark.parametrize(
    ("preset", "overrides", "end", "name"),
    [
        ("coco_mask_rcnn_c4_1x", [], "", "detection"),
        ("coco_mask_rcnn_c4_1x", [], "_epoch_0100", "detection_epoch_0100"),
        ("coco_mask_rcnn_c4_1x_barlow_twins", [], "", "detection_coco_mask_rcnn_c4_1x_barlow_twins"),
        ("coco_mask_rcnn_c4_2x", [], "", "detection_coco_mask_rcnn_c4_2x"),
        ("voc_faster_rcnn_c4_24k", ["SEED=3"], "", "detection_voc_faster_rcnn_c4_24k_seed3"),
        ("voc_faster_rcnn_c4_24k", ["SEED=0"], "", "detection_voc_faster_rcnn_c4_24k"),
        ("my/coco_mask_rcnn_c4_1x.yaml", [], "", "detection_file_coco_mask_rcnn_c4_1x"),
    ],
)
def test_only_table_3s_protocol_is_called_detection(preset: str, overrides: list[str], end: str, name: str) -> None:
    assert detection.result_name(preset, overrides, end) == name


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize(
    ("backbone", "said"),
    [
        ({"name": "resnet50"}, "Detectron2 is not installed"),
        ({"name": "resnet18"}, "as --preset coco_mask_rcnn_fpn_1x"),
        ({"name": "resnet50", "stem": "small"}, "has the stem small, for small pictures"),
        ({"name": "vit_tiny_patch16_224"}, "is no ResNet"),
    ],
)
def test_an_experiment_knows_why_it_leaves_detection_out(backbone: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        detection.possible({"backbone": backbone})
