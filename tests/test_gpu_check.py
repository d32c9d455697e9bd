"""`make gpu-check` without a GPU: that all of it runs, and what it says of parts that do not."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import FAILED, NO_GPU, PASSED, SKIPPED, Part

ROOT = Path(__file__).parents[1]
MACHINE = {"gpu": "NVIDIA H100 80GB HBM3", "memory": "80 GiB", "cores": 16, "versions": {"torch": "2"}}


def arguments(output: Path, **others: object) -> argparse.Namespace:
    given = {"device": "cuda", "tiny": True, "minutes": 5.0, "data": None, "output": output}
    return argparse.Namespace(**given | others)


def part(name: str, program: str, seconds: int = 60, needs: tuple[str, ...] = ()) -> Part:
    return Part(name, "a program", seconds, needs, ("-c", program), least=1)


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
        Part("late", "nothing", 60, (), ("-c", ""), least=3000),
    ]
    found = {result.part: result for result in gpu.check(parts, arguments(tmp_path), MACHINE)}
    states = {name: result.state for name, result in found.items()}
    assert states == {
        "good": PASSED, "broken": FAILED, "killed": FAILED, "hung": FAILED, "absent": SKIPPED, "tests": FAILED,
        "late": SKIPPED,
    }  # fmt: skip
    assert found["broken"].tail[-1] == "RuntimeError: the reason"
    assert found["killed"].why == "exit status -9"
    assert found["hung"].why == "it was stopped after its time"
    assert found["hung"].tail == ["here"]
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
    for device, status, words in (("cuda", 2, "torch sees no GPU here"), ("cpu", 0, "pydantic is not installed")):
        line = [sys.executable, "-c", program, device]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == status, done.stderr
        assert words in done.stdout + done.stderr


def test_peaks_by_name() -> None:
    assert gpu_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert gpu_peak("NVIDIA H100 PCIe") == 756e12
    assert gpu_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert gpu_peak("Tesla V100-SXM2-16GB") == 125e12
    assert gpu_peak("NVIDIA GeForce GTX 1080") is None


def gpu_peak(name: str) -> float | None:
    from benchmarks.gpu_measurements import peak_of

    return peak_of(name)


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    line = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--tiny", "--minutes", "14",
            "--output", str(tmp_path)]  # fmt: skip
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=850, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    page = (tmp_path / "gpu.md").read_text()
    states = [line.split(" | ")[2].removesuffix(" |") for line in page.splitlines() if line.startswith("| ")]
    parts = [state for state in states if state != "state"][: len(gpu.PARTS)]
    assert [state for state in parts if not state.startswith(NO_GPU)] == []
    committed = (ROOT / "benchmarks" / "results" / "gpu.md").read_text()
    assert measured(page) == measured(committed), "make the page anew: benchmarks/gpu.py --device cpu --tiny"


def measured(page: str) -> set[str]:
    """The numbers that a page has a row for."""
    return {line.split(" | ")[0] for line in page.splitlines() if line.endswith(f"| {NO_GPU} |")}
