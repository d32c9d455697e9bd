import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from ssl_pipeline import backbone, checkpoint, config, distributed
from ssl_pipeline.data.augment import ViewSpec
from ssl_pipeline.data.index import Index, write_shard_index
from ssl_pipeline.evaluation import features
from ssl_pipeline.exits import BadInput
from ssl_pipeline.head import Options as HeadOptions
from ssl_pipeline.head import ProjectionHead
from ssl_pipeline.methods import Method
from ssl_pipeline.pretrain import PretrainConfig, build_method
from ssl_pipeline.run_folder import RunFolder
from tests.ranks import on_ranks

VIEW = config.validate(ViewSpec, {"size": 64, "ops": [{"op": "center_crop", "resize": 64}, {"op": "normalize"}]})


def test_features_are_the_frozen_backbones_in_the_order_of_the_ids(photos: Path, tmp_path: Path) -> None:
    theirs = torchvision.models.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "r18.pth")
    options = features.Options(
        weights=str(tmp_path / "r18.pth"),
        backbone=backbone.Options(name="resnet18"),
        root=photos,
        view=VIEW,
        batch_size=5,
    )
    found = features.extract(options, "val")
    assert found.values.shape == (8, 512)
    assert found.labels.tolist() == [0] * 4 + [1] * 4
    assert found.ids.tolist() == list(range(8))
    assert found.classes == 2
    again = features.extract(options.model_copy(update={"batch_size": 8}), "val")
    torch.testing.assert_close(found.values, again.values, rtol=1e-4, atol=1e-4)
    mapped = features.extract(options.model_copy(update={"memory": 0.0}), "val")  # from a file
    assert torch.equal(mapped.values, found.values)


def on_this_rank(root: str) -> dict[str, torch.Tensor]:
    options = features.Options(weights=None, backbone=backbone.Options(name="resnet18"), root=Path(root), view=VIEW)
    own = features.extract(options.model_copy(update={"batch_size": 4}), "val")
    whole = own.gathered()
    return {"own": own.ids, "ids": whole.ids, "labels": whole.labels, "values": whole.values}


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_pictures(photos: Path, ranks: int) -> None:
    found = on_ranks(ranks, on_this_rank, str(photos))
    one = on_this_rank(str(photos))
    for rank, part in enumerate(found):
        assert part["own"].tolist() == list(range(8))[rank::ranks]
        assert torch.equal(part["ids"], one["ids"])
        assert torch.equal(part["labels"], one["labels"])
        torch.testing.assert_close(part["values"], one["values"], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_more_ranks_than_pictures(photos: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("china", "flower"):
            (tmp_path / split / name).mkdir(parents=True)
            first = min((photos / split / name).iterdir())
            shutil.copyfile(first, tmp_path / split / name / first.name)
    found = on_ranks(3, on_this_rank, str(tmp_path))
    assert [part["own"].tolist() for part in found] == [[0], [1], []]
    assert all(torch.equal(part["values"], found[0]["values"]) for part in found)


def shards_of(folder: Path, out: Path, per_shard: int = 3, numbers: bool = False) -> None:
    """The pictures of an image folder as WebDataset's tar shards, in the order of their names."""
    names = sorted(folder.glob("*/*"))
    classes = sorted({path.parent.name for path in names})
    out.mkdir(parents=True)
    for start in range(0, len(names), per_shard):
        with tarfile.open(out / f"{start:06d}.tar", "w") as archive:
            for path in names[start : start + per_shard]:
                key = f"{path.parent.name}_{path.stem}"
                word = str(classes.index(path.parent.name)) if numbers else path.parent.name
                for ending, data in ((path.suffix, path.read_bytes()), (".cls", word.encode())):
                    member = tarfile.TarInfo(key + ending)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("numbers", [False, True])
def test_shards_give_the_same_features_as_the_folder(photos: Path, tmp_path: Path, numbers: bool) -> None:
    for split in ("train", "val"):
        shards_of(photos / split, tmp_path / "shards" / split, numbers=numbers)
    options = features.Options(weights=None, backbone=backbone.Options(name="resnet18"), root=photos, view=VIEW)
    folder = features.extract(options, "val")
    shards = features.extract(options.model_copy(update={"root": tmp_path / "shards"}), "val")
    assert torch.equal(folder.values, shards.values)
    assert torch.equal(folder.labels, shards.labels)


def test_crop_and_flip_takes_after_the_evaluation_view() -> None:
    made = features.crop_and_flip(VIEW)
    assert [op.op for op in made.ops] == ["crop_resize", "flip", "normalize"]
    assert made.size == 64
    assert made.ops[0].interpolation == "bicubic"
    assert made.ops[0].scale == (0.08, 1.0)
    imagenet = config.load("imagenet/barlow_twins").values["data"]["evaluation_view"]
    assert features.crop_and_flip(config.validate(ViewSpec, imagenet)).ops[0].interpolation == "bilinear"


def test_random_initialisation_is_the_one_that_pretraining_starts_from() -> None:
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
    with pytest.raises(BadInput, match="is bare weights: give --config NAME"):
        features.options(tmp_path / "w.pth")
    (tmp_path / "config.yaml").write_text(config.dump_yaml(config.load("smoke").values))
    with pytest.raises(BadInput, match=r"no backbone.pth yet"):
        features.options(tmp_path)


def test_splits_of_different_classes_are_refused(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "d")
    shutil.rmtree(tmp_path / "d" / "val" / "china")
    options = features.Options(weights=None, backbone=backbone.Options(name="resnet18"), root=tmp_path / "d", view=VIEW)
    with pytest.raises(BadInput, match="hold different classes"):
        features.extract(options, "val")


def test_numbers_of_shards_are_labels_and_must_mean_the_same(photos: Path, tmp_path: Path) -> None:
    """Packed shards number the classes that they have: a split that lacks one in the middle would shift the rest."""

    def packed(*, train: str, val: str) -> Path:
        for split, classes in (("train", train), ("val", val)):
            folder = tmp_path / f"{train}-{val}" / split
            folder.mkdir(parents=True)
            (folder / "0.tar").write_bytes(b"x" * len(classes))
            spans = np.array([(0, place, 1) for place in range(len(classes))])
            paths = tuple(f"{name}/1.jpg" for name in classes)
            write_shard_index(
                Index(folder, paths, np.arange(len(classes)), tuple(classes), spans, ("0.tar",)), [len(classes)]
            )
        return folder.parent

    for wrong in (packed(train="012", val="02"), packed(train="12", val="012")):
        for split in ("train", "val"):
            with pytest.raises(BadInput, match="hold different classes"):
                features.pictures_of(wrong, split)
    right = packed(train="012", val="01")  # the last numbers may be missing
    assert features.pictures_of(right, "val").labels.tolist() == [0, 1]
    assert features.pictures_of(right, "train").labels.tolist() == [0, 1, 2]
    assert features.pictures_of(packed(train="01", val="01"), "val").labels.tolist() == [0, 1]
    with pytest.raises(BadInput, match="hold different classes"):  # names are no labels
        features.pictures_of(packed(train="abc", val="ab"), "val")


def test_unreadable_pictures_are_left_out_and_too_many_refused(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(photos, tmp_path / "d")
    spoiled = sorted((tmp_path / "d" / "val" / "china").iterdir())[1]
    options = features.Options(
        weights=None, backbone=backbone.Options(name="resnet18"), root=tmp_path / "d", view=VIEW, max_bad_fraction=0.2
    )
    whole = features.extract(options, "val")
    spoiled.write_bytes(b"no picture")
    found = features.extract(options, "val")
    assert found.labels.tolist() == [0] * 3 + [1] * 4
    assert found.ids.tolist() == [0, 2, 3, 4, 5, 6, 7]
    torch.testing.assert_close(found.values, whole.values[found.ids], rtol=1e-4, atol=1e-4)
    assert "is measured without 1 of 8 pictures" in caplog.text
    with pytest.raises(BadInput, match=r"1 of 8 pictures .* more than data.max_bad_fraction = 0.01.*china"):
        features.extract(options.model_copy(update={"max_bad_fraction": 0.01}), "val")


# ------------------------------------------------------------------------------------------------- a run's trained head
def saved(method: Method, options: PretrainConfig, folder: Path, step: int = 3) -> RunFolder:
    """A run folder with this method's checkpoint."""
    run = RunFolder(folder)
    run.describe(options.model_dump(mode="json"))
    checkpoint.write(run.checkpoints, {"step": step, "model": method.state_dict(), "monitor": {}}, keep=9)
    return run


@pytest.mark.parametrize("name", config.method_names())
def test_the_trained_pair_is_the_evaluated_backbone_and_the_head(name: str, tmp_path: Path) -> None:
    """Of every method, although nothing here may import one."""
    small = ["backbone.arguments={layers: [1, 1, 1, 1], channels: [8, 8, 8, 16]}", "head.hidden=16"]
    options = config.validate(PretrainConfig, config.load(f"digits/{name}", small).values)
    method = build_method(options)
    with torch.no_grad():
        for value in [*method.parameters(), *method.buffers()]:
            if value.is_floating_point():
                value.uniform_(0.5, 1.5)  # no two parts of it are alike
    backbone, head, _ = features.trained(saved(method, options, tmp_path / "run"))
    pictures = torch.rand(2, 3, 32, 32)
    method.eval()
    with torch.no_grad():
        r = method.evaluated_backbone()(pictures)
        assert torch.equal(backbone(pictures), r)
        assert torch.equal(head(backbone(pictures)), method.head(r))
    assert not any(module.training for module in [*backbone.modules(), *head.modules()])


def test_a_head_comes_from_the_newest_good_checkpoint(tmp_path: Path) -> None:
    options = config.validate(PretrainConfig, config.load("smoke").values)
    method = build_method(options)
    run = RunFolder(tmp_path)
    run.describe(options.model_dump(mode="json"))
    with pytest.raises(BadInput, match=r"has no checkpoint, and backbone.pth holds no head: its representation alone"):
        features.trained(run)
    for step, value in ((1, 1.0), (2, 2.0), (3, 3.0)):
        torch.nn.init.constant_(method.head.last_layer.weight, value)
        saved(method, options, tmp_path, step)
    newest = run.checkpoints / "step_00000003.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    _, head, step = features.trained(run)
    assert (head.last_layer.weight.unique().tolist(), step) == ([2.0], 2)
    run.describe({**options.model_dump(mode="json"), "head": {"kind": "linear", "output": 7}})
    with pytest.raises(BadInput, match=r"the checkpoint of step 2 in .* does not fit"):
        features.trained(run)


def test_a_stream_is_the_features_and_what_the_head_makes_of_them(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos / "val", tmp_path / "val")
    index = features.pictures_of(tmp_path, "val")
    Path(index.root / index.paths[3]).write_bytes(b"no picture")
    options = features.Options(
        weights=None, backbone=backbone.Options(name="resnet10t"), root=tmp_path, view=VIEW, batch_size=3,
        max_bad_fraction=1.0,
    )  # fmt: skip
    model, world = features.network(options), distributed.start()
    head = ProjectionHead(HeadOptions(hidden=16, output=8), 512).eval()
    parts = list(features.stream(model, head, index, options, world))
    whole = features.features_of(model, index, options, world)
    assert whole.ids.tolist() == [0, 1, 2, 4, 5, 6, 7]
    for field, values in (("r", whole.values), ("labels", whole.labels), ("ids", whole.ids)):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), values)
    torch.testing.assert_close(torch.cat([part.z for part in parts]), head(whole.values).detach())
    assert all(part.z is None for part in features.stream(model, None, index, options, world))
    with pytest.raises(BadInput, match="1 of 8 pictures .* are unreadable"):
        list(features.stream(model, head, index, options.model_copy(update={"max_bad_fraction": 0.0}), world))
