"""Backbones by other projects' names: what can be shown without Detectron2. evaluation/test_detectron2.py is on Detectron2."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import pickletools
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ssl_pipeline import backbone as backbones
from ssl_pipeline import cli, config, export
from ssl_pipeline.evaluation import detection, features
from ssl_pipeline.exits import BadInput, Status, StorageFailure
from ssl_pipeline.export import Detectron2ResNet
from ssl_pipeline.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
RESNETS = {
    "resnet18": Detectron2ResNet(18),
    "resnet34": Detectron2ResNet(34),
    "resnet50": Detectron2ResNet(50),
    "resnet101": Detectron2ResNet(101),
    "resnet152": Detectron2ResNet(152),
    "wide_resnet50_2": Detectron2ResNet(50, 1, 128),
    "wide_resnet101_2": Detectron2ResNet(101, 1, 128),
    "resnext50_32x4d": Detectron2ResNet(50, 32, 4),
    "resnext101_32x8d": Detectron2ResNet(101, 32, 8),
    "resnext101_64x4d": Detectron2ResNet(101, 64, 4),
}
IMAGENET = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
}
Network = tuple[nn.Module, backbones.Options]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The networks are small: several threads wait for each other for minutes where the processors are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_detectron2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "stages", lambda: None)


def drawn(name: str, **options: Any) -> Network:
    """A backbone with its batch norms' weights and statistics at random: at their beginnings they do nothing."""
    chosen = backbones.Options(name=name, **options)
    network = backbones.build(chosen).eval()
    for tensor in network.state_dict().values():
        if tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5)
        elif tensor.dim() == 0:
            tensor.fill_(7)
    return network, chosen


@pytest.fixture(scope="module")
def resnet18() -> Network:
    torch.manual_seed(0)
    return drawn("resnet18")


@pytest.fixture(scope="module")
def resnet50() -> Network:
    torch.manual_seed(0)
    return drawn("resnet50")


@pytest.fixture(scope="module")
def written(resnet18: Network, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A Detectron2 file of `resnet18`."""
    path = tmp_path_factory.mktemp("written") / "resnet18.pkl"
    export.to_detectron2(*resnet18, path, "tests", None)
    return path.read_bytes()


def by_detectron2(name: str) -> str:
    """Detectron2's name of a torchvision tensor, by the rule of facebookresearch/moco convert-pretrain-to-detectron2.py."""
    name = re.sub(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", name)
    name = name if name.startswith("res") else f"stem.{name}"
    return (
        re.sub(r"bn(\d)", r"conv\1.norm", name)
        .replace("downsample.0", "shortcut")
        .replace("downsample.1", "shortcut.norm")
    )


def counted(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def bare(network: nn.Module) -> dict[str, Tensor]:
    """A ResNet's tensors by Detectron2's names."""
    return {by_detectron2(name): value for name, value in network.state_dict().items() if not counted(name)}


def same(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return given.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in given.items())


def pickled(model: Any, protocol: int | None = None, **others: Any) -> bytes:
    """A Detectron2 file by Python's own pickler."""
    return pickle.dumps({"model": model, "__author__": "tests", "matching_heuristics": True, **others}, protocol)


def arrays(content: bytes) -> dict[str, np.ndarray]:
    return pickle.loads(content)["model"]  # noqa: S301


@torch.no_grad()
def torchvisions_stages(name: str, state: Mapping[str, Tensor], images: Tensor) -> dict[str, Tensor]:
    """Outputs of the four stages of torchvision's network, in float64."""
    network = torchvision.models.get_model(name).double().eval()
    network.fc = nn.Identity()
    network.load_state_dict(state)
    x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    found = {}
    for stage in (1, 2, 3, 4):
        found[f"res{stage + 1}"] = x = getattr(network, f"layer{stage}")(x)
    return found


# --------------------------------------------------------------------------------------------------------------- names
def committed(detector: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of Detectron2's own Mask R-CNN."""
    path = ROOT / "tests" / "data" / f"mask_rcnn_R_50_{detector}_state_dict.json"
    return {name: tuple(shape) for name, shape in json.loads(path.read_text())["state_dict"].items()}


@pytest.mark.parametrize(
    ("detector", "prefixes"),
    [("C4", {"backbone.": "", "roi_heads.res5.": "res5."}), ("FPN", {"backbone.bottom_up.": ""})],
)
def test_names_and_shapes_are_those_of_detectron2s_own_models(detector: str, prefixes: dict[str, str]) -> None:
    theirs = {
        instead + name.removeprefix(prefix): shape
        for name, shape in committed(detector).items()
        for prefix, instead in prefixes.items()
        if name.startswith(prefix)
    }
    table = list(export.names(Detectron2ResNet(50)))
    assert len(table) == len(theirs) == 265
    assert {name: shape for _, name, shape in table} == theirs


def test_the_architectures_are_all() -> None:
    assert RESNETS.keys() == set(backbones.TORCHVISION)


@pytest.mark.parametrize("name", RESNETS)
def test_names_and_shapes_are_torchvisions(name: str) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name).state_dict()
    kept = {key: tuple(value.shape) for key, value in theirs.items() if not key.startswith("fc.") and not counted(key)}
    table = list(export.names(RESNETS[name]))
    assert {ours: shape for ours, _, shape in table} == kept
    assert len(table) == len(kept)
    assert all(detectron2 == by_detectron2(ours) for ours, detectron2, _ in table)
    options = backbones.Options(name=name)
    assert export.detectron2_resnet(backbones.on_meta(options), options) == RESNETS[name]


def test_settings() -> None:
    assert Detectron2ResNet(50, 32, 4).settings == {
        "MODEL.RESNETS.DEPTH": 50,
        "MODEL.RESNETS.NUM_GROUPS": 32,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
    }
    for depth in (18, 34):  # "Must set MODEL.RESNETS.RES2_OUT_CHANNELS = 64 for R18/R34": detectron2 resnet.py
        assert Detectron2ResNet(depth).settings["MODEL.RESNETS.RES2_OUT_CHANNELS"] == 64


# --------------------------------------------------------------------------------------------------- Detectron2's file
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnext50_32x4d"])
def test_the_file_holds_the_backbone(name: str, tmp_path: Path) -> None:
    network, options = drawn(name)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    done = export.to_detectron2(network, options, tmp_path / "new" / "out.pkl", "tests, from here", None)
    assert (done.resnet, done.by_detectron2) == (RESNETS[name], None)
    assert done.difference <= 1e-10
    assert done.tensors + done.left_out == len(before)
    assert done.left_out == sum(counted(key) for key in before)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.pkl"]

    with (tmp_path / "new" / "out.pkl").open("rb") as file:
        values = pickle.load(file, encoding="latin1")  # noqa: S301 - as detectron2 checkpoint/detection_checkpoint.py
    assert values.keys() == {"model", "__author__", "matching_heuristics"}
    assert values["__author__"] == "tests, from here"
    assert values["matching_heuristics"] is True
    assert all(type(value) is np.ndarray and value.dtype == np.float32 for value in values["model"].values())
    assert same({key: torch.from_numpy(value) for key, value in values["model"].items()}, bare(network))
    assert same(network.state_dict(), before)  # the source is left as it was
    assert done.tensors == len(values["model"])

    images = torch.randn(2, 3, 96, 64, dtype=torch.float64)
    expected = torchvisions_stages(name, before, images)
    for found in (export.rebuilt(values["model"], done.resnet, images), export.stages(network, images)):
        assert found.keys() == expected.keys()
        for stage, value in expected.items():
            assert value.std() > 0
            torch.testing.assert_close(found[stage], value, rtol=0, atol=1e-10)


def test_every_tensor_of_the_file_matters_to_the_features(written: bytes) -> None:
    model = arrays(written)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    right = export.rebuilt(model, RESNETS["resnet18"], images)["res5"]
    for name, value in model.items():
        moved = export.rebuilt({**model, name: value * 1.5}, RESNETS["resnet18"], images)["res5"]
        assert (moved - right).abs().max() > 1e-6, name


class Recorder(pickle.Unpickler):
    """Python's own unpickler, which notes what a pickle names."""

    found: frozenset[tuple[str, str]] = frozenset()

    def find_class(self, module: str, name: str) -> Any:
        self.found = self.found | {(module, name)}
        return super().find_class(module, name)


def test_the_file_names_nothing_that_moves_between_versions_of_numpy(written: bytes) -> None:
    recorder = Recorder(io.BytesIO(written))
    assert len(recorder.load()["model"]) == 100
    assert recorder.found == {("numpy", "ndarray"), ("builtins", "bytearray")}
    operations = [(operation.name, argument) for operation, argument, _ in pickletools.genops(written)]
    assert operations[0] == ("PROTO", 4)  # which Python 3.4 reads
    assert not {name for name, _ in operations} & {"GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD", "PERSID"}
    assert b"numpy.core" not in written
    assert b"numpy._core" not in written


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_files_by_pythons_own_pickler_are_read(
    protocol: int, resnet18: Network, written: bytes, tmp_path: Path
) -> None:
    """facebookresearch/moco convert-pretrain-to-detectron2.py writes such; the module's name is numpy's 1 or 2."""
    content = pickled(arrays(written), protocol)
    assert re.search(rb"numpy\._?core", content)
    (tmp_path / "file.pkl").write_bytes(content)
    assert export.verify(tmp_path / "file.pkl", *resnet18) <= 1e-10
    if protocol < 4:  # names of modules end with the line, so that they may be of another length
        other = (b"numpy.core", b"numpy._core")[b"numpy.core" in content]
        (tmp_path / "file.pkl").write_bytes(re.sub(rb"numpy\._?core", other, content))
        assert export.verify(tmp_path / "file.pkl", *resnet18) <= 1e-10


def without(model: dict[str, np.ndarray], name: str) -> bytes:
    return pickled({key: value for key, value in model.items() if key != name})


def changed(model: dict[str, np.ndarray], name: str, change: Callable[[np.ndarray], np.ndarray]) -> bytes:
    return pickled({**model, name: change(model[name])})


def one_value(value: np.ndarray) -> np.ndarray:
    value = value.copy()
    value.flat[value.size // 2] *= 1 + 1e-6
    return value


BROKEN: dict[str, tuple[Callable[[dict[str, np.ndarray]], bytes], str]] = {
    "missing tensor": (lambda m: without(m, "res4.0.conv2.weight"), "resnet18's .*: res4.0.conv2.weight is missing$"),
    "missing running_var": (
        lambda m: without(m, "res3.1.conv1.norm.running_var"),
        "resnet18's .*: res3.1.conv1.norm.running_var is missing$",
    ),
    "channels swapped": (
        lambda m: changed(m, "stem.conv1.weight", lambda value: value[:, ::-1].copy()),
        "stem.conv1.weight has its input channels in the order BGR; here it is RGB",
    ),
    "wrong names": (
        lambda m: pickled({ours: m[theirs] for ours, theirs, _ in export.names(RESNETS["resnet18"])}),
        "stem.conv1.weight is missing; .* and 197 more",
    ),
    "altered weight": (
        lambda m: changed(m, "res4.1.conv2.weight", one_value),
        "res4.1.conv2.weight has other values than the source",
    ),
    "altered statistic": (
        lambda m: changed(m, "res5.1.conv2.norm.running_mean", one_value),
        "res5.1.conv2.norm.running_mean has other values than the source",
    ),
    "no author": (
        lambda m: pickle.dumps({"model": m, "matching_heuristics": True}),
        "has no `__author__`: Detectron2 would take it for Caffe2's",
    ),
    "no heuristics": (
        lambda m: pickle.dumps({"model": m, "__author__": "tests"}),
        "has no `matching_heuristics`: Detectron2 would find none",
    ),
    "heuristics off": (lambda m: pickled(m, matching_heuristics=False), "has no `matching_heuristics`"),
    "further tensor": (
        lambda m: pickled({**m, "res2.0.conv3.weight": np.zeros(3, np.float32)}),
        "res2.0.conv3.weight is too much$",
    ),
    "other shape": (
        lambda m: changed(m, "res2.0.conv1.weight", lambda value: value[:32]),
        r"res2.0.conv1.weight is \(32, 64, 3, 3\), not \(64, 64, 3, 3\)$",
    ),
    "float64": (
        lambda m: changed(m, "stem.conv1.weight", lambda value: value.astype(np.float64)),
        "stem.conv1.weight is float64, not float32",
    ),
    "not a number": (
        lambda m: changed(m, "stem.conv1.norm.bias", lambda value: value * np.float32(np.nan)),
        "stem.conv1.norm.bias has other values than the source",
    ),
    "no model": (lambda m: pickle.dumps({"__author__": "tests", "matching_heuristics": True}), "has no `model`"),
    "no mapping": (lambda m: pickle.dumps(list(m.values())), "has no `model`, a mapping of names to arrays"),
    "text": (
        lambda m: changed(m, "stem.conv1.norm.bias", lambda value: np.array(["x"])),
        "array of U1, not of numbers",
    ),
    "objects": (
        lambda m: changed(m, "stem.conv1.norm.bias", lambda value: value.astype(object)),
        "array of O8, not of numbers",
    ),
    "ragged list": (lambda m: pickled({**m, "stem.conv1.norm.bias": [[1.0], [1.0, 2.0]]}), "stem.conv1.norm.bias"),
    "numbers for names": (lambda m: pickled({**m, 5: np.zeros(3, np.float32)}), r"\b5 is "),
    "long double": (
        lambda m: changed(m, "stem.conv1.norm.bias", lambda value: value.astype(np.longdouble)),
        "array of f16, not of numbers",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_refused(how: str, resnet18: Network, written: bytes, tmp_path: Path) -> None:
    make, words = BROKEN[how]
    (tmp_path / "file.pkl").write_bytes(make(arrays(written)))
    with pytest.raises(BadInput, match=words) as refused:
        export.verify(tmp_path / "file.pkl", *resnet18)
    assert "file.pkl" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("how", ["ragged list", "numbers for names", "long double", "text", "no author"])
def test_a_broken_file_is_no_source(how: str, written: bytes, tmp_path: Path) -> None:
    make, words = BROKEN[how]
    (tmp_path / "file.pkl").write_bytes(make(arrays(written)))
    with pytest.raises(BadInput, match=words):
        export.source(tmp_path / "file.pkl", None)


def test_torn_files_are_refused(resnet18: Network, written: bytes, tmp_path: Path) -> None:
    for content in (written[: len(written) // 2], written[:-1], b"", b"text\n", written[100:]):
        (tmp_path / "file.pkl").write_bytes(content)
        with pytest.raises(BadInput, match="file.pkl' is no Detectron2 file that can be read safely: "):
            export.verify(tmp_path / "file.pkl", *resnet18)
    with pytest.raises(BadInput, match="no file .*none.pkl"):
        export.verify(tmp_path / "none.pkl", *resnet18)


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("place", ["a tensor", "beside the model", "the author"])
@pytest.mark.parametrize("function", ["posix.system", "io.open", "builtins.eval"])
def test_a_strangers_file_runs_no_code(
    function: str, place: str, resnet18: Network, written: bytes, tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    call = {
        "posix.system": Call(os.system, f"touch {marker}"),
        "io.open": Call(open, str(marker), "w"),
        "builtins.eval": Call(eval, f"open({str(marker)!r}, 'w')"),
    }[function]
    model = arrays(written)
    content = {
        "a tensor": lambda: pickled({**model, "stem.conv1.weight": call}),
        "beside the model": lambda: pickled(model, epoch=call),
        "the author": lambda: pickled(model, __author__=call),
    }[place]()
    pickle.loads(content)  # noqa: S301
    assert marker.exists()  # so it is a file that would
    marker.unlink()
    (tmp_path / "file.pkl").write_bytes(content)
    for read in (lambda path: export.verify(path, *resnet18), lambda path: export.source(path, None)):
        with pytest.raises(BadInput, match=f"it holds {function}, which is not read because it could run code"):
            read(tmp_path / "file.pkl")
    assert not marker.exists()


def test_bytes_do_not_become_pointers(resnet18: Network, written: bytes, tmp_path: Path) -> None:
    """numpy.ndarray's constructor takes the bytes of an array of objects for their addresses."""
    there = object()
    address = bytearray(id(there).to_bytes(8, sys.byteorder))
    pointer = Call(np.ndarray, (1,), "O", address)
    content = pickled({**arrays(written), "stem.conv1.weight": pointer})
    assert arrays(content)["stem.conv1.weight"][0] is there
    (tmp_path / "file.pkl").write_bytes(content)
    with pytest.raises(
        BadInput, match="no Detectron2 file that can be read safely: it holds an array of O, not of numbers"
    ):
        export.verify(tmp_path / "file.pkl", *resnet18)


def test_a_type_that_lies_about_its_objects_makes_no_pointers(tmp_path: Path) -> None:
    """numpy's own dtype.__setstate__ takes fields of objects with the flag that says so cleared."""
    state = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)

    class Lying:
        def __reduce__(self) -> Any:
            return np.dtype, ("f8", False, True), state

    array = Call(np.ndarray, (1,), Lying(), bytearray(8))
    content = pickle.dumps({"model": {"a": array}, "__author__": "x", "matching_heuristics": True}, protocol=4)
    (tmp_path / "file.pkl").write_bytes(content)
    with pytest.raises(BadInput, match="can be read safely: it holds an array of O8?, not of numbers"):
        export.read_detectron2(tmp_path / "file.pkl")


def test_the_other_order_of_bytes_is_answered(resnet18: Network, written: bytes, tmp_path: Path) -> None:
    value = arrays(written)["stem.conv1.norm.bias"]
    swapped = Call(np.ndarray, value.shape, ">f4", bytearray(value.astype(">f4").tobytes()))
    (tmp_path / "file.pkl").write_bytes(pickled({**arrays(written), "stem.conv1.norm.bias": swapped}))
    with pytest.raises(BadInput, match="array of >f4, not of numbers"):
        export.verify(tmp_path / "file.pkl", *resnet18)


# ------------------------------------------------------------------------------------- what is checked before it stands
def average_pooling(network: nn.Module) -> None:
    network.add_module("maxpool", nn.AvgPool2d(3, 2, 1))


def a_larger_epsilon(network: nn.Module) -> None:
    network.get_submodule("layer3.0.bn1").eps = 1e-2  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("name", "arguments", "change", "words"),
    [
        ("resnet50", {"output_stride": 16}, None, r"res5 is \(2, 2048, 4, 3\), not \(2, 2048, 8, 6\)"),
        ("resnet18", {"act_layer": "gelu"}, None, "res2 differs by .* from the source's"),
        ("resnet18", {}, average_pooling, "res2 differs by .* from the source's"),
        ("resnet18", {}, a_larger_epsilon, "res4 differs by .* from the source's"),
    ],
)
def test_what_no_name_and_no_shape_shows_is_seen_by_the_features(
    name: str, arguments: dict[str, Any], change: Callable[[nn.Module], None] | None, words: str, tmp_path: Path
) -> None:
    network, options = drawn(name, arguments=arguments)
    if change is not None:
        change(network)
    with pytest.raises(BadInput, match=words):
        export.to_detectron2(network, options, tmp_path / "out.pkl", "tests", None)
    assert list(tmp_path.iterdir()) == []


def test_features_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    network, options = drawn("resnet18")
    network.state_dict()["layer2.0.bn1.weight"].fill_(float("nan"))
    (tmp_path / "out.pkl").write_text("older")
    with pytest.raises(BadInput, match="out.pkl.*: res3 differs by nan") as refused:
        export.to_detectron2(network, options, tmp_path / "out.pkl", "tests", None)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["older"]
    assert "partial" not in str(refused.value)  # a file that is not there any more


def test_what_the_disk_altered_does_not_stand(
    resnet18: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, options = resnet18
    write, save = Path.write_bytes, torch.save
    value = bare(network)["res5.1.conv2.weight"].numpy().tobytes()

    def altering(path: Path, content: bytes) -> int:
        place = content.index(value) + 1000
        return write(path, content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])

    monkeypatch.setattr(Path, "write_bytes", altering)
    with pytest.raises(BadInput, match="res5.1.conv2.weight has other values than the source"):
        export.to_detectron2(network, options, tmp_path / "out.pkl", "tests", None)
    changed = {**network.state_dict(), "bn1.running_mean": network.state_dict()["bn1.running_mean"] * (1 + 1e-6)}
    monkeypatch.setattr(torch, "save", lambda values, file: save(changed, file))
    with pytest.raises(BadInput, match="bn1.running_mean is not what was written"):
        export.export(network, options, tmp_path / "out.pth", "torchvision")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ what cannot go there
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "resnet18", "stem": "small"}, "begins with a 7x7 .*resnet18 has the stem small, .*stem=standard$"),
        ({"name": "resnet50", "stem": "small_maxpool"}, "resnet50 has the stem small_maxpool"),
        ({"name": "vit_tiny_patch16_224"}, "cannot hold backbone vit_tiny_patch16_224, which is no ResNet; .*resnet18"),
        ({"name": "resnet50d"}, "another network than backbone resnet50d: conv1.weight is missing"),
        ({"name": "resnet26"}, r"no ResNet with \(2, 2, 2, 2\) blocks.* as backbone resnet26 has$"),
        (
            {"name": "resnet18", "arguments": {"layers": [1, 1, 1, 1]}},
            r"no ResNet with \(1, 1, 1, 1\) blocks.* as backbone resnet18 {'layers': \[1, 1, 1, 1\]} has$",
        ),
        ({"name": "resnet18", "arguments": {"channels": [8, 16, 32, 64]}}, "another network than backbone resnet18: "),
        ({"name": "resnet50_gn"}, "another network than backbone resnet50_gn: bn1.running_mean is missing"),
        ({"name": "seresnet50"}, "another network than backbone seresnet50: layer1.0.se.fc1.weight is too much"),
        ({"name": "skresnet18"}, "backbone skresnet18"),
        ({"name": "skresnet50"}, "backbone skresnet50"),
        ({"name": "resnest50d"}, "backbone resnest50d"),
        ({"name": "res2net50_26w_4s"}, "backbone res2net50_26w_4s"),
    ],
)
def test_backbones_that_detectron2_has_not(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    chosen = backbones.Options(**options)
    with pytest.raises(BadInput, match=words) as refused:
        export.to_detectron2(backbones.on_meta(chosen), chosen, tmp_path / "out.pkl", "tests", None)
    assert "Detectron2" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "  " not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out.pth", "out", "out.PKL", "out.pkl.gz"])
def test_the_ending_of_a_detectron2_file(name: str, resnet18: Network, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"{name}': .* name one that ends with .pkl"):
        export.to_detectron2(*resnet18, tmp_path / name, "tests", None)
    assert list(tmp_path.iterdir()) == []


def write(network: Network, path: Path) -> None:
    if path.suffix == ".pkl":
        export.to_detectron2(*network, path, "tests", None)
    else:
        export.export(*network, path, "torchvision")


@pytest.mark.parametrize("ending", ["pkl", "pth", "safetensors"])
def test_a_place_below_a_file_is_a_storage_failure(ending: str, resnet18: Network, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    for place in (tmp_path / "file" / f"out.{ending}", tmp_path / "file" / "below" / f"out.{ending}"):
        with pytest.raises(StorageFailure, match=f"cannot write .*out.{ending}: .*name another file"):
            write(resnet18, place)
    assert (tmp_path / "file").read_text() == "here"


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow over a megabyte."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("ending", ["pkl", "pth", "safetensors"])
def test_a_full_disk_is_a_storage_failure(ending: str, resnet18: Network, tmp_path: Path) -> None:
    (tmp_path / f"out.{ending}").write_text("older")
    with pytest.raises(StorageFailure, match=f"cannot write .*out.{ending}: .*free room"):
        write(resnet18, tmp_path / f"out.{ending}")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["older"]


# ------------------------------------------------------------------------------------------------------ the way back
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_back_from_detectron2(name: str) -> None:
    network, options = drawn(name)
    found, back = export.from_detectron2(bare(network), "file.pkl")
    assert found == options
    assert not back.training
    kept = {key: value for key, value in network.state_dict().items() if not counted(key)}
    assert same({key: value for key, value in back.state_dict().items() if not counted(key)}, kept)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(back(images), network(images))


def detector(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole Mask R-CNN of Detectron2 with a backbone's tensors in it, as training with SyncBN saves it."""
    found = {}
    for name, shape in committed(kind).items():
        own = re.sub(r"^(backbone\.bottom_up|backbone|roi_heads)\.", "", name)
        found[name] = tensors[own] if own in tensors else torch.zeros(shape)
    beside = "roi_heads.res5.norm" if kind == "C4" else "backbone.fpn_lateral2.norm"
    for part in ("weight", "bias", "running_mean", "running_var"):
        found[f"{beside}.{part}"] = torch.ones(2048 if kind == "C4" else 256)
    for name in [name for name in found if name.endswith("running_mean")]:
        found[f"{name.removesuffix('running_mean')}num_batches_tracked"] = torch.tensor(90000)
    return {**found, "pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}


@pytest.mark.parametrize("kind", ["C4", "FPN"])
def test_back_from_a_detector(kind: str, resnet50: Network) -> None:
    network, options = resnet50
    own = bare(network)
    tensors = detector(kind, own)
    assert {id(value) for value in tensors.values()} > {id(value) for value in own.values()}
    found, back = export.from_detectron2(tensors, "model_final.pth")
    assert found == options
    assert same(bare(back), bare(network))


# Others than these take seconds to build, and their blocks are others.
QUICK = ["resnet18", "resnet34", "resnet50", "wide_resnet50_2", "resnext50_32x4d"]


def test_a_missing_tensor_is_named_for_the_right_architecture(
    resnet18: Network, resnet50: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbones, "TORCHVISION", QUICK)
    for network, options in (resnet18, resnet50):  # ResNet-50 has the blocks of three others
        tensors = bare(network)
        del tensors["res4.1.conv2.weight"]
        words = rf"'file.pkl' is none of resnet18, .*\({options.name}: (layer3|res4).1.conv2.weight is missing\)"
        with pytest.raises(BadInput, match=words):
            export.from_detectron2(tensors, "file.pkl")


def test_what_is_no_backbone_of_detectron2s(resnet18: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "TORCHVISION", QUICK[:2])
    network, _ = resnet18
    tensors = bare(network)
    with pytest.raises(BadInput, match="holds no ResNet by Detectron2's names: no stem.conv1.weight"):
        export.from_detectron2(network.state_dict(), "file.pkl")
    with pytest.raises(BadInput, match="resnet18: res5.1.conv3.weight is too much"):
        export.from_detectron2({**tensors, "res5.1.conv3.weight": torch.zeros(3)}, "file.pkl")
    with pytest.raises(BadInput, match=r"its stages have \(2, 2, 2, 1\) blocks"):
        export.from_detectron2({n: v for n, v in tensors.items() if not n.startswith("res5.1.")}, "file.pkl")
    with pytest.raises(BadInput, match=r"(res2|layer1).0.conv1.weight is \(3,\), not \(64, 64, 3, 3\)"):
        export.from_detectron2({**tensors, "res2.0.conv1.weight": torch.zeros(3)}, "file.pkl")


@pytest.mark.parametrize("head", [["fc.weight", "fc.bias"], ["fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias"]])
def test_what_mocos_converter_leaves_in_a_file_is_left_out(head: list[str], resnet18: Network, tmp_path: Path) -> None:
    """Its head under stem., and counters: facebookresearch/moco detection/convert-pretrain-to-detectron2.py; v1 and v2."""
    network, options = resnet18
    state = {**network.state_dict(), **{name: torch.zeros(8) for name in head}}
    model = {by_detectron2(name): value.numpy() for name, value in state.items()}
    assert f"stem.{head[0]}" in model
    assert "stem.conv1.norm.num_batches_tracked" in model
    (tmp_path / "moco.pkl").write_bytes(pickled(model, 4, __author__="MOCO"))
    found = export.source(tmp_path / "moco.pkl", None)
    assert found.options == options
    assert same(bare(found.backbone), bare(network))


# ------------------------------------------------------------------------------------------------------------ export
@pytest.mark.parametrize("ending", ["pth", "pt", "safetensors"])
def test_torchvision_loads_the_file(ending: str, resnet18: Network, tmp_path: Path) -> None:
    network, options = resnet18
    path = tmp_path / f"out.{ending}"
    assert export.export(network, options, path, "torchvision") <= 1e-10
    state = load_file(path) if ending == "safetensors" else torch.load(path, weights_only=True)
    theirs = torchvision.models.resnet18().eval()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(state, strict=True)
    assert same(theirs.state_dict(), network.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), network(images), rtol=1e-5, atol=1e-5)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_timm_loads_the_file(name: str, ending: str, tmp_path: Path) -> None:
    network, options = drawn(name)
    path = tmp_path / f"out.{ending}"
    assert export.export(network, options, path, "timm") <= 1e-10
    theirs = timm.create_model(name, num_classes=0, checkpoint_path=str(path)).eval()
    assert same(theirs.state_dict(), network.state_dict())
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(theirs(images), network(images))


def test_timm_loads_the_file_of_a_vit_of_another_size(tmp_path: Path) -> None:
    arguments = {"img_size": 32, "patch_size": 8, "depth": 2}
    network, options = drawn("vit_tiny_patch16_224", arguments=arguments)
    assert export.export(network, options, tmp_path / "out.pth", "timm") <= 1e-10
    theirs = timm.create_model(options.name, num_classes=0, checkpoint_path=str(tmp_path / "out.pth"), **arguments)
    assert same(theirs.state_dict(), network.state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {"name": "resnet18", "stem": "small", "arguments": {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]}},
        {"name": "resnet18", "stem": "small_maxpool", "arguments": {"layers": [1, 1, 1, 1]}, "zero_init_last": False},
        {"name": "vit_tiny_patch16_224", "arguments": {"depth": 2}},
    ],
)
def test_safetensors_tell_their_options(options: dict[str, Any], tmp_path: Path) -> None:
    network, chosen = drawn(**options)
    path = tmp_path / "out.safetensors"
    assert export.export(network, chosen, path, "safetensors") <= 1e-10
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - its own method
    assert same(state, network.state_dict())
    assert metadata["format"] == "pt"
    assert backbones.Options.model_validate_json(metadata["backbone"]) == chosen
    assert same(backbones.load(path, chosen).state_dict(), network.state_dict())


@pytest.mark.parametrize(
    ("options", "style", "name", "words"),
    [
        ({"name": "resnet18"}, "torchvision", "out.pkl", "out.pkl': name a file that ends with .pth, .pt or .safet"),
        ({"name": "resnet18"}, "timm", "out", "out': name a file that ends with .pth, .pt or .safetensors"),
        ({"name": "resnet18"}, "safetensors", "out.pth", "out.pth': name a file that ends with .safetensors"),
        (
            {"name": "vit_tiny_patch16_224"},
            "torchvision",
            "out.pth",
            "torchvision has no vit_tiny_patch16_224 .*; it has resnet18, .*give --format safetensors",
        ),
        ({"name": "resnet50d"}, "torchvision", "out.pth", "torchvision has no resnet50d"),
        (
            {"name": "resnet18", "stem": "small"},
            "torchvision",
            "out.pth",
            "torchvision has no resnet18 with the stem small .*give --format safetensors",
        ),
        (
            {"name": "resnet18", "stem": "small_maxpool"},
            "timm",
            "out.pth",
            "timm has no resnet18 with the stem small_maxpool: give --format safetensors .*backbone.stem=standard",
        ),
        (
            {"name": "resnet18", "arguments": {"layers": [1, 1, 1, 1]}},
            "torchvision",
            "out.pth",
            "torchvision's resnet18 is another network than this backbone: layer1.1.conv1.weight is missing",
        ),
        (
            {"name": "resnet18", "arguments": {"act_layer": "gelu"}},
            "torchvision",
            "out.safetensors",
            "read by torchvision: features differs by",
        ),
    ],
)
def test_what_other_projects_have_not(
    options: dict[str, Any], style: str, name: str, words: str, tmp_path: Path
) -> None:
    network, chosen = drawn(**options)
    with pytest.raises(BadInput, match=words) as refused:
        export.export(network, chosen, tmp_path / name, style)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------- sources
CIFAR = "{op: normalize, mean: [0.4914, 0.4822, 0.4465], std: [0.247, 0.2435, 0.2616]}"
VALUES = config.load(
    "smoke",
    [
        "backbone={name: resnet18, zero_init_last: false}",
        "seed=11",
        f"data.evaluation_view={{size: 32, ops: [{{op: center_crop, resize: 32}}, {CIFAR}]}}",
    ],
).values
CIFARS_PIXELS = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [125.307, 122.961, 113.8575],
    "MODEL.PIXEL_STD": [62.985, 62.0925, 66.708],
}


@pytest.fixture
def run(resnet18: Network, tmp_path: Path) -> RunFolder:
    """A run's folder, of pictures normalised by their own mean and deviation."""
    run = RunFolder(tmp_path / "run")
    run.describe(VALUES)
    options = config.validate(backbones.Options, VALUES["backbone"])
    backbones.save(resnet18[0], options, run.backbone)
    run.backbones.mkdir()
    backbones.save(resnet18[0], options, run.backbones / "epoch_0002.pth")
    return run


def test_a_run_is_a_source(run: RunFolder, resnet18: Network) -> None:
    found = export.source(run.path, None)
    assert found.options == backbones.Options(name="resnet18", zero_init_last=False)
    assert same(found.backbone.state_dict(), resnet18[0].state_dict())
    assert not found.backbone.training
    assert found.name == str(run.backbone)
    assert found.pixels == CIFARS_PIXELS


def test_a_bare_file_is_a_source(run: RunFolder, resnet18: Network) -> None:
    found = export.source(run.backbone, None)  # the options lie beside it
    assert found.options == backbones.Options(name="resnet18", zero_init_last=False)
    assert same(found.backbone.state_dict(), resnet18[0].state_dict())
    assert found.pixels == IMAGENET
    assert export.source(run.backbone, VALUES).pixels == CIFARS_PIXELS


def test_a_bare_file_of_another_project_is_a_source(tmp_path: Path) -> None:
    theirs = torchvision.models.resnet18().state_dict()
    torch.save(theirs, tmp_path / "resnet18.pth")
    for values in (None, VALUES):
        found = export.source(tmp_path / "resnet18.pth", values)
        assert found.options.name == "resnet18"
        assert same(
            found.backbone.state_dict(), {key: value for key, value in theirs.items() if not key.startswith("fc.")}
        )
        assert found.pixels == (IMAGENET if values is None else CIFARS_PIXELS)
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "strange.pth")
    with pytest.raises(BadInput, match="strange.pth' does not say which network it is of.*give --config NAME"):
        export.source(tmp_path / "strange.pth", None)


def test_detectron2s_files_are_sources(resnet18: Network, written: bytes, tmp_path: Path) -> None:
    network, options = resnet18
    (tmp_path / "backbone.pkl").write_bytes(written)
    tensors = {f"backbone.bottom_up.{name}": value for name, value in bare(network).items()}
    tensors |= {"backbone.fpn_output2.weight": torch.zeros(3), "proposal_generator.rpn_head.conv.bias": torch.zeros(3)}
    solver = {"optimizer": {"state": {}, "param_groups": [{"lr": 0.02}]}, "scheduler": {"last_epoch": 5}}
    torch.save({"model": tensors, "iteration": 89999, **solver}, tmp_path / "model_final.pth")
    torch.save(tensors, tmp_path / "tensors.pth")
    for name in ("backbone.pkl", "model_final.pth", "tensors.pth"):
        found = export.source(tmp_path / name, None)
        assert found.options == options
        assert found.name == str(tmp_path / name)
        assert found.pixels == IMAGENET
        assert same(bare(found.backbone), bare(network))
        assert export.source(tmp_path / name, VALUES).pixels == CIFARS_PIXELS


def test_other_networks_have_a_stem_too(tmp_path: Path) -> None:
    """Several of timm's have a tensor stem.conv1.weight and are no ResNets of Detectron2's."""
    network, options = drawn("efficientformer_l1")
    assert "stem.conv1.weight" in network.state_dict()
    backbones.save(network, options, tmp_path / "backbone.pth")
    found = export.source(tmp_path / "backbone.pth", None)
    assert found.options == options
    assert same(found.backbone.state_dict(), network.state_dict())


def test_random_initialisation_is_the_one_that_pretraining_starts_from(run: RunFolder, resnet18: Network) -> None:
    before = torch.get_rng_state()
    found = export.source(run.path, None, random_init=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert "random initialisation" in found.name
    assert found.pixels == CIFARS_PIXELS
    start = features.network(features.options(run.path, None, random_init=True))
    assert same(found.backbone.state_dict(), start.state_dict())
    assert not same(bare(found.backbone), bare(resnet18[0]))
    torch.manual_seed(VALUES["seed"])
    assert same(bare(found.backbone), bare(backbones.build(found.options)))
    run.backbone.unlink()  # nor does it need a checkpoint
    assert same(export.source(run.path, None, random_init=True).backbone.state_dict(), start.state_dict())
    with pytest.raises(BadInput, match="has no backbone.pth yet"):
        export.source(run.path, None)


def test_random_initialisation_of_a_file_is_of_its_network(resnet18: Network, written: bytes, tmp_path: Path) -> None:
    torch.save(resnet18[0].state_dict(), tmp_path / "bare.pth")
    (tmp_path / "backbone.pkl").write_bytes(written)
    for name in ("bare.pth", "backbone.pkl"):
        found = export.source(tmp_path / name, None, random_init=True)
        assert found.options == resnet18[1]
        assert not same(bare(found.backbone), bare(resnet18[0]))


@pytest.mark.parametrize("name", ["none", "none.pth", "none.pkl", "none.safetensors"])
@pytest.mark.parametrize("random_init", [False, True])
def test_a_missing_file_is_named(name: str, random_init: bool, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=name):
        export.source(tmp_path / name, None, random_init)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is no run folder"):
        export.source(tmp_path, None)


def test_a_name_that_nobody_has_is_answered() -> None:
    with pytest.raises(BadInput, match="timm has no weights 'resnet50.nobodys'"):
        export.source(Path("timm:resnet50.nobodys"), None)


# --------------------------------------------------------------------------------------------------------- the verbs
def called(*words: object) -> int:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ssl_pipeline.distributed.stop", lambda: None)  # the tests' own process group stays
        patched.setattr(logging.getLogger("ssl_pipeline"), "handlers", [logging.NullHandler()])
        return cli.main([str(word) for word in words], signals=False)


def test_convert_to_detectron2_tells_what_detectron2_must_be_told(
    run: RunFolder, resnet18: Network, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out.pkl"
    assert called("convert-to-detectron2", run.path, out) == Status.DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"source: {run.backbone} (resnet18)"
    assert lines[1] == "tensors: 100, of 20 convolutions and their batch norms; counters left out: 20"
    measured = re.fullmatch(
        r"largest difference of res2 to res5, read back and rebuilt: (\S+) \(limit 0.0001\)", lines[2]
    )
    assert measured is not None
    assert float(measured[1]) <= 1e-10
    assert lines[3] == "largest difference by Detectron2 itself: not measured, it is not installed here"
    assert lines[5:] == [
        "  INPUT.FORMAT RGB",
        "  MODEL.PIXEL_MEAN [125.307, 122.961, 113.8575]",
        "  MODEL.PIXEL_STD [62.985, 62.0925, 66.708]",
        "  MODEL.RESNETS.DEPTH 18",
        "  MODEL.RESNETS.NUM_GROUPS 1",
        "  MODEL.RESNETS.WIDTH_PER_GROUP 64",
        "  MODEL.RESNETS.RES2_OUT_CHANNELS 64",
        "  MODEL.RESNETS.STRIDE_IN_1X1 False",
        f"written to {out}",
    ]
    assert export.verify(out, *resnet18) <= 1e-10
    assert str(run.backbone) in pickle.loads(out.read_bytes())["__author__"]  # noqa: S301


def test_convert_to_detectron2_of_a_file_of_a_run(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = run.backbones / "epoch_0002.pth"
    assert called("convert-to-detectron2", file, tmp_path / "out.pkl") == Status.DONE
    out = capsys.readouterr().out
    assert f"source: {file} (resnet18)" in out
    assert "MODEL.PIXEL_MEAN [125.307, 122.961, 113.8575]" in out


def test_export_and_back(run: RunFolder, resnet18: Network, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert called("convert-to-detectron2", run.path, tmp_path / "there.pkl") == Status.DONE
    capsys.readouterr()
    assert called("export", tmp_path / "there.pkl", tmp_path / "back.pth", "--format", "torchvision") == Status.DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"source: {tmp_path / 'there.pkl'} (resnet18)"
    assert re.fullmatch(r"largest difference of features, read back by torchvision: \S+ \(limit 0.0001\)", lines[1])
    assert lines[2:] == [f"written to {tmp_path / 'back.pth'}"]
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    kept = {name: value for name, value in resnet18[0].state_dict().items() if not counted(name)}
    assert same({name: value for name, value in back.items() if not counted(name)}, kept)


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["convert-to-detectron2", "RUN", "OUT.pth"], Status.BAD_INPUT, "name one that ends with .pkl"),
        (["convert-to-detectron2", "nowhere", "OUT.pkl"], Status.BAD_INPUT, "'nowhere'"),
        (["convert-to-detectron2", "RUN", "OUT.pkl", "--config", "smoke"], Status.BAD_INPUT, "leave --config out"),
        (["convert-to-detectron2", "RUN/backbone.pth", "OUT.pkl", "--config", "smok"], Status.BAD_INPUT, "`smoke`"),
        (["convert-to-detectron2", "RUN", "RUN/config.yaml/out.pkl"], Status.STORAGE, "cannot write"),
        (["export", "RUN", "OUT.pkl", "--format", "timm"], Status.BAD_INPUT, "ends with .pth, .pt or .safetensors"),
        (["export", "RUN", "OUT.pth", "--format", "safetensors"], Status.BAD_INPUT, "ends with .safetensors"),
        (["export", "SMALL", "OUT.pth", "--format", "torchvision"], Status.BAD_INPUT, "with the stem small"),
        (["export", "RUN", "RUN/config.yaml/out.pth", "--format", "timm"], Status.STORAGE, "cannot write"),
    ],
)
def test_what_cannot_be_written_is_one_sentence(
    words: list[str], status: Status, said: str, run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    small = backbones.Options(name="resnet18", stem="small")
    backbones.save(backbones.build(small), small, tmp_path / "small.pth")
    places = {"RUN": run.path, "OUT": tmp_path / "out", "SMALL": tmp_path / "small.pth"}
    filled = [re.sub("|".join(places), lambda found: str(places[found[0]]), word) for word in words]
    assert called(*filled) == status
    captured = capsys.readouterr()
    (sentence,) = captured.err.splitlines()
    assert sentence.startswith("ssl-pipeline: ")
    assert said in sentence
    assert "written to" not in captured.out
    assert not list(tmp_path.glob("*out*"))


def test_the_tool_is_the_verb() -> None:
    words = [sys.executable, str(ROOT / "tools" / "convert_to_detectron2.py"), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "ssl-pipeline convert-to-detectron2" in done.stdout
    assert "OUT.pkl" in done.stdout
