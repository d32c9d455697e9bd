import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_pipeline.data.index import image_folder
from ssl_pipeline.data.prepare import prepare
from ssl_pipeline.exits import BadInput


def test_digits(digits: Path) -> None:
    train, val = image_folder(digits / "train"), image_folder(digits / "val")
    assert (len(train), len(val)) == (1437, 360)
    assert train.classes == tuple("0123456789")
    assert np.bincount(val.labels).min() >= 34
    with Image.open(digits / "train" / train.paths[0]) as picture:
        pixels = np.asarray(picture)
        assert (picture.format, pixels.shape) == ("PNG", (32, 32, 3))
        assert (pixels[..., 0] == pixels[..., 1]).all()
        assert (pixels[..., 0] == pixels[..., 2]).all()
    names = [Path(path).stem for path in train.paths + val.paths]
    assert sorted(names) == [f"{i:04d}" for i in range(1797)]


def tar(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"jpeg"))
    return path


def test_from_tars_and_folders(tmp_path: Path) -> None:
    train = tar(tmp_path / "a.tar", ["train/cat/1.jpg", "deep/train/dog/2.JPEG", "train/dog/readme.txt"])
    test = tar(tmp_path / "b.tar", ["test/cat/3.jpg", "test/dog/4.jpg"])
    assert prepare("cifar10", tmp_path / "out", [train, test]) == {"train": 2, "val": 2}
    assert (tmp_path / "out" / "train" / "dog" / "2.JPEG").read_bytes() == b"jpeg"
    assert prepare("folder", tmp_path / "again", [tmp_path / "out"]) == {"train": 2, "val": 2}


def test_a_hostile_tar_writes_nothing_outside(tmp_path: Path) -> None:
    names = ["train/a/1.jpg", "val/a/1.jpg", "../../train/../evil.jpg", "/train/../x.jpg", "train/../../up.jpg"]
    prepare("folder", tmp_path / "deep" / "out", [tar(tmp_path / "evil.tar", names)])
    written = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.jpg"))
    assert written == ["deep/out/train/a/1.jpg", "deep/out/val/a/1.jpg"]


@pytest.mark.parametrize(
    ("name", "sources", "words"),
    [
        ("cifar11", [], "choose among digits, cifar10"),
        ("folder", [], "needs --source"),
        ("folder", ["gone.tar"], "neither a folder nor a tar"),
        ("folder", ["train_only.tar"], "holds no val pictures"),
        ("folder", ["train_only.tar", "other_val.tar"], "different classes"),
        ("folder", ["cut.tar"], "cannot make"),
    ],
)
def test_bad_input(tmp_path: Path, name: str, sources: list[str], words: str) -> None:
    tar(tmp_path / "train_only.tar", ["train/a/1.jpg"])
    tar(tmp_path / "other_val.tar", ["val/b/1.jpg"])
    whole = tar(tmp_path / "whole.tar", ["train/a/1.jpg", "train/a/2.jpg", "val/a/1.jpg"]).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:514])
    with pytest.raises(BadInput, match=words):
        prepare(name, tmp_path / "out", [tmp_path / source for source in sources])
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(BadInput, match="exists"):
        prepare("digits", tmp_path / "out")


def test_additional_cifar10(test_data: Path, tmp_path: Path) -> None:
    assert prepare("cifar10", tmp_path / "c", [test_data / "cifar10_train.tar", test_data / "cifar10_test.tar"]) == {
        "train": 50_000,
        "val": 10_000,
    }
