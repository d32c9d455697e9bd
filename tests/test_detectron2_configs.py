"""configs/detectron2 against the public configs that they follow, without Detectron2."""

from __future__ import annotations

import ast
import glob
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssl_pipeline import cli, config

ROOT = Path(__file__).parents[1]
FOLDER = config.packaged_configs() / "detectron2"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))

# facebookresearch/moco, branch KaimingHe-patch-1, detection/configs/*_moco.yaml; facebookresearch/detectron2 configs/
# Base-RCNN-C4.yaml, Base-RCNN-FPN.yaml and COCO-InstanceSegmentation/; the learning rates of Barlow Twins are of its paper.
EVERYWHERE = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.NORM": "SyncBN",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "INPUT.FORMAT": "RGB",
    "INPUT.MIN_SIZE_TEST": 800,
    "TEST.PRECISE_BN.ENABLED": True,
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.BASE_LR": 0.02,
    "VERSION": 2,
    "SEED": 0,
}
C4 = {
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 6000,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm",
}
FPN = {
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.NORM": "SyncBN",
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 2000,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 1000,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1000,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 4,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 14,
}
COCO = {
    "MODEL.MASK_ON": True,
    "INPUT.MIN_SIZE_TRAIN": [640, 672, 704, 736, 768, 800],
    "DATASETS.TRAIN": ["coco_2017_train"],
    "DATASETS.TEST": ["coco_2017_val"],
    "SOLVER.STEPS": [60000, 80000],
    "SOLVER.MAX_ITER": 90000,
}
VOC = {
    "MODEL.MASK_ON": False,
    "MODEL.ROI_HEADS.NUM_CLASSES": 20,
    "INPUT.MIN_SIZE_TRAIN": [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
    "DATASETS.TRAIN": ["voc_2007_trainval", "voc_2012_trainval"],
    "DATASETS.TEST": ["voc_2007_test"],
    "SOLVER.STEPS": [18000, 22000],
    "SOLVER.MAX_ITER": 24000,
    "SOLVER.WARMUP_ITERS": 100,
}
EXPECTED: dict[str, dict[str, Any]] = {
    "coco_mask_rcnn_c4_1x": {**EVERYWHERE, **C4, **COCO},
    "coco_mask_rcnn_c4_1x_barlow_twins": {**EVERYWHERE, **C4, **COCO, "SOLVER.BASE_LR": 0.03},
    "coco_mask_rcnn_c4_2x": {
        **EVERYWHERE,
        **C4,
        **COCO,
        "SOLVER.STEPS": [120000, 160000],
        "SOLVER.MAX_ITER": 180000,
    },
    "coco_mask_rcnn_fpn_1x": {**EVERYWHERE, **FPN, **COCO},
    "voc_faster_rcnn_c4_24k": {**EVERYWHERE, **C4, **VOC},
    "voc_faster_rcnn_c4_24k_barlow_twins": {
        **EVERYWHERE,
        **C4,
        **VOC,
        "SOLVER.BASE_LR": 0.1,
        "SOLVER.WARMUP_FACTOR": 0.333,
        "SOLVER.WARMUP_ITERS": 1000,
    },
}


def resolved(path: Path) -> dict[str, Any]:
    """Dotted keys of a config with those of its `_BASE_` below it, as Detectron2 merges them."""
    values = yaml.safe_load(path.read_text())
    base = values.pop("_BASE_", None)
    return {**(resolved(path.parent / base) if base else {}), **config.flatten(values)}


def test_these_are_all() -> None:
    assert config.presets("detectron2") == sorted(EXPECTED)
    assert {name for name in FILES if name.startswith("_")} == {"_ssl.yaml", "_c4.yaml"}


@pytest.mark.parametrize("name", EXPECTED)
def test_values_are_those_of_the_public_configs(name: str) -> None:
    assert resolved(FOLDER / f"{name}.yaml") == EXPECTED[name]


def commented(text: str) -> dict[str, tuple[int, str]]:
    """Dotted key of every value of a YAML text -> its line and the comment on the line where the value ends."""
    lines = text.splitlines()
    found = {}

    def walk(node: yaml.Node, prefix: str) -> None:
        assert isinstance(node, yaml.MappingNode)
        for key, value in node.value:
            dotted = f"{prefix}{key.value}"
            if isinstance(value, yaml.MappingNode):
                walk(value, f"{dotted}.")
            else:
                end = value.end_mark
                found[dotted] = (end.line + 1, lines[end.line][end.column :].partition("#")[2].strip())

    walk(yaml.compose(text, Loader=yaml.SafeLoader), "")
    return found


def test_comments_are_found() -> None:
    text = "A:\n  B: 1  # one\n  C: '#'\n  D: [1,\n    2]  # two\nE: x # y # z\n"
    assert commented(text) == {"A.B": (2, "one"), "A.C": (3, ""), "A.D": (5, "two"), "E": (6, "y # z")}


SOURCE = re.compile(r"(MoCo|D2) \w[\w/-]*\.(yaml|py)\b|[A-Z]\w+ et al\. 20\d\d|\bours\b")


@pytest.mark.parametrize("name", FILES)
def test_every_value_names_its_source(name: str) -> None:
    values = commented((FOLDER / name).read_text())
    assert values
    without = {
        f"line {line}: {key}"
        for key, (line, comment) in values.items()
        if key not in ("_BASE_", "VERSION") and not SOURCE.search(comment)
    }
    assert without == set()


@pytest.mark.parametrize("name", FILES)
def test_a_value_is_given_once(name: str) -> None:
    """Detectron2's loader, as PyYAML's, takes the last of two and says nothing."""
    config.parse_yaml((FOLDER / name).read_text(), name)


def test_they_are_no_configs_of_pretraining(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_pipeline.distributed.stop", lambda: None)  # the tests' own process group stays
    assert cli.main(["config"], signals=False) == 0
    listed = capsys.readouterr().out.split()
    assert listed == config.packaged_names()
    assert "smoke" in listed
    assert not [name for name in listed if "detectron2" in name or "rcnn" in name]


def test_the_wheel_takes_them() -> None:
    call = next(
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    )
    given = {word.arg: word.value for word in call.keywords}
    folder = ast.literal_eval(given["package_dir"])["ssl_pipeline.configs"]
    patterns = ast.literal_eval(given["package_data"])["ssl_pipeline.configs"]
    packed = {path for pattern in patterns for path in glob.glob(pattern, root_dir=ROOT / folder, recursive=True)}
    assert {f"detectron2/{name}" for name in FILES} <= packed
