"""Backbones by other projects' names: out to Detectron2, torchvision, timm and safetensors, and back from Detectron2.

A file is written beside its place, read back, compared with its source tensor by tensor and feature by feature, and only
then put there. Detectron2's files are pickles: they are read by an unpickler that makes arrays and nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg
from timm.models.resnet import ResNet
from torch import Tensor, nn

from ssl_pipeline import backbone as backbones
from ssl_pipeline import config
from ssl_pipeline.data.augment import Normalize, ViewSpec
from ssl_pipeline.exits import BadInput, StorageFailure
from ssl_pipeline.run_folder import RunFolder

log = logging.getLogger("ssl_pipeline")

TOLERANCE = 1e-4
"""Largest difference between a source's features and those of what was written."""

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""Blocks of the four stages of Detectron2's ResNets (modeling/backbone/resnet.py)."""


# --------------------------------------------------------------------------------------------------- the table of names
@dataclass(frozen=True)
class Detectron2ResNet:
    """What Detectron2 builds a ResNet from: MODEL.RESNETS."""

    depth: int
    groups: int = 1
    width: int = 64
    """Channels of a group in the first stage."""

    @property
    def bottleneck(self) -> bool:
        """Whether its blocks are of three convolutions; those of 18 and 34 are of two."""
        return self.depth >= 50

    @property
    def settings(self) -> dict[str, Any]:
        """Detectron2's config for it, with the stride where torchvision has it."""
        return {
            "MODEL.RESNETS.DEPTH": self.depth,
            "MODEL.RESNETS.NUM_GROUPS": self.groups,
            "MODEL.RESNETS.WIDTH_PER_GROUP": self.width,
            "MODEL.RESNETS.RES2_OUT_CHANNELS": 256 if self.bottleneck else 64,
            "MODEL.RESNETS.STRIDE_IN_1X1": False,
        }


def names(resnet: Detectron2ResNet) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Each tensor of a ResNet: (torchvision's name, Detectron2's, shape). The one table, for both directions.

    Source: facebookresearch/detectron2 modeling/backbone/resnet.py; pytorch/vision models/resnet.py.
    """

    def convolution(theirs: str, norm: str, detectron2: str, *shape: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        yield f"{theirs}.weight", f"{detectron2}.weight", shape
        for part in ("weight", "bias", "running_mean", "running_var"):
            yield f"{norm}.{part}", f"{detectron2}.norm.{part}", shape[:1]

    yield from convolution("conv1", "bn1", "stem.conv1", 64, 3, 7, 7)
    channels = 64
    for stage, blocks in enumerate(DEPTHS[resnet.depth], start=1):
        scale = 2 ** (stage - 1)
        out = (256 if resnet.bottleneck else 64) * scale
        inner = resnet.groups * resnet.width * scale
        for block in range(blocks):
            if resnet.bottleneck:
                shapes = [(inner, channels, 1, 1), (inner, inner // resnet.groups, 3, 3), (out, inner, 1, 1)]
            else:
                shapes = [(out, channels, 3, 3), (out, out, 3, 3)]
            ours, theirs = f"layer{stage}.{block}", f"res{stage + 1}.{block}"
            if block == 0 and channels != out:
                yield from convolution(
                    f"{ours}.downsample.0", f"{ours}.downsample.1", f"{theirs}.shortcut", out, channels, 1, 1
                )
            for number, shape in enumerate(shapes, start=1):
                yield from convolution(f"{ours}.conv{number}", f"{ours}.bn{number}", f"{theirs}.conv{number}", *shape)
            channels = out


def detectron2_resnet(backbone: nn.Module, options: backbones.Options) -> Detectron2ResNet:
    """The ResNet by which Detectron2 makes the same network. Raises BadInput where it has none."""
    told = f"backbone {options.name}"
    if not isinstance(backbone, ResNet):
        raise BadInput(
            f"Detectron2's ResNet cannot hold {told}, which is no ResNet; it takes {', '.join(backbones.TORCHVISION)}"
        )
    if options.stem != "standard":
        raise BadInput(
            f"Detectron2's ResNet begins with a 7x7 convolution of stride 2, and {told} has the stem {options.stem}, for "
            "small pictures: pretrain with backbone.stem=standard"
        )
    first: Any = backbone.get_submodule("layer1.0")
    if not isinstance(getattr(first, "conv2", None), nn.Conv2d):
        raise BadInput(
            f"Detectron2's ResNet has blocks of plain convolutions, and {told} has blocks of {type(first).__name__}"
        )
    bottleneck = hasattr(first, "conv3")
    blocks = tuple(len(getattr(backbone, f"layer{stage}")) for stage in (1, 2, 3, 4))
    depths = [depth for depth, of_depth in DEPTHS.items() if of_depth == blocks and (depth >= 50) == bottleneck]
    if not depths:
        arguments = f" {options.arguments}" if options.arguments else ""
        kind = "three" if bottleneck else "two"
        raise BadInput(
            f"Detectron2 has no ResNet with {blocks} blocks of {kind} convolutions, as {told}{arguments} has"
        )
    groups = first.conv2.groups
    found = Detectron2ResNet(depths[0], groups, first.conv2.out_channels // groups)
    expected = {name: torch.empty(shape, device="meta") for name, _, shape in names(found)}
    problems = backbones.compare(_without_counts(backbone.state_dict()), expected)
    if problems:
        raise BadInput(f"Detectron2's ResNet-{found.depth} is another network than {told}: {problems}")
    return found


def _without_counts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


# ------------------------------------------------------------------------------------------------------------- features
def pictures() -> Tensor:
    """What features are compared on: (2, 3, 128, 96), standard normal, float64."""
    return torch.randn(2, 3, 128, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def stages(backbone: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Outputs of the four stages of timm's ResNet, in float64: images (N, 3, H, W) -> res2 ... res5 (N, C, H', W')."""
    network = copy.deepcopy(backbone).double().eval()
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: found.__setitem__(name, output)

    for stage in (1, 2, 3, 4):
        network.get_submodule(f"layer{stage}").register_forward_hook(keep(f"res{stage + 1}"))
    network(images)
    return found


@torch.no_grad()
def rebuilt(model: Mapping[str, np.ndarray], resnet: Detectron2ResNet, images: Tensor) -> dict[str, Tensor]:
    """What Detectron2's ResNet computes from these tensors by its names, as `stages`, in plain torch.

    The stride of a block is in its 3x3 convolution (MODEL.RESNETS.STRIDE_IN_1X1 False).
    """
    tensors = {name: torch.from_numpy(np.asarray(value)).double() for name, value in model.items()}

    def convolve(x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = tensors[f"{name}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
        mean, variance = tensors[f"{name}.norm.running_mean"], tensors[f"{name}.norm.running_var"]
        return F.batch_norm(x, mean, variance, tensors[f"{name}.norm.weight"], tensors[f"{name}.norm.bias"], eps=1e-5)

    x = F.max_pool2d(F.relu(convolve(images.double(), "stem.conv1", 2)), kernel_size=3, stride=2, padding=1)
    found = {}
    for stage, blocks in enumerate(DEPTHS[resnet.depth], start=2):
        for block in range(blocks):
            name = f"res{stage}.{block}"
            stride = 2 if stage > 2 and block == 0 else 1
            shortcut = convolve(x, f"{name}.shortcut", stride) if f"{name}.shortcut.weight" in tensors else x
            if resnet.bottleneck:
                x = F.relu(convolve(x, f"{name}.conv1"))
                x = F.relu(convolve(x, f"{name}.conv2", stride, resnet.groups))
                x = convolve(x, f"{name}.conv3")
            else:
                x = F.relu(convolve(x, f"{name}.conv1", stride))
                x = convolve(x, f"{name}.conv2")
            x = F.relu(x + shortcut)
        found[f"res{stage}"] = x
    return found


def _difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> float:
    """The largest difference of features. Raises BadInput where it is over the tolerance or no number."""
    largest = 0.0
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise BadInput(f"{what}: {name} is {tuple(found[name].shape)}, not {tuple(value.shape)}")
        difference = (found[name].double() - value.double()).abs().max().item()
        if not difference <= TOLERANCE:
            raise BadInput(f"{what}: {name} differs by {difference:.2g} from the source's, more than {TOLERANCE:g}")
        largest = max(largest, difference)
    return largest


# ----------------------------------------------------------------------------------------------------- Detectron2's file
class _ArrayPickler(pickle.Pickler):
    """Writes arrays by numpy.ndarray's own constructor, a name that every version of numpy has."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return np.ndarray, (value.shape, value.dtype.str, bytearray(value.tobytes()))
        return NotImplemented


class _Type:
    """What numpy.dtype stands for in a file that is read: numpy's own would take an attacker's bytes for pointers."""

    def __init__(self, name: str, *more: Any) -> None:
        if name not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8"):
            raise pickle.UnpicklingError(f"it holds an array of {name}, not of numbers")
        self.name = name

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", "|", "="):
            raise pickle.UnpicklingError("its numbers are in another byte order")


class _Numbers:
    """What numpy.ndarray stands for in a file that is read; `array` is made of plain bytes alone."""

    def __init__(self, shape: Any = (0,), dtype: Any = "<f4", buffer: Any = b"", order: Any = "C") -> None:
        kind = dtype if isinstance(dtype, _Type) else _Type(str(dtype).lstrip("<|="))
        content = buffer.encode("latin1") if isinstance(buffer, str) else bytes(buffer)
        self.array = np.frombuffer(content, dtype=kind.name).reshape(shape, order=order).copy()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, content = state
        self.__init__(shape, kind, content, "F" if fortran else "C")  # type: ignore[misc]


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Numbers:
    return _Numbers()  # its state follows


def _from_buffer(buffer: Any, dtype: Any, shape: Any, order: Any) -> _Numbers:
    """What numpy's own function of a pickle of protocol 5, Python 3.14's, stands for."""
    return _Numbers(shape, dtype, buffer, order)


def _encode(text: str, encoding: str) -> bytes:
    """What _codecs.encode stands for: the bytes of an array in an old pickle, and none of Python's other codecs."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"its bytes are written as {encoding}")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Makes arrays of numbers and plain containers, and nothing else."""

    STAND_INS = {
        ("numpy", "ndarray"): _Numbers,
        ("numpy", "dtype"): _Type,
        ("numpy.multiarray", "_reconstruct"): _reconstruct,
        ("numpy.numeric", "_frombuffer"): _from_buffer,
        ("collections", "OrderedDict"): dict,
        ("_codecs", "encode"): _encode,
        ("builtins", "bytearray"): bytearray,
    }

    def find_class(self, module: str, name: str) -> Any:
        place = (
            module.replace("numpy._core.", "numpy.").replace("numpy.core.", "numpy.").replace("__builtin__", "builtins")
        )
        if (place, name) not in self.STAND_INS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not read because it could run code")
        return self.STAND_INS[place, name]


def read_detectron2(path: Path, whole: bool = True) -> dict[str, np.ndarray]:
    """The tensors of a Detectron2 file, by name. Raises BadInput for what Detectron2 would not read as it is.

    Without `whole` the file need not ask for its names to be matched: a whole detector of the model zoo does not.
    """
    try:
        with path.open("rb") as file:
            values = _ArrayUnpickler(file, encoding="latin1").load()
    except FileNotFoundError:
        raise BadInput(f"no file {str(path)!r}") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise BadInput(f"{str(path)!r} is no Detectron2 file that can be read safely: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise BadInput(f"{str(path)!r} has no `model`, a mapping of names to arrays")
    if "__author__" not in values:
        raise BadInput(f"{str(path)!r} has no `__author__`: Detectron2 would take it for Caffe2's and change its names")
    if whole and values.get("matching_heuristics") is not True:
        raise BadInput(f"{str(path)!r} has no `matching_heuristics`: Detectron2 would find none of its own names in it")
    model: dict[str, np.ndarray] = {}
    for name, value in values["model"].items():
        if not isinstance(name, str) or not isinstance(value, _Numbers):
            raise BadInput(f"{str(path)!r}: {name} is no array of numbers with a name")
        model[name] = value.array
    return model


def verify(path: Path, backbone: nn.Module, options: backbones.Options) -> float:
    """The largest difference between the features of a Detectron2 file, rebuilt in plain torch, and the backbone's.

    Raises BadInput where a tensor is missing, too much, of another shape or type, or altered, or where features differ.
    """
    resnet = detectron2_resnet(backbone, options)
    model = read_detectron2(path)
    source = backbone.state_dict()
    expected = {theirs: source[ours] for ours, theirs, _ in names(resnet)}
    problems = backbones.compare({name: torch.from_numpy(value) for name, value in model.items()}, expected)
    if problems:
        raise BadInput(f"{str(path)!r} is not {options.name}'s for Detectron2: {problems}")
    for name, value in expected.items():
        if model[name].dtype != np.float32:
            raise BadInput(f"{str(path)!r}: {name} is {model[name].dtype}, not float32")
        whole = value.detach().cpu().float().numpy()
        if not np.array_equal(model[name], whole, equal_nan=True):
            swapped = whole.ndim == 4 and np.array_equal(model[name], whole[:, ::-1])
            how = (
                "has its input channels in the order BGR; here it is RGB"
                if swapped
                else "has other values than the source"
            )
            raise BadInput(f"{str(path)!r}: {name} {how}")
    images = pictures()
    return _difference(rebuilt(model, resnet, images), stages(backbone, images), str(path))


@dataclass(frozen=True)
class Converted:
    """What `to_detectron2` wrote and how it was checked."""

    resnet: Detectron2ResNet
    tensors: int
    left_out: int
    """Counters of batches, which Detectron2 does not keep."""
    difference: float
    """Of features, by `verify`."""
    by_detectron2: float | None
    """Of features, by Detectron2 itself; None where it is not installed."""


Stages = Callable[[Path, Detectron2ResNet, Tensor], dict[str, Tensor]]
"""Outputs of Detectron2's own ResNet with the weights of a file: evaluation/detectron2.py's `stages`."""


def to_detectron2(
    backbone: nn.Module, options: backbones.Options, path: Path, author: str, by_detectron2: Stages | None
) -> Converted:
    """Write a Detectron2 backbone file, checked before it stands at `path`, by Detectron2 too where that is installed.

    Raises BadInput where Detectron2 has no such network or reads another one, StorageFailure where it cannot be written.
    """
    if path.suffix != ".pkl":
        raise BadInput(f"{str(path)!r}: Detectron2 tells its files by their ending; name one that ends with .pkl")
    resnet = detectron2_resnet(backbone, options)
    source = backbone.state_dict()
    model = {theirs: source[ours].detach().cpu().float().numpy() for ours, theirs, _ in names(resnet)}
    content = io.BytesIO()
    _ArrayPickler(content, protocol=4).dump({"model": model, "__author__": author, "matching_heuristics": True})

    def check(partial: Path) -> tuple[float, float | None]:
        difference = verify(partial, backbone, options)
        if by_detectron2 is None:
            return difference, None
        images = pictures()
        loaded = by_detectron2(partial, resnet, images)
        return difference, _difference(loaded, stages(backbone, images), "read by Detectron2")

    rebuilt_by, by_itself = _put(path, lambda partial: partial.write_bytes(content.getvalue()), check)
    return Converted(resnet, len(model), len(source) - len(model), rebuilt_by, by_itself)


def _put(path: Path, write: Callable[[Path], Any], check: Callable[[Path], Any]) -> Any:
    """Write a file beside `path`, check it, and only then put it there. Raises StorageFailure."""
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.unlink(missing_ok=True)  # a link that another one put there would be written through
            write(partial)
        except RuntimeError as error:  # torch's for a full disk
            raise OSError(str(error)) from None
        found = check(partial)
        os.replace(partial, path)
    except BadInput as error:
        raise BadInput(str(error).replace(str(partial), str(path))) from None
    except (OSError, SafetensorError) as error:
        raise StorageFailure(f"cannot write {path}: {error}; free room or name another file") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return found


# ------------------------------------------------------------------------------------------------ the way back, and other
def from_detectron2(tensors: Mapping[str, Tensor], name: str) -> tuple[backbones.Options, nn.Module]:
    """The backbone within a Detectron2 model: bare, or of a detector with FPN or a C4 head.

    Raises BadInput where it is none of the ResNets of `names`.
    """
    stem = next((key for key in tensors if key.endswith("stem.conv1.weight")), None)
    if stem is None:
        raise BadInput(f"{name!r} holds no ResNet by Detectron2's names: no stem.conv1.weight")
    prefix = stem.removesuffix("stem.conv1.weight")
    bare = {}
    for key, value in tensors.items():
        for before in (prefix, "roi_heads."):  # the C4 head has res5
            if key.startswith(before) and re.match(r"(stem\.conv1|res[2-5]\.\d+)\.", key.removeprefix(before)):
                bare[key.removeprefix(before)] = value.float()
    bare = _without_counts(bare)
    blocks = tuple(len({key.split(".")[1] for key in bare if key.startswith(f"res{stage}.")}) for stage in (2, 3, 4, 5))
    tried: list[tuple[int, str]] = []
    for architecture in backbones.TORCHVISION:
        options = backbones.Options(name=architecture)
        backbone = backbones.on_meta(options)
        resnet = detectron2_resnet(backbone, options)
        if DEPTHS[resnet.depth] != blocks:
            continue
        renamed = {ours: bare[theirs] for ours, theirs, _ in names(resnet) if theirs in bare}
        expected = _without_counts(backbone.state_dict())
        problems = backbones.differences(renamed, expected)
        problems += [f"{key} is too much" for key in sorted(bare.keys() - {theirs for _, theirs, _ in names(resnet)})]
        if not problems:
            backbone = backbones.build(options)
            backbone.load_state_dict({**backbone.state_dict(), **renamed})
            return options, backbone.eval()
        tried.append((len(problems), f"{architecture}: {'; '.join(problems[:3])}"))
    why = min(tried)[1] if tried else f"its stages have {blocks} blocks"
    raise BadInput(f"{name!r} is none of {', '.join(backbones.TORCHVISION)} by Detectron2's names ({why})")


FORMATS = ("torchvision", "timm", "safetensors")


def export(backbone: nn.Module, options: backbones.Options, path: Path, style: str) -> float:
    """Write a backbone's weights, checked before they stand at `path`, and return the largest difference of features.

    `torchvision`: what torchvision's model of that name loads, but for its classifier. `timm`: what timm.create_model
    loads with num_classes=0. `safetensors`: the backbone as it is here, small stems too, with its options in the metadata.
    The file is safetensors where `path` ends so, else torch's. Raises BadInput where the other project has no such
    network, StorageFailure where it cannot be written.
    """
    safe = path.suffix == ".safetensors"
    if style == "safetensors" and not safe:
        raise BadInput(f"{str(path)!r}: name a file that ends with .safetensors")
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise BadInput(f"{str(path)!r}: name a file that ends with .pth, .pt or .safetensors")
    theirs = {"torchvision": _torchvision, "timm": _timm, "safetensors": _ours}[style](options)
    state = {name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}
    problems = backbones.compare(state, theirs.state_dict())
    if problems:
        raise BadInput(f"{style}'s {options.name} is another network than this backbone: {problems}")
    metadata = {"format": "pt", "backbone": options.model_dump_json()}

    def check(partial: Path) -> float:
        read = backbones.read(partial)
        theirs.load_state_dict(read)
        altered = [name for name, value in state.items() if not torch.equal(read[name], value)]
        if altered:
            raise BadInput(f"{str(path)!r}: {altered[0]} is not what was written")
        side = _side(backbone, options)
        found, expected = ({"features": _features(network, side)} for network in (theirs, backbone))
        return _difference(found, expected, f"{str(path)!r}, read by {style}")

    def write(partial: Path) -> None:
        if safe:
            save_file(state, partial, metadata)
        else:
            torch.save(state, partial)

    difference: float = _put(path, write, check)
    return difference


def _torchvision(options: backbones.Options) -> nn.Module:
    if options.name not in backbones.TORCHVISION or options.stem != "standard":
        raise BadInput(
            f"torchvision has no {_described(options)} that is the same network; it has {', '.join(backbones.TORCHVISION)} "
            "with the stem standard: give --format safetensors for the backbone as it is"
        )
    network: nn.Module = getattr(torchvision.models, options.name)(weights=None)
    network.add_module("fc", nn.Identity())
    return network


def _timm(options: backbones.Options) -> nn.Module:
    if options.stem != "standard":
        raise BadInput(
            f"timm has no {_described(options)}: give --format safetensors for the backbone as it is, or pretrain with "
            "backbone.stem=standard"
        )
    network: nn.Module = timm.create_model(options.name, pretrained=False, num_classes=0, **options.arguments)
    return network


def _ours(options: backbones.Options) -> nn.Module:
    return backbones.build(options)


def _described(options: backbones.Options) -> str:
    return f"{options.name} with the stem {options.stem}"


def _side(backbone: nn.Module, options: backbones.Options) -> Any:
    """The size of the pictures that a timm model takes: a side, or height and width."""
    usual = (getattr(backbone, "pretrained_cfg", None) or {}).get("input_size", (3, 128, 128))[-2:]
    return options.arguments.get("img_size", usual)


@torch.no_grad()
def _features(network: nn.Module, side: Any) -> Tensor:
    features: Tensor = copy.deepcopy(network).double().eval()(F.interpolate(pictures(), size=side))
    return features


# --------------------------------------------------------------------------------------------------------------- sources
@dataclass(frozen=True)
class Source:
    """A backbone and what must be known to use it elsewhere."""

    name: str
    options: backbones.Options
    backbone: nn.Module
    """On the host, in evaluation mode."""
    normalize: Normalize
    """Of the pictures that it was trained on."""

    @property
    def pixels(self) -> dict[str, Any]:
        """How Detectron2's config says so: the order of channels, mean and deviation in 0..255."""
        mean, std = ([round(255 * value, 6) for value in part] for part in (self.normalize.mean, self.normalize.std))
        return {"INPUT.FORMAT": "RGB", "MODEL.PIXEL_MEAN": mean, "MODEL.PIXEL_STD": std}


def source(path: Path, config_values: Mapping[str, Any] | None, random_init: bool = False) -> Source:
    """The backbone of a run folder, of a file of weights or a name, or within Detectron2's .pkl or .pth.

    `config_values` are a pretraining config's, for what does not lie beside the weights; without them the network is told
    from the weights, and pictures are taken to be normalised by ImageNet's mean and deviation. Raises BadInput.
    """
    run = RunFolder(path)
    weights = str(path)
    values = dict(config_values or {})
    if path.is_dir():
        values = values or run.read_config()
        weights = str(run.backbone)
        if not random_init and not run.backbone.is_file():
            raise BadInput(f"{path} has no backbone.pth yet: its first checkpoint writes it")
    view = values.get("data", {}).get("evaluation_view")
    normalize = config.validate(ViewSpec, view).normalize if view else Normalize(op="normalize")
    named = backbones.named(weights)
    if not view and weights.startswith("timm:"):
        origin: Any = get_pretrained_cfg(weights.removeprefix("timm:"))
        normalize = Normalize(op="normalize", mean=origin.mean, std=origin.std)
    options = named or (backbones.options_beside(Path(weights)) if Path(weights).is_file() else None)
    if options is None and "backbone" in values:
        options = config.validate(backbones.Options, values["backbone"], prefix="backbone.")
    if named is None and not path.exists():
        raise BadInput(f"{str(path)!r} is neither a run folder nor a file of weights")
    backbone: nn.Module | None = None
    if named is None and (options is None or not random_init):
        foreign = _detectron2_tensors(Path(weights))
        if foreign is not None:
            options, backbone = from_detectron2(foreign, weights)
            log.info("%s: taken to read RGB and to have the stride in the 3x3, which no name or shape tells", weights)
    if options is None:
        options = backbones.recognise(Path(weights))
    if random_init:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(values.get("seed", 0))
            return Source(f"{path}, random initialisation", options, backbones.build(options).eval(), normalize)
    backbone = backbone if backbone is not None else backbones.load(weights, options).eval()
    return Source(weights, options, backbone, normalize)


def _detectron2_tensors(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a file of Detectron2's, a backbone's .pkl or a detector's .pth; None for other files."""
    if path.suffix == ".pkl":
        return {name: torch.from_numpy(np.array(value)) for name, value in read_detectron2(path, whole=False).items()}
    file = backbones.read(path)
    model = file.get("model", file) if isinstance(file, dict) else None
    if isinstance(model, dict) and any(str(name).endswith("res2.0.conv1.weight") for name in model):
        return {str(name): value for name, value in model.items() if isinstance(value, Tensor)}
    return None
