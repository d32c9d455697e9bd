import gzip
import io
import os
import shutil
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import STL10

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


def test_a_folder_without_val_is_made_and_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tar(tmp_path / "a.tar", ["train/cat/1.jpg", "train/dog/2.jpg"])
    assert prepare("folder", tmp_path / "out", [source]) == {"train": 2}
    assert "no val pictures (val/<class>/ or test/<class>/): evaluations need --data FOLDER" in caplog.text


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
        ("folder", ["gone.tar"], "does not exist"),
        ("folder", ["other_val.tar"], "holds no train pictures"),
        ("folder", ["train_only.tar", "other_val.tar"], "different classes"),
        ("folder", ["cut.tar"], "cannot make"),
        ("stl10", [], "`stl10` needs --source: stl10_binary.tar.gz"),
        ("tiny_imagenet", ["train_only.tar", "cut.tar"], "takes one --source, not 2"),
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


# ----------------------------------------------------------------------------------- archives of the official layouts
def bytes_of(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def picture(number: int) -> bytes:
    """A JPEG of its own."""
    return bytes_of(np.full((8, 8, 3), number % 256, dtype=np.uint8)) + number.to_bytes(4, "big")


def tar_of(members: dict[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fails(name: str, tmp_path: Path, sources: list[Path], words: str, classes: Path | None = None) -> None:
    """`prepare` answers with one sentence that has these words, and leaves nothing."""
    with pytest.raises(BadInput, match=words) as caught:
        prepare(name, tmp_path / "made" / "out", sources, classes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists() or not list((tmp_path / "made").iterdir())


STL10_CLASSES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]


def stl10_files() -> dict[str, bytes]:
    """The members of stl10_binary.tar.gz in its order, labels behind the pictures: 12 train, 11 test, 1002 unlabelled."""
    rng = np.random.default_rng(0)

    def pixels(count: int) -> bytes:
        drawn = np.zeros((count, 3, 96, 96), dtype=np.uint8)
        drawn[:, :, 10:60:7, 30:90:9] = rng.integers(0, 256, (count, 3, 8, 7), dtype=np.uint8)
        return drawn.tobytes()

    return {
        "test_X.bin": pixels(11), "test_y.bin": bytes([*range(1, 11), 3]),
        "train_X.bin": pixels(12), "train_y.bin": bytes([*range(10, 0, -1), 2, 2]),
        "unlabeled_X.bin": pixels(1002), "class_names.txt": "\n".join(STL10_CLASSES).encode() + b"\n",
        "fold_indices.txt": b"0 1\n",
    }  # fmt: skip


def stl10_archive(path: Path, members: dict[str, bytes]) -> Path:
    plain = tar_of({f"stl10_binary/{name}": data for name, data in members.items()})
    path.write_bytes(gzip.compress(plain, compresslevel=0))
    return path


def test_stl10_is_what_torchvision_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = stl10_files()
    source = stl10_archive(tmp_path / "stl10_binary.tar.gz", members)
    assert prepare("stl10", tmp_path / "out", [source]) == {"train": 12, "val": 11, "unlabeled": 1002}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "unlabeled", "val"]

    (tmp_path / "stl10_binary").mkdir()
    for name, data in members.items():
        (tmp_path / "stl10_binary" / name).write_bytes(data)
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    for split, theirs in (("train", "train"), ("val", "test")):
        expected = STL10(str(tmp_path), theirs)
        ours = image_folder(tmp_path / "out" / split)
        assert list(ours.classes) == expected.classes
        found = {int(Path(path).stem): (path, label) for path, label in zip(ours.paths, ours.labels, strict=True)}
        for number in range(len(expected)):
            pixels, label = expected[number]
            assert found[number][1] == label
            with Image.open(tmp_path / "out" / split / found[number][0]) as written:
                assert (np.asarray(written) == np.asarray(pixels)).all()
    unlabelled = STL10(str(tmp_path), "unlabeled")
    written = sorted((tmp_path / "out" / "unlabeled").rglob("*.png"))
    assert [path.parent.name for path in written] == ["000"] * 1000 + ["001"] * 2
    for number in (0, 999, 1001):
        with Image.open(written[number]) as one:
            assert (np.asarray(one) == np.asarray(unlabelled[number][0])).all()

    assert prepare("stl10", tmp_path / "again", [tmp_path / "stl10_binary"])["unlabeled"] == 1002  # from the folder
    assert files(tmp_path / "again") == files(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_y.bin": None}, "holds no train_y.bin"),
        ({"class_names.txt": None}, "holds no class_names.txt"),
        ({"unlabeled_X.bin": None}, "holds no unlabeled_X.bin"),
        ({"train_X.bin": bytes(27648 * 12 - 1)}, "train_X.bin .* has 331,775 bytes, which are not 12 pictures"),
        ({"test_X.bin": bytes(27648 * 10)}, "test_X.bin .* not 11 pictures"),
        ({"unlabeled_X.bin": bytes(100)}, "unlabeled_X.bin .* has 100 bytes"),
        ({"test_y.bin": bytes([*range(10), 3])}, "test_y.bin .* has class 0, and class_names.txt names 1 to 10"),
        ({"train_y.bin": bytes([*range(1, 11), 11, 1])}, "has class 11"),
        ({"class_names.txt": "\n".join(["../../../evil", *STL10_CLASSES[1:]]).encode()}, "would not lie below"),
    ],
)
def test_stl10_that_will_not_do(tmp_path: Path, changes: dict[str, bytes | None], words: str) -> None:
    members = {**stl10_files(), "unlabeled_X.bin": bytes(27648), **changes}
    kept = {name: data for name, data in members.items() if data is not None}
    fails("stl10", tmp_path, [stl10_archive(tmp_path / "stl.tar.gz", kept)], words)


def test_a_download_that_was_cut_short(tmp_path: Path) -> None:
    whole = stl10_archive(tmp_path / "stl.tar.gz", stl10_files()).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    fails("stl10", tmp_path, [tmp_path / "cut.tar.gz"], "cannot make")
    damaged = bytearray(tiny_zip(tmp_path / "tiny.zip", tiny_files()).read_bytes())
    damaged[damaged.index(picture(0)) + 300] ^= 1
    (tmp_path / "damaged.zip").write_bytes(damaged)
    fails("tiny_imagenet", tmp_path, [tmp_path / "damaged.zip"], "cannot make .*CRC")
    (tmp_path / "cut.zip").write_bytes(damaged[: len(damaged) // 2])
    fails("tiny_imagenet", tmp_path, [tmp_path / "cut.zip"], "neither a folder nor a tar or zip")


def test_no_archive_is_held_in_memory(tmp_path: Path) -> None:
    source = stl10_archive(tmp_path / "stl.tar.gz", stl10_files())  # 28 MB
    nested = {f"n{n:08d}.tar": tar_of({f"n{n:08d}_1.JPEG": picture(n) + bytes(5_000_000)}) for n in (1, 2, 3)}
    imagenet = imagenet_archives(
        tmp_path, train=nested, val={VAL.format(n): picture(n) for n in (1, 2, 3)}, truth=[1, 2, 3]
    )
    import scipy.io  # noqa: F401  # which is imported in `prepare` and would be counted

    tracemalloc.start()  # it counts what Python and numpy allocate
    prepare("stl10", tmp_path / "stl10", [source])
    prepare("imagenet", tmp_path / "imagenet", imagenet)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4.9e6


# --------------------------------------------------------------------------------------------------------- Tiny ImageNet
def tiny_files() -> dict[str, bytes]:
    """The members of tiny-imagenet-200.zip, of 3 classes: 2 train pictures each, 3 val, 1 test."""
    top = "tiny-imagenet-200"
    wnids = ["n03", "n01", "n02"]
    members = {f"{top}/wnids.txt": "\n".join(wnids).encode(), f"{top}/words.txt": b"n01\tgoldfish"}
    for place, wnid in enumerate(wnids):
        members[f"{top}/train/{wnid}/{wnid}_boxes.txt"] = b"x"
        for number in range(2):
            members[f"{top}/train/{wnid}/images/{wnid}_{number}.JPEG"] = picture(2 * place + number)
    for number in range(3):
        members[f"{top}/val/images/val_{number}.JPEG"] = picture(100 + number)
    members[f"{top}/test/images/test_0.JPEG"] = picture(200)
    members[f"__MACOSX/{top}/train/n01/images/._n01_0.JPEG"] = b"resource fork"
    members[f"{top}/val/val_annotations.txt"] = b"".join(
        b"val_%d.JPEG\t%s\t0\t32\t44\t62\n" % (number, wnid) for number, wnid in enumerate([b"n02", b"n03", b"n01"])
    )
    return members


def tiny_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_tiny_imagenet(tmp_path: Path) -> None:
    source = tiny_zip(tmp_path / "tiny-imagenet-200.zip", tiny_files())
    assert prepare("tiny_imagenet", tmp_path / "out", [source]) == {"train": 6, "val": 3}
    assert files(tmp_path / "out") == {
        "train/n03/n03_0.JPEG": picture(0), "train/n03/n03_1.JPEG": picture(1),
        "train/n01/n01_0.JPEG": picture(2), "train/n01/n01_1.JPEG": picture(3),
        "train/n02/n02_0.JPEG": picture(4), "train/n02/n02_1.JPEG": picture(5),
        "val/n02/val_0.JPEG": picture(100), "val/n03/val_1.JPEG": picture(101), "val/n01/val_2.JPEG": picture(102),
    }  # fmt: skip
    shutil.unpack_archive(source, tmp_path / "unpacked")
    prepare("tiny_imagenet", tmp_path / "again", [tmp_path / "unpacked" / "tiny-imagenet-200"])
    assert files(tmp_path / "again") == files(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"val/val_annotations.txt": None}, "holds no val/val_annotations.txt"),
        ({"val/val_annotations.txt": b"val_0.JPEG\tn04\n"}, "gives 'val_0.JPEG' class 'n04'"),
        ({"val/val_annotations.txt": b"val_0.JPEG\n"}, "gives 'val_0.JPEG' class ''"),
        ({"val/val_annotations.txt": b"val_0.JPEG\tn01\n"}, "does not name val_1.JPEG"),
        ({"val/images/val_2.JPEG": None}, "lacks 1 of the pictures .* val_2.JPEG"),
        ({f"train/n0{c}/images/n0{c}_{n}.JPEG": None for c in (1, 2, 3) for n in (0, 1)}, "holds no train/<wnid>"),
    ],
)
def test_tiny_imagenet_that_will_not_do(tmp_path: Path, changes: dict[str, bytes | None], words: str) -> None:
    members: dict[str, bytes | None] = {**tiny_files(), **{f"tiny-imagenet-200/{k}": v for k, v in changes.items()}}
    kept = {name: data for name, data in members.items() if data is not None}
    fails("tiny_imagenet", tmp_path, [tiny_zip(tmp_path / "tiny.zip", kept)], words)


# -------------------------------------------------------------------------------------------------------------- ImageNet
VAL = "ILSVRC2012_val_{:08d}.JPEG"


def devkit(path: Path, truth: list[int], wnids: dict[int, str], **changes: bytes | None) -> Path:
    """ILSVRC2012_devkit_t12.tar.gz: the leaves' ids and wnids, and one node that is none."""
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O"),
            ("children", "O"), ("wordnet_height", "O"), ("num_train_images", "O")]  # fmt: skip
    rows = [(number, wnid, "tench, Tinca", "fish", 0, np.zeros(0), 0, 2) for number, wnid in wnids.items()]
    rows.append((max(wnids) + 1, "n00001740", "entity", "all", 2, np.array([1, 2]), 3, 0))
    mat = io.BytesIO()
    savemat(mat, {"synsets": np.array(rows, dtype=kind)[:, None]})
    members = {
        "meta.mat": mat.getvalue(),
        "ILSVRC2012_validation_ground_truth.txt": "".join(f"{number}\n" for number in truth).encode(),
        **changes,
    }
    named = {f"ILSVRC2012_devkit_t12/data/{name}": data for name, data in members.items() if data is not None}
    path.write_bytes(tar_of({"ILSVRC2012_devkit_t12/readme.txt": b"ILSVRC", **named}, "w:gz"))
    return path


def imagenet_archives(
    folder: Path, train: dict[str, bytes] | None = None, val: dict[str, bytes] | None = None,
    truth: list[int] | None = None, **changes: bytes | None,
) -> list[Path]:  # fmt: skip
    """The three archives of an ImageNet of 3 classes, 2 train pictures each, and 4 val; class ids are not in wnids' order."""
    wnids = {1: "n00000002", 2: "n00000003", 3: "n00000001"}
    nested = {
        f"{wnid}.tar": tar_of({f"{wnid}_{n}.JPEG": picture(10 * number + n) for n in (1, 2)})
        for number, wnid in wnids.items()
    }
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_of(nested if train is None else train))
    shown = {VAL.format(n): picture(100 + n) for n in (3, 1, 4, 2)}  # torchvision sorts; a tar need not
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_of(shown if val is None else val))
    kit = devkit(folder / "ILSVRC2012_devkit_t12.tar.gz", [3, 1, 2, 1] if truth is None else truth, wnids, **changes)
    return [kit, folder / "ILSVRC2012_img_val.tar", folder / "ILSVRC2012_img_train.tar"]


def test_imagenet(tmp_path: Path) -> None:
    assert prepare("imagenet", tmp_path / "out", imagenet_archives(tmp_path)) == {"train": 6, "val": 4}
    expected = {
        f"train/{wnid}/{wnid}_{n}.JPEG": picture(10 * number + n)
        for number, wnid in ((1, "n00000002"), (2, "n00000003"), (3, "n00000001"))
        for n in (1, 2)
    }
    for number, wnid in enumerate(["n00000001", "n00000002", "n00000003", "n00000002"], start=1):
        expected[f"val/{wnid}/{VAL.format(number)}"] = picture(100 + number)
    assert files(tmp_path / "out") == expected


TRUTH = "ILSVRC2012_validation_ground_truth.txt"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"n00000009.tar": tar_of({"n00000009_1.JPEG": b"x"})}}, "n00000009.tar .* no tar of a class"),
        ({"train": {"n00000001.tar": tar_of({"n1_1.JPEG": picture(1)})}}, "different classes"),
        ({"train": {"n00000001.tar": tar_of({"n1_1.JPEG": picture(1)})[:700]}}, "cannot make"),
        ({"val": {VAL.format(n): b"x" for n in (1, 2, 3)}}, "holds 3 pictures, .* classes of 4"),
        ({"val": {VAL.format(5): b"x"}}, "ILSVRC2012_val_00000005.JPEG .* none of the 4 pictures"),
        ({"val": {"a/" + VAL.format(1): b"x", "b/" + VAL.format(1): b"x"}}, "or the second one of its number"),
        ({"val": {"n01_1.JPEG": b"x", "cat.JPEG": b"x"}}, "cat.JPEG .* none of the 4 pictures"),
        ({"truth": [3, 1, 2, 4]}, "has class 4, which meta.mat does not have"),
        ({TRUTH: b"1\ntwo\n"}, "cannot read the classes .* ValueError"),
        ({TRUTH: None}, f"holds no data/{TRUTH}"),
        ({"meta.mat": b"MATLAB"}, "cannot read the classes"),
        ({"meta.mat": None}, "is none of ImageNet's archives"),
    ],
)
def test_imagenet_that_will_not_do(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    fails("imagenet", tmp_path, imagenet_archives(tmp_path, **changes), words)


def test_imagenet_needs_its_three_archives(tmp_path: Path) -> None:
    kit, val, train = imagenet_archives(tmp_path)
    fails("imagenet", tmp_path, [train, kit], "gives ImageNet's train, devkit, and one of each is needed")
    fails("imagenet", tmp_path, [train, train, val, kit], "train, train, val, devkit, and one of each")
    whole = train.read_bytes()
    train.write_bytes(whole[: len(whole) // 2])
    fails("imagenet", tmp_path, [kit, val, train], "cannot make")


# ---------------------------------------------------------------------------------------------------------- ImageNet-100
@pytest.fixture
def laid_out(tmp_path: Path) -> Path:
    """An ImageNet of 103 classes with two train pictures and one val picture each."""
    for place in range(103):
        for split, count in (("train", 2), ("val", 1)):
            folder = tmp_path / "imagenet" / split / f"n{place:08d}"
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{split}_{number}.JPEG").write_bytes(b"%d %d" % (place, number))
    return tmp_path / "imagenet"


def class_list(path: Path, wnids: list[str], between: str = "\n") -> Path:
    path.write_text(between.join(wnids) + "\n")
    return path


CHOSEN = [f"n{place:08d}" for place in range(102, 2, -1)]


@pytest.mark.parametrize("between", ["\n", " "])
def test_imagenet100_by_hard_links(tmp_path: Path, laid_out: Path, between: str) -> None:
    link = laid_out / "val" / CHOSEN[0] / "val_0.JPEG"  # a data set may itself be made of links
    link.rename(tmp_path / "elsewhere.JPEG")
    link.symlink_to("../../../elsewhere.JPEG")
    classes = class_list(tmp_path / "imagenet100.txt", CHOSEN, between)
    assert prepare("imagenet100", tmp_path / "out", [laid_out], classes) == {"train": 200, "val": 100}
    assert image_folder(tmp_path / "out" / "train").classes == tuple(sorted(CHOSEN))
    expected = {name: data for name, data in files(laid_out).items() if name.split("/")[1] in CHOSEN}
    assert files(tmp_path / "out") == expected
    for name in expected:
        assert os.path.samefile(tmp_path / "out" / name, laid_out / name)
        assert not (tmp_path / "out" / name).is_symlink()


def test_imagenet100_by_copies_where_links_are_refused(
    tmp_path: Path, laid_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    prepare("imagenet100", tmp_path / "out", [laid_out], class_list(tmp_path / "list", CHOSEN))
    made = files(tmp_path / "out")
    assert len(made) == 300
    assert all(data == (laid_out / name).read_bytes() for name, data in made.items())
    assert (tmp_path / "out" / "val" / CHOSEN[0] / "val_0.JPEG").stat().st_nlink == 1


def test_imagenet100_that_will_not_do(tmp_path: Path, laid_out: Path) -> None:
    classes = class_list(tmp_path / "list", CHOSEN)
    fails("imagenet100", tmp_path, [laid_out], "needs --classes FILE")
    fails("imagenet100", tmp_path, [laid_out], "no file of wnids", tmp_path / "gone")
    fails("imagenet100", tmp_path, [laid_out], "holds 99 words", class_list(tmp_path / "short", CHOSEN[1:]))
    twice = class_list(tmp_path / "twice", [*CHOSEN[1:], CHOSEN[1]])
    fails("imagenet100", tmp_path, [laid_out], "100 words, 99 different", twice)
    other = class_list(tmp_path / "other", [*CHOSEN[1:], "../val"])
    fails("imagenet100", tmp_path, [laid_out], r"holds '\.\./val', which is no wnid: n and eight digits", other)
    unknown = class_list(tmp_path / "unknown", [*CHOSEN[1:], "n99999999"])
    fails("imagenet100", tmp_path, [laid_out], r"train' has no folder of 1 of the classes .* 'n99999999'", unknown)
    for path in (laid_out / "val" / CHOSEN[5]).iterdir():
        path.unlink()
    fails("imagenet100", tmp_path, [laid_out], rf"val/{CHOSEN[5]}' holds no pictures: is the source whole", classes)
    shutil.rmtree(laid_out / "val" / CHOSEN[5])
    fails("imagenet100", tmp_path, [laid_out], f"val' has no folder of 1 of .* '{CHOSEN[5]}'", classes)
    (tmp_path / "empty").mkdir()
    fails("imagenet100", tmp_path, [tmp_path / "empty"], "train' has no folder of 100 of", classes)
    fails("imagenet100", tmp_path, [tmp_path / "gone"], "gone' does not exist", classes)
    with pytest.raises(BadInput, match="lies within --source"):
        prepare("imagenet100", laid_out / "out", [laid_out], classes)
    with pytest.raises(BadInput, match="comes with scikit-learn: leave --source out"):
        prepare("digits", tmp_path / "out", [laid_out])
    with pytest.raises(BadInput, match="--classes is imagenet100's"):
        prepare("digits", tmp_path / "out", [], classes)
