"""torch.compile and CUDA graphs in the real loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ssl_pipeline import checkpoint, compute
from ssl_pipeline.exits import BadInput
from tests.gpu.test_loop import run, tiny


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_run_is_the_uncompiled_one(
    device: torch.device,
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    record_property: Callable[[str, object], None],
) -> None:
    """`compute.compile`: the loss after a few steps, the names of what is saved, and going on either way."""
    try:
        compute.require_compiler(compute.Options(compile=mode), device)  # type: ignore[arg-type]
    except BadInput as lacking:
        pytest.skip(str(lacking))
    if device.type == "cpu":  # without the code generator, which takes a CPU half a minute
        compile = nn.Module.compile
        monkeypatch.setattr(nn.Module, "compile", lambda self, mode, **more: compile(self, backend="aot_eager", **more))
    own = ["precision=fp32", "monitor.every_steps=4", "backbone.stem=small"]
    compiled = f"compute.compile={mode}"
    plain = run(tiny(small, "simclr", *own, "max_steps=8"), tmp_path / "plain")
    start = time.perf_counter()
    fused = run(tiny(small, "simclr", *own, compiled, "max_steps=8"), tmp_path / "compiled")
    record_property(f"start of compile={mode}", f"{time.perf_counter() - start:.1f} s")
    for a, b in zip(plain, fused, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-2)
    saved = [checkpoint.read_newest(tmp_path / name / "checkpoints") for name in ("plain", "compiled")]
    assert saved[0]["model"].keys() == saved[1]["model"].keys()
    losses = [
        run(tiny(small, "simclr", *own, *given, "max_steps=12"), tmp_path / name)[-1]["loss"]
        for name, given in (("plain", [compiled]), ("compiled", []))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
