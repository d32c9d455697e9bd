"""On Detectron2 itself: skipped where it is not installed (docs/detection.md tells how to build it from source)."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn

from ssl_pipeline import backbone as backbones
from ssl_pipeline import config, export
from ssl_pipeline.data.augment import Normalize

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.modeling import build_model

from ssl_pipeline.evaluation import detection, detectron2

pytestmark = pytest.mark.slow
SMALL = [
    "INPUT.MIN_SIZE_TRAIN=(128,)", "INPUT.MIN_SIZE_TEST=128", "INPUT.MAX_SIZE_TRAIN=192", "INPUT.MAX_SIZE_TEST=192",
    "SOLVER.IMS_PER_BATCH=2", "TEST.PRECISE_BN.NUM_ITER=2", "DATALOADER.NUM_WORKERS=0", "SOLVER.BASE_LR=0.001",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN=50", "MODEL.RPN.POST_NMS_TOPK_TEST=20", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE=16",
]  # fmt: skip


def moved(name: str, **options: object) -> tuple[nn.Module, backbones.Options]:
    """A network in which every tensor is another one's: batch-norm statistics too are drawn."""
    chosen = backbones.Options(name=name, **options)
    network = backbones.build(chosen).eval()
    for value in network.state_dict().values():
        if value.dim() == 1:
            value.uniform_(0.5, 1.5)
    return network, chosen


def photographs(root: Path) -> Path:
    """scikit-learn's two photographs as COCO's train2017 and val2017 in `root`, with a box and a polygon each."""
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


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs(tmp_path_factory.mktemp("datasets"))


@pytest.mark.parametrize(("preset", "names"), [("coco_mask_rcnn_c4_1x", "C4"), ("coco_mask_rcnn_fpn_1x", "FPN")])
def test_the_real_checkpointer_finds_every_tensor_of_the_backbone(
    tmp_path: Path, preset: str, names: str, caplog: pytest.LogCaptureFixture
) -> None:
    network, options = moved("resnet50")
    done = export.to_detectron2(network, options, tmp_path / "out.pkl", "test", detectron2.stages)
    assert done.by_detectron2 is not None
    assert done.by_detectron2 <= 1e-10  # in float64
    cfg = detectron2.configured(config.packaged_configs() / "detectron2" / f"{preset}.yaml", [], done.resnet.settings)
    model = build_model(detectron2.on_device(cfg, torch.device("cpu")))
    file = Path(__file__).parents[1] / "data" / f"mask_rcnn_R_50_{names}_state_dict.json"
    committed = json.loads(file.read_text())["state_dict"]
    ours = {key: list(value.shape) for key, value in model.state_dict().items() if "num_batches_tracked" not in key}
    backbone = re.compile(r"(backbone\.(bottom_up\.)?(stem|res\d)|roi_heads\.res5\.\d)\.")
    assert {key: shape for key, shape in ours.items() if backbone.match(key)} == {
        key: shape for key, shape in committed.items() if backbone.match(key)
    }
    assert len([key for key in ours if backbone.match(key)]) == done.tensors == 265
    checkpointer = DetectionCheckpointer(model)
    kept: list[object] = []
    load = checkpointer._load_model
    checkpointer._load_model = lambda values: kept.append(load(values)) or kept[-1]
    checkpointer.load(str(tmp_path / "out.pkl"))
    (found,) = kept
    missing = [
        key for key in found.missing_keys if key.startswith(("backbone.bottom_up", "backbone.stem", "backbone.res"))
    ]
    assert [key for key in missing if "num_batches_tracked" not in key] == []
    assert found.unexpected_keys == []
    assert found.incorrect_shapes == []
    detectron2.require_loaded(model, export.read_detectron2(tmp_path / "out.pkl"))


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "wide_resnet50_2"]
)
def test_detectron2_computes_the_same_features_in_fp32(tmp_path: Path, name: str) -> None:
    network, options = moved(name)
    done = export.to_detectron2(network, options, tmp_path / "out.pkl", "test", detectron2.stages)
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
    export.to_detectron2(network, options, tmp_path / "out.pkl", "test", detectron2.stages)
    tensors = export.read_detectron2(tmp_path / "out.pkl")
    preset = config.packaged_configs() / "detectron2" / "coco_mask_rcnn_c4_1x.yaml"
    model = build_model(detectron2.on_device(detectron2.configured(preset, [], {}), torch.device("cpu")))
    with pytest.raises(detectron2.BadInput, match="did not take"):
        detectron2.require_loaded(model, tensors)


# ------------------------------------------------------------------------------------------------------ the whole command
def words(source: Path, coco: Path, output: Path, *more: str) -> list[str]:
    return [
        "train-detectron2", str(source), "--datasets", str(coco), "--output", str(output), *SMALL,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST=0.0", "TEST.DETECTIONS_PER_IMAGE=5", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network, options = moved("resnet50")
    path = tmp_path_factory.mktemp("weights") / "backbone.pth"
    backbones.save(network, options, path)
    return path


def test_three_iterations_of_the_c4_config_train_and_are_measured(
    tmp_path: Path, coco: Path, weights: Path, command: Callable[..., subprocess.CompletedProcess]
) -> None:
    line = words(weights, coco, tmp_path / "out", "SOLVER.MAX_ITER=3", "SOLVER.STEPS=(2,)")
    done = command(*line)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out" / "results").glob("*.json")
    result = json.loads(file.read_text())
    assert file.stem == "detection_backbone"
    assert {kind: sorted(result[kind]) for kind in ("box", "mask")} == {
        kind: ["AP", "AP50", "AP75"] for kind in ("box", "mask")
    }
    assert all(0 <= value <= 100 for kind in ("box", "mask") for value in result[kind].values())
    assert (result["preset"], result["iterations"], result["ranks"]) == ("coco_mask_rcnn_c4_1x", 3, 1)
    assert "SOLVER.MAX_ITER=3" in result["changed"]
    assert not any(text.startswith("DATALOADER") for text in result["changed"])
    (state,) = (tmp_path / "out" / "evaluations").iterdir()
    assert [path.name for path in (state / "detectron2").glob("*.pth")] == ["model_final.pth"]
    trained = torch.load(state / "detectron2" / "model_final.pth", weights_only=True)["model"]
    before = torch.load(weights, weights_only=True)
    assert not torch.equal(trained["backbone.stem.conv1.weight"], before["conv1.weight"])  # nothing is frozen
    assert "roi_heads.res5.norm.running_mean" in trained
    options, fine_tuned = export.from_detectron2(trained, "model_final.pth")
    assert options.name == "resnet50"
    assert torch.equal(fine_tuned.state_dict()["layer4.2.conv3.weight"], trained["roi_heads.res5.2.conv3.weight"])
    again = command(*line)  # finished: only read
    assert again.returncode == 0, again.stderr
    assert "is finished: its result is read, nothing is trained" in again.stderr
    assert json.loads(file.read_text()) == result


def test_a_run_that_is_stopped_goes_on_and_saves_before_it_ends(tmp_path: Path, coco: Path, weights: Path) -> None:
    line = [sys.executable, "-m", "ssl_pipeline", *words(weights, coco, tmp_path / "out", "SOLVER.MAX_ITER=40")]
    line += ["SOLVER.STEPS=(30,)", "SOLVER.CHECKPOINT_PERIOD=2"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 200
    while not list((tmp_path / "out").glob("evaluations/*/detectron2/model_0000001.pth")):
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 75, errors
    told = int(errors.rsplit("stopped by a signal after iteration ", 1)[1].split()[0])
    (state,) = (tmp_path / "out" / "evaluations").iterdir()
    newest = detectron2.newest(state / "detectron2")
    assert newest is not None
    assert detectron2.saved_iterations(newest, 40) == told
    assert len(list((state / "detectron2").glob("model_*.pth"))) <= detectron2.KEPT
    saved = torch.load(state / "detectron2" / f"model_{told - 1:07d}.pth", weights_only=True)
    assert saved["iteration"] == told - 1
    assert list((tmp_path / "out").glob("results/*.json")) == []
    # A newer one that was torn is passed over.
    (state / "detectron2" / "model_0000038.pth").write_bytes(newest.read_bytes()[:-1000])
    done = subprocess.run(
        [*line, "DATALOADER.NUM_WORKERS=1", "SOLVER.CHECKPOINT_PERIOD=7"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told_by = (state / "detectron2" / "log.txt").read_text()
    assert f"Loading trainer from {newest}" in told_by
    assert f"Loading model from {state / 'backbone.pkl'}" not in told_by.partition(f"Loading trainer from {newest}")[2]
    final = torch.load(state / "detectron2" / "model_final.pth", weights_only=True)
    assert final["iteration"] == 39
    events = [json.loads(text) for text in (state / "jobs.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "start"] == [0, told]
    assert [event["status"] for event in events if event["event"] == "end"] == [75, 0]


def test_two_ranks_train(
    tmp_path: Path,
    coco: Path,
    weights: Path,
    command: Callable[..., subprocess.CompletedProcess],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = command(*words(weights, coco, tmp_path / "out", "SOLVER.MAX_ITER=3", "SOLVER.STEPS=(2,)"), ranks=2)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out" / "results").glob("*.json")
    assert json.loads(file.read_text())["ranks"] == 2
    three = command(*words(weights, coco, tmp_path / "three"), "SOLVER.IMS_PER_BATCH=3", ranks=2)
    assert "SOLVER.IMS_PER_BATCH = 3 cannot be divided by 2 ranks" in three.stderr
    wild = command(
        *words(weights, coco, tmp_path / "wild", "SOLVER.MAX_ITER=9", "SOLVER.STEPS=(8,)"),
        *("SOLVER.BASE_LR=1e30", "SOLVER.WARMUP_ITERS=0"),
        ranks=2,
    )
    assert "the loss is not finite at iteration" in wild.stderr
    assert "exitcode  : 76" in wild.stderr


def test_the_order_of_pictures_goes_on_where_it_stopped() -> None:
    whole = list(islice(detectron2._Sampler(7, 3, 0), 40))
    assert list(islice(detectron2._Sampler(7, 3, 16), 24)) == whole[16:]
    assert sorted(whole[:7]) == list(range(7))
    assert whole[:7] != whole[7:14]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["SOLVER.BASE_RATE=1"], "no option 'SOLVER.BASE_RATE'; near it: SOLVER.BASE_LR"),
        (["SOLVER.MAX_ITER=many"], "does not take SOLVER.MAX_ITER"),
        (["epochs=3"], "'epochs=3' is no option of Detectron2"),
        (["--preset", "coco_mask_rcnn_c4_3x"], "no preset 'coco_mask_rcnn_c4_3x'"),
        (["--preset", "voc_faster_rcnn_c4_24k"], "voc_2007_trainval is not here"),
        (["DATASETS.TEST=('cats',)"], "no data set 'cats'"),
        (["DATASETS.TEST=('coco_2017_val','coco_2017_train')"], "a result is of one data set"),
        (["DATASETS.TEST=('lvis_v1_val',)"], "no data set 'lvis_v1_val' that it can evaluate"),
        (["MODEL.RESNETS.DEPTH=101"], "MODEL.RESNETS.DEPTH follows from the source"),
        (["INPUT.FORMAT=BGR"], "INPUT.FORMAT follows from the source"),
        (["MODEL.WEIGHTS=x.pkl"], "MODEL.WEIGHTS follows from the source"),
        (["TEST.AUG.ENABLED=True"], "TEST.AUG and TEST.EXPECTED_RESULTS are not done here"),
        (["SEED=-1"], "SEED = -1 would be another one after each stop"),
        (["SOLVER.AMP.ENABLED=True"], "SOLVER.AMP.ENABLED is for GPUs"),
    ],
)
def test_bad_input(
    tmp_path: Path,
    coco: Path,
    weights: Path,
    command: Callable[..., subprocess.CompletedProcess],
    more: list[str],
    said: str,
) -> None:
    done = command(*words(weights, coco, tmp_path / "out", *more))
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_c4_head_has_no_basic_blocks(
    tmp_path: Path, coco: Path, command: Callable[..., subprocess.CompletedProcess]
) -> None:
    network, options = moved("resnet18")
    backbones.save(network, options, tmp_path / "r18.pth")
    done = command(*words(tmp_path / "r18.pth", coco, tmp_path / "out"))
    assert done.returncode == 2
    assert "as --preset coco_mask_rcnn_fpn_1x" in done.stderr
    fpn = ["--preset", "coco_mask_rcnn_fpn_1x", "SOLVER.MAX_ITER=2", "SOLVER.STEPS=(1,)"]
    done = command(*words(tmp_path / "r18.pth", coco, tmp_path / "out", *fpn))
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out" / "results").glob("*.json")
    assert file.stem == "detection_coco_mask_rcnn_fpn_1x_r18"


def test_a_preset_of_ones_own_reads_rgb_and_has_a_seed(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("SOLVER: {MAX_ITER: 5}\n")
    network, options = moved("resnet50")
    source = export.Source("x", options, network, Normalize(op="normalize"))
    cfg = detectron2.configured(detection.preset_file(str(tmp_path / "mine.yaml")), [], source.pixels)
    assert (cfg.INPUT.FORMAT, cfg.SEED, cfg.SOLVER.MAX_ITER) == ("RGB", 0, 5)
    other = detectron2.configured(
        tmp_path / "mine.yaml", ["DATALOADER.NUM_WORKERS=1", "SOLVER.CHECKPOINT_PERIOD=7"], {}
    )
    third = detectron2.configured(tmp_path / "mine.yaml", ["DATALOADER.ASPECT_RATIO_GROUPING=False"], {})
    plain = [
        detectron2.plain(one, detection.UNCHANGING)
        for one in (detectron2.configured(tmp_path / "mine.yaml", [], {}), other, third)
    ]
    assert plain[0] == plain[1] != plain[2]


def test_the_mean_of_the_pictures_is_the_runs_own(tmp_path: Path) -> None:
    network, options = moved("resnet50")
    normalize = Normalize(op="normalize", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    source = export.Source("x", options, network, normalize)
    cfg = detectron2.configured(detection.preset_file(detection.PAPER), [], {**source.pixels})
    assert cfg.INPUT.FORMAT == "RGB"
    assert pytest.approx([127.5, 102.0, 76.5]) == cfg.MODEL.PIXEL_MEAN
    assert pytest.approx([51.0, 76.5, 102.0]) == cfg.MODEL.PIXEL_STD
    facts = detectron2.plain(cfg, detection.UNCHANGING)
    assert facts["SOLVER"]["BASE_LR"] == 0.02
    assert "OUTPUT_DIR" not in facts
    assert np.allclose(facts["MODEL"]["PIXEL_MEAN"], [127.5, 102.0, 76.5])
