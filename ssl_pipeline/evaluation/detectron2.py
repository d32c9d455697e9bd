"""What runs on Detectron2 (0.6, built from its source): a detector is built on a backbone, trained, stopped, resumed, measured.

Imported only where Detectron2 is installed. The models, data, losses, schedule and evaluators are Detectron2's own; here are the
extra norm of MoCo's transfer, the loop that answers signals, and checks of what Detectron2 would only have logged.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import json
import logging
import math
import operator
import os
import weakref
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2 import __version__ as version  # noqa: F401
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog, build_detection_train_loader, get_detection_dataset_dicts
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer, create_ddp_model, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import build_model
from detectron2.modeling.backbone import build_resnet_backbone
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger
from torch import Tensor, nn

from ssl_pipeline import distributed, preemption
from ssl_pipeline.exits import BadInput, NonFinite, Status, Stop, StorageFailure
from ssl_pipeline.export import Detectron2ResNet
from ssl_pipeline.preemption import Preemption

log = logging.getLogger("ssl_pipeline")

KEPT = 2
"""Checkpoints that stay."""


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """A C4 head with a norm after res5, as MoCo's transfer has it: facebookresearch/moco detection/train_net.py."""

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Sequential, int]:
        res5, channels = super()._build_res5_block(cfg)
        res5.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
        return res5, channels


# --------------------------------------------------------------------------------------------------------- configuration
def configured(preset: Path, overrides: Sequence[str], settings: Mapping[str, Any]) -> CfgNode:
    """Detectron2's config: its defaults, a preset's file, `settings` and overrides `KEY.SUB=value`, in this order.

    Raises BadInput for a key that Detectron2 does not have, or a value of another type.
    """
    cfg = get_cfg()
    try:
        cfg.merge_from_file(str(preset), allow_unsafe=False)
    except Exception as error:  # yacs raises AssertionError, KeyError, ValueError; yaml its own
        raise BadInput(f"Detectron2 does not take the config {preset}: {error}") from None
    if cfg.SEED < 0:  # Detectron2's default, another one each time
        cfg.SEED = 0
    known = list(_leaves(cfg))
    pairs = [(key, value) for key, value in settings.items()]
    for text in overrides:
        key, _, value = text.partition("=")
        if key in ("MODEL.WEIGHTS", "MODEL.DEVICE", "OUTPUT_DIR", *settings):
            raise BadInput(f"{key} follows from the source, the machine and --output: leave it out")
        if key not in known:
            near = difflib.get_close_matches(key, known, 3, cutoff=0.4)
            raise BadInput(f"Detectron2 has no option {key!r}" + (f"; near it: {', '.join(near)}" if near else ""))
        pairs.append((key, value))
    for key, value in pairs:
        try:
            cfg.merge_from_list([key, value])
        except (ValueError, AssertionError) as error:
            raise BadInput(f"Detectron2 does not take {key} = {value!r}: {error}") from None
    return cfg


def _leaves(cfg: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for key, value in cfg.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}"


def plain(cfg: CfgNode, unchanging: Sequence[str]) -> dict[str, Any]:
    """The config as plain data, without `unchanging` keys and without where files lie."""
    values: dict[str, Any] = json.loads(json.dumps(cfg))
    for key in (*unchanging, "OUTPUT_DIR", "MODEL.WEIGHTS", "MODEL.DEVICE"):
        *sections, last = key.split(".")
        functools.reduce(operator.getitem, sections, values).pop(last)
    return values


def require_possible(cfg: CfgNode, ranks: int) -> None:
    """Raises BadInput where the ranks cannot share a batch, a data set is not there, or for what is not done here."""
    if cfg.SOLVER.IMS_PER_BATCH % ranks:
        raise BadInput(
            f"SOLVER.IMS_PER_BATCH = {cfg.SOLVER.IMS_PER_BATCH} cannot be divided by {ranks} ranks: start another number of "
            "processes"
        )
    if cfg.SOLVER.REFERENCE_WORLD_SIZE:
        raise BadInput(
            "SOLVER.REFERENCE_WORLD_SIZE would change the batch with the ranks; here it is over all of them: leave it 0"
        )
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise BadInput(
            f"DATALOADER.SAMPLER_TRAIN = {cfg.DATALOADER.SAMPLER_TRAIN} cannot be resumed: leave it TrainingSampler"
        )
    if cfg.TEST.AUG.ENABLED or cfg.TEST.EXPECTED_RESULTS:
        raise BadInput("TEST.AUG and TEST.EXPECTED_RESULTS are not done here: leave them as they are")
    if cfg.MODEL.LOAD_PROPOSALS:
        raise BadInput("MODEL.LOAD_PROPOSALS reads pickles, which could run code: leave it False")
    if cfg.SEED < 0:
        raise BadInput(f"SEED = {cfg.SEED} would be another one after each stop: give 0 or more")
    if len(cfg.DATASETS.TEST) != 1:
        raise BadInput(f"DATASETS.TEST = {tuple(cfg.DATASETS.TEST)}: a result is of one data set; give one")
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        for path in _files(name):
            if not path.exists():
                raise BadInput(
                    f"{name} is not here, there is no {path}: give --datasets FOLDER (or set DETECTRON2_DATASETS), laid out as "
                    "Detectron2's datasets/README.md says"
                )


def _files(name: str) -> list[Path]:
    """Where a data set lies: first the file that lists its pictures. Raises BadInput where it is unknown to Detectron2."""
    meta = MetadataCatalog.get(name)
    if getattr(meta, "evaluator_type", None) == "pascal_voc":
        parts = (f"ImageSets/Main/{meta.split}.txt", "Annotations", "JPEGImages")
        return [Path(meta.dirname, part) for part in parts]
    if getattr(meta, "evaluator_type", None) == "coco" and hasattr(meta, "json_file"):
        return [Path(meta.json_file), Path(meta.image_root)]
    raise BadInput(f"Detectron2 knows no data set {name!r} that it can evaluate, as coco_2017_train or voc_2007_test")


def digests(cfg: CfgNode) -> dict[str, str]:
    """A short name of the list of pictures of each data set of a config."""
    found = {}
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        whole = hashlib.sha256()
        with _files(name)[0].open("rb") as file:
            while block := file.read(1 << 24):
                whole.update(block)
        found[name] = whole.hexdigest()[:12]
    return found


# ---------------------------------------------------------------------------------------------------- what it has loaded
@torch.no_grad()
def stages(path: Path, resnet: Detectron2ResNet, images: Tensor) -> dict[str, Tensor]:
    """Outputs of Detectron2's own ResNet with the weights of a file: images (N, 3, H, W) -> res2 ... res5, in float64."""
    settings = {**resnet.settings, "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"]}
    cfg = get_cfg()
    for key, value in {**settings, "MODEL.RESNETS.NORM": "BN", "MODEL.BACKBONE.FREEZE_AT": 0}.items():
        cfg.merge_from_list([key, value])
    network = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    DetectionCheckpointer(network).load(str(path))
    found: dict[str, Tensor] = network.double().eval()(images.double())
    return found


def require_loaded(model: nn.Module, tensors: Mapping[str, np.ndarray]) -> None:
    """Raises BadInput where a tensor of the backbone file is not in the model, bit for bit, in exactly one place.

    Detectron2 only logs what it does not find.
    """
    state = model.state_dict()
    for name, value in tensors.items():
        places = [key for key in state if key == name or key.endswith(f".{name}")]
        if len(places) != 1:
            raise BadInput(
                f"Detectron2's model has {len(places)} places for {name}, not one: is it a ResNet of another depth?"
            )
        if not np.array_equal(state[places[0]].cpu().numpy(), value):
            raise BadInput(f"Detectron2's model did not take {name} from the file")


# ---------------------------------------------------------------------------------------------------------- the training
class _Sampler(TrainingSampler):
    """Detectron2's endless order of pictures, from a place in it on."""

    def __init__(self, size: int, seed: int, start: int) -> None:
        super().__init__(size, seed=seed)
        self._start = start

    def __iter__(self) -> Iterator[int]:
        yield from itertools.islice(self._infinite_indices(), self._start + self._rank, None, self._world_size)


class _Checkpointer(DetectionCheckpointer):
    """Writes whole files or none, keeps the newest, and says what a full disk means."""

    def save(self, name: str, **kwargs: Any) -> None:
        path, partial = Path(self.save_dir, f"{name}.pth"), Path(self.save_dir, f".{name}.partial")
        if path.is_file():
            return
        parts = {key: part.state_dict() for key, part in self.checkpointables.items()}
        try:
            with partial.open("wb") as file:
                torch.save({"model": self.model.state_dict(), **parts, **kwargs}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            self.tag_last_checkpoint(path.name)
            for old in sorted(Path(self.save_dir).glob("model_[0-9]*.pth"))[:-KEPT]:
                old.unlink()
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise  # a device's error, which comes to light when its tensors are copied
            partial.unlink(missing_ok=True)
            raise StorageFailure(f"cannot save {path}: {error}; free room and give the same command again") from None

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        partial = Path(self.save_dir, ".last_checkpoint.partial")
        partial.write_text(last_filename_basename)
        os.replace(partial, Path(self.save_dir, "last_checkpoint"))


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder."""
    for path in sorted(folder.glob("model_*.pth"), reverse=True):  # model_final is after all numbers
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is None:
                    return path
        except (OSError, zipfile.BadZipFile):
            pass
        log.warning("%s is damaged; looking for an older one", path)
    return None


def saved_iterations(checkpoint: Path | None, last: int) -> int:
    """Iterations that a checkpoint has done; `last` of a whole training, 0 without one."""
    if checkpoint is None:
        return 0
    return last if checkpoint.stem == "model_final" else int(checkpoint.stem.removeprefix("model_")) + 1


class Trainer(DefaultTrainer):
    """Detectron2's default training in the process group that is there, on any device, which ends well at a signal."""

    def __init__(self, cfg: CfgNode, device: torch.device, checkpoint: Path | None) -> None:
        TrainerBase.__init__(self)
        self.cfg = cfg
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.start_iter = saved_iterations(checkpoint, self.max_iter)
        seed_all_rng(cfg.SEED + self.start_iter + distributed.rank())  # other augmentations than before a stop
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        devices = None if device.type == "cpu" else [device.index]
        wrapped = create_ddp_model(model, broadcast_buffers=False, device_ids=devices)
        self._trainer = (AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer)(wrapped, loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = _Checkpointer(wrapped, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        return build_model(cfg)  # DefaultTrainer's prints all of it

    def build_train_loader(self, cfg: CfgNode) -> Any:
        """Pictures in the order of cfg.SEED, from where the last checkpoint left it."""
        pictures = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
        )
        sampler = _Sampler(len(pictures), cfg.SEED, self.start_iter * cfg.SOLVER.IMS_PER_BATCH)
        return build_detection_train_loader(cfg, dataset=pictures, sampler=sampler)

    def build_hooks(self) -> list[Any]:
        """Detectron2's, without its saving: `train` does that, on all ranks together."""
        return [hook for hook in super().build_hooks() if not isinstance(hook, hooks.PeriodicCheckpointer)]

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> Any:
        """COCO's or PASCAL VOC's, by what the data set says of itself."""
        if MetadataCatalog.get(dataset_name).evaluator_type == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        return COCOEvaluator(dataset_name, output_dir=output_folder or os.path.join(cfg.OUTPUT_DIR, "inference"))

    def train(self) -> Any:
        """Train to the end, evaluating there, and return Detectron2's results on the main rank.

        Raises Stop: with status 75 after a signal, on all ranks; with 76 on the rank that sees a loss that is not finite.
        """
        period, before_last = self.cfg.SOLVER.CHECKPOINT_PERIOD, self.max_iter - 2
        with EventStorage(self.start_iter) as self.storage:
            self.iter = self.start_iter
            self.before_train()
            with Preemption() as signals:
                while self.iter < self.max_iter - 1:
                    self._iteration()
                    stop = signals.requested()
                    if stop or (self.iter + 1) % period == 0 or self.iter == before_last:
                        self._save(f"model_{self.iter:07d}")
                    if stop:
                        for hook in self._hooks:
                            if isinstance(hook, hooks.PeriodicWriter):
                                hook.after_train()
                        raise _stopped(
                            f"after iteration {self.iter + 1} of {self.max_iter}; the same command goes on from here"
                        )
                    self.iter += 1
            # The last iteration, batch norm's statistics and the evaluation are done again where a signal ends them.
            preemption.stop_at_signals()
            if self.iter < self.max_iter:
                self._iteration()
                self._save("model_final")
                self.iter += 1
            self.after_train()
        return self._last_eval_results

    def _iteration(self) -> None:
        self.before_step()
        try:
            self.run_step()
        except (
            FloatingPointError
        ) as error:  # from the rank that sees it, some in the forward pass: the others cannot be asked
            raise NonFinite(
                f"the loss is not finite at iteration {self.iter} ({str(error).splitlines()[0]}): lower SOLVER.BASE_LR"
            ) from None
        self.after_step()

    def _save(self, name: str) -> None:
        save = functools.partial(self.checkpointer.save, name, iteration=self.iter)
        distributed.together(lambda: save() if comm.is_main_process() else None)


def _stopped(where: str) -> Stop:
    stop = Stop(f"stopped by a signal {where}")
    stop.status = Status.STOPPED
    return stop


def train(cfg: CfgNode, tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, float | None]]:
    """Fine-tune and measure the detector of a config, whose MODEL.WEIGHTS hold `tensors`; goes on in its OUTPUT_DIR.

    Returns {"box": {AP, AP50, AP75}, "mask": ...} in percent, equal on all ranks; None stands for no number. All ranks
    must call it. Raises BadInput where the ranks cannot share a batch, and Stop as `Trainer.train`.
    """
    world = distributed.start()
    if cfg.SOLVER.AMP.ENABLED and world.device.type == "cpu":
        raise BadInput("SOLVER.AMP.ENABLED is for GPUs, and there is none here: leave it False")
    cfg = on_device(cfg, world.device)
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    for name in ("fvcore", "detectron2"):
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=world.rank, name=name)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    if cfg.FLOAT32_PRECISION:
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
        torch.backends.cudnn.allow_tf32 = cfg.FLOAT32_PRECISION != "highest"
    checkpoint = distributed.together(lambda: newest(Path(cfg.OUTPUT_DIR)) if world.is_main else None)
    path = distributed.gather_json(str(checkpoint) if checkpoint else None)[0]
    trainer = Trainer(cfg, world.device, Path(path) if path else None)
    if path:
        trainer.checkpointer.load(path)
    else:
        trainer.checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])
        distributed.together(lambda: require_loaded(trainer.model, tensors))
    results = trainer.train()
    found = distributed.together(lambda: _numbers(results) if world.is_main else None)
    return distributed.gather_json(found)[0]  # type: ignore[no-any-return]


def on_device(cfg: CfgNode, device: torch.device) -> CfgNode:
    """The config for this device; on a CPU, where torch's SyncBatchNorm raises, with Detectron2's own instead."""
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = str(device)
    if device.type == "cpu":
        for part in (cfg.MODEL.RESNETS, cfg.MODEL.FPN, cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD):
            if part.NORM == "SyncBN":
                part.NORM = "naiveSyncBN_N"  # the same statistics, whatever each rank's number of regions
    cfg.freeze()
    return cfg


def _numbers(results: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    found = {}
    for theirs, ours in (("bbox", "box"), ("segm", "mask")):
        if theirs in results:
            values = {name: float(results[theirs][name]) for name in ("AP", "AP50", "AP75")}
            found[ours] = {name: value if math.isfinite(value) else None for name, value in values.items()}
    if not found:
        raise BadInput(
            f"Detectron2's evaluation gave neither boxes nor masks but {', '.join(map(str, results)) or 'nothing'}"
        )
    return found
