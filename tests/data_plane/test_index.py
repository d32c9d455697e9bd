from pathlib import Path

import numpy as np
import pytest

from ssl_pipeline.data.index import image_folder
from ssl_pipeline.exits import BadInput


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def test_the_order_depends_on_names_alone(tmp_path: Path) -> None:
    root = make(
        tmp_path, "b/2.JPEG", "a/x/9.png", "b/1.jpg", "a/ü ö.jpg", "a/.hidden.jpg", ".cache/1.jpg", "b/notes.txt"
    )
    index = image_folder(root)
    assert index.classes == ("a", "b")
    assert index.paths == ("a/x/9.png", "a/ü ö.jpg", "b/1.jpg", "b/2.JPEG")
    assert index.labels.tolist() == [0, 0, 1, 1]
    assert index.read(1).tobytes() == b"x"
    assert index.select(np.array([3, 0])).paths == ("b/2.JPEG", "a/x/9.png")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no folder .*none.*data.root.*prepare-data"):
        image_folder(tmp_path / "none")
    with pytest.raises(BadInput, match="no class folders"):
        image_folder(tmp_path)
    make(tmp_path, "a/1.jpg", "b/notes.txt")
    with pytest.raises(BadInput, match=r"class folder .*/b' holds no pictures"):
        image_folder(tmp_path)


def test_the_digest_names_the_listing(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    before = image_folder(tmp_path).digest()
    assert image_folder(tmp_path).digest() == before
    (tmp_path / "b" / "2.png").touch()
    assert image_folder(tmp_path).digest() != before
