"""Object detection: a backbone converted, fine-tuned and measured by Detectron2, for the paper's Table 3.

State lies in RUN/evaluations/<name>-<digest>/, a run folder like every evaluation's that trains: the same command goes on
there. What needs Detectron2 itself is in detectron2.py, so that this file can say how to get it.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_pipeline import cluster, config, distributed, export
from ssl_pipeline.evaluation import supervised
from ssl_pipeline.exits import BadInput, Status, Stop
from ssl_pipeline.run_folder import RunFolder, write_json

log = logging.getLogger("ssl_pipeline")

PAPER = "coco_mask_rcnn_c4_1x"
"""The preset of Table 3."""

INSTALL = (
    "Detectron2 is not installed here, and PyPI has none for this torch: build it from source where there is a C++ compiler, "
    "python -m pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2@02b5c4e (docs/detection.md)"
)


UNCHANGING = ("DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD", "VIS_PERIOD", "CUDNN_BENCHMARK")
"""Options of Detectron2 that do not change what comes out: a run goes on when they do."""


def preset_file(preset: str) -> Path:
    """The file of a preset, given by name or as a path. Raises BadInput."""
    known = config.presets("detectron2")
    if preset in known:
        return config.packaged_configs() / "detectron2" / f"{preset}.yaml"
    if Path(preset).is_file():
        return Path(preset)
    raise BadInput(f"no preset {preset!r} of train-detectron2: neither a file nor one of {', '.join(known)}")


def result_name(preset: str, overrides: Sequence[str], end: str) -> str:
    """The name of a result's file: `detection` for Table 3's protocol."""
    kind = (
        ""
        if preset == PAPER
        else f"_{preset}"
        if preset in config.presets("detectron2")
        else f"_file_{Path(preset).stem}"
    )
    seeds = [text.removeprefix("SEED=") for text in overrides if text.startswith("SEED=")]
    seed = f"_seed{seeds[-1]}" if seeds and seeds[-1] != "0" else ""
    return f"detection{kind}{seed}{end}"


def require_detectron2(datasets: Path | None) -> None:
    """Raises BadInput where Detectron2 cannot be imported; `datasets` is the folder that it will look into."""
    if datasets is not None:
        os.environ["DETECTRON2_DATASETS"] = str(datasets.absolute())  # it reads this when it is imported
    try:
        from ssl_pipeline.evaluation import detectron2  # noqa: F401
    except ImportError as error:
        raise BadInput(f"{INSTALL}; the import says: {error}") from None


def stages() -> export.Stages | None:
    """Detectron2's own features; None where it cannot be imported."""
    try:
        from ssl_pipeline.evaluation import detectron2
    except ImportError:
        return None
    return detectron2.stages


def possible(values: Mapping[str, Any]) -> None:
    """Raises BadInput where the backbone of a pretraining config cannot go through Table 3's evaluation here."""
    options = config.validate(export.backbones.Options, values.get("backbone", {}), prefix="backbone.")
    resnet = export.detectron2_resnet(export.backbones.on_meta(options), options)
    if not resnet.bottleneck:
        raise _basic_blocks(resnet)
    require_detectron2(None)
    from ssl_pipeline.evaluation import detectron2

    detectron2.require_possible(detectron2.configured(preset_file(PAPER), [], {}), 1)


def _basic_blocks(resnet: export.Detectron2ResNet) -> BadInput:
    return BadInput(
        f"Detectron2's C4 head is made of blocks of three convolutions, which ResNet-{resnet.depth} does not have: give a "
        "preset with FPN, as --preset coco_mask_rcnn_fpn_1x"
    )


def prepare(source: export.Source, preset: str, overrides: Sequence[str], ranks: int) -> Any:
    """Detectron2's config for a source, all that can be checked before anything runs having been. Raises BadInput."""
    from ssl_pipeline.evaluation import detectron2

    resnet = export.detectron2_resnet(source.backbone, source.options)
    cfg = detectron2.configured(preset_file(preset), overrides, {**resnet.settings, **source.pixels})
    if cfg.MODEL.ROI_HEADS.NAME.startswith("Res5ROIHeads") and not resnet.bottleneck:
        raise _basic_blocks(resnet)
    detectron2.require_possible(cfg, ranks)
    return cfg


def run(source: export.Source, preset: str, overrides: Sequence[str], parent: Path, name: str) -> dict[str, Any]:
    """Convert, fine-tune, measure: {"box": {AP, AP50, AP75}, "mask": ...} in percent, and how it was made.

    Goes on where the folder's newest checkpoint is; a finished one is only read. All ranks must call it. Raises BadInput,
    and Stop with status 75 after a signal, with 76 where the loss is not finite.
    """
    from ssl_pipeline.evaluation import detectron2

    world = distributed.start()
    cfg = distributed.together(lambda: prepare(source, preset, overrides, world.size))
    pictures = distributed.together(lambda: detectron2.digests(cfg) if world.is_main else None)
    facts = {
        "evaluation": "detection",
        "backbone": source.options.model_dump(mode="json"),
        "weights": supervised.digest(source.backbone),
        "detectron2": detectron2.plain(cfg, UNCHANGING),
        "pictures": distributed.gather_json(pictures)[0],
    }
    run = supervised.folder(parent, name, facts)
    finished, weights = run.path / "results.json", run.path / "backbone.pkl"

    def begin() -> None:
        if world.is_main:
            run.open_for_writing(facts)
            cluster.require_progress(run.events())
            if not finished.is_file():
                export.to_detectron2(
                    source.backbone, source.options, weights, f"ssl_pipeline, from {source.name}", stages()
                )

    distributed.together(begin)
    try:
        results = distributed.gather_json(
            json.loads(finished.read_text()) if world.is_main and finished.is_file() else None
        )
        if results[0] is not None:
            log.info("%s is finished: its result is read, nothing is trained", run.path)
        else:
            cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS = str(run.path / "detectron2"), str(weights)
            results = [{**_train(run, cfg, weights, world), "ranks": world.size}]
            distributed.together(lambda: _finish(run, finished, results[0]) if world.is_main else None)
    finally:
        run.close()
    told = {
        "preset": preset,
        "detectron2": detectron2.version,
        "iterations": cfg.SOLVER.MAX_ITER,
        "seed": cfg.SEED,
    }
    return {**results[0], **told, "state": str(run.path)}


def _train(run: RunFolder, cfg: Any, weights: Path, world: distributed.World) -> dict[str, Any]:
    from ssl_pipeline.evaluation import detectron2

    status, last = Status.CRASH, cfg.SOLVER.MAX_ITER
    if world.is_main:
        first = detectron2.saved_iterations(detectron2.newest(Path(cfg.OUTPUT_DIR)), last)
        run.record("start", job=cluster.job_id(), host=socket.gethostname(), ranks=world.size, step=first, steps=last)
    try:
        tensors = distributed.together(lambda: export.read_detectron2(weights))
        found: dict[str, Any] = detectron2.train(cfg, tensors)
        status = Status.DONE
        return found
    except Stop as stop:
        status = stop.status
        raise
    finally:
        if world.is_main:
            run.record("end", status=int(status))


def _finish(run: RunFolder, finished: Path, results: Mapping[str, Any]) -> None:
    write_json(finished, results)
    for checkpoint in (run.path / "detectron2").glob("model_[0-9]*.pth"):  # model_final.pth stays
        checkpoint.unlink()
