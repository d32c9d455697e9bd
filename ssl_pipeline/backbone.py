"""The backbone: a timm model without its classifier, and bare weights in and out by torchvision's names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from pydantic import Field
from timm.models.resnet import ResNet
from torch import Tensor, nn

from ssl_pipeline import config
from ssl_pipeline.exits import BadInput, StorageFailure


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


def build(options: Options) -> nn.Module:
    """The backbone: images (N, 3, S, S) -> features (N, D), with D as its attribute `num_features`.

    Raises BadInput for a name that timm does not know, an argument that it refuses, or a stem for a network that is no
    ResNet.
    """
    if not timm.is_model(options.name):
        near = timm.list_models(f"*{options.name}*")[:5] or ["resnet18", "resnet50"]
        raise BadInput(f"`backbone.name` = {options.name!r} is no timm model; near it: {', '.join(near)}")
    arguments = dict(options.arguments)
    if options.zero_init_last is not None:
        arguments["zero_init_last"] = options.zero_init_last
    try:
        model = timm.create_model(options.name, pretrained=False, num_classes=0, **arguments)
    except (TypeError, ValueError) as error:
        raise BadInput(f"timm's {options.name} refuses the backbone's arguments {arguments}: {error}") from None
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
    weights = {name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}
    partial = path.with_name(f".{path.name}.partial")
    partial_options = path.with_name(f".{path.stem}.json.partial")
    try:
        torch.save(weights, partial)
        partial_options.write_text(json.dumps(options.model_dump(mode="json"), indent=2) + "\n")
        os.replace(partial_options, path.with_suffix(".json"))
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise StorageFailure(f"cannot write {path}: {error}; free room and give the same command again") from None


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


def named(text: str) -> Options | None:
    """The options of the network whose weights a name as timm:resnet50.a1_in1k stands for; None where it is no name."""
    return None


def load(path: Path, options: Options) -> nn.Module:
    """The backbone with the weights of a file: ours, or any file with torchvision's names; a classifier `fc` is ignored.

    Raises BadInput where the file is missing, is no file of tensors, or fits another network.
    """
    backbone = build(options)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"no backbone file {str(path)!r}") from None
    except Exception as error:
        raise BadInput(
            f"{str(path)!r} is no file of weights that can be read safely: {str(error).splitlines()[0]}"
        ) from None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise BadInput(f"{str(path)!r} is no plain mapping of names to tensors")
    weights = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    difference = compare(weights, backbone.state_dict())
    if difference:
        raise BadInput(f"{str(path)!r} does not fit backbone {options.name} with stem {options.stem}: {difference}")
    backbone.load_state_dict(weights)
    return backbone


def compare(given: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """What is wrong with the names and shapes of a state dict, in a few words; empty if nothing is."""
    problems = [f"{name} is missing" for name in expected if name not in given]
    problems += [f"{name} is too much" for name in given if name not in expected]
    problems += [
        f"{name} is {tuple(given[name].shape)}, not {tuple(value.shape)}"
        for name, value in expected.items()
        if name in given and given[name].shape != value.shape
    ]
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more
