"""The loop, end to end on the digits with a tiny network."""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_pipeline import checkpoint, config, distributed, monitor, pretrain, sparse_head
from ssl_pipeline.data import loader as loading
from ssl_pipeline.data.loader import Loader
from ssl_pipeline.data.pack import pack
from ssl_pipeline.exits import BadInput, Status, StorageFailure
from ssl_pipeline.methods import Method, byol
from ssl_pipeline.monitor import TIME_KEYS
from ssl_pipeline.preemption import SIGNALS, _noted
from ssl_pipeline.pretrain import PretrainConfig
from ssl_pipeline.run_folder import checkpoint_file, read_lines, saved_steps
from tests.test_checkpoint import file_limit, small_disk

METHODS = ["simclr", "byol", "barlow_twins", "simsiam", "vicreg", "w_mse", "ssl_hsic", "swav"]

SPARSE = {
    "proximal": ["head.sparse.mode=proximal", "head.sparse.weight=0.01"],
    "adaptive": ["head.sparse.schedule=adaptive", "head.sparse.mode=scale_invariant", "head.sparse.where=all"],
    "bilevel": ["head.sparse.inner_steps=2", "head.sparse.schedule=cosine", "head.kind=mlp", "head.hidden=32"],
}


def options(root: Path, *overrides: str, method: str = "simclr") -> PretrainConfig:
    other = {
        "simclr": [],
        "byol": ["method={name: byol, predictor_hidden: 64}"],
        "barlow_twins": ["method={name: barlow_twins}"],
        "simsiam": ["method={name: simsiam, predictor_hidden: 16}", "head.output_norm=plain", "head.output_bias=false"],
        "vicreg": ["method={name: vicreg}"],
        "w_mse": ["method={name: w_mse, w_size: 16}", "head.output=8"],
        "ssl_hsic": ["method={name: ssl_hsic, predictor_hidden: 64}"],
        # Two batches in the queue, in use from step 3 on; prototypes that rest until step 4.
        "swav": [
            "method={name: swav, prototypes: 20, queue_length: 32, queue_start_epoch: 0, freeze_prototypes_steps: 4}"
        ],
    }[method]
    tree = config.load("smoke", [f"data.root={root}", "data.batch_size=16", "monitor.tensorboard=false"])
    if other:
        del tree.values["method"]
        config.apply_overrides(tree, other)
    config.apply_overrides(tree, overrides)
    return config.validate(PretrainConfig, tree.values, tree)


def series(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIME_KEYS} for row in read_lines(run / "metrics.jsonl")]


def weights(run: Path) -> dict[str, torch.Tensor]:
    state = checkpoint.read_newest(run / "checkpoints")
    return state["model"] | {
        f"optimizer {p} {n}": v for p, s in state["optimizer"]["state"].items() for n, v in s.items()
    }


def bits(values: Any, name: str = "") -> dict[str, Any]:
    """Everything in nested values by name, tensors as bytes: 0 and -0 differ, and NaN is itself."""
    if isinstance(values, dict):
        return {k: v for key, value in values.items() for k, v in bits(value, f"{name}/{key}").items()}
    if isinstance(values, (list, tuple)):
        return bits(dict(enumerate(values)), name)
    if isinstance(values, torch.Tensor):
        values = values.dtype, values.shape, values.detach().contiguous().numpy().tobytes()
    return {name: values}


def all_bits(run: Path) -> dict[str, Any]:
    """What a run leaves: everything in its last checkpoint, the bare backbone, the rows less the keys of time."""
    state = checkpoint.read_newest(run / "checkpoints")
    bare = torch.load(run / "backbone.pth", weights_only=True)
    return bits({"checkpoint": state, "backbone": bare, "row": series(run)})


def assert_same_run(a: Path, b: Path, told: str = "") -> None:
    first, second = all_bits(a), all_bits(b)
    different = [name for name in {**first, **second} if first.get(name, ...) != second.get(name, ...)]
    assert not different, f"{len(different)} entries differ, {different[:9]}; {told}"
    steps = [row["step"] for row in series(a) if "loss" in row]  # k-nn has rows of its own
    assert steps == sorted({*steps}), told


# ------------------------------------------------------------------------------------------------------ the run folder
def test_a_run_leaves_all_that_the_design_names(few_digits: Path, tmp_path: Path) -> None:
    assert (
        pretrain.pretrain(options(few_digits, "monitor.tensorboard=true", "max_steps=4"), tmp_path / "run")
        == Status.DONE
    )
    run = tmp_path / "run"
    names = {p.name for p in run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "tensorboard", "views.png", "checkpoints", "backbone.pth", "backbone.json",
            ".lock"} <= names  # fmt: skip
    assert [row["step"] for row in series(run)] == [1, 2, 3, 4]
    backbone = torch.load(run / "backbone.pth", weights_only=True)
    model = checkpoint.read_newest(run / "checkpoints")["model"]
    assert all(torch.equal(value, model[f"backbone.{name}"]) for name, value in backbone.items())


def test_a_finished_run_says_so_and_does_nothing(
    few_digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="ssl_pipeline")
    for _ in range(2):
        assert pretrain.pretrain(options(few_digits, "max_steps=2"), tmp_path) == Status.DONE
    assert "is finished: 2 steps are done; nothing to do" in caplog.text
    assert len(series(tmp_path)) == 2


def test_every_key_of_metrics_is_documented(few_digits: Path, tmp_path: Path) -> None:
    docs = Path(__file__).parents[1] / "docs"
    text = (docs / "runs.md").read_text() + (docs / "sparsehead.md").read_text()
    text = text.replace(
        "`head_group_norm_{min,median,max}`", "`head_group_norm_min` `head_group_norm_median` `head_group_norm_max`"
    )
    for method in METHODS:
        sparse = SPARSE["bilevel"] if method == "simclr" else []
        pretrain.pretrain(options(few_digits, "max_steps=1", *sparse, method=method), tmp_path / method)
        (row,) = read_lines(tmp_path / method / "metrics.jsonl")
        unknown = [key for key in row if f"`{key}`" not in text and not key.startswith("lr_")]
        assert sorted({*unknown} - {"step", "epoch"}) == [], method


# ---------------------------------------------------------------------------------------------------------- SparseHead
def test_the_weight_of_sparsehead_follows_its_schedule(few_digits: Path, tmp_path: Path) -> None:
    sparse = ["head.sparse.schedule=cosine", "head.sparse.first_factor=3", "head.sparse.ramp=0.5"]
    chosen = options(few_digits, "epochs=2", *sparse)
    assert pretrain.pretrain(chosen, tmp_path) == Status.DONE
    rows = series(tmp_path)
    expected = [sparse_head.weight_at(chosen.head.sparse, step / len(rows)) for step in range(len(rows))]
    assert [row["sparse_weight"] for row in rows] == pytest.approx(expected)
    assert rows[0]["sparse_weight"] == pytest.approx(3 * rows[-1]["sparse_weight"])


def test_the_adaptive_weight_follows_the_active_share(few_digits: Path, tmp_path: Path) -> None:
    sparse = ["head.sparse.schedule=adaptive", "head.sparse.target=0.25", "head.sparse.gain=0.1"]
    assert pretrain.pretrain(options(few_digits, "max_steps=6", *sparse), tmp_path) == Status.DONE
    rows = series(tmp_path)
    assert len(rows) == 6
    for row, after in itertools.pairwise(
        rows
    ):  # a row's share is of the weights before its step, the next one's after it
        share = 1 - after["head_groups_inactive"]
        assert after["sparse_weight"] == pytest.approx(row["sparse_weight"] * math.exp(0.1 * (share - 0.25)), rel=1e-4)
    assert rows[-1]["sparse_weight"] > 1.2 * rows[0]["sparse_weight"]


# ------------------------------------------------------------------------------------------------------------ resuming
SEED = int(os.environ.get("SSL_PIPELINE_TEST_SEED") or random.SystemRandom().randrange(2**32))
"""Of the steps at which runs are stopped: another one each time; the variable repeats one that failed."""

STOPPED = {
    "simclr": ["precision=fp16", "backbone.stem=standard"],  # a CPU is slow in fp16
    "byol": ["optim.accumulate=2"],
    "barlow_twins": ["data.shuffle=shards", "data.shuffle_window=2", "optim.name=lars", "optim.learning_rate=0.1"],
    "simsiam": ["backbone.arguments.drop_path_rate=0.3"],
    "vicreg": ["online.linear=true", *SPARSE["adaptive"]],
    "w_mse": SPARSE["proximal"],
    "ssl_hsic": ["optim.accumulate=4"],
    "swav": SPARSE["bilevel"],
}
"""Each method with something that a resume could forget."""


@contextlib.contextmanager
def as_a_process() -> Iterator[None]:
    """What a run that was stopped leaves in its process is undone: handlers of signals, and signals that were noted."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _noted.clear()


def stopped(chosen: PretrainConfig, run: Path, step: int, number: int, rank: int = 0) -> Status:
    """A run that a signal to one rank ends after `step`: it comes in the step before, and all ranks know it one later."""

    def kill() -> None:
        if distributed.rank() == rank:
            os.kill(os.getpid(), number)

    with as_a_process(), pytest.MonkeyPatch.context() as patch:
        at_step(patch, {step - 1 - max(saved_steps(run / "checkpoints"), default=0): kill})
        return pretrain.pretrain(chosen, run)


@pytest.fixture(scope="module")
def few_shards(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`few_digits` in shards, some five."""
    shards = tmp_path_factory.mktemp("shards") / "few"
    pack(few_digits, shards, shard_size=100_000, processes=1)
    return shards


@pytest.mark.parametrize("method", METHODS)
def test_stopped_by_a_signal_at_any_step_and_resumed_is_not_stopped(
    few_digits: Path, few_shards: Path, tmp_path: Path, method: str
) -> None:
    draw = random.Random(f"{SEED} {method}")
    # In the middle of either epoch of ten steps; one of the methods in both.
    ends = [draw.randrange(2, 10), draw.randrange(11, 16)]
    ends = ends if method == "byol" else [draw.choice(ends)]
    signals = draw.choices(SIGNALS, k=len(ends))
    told = f"stopped after {ends} by {signals}: SSL_PIPELINE_TEST_SEED={SEED}"
    print(told)
    # The alarm holds all the while: its count goes on too.
    common = ["max_steps=16", "monitor.every_steps=5", "alarms.loss_above=-1e9", "optim.name=adam",
              "optim.learning_rate=1e-3"]  # fmt: skip
    root = few_shards if "data.shuffle=shards" in STOPPED[method] else few_digits
    chosen = options(root, *common, *STOPPED[method], method=method)
    assert pretrain.pretrain(chosen, tmp_path / "whole") == Status.DONE
    for end, number in zip(ends, signals, strict=True):
        assert stopped(chosen, tmp_path / "parts", end, number) == Status.STOPPED, told
        assert saved_steps(tmp_path / "parts" / "checkpoints")[-1] == end, told
    assert pretrain.pretrain(chosen, tmp_path / "parts") == Status.DONE, told
    assert [row["step"] for row in series(tmp_path / "parts")] == [5, 10, 15, 16], told
    assert_same_run(tmp_path / "whole", tmp_path / "parts", told)


LONG = ("max_steps=60", "epochs=20", "checkpoint.every_steps=7", "checkpoint.every_epochs=null")


@pytest.fixture(scope="module")
def quiet(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of LONG that nobody disturbed."""
    run = tmp_path_factory.mktemp("quiet") / "run"
    assert pretrain.pretrain(options(few_digits, *LONG), run) == Status.DONE
    return run


def start(few_digits: Path, run: Path) -> subprocess.Popen:
    words = ["smoke", f"data.root={few_digits}", "data.batch_size=16", "monitor.tensorboard=false", *LONG]
    line = [sys.executable, "-m", "ssl_pipeline", "pretrain", *words, "--output", str(run)]
    return subprocess.Popen(line, stderr=subprocess.PIPE, text=True)


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        rows = read_lines(run / "metrics.jsonl")
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} was not reached: {process.stderr.read() if process.stderr else ''}")


@pytest.mark.slow
def test_killed_in_mid_epoch_and_started_again_is_not_killed(few_digits: Path, quiet: Path, tmp_path: Path) -> None:
    killed = start(few_digits, tmp_path / "killed")
    wait_for_step(killed, tmp_path / "killed", 12)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    saved = saved_steps(tmp_path / "killed" / "checkpoints")
    assert saved
    assert saved[-1] < 60
    again = start(few_digits, tmp_path / "killed")
    assert again.wait(timeout=200) == 0
    assert_same_run(quiet, tmp_path / "killed")


@pytest.mark.slow
def test_a_signal_saves_and_exits_75_and_the_same_command_goes_on(
    few_digits: Path, quiet: Path, tmp_path: Path
) -> None:
    stopped = start(few_digits, tmp_path / "stopped")
    wait_for_step(stopped, tmp_path / "stopped", 1)
    stopped.send_signal(signal.SIGSTOP)  # it waits meanwhile
    second = start(few_digits, tmp_path / "stopped")
    assert second.wait(timeout=60) == Status.BAD_INPUT  # while the first one writes
    assert f"is being written by process {stopped.pid}" in second.stderr.read()
    stopped.send_signal(signal.SIGCONT)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(timeout=60) == Status.STOPPED
    told = re.search(r"stopped by a signal after step (\d+); the same command goes on from here", stopped.stderr.read())
    assert told is not None
    assert saved_steps(tmp_path / "stopped" / "checkpoints")[-1] == int(told[1]) < 60
    assert start(few_digits, tmp_path / "stopped").wait(timeout=200) == 0
    assert_same_run(quiet, tmp_path / "stopped")


# --------------------------------------------------------------------------------------------------------------- ranks
@pytest.mark.slow
def test_two_ranks_of_torchrun_are_one(digits: Path, tmp_path: Path, command: Callable) -> None:
    for ranks in (1, 2):
        done = command("pretrain", "smoke", f"data.root={digits}", "--output", tmp_path / str(ranks), ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = series(tmp_path / "1"), series(tmp_path / "2")
    assert [row["step"] for row in one] == [row["step"] for row in two] == list(range(1, 21))
    differences = [abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in zip(one, two, strict=True)]
    print(f"largest relative difference of the loss in 20 steps: {max(differences):.1e}")
    assert max(differences) <= 1e-4
    assert one[0]["loss"] - one[-1]["loss"] > 0.01  # it trains: agreement of a standstill would say nothing


def test_bare_backbones_are_kept(few_digits: Path, tmp_path: Path) -> None:
    chosen = options(
        few_digits, "checkpoint.every_epochs=null", "checkpoint.backbone_every_epochs=2", "max_steps=40", "epochs=4"
    )
    assert pretrain.pretrain(chosen, tmp_path / "run") == Status.DONE
    kept = sorted(path.name for path in (tmp_path / "run" / "backbones").iterdir())
    assert kept == ["epoch_0002.json", "epoch_0002.pth", "epoch_0004.json", "epoch_0004.pth"]
    last, whole = (
        torch.load(tmp_path / "run" / name, weights_only=True) for name in ("backbones/epoch_0004.pth", "backbone.pth")
    )
    assert all(torch.equal(value, whole[name]) for name, value in last.items())


@pytest.mark.slow
def test_ranks_that_do_not_divide_the_batch_stop_all(few_digits: Path, tmp_path: Path, command: Callable) -> None:
    done = command(
        "pretrain", "smoke", f"data.root={few_digits}", "data.batch_size=63", "--output", tmp_path / "r", ranks=2
    )
    assert done.returncode != 0
    assert "data.batch_size = 63 cannot be divided by 2 ranks: take 62 or 64" in done.stderr
    assert not (tmp_path / "r").exists()


# ----------------------------------------------------------------------------------------------- no wait for the device
class Waits(TorchDispatchMode):
    """Collects operations by which the host would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.armed = False
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.armed:
            name = func.overloadpacket.__name__
            to_cpu = name == "_to_copy" and str(kwargs.get("device")) == "cpu" and args[0].device.type != "cpu"
            if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal") or to_cpu:
                self.found.append(name)
        return func(*args, **kwargs)


class Reads(TorchFunctionMode):
    """The same for methods that on a CPU reach no operation: .cpu(), .numpy(), .tolist(), bool() and the like."""

    NAMES = ("cpu", "numpy", "tolist", "item", "__bool__", "__float__", "__int__", "__index__", "__array__", "nonzero")

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        to_cpu = name == "to" and "cpu" in [value for value in (*args[1:], *kwargs.values()) if isinstance(value, str)]
        if self.waits.armed and (name in self.NAMES or to_cpu):
            self.waits.found.append(name)
        return func(*args, **kwargs)


def waits_of_twenty_steps(run_options: PretrainConfig, output: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What waited in steps 2 to 21, outside the loader, the logged step and the checkpoint."""
    waits = Waits()

    def excused(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            armed, waits.armed = waits.armed, False
            try:
                return original(*args, **kwargs)
            finally:
                waits.armed = armed

        monkeypatch.setattr(owner, name, wrapper)

    excused(Loader, "_take")
    excused(monitor.Monitor, "log")
    excused(monitor.Monitor, "show_views")
    excused(monitor.Monitor, "state_dict")  # of the checkpoint
    excused(distributed, "together")
    excused(distributed, "gather_values")
    excused(distributed, "union")  # of the logged step and the checkpoint, on the host
    excused(torch.amp.GradScaler, "state_dict")  # of the checkpoint
    add = monitor.Monitor.add

    def armed_add(self: Any, *args: Any) -> None:
        add(self, *args)
        waits.armed = True

    monkeypatch.setattr(monitor.Monitor, "add", armed_add)
    with waits, Reads(waits):
        assert pretrain.pretrain(run_options, output) == Status.DONE
        waits.armed = False
    return waits.found


# fp16 is slow on a CPU, and what it adds is the loop's: one method shows it.
@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        *((method, ["precision=bf16"]) for method in METHODS),
        *(("byol", ["precision=bf16", *sparse]) for sparse in SPARSE.values()),
        *((method, ["precision=bf16", "optim.accumulate=2"]) for method in ("byol", "swav")),
        pytest.param("simclr", ["precision=fp16"], marks=pytest.mark.slow),
    ],
)
def test_no_step_waits_for_the_device(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, overrides: list[str]
) -> None:
    chosen = options(few_digits, *overrides, "epochs=3", "max_steps=21", "monitor.every_steps=1000", method=method)
    assert waits_of_twenty_steps(chosen, tmp_path, monkeypatch) == []
    assert read_lines(tmp_path / "metrics.jsonl")[-1]["step"] == 21


@pytest.mark.parametrize("sin", ["item", "bool", "cpu", "to"])
def test_a_wait_would_be_seen(few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sin: str) -> None:
    def after_update(self: Any, progress: Any, rates: Any, finite: torch.Tensor) -> None:
        {"item": finite.item, "bool": lambda: bool(finite), "cpu": finite.cpu,
         "to": lambda: finite.to("cpu")}[sin]()  # fmt: skip

    monkeypatch.setattr(byol.Method, "after_update", after_update)
    chosen = options(few_digits, "max_steps=3", "monitor.every_steps=1000", method="byol")
    assert waits_of_twenty_steps(chosen, tmp_path, monkeypatch)


# ---------------------------------------------------------------------------------------------------------- bad input
def test_bad_input_is_refused_before_anything_happens(few_digits: Path, tmp_path: Path) -> None:
    for overrides, words in (
        (["data.root=/nowhere"], r"no folder '/nowhere/train'.*data.root"),
        (["data.batch_size=2000"], r"160 pictures, fewer than data.batch_size = 2000"),
        (["optim.warmup_epochs=5"], r"warm-up of 50 steps does not end within the run's 20"),
    ):
        with pytest.raises(BadInput, match=words):
            pretrain.pretrain(options(few_digits, *overrides), tmp_path / "run")
        assert not (tmp_path / "run").exists()
    for overrides, words in (
        (["data.views.0.count=3"], "simclr uses 2 views and data.views makes 3"),
        (["head.kind=identity"], "head.kind = identity has none"),
    ):
        with pytest.raises(BadInput, match=words):
            options(few_digits, *overrides)
    with pytest.raises(BadInput, match="70 ranks are more than data.batch_size = 16"):
        pretrain.require_possible(options(few_digits), 70, 1437)
    for parts, fits in ((3, 4), (16, 8)):
        words = rf"optim.accumulate = {parts} does not divide the 8 pictures of each rank: take {fits}$"
        with pytest.raises(BadInput, match=words):
            pretrain.require_possible(options(few_digits, f"optim.accumulate={parts}"), 2, 1437)


def test_accumulate_is_suggested_where_it_helps_and_only_there(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for parts in (9, 17):  # 16 would leave batch norm one picture
        with pytest.raises(BadInput, match="does not divide the 16 pictures of each rank: take 8$"):
            pretrain.require_possible(options(few_digits, f"optim.accumulate={parts}"), 1, 1437)

    def full(self: Method, views: list[torch.Tensor]) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.11 GiB is "
            "free. Including non-PyTorch memory, this process has 77.99 GiB memory in use. Of the allocated memory ..."
        )

    monkeypatch.setattr(Method, "represent", full)
    cases = [
        (1, "undivided", "optim.accumulate=2 or more ranks, or free"),
        (4, "in 4 micro-batches", "optim.accumulate=8 or more ranks, or free"),
        (8, "in 8 micro-batches", "take more ranks, a smaller network, or a smaller data.batch_size"),
    ]
    for parts, divided, way_out in cases:
        words = rf"^CUDA out of memory.* is free, for a step of 16 pictures on this rank, {divided}: .*{way_out}"
        with pytest.raises(BadInput, match=words):
            pretrain.pretrain(options(few_digits, f"optim.accumulate={parts}", method="byol"), tmp_path)


def test_what_micro_batches_mean_is_said(few_digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="ssl_pipeline")
    for method, where in (("simclr", "outside of the head "), ("byol", "")):
        chosen = options(few_digits, "optim.accumulate=2", "max_steps=1", method=method)
        said = f"2 micro-batches of 8 on each rank: batch norm {where}sees 8 pictures at a time, the loss all 16"
        assert pretrain.consequences(chosen, 1)["batch per rank"] == f"16 on 1 rank, {said}"
        assert pretrain.pretrain(chosen, tmp_path / method) == Status.DONE
        assert f"accumulating {said}" in caplog.text


def test_a_run_of_an_older_version_goes_on(few_digits: Path, tmp_path: Path) -> None:
    assert pretrain.pretrain(options(few_digits, "max_steps=2"), tmp_path) == Status.DONE
    written = (tmp_path / "config.yaml").read_text()
    assert "nesterov: false" in written
    (tmp_path / "config.yaml").write_text(written.replace("  nesterov: false\n", ""))  # it had no such option
    with pytest.raises(BadInput, match="optim.nesterov: False there, True now"):
        pretrain.pretrain(options(few_digits, "max_steps=4", "optim.nesterov=true"), tmp_path)
    assert pretrain.pretrain(options(few_digits, "max_steps=4"), tmp_path) == Status.DONE
    assert (tmp_path / "config.yaml").read_text() == written.replace("max_steps: 2", "max_steps: 4")


def test_a_checkpoint_of_another_method_or_shape_is_refused(few_digits: Path, tmp_path: Path) -> None:
    pretrain.pretrain(options(few_digits, "max_steps=2"), tmp_path)
    changed = options(few_digits, "max_steps=4", method="byol")
    with pytest.raises(BadInput, match=r"(?s)belongs to another config: .*method.name: 'simclr' there, 'byol' now"):
        pretrain.pretrain(changed, tmp_path)
    # The same with config.yaml removed from the way: the checkpoint itself is asked.
    for other, words in (
        (changed, "checkpoint is of method simclr and the config of byol"),
        (options(few_digits, "max_steps=4", "head.output=16"), r"head.layers.0.weight is \(32, 64\), not \(16, 64\)"),
    ):
        (tmp_path / "config.yaml").write_text(config.dump_yaml(other.model_dump(mode="json")))
        with pytest.raises(BadInput, match=words):
            pretrain.pretrain(other, tmp_path)


def test_a_state_that_does_not_fit_is_refused_and_an_old_one_goes_on(few_digits: Path, tmp_path: Path) -> None:
    chosen = options(few_digits, "max_steps=2", "optim.name=adam")
    pretrain.pretrain(chosen, tmp_path)
    (file,) = (tmp_path / "checkpoints").iterdir()
    whole = checkpoint.read(file)
    assert (
        whole["config"]
        == chosen.model_dump(mode="json")
        == config.parse_yaml((tmp_path / "config.yaml").read_text(), "")
    )
    first = whole["optimizer"]["state"][0]
    groups = whole["optimizer"]["param_groups"]
    later = chosen.model_copy(update={"max_steps": 3})

    def with_first(**values: Any) -> dict[str, Any]:
        state = whole["optimizer"]["state"] | {0: {**first, **values}}
        return whole | {"optimizer": {"state": state, "param_groups": groups}}

    for state, words in (
        (with_first(exp_avg=torch.zeros(3)), r"optimizer: exp_avg of tensor 0 is \(3,\), not \("),
        (with_first(momentum_buffer=first["exp_avg"]), r"tensor 0 has .*'momentum_buffer', 'step'\], not \['exp_avg'"),
        (whole | {"optimizer": {"state": {}, "param_groups": groups[:1]}}, r"its groups \(name, tensors\) are \[\('"),
        (
            {key: value for key, value in whole.items() if key != "scaler"},
            "step 2 cannot be gone on from: it has no scaler; move ",
        ),
    ):
        torch.save(state, file)
        with pytest.raises(BadInput, match=words):
            pretrain.pretrain(later, tmp_path)
    # As an older version wrote it.
    torch.save({key: value for key, value in whole.items() if key != "config"}, file)
    assert pretrain.pretrain(later, tmp_path) == Status.DONE


def test_an_entry_that_does_not_fit_is_a_sentence_and_the_one_before_is_used(few_digits: Path, tmp_path: Path) -> None:
    tiny = ["precision=fp16", "backbone.stem=standard", "optim.name=adam"]
    chosen = options(
        few_digits, *tiny, "max_steps=4", "monitor.every_steps=2", "checkpoint.every_steps=1", "checkpoint.keep=3"
    )
    assert pretrain.pretrain(chosen, tmp_path) == Status.DONE
    checkpoint_file(tmp_path / "checkpoints", 4).unlink()
    file = checkpoint_file(tmp_path / "checkpoints", 3)  # between two logged steps
    whole = checkpoint.read(file)
    numbers = whole["monitor"]["sums"].shape[1]
    probe = whole["online"]
    for entry, value, words in (
        ("random", None, "it has no random"),
        ("random", 3, "its random does not fit: "),
        ("random", [3], "its random does not fit: "),
        ("random", whole["random"][:, :9], "its random does not fit: "),
        ("random", whole["random"].float(), "its random does not fit: "),
        ("monitor", {}, "its monitor has no 'sums'"),
        ("monitor", {"names": [], "sums": None, "in_a_row": "x"}, "its monitor does not fit: "),
        ("monitor", whole["monitor"] | {"sums": torch.zeros(1, 1)}, f"its monitor does not fit: 1 .* of {numbers}$"),
        ("monitor", whole["monitor"] | {"each": torch.zeros(1, 1, 2)}, "its monitor does not fit: 2 .* of 3$"),
        ("loader", None, "it has no loader"),
        ("loader", [], "its loader does not fit: "),
        ("loader", {"epoch": 0, "bad": {}}, "its loader has no 'consumed'"),
        ("loader", whole["loader"] | {"consumed": "x"}, "its loader does not fit: "),
        ("loader", whole["loader"] | {"bad": [3]}, "its loader does not fit: "),
        ("loader", whole["loader"] | {"rekeyed": [3]}, "its loader does not fit: "),
        ("online", {"model": probe["model"]}, "its online has no 'optimizer'"),
        ("online", probe | {"model": {}}, r"its online does not fit: Error\(s\) in loading state_dict"),
        ("online", probe | {"optimizer": whole["optimizer"]}, "its online does not fit: its groups "),
        ("alarms", 3, "its alarms does not fit: "),
        ("alarms", {"held": {"loss_rise": 3}}, "its alarms does not fit: "),
        ("alarms", {"first_loss": "x"}, "its alarms does not fit: "),
        ("scaler", {}, "its scaler has no 'scale'"),
        ("scaler", whole["scaler"] | {"scale": "x"}, "its scaler does not fit: "),
        ("scaler", whole["scaler"] | {"_growth_tracker": torch.zeros(3)}, "its scaler does not fit: "),
        ("model", 3, "its model does not fit: "),
    ):  # fmt: skip
        torch.save(
            {key: old for key, old in whole.items() if key != entry} | ({} if value is None else {entry: value}), file
        )
        with pytest.raises(BadInput) as refused:
            pretrain.pretrain(chosen, tmp_path)
        told, _, out = str(refused.value).partition("; move ")
        assert re.match("the checkpoint of step 3 cannot be gone on from: " + words, told)
        assert out == "step_00000003.pt away, and the same command goes on from the one before"
    file.rename(tmp_path / "away")
    assert pretrain.pretrain(chosen, tmp_path) == Status.DONE
    assert [event["step"] for event in read_lines(tmp_path / "jobs.jsonl") if event["event"] == "start"][-1] == 2
    assert [row["step"] for row in series(tmp_path)] == [2, 4]


# ---------------------------------------------------------------------------------------------- saves in the background
def at_step(monkeypatch: pytest.MonkeyPatch, actions: dict[int, Callable[[], object]]) -> None:
    """Call an action at the end of a step's computation, before the saves that are due after it."""
    add = monitor.Monitor.add
    steps = itertools.count(1)

    def acting(self: Any, *args: Any) -> None:
        add(self, *args)
        actions.get(next(steps), lambda: None)()

    monkeypatch.setattr(monitor.Monitor, "add", acting)


def test_checkpoints_written_late_hold_their_step(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = ["checkpoint.every_steps=2", "checkpoint.keep=9", "optim.name=adam", "optim.learning_rate=1e-3"]
    chosen = options(few_digits, *often, "max_steps=7", method="byol")
    assert pretrain.pretrain(chosen, tmp_path / "quiet") == Status.DONE
    go = threading.Semaphore(0)
    write = checkpoint.write

    def late(*args: Any) -> Path:
        assert go.acquire(timeout=60)
        return write(*args)

    monkeypatch.setattr(checkpoint, "write", late)
    # Each when the step after the save is done; that of step 7 is waited for.
    at_step(monkeypatch, {3: go.release, 5: go.release, 7: lambda: go.release(2)})
    assert pretrain.pretrain(chosen, tmp_path / "late") == Status.DONE
    for step in (2, 4, 6, 7):
        one, other = (
            checkpoint.read(checkpoint_file(tmp_path / name / "checkpoints", step)) for name in ("quiet", "late")
        )
        assert one["loader"] == other["loader"]
        assert torch.equal(one["random"], other["random"])
        moments = [
            {(p, n): v for p, s in state["optimizer"]["state"].items() for n, v in s.items()} for state in (one, other)
        ]
        for a, b in ((one["model"], other["model"]), moments):
            assert a.keys() == b.keys()
            assert all(torch.equal(value, b[name]) for name, value in a.items())
    rows = read_lines(tmp_path / "late" / "metrics.jsonl")
    assert [row["checkpoint_stall"] > 0 for row in rows] == [False, False, True, False, True, False, True]


@pytest.mark.parametrize("mended", [True, False])
def test_a_disk_that_fills_up_ends_the_run_after_three_saves_and_not_before(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mended: bool
) -> None:
    run, ballast = tmp_path / "disk" / "run", tmp_path / "disk" / "ballast"
    chosen = options(few_digits, "monitor.tensorboard=true", "checkpoint.every_steps=2", "max_steps=10")

    def fill() -> None:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**12))

    at_step(monkeypatch, {3: fill, 7: ballast.unlink if mended else fill})
    with small_disk(tmp_path / "disk", 2**22):
        if mended:
            assert pretrain.pretrain(chosen, run) == Status.DONE
        else:
            with pytest.raises(StorageFailure, match="No space left on device; free room .* give the same command"):
                pretrain.pretrain(chosen, run)
        told = [record.getMessage() for record in caplog.records]
        failed = [text for text in told if "cannot write" in text and "in a row that failed" in text]
        assert len(failed) == 2
        assert all("No space left on device; free room there" in text for text in failed)
        assert ["(save 1 of 3" in failed[0], "(save 2 of 3" in failed[1]] == [True, True]
        assert any("metrics.jsonl: [Errno 28] No space left on device; what it lacks" in text for text in told)
        assert saved_steps(run / "checkpoints") == ([8, 10] if mended else [2])
        ballast.unlink(missing_ok=True)
        assert not [path for path in run.rglob(".*") if path.name != ".lock"]
        if not mended:
            monkeypatch.undo()
            assert pretrain.pretrain(chosen, run) == Status.DONE
        assert [row["step"] for row in series(run)] == list(range(1, 11))


def test_a_refused_save_at_a_signal_is_no_stop(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = options(few_digits, "checkpoint.every_steps=2", "max_steps=10")
    with as_a_process(), contextlib.ExitStack() as limit:
        at_step(
            monkeypatch,
            {3: lambda: limit.enter_context(file_limit(15_000)), 5: lambda: signal.raise_signal(signal.SIGTERM)},
        )
        with pytest.raises(StorageFailure, match="backbone.pth: File too large.*give the same command again"):
            pretrain.pretrain(chosen, tmp_path)
    first, second = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "training goes on" in first  # after step 4
    assert "trying once more" in second  # after step 6, which no save would follow
    assert saved_steps(tmp_path / "checkpoints") == [2]


def test_a_disk_without_room_is_refused_before_the_first_step(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(StorageFailure, match="the checkpoints of this run need"):
        pretrain.pretrain(options(few_digits), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_too_many_bad_pictures_stop_the_run_with_the_list(
    few_digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(few_digits, tmp_path / "d")
    for path in sorted((tmp_path / "d" / "train" / "3").glob("*.png"))[:8]:
        path.write_bytes(b"no picture")
    with pytest.raises(
        BadInput, match=r"of 160 pictures in .* are unreadable, more than data.max_bad_fraction = 0.01.*3/0"
    ):
        pretrain.pretrain(options(tmp_path / "d", "monitor.every_steps=4"), tmp_path / "run")
    allowed = options(tmp_path / "d", "data.max_bad_fraction=0.1", "epochs=1", "max_steps=null")
    assert pretrain.pretrain(allowed, tmp_path / "run2") == Status.DONE
    assert series(tmp_path / "run2")[-1]["bad_pictures"] == 8
    last = [line for line in caplog.messages if line.startswith("8 unreadable: ")]
    assert len(last) == 1  # the list at the end of the run
    assert last[0].count("3/0") == 8


def test_a_run_over_the_limit_goes_on_once_the_files_are_mended(
    few_digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """However late the limit is looked at: no checkpoint holds what is over it, and what one holds is asked again."""
    shutil.copytree(few_digits, tmp_path / "d")
    chosen = options(tmp_path / "d", "monitor.every_steps=50", "checkpoint.every_steps=1", "max_steps=8")
    begun = chosen.model_copy(update={"max_steps": 2})
    assert pretrain.pretrain(begun, tmp_path / "run") == Status.DONE
    spoiled = [path for digit in "345" for path in sorted((tmp_path / "d" / "train" / digit).glob("*.png"))]
    for path in spoiled:
        path.write_bytes(b"")
    with pytest.raises(BadInput, match=r"of 160 pictures in .* are unreadable"):
        pretrain.pretrain(chosen, tmp_path / "run")
    newest = checkpoint.read_newest(tmp_path / "run" / "checkpoints")
    assert len(newest["loader"]["bad"]) <= 1
    for path in spoiled:
        shutil.copyfile(few_digits / path.relative_to(tmp_path / "d"), path)
    # As an older version left it.
    newest["loader"]["bad"] = dict.fromkeys(range(48, 96), "the file is empty")
    checkpoint.write(tmp_path / "run" / "checkpoints", newest, 3)
    assert pretrain.pretrain(chosen, tmp_path / "run") == Status.DONE
    assert checkpoint.read_newest(tmp_path / "run" / "checkpoints")["loader"]["bad"] == {}
    assert caplog.text.count("can be read now, and take part again from here: 3/") == 1


def test_a_storage_that_went_away_is_gone_on_from(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = options(few_digits, "max_steps=8", "checkpoint.every_steps=1")
    assert pretrain.pretrain(chosen, tmp_path / "whole") == Status.DONE
    monkeypatch.setattr(loading, "OF_TIMEOUT", 0.2 / chosen.distributed.timeout)
    read, count = loading.Index.read, itertools.count()

    def away(index: Any, sample: int) -> Any:
        if next(count) >= 90:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(index, sample)

    with monkeypatch.context() as outage:
        outage.setattr(loading.Index, "read", away)
        with pytest.raises(StorageFailure, match="Stale file handle, nor others, for 0 s: .* the same command goes on"):
            pretrain.pretrain(chosen, tmp_path / "run")
    saved = checkpoint.read_newest(tmp_path / "run" / "checkpoints")
    assert saved["step"] >= 1
    assert saved["loader"]["bad"] == {}
    assert pretrain.pretrain(chosen, tmp_path / "run") == Status.DONE
    assert_same_run(tmp_path / "whole", tmp_path / "run")


# ------------------------------------------------------------------------------------------------------- its pictures
def test_a_run_goes_on_with_the_shards_of_its_folder_and_back(few_digits: Path, tmp_path: Path) -> None:
    pack(few_digits, tmp_path / "shards", processes=1)
    ends = {"folder": few_digits, "shards": tmp_path / "shards"}
    chosen = {name: options(root, "max_steps=12") for name, root in ends.items()}
    assert pretrain.pretrain(chosen["folder"], tmp_path / "whole") == Status.DONE
    for end, name in ((3, "folder"), (8, "shards"), (12, "folder")):
        part = chosen[name].model_copy(update={"max_steps": end})
        assert pretrain.pretrain(part, tmp_path / "parts") == Status.DONE
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_other_pictures_than_those_it_was_begun_with_are_refused(few_digits: Path, tmp_path: Path) -> None:
    shutil.copytree(few_digits, tmp_path / "d")
    begun = options(tmp_path / "d", "max_steps=2")
    assert pretrain.pretrain(begun, tmp_path / "run") == Status.DONE
    further = begun.model_copy(update={"max_steps": 4})
    first = min((tmp_path / "d" / "train" / "0").iterdir())
    first.rename(tmp_path / "away.png")
    with pytest.raises(BadInput, match=r"d/train' are not those .*\(160 pictures, \w+ then, 159 pictures, \w+ now\)"):
        pretrain.pretrain(further, tmp_path / "run")
    (tmp_path / "away.png").rename(first)
    assert pretrain.pretrain(further, tmp_path / "run") == Status.DONE
    (tmp_path / "d" / "train" / "0").rename(tmp_path / "zero")
    (tmp_path / "d" / "train" / "0").mkdir()
    with pytest.raises(BadInput, match=r"train/0' holds no pictures .*: put back those that the run was begun with$"):
        pretrain.pretrain(further, tmp_path / "run")
    with pytest.raises(BadInput, match=r"train/0' holds no pictures .*: fill it or remove it$"):
        pretrain.pretrain(further, tmp_path / "fresh")
    (tmp_path / "d" / "train" / "0").rmdir()
    (tmp_path / "zero").rename(tmp_path / "d" / "train" / "0")
    # Nor is a finished run said to be one of other pictures, on which its evaluations would then be made.
    shutil.rmtree(tmp_path / "d" / "val")
    shutil.copytree(tmp_path / "d", tmp_path / "other")
    (tmp_path / "other" / "train" / "0").rename(tmp_path / "other" / "train" / "x")
    with pytest.raises(BadInput, match="other/train' are not those"):
        pretrain.pretrain(options(tmp_path / "other", "max_steps=4"), tmp_path / "run")
    assert f"root: {tmp_path / 'd'}\n" in (tmp_path / "run" / "config.yaml").read_text()
    shutil.copytree(tmp_path / "d", tmp_path / "same")
    assert pretrain.pretrain(options(tmp_path / "same", "max_steps=4"), tmp_path / "run") == Status.DONE
    assert f"root: {tmp_path / 'same'}\n" in (tmp_path / "run" / "config.yaml").read_text()
