"""The backbone: a timm model without its classifier, and weights in and out: a run's, other projects', timm's, torchvision's.

No file is unpickled: they are read by torch.load with weights_only=True or by safetensors. Wherever weights come from,
every tensor of the backbone must be there with its shape, and nothing else but what is known not to be the backbone.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import timm
import torch
import torchvision
from huggingface_hub import try_to_load_from_cache
from pydantic import Field, field_validator
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg, is_model_pretrained
from timm.models.resnet import ResNet
from torch import Tensor, nn

from ssl_pipeline import config
from ssl_pipeline.exits import BadInput, StorageFailure

log = logging.getLogger("ssl_pipeline")


class Options(config.Options):
    """Which network makes the representation."""

    name: str = "resnet50"
    """Any timm model."""
    stem: Literal["standard", "small", "small_maxpool"] = "standard"
    """First layers of a ResNet. `standard`: 7x7 stride 2 and max-pooling, for 224 px. `small`: 3x3 stride 1 and no
    max-pooling, for 32 px. `small_maxpool`: 3x3 stride 1 and max-pooling, for 64 px.
    Source: htdt/self-supervised model.py."""
    zero_init_last: bool | None = None
    """Whether the last batch norm of each residual block starts at zero. None: the network's own way (timm's ResNets:
    yes)."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the timm model, as {layers: [1, 1, 1, 1]}."""

    @field_validator("arguments")
    @classmethod
    def _loads_nothing(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        # These name files and addresses, from which some versions of timm unpickle.
        loading = [
            name for name in arguments if name.startswith("pretrained") or name in ("checkpoint_path", "cache_dir")
        ]
        if loading:
            raise ValueError(f"{loading[0]} loads weights, and a config describes a network alone: leave it out")
        return arguments


def build(options: Options) -> nn.Module:
    """The backbone: images (N, 3, S, S) -> features (N, D), with D as its attribute `num_features`.

    Raises BadInput for a name that timm does not know, an argument that it refuses, a stem for a network that is no
    ResNet, or a network that does not pool its features.
    """
    if not timm.is_model(options.name):
        near = timm.list_models(f"*{options.name}*")[:5] or ["resnet18", "resnet50"]
        raise BadInput(f"`backbone.name` = {options.name!r} is no timm model; near it: {', '.join(near)}")
    arguments = dict(options.arguments)
    if options.zero_init_last is not None:
        arguments["zero_init_last"] = options.zero_init_last
    try:
        model = timm.create_model(options.name, pretrained=False, num_classes=0, **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise BadInput(f"timm's {options.name} refuses the backbone's arguments {arguments}: {error}") from None
    pool = getattr(model, "global_pool", None)
    if getattr(pool, "pool_type", pool) in ("", "align", "soft"):
        raise BadInput(
            f"timm's {options.name} gives a feature a place, not one a picture: add backbone.arguments={{global_pool: avg}}"
        )
    if options.stem != "standard":
        if not isinstance(model, ResNet) or not isinstance(model.conv1, nn.Conv2d):
            raise BadInput(f"`backbone.stem` = {options.stem!r} fits ResNets only; {options.name} takes stem=standard")
        stem = nn.Conv2d(3, model.conv1.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        model.add_module("conv1", stem)
        if options.stem == "small":
            model.add_module("maxpool", nn.Identity())
    return model


def width(backbone: nn.Module) -> int:
    """D, the dimension of the features."""
    # timm networks with a wider last layer before the classifier (MobileNetV3) say so by this name.
    return getattr(backbone, "head_hidden_size", None) or backbone.num_features  # type: ignore[return-value]


def save(backbone: nn.Module, options: Options, path: Path) -> None:
    """Write the bare weights to `path` (torchvision's names for a ResNet) and the options beside it, as JSON.

    Raises StorageFailure.
    """
    write(backbone.state_dict(), options, path)


def write(weights: Mapping[str, Tensor], options: Options, path: Path) -> None:
    """`save`, of a state dict."""
    weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    partial = path.with_name(f".{path.name}.partial")
    partial_options = path.with_name(f".{path.stem}.json.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(weights, file)
            file.flush()
            os.fsync(file.fileno())
        partial_options.write_text(json.dumps(options.model_dump(mode="json"), indent=2) + "\n")
        os.replace(partial_options, path.with_suffix(".json"))
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        for left in (partial, partial_options):
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)
        raise StorageFailure.of(str(path), error) from None


def options_beside(path: Path) -> Options | None:
    """The options that `save` wrote beside a file of weights, or None."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return None
    try:
        values = json.loads(beside.read_text())
    except ValueError as error:
        raise BadInput(f"{beside} is not valid JSON: {error}") from None
    return config.validate(Options, values, prefix="backbone.")


# ---------------------------------------------------------------------------------------------------- weights by name
# torchvision's classifiers of which timm has the very same: names, shapes, arithmetic.
TORCHVISION = [
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
]


def named(text: str) -> Options | None:
    """The options of the network whose weights a name stands for; None where `text` is no such name.

    Names are timm:NAME, as timm:vit_small_patch16_224.dino or timm:resnet50 (timm's default for it), and, for ResNets,
    torchvision:NAME, as torchvision:resnet50.IMAGENET1K_V1 or torchvision:resnet50 (torchvision's default). Raises
    BadInput for weights that timm or torchvision does not have.
    """
    source, _, name = text.partition(":")
    architecture, _, tag = name.partition(".")
    if source == "timm":
        if not is_model_pretrained(name):
            have = timm.list_pretrained(f"{architecture}.*") or timm.list_pretrained()
            near = difflib.get_close_matches(name, have, 5, cutoff=0)
            raise BadInput(f"timm has no weights {name!r}; near it: {', '.join(near)}")
        return Options(name=architecture)
    if source == "torchvision":
        if architecture not in TORCHVISION:
            raise BadInput(
                f"torchvision's {architecture!r} is not to be had here, only its ResNets, which timm has alike: "
                f"{', '.join(TORCHVISION)}; timm's own are timm:NAME"
            )
        versions = list(torchvision.models.get_model_weights(architecture).__members__)
        if tag and tag not in versions:
            near = [f"{architecture}.{version}" for version in versions]
            raise BadInput(f"torchvision has no weights {name!r}; near it: {', '.join(near)}")
        return Options(name=architecture)
    return None


def _fetched(text: str, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a name, from the cache or the network; those of a timm model that are in `expected`."""
    source, _, name = text.partition(":")
    origin: Any = get_pretrained_cfg(name) if source == "timm" else None
    try:
        if origin is None:
            architecture, _, version = name.partition(".")
            entry = torchvision.models.get_model_weights(architecture)[version or "DEFAULT"]
            log.info("%s is torchvision's %s", text, entry)
            return entry.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
        overlay: dict[str, Any] = {}
        if not origin.hf_hub_id:  # read here, because timm would fall back to unpickling
            overlay["state_dict"] = torch.hub.load_state_dict_from_url(
                origin.url, progress=False, map_location="cpu", weights_only=True
            )
        elif not origin.hf_hub_filename:
            # Without asking the network first, which on a node without one takes half a minute.
            cached = try_to_load_from_cache(origin.hf_hub_id, "model.safetensors")
            overlay |= {"file": cached, "custom_load": False} if isinstance(cached, str) else {}
        log.info(
            "%s was made with pictures %s, %s interpolation, mean %s, deviation %s",
            *(text, origin.input_size, origin.interpolation, origin.mean, origin.std),
        )
        # With its classifier: timm is strict with it alone (but for ConvNeXt's fcmae, whose file lacks the last norm).
        whole = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
        return {key: value for key, value in whole.state_dict().items() if key in expected}
    except Exception as error:  # whichever the libraries that ask the network raise
        cache = "HF_HOME" if origin is not None and origin.hf_hub_id else "TORCH_HOME"
        raise BadInput(
            f"the weights {text} cannot be had here ({_reason(error)}): fetch them once on a machine with a network into "
            f"this {cache}, by giving the same command there, or give a file of weights"
        ) from None


# ---------------------------------------------------------------------------------------------------- weights in files
@dataclass(frozen=True)
class Layout:
    """How a kind of file names the backbone's tensors.

    A `module.` before all names, which is DistributedDataParallel's, and the architecture's classifier are always left
    out.
    """

    name: str
    place: str = ""
    """The state dict's key in the file; a file of that state dict alone is read as well."""
    prefix: str = ""
    """Before the backbone's names."""
    others: str = "(?!)"
    """Pattern of names known not to be the backbone's."""
    sign: str = ""
    """The beginning of a name, or of a key of the file, without which it is another layout."""
    heads: int | None = None
    """Attention heads of its ViTs, which no shape tells."""
    stem_padding: int = 1
    """Padding in its small stem, which no shape tells."""


_SOLO_LEARN = (
    r"(classifier|projector|predictor2?|prototypes|head|dino_loss_func|transformer_encoder|decoder)\."
    r"|momentum_|queue|local_memory_"
)
# The first that fits is taken. ResNets of SwAV (src/resnet50.py) and VICReg (resnet.py) pad by 1 and then by 2 before
# conv1, which is torchvision's padding of 3; those of the others are torchvision's.
LAYOUTS = [
    # checkpoint.py here: RUN/checkpoints/step_*.pt. What is not the backbone is the method's.
    Layout("a checkpoint of a run", "model", "backbone.", r"(?!backbone\.)", sign="format"),
    # `save` here, torchvision, timm; resnet50.pth of facebookresearch/barlowtwins (main.py) and facebookresearch/vicreg
    # (main_vicreg.py); dino_*_pretrain.pth (facebookresearch/dino hubconf.py), whose ViTs have timm's names.
    Layout("bare names"),
    # timm utils/checkpoint_saver.py; tonylins/simclr-converter convert.py.
    Layout("bare names in `state_dict`", "state_dict"),
    # pytorch/vision references/classification/train.py; facebookresearch/moco-v3 convert_to_deit.py.
    Layout("bare names in `model`", "model"),
    # facebookresearch/vicreg main_vicreg.py: model.pth. Its optimizer's state holds a function, so re-save `model`.
    Layout("VICReg", "model", "backbone.", r"projector\."),
    # facebookresearch/barlowtwins main.py: checkpoint.pth.
    Layout("Barlow Twins", "model", "backbone.", r"(projector|bn)\."),
    # facebookresearch/swav main_swav.py, main_deepclusterv2.py, src/resnet50.py: heads lie among the layers.
    Layout("SwAV", "state_dict", "", r"(projection_head|prototypes)\."),
    # facebookresearch/dino main_dino.py, utils.py. Its `args` are an argparse.Namespace, so re-save `teacher`.
    Layout("DINO", "teacher", "backbone.", r"head\."),
    # facebookresearch/moco main_moco.py, moco/builder.py; v1 and v2.
    Layout("MoCo", "state_dict", "encoder_q.", r"encoder_k\.|queue"),
    # facebookresearch/moco-v3 main_moco.py, moco/builder.py, vits.py: ViT-Small has 12 heads, timm's has 6.
    Layout("MoCo v3", "state_dict", "base_encoder.", r"(momentum_encoder|predictor)\.", heads=12),
    # facebookresearch/simsiam main_simsiam.py, simsiam/builder.py: its projector stands in the classifier's place.
    Layout("SimSiam", "state_dict", "encoder.", r"predictor\."),
    # vturrisi/solo-learn solo/methods/base.py: CIFAR's stem pads by 2. Its hyper-parameters are objects, so re-save
    # `state_dict`. ViTs of its MoCo v3 have 12 heads, of its other methods timm's number; the names do not tell which.
    Layout("solo-learn", "state_dict", "backbone.", _SOLO_LEARN, sign="classifier.", stem_padding=2),
    Layout("solo-learn, before 1.0.3", "state_dict", "encoder.", _SOLO_LEARN, sign="classifier.", stem_padding=2),
]


def load(weights: str | Path, options: Options) -> nn.Module:
    """The backbone with the weights of a name (`named`) or of a file in one of `LAYOUTS`, torch's or .safetensors.

    Raises BadInput where there are none, where reading them would run code, or where they are another network's.
    """
    backbone = build(options)
    text = str(weights)
    file = read(Path(weights)) if named(text) is None else _fetched(text, backbone.state_dict())
    readings = list(_readings(file, backbone))
    if not readings:
        raise BadInput(f"{text!r} is no plain mapping of names to tensors, nor a checkpoint with one in a known place")
    layout, own, problems = min(readings, key=lambda reading: len(reading[2]))
    if problems:
        raise BadInput(
            f"{text!r}, read as {layout.name}, does not fit backbone {options.name} with stem {options.stem}: "
            f"{_some(problems)}{_what_fits(file, options)}"
        )
    heads = {module.num_heads for module in backbone.modules() if hasattr(module, "num_heads")}
    if layout.heads and heads - {layout.heads}:
        raise BadInput(
            f"{text!r} is of {layout.name}, whose ViTs have {layout.heads} attention heads, and {options.name} has "
            f"{heads.pop()}: take a config with backbone.arguments={{num_heads: {layout.heads}}}"
        )
    backbone.load_state_dict(own)
    if options.stem != "standard" and layout.stem_padding != 1:
        backbone.conv1.padding = (layout.stem_padding, layout.stem_padding)  # type: ignore[union-attr, assignment]
    log.info("%s: read as %s", text, layout.name)
    return backbone


def read(path: Path) -> Any:
    """What lies in a file, tensors on the host."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"no backbone file {str(path)!r}") from None
    except Exception as error:
        held = re.search(r"GLOBAL (\S+)", str(error))
        if held:
            raise BadInput(
                f"{str(path)!r} holds {held[1]} beside its tensors, which is not read because it could run code: where "
                "you trust the file, re-save its state dict alone, as torch.save(checkpoint['state_dict'], 'weights.pth')"
            ) from None
        raise BadInput(f"{str(path)!r} is no file of weights that can be read safely: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, UnpicklingError):  # torch's words advise unpickling
        return "it holds other things than tensors"
    return str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__


def _readings(file: Any, backbone: nn.Module) -> Iterator[tuple[Layout, dict[str, Tensor], list[str]]]:
    """The backbone's tensors in each layout that the file may be in, and what is wrong with them."""
    expected = backbone.state_dict()
    classifier = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    classifiers = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    keys = [str(key) for key in file] if isinstance(file, dict) else []
    for layout in LAYOUTS:
        for place in dict.fromkeys((layout.place, "")):
            state = file.get(place) if place and keys else file
            if not isinstance(state, dict) or not state:
                continue
            if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
                continue
            if all(name.startswith("module.") for name in state):
                state = {name.removeprefix("module."): value for name, value in state.items()}
            if any(name.startswith(layout.sign) for name in (*keys, *state)):
                yield layout, *_own(layout, state, expected, classifiers)


def _own(
    layout: Layout, state: dict[str, Tensor], expected: dict[str, Tensor], classifiers: tuple[str, ...]
) -> tuple[dict[str, Tensor], list[str]]:
    own, strange = {}, []
    for name, value in state.items():
        bare = name.removeprefix(layout.prefix)
        if re.match(layout.others, name) or (name.startswith(layout.prefix) and bare.startswith(classifiers)):
            continue
        if name.startswith(layout.prefix):
            own[bare] = value
        else:
            strange.append(f"{name} is too much")
    # Files older than torch 0.4.1, some of torchvision's among them, do not count batches; nor does the arithmetic.
    counts = {name: value for name, value in expected.items() if name.endswith("num_batches_tracked")}
    if not counts.keys() & own.keys():
        own |= counts
    return own, differences(own, expected) + strange


def recognise(path: Path) -> Options:
    """The network that a file's weights are of, where it is a common one. Raises BadInput."""
    found = _fitting(read(path), COMMON)
    if found is None:
        raise BadInput(f"{str(path)!r} does not say which network it is of, and is no common one: give --config NAME")
    if found.stem == "small":
        raise BadInput(
            f"{str(path)!r} is of {found.name} with stem small or small_maxpool, which it does not say: give --config NAME"
        )
    return found


def _fitting(file: Any, candidates: list[Options]) -> Options | None:
    """The first network that the file's weights fit."""
    for other in candidates:
        network = _on_meta(other.model_dump_json())
        if network is not None and any(not problems for _, _, problems in _readings(file, network)):
            return other
    return None


def _what_fits(file: Any, options: Options) -> str:
    """Which network the file is of instead, as the end of a sentence; empty where it is no common one."""
    other = _fitting(file, [options.model_copy(update={"stem": stem}) for stem in ("standard", "small")] + COMMON)
    if other is None:
        return ""
    stem = "small or small_maxpool" if other.stem == "small" else other.stem
    return f"; it fits {other.name} with stem {stem}: take a config with that backbone"


COMMON = [
    *(Options(name=name, stem=stem) for name in TORCHVISION for stem in ("standard", "small")),
    *(Options(name=f"vit_{size}_patch{patch}_224") for size in ("tiny", "small", "base") for patch in (16, 8)),
]


def on_meta(options: Options) -> nn.Module:
    """The network without memory. Raises BadInput as `build`."""
    with torch.device("meta"):
        return build(options)


@functools.cache
def _on_meta(options: str) -> nn.Module | None:
    """The network without memory, of options as JSON, which can be a key of the cache; None where there is none."""
    try:
        return on_meta(Options.model_validate_json(options))
    except BadInput:
        return None


def compare(given: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """What is wrong with the names and shapes of a state dict, in a few words; empty if nothing is."""
    return _some(differences(given, expected))


def differences(given: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """What is wrong with the names and shapes of a state dict, a few words each."""
    problems = [f"{name} is missing" for name in expected if name not in given]
    problems += [f"{name} is too much" for name in given if name not in expected]
    problems += [
        f"{name} is {tuple(given[name].shape)}, not {tuple(value.shape)}"
        for name, value in expected.items()
        if name in given and given[name].shape != value.shape
    ]
    return problems


def _some(problems: list[str]) -> str:
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more
