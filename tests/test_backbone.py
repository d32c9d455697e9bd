import json
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from ssl_pipeline import backbone
from ssl_pipeline.exits import BadInput


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
    with pytest.raises(BadInput, match="does not fit backbone resnet18"):
        backbone.load(tmp_path / "r34.pth", options)


class Attack:
    def __reduce__(self) -> tuple:
        return (open, ("attacked", "w"))


def test_a_strangers_file_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": Attack()}, "evil.pth")
    with pytest.raises(BadInput):
        backbone.load(Path("evil.pth"), backbone.Options(name="resnet18"))
    assert not Path("attacked").exists()


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100", "vit_tiny_patch16_224"])
def test_width_is_that_of_the_features(name: str) -> None:
    model = backbone.build(backbone.Options(name=name)).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).shape == (1, backbone.width(model))
