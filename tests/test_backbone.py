"""The backbone: what is built, what is saved, and what is loaded from whom."""

import argparse
import json
import os
import subprocess
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from ssl_pipeline import backbone
from ssl_pipeline.exits import BadInput

NARROW = backbone.Options(name="resnet18", arguments={"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64]})


def scrambled(model: nn.Module) -> nn.Module:
    """The model in evaluation mode with every weight and statistic at random, so that each of them matters."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5 if "var" in name else torch.randn_like(value) * 0.05)
    return model.eval()


@torch.no_grad()
def features(model: nn.Module, size: int = 32) -> Tensor:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    return model.eval()(images)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_standard_stem_is_torchvisions_without_fc(name: str, tmp_path: Path) -> None:
    options = backbone.Options(name=name)
    ours = backbone.build(options).eval()
    backbone.save(ours, options, tmp_path / "backbone.pth")
    theirs = torchvision.models.get_model(name).eval()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(torch.load(tmp_path / "backbone.pth", weights_only=True), strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images), rtol=1e-5, atol=1e-5)


def test_small_stem_is_torchvisions_after_one_line(tmp_path: Path) -> None:
    options = backbone.Options(name="resnet18", stem="small")
    ours = backbone.build(options).eval()
    backbone.save(ours, options, tmp_path / "backbone.pth")
    theirs = torchvision.models.resnet18().eval()
    theirs.conv1, theirs.maxpool, theirs.fc = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity(), nn.Identity()
    theirs.load_state_dict(torch.load(tmp_path / "backbone.pth", weights_only=True), strict=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images), rtol=1e-5, atol=1e-5)


def test_a_torchvision_file_with_its_classifier_is_read(tmp_path: Path) -> None:
    theirs = torchvision.models.resnet18().eval()
    torch.save(theirs.state_dict(), tmp_path / "r18.pth")
    ours = backbone.load(tmp_path / "r18.pth", backbone.Options(name="resnet18")).eval()
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images), rtol=1e-5, atol=1e-5)


def test_zero_init_last_is_an_option() -> None:
    for wanted in (True, False):
        model = backbone.build(backbone.Options(name="resnet18", zero_init_last=wanted))
        assert bool((model.layer1[0].bn2.weight == 0).all()) == wanted


def test_options_lie_beside_the_weights(tmp_path: Path) -> None:
    options = backbone.Options(name="resnet18", stem="small_maxpool", arguments={"layers": [1, 1, 1, 1]})
    backbone.save(backbone.build(options), options, tmp_path / "backbone.pth")
    assert backbone.options_beside(tmp_path / "backbone.pth") == options
    assert json.loads((tmp_path / "backbone.json").read_text())["stem"] == "small_maxpool"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "resnet81"}, "no timm model"),
        ({"name": "vit_tiny_patch16_224", "stem": "small"}, "ResNets only"),
        ({"name": "resnet18", "arguments": {"widht": 2}}, "widht"),
        ({"name": "vit_tiny_patch16_224", "arguments": {"num_heads": 7}}, "num_heads"),
        ({"name": "resnet18.nobodys"}, "nobodys"),
        ({"name": "resnet18", "arguments": {"global_pool": ""}}, "global_pool: avg"),
        ({"name": "vit_tiny_patch16_224", "arguments": {"global_pool": ""}}, "global_pool: avg"),
    ],
)
def test_impossible_backbones(options: dict, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        backbone.build(backbone.Options(**options))


def test_wrong_files_are_named(tmp_path: Path) -> None:
    options = backbone.Options(name="resnet18")
    with pytest.raises(BadInput, match="no backbone file"):
        backbone.load(tmp_path / "none.pth", options)
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(BadInput, match="cannot be read safely|can be read safely"):
        backbone.load(tmp_path / "text.pth", options)
    torch.save({"a": 1}, tmp_path / "other.pth")
    with pytest.raises(BadInput, match="no plain mapping"):
        backbone.load(tmp_path / "other.pth", options)
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "r34.pth")
    with pytest.raises(
        BadInput, match="does not fit backbone resnet18 with stem standard: .* it fits resnet34 with stem"
    ):
        backbone.load(tmp_path / "r34.pth", options)


class Attack:
    def __reduce__(self) -> tuple:
        return (open, ("attacked", "w"))


def test_a_strangers_file_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("evil.pth", "evil.safetensors"):
        torch.save({"conv1.weight": Attack()}, name)
        with pytest.raises(BadInput):
            backbone.load(name, backbone.Options(name="resnet18"))
    assert not Path("attacked").exists()


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100", "vit_tiny_patch16_224"])
def test_width_is_that_of_the_features(name: str) -> None:
    model = backbone.build(backbone.Options(name=name)).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).shape == (1, backbone.width(model))


# ------------------------------------------------------------------------------------------------------------- layouts
def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def heads(*names: str) -> dict[str, Tensor]:
    return {name: torch.randn(3) for name in names}


# As the official code writes them: what file a backbone's state dict becomes.
FILES: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "a checkpoint of a run": lambda own: {
        "format": 1,
        "step": 7,
        "model": under("backbone.", own) | under("target.backbone.", own) | heads("head.layers.0.weight", "queue"),
        "method": "byol",
    },
    "bare names": lambda own: own | heads("fc.weight", "fc.bias"),
    "bare names in `state_dict`": lambda own: {"state_dict": own | heads("fc.weight", "fc.bias"), "epoch": 3},
    "bare names in `model`": lambda own: {"model": own, "epoch": 3},
    "VICReg": lambda own: {"epoch": 3, "model": under("module.backbone.", own) | heads("module.projector.0.weight")},
    "Barlow Twins": lambda own: {
        "epoch": 3,
        "model": under("module.backbone.", own) | heads("module.projector.0.weight", "module.bn.running_mean"),
        "optimizer": {"state": {}, "param_groups": []},
    },
    "SwAV": lambda own: {
        "state_dict": under("module.", own) | heads("module.projection_head.0.weight", "module.prototypes.weight")
    },
    "DINO": lambda own: {
        "student": under("module.backbone.", {name: value + 1 for name, value in own.items()}),
        "teacher": under("backbone.", own) | heads("head.mlp.0.weight", "head.last_layer.weight_g"),
        "epoch": 3,
    },
    "MoCo": lambda own: {
        "arch": "resnet50",
        "state_dict": under("module.encoder_q.", own)
        | under("module.encoder_k.", {name: value + 1 for name, value in own.items()})
        | heads("module.encoder_q.fc.0.weight", "module.encoder_k.fc.2.bias", "module.queue", "module.queue_ptr"),
    },
    "MoCo v3": lambda own: {
        "state_dict": under("module.base_encoder.", own)
        | under("module.momentum_encoder.", {name: value + 1 for name, value in own.items()})
        | heads("module.base_encoder.fc.0.weight", "module.predictor.0.weight"),
    },
    "SimSiam": lambda own: {
        "state_dict": under("module.encoder.", own) | heads("module.encoder.fc.0.weight", "module.predictor.3.bias"),
    },
    "solo-learn": lambda own: {
        "state_dict": under("backbone.", own)
        | under("momentum_backbone.", {name: value + 1 for name, value in own.items()})
        | heads("classifier.weight", "projector.0.weight", "momentum_projector.0.weight", "queue"),
        "pytorch-lightning_version": "1.6",
    },
    "solo-learn, before 1.0.3": lambda own: {
        "state_dict": under("encoder.", own) | heads("classifier.weight", "projector.0.weight"),
    },
}


def test_every_layout_has_a_file_here() -> None:
    assert list(FILES) == [layout.name for layout in backbone.LAYOUTS]


@pytest.fixture(scope="module")
def source() -> nn.Module:
    torch.manual_seed(5)
    return scrambled(backbone.build(NARROW))


@pytest.mark.parametrize("layout", FILES)
def test_each_layout_gives_the_same_features(
    layout: str, source: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="ssl_pipeline")
    file = FILES[layout](source.state_dict())
    torch.save(file, tmp_path / "file.pth")
    assert torch.equal(features(backbone.load(str(tmp_path / "file.pth"), NARROW)), features(source))
    assert caplog.messages[-1].endswith(f"file.pth: read as {layout}")
    alone = next((file[key] for key in ("state_dict", "model", "teacher") if key in file), None)
    if alone is not None and layout != "a checkpoint of a run":  # re-saved
        torch.save(alone, tmp_path / "alone.pth")
        assert torch.equal(features(backbone.load(tmp_path / "alone.pth", NARROW)), features(source))


@pytest.mark.parametrize("layout", FILES)
def test_each_layout_is_read_strictly(layout: str, source: nn.Module, tmp_path: Path) -> None:
    whole = source.state_dict()
    wrong = "layer2.0.conv2.weight"
    cases: dict[str, Any] = {
        f"{wrong} is missing": FILES[layout]({name: value for name, value in whole.items() if name != wrong}),
        rf"{wrong} is \(3, 16, 3, 3\), not \(16, 16, 3, 3\)": FILES[layout](whole | {wrong: whole[wrong][:3]}),
        "layer9.0.weight is too much": FILES[layout](whole | {"layer9.0.weight": torch.zeros(3)}),
        "num_batches_tracked is missing": FILES[layout](
            {name: value for name, value in whole.items() if name != "bn1.num_batches_tracked"}
        ),
    }
    if layout != "a checkpoint of a run":  # whose other names are the method's own affair
        beside = FILES[layout](whole)
        state = next((beside[key] for key in ("state_dict", "model", "teacher") if key in beside), beside)
        module = "module." if all(name.startswith("module.") for name in state) else ""
        state[f"{module}stranger.weight"] = torch.zeros(3)
        cases["stranger.weight is too much"] = beside
    for words, file in cases.items():
        torch.save(file, tmp_path / "file.pth")
        with pytest.raises(BadInput, match=words):
            backbone.load(tmp_path / "file.pth", NARROW)


def test_a_name_beside_the_backbone_cannot_stand_for_one_within(source: nn.Module, tmp_path: Path) -> None:
    file = FILES["VICReg"](source.state_dict())
    file["model"]["module.conv1.weight"] = file["model"].pop("module.backbone.conv1.weight")
    torch.save(file, tmp_path / "file.pth")
    with pytest.raises(BadInput, match="conv1.weight is missing"):
        backbone.load(tmp_path / "file.pth", NARROW)


def test_safetensors(source: nn.Module, tmp_path: Path) -> None:
    save_file(source.state_dict(), tmp_path / "file.safetensors")
    assert torch.equal(features(backbone.load(tmp_path / "file.safetensors", NARROW)), features(source))
    (tmp_path / "file.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(BadInput, match="can be read safely"):
        backbone.load(tmp_path / "file.safetensors", NARROW)


def test_files_that_do_not_count_batches(source: nn.Module, tmp_path: Path) -> None:
    weights = {name: value for name, value in source.state_dict().items() if "num_batches" not in name}
    torch.save(weights, tmp_path / "file.pth")
    assert torch.equal(features(backbone.load(tmp_path / "file.pth", NARROW)), features(source))


def test_a_checkpoint_with_objects_is_refused_with_the_way_out(source: nn.Module, tmp_path: Path) -> None:
    file = FILES["DINO"](source.state_dict()) | {"args": argparse.Namespace(arch="resnet50")}
    torch.save(file, tmp_path / "file.pth")
    with pytest.raises(
        BadInput, match="holds argparse.Namespace beside its tensors.* re-save its state dict"
    ) as refused:
        backbone.load(tmp_path / "file.pth", NARROW)
    assert "weights_only" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_another_stem_is_named(tmp_path: Path) -> None:
    for there, here in (("small", "standard"), ("standard", "small_maxpool")):
        other = NARROW.model_copy(update={"stem": there})
        backbone.save(backbone.build(other), other, tmp_path / "file.pth")
        with pytest.raises(BadInput, match=f"with stem {here}: conv1.weight .* it fits resnet18 with stem {there}"):
            backbone.load(tmp_path / "file.pth", NARROW.model_copy(update={"stem": here}))


# ------------------------------------------------------------------------- arithmetic of others that no shape tells
def test_padding_twice_is_padding_once(source: nn.Module) -> None:
    images = torch.randn(2, 3, 33, 33)
    padded = nn.ConstantPad2d(1, 0.0)(images)
    theirs = F.conv2d(padded, source.conv1.weight, stride=2, padding=2)  # facebookresearch/vicreg resnet.py
    torch.testing.assert_close(theirs, source.conv1(images))


def test_solo_learns_small_stem_pads_by_two(tmp_path: Path) -> None:
    small = NARROW.model_copy(update={"stem": "small"})
    theirs = scrambled(backbone.build(small))
    torch.save(FILES["solo-learn"](theirs.state_dict()), tmp_path / "theirs.pth")
    torch.save(theirs.state_dict(), tmp_path / "ours.pth")
    assert torch.equal(features(backbone.load(tmp_path / "ours.pth", small)), features(theirs))
    theirs.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)  # solo/methods/base.py
    theirs.load_state_dict(torch.load(tmp_path / "ours.pth", weights_only=True))
    assert torch.equal(features(backbone.load(tmp_path / "theirs.pth", small)), features(theirs))


def official_vit(state: dict[str, Tensor], images: Tensor, patch: int, heads: int) -> Tensor:
    """facebookresearch/dino vision_transformer.py VisionTransformer.forward, from its state dict alone."""
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state["pos_embed"]
    width = x.shape[-1]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    for block in ("blocks.0", "blocks.1"):
        q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        attention = (q @ k.transpose(-2, -1) * (width // heads) ** -0.5).softmax(dim=-1)
        x = x + linear((attention @ v).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    return norm(x, "norm")[:, 0]


def official_vit_state(width: int, patches: int, patch: int) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, patches + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for block in ("blocks.0", "blocks.1"):
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        for name, out, into in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            shapes |= {f"{block}.{name}.weight": (out, into), f"{block}.{name}.bias": (out,)}
    return {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}


def test_vits_of_dino_and_moco_v3_are_timms_but_for_the_heads(tmp_path: Path) -> None:
    state = official_vit_state(384, 16, 8)
    images = torch.randn(2, 3, 32, 32)
    arguments = {"img_size": 32, "patch_size": 8, "depth": 2}
    six = backbone.Options(name="vit_small_patch16_224", arguments=arguments)
    twelve = backbone.Options(name="vit_small_patch16_224", arguments={**arguments, "num_heads": 12})
    torch.save(state, tmp_path / "dino_pretrain.pth")
    torch.save({"teacher": under("backbone.", state) | heads("head.mlp.0.weight")}, tmp_path / "dino.pth")
    moco = under("module.base_encoder.", state) | heads("module.base_encoder.head.0.weight")
    torch.save({"state_dict": moco}, tmp_path / "moco.pth")
    for file, options, number in (("dino_pretrain", six, 6), ("dino", six, 6), ("moco", twelve, 12)):
        with torch.no_grad():
            ours = backbone.load(tmp_path / f"{file}.pth", options).eval()(images)
        torch.testing.assert_close(ours, official_vit(state, images, 8, number), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(official_vit(state, images, 8, 6), official_vit(state, images, 8, 12), atol=0.05)
    with pytest.raises(BadInput, match="12 attention heads, and vit_small_patch16_224 has 6: .*num_heads: 12"):
        backbone.load(tmp_path / "moco.pth", six)


# --------------------------------------------------------------------------------------------------------------- names
def test_names() -> None:
    assert backbone.named("timm:resnet50.a1_in1k") == backbone.Options(name="resnet50")
    assert backbone.named("timm:vit_small_patch16_224.dino") == backbone.Options(name="vit_small_patch16_224")
    assert backbone.named("timm:resnet18") == backbone.Options(name="resnet18")
    assert backbone.named("torchvision:resnet50") == backbone.Options(name="resnet50")
    assert backbone.named("torchvision:resnet50.IMAGENET1K_V1") == backbone.Options(name="resnet50")
    for other in ("resnet50", "runs/c10", "runs/c10/backbone.pth", "C:weights.pth", ""):
        assert backbone.named(other) is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm:resnet50.a1_in1q", "near it: resnet50.a1_in1k"),
        ("timm:resnet51.a1_in1k", "near it: .*resnet50.a1_in1k"),
        ("timm:", "near it: "),
        ("torchvision:resnet50.IMAGENET1K_V3", "near it: resnet50.IMAGENET1K_V1, resnet50.IMAGENET1K_V2"),
        ("torchvision:vgg16", "torchvision's 'vgg16' is not to be had here.*resnet18, "),
        ("torchvision:vit_b_16", "torchvision's 'vit_b_16' is not to be had here"),
    ],
)
def test_unknown_names(name: str, words: str) -> None:
    for asked in (lambda: backbone.named(name), lambda: backbone.load(name, NARROW)):
        with pytest.raises(BadInput, match=words):
            asked()


@pytest.mark.parametrize("name", backbone.TORCHVISION)
def test_torchvisions_networks_have_timms_names(name: str) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name).state_dict()
        ours = backbone.build(backbone.Options(name=name)).state_dict()
    assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in theirs.items() if not n.startswith("fc.")}


@pytest.mark.parametrize("name", ["resnet34", "resnext50_32x4d", "wide_resnet50_2"])
def test_torchvisions_networks_have_timms_arithmetic(name: str, tmp_path: Path) -> None:
    theirs = scrambled(torchvision.models.get_model(name))
    theirs.fc = nn.Identity()
    ours = backbone.build(backbone.Options(name=name))
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(features(ours), features(theirs))
    assert features(theirs).std() > 0


def test_a_name_of_torchvision_is_taken_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    theirs = scrambled(torchvision.models.resnet18())
    file = tmp_path / "hub" / "checkpoints" / Path(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url).name
    file.parent.mkdir(parents=True)
    options = backbone.named("torchvision:resnet18")
    assert options is not None

    def no_network(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.urlopen", no_network)
    with pytest.raises(
        BadInput, match="torchvision:resnet18.IMAGENET1K_V1 cannot be had.*no network.*TORCH_HOME.* file"
    ):
        backbone.load("torchvision:resnet18.IMAGENET1K_V1", options)
    torch.save(theirs.state_dict(), file)
    for name in ("torchvision:resnet18", "torchvision:resnet18.IMAGENET1K_V1"):
        ours = backbone.load(name, options)
        assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
    with pytest.raises(BadInput, match="does not fit backbone resnet34 .* it fits resnet18"):
        backbone.load("torchvision:resnet18", backbone.Options(name="resnet34"))
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": Attack()}, file)
    with pytest.raises(BadInput, match="holds other things than tensors") as refused:
        backbone.load("torchvision:resnet18", options)
    assert "weights_only" not in str(refused.value)
    assert not Path("attacked").exists()


def test_a_name_of_timm_is_taken_from_hugging_faces_cache(tmp_path: Path) -> None:
    theirs = scrambled(torchvision.models.resnet18()).state_dict()
    model = tmp_path / "hub" / "models--timm--resnet18.a1_in1k"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    (model / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(theirs, model / "snapshots" / ("0" * 40) / "model.safetensors")
    program = """
import sys, torch
from ssl_pipeline import backbone
from ssl_pipeline.exits import BadInput
name = "timm:resnet18.a1_in1k"
torch.save(backbone.load(name, backbone.named(name)).state_dict(), sys.argv[1])
try:
    backbone.load("timm:resnet18.a2_in1k", backbone.named("timm:resnet18.a2_in1k"))
except BadInput as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "ours.pth")],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ours = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert ours.keys() == {name for name in theirs if not name.startswith("fc.")}
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    (sentence,) = done.stdout.splitlines()
    assert "timm:resnet18.a2_in1k cannot be had here" in sentence
    assert "HF_HOME" in sentence
    assert "give a file" in sentence
