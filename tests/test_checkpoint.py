import contextlib
import errno
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ssl_pipeline import checkpoint, distributed
from ssl_pipeline.checkpoint import Writer
from ssl_pipeline.exits import BadInput, Status, Stop, StorageFailure
from ssl_pipeline.run_folder import RunFolder, checkpoint_file, saved_steps
from tests.ranks import on_ranks


def state(step: int, size: int = 1000) -> dict:
    return {"step": step, "model": {"w": torch.full((size,), float(step))}}


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


def test_written_and_found_again(tmp_path: Path) -> None:
    for step in (3, 12, 100):
        checkpoint.write(tmp_path / "c", state(step), keep=2)
    assert saved_steps(tmp_path / "c") == [12, 100]
    assert checkpoint.read_newest(tmp_path / "c")["model"]["w"][0] == 100
    assert hidden(tmp_path) == []
    assert checkpoint.read_newest(tmp_path / "none") is None
    assert checkpoint.read_together(tmp_path / "none") is None
    assert checkpoint.read_together(tmp_path / "c")["step"] == 100


# -------------------------------------------------------------------------------------------------------- damaged files
class Attack:
    def __reduce__(self) -> tuple:
        return (open, ("attacked", "w"))


CUT = r"it is cut short or not a checkpoint \([\d,]+ bytes\)"
ALTERED = "it is damaged: bits of its part archive/data/0 have changed since it was written"
FOREIGN = "it is not a checkpoint of this tool"
DAMAGE = {
    "cut": CUT,
    "empty": CUT,
    "zeros": CUT,
    "text": CUT,
    "a bit": ALTERED,
    "a bit of a header": ALTERED,
    "a bit of a name": "it is damaged: the list of its parts has changed since it was written",
    "a bit that makes a folder": "it is damaged: its part archive/data/0 is not as torch writes it",
    "missing": "it cannot be read: .*data/0",
    "foreign": FOREIGN,
    "no step": FOREIGN,
    "an object": "it cannot be read: it holds more than tensors and plain values",
    "renamed": "it is the checkpoint of step 1",
}
"""What is said of it."""


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_and_the_older_one_used(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    reason = DAMAGE[damage]
    for step in (1, 2):
        checkpoint.write(tmp_path, state(step), keep=2)
    newest = tmp_path / "step_00000002.pt"
    data = bytearray(newest.read_bytes())
    listed = data.index(b"archive/data/0", data.index(b"PK\x01\x02"))
    bits = {
        "a bit": (data.index(torch.full((8,), 2.0).numpy().tobytes()), 1),
        "a bit of a header": (data.index(b"archive/data/0"), 1),
        "a bit of a name": (listed, 0x80),
        "a bit that makes a folder": (listed - 8, 0x10),
    }
    if damage in bits:
        place, bit = bits[damage]
        data[place] ^= bit
        newest.write_bytes(data)
        if damage == "a bit":  # torch would not notice
            assert torch.load(newest, weights_only=True)["step"] == 2
    elif damage == "missing":
        with zipfile.ZipFile(newest) as whole, zipfile.ZipFile(tmp_path / "less", "w") as less:
            for name in whole.namelist():
                if not name.endswith("data/0"):
                    less.writestr(name, whole.read(name))
            for part in less.infolist():
                part.external_attr = 0  # as torch has it
        with zipfile.ZipFile(tmp_path / "less") as less:
            assert less.testzip() is None  # its CRCs are right
        os.replace(tmp_path / "less", newest)
    elif damage == "foreign":
        torch.save({"state_dict": {"w": torch.zeros(3)}}, newest)
    elif damage == "renamed":
        shutil.copyfile(tmp_path / "step_00000001.pt", newest)
    elif damage == "no step":
        torch.save({"format": checkpoint.FORMAT, "step": None}, newest)
    elif damage == "an object":
        torch.save({"format": checkpoint.FORMAT, "step": 2, "model": Attack()}, newest)
    else:
        newest.write_bytes(
            {"cut": bytes(data[:1234]), "empty": b"", "zeros": bytes(len(data)), "text": b"hello"}[damage]
        )
    assert checkpoint.read_newest(tmp_path)["step"] == 1
    (told,) = (record.getMessage() for record in caplog.records)
    used = f"step_00000001.pt ({(tmp_path / 'step_00000001.pt').stat().st_size:,} bytes) is used instead"
    assert re.fullmatch(rf"checkpoint {newest} is not used: {reason}.*; {re.escape(used)}", told)
    if damage == "cut":
        assert "(1,234 bytes)" in told
    (tmp_path / "step_00000001.pt").write_bytes(b"")
    with pytest.raises(
        BadInput, match=rf"no checkpoint in .* can be used \(step_00000002.pt: {reason}.*; step_00000001.pt: "
    ):
        checkpoint.read_newest(tmp_path)


@pytest.mark.parametrize("call", ["open", "fsync"])
@pytest.mark.parametrize("error", [*sorted(checkpoint.NOT_FLUSHED), errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_cannot_be_flushed_is_no_failure_and_a_disk_that_fails_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: int
) -> None:
    real = getattr(os, call)

    def refused(what: Any, *arguments: Any) -> Any:
        if stat.S_ISDIR((os.fstat if isinstance(what, int) else os.stat)(what).st_mode):
            raise OSError(error, os.strerror(error))
        return real(what, *arguments)

    monkeypatch.setattr(os, call, refused)
    descriptors = len(os.listdir("/proc/self/fd"))
    if error in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(StorageFailure, match=os.strerror(error)):
            checkpoint.write(tmp_path, state(1), keep=1)
    else:
        checkpoint.write(tmp_path, state(1), keep=1)
    assert checkpoint.read(checkpoint_file(tmp_path, 1))["step"] == 1
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_no_truncation_and_no_altered_byte_passes_for_the_whole(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, state(2, size=64), keep=1)
    file = tmp_path / "step_00000002.pt"
    data = file.read_bytes()
    for length in range(0, len(data), 7):
        file.write_bytes(data[:length])
        with pytest.raises(ValueError, match="^it "):
            checkpoint.read(file)
    refused = []
    attributes = data.index(b"archive/data/0", data.index(b"PK\x01\x02")) - 8  # a bit of these makes it a folder
    for place in (attributes, *range(0, len(data), 5)):
        altered = bytearray(data)
        altered[place] ^= 0x10
        file.write_bytes(altered)
        try:
            found = checkpoint.read(file)
        except ValueError as error:
            refused.append(str(error))
        else:  # in the archive's padding or in its dates
            assert found["step"] == 2
            assert torch.equal(found["model"]["w"], torch.full((64,), 2.0))
    assert len(refused) > 100
    assert all(reason.startswith("it ") for reason in refused)


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
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_960_001))
    for needed, said in (
        (2_130_000, r"has 2\.0 MB free .* need 2\.1 MB"),
        (1_960_002, "has 1,960,001 bytes free .* need 1,960,002 bytes"),
    ):
        with pytest.raises(StorageFailure, match=said):
            checkpoint.require_room(tmp_path, needed)


# ---------------------------------------------------------------------------------------------------- in the background
class SlowDisk:
    """torch.save on the writing thread waits for `go` each time, once it has been `reached`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.reached, self.saved = threading.Semaphore(0), threading.Semaphore(0), torch.save
        monkeypatch.setattr(torch, "save", self._save)

    def _save(self, *arguments: Any, **options: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self.reached.release()
        assert self.go.acquire(timeout=60)
        self.saved(*arguments, **options)


def trained() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], None]]:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), 0.1)

    def step() -> None:
        network(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()

    step()
    return network, optimizer, step


def test_the_file_holds_its_step_though_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SlowDisk(monkeypatch)
    network, optimizer, step = trained()
    bare: list[torch.Tensor] = []
    expected = []
    with Writer(tmp_path, keep=2, max_failed=3) as writer:
        for number in (1, 2, 3):  # the second and third into the memory of the first
            live = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "counts": [1, (2, "x")]}
            expected.append({n: v.clone() for n, v in network.state_dict().items()})
            expected[-1] |= {f"m{n}": s["exp_avg"].clone() for n, s in optimizer.state_dict()["state"].items()}
            if number > 1:
                disk.go.release()  # of the save before, which this one waits for
            writer.save(
                {"step": number, **live}, {"w": network[0].weight}, lambda extra: bare.append(extra["w"].clone())
            )
            assert disk.reached.acquire(timeout=60)
            assert saved_steps(tmp_path) == list(range(1, number))
            step()
            live["counts"].append("later")
        disk.go.release()
    assert saved_steps(tmp_path) == [2, 3]
    for number in (2, 3):
        found = checkpoint.read(checkpoint_file(tmp_path, number))
        values = found["model"] | {f"m{n}": s["exp_avg"] for n, s in found["optimizer"]["state"].items()}
        assert values.keys() == expected[number - 1].keys()
        assert all(torch.equal(value, expected[number - 1][name]) for name, value in values.items())
        assert found["counts"] == [1, (2, "x")]
        assert found["model"]["0.weight"].is_contiguous(memory_format=torch.channels_last)
    assert [torch.equal(w, e["0.weight"]) for w, e in zip(bare, expected, strict=True)] == [True] * 3
    assert not torch.equal(bare[0], bare[2])
    assert hidden(tmp_path) == []


def test_one_storage_is_copied_once_and_memory_is_kept_from_save_to_save(tmp_path: Path) -> None:
    network, _, step = trained()
    writer = Writer(tmp_path, keep=1, max_failed=3)
    first = writer._copies((network.state_dict(), {"again": network[0].weight.detach(), "row": network[0].weight[1]}))
    model, extra = first
    assert extra["again"].data_ptr() == model["0.weight"].data_ptr() != network[0].weight.data_ptr()
    assert extra["row"].untyped_storage().nbytes() == extra["row"].numel() * 4  # of a view, not what it is a view of
    assert isinstance(model, OrderedDict)
    assert model._metadata == network.state_dict()._metadata
    before = {name: value.data_ptr() for name, value in model.items()}
    step()
    again = writer._copies((network.state_dict(), {}))[0]
    assert {name: value.data_ptr() for name, value in again.items()} == before
    assert torch.equal(again["0.weight"], network[0].weight)
    larger = writer._copies(({"0.weight": torch.zeros(9)}, {}))[0]["0.weight"]
    assert larger.shape == (9,)


def test_wait_is_over_when_the_checkpoint_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SlowDisk(monkeypatch)
    writer = Writer(tmp_path, keep=2, max_failed=3)
    writer.save(state(1))
    assert disk.reached.acquire(timeout=60)
    threading.Timer(0.2, disk.go.release).start()
    writer.wait()
    assert checkpoint.read_newest(tmp_path)["step"] == 1
    writer.wait()


def test_an_error_in_the_loop_leaves_after_the_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SlowDisk(monkeypatch)

    def run() -> None:
        with Writer(tmp_path, keep=2, max_failed=3) as writer:
            writer.save(state(1))
            threading.Timer(0.2, disk.go.release).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert saved_steps(tmp_path) == [1]


def test_a_defect_of_the_thread_is_raised(tmp_path: Path) -> None:
    writer = Writer(tmp_path, keep=2, max_failed=3)
    writer.save(state(1), None, lambda _: [][0])
    with pytest.raises(IndexError):
        writer.save(state(2))


def save_twice_slowly(folder: Path) -> None:
    """Writes step 1, then half of step 2, and says so; then its disk stands still."""
    with Writer(folder, keep=2, max_failed=3) as writer:
        writer.save(state(1))
        writer.wait()

        def half(values: Any, file: Any) -> None:
            file.write(b"PK" * 1000)
            file.flush()
            print("writing", flush=True)
            time.sleep(600)

        torch.save = half
        writer.save(state(2))


def test_killed_while_it_writes(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    code = (
        "import sys; from pathlib import Path; from ssl_pipeline import distributed; distributed.start(); "
        "from tests.test_checkpoint import save_twice_slowly; save_twice_slowly(Path(sys.argv[1]))"
    )
    words = [sys.executable, "-c", code, str(run.checkpoints)]
    with subprocess.Popen(words, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert (
            process.stdout.readline() == "writing\n"
        )  # the loop has left `save`, and the process waits for its thread
        process.send_signal(signal.SIGKILL)
    assert hidden(run.checkpoints) == [".step_00000002.pt.partial"]
    assert checkpoint.read_newest(run.checkpoints)["step"] == 1
    run.backbones.mkdir()
    for stale in (run.backbones / ".epoch_0001.pth.partial", run.path / ".backbone.json.partial"):
        stale.write_text("half")
    run.config.write_text("epochs: 1\n")
    run.open_for_writing({"epochs": 1})
    run.close()
    assert hidden(run.path) == [".lock"]
    assert saved_steps(run.checkpoints) == [1]


# ---------------------------------------------------------------------------------------------------------- full disks
@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file may become larger: what a quota does, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def small_disk(folder: Path, size: int = 2**16) -> Iterator[None]:
    """A file system of `size` bytes in `folder`; a skip where mounting is not allowed."""
    folder.mkdir()
    mount, umount = shutil.which("mount"), shutil.which("umount")
    made = mount and subprocess.run([mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False)
    if not made or made.returncode or umount is None:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield
    finally:
        subprocess.run([umount, "-l", str(folder)], check=True)  # lazily: a run that ended by an error has files open


def fails_and_keeps_the_last_good_one(folder: Path, reason: str) -> None:
    with pytest.raises(StorageFailure, match=f"step_00000002.pt: {reason}; free room there or make it writable$"):
        checkpoint.write(folder, state(2, size=100_000), keep=2)
    assert checkpoint.read_newest(folder)["step"] == 1
    assert [path.name for path in folder.iterdir()] == ["step_00000001.pt"]


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small"):
        checkpoint.write(tmp_path / "small", state(1), keep=2)
        fails_and_keeps_the_last_good_one(tmp_path / "small", "No space left on device")


def test_a_read_only_disk_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small"):
        checkpoint.write(tmp_path / "small", state(1), keep=2)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "small")], check=True)  # noqa: S607
        fails_and_keeps_the_last_good_one(tmp_path / "small", "Read-only file system")


def test_a_quota_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, state(1), keep=2)
    with file_limit(50_000):
        fails_and_keeps_the_last_good_one(tmp_path, "File too large")


def test_failed_saves_are_told_tried_again_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = Writer(tmp_path, keep=2, max_failed=3)
    writer.save(state(1, 100_000))
    writer.wait()
    with file_limit(50_000):
        for step in (2, 3):
            writer.save(state(step, 100_000))
            writer.wait()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "step_00000002.pt: File too large; free room there" in told[0]
    assert "training goes on and the next save tries again (save 1 of 3 in a row that failed" in told[0]
    assert "step_00000003.pt: File too large" in told[1]
    assert "(save 2 of 3 in a row" in told[1]
    writer.save(state(4, 100_000))  # this one fits: the count begins anew
    writer.wait()
    with file_limit(50_000):
        for step in (5, 6):
            writer.save(state(step, 100_000))
        with pytest.raises(StorageFailure, match="step_00000007.pt: File too large.*and give the same command again$"):
            writer.save(state(7, 100_000))  # waited for
    assert saved_steps(tmp_path) == [1, 4]
    assert hidden(tmp_path) == []


def test_the_last_save_of_a_run_is_tried_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = Writer(tmp_path, keep=2, max_failed=3)
    with file_limit(50_000), pytest.raises(StorageFailure, match="give the same command again"):
        writer.save(state(1, 100_000), final=True)
    assert "File too large; free room there or make it writable; trying once more" in caplog.text
    tries: list[int] = []

    def first(_: Any) -> None:
        tries.append(1)
        if len(tries) == 1:
            raise StorageFailure("cannot write backbone.pth: Input/output error; free room there or make it writable")

    writer.save(state(2, 100_000), None, first, final=True)
    assert saved_steps(tmp_path) == [2]
    assert len(tries) == 2


# --------------------------------------------------------------------------------------------------------------- ranks
def _saves_on_ranks(folder: str) -> dict[str, Any]:
    path, main = Path(folder), distributed.rank() == 0
    found: dict[str, Any] = {}
    with Writer(path, keep=2, max_failed=2) as writer:
        writer.save(state(1, 100_000))
        writer.wait()
        found["read"] = checkpoint.read_together(path)["step"]
        found["host"] = len(writer._host)
        # A rank whose disk lists a newer file, as one on which an old attempt was left.
        listed = checkpoint.saved_steps
        checkpoint.saved_steps = lambda folder: listed(folder) if main else [*listed(folder), 9]
        found["together"] = checkpoint.read_together(path)["step"]
        checkpoint.saved_steps = listed
        limit = file_limit(50_000) if main else contextlib.nullcontext()  # the disk refuses rank 0, which alone writes
        with limit:
            writer.save(state(2, 100_000))
            try:
                writer.save(state(3, 100_000))
            except Stop as stop:
                found["status"], found["told"] = int(stop.status), str(stop)
    read = checkpoint.read
    if not main:
        checkpoint.read = lambda file: (_ for _ in ()).throw(ValueError("it is damaged"))
    try:
        checkpoint.read_together(path)
    except Stop as stop:
        found["unread"] = str(stop)
    checkpoint.read = read
    return found


def test_ranks_read_the_same_file_and_stop_together(tmp_path: Path) -> None:
    main, other = on_ranks(2, _saves_on_ranks, str(tmp_path))
    assert (main["read"], other["read"]) == (main["together"], other["together"]) == (1, 1)
    assert (main["host"], other["host"]) == (1, 0)
    assert main["status"] == other["status"] == Status.STORAGE
    assert "step_00000003.pt: File too large" in main["told"]
    assert other["told"] == ""
    assert "rank 1 on" in main["unread"]
    assert "can be read by rank 0 and not here: it is damaged" in other["unread"]
    assert saved_steps(tmp_path) == [1]


def test_a_damaged_file_that_is_newer_costs_no_good_one(tmp_path: Path) -> None:
    for step in (4, 8):
        checkpoint.write(tmp_path, {"step": step}, keep=2)
    newest = checkpoint_file(tmp_path, 8)
    newest.write_bytes(newest.read_bytes()[:100])
    assert checkpoint.read_newest(tmp_path)["step"] == 4
    checkpoint.write(tmp_path, {"step": 6}, keep=1)
    assert saved_steps(tmp_path) == [6, 8]
    checkpoint.set_aside(tmp_path, 6)
    assert sorted(os.listdir(tmp_path)) == ["step_00000006.pt", "step_00000008.pt.damaged"]


def test_a_storage_that_does_not_give_a_file_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write(tmp_path, {"step": 4}, keep=1)

    def refused(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint.zipfile.ZipFile, "testzip", refused)
    with pytest.raises(
        StorageFailure, match=r"cannot read checkpoint .*step_00000004.pt: Input/output error; the same com"
    ):
        checkpoint.read_newest(tmp_path)
