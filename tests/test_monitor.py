import contextlib
import io
import json
import logging
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_pipeline import distributed, monitor
from ssl_pipeline.monitor import Monitor
from ssl_pipeline.run_folder import Diary, read_lines
from tests.ranks import on_ranks
from tests.test_checkpoint import file_limit, small_disk

YES, NO = torch.tensor(True), torch.tensor(False)


def make(folder: Path, start: int = 0, tensorboard: bool = True) -> Monitor:
    options = monitor.Options(every_steps=2, tensorboard=tensorboard)
    return Monitor(options, folder / "metrics.jsonl", folder / "tb", distributed.start(), 4, 10, start_step=start)


def values(loss: float) -> dict[str, torch.Tensor]:
    return {"loss": torch.tensor(loss)}


def test_means_over_good_steps_and_a_count_of_the_others(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    watch = make(tmp_path)
    watch.tick(0)
    for loss, finite in ((1.0, YES), (float("nan"), NO), (3.0, YES)):
        watch.add(values(loss), finite)
    watch.log(3, 0, {"matrices": 0.1}, bad=2)
    watch.add(values(float("inf")), NO)
    watch.log(4, 0, {"matrices": 0.1}, bad=2)
    watch.close()
    first, second = read_lines(tmp_path / "metrics.jsonl")
    assert (first["loss"], first["skipped"], first["bad_pictures"], first["lr_matrices"]) == (2.0, 1, 2, 0.1)
    assert (second["loss"], second["skipped"]) == (None, 1)
    assert set(monitor.TIME_KEYS) <= first.keys()
    line = capsys.readouterr().err.splitlines()[0]
    for words in (
        "step 3/10",
        "epoch 1 ",  # the first one, which metrics.jsonl counts as 0
        "loss 2.0000",
        "images/s",
        "waiting for data",
        "left",
        "skipped 1",
        "unreadable pictures 2",
    ):
        assert words in line
    assert list((tmp_path / "tb").iterdir())


def test_rows_wait_for_a_full_disk_and_none_is_lost_or_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def log(watch: monitor.Monitor, steps: range) -> None:
        for step in steps:
            watch.add(values(step), YES)
            watch.log(step, 0, {}, 0)

    watch = make(tmp_path, tensorboard=False)
    log(watch, range(1, 4))
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with file_limit(size + size // 2):  # the disk takes a row, and half of the next one
        log(watch, range(4, 8))
        rows = read_lines(tmp_path / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
    log(watch, range(8, 9))
    watch.close()
    assert [(row["step"], row["loss"]) for row in read_lines(tmp_path / "metrics.jsonl")] == [
        (step, step) for step in range(1, 9)
    ]
    (told,) = caplog.records
    assert "metrics.jsonl: [Errno 27] File too large; what it lacks is written when there is room" in told.getMessage()


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [(event.step, event.value) for event in EventAccumulator(str(folder)).Reload().Scalars(name)]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_curves_wait_for_a_full_disk_and_none_lacks_a_point(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    def log(watch: Monitor, steps: range) -> None:
        for step in steps:
            watch.add(values(step), YES)
            watch.log(step, 0, {}, 0)

    ballast = tmp_path / "small" / "ballast"
    with small_disk(tmp_path / "small", 2**21):
        watch = make(tmp_path / "small")
        log(watch, range(1, 4))
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**12))
        log(watch, range(4, 100))
        assert len(curve(tmp_path / "small" / "tb", "loss")) < 99
        watch.show_views(tmp_path / "small" / "views.png", [torch.rand(8, 3, 32, 32)], [((0, 0, 0), (1, 1, 1))])
        assert not (tmp_path / "small" / "views.png").exists()
        ballast.unlink()
        log(watch, range(100, 102))
        watch.close()
        assert curve(tmp_path / "small" / "tb", "loss") == [(step, step) for step in range(1, 102)]
        assert len(read_lines(tmp_path / "small" / "metrics.jsonl")) == 101
    rows, points, picture = [record.getMessage() for record in caplog.records]  # each once
    assert "metrics.jsonl: [Errno 28] No space left on device; what it lacks is written when there is room" in rows
    assert re.search(r"/tb/events.*: \[Errno 28\] No space left on device; what it lacks is written when", points)
    assert "views.png: No space left on device; the run goes on without this picture" in picture
    assert "Traceback" not in capfd.readouterr().err


def test_a_read_only_folder_costs_the_picture_of_the_views_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watch = make(tmp_path, tensorboard=False)
    watch.show_views(tmp_path / "gone" / "views.png", [torch.rand(8, 3, 32, 32)], [((0, 0, 0), (1, 1, 1))])
    watch.close()
    (told,) = caplog.records
    assert told.getMessage().endswith(
        "views.png: No such file or directory; the run goes on without this picture of its views"
    )


def test_tensorboard_shows_one_series_across_restarts_and_the_views(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, loss in ((0, 1.0), (2, 5.0)):
        watch = make(tmp_path, start=start)
        for step in range(start + 1, 5):
            watch.add(values(loss), YES)
            watch.log(step, 0, {"matrices": 0.1}, 0)
        watch.show_views(tmp_path / "views.png", [torch.rand(8, 3, 32, 32)], [((0, 0, 0), (1, 1, 1))])
        watch.close()
    assert curve(tmp_path / "tb", "loss") == [(1, 1.0), (2, 1.0), (3, 5.0), (4, 5.0)]
    assert [step for step, _ in curve(tmp_path / "tb", "lr_matrices")] == [1, 2, 3, 4]
    shown = EventAccumulator(str(tmp_path / "tb")).Reload().Images("views")[-1]
    picture = np.asarray(Image.open(io.BytesIO(shown.encoded_image_string)))
    assert (shown.height, shown.width) == picture.shape[:2]
    assert np.array_equal(picture, np.asarray(Image.open(tmp_path / "views.png")))


def test_rows_and_points_that_wait_for_a_full_disk_stay_through_a_rollback(tmp_path: Path) -> None:
    watch = make(tmp_path)

    def log(step: int) -> None:
        watch.add(values(step), YES)
        watch.log(step, 0, {}, 0)

    log(1)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with file_limit(size + size // 2):
        for step in range(2, 6):
            log(step)
        text = (tmp_path / "metrics.jsonl").read_text()
        assert (len(text), text.count("\n")) == (size, 1)  # no half row, to which the next one would be joined
        watch.rewind(3)
        log(4)
    log(5)
    watch.close()
    points = [(step, step) for step in range(1, 6)]
    assert [(row["step"], row["loss"]) for row in read_lines(tmp_path / "metrics.jsonl")] == points
    assert curve(tmp_path / "tb", "loss") == points


def test_a_skipped_step_from_before_a_rollback_is_not_told_of_again(tmp_path: Path) -> None:
    watch = make(tmp_path, tensorboard=False)
    for finite in (YES, NO, YES):
        watch.add(values(1.0) | {"gradient_norm": torch.tensor(1.0)}, finite)
    assert watch.unread == 3
    state = watch.state_dict()
    watch.load_state_dict(state)
    watch.rewind(3)
    watch.add(values(1.0) | {"gradient_norm": torch.tensor(1.0)}, NO)
    assert watch.log(4, 0, {}, 0)["skipped"] == 2  # of the interval
    assert [one.step for one in watch.skipped] == [4]
    assert watch.unread == 0
    watch.close()


def test_time_within_held_is_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(monitor.time, "monotonic", lambda: float(next(clock)))
    watch = make(tmp_path, tensorboard=False)
    for step in (1, 2):
        for _ in range(2 if step == 1 else 0):
            with watch.held():
                pass
        watch.add(values(1.0), YES)
        watch.log(step, 0, {}, 0)
    assert [row["checkpoint_stall"] for row in read_lines(tmp_path / "metrics.jsonl")] == [2.0, 0.0]


def test_the_first_row_of_a_process_tells_how_long_its_first_step_took_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((12.5, 99.0))
    monkeypatch.setattr(monitor, "process_seconds", lambda: next(clock))
    watch = make(tmp_path)
    for step in (1, 2, 3):
        watch.add(values(1.0), YES)
        if step > 1:
            watch.log(step, 0, {}, 0)
    watch.close()
    first, second = read_lines(tmp_path / "metrics.jsonl")
    assert first["seconds_to_first_step"] == 12.5
    assert "seconds_to_first_step" not in second


def test_the_age_of_a_process() -> None:
    reading, writing = os.pipe()
    start = time.monotonic()
    if os.fork() == 0:
        time.sleep(0.3)
        os.write(writing, str(monitor.process_seconds()).encode())
        os._exit(0)
    os.wait()
    assert 0.3 <= float(os.read(reading, 100)) <= time.monotonic() - start + 0.01  # a tick of Linux' clock
    for end in (reading, writing):
        os.close(end)


def test_a_restart_continues_one_series(tmp_path: Path) -> None:
    watch = make(tmp_path)
    for step in (1, 2, 3, 4):
        watch.add(values(step), YES)
        watch.log(step, 0, {}, 0)
    watch.add(values(10.0), YES)
    state = watch.state_dict()
    watch.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # killed while writing
    again = make(tmp_path, start=2)
    again.load_state_dict(state)
    again.add(values(20.0), YES)
    again.log(3, 0, {}, 0)
    again.close()
    rows = read_lines(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 15.0)]


def test_skipped_steps_are_named_and_counted_across_a_restart(tmp_path: Path) -> None:
    watch = make(tmp_path)
    for loss, finite in ((1.0, YES), (float("nan"), NO), (3.0, YES), (float("inf"), NO)):
        watch.add(values(loss) | {"gradient_norm": torch.tensor(2 * loss)}, finite)
    values_logged = watch.log(4, 0, {}, 0)
    assert (values_logged["skipped"], watch.in_a_row) == (2, 1)
    assert [skip.step for skip in watch.skipped] == [2, 4]
    assert watch.skipped[1].values == {"loss": float("inf"), "gradient_norm": float("inf")}
    watch.add(values(5.0) | {"gradient_norm": torch.tensor(float("inf"))}, NO)
    state = watch.state_dict()
    assert state["in_a_row"] == 2
    watch.close()
    again = make(tmp_path, start=5)
    again.load_state_dict(state)
    again.add(values(6.0) | {"gradient_norm": torch.tensor(float("inf"))}, NO)
    again.log(6, 0, {}, 0)
    assert [(skip.step, skip.values["loss"]) for skip in again.skipped] == [(5, 5.0), (6, 6.0)]
    assert again.in_a_row == 3
    again.load_state_dict({"names": [], "sums": None, "in_a_row": 1})  # as of an older version
    again.rewind(4)
    again.add(values(7.0), YES)
    again.log(5, 0, {}, 0)
    again.close()
    assert (again.skipped, again.in_a_row) == ([], 0)
    assert [(row["step"], row["loss"]) for row in read_lines(tmp_path / "metrics.jsonl")] == [(4, 2.0), (5, 7.0)]


def test_numbers_that_are_no_json_are_null(tmp_path: Path) -> None:
    watch = make(tmp_path)
    watch.add(values(1.0), YES)
    watch.log(1, 0, {}, 0)  # no interval has a length yet
    watch.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert row["images_per_second"] is None


def test_views_are_shown_as_pictures(tmp_path: Path) -> None:
    watch = make(tmp_path)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)
    pixels = torch.rand(10, 3, 32, 32)
    view = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    watch.show_views(tmp_path / "views.png", [view, view[..., :20, :20]], [(mean, std)] * 2)
    watch.close()
    shown = np.asarray(Image.open(tmp_path / "views.png"))
    factor = shown.shape[0] // (8 * 36 + 4)
    first = shown[::factor, ::factor][4:36, 4:36]
    assert np.abs(first - pixels[0].permute(1, 2, 0).numpy() * 255).max() <= 1


def test_who_waits_for_data_is_told_what_to_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [0.0]
    monkeypatch.setattr("ssl_pipeline.monitor.time.monotonic", lambda: clock[0])
    watch = Monitor(monitor.Options(tensorboard=False), tmp_path / "m", tmp_path, distributed.start(), 4, 99,
                    remedy=lambda: "try data.threads=8")  # fmt: skip
    watch.tick(0)
    step = 0

    def interval(seconds: float, share: float) -> int:
        """How often it has been said, after an interval of training of which a share waited."""
        nonlocal step

        def batch():
            clock[0] += share * seconds
            yield 1

        for _ in watch.timed(batch()):
            clock[0] += (1 - share) * seconds
            watch.add(values(1.0), YES)
        step += 1
        watch.log(step, 0, {}, 0)
        return caplog.text.count("try data.threads=8")

    assert [interval(30, 0.04) for _ in range(4)] == [0] * 4
    assert [interval(25, 0.2), interval(25, 0.4), interval(25, 0.01)] == [0] * 3  # under a minute
    assert [interval(25, 0.2), interval(25, 0.4), interval(25, 0.3)] == [0, 0, 1]
    assert "training waited for data 30 % of the last" in caplog.text
    assert [interval(100, 0.5) for _ in range(5)] == [1] * 5
    assert interval(100, 0.5) == 2


def two_who_wait(folder: str) -> list:
    """On each rank: what was logged and said where rank 1 alone waits for data, and then nobody."""
    world = distributed.start()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ssl_pipeline").addHandler(handler)
    clock = [1000.0 * world.rank]  # as of two machines
    monitor.time = SimpleNamespace(**vars(time) | {"monotonic": lambda: clock[0]})  # type: ignore[assignment]
    watch = Monitor(monitor.Options(tensorboard=False), Path(folder) / "m", Path(folder), world, 4, 99,
                    remedy=lambda: f"try what rank {world.rank} says")  # fmt: skip
    watch.tick(0)
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        for step, share in enumerate((0.3, 0.3, 0.0), start=1):

            def batch(share=share):
                clock[0] += 40 * share * world.rank
                yield 1

            for _ in watch.timed(batch()):
                clock[0] += 40 - 40 * share * world.rank
                watch.add(values(1.0), YES)
            watch.log(step, 0, {}, 0)
    watch.close()
    return [lines, printed.getvalue()]


def test_the_rank_that_waits_is_the_one_that_counts(tmp_path: Path) -> None:
    (said, printed), (other, _) = on_ranks(2, two_who_wait, str(tmp_path))
    assert [row["data_wait"] for row in read_lines(tmp_path / "m")] == pytest.approx([0.3, 0.3, 0.0])
    assert said == ["training waited for data 30 % of the last 1 min 20 s on rank 1; try what rank 1 says"]
    assert other == []
    assert [line.partition("waiting for data ")[2].partition("  ")[0] for line in printed.splitlines()] == [
        "30 % on rank 1", "30 % on rank 1", "0 %"
    ]  # fmt: skip


def test_rows_of_steps_to_be_done_again_are_cut_off_in_place(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n{"st\n{"step": 2}\n{"step": 3}\n{"ste')
    node = metrics.stat().st_ino
    Diary(metrics).drop(lambda row: row["step"] > 3)
    assert metrics.read_text() == '{"step": 1}\n{"st\n{"step": 2}\n{"step": 3}\n'
    Diary(metrics).drop(lambda row: row["step"] > 2)
    assert metrics.read_text() == '{"step": 1}\n{"st\n{"step": 2}\n'
    assert metrics.stat().st_ino == node


def test_a_row_that_the_open_file_refuses_goes_into_the_one_at_its_path(tmp_path: Path) -> None:
    """As after the failover of an NFS server, whose files that were open are stale for good."""
    diary = Diary(tmp_path / "rows")
    diary.write(b"1\n")
    assert diary._file is not None
    with Path("/dev/full").open("wb") as full:
        os.dup2(full.fileno(), diary._file.fileno())
    for row in (b"2\n", b"3\n"):
        diary.write(row)
    assert diary.path.read_bytes() == b"1\n2\n3\n"
