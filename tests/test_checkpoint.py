import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ssl_pipeline import checkpoint
from ssl_pipeline.exits import BadInput, StorageFailure
from ssl_pipeline.run_folder import saved_steps


def state(step: int) -> dict:
    return {"step": step, "model": {"w": torch.full((1000,), float(step))}}


def test_written_and_found_again(tmp_path: Path) -> None:
    for step in (3, 12, 100):
        checkpoint.write(tmp_path / "c", state(step), keep=2)
    assert saved_steps(tmp_path / "c") == [12, 100]
    assert checkpoint.read_newest(tmp_path / "c")["model"]["w"][0] == 100
    assert [p.name for p in (tmp_path / "c").iterdir() if p.name.startswith(".")] == []
    assert checkpoint.read_newest(tmp_path / "none") is None


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_a_damaged_file_is_named_and_the_older_one_used(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        checkpoint.write(tmp_path, state(step), keep=2)
    newest = tmp_path / "step_00000002.pt"
    data = bytearray(newest.read_bytes())
    if damage == "flipped":
        place = data.index(torch.full((8,), 2.0).numpy().tobytes())  # within the tensor: torch.load would not notice
        data[place] ^= 1
        newest.write_bytes(data)
        assert torch.load(newest, weights_only=True)["step"] == 2
    else:
        newest.write_bytes({"truncated": bytes(data[: len(data) // 2]), "empty": b"", "text": b"hello"}[damage])
    assert checkpoint.read_newest(tmp_path)["step"] == 1
    assert "step_00000002.pt is not used" in caplog.text
    (tmp_path / "step_00000001.pt").write_bytes(b"")
    with pytest.raises(BadInput, match="no checkpoint in .* can be used"):
        checkpoint.read_newest(tmp_path)


class Attack:
    def __reduce__(self) -> tuple:
        return (open, ("attacked", "w"))


def test_a_strangers_checkpoint_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "step": 1, "model": Attack()}, "step_00000001.pt")
    with pytest.raises(BadInput):
        checkpoint.read_newest(tmp_path)
    assert not Path("attacked").exists()


def test_when_due() -> None:
    options = checkpoint.Options(every_steps=4, every_epochs=2)
    assert [step for step in range(1, 13) if options.due(step, steps_per_epoch=5)] == [4, 8, 10, 12]
    assert not checkpoint.Options(every_epochs=None).due(5, 5)
    bare = checkpoint.Options(every_epochs=None, backbone_every_epochs=2)  # a bare backbone comes with a checkpoint
    assert [step for step in range(1, 21) if bare.due(step, steps_per_epoch=5)] == [10, 20]


def test_room_is_asked_for_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.require_room(tmp_path, 1)
    with pytest.raises(StorageFailure, match=r"MB free .* free room, lower checkpoint.keep"):
        checkpoint.require_room(tmp_path, 10**18)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; where mounting is not allowed, /dev/full's answer is simulated."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=False)
    if not made or made.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run([shutil.which("umount") or "umount", str(folder)], check=False)


def test_a_full_disk_keeps_the_last_good_checkpoint(small_disk: Path) -> None:
    checkpoint.write(small_disk, state(1), keep=2)
    with pytest.raises(StorageFailure, match="free room and give the same command again"):
        checkpoint.write(small_disk, {"step": 2, "model": torch.zeros(100_000)}, keep=2)
    assert checkpoint.read_newest(small_disk)["step"] == 1
    assert [p.name for p in small_disk.iterdir()] == ["step_00000001.pt"]
