"""Any timm architecture goes the whole way: pretraining with SparseHead, stop and resume, the backbone out and in again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ssl_pipeline import backbone, checkpoint, pretrain
from ssl_pipeline.exits import BadInput, Status
from ssl_pipeline.pretrain import PretrainConfig
from tests.test_pretrain import assert_same_run, options, series

ARCHITECTURES = {
    "vit_tiny_patch16_224": "{img_size: 32, patch_size: 8, depth: 2}",
    "convnext_atto": "{depths: [1, 1, 1, 1]}",
}


def chosen(root: Path, name: str, *overrides: str) -> PretrainConfig:
    words = ["name: " + name, "stem: standard", "zero_init_last: null", "arguments: " + ARCHITECTURES[name]]
    return options(root, *(f"backbone.{word.replace(': ', '=', 1)}" for word in words), *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", ["true", "false"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stopped_and_resumed_is_not_stopped_and_the_backbone_is_what_was_trained(
    few_digits: Path, tmp_path: Path, name: str, channels_last: str
) -> None:
    made = [chosen(few_digits, name, f"channels_last={channels_last}", f"max_steps={end}") for end in (4, 2)]
    assert pretrain.pretrain(made[0], tmp_path / "whole") == Status.DONE
    assert pretrain.pretrain(made[1], tmp_path / "parts") == Status.DONE
    early = torch.load(tmp_path / "parts" / "backbone.pth", weights_only=True)
    assert pretrain.pretrain(made[0], tmp_path / "parts") == Status.DONE
    assert_same_run(tmp_path / "whole", tmp_path / "parts")

    run = tmp_path / "whole"
    assert [row["step"] for row in series(run)] == [1, 2, 3, 4]
    assert all(row["sparse_penalty"] > 0 for row in series(run))
    described = backbone.options_beside(run / "backbone.pth")
    assert described == made[0].backbone
    loaded = backbone.load(run / "backbone.pth", described)
    assert any(not torch.equal(value, early[key]) for key, value in loaded.state_dict().items())  # it trained

    model = checkpoint.read_newest(run / "checkpoints")["model"]
    trained = backbone.build(described).eval()
    trained.load_state_dict({k.removeprefix("backbone."): v for k, v in model.items() if k.startswith("backbone.")})
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        wanted = trained(images)
        assert wanted.shape == (3, backbone.width(trained))
        assert torch.equal(loaded.eval()(images), wanted)
        (newest,) = (run / "checkpoints").glob("step_*4.pt")
        assert torch.equal(backbone.load(newest, described).eval()(images), wanted)
        last = loaded.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(last, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_penalty_has_its_gradient_on_the_last_layer(few_digits: Path, name: str) -> None:
    gradients = []
    views = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    for weight in ("0", "0.1"):
        method = pretrain.build_method(chosen(few_digits, name, f"head.sparse.weight={weight}")).eval()
        layer = method.head.last_layer
        gradients.append(torch.autograd.grad(method(views).loss, layer.weight)[0])
    # equation 13's: lambda * w / ||its column||
    wanted = 0.1 * layer.weight / layer.weight.square().sum(dim=0, keepdim=True).sqrt()
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(gradients[1] - gradients[0], wanted.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_file_of_the_other_architecture_is_refused(few_digits: Path, tmp_path: Path, name: str) -> None:
    (other,) = set(ARCHITECTURES) - {name}
    theirs = chosen(few_digits, other).backbone
    backbone.save(backbone.build(theirs), theirs, tmp_path / "backbone.pth")
    with pytest.raises(BadInput, match=f"does not fit backbone {name} with stem standard: "):
        backbone.load(tmp_path / "backbone.pth", chosen(few_digits, name).backbone)
