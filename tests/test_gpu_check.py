"""`make gpu-check` without a GPU: that all of it runs, and what it says of parts that do not."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import gpu
from benchmarks.gpu import FAILED, NO_GPU, PASSED, SKIPPED, Part
from ssl_pipeline import backbone, checkpoint, distributed
from ssl_pipeline.methods.barlow_twins import barlow_twins_loss

ROOT = Path(__file__).parents[1]
MACHINE = {"gpu": "NVIDIA H100 80GB HBM3", "memory": "80 GiB", "cores": 16, "versions": {"torch": "2"}}


def arguments(output: Path, **others: object) -> argparse.Namespace:
    given = {"device": "cuda", "tiny": False, "minutes": 5.0, "data": None, "output": output, "only": None}
    return argparse.Namespace(**given | others)


def part(name: str, program: str, seconds: int = 60, needs: tuple[str, ...] = ()) -> Part:
    return Part(name, "a program", seconds, needs, ("-c", program), least=1)


CUT = """
import os, sys
file = next(word for word in sys.argv if word.startswith("--junit-xml=")).split("=", 1)[1]
open(file, "w").write("<testsuites><testcase name='one'>")
os.kill(os.getpid(), 9)
"""


def test_each_part_fails_alone_and_absent_packages_are_named(tmp_path: Path) -> None:
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import pytest\ndef test_good(record_property): record_property('stall', '3 ms')\n"
        "def test_bad(): assert 1 == 2\ndef test_none(): pytest.skip('no such thing here')\n"
    )
    parts = [
        part("good", "print('fine')"),
        part("broken", "raise RuntimeError('the reason')"),
        part("killed", "import os; os.kill(os.getpid(), 9)"),
        part("hung", "import time; print('here', flush=True); time.sleep(60)", seconds=2),
        part("absent", "raise AssertionError", needs=("no_such_package.inner", "torch")),
        Part("tests", "some", 60, (), ("-m", "pytest", "--confcutdir", str(tmp_path), str(tests)), least=1),
        Part(
            "nothing", "some", 60, (), ("-m", "pytest", "--confcutdir", str(tmp_path), f"{tests}::test_none"), least=1
        ),
        # A report that ends where the part was killed.
        Part("cut", "some", 60, (), ("-c", CUT, "pytest"), least=1),
        Part("late", "nothing", 60, (), ("-c", ""), least=3000),
    ]
    found = {result.part: result for result in gpu.check(parts, arguments(tmp_path), MACHINE, time.monotonic())}
    states = {name: result.state for name, result in found.items()}
    assert states == {
        "good": PASSED, "broken": FAILED, "killed": FAILED, "hung": FAILED, "absent": SKIPPED, "tests": FAILED,
        "nothing": SKIPPED, "cut": FAILED, "late": SKIPPED,
    }  # fmt: skip
    assert found["broken"].tail[-1] == "RuntimeError: the reason"
    assert found["killed"].why == "exit status -9"
    assert found["hung"].why == "it was stopped after its time"
    assert found["hung"].tail == ["here"]
    assert found["nothing"].why == "no such thing here"
    assert (found["cut"].why, found["cut"].tests) == ("exit status -9", [])
    assert found["absent"].why.startswith("no_such_package.inner is not installed (pip install no_such_package")
    assert found["late"].why.startswith("out of time")
    assert [test["state"] for test in found["tests"].tests] == [PASSED, FAILED, SKIPPED]
    assert found["tests"].why == "exit status 1, test_bad"
    page = (tmp_path / "gpu_nvidia_h100_80gb_hbm3.md").read_text()
    assert "| stall | 3 ms |" in page
    assert "- FAILED tests: `test_bad`: assert 1 == 2" in page
    assert "- SKIPPED tests: `test_none`: no such thing here" in page
    written = json.loads((tmp_path / "gpu_nvidia_h100_80gb_hbm3.json").read_text())
    assert [one["state"] for one in written["parts"]] == list(states.values())


def test_without_a_gpu_and_without_pydantic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner itself needs the standard library and torch."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    program = (
        "import sys; sys.modules['pydantic'] = None; from benchmarks import gpu; "
        f"sys.exit(gpu.main(['--output', {str(tmp_path)!r}, '--device', sys.argv[1], '--only', 'losses']))"
    )
    for device, status, words in (("cuda", 2, "torch sees no GPU here"), ("cpu", 2, "pydantic is not installed")):
        line = [sys.executable, "-c", program, device]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == status, done.stderr
        assert words in done.stdout + done.stderr
    assert "1 parts; 1 skipped: losses" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["gpu_some.md"]  # the whole of it is left as it is


def test_without_torch_and_without_data(tmp_path: Path) -> None:
    """One sentence each, and a status that is no failed part's."""
    line = [sys.executable, "-S", str(ROOT / "benchmarks" / "gpu.py")]  # without site-packages
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(line, cwd=tmp_path, env=bare, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{sys.executable} has no torch: name a Python that has it, make gpu-check PYTHON=...\n"
    line = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--data", "~/no_such_folder"]
    home = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(line, cwd=tmp_path, env=home, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"gpu.py: error: {tmp_path}/no_such_folder is no folder: --data")


def test_all_of_it_ends_in_time_and_takes_what_it_started_along(tmp_path: Path) -> None:
    """Where a part started a process of its own, and where the time before the first part counts too."""
    started = tmp_path / "started"
    program = (
        "import subprocess, time; from pathlib import Path; child = subprocess.Popen(['sleep', '60']); "
        f"Path({str(started)!r}).write_text(str(child.pid)); time.sleep(60)"
    )
    given = arguments(tmp_path, minutes=(gpu.RESERVE + 6) / 60)
    (first, second) = gpu.check([part("hung", program), part("next", "")], given, MACHINE, time.monotonic() - 3)
    assert (first.state, first.why, second.state) == (FAILED, "it was stopped after its time", SKIPPED)
    assert first.seconds < 5
    state = Path("/proc", started.read_text(), "stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_page_of_tiny_sizes_says_so(tmp_path: Path) -> None:
    gpu.check([part("good", "")], arguments(tmp_path, tiny=True, only=["good"]), MACHINE, time.monotonic())
    page = (tmp_path / "gpu_nvidia_h100_80gb_hbm3_tiny_some.md").read_text()
    assert "Its numbers say nothing" in page


def test_peaks_by_name() -> None:
    assert gpu_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert gpu_peak("NVIDIA H100 PCIe") == 756e12
    assert gpu_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert gpu_peak("Tesla V100-SXM2-16GB") == 125e12
    assert gpu_peak("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert gpu_peak("NVIDIA GeForce GTX 1080") is None


def gpu_peak(name: str) -> float | None:
    from benchmarks.gpu_measurements import peak_of

    return peak_of(name)


def test_the_official_loop_has_our_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, of the same weights: what Barlow Twins' step is timed against does the same work."""
    from benchmarks import gpu_measurements

    distributed.start()
    options = gpu_measurements.recipe("imagenet/barlow_twins", gpu_measurements.pictures_of(tmp_path, 32), 8, True)
    views = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    losses: list[torch.Tensor] = []
    backward, autocast = torch.Tensor.backward, torch.autocast
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: losses.append(self.detach()) or backward(self))
    monkeypatch.setattr(torch, "autocast", lambda device, **_: autocast(device, enabled=False))
    torch.manual_seed(1)
    step = gpu_measurements.official_barlow_twins(options, views, torch.device("cpu"))
    for _ in range(2):
        step()
    torch.manual_seed(1)  # the same weights, made in the same order
    network, hidden = backbone.build(options.backbone), options.head.hidden
    layers: list[nn.Module] = []
    for wide in (backbone.width(network), hidden):
        layers += [nn.Linear(wide, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
    projector = nn.Sequential(*layers, nn.Linear(hidden, options.head.output, bias=False))
    expected = barlow_twins_loss(*(projector(network(view)) for view in views), 0.0051)
    torch.testing.assert_close(losses[0], expected.detach(), rtol=1e-4, atol=0)
    assert losses[1] != losses[0]  # it trains


def test_no_save_falls_into_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The epochs of the pictures that throughput is measured on are of four steps."""
    from benchmarks import gpu_measurements

    saved: list[object] = []
    monkeypatch.setattr(checkpoint.Writer, "save", lambda *given, **named: saved.append(given))
    found = list(gpu_measurements.throughput("simclr", argparse.Namespace(tiny=True), official=False))
    assert len(found) == 9
    assert saved == []


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    line = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--tiny", "--minutes", "14",
            "--output", str(tmp_path)]  # fmt: skip
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=850, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    page = (tmp_path / "gpu.md").read_text()
    cells = [line.strip("| ").split(" | ") for line in page.splitlines()]
    parts = [cell[2] for cell in cells if len(cell) == 3 and cell[2] != "state"]
    assert len(parts) == len(gpu.PARTS)
    assert [state for state in parts if not state.startswith(NO_GPU)] == []
    committed = (ROOT / "benchmarks" / "results" / "gpu.md").read_text()
    assert measured(page) == measured(committed), "make the page anew: benchmarks/gpu.py --device cpu --tiny"


def measured(page: str) -> set[str]:
    """The numbers that a page has a row for."""
    return {line.split(" | ")[0] for line in page.splitlines() if line.endswith(f"| {NO_GPU} |")}
