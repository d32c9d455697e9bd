import shutil
from pathlib import Path

import pytest
import torch
import torchvision

from ssl_pipeline import backbone, config
from ssl_pipeline.data.augment import ViewSpec
from ssl_pipeline.evaluation import features
from ssl_pipeline.exits import BadInput

VIEW = config.validate(ViewSpec, {"size": 64, "ops": [{"op": "center_crop", "resize": 64}, {"op": "normalize"}]})


def test_features_are_the_frozen_backbones_in_the_order_of_the_ids(photos: Path, tmp_path: Path) -> None:
    theirs = torchvision.models.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "r18.pth")
    options = features.Options(
        weights=tmp_path / "r18.pth", backbone=backbone.Options(name="resnet18"), root=photos, view=VIEW, batch_size=5
    )
    found, labels = features.extract(options, "val")
    assert found.shape == (8, 512)
    assert labels.tolist() == [0] * 4 + [1] * 4
    again, _ = features.extract(options.model_copy(update={"batch_size": 8}), "val")
    torch.testing.assert_close(found, again, rtol=1e-4, atol=1e-4)


def test_random_initialisation_is_the_one_that_pretraining_starts_from() -> None:
    from ssl_pipeline.pretrain import PretrainConfig, build_method

    options = config.validate(PretrainConfig, config.load("smoke", ["seed=3"]).values)
    torch.manual_seed(3)
    alone = backbone.build(options.backbone)
    method = build_method(options)
    assert all(
        torch.equal(a, b)
        for a, b in zip(alone.state_dict().values(), method.backbone.state_dict().values(), strict=True)
    )


def test_sources_that_do_not_do(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="neither a run folder nor a file"):
        features.options(tmp_path / "none")
    with pytest.raises(BadInput, match="is no run folder"):
        features.options(tmp_path)
    (tmp_path / "w.pth").touch()
    with pytest.raises(BadInput, match="give --config NAME"):
        features.options(tmp_path / "w.pth")
    (tmp_path / "config.yaml").write_text(config.dump_yaml(config.load("smoke").values))
    with pytest.raises(BadInput, match=r"no backbone.pth yet"):
        features.options(tmp_path)


def test_splits_of_different_classes_are_refused(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "d")
    shutil.rmtree(tmp_path / "d" / "val" / "china")
    options = features.Options(weights=None, backbone=backbone.Options(name="resnet18"), root=tmp_path / "d", view=VIEW)
    with pytest.raises(BadInput, match="different class folders"):
        features.extract(options, "val")


def test_unreadable_pictures_are_left_out_and_too_many_refused(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(photos, tmp_path / "d")
    spoiled = sorted((tmp_path / "d" / "val" / "china").iterdir())[1]
    options = features.Options(
        weights=None, backbone=backbone.Options(name="resnet18"), root=tmp_path / "d", view=VIEW, max_bad_fraction=0.2
    )
    whole, _ = features.extract(options, "val")
    spoiled.write_bytes(b"no picture")
    found, labels = features.extract(options, "val")
    assert labels.tolist() == [0] * 3 + [1] * 4
    torch.testing.assert_close(found, whole[[0, 2, 3, 4, 5, 6, 7]], rtol=1e-4, atol=1e-4)
    assert "is measured without 1 of 8 pictures" in caplog.text
    with pytest.raises(BadInput, match=r"of 8 pictures .* more than data.max_bad_fraction = 0.01 .*china"):
        features.extract(options.model_copy(update={"max_bad_fraction": 0.01}), "val")
