"""On Detectron2 itself: skipped where it is not installed (docs/detection.md tells how to build it from source)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from ssl_pipeline import backbone as backbones
from ssl_pipeline import config, export

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402

from ssl_pipeline.evaluation import detectron2  # noqa: E402

pytestmark = pytest.mark.slow
SMALL = [
    "INPUT.MIN_SIZE_TRAIN=(128,)", "INPUT.MIN_SIZE_TEST=128", "INPUT.MAX_SIZE_TRAIN=192", "INPUT.MAX_SIZE_TEST=192",
    "SOLVER.IMS_PER_BATCH=2", "TEST.PRECISE_BN.NUM_ITER=2", "DATALOADER.NUM_WORKERS=0", "SOLVER.BASE_LR=0.001",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN=50", "MODEL.RPN.POST_NMS_TOPK_TEST=20", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE=16",
]  # fmt: skip


def moved(name: str, **options: object) -> tuple[nn.Module, backbones.Options]:  # noqa: F821
    """A network in which every tensor is another one's: batch-norm statistics too are drawn."""
    chosen = backbones.Options(name=name, **options)
    network = backbones.build(chosen).eval()
    for value in network.state_dict().values():
        if value.dim() == 1:
            value.uniform_(0.5, 1.5)
    return network, chosen


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's two photographs as COCO's train2017 and val2017, with a box and a polygon each."""
    root = tmp_path_factory.mktemp("datasets")
    (root / "coco" / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (root / "coco" / split).mkdir()
        images, annotations = [], []
        for number, photo in enumerate(load_sample_images().images, start=1):
            name = f"{number:012d}.jpg"
            Image.fromarray(photo).save(root / "coco" / split / name)
            images.append({"id": number, "file_name": name, "height": photo.shape[0], "width": photo.shape[1]})
            x, y, w, h = 100.0 * number, 50.0, 300.0, 250.0
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append({
                "id": number, "image_id": number, "category_id": number, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0,
                "segmentation": [polygon],
            })  # fmt: skip
        things = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
        values = {"images": images, "annotations": annotations, "categories": things}
        (root / "coco" / "annotations" / f"instances_{split}.json").write_text(json.dumps(values))
    return root


@pytest.mark.parametrize(
    ("preset", "names"), [("coco_mask_rcnn_c4_1x", "C4"), ("coco_mask_rcnn_fpn_1x", "FPN")]
)
def test_the_real_checkpointer_finds_every_tensor_of_the_backbone(
    tmp_path: Path, preset: str, names: str, caplog: pytest.LogCaptureFixture
) -> None:
    network, options = moved("resnet50")
    done = export.to_detectron2(network, options, tmp_path / "out.pkl", "test")
    assert done.by_detectron2 is not None
    assert done.by_detectron2 <= 1e-10  # in float64
    cfg = detectron2.configured(config.packaged_configs() / "detectron2" / f"{preset}.yaml", [], done.resnet.settings)
    model = build_model(detectron2.on_device(cfg, torch.device("cpu")))
    committed = json.loads((Path(__file__).parents[1] / "data" / f"mask_rcnn_R_50_{names}_state_dict.json").read_text())
    ours = {key: list(value.shape) for key, value in model.state_dict().items()}
    extra = {"pixel_mean", "pixel_std"}
    different = {key for key in ours.keys() | committed.keys() if ours.get(key) != committed.get(key)} - extra
    assert all(".norm." in key or "num_batches" in key for key in different), different  # SyncBN's counters, MoCo's norm
    checkpointer = DetectionCheckpointer(model)
    kept: list[object] = []
    load = checkpointer._load_model
    checkpointer._load_model = lambda values: kept.append(load(values)) or kept[-1]
    checkpointer.load(str(tmp_path / "out.pkl"))
    (found,) = kept
    missing = [key for key in found.missing_keys if key.startswith(("backbone.bottom_up", "backbone.stem", "backbone.res"))]
    assert [key for key in missing if "num_batches_tracked" not in key] == []
    assert found.unexpected_keys == []
    assert found.incorrect_shapes == []
    detectron2.require_loaded(model, export.read_detectron2(tmp_path / "out.pkl"))


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "wide_resnet50_2"])
def test_detectron2_computes_the_same_features_in_fp32(tmp_path: Path, name: str) -> None:
    network, options = moved(name)
    done = export.to_detectron2(network, options, tmp_path / "out.pkl", "test")
    images = torch.randn(2, 3, 160, 128)
    expected = export.stages(network, images.double())
    cfg = detectron2.get_cfg()
    for key, value in {**done.resnet.settings, "MODEL.RESNETS.NORM": "FrozenBN"}.items():
        cfg.merge_from_list([key, value])
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    model = detectron2.build_resnet_backbone(cfg, detectron2.ShapeSpec(channels=3)).eval()
    DetectionCheckpointer(model).load(str(tmp_path / "out.pkl"))
    with torch.no_grad():
        found = model(images)
    for stage, value in expected.items():
        scale = max(value.abs().max().item(), 1.0)
        assert (found[stage].double() - value).abs().max().item() <= 1e-5 * scale, stage


def test_a_model_that_did_not_take_a_tensor_is_refused(tmp_path: Path) -> None:
    network, options = moved("resnet50")
    export.to_detectron2(network, options, tmp_path / "out.pkl", "test")
    tensors = export.read_detectron2(tmp_path / "out.pkl")
    preset = config.packaged_configs() / "detectron2" / "coco_mask_rcnn_c4_1x.yaml"
    model = build_model(detectron2.on_device(detectron2.configured(preset, [], {}), torch.device("cpu")))
    with pytest.raises(detectron2.BadInput, match="did not take"):
        detectron2.require_loaded(model, tensors)
