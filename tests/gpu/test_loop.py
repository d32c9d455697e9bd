"""The real loop on the device, with torch's views so that it needs no DALI: precision, skipped steps, waits, resuming."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.torch_views import TorchLoader, loading_with
from ssl_pipeline import checkpoint, config, distributed, methods, monitor, optim, pretrain
from ssl_pipeline.data.loader import Loader
from ssl_pipeline.exits import Status
from ssl_pipeline.methods import Method
from ssl_pipeline.monitor import TIME_KEYS
from ssl_pipeline.pretrain import PretrainConfig
from ssl_pipeline.run_folder import read_lines

METHODS: dict[str, list[str]] = {
    "simclr": [],
    "byol": ["method={name: byol, predictor_hidden: 64}"],
    "barlow_twins": ["method={name: barlow_twins}", "optim.name=lars", "optim.learning_rate=0.1"],
    "simsiam": ["method={name: simsiam, predictor_hidden: 16}", "head.output_norm=plain", "head.output_bias=false"],
    "vicreg": ["method={name: vicreg}", "head.sparse={weight: 1e-3, schedule: adaptive}"],
    "w_mse": ["method={name: w_mse, w_size: 16}", "head.output=8", "head.sparse={weight: 1e-3, mode: proximal}"],
    "ssl_hsic": ["method={name: ssl_hsic, predictor_hidden: 64}", "optim.name=adam", "optim.learning_rate=1e-3"],
    # Two batches in the queue, in use from step 3 on; prototypes that rest until step 4.
    "swav": ["method={name: swav, prototypes: 20, queue_length: 32, queue_start_epoch: 0, freeze_prototypes_steps: 4}"],
}


def tiny(root: Path, method: str, *overrides: str) -> PretrainConfig:
    """A tiny run of ten steps an epoch."""
    view = (
        "[{count: 2, size: 32, ops: [{op: crop_resize}, {op: flip}, {op: jitter}, {op: gray}, {op: blur}, "
        "{op: solarize}, {op: normalize}]}]"
    )
    common = [
        f"data.root={root}", "data.batch_size=16", f"data.views={view}", "monitor.tensorboard=false", "epochs=3",
        "optim.warmup_epochs=0", "channels_last=true", "backbone.stem=standard",
    ]  # fmt: skip
    tree = config.load("smoke", common)
    if METHODS[method]:
        del tree.values["method"]
        config.apply_overrides(tree, METHODS[method])
    config.apply_overrides(tree, overrides)
    return config.validate(PretrainConfig, tree.values, tree)


def run(chosen: PretrainConfig, output: Path, kind: type[Loader] = TorchLoader) -> list[dict[str, Any]]:
    """The rows that a run logs."""
    with loading_with(kind):
        assert pretrain.pretrain(chosen, output) == Status.DONE
    return read_lines(output / "metrics.jsonl")


def half_precisions(device: torch.device) -> list[str]:
    return ["bf16", "fp16"] if device.type == "cpu" or torch.cuda.is_bf16_supported(False) else ["fp16"]


# ------------------------------------------------------------------------------------------------------------ precision
@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_in_half_precision_are_finite(
    device: torch.device, small: Path, tmp_path: Path, method: str
) -> None:
    for precision in half_precisions(device):
        if precision == "fp16" and device.type == "cpu" and method != "simclr":
            continue  # a CPU is slow in it
        words = [f"precision={precision}", "max_steps=20", "monitor.every_steps=10"]
        rows = run(tiny(small, method, *words), tmp_path / precision)
        losses = [row["loss"] for row in rows if "loss" in row]
        assert len(losses) == 2
        assert all(loss is not None for loss in losses)
        # fp16 finds its scale by skipping the first steps, of an initial 65536.
        assert sum(row["skipped"] for row in rows if "skipped" in row) <= (8 if precision == "fp16" else 0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_that_is_not_finite_leaves_every_bit(
    device: torch.device, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    if precision not in half_precisions(device):
        pytest.skip("this GPU has no bf16")
    built: list[Any] = []
    seen: list[list[Tensor]] = []
    forward, build, add = Method.forward, optim.build, monitor.Monitor.add

    def remember(*args: Any, **kwargs: Any) -> Any:
        built.append(build(*args, **kwargs))
        return built[-1]

    def infinite(self: Method, *args: Any, **kwargs: Any) -> methods.Output:
        output = forward(self, *args, **kwargs)
        if self.progress.step == 15:
            output.loss = output.loss * float("inf")
        return output

    def snapshot(self: monitor.Monitor, *args: Any) -> None:
        add(self, *args)
        optimizer = built[-1]
        state = [v for values in optimizer.state.values() for v in values.values()]
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append([value.detach().clone() for value in (*weights, *state, *method[-1].buffers())])

    method: list[Method] = []
    made = pretrain.build_method

    def keep(chosen: PretrainConfig) -> Method:
        method.append(made(chosen))
        return method[-1]

    monkeypatch.setattr(pretrain, "build_method", keep)
    monkeypatch.setattr(optim, "build", remember)
    monkeypatch.setattr(Method, "forward", infinite)
    monkeypatch.setattr(monitor.Monitor, "add", snapshot)
    rows = run(tiny(small, "byol", f"precision={precision}", "max_steps=20", "monitor.every_steps=1"), tmp_path)
    assert rows[15]["skipped"] == 1
    assert rows[14]["skipped"] == rows[16]["skipped"] == 0
    same, moved = (
        [torch.equal(a, b) for a, b in zip(seen[n], seen[n + 1], strict=True)] for n in (14, 15)
    )  # before and after step 15, and after step 16
    assert all(same)
    assert not all(moved)


# ---------------------------------------------------------------------------------------------- no wait for the device
class Waits:
    """torch's own alarm for waits, set off after the first step and silent where waiting is meant: the places of all."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.steps = 0
        self.found: list[str] = []

    def set(self, mode: str | int) -> str | int:
        if not self.on_gpu:
            return "default"
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode(mode)
        return before

    def excused(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            before = self.set("default")
            try:
                return original(*args, **kwargs)
            finally:
                self.set(before)

        return wrapper

    @contextlib.contextmanager
    def looked_for(self) -> Iterator[None]:
        """Not by the mode `error`, which would show the first place alone."""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                yield
            finally:
                self.set("default")
        waits = [one for one in told if "called a synchronizing" in str(one.message)]
        self.found = sorted({f"{Path(one.filename).name}:{one.lineno}" for one in waits})

    def after_the_first_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for owner, name in (
            (monitor.Monitor, "log"), (monitor.Monitor, "state_dict"), (monitor.Monitor, "show_views"),
            (checkpoint.Writer, "save"), (torch.amp.GradScaler, "state_dict"), (distributed, "gather_values"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, self.excused(getattr(owner, name)))
        add = monitor.Monitor.add

        def after_a_step(watch: monitor.Monitor, *args: Any) -> None:
            add(watch, *args)
            self.steps += 1
            self.set("warn")

        monkeypatch.setattr(monitor.Monitor, "add", after_a_step)


@pytest.mark.parametrize("method", METHODS)
def test_no_step_waits_for_the_device(
    device: torch.device, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """torch.cuda.set_sync_debug_mode over steps 2 to 21. Without a GPU torch has no such mode and all passes: there
    tests/test_pretrain.py looks for the same by other means."""
    waits = Waits(device)
    waits.after_the_first_step(monkeypatch)
    precision = half_precisions(device)[0]
    with waits.looked_for():
        run(tiny(small, method, f"precision={precision}", "max_steps=21", "monitor.every_steps=1000"), tmp_path)
    assert waits.steps == 21
    assert waits.found == []


def test_a_wait_would_be_seen(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("torch.cuda.set_sync_debug_mode is a GPU's")
    waits = Waits(device)
    with waits.looked_for():
        waits.set("warn")
        torch.ones((), device=device).item()
        torch.ones(3).to(device)
        torch.ones(3, device=device).sum()
    assert len(waits.found) == 2


# ----------------------------------------------------------------------------------------------- stopped and gone on with
def everything(run_folder: Path) -> dict[str, Any]:
    """All that a run leaves, tensors as bytes."""

    def bits(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, (dict, list, tuple)):
            for key, one in value.items() if isinstance(value, dict) else enumerate(value):
                yield from bits(one, f"{name}/{key}")
        elif isinstance(value, Tensor):
            yield name, (value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes())
        else:
            yield name, value

    state = checkpoint.read_newest(run_folder / "checkpoints")
    rows = [{k: v for k, v in row.items() if k not in TIME_KEYS} for row in read_lines(run_folder / "metrics.jsonl")]
    return dict(bits({"checkpoint": state, "rows": rows}, ""))


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """What a run on a GPU must ask of torch to be repeatable to the last bit (docs/gpu.md), beside what the environment
    variable in conftest.py asks of cuBLAS. Max-pooling's gradient has no repeatable kernel, so only warnings are asked for,
    and these runs have a stem without it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = benchmark


RESUMED: dict[str, list[str]] = {
    "simclr": ["precision=fp16", "optim.name=adam", "optim.learning_rate=1e-3", "data.views.0.size=16"],
    "barlow_twins": ["precision=fp32"],
    "byol": ["backbone.arguments.drop_path_rate=0.3", "optim.accumulate=2"],  # the device's own random numbers
    "swav": [],
    "ssl_hsic": [],
}


@pytest.mark.parametrize("method", RESUMED)
def test_stopped_and_resumed_is_not_stopped_to_the_last_bit(
    device: torch.device, small: Path, tmp_path: Path, method: str
) -> None:
    own = [f"precision={half_precisions(device)[0]}", "backbone.stem=small", *RESUMED[method], "monitor.every_steps=4"]
    with deterministic():
        run(tiny(small, method, *own, "max_steps=12"), tmp_path / "whole")
        for end in (7, 12):
            run(tiny(small, method, *own, f"max_steps={end}"), tmp_path / "parts")
    whole, parts = everything(tmp_path / "whole"), everything(tmp_path / "parts")
    different = sorted(name for name in {**whole, **parts} if whole.get(name, ...) != parts.get(name, ...))
    rows = [name for name in different if name.startswith("/rows")]
    # The run of two parts logged its seventh step too.
    assert [name for name in different if name not in rows] == [], f"{len(different)} entries differ"
    last = [[v for k, v in one.items() if k.startswith("/rows") and k.endswith("/loss")][-1] for one in (whole, parts)]
    assert last[0] == last[1]


def test_a_checkpoint_in_the_background_is_of_its_step(
    device: torch.device, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The step waits for the copy alone, and what is written is what was, although training goes on."""
    size = 4096 if device.type == "cuda" else 256
    model = nn.Sequential(*(nn.Linear(size, size) for _ in range(4))).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)
    x = torch.randn(64, size, device=device)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    writing, go_on = threading.Event(), threading.Event()

    def slowly(_: Any) -> None:  # until training has gone on
        writing.set()
        assert go_on.wait(60)

    stalls = []
    with checkpoint.Writer(tmp_path, keep=3, max_failed=3) as writer:
        for number in range(1, 4):
            step()
            expected = {name: value.detach().clone() for name, value in model.state_dict().items()}
            state = {"step": number, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            go_on.clear()
            writing.clear()
            start = time.perf_counter()
            writer.save(state, first=slowly)
            stalls.append(time.perf_counter() - start)
            assert writing.wait(60)
            for _ in range(3):
                step()
            assert not torch.equal(model.state_dict()["0.weight"], expected["0.weight"])
            go_on.set()
            writer.wait()
            found = checkpoint.read(checkpoint.checkpoint_file(tmp_path, number))
            for name, value in expected.items():
                assert torch.equal(found["model"][name], value.cpu())
    megabytes = checkpoint.state_bytes(state) / 1e6
    record_property(
        "checkpoint stall", f"{1e3 * stalls[0]:.1f} ms at first, then {1e3 * stalls[-1]:.1f} ms, of {megabytes:.0f} MB"
    )


# ---------------------------------------------------------------------------------------------------------------- DALI
def test_the_loop_trains_on_dalis_views(device: torch.device, small: Path, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI, which is not installed")
    precision = f"precision={half_precisions(device)[0]}"
    with_dali, without = (
        [
            row["loss"]
            for row in run(tiny(small, "simclr", precision, "max_steps=21", "monitor.every_steps=7"), to, kind)
        ]
        for to, kind in ((tmp_path / "dali", Loader), (tmp_path / "torch", TorchLoader))
    )
    for a, b in itertools.zip_longest(with_dali, without):  # the same pictures, but for their decoding and rounding
        assert a == pytest.approx(b, rel=0.05)
