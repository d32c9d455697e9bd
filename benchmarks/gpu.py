"""Everything that only a GPU can show, in one command and under nine minutes: `make gpu-check` (docs/gpu.md).

    PYTHONPATH=. python benchmarks/gpu.py                      # on a GPU: tests/gpu, then the measurements below
    PYTHONPATH=. python benchmarks/gpu.py --device cpu --tiny  # the same on a CPU, small: that all of it runs

It installs nothing, and uses the Python that it is started with. Each part runs in a process of its own within a time
limit, so that one which fails, hangs or crashes takes no other along; a part whose packages are absent is skipped and says
so. The exit status is 1 where a part failed, and 2 where none could run. What was found is written to
benchmarks/results/gpu_<name of the GPU>.md and .json; a run on a CPU writes gpu.md, which says of every number that no GPU
has been asked. What is tiny or not all of it has a name of its own, so that it is not taken for the whole.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

if importlib.util.find_spec("torch") is None:
    print(f"{sys.executable} has no torch: name a Python that has it, make gpu-check PYTHON=...", file=sys.stderr)
    sys.exit(2)
from benchmarks import measure  # noqa: E402 - imports torch and nothing else that may be absent
from benchmarks.measure import Row  # noqa: E402

PASSED, FAILED, SKIPPED, NO_GPU = "PASSED", "FAILED", "SKIPPED", "not run on a GPU"
MEASUREMENTS = ROOT / "benchmarks" / "gpu_measurements.py"
SKIP_STATUS = 5
"""Exit status of a part that has nothing to do here; its last line says why."""
TAIL = 80
RESERVE = 10.0
"""Seconds of --minutes in which no part runs: for ending the last one, and for what is written then."""

PACKAGES = {  # what a part may need, and how it comes to a machine
    "pydantic": "pip install pydantic",
    "timm": "pip install timm",
    "torchvision": "pip install torchvision",
    "pytest": "pip install pytest",
    "scipy": "pip install scipy",
    "nvidia.dali": "pip install nvidia-dali-cuda130, or -cuda120 for drivers of CUDA 12",
}
BASE = ("torch", "torchvision", "pydantic", "timm", "scipy", "yaml", "PIL")


@dataclass(frozen=True)
class Part:
    """Something to run by itself."""

    name: str
    what: str
    """What it shows, in a few words."""
    seconds: int
    """The most that it may take."""
    needs: tuple[str, ...] = BASE
    """Packages without which it is skipped."""
    words: tuple[str, ...] = ()
    """What Python is given; by default the measurement of this name in gpu_measurements.py."""
    least: int = 10
    """Seconds without which it is not begun."""


@dataclass
class Result:
    """What became of a part."""

    part: str
    what: str
    state: str
    why: str = ""
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    tests: list[dict[str, Any]] = field(default_factory=list)
    """Of a part of tests: name, state, why, and what it recorded."""
    tail: list[str] = field(default_factory=list)
    """The last lines that a failed part printed."""


def tests_of(name: str, what: str, seconds: int, *more: str) -> Part:
    """A part that runs tests/gpu/test_<name>.py."""
    words = (
        "-m",
        "pytest",
        "--confcutdir=tests/gpu",
        f"tests/gpu/test_{name}.py",
        "-v",
        "--tb=short",
        "-p",
        "no:cacheprovider",
    )
    return Part(f"tests: {name}", what, seconds, (*BASE, "pytest", *more), words)


PARTS = (
    tests_of("arithmetic", "losses, LARS and LARC against the authors' values, batch norm, NCCL, two ranks by gloo", 90),
    tests_of("loop", "the real loop: bf16, fp16, a skipped step, no wait for the device, resume, background checkpoint", 120),
    tests_of("views", "DALI on the device against DALI on the CPU: decoder, every operation, the loader", 90, "nvidia.dali"),
    Part("barlow_twins", "ResNet-50 at 224 px against the official loop, shares of a step, MFU, memory", 90),
    Part("simclr", "ResNet-50 at 224 px, shares of a step, MFU, memory", 60),
    Part("loader", "DALI on JPEGs: the loader alone, and Barlow Twins trained from it", 90, (*BASE, "nvidia.dali")),
    Part("losses", "time and memory of the losses at large batches", 45),
    tests_of("compile", "compute.compile: losses, names, going on either way", 90),
    Part("compiled", "the Barlow Twins step by torch.compile against itself without", 100),
    Part("cifar10", "SimCLR on CIFAR-10 for as many epochs as the time allows, and 5-nn", 300, least=75),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- running
def absent(packages: Sequence[str]) -> list[str]:
    """Those of the packages that this Python does not find."""

    def found(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # the package around it
            return False

    return [name for name in packages if not found(name)]


def run_part(part: Part, arguments: argparse.Namespace, limit: float) -> Result:
    """Run a part for `limit` seconds at most."""
    if lacking := absent(part.needs):
        ways = "; ".join(f"{name} is not installed ({PACKAGES.get(name, f'pip install {name}')})" for name in lacking)
        return Result(part.name, part.what, SKIPPED, f"{ways}; docs/gpu.md tells how wheels are carried")
    if limit < part.least:
        return Result(part.name, part.what, SKIPPED, "out of time: give more --minutes")
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        work = Path(folder)
        report = work / ("report.xml" if part.words else "rows.json")
        if part.words:
            line = [sys.executable, *part.words, f"--junit-xml={report}", f"--basetemp={work / 'tests'}"]
            line = line if "pytest" in part.words else [sys.executable, *part.words]
        else:
            line = [sys.executable, str(MEASUREMENTS), part.name, f"--json={report}", f"--seconds={0.9 * limit:.0f}"]
            line += ["--tiny"] * arguments.tiny + ([f"--data={arguments.data}"] if arguments.data else [])
        environment = {**os.environ, "TMPDIR": folder, "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        if arguments.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        start = time.monotonic()
        output = work / "output"
        with output.open("wb") as file:
            process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                                       start_new_session=True)  # fmt: skip
            status: int | None = None
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(timeout=limit)
            finally:  # what it started goes with it, and it goes with us
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            if status is None:
                with contextlib.suppress(subprocess.TimeoutExpired):  # one that waits in the driver does not die
                    process.wait(timeout=RESERVE / 2)
        seconds = time.monotonic() - start
        text = output.read_text(errors="replace")
        result = Result(part.name, part.what, FAILED, seconds=seconds)
        with contextlib.suppress(
            FileNotFoundError, ValueError, ElementTree.ParseError
        ):  # killed before, or in writing it
            if part.words:
                result.tests = tests_in(report)
            else:
                result.rows = [Row(**row) for row in json.loads(report.read_text())]
        if status == 0 and result.tests and all(test["state"] == SKIPPED for test in result.tests):
            result.state, result.why = SKIPPED, result.tests[0]["why"]
        elif status == 0:
            result.state = PASSED if arguments.device != "cpu" else NO_GPU
        elif status == SKIP_STATUS and not part.words:
            result.state, result.why = SKIPPED, text.strip().splitlines()[-1]
        else:
            ended = "it was stopped after its time" if status is None else f"exit status {status}"
            bad = [test["name"] for test in result.tests if test["state"] == FAILED]
            result.why = f"{ended}{', ' + ', '.join(bad) if bad else ''}"
            result.tail = text.splitlines()[-TAIL:]
        return result


def tests_in(report: Path) -> list[dict[str, Any]]:
    """The tests of a JUnit report."""
    found = []
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314 - pytest's
        failure = case.find("failure") if case.find("failure") is not None else case.find("error")
        skipped = case.find("skipped")
        why = failure if failure is not None else skipped
        found.append(
            {
                "name": case.get("name"),
                "state": FAILED if failure is not None else SKIPPED if skipped is not None else PASSED,
                "why": "" if why is None else (why.get("message") or "").splitlines()[0][:300],
                "recorded": {one.get("name"): one.get("value") for one in case.iter("property")},
            }
        )
    return found


def check(
    parts: Sequence[Part], arguments: argparse.Namespace, machine: Mapping[str, Any], began: float
) -> list[Result]:
    """Run all parts, one after the other, and write the report after each. `began`: when `--minutes` did, monotonic."""
    end = began + 60 * arguments.minutes - RESERVE
    results: list[Result] = []
    for part in parts:
        # A CPU may be a slow one that others share.
        limit = min(part.seconds * (3 if arguments.device == "cpu" else 1), end - time.monotonic())
        result = run_part(part, arguments, limit)
        results.append(result)
        print(f"{result.state:8} {part.name} ({result.seconds:.0f} s){': ' + result.why if result.why else ''}")
        for line in result.tail:
            print(f"    | {line}")
        for row in result.rows:
            print(f"         {row.what}: {row.value:.4g} {row.unit}  {row.detail}")
        for test in result.tests:
            for name, value in test["recorded"].items():
                print(f"         {name}: {value}")
        sys.stdout.flush()
        write(results, parts, arguments, machine)
    return results


# --------------------------------------------------------------------------------------------------------------- reports
def described() -> dict[str, Any]:
    """The machine and the versions; in a process of its own, since asking a GPU for its name takes some of its memory."""
    import torch

    versions = {"Python": sys.version.split()[0], "torch": str(torch.__version__)}
    for name, distribution in (("timm", ("timm",)), ("DALI", ("nvidia-dali-cuda130", "nvidia-dali-cuda120"))):
        for one in distribution:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(one)
    found: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "versions": versions, "gpu": None}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["memory"] = f"{properties.total_memory / 2**30:.1f} GiB"
        versions["CUDA"], versions["cuDNN"] = str(torch.version.cuda), str(torch.backends.cudnn.version())
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            line = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            asked = subprocess.run(line, capture_output=True, text=True, timeout=30, check=True)
            versions["driver"] = asked.stdout.split()[0]
    return found


def report_name(machine: Mapping[str, Any], arguments: argparse.Namespace) -> str:
    """`gpu`, or `gpu_` and the GPU's name as a file's; and what it is not the whole of."""
    some = "_some" if arguments.only else ""
    if arguments.device == "cpu":
        return f"gpu{some}"
    name = re.sub(r"[^a-z0-9]+", "_", str(machine["gpu"]).lower()).strip("_")
    return f"gpu_{name}{'_tiny' if arguments.tiny else ''}{some}"


def write(
    results: Sequence[Result], parts: Sequence[Part], arguments: argparse.Namespace, machine: Mapping[str, Any]
) -> None:
    """The report as Markdown; of a GPU, with all numbers as JSON too."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / f"{report_name(machine, arguments)}.md"
    file.write_text(markdown(results, parts, arguments, machine))
    if arguments.device != "cpu":
        values = {"date": today(), **machine, "parts": [asdict(result) for result in results]}
        file.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n")


def today() -> str:
    """The date, in UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d")


def markdown(
    results: Sequence[Result], parts: Sequence[Part], arguments: argparse.Namespace, machine: Mapping[str, Any]
) -> str:
    """The report. What ran on a CPU has no numbers in it: they would say nothing of a GPU."""
    device = arguments.device
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items())
    if device == "cpu":
        lines = [
            "# On a GPU: not run",
            "",
            "No GPU has run this version. `make gpu-check` on a machine that has one writes such a page with its numbers beside "
            "this one ([docs/gpu.md](../../docs/gpu.md)). This page is what it would show, written by "
            "`python benchmarks/gpu.py --device cpu --tiny`, which runs every part on a CPU at tiny sizes.",
        ]
    else:
        where = f"{machine['gpu']}, {machine['memory']}, {machine['cores']} cores; {versions}; {today()}."
        lines = [
            f"# {machine['gpu']}",
            "",
            "Written by `make gpu-check` ([docs/gpu.md](../../docs/gpu.md)).",
            "",
            where,
        ]
        if arguments.tiny:
            lines += [
                "",
                "Tiny networks and pictures, by `--tiny`: that all of it runs. Its numbers say nothing, whatever they name.",
            ]
    lines += ["", "| part | what it shows | state |", "|---|---|---|"]
    known = {result.part: result for result in results}
    for part in parts:
        result = known.get(part.name)
        state = "not run yet" if result is None else result.state
        if result is not None and device != "cpu":
            state += f", {result.seconds:.0f} s" if result.state != SKIPPED else ""
        if result is not None and result.state in (FAILED, SKIPPED):
            state += f": {result.why}"
        if result is not None and result.tests:
            count = sum(test["state"] == PASSED for test in result.tests)
            skipped = sum(test["state"] == SKIPPED for test in result.tests)
            state += f" ({len(result.tests)} tests" + (
                f": {count} passed, {skipped} skipped)" if device != "cpu" else ")"
            )
        lines.append(f"| {part.name} | {part.what} | {state} |".replace("\n", " "))
    rows = [row for result in results for row in result.rows]
    if rows and device != "cpu":
        lines += ["", measure.table(rows)]
    elif rows:
        lines += ["", "| | measured |", "|---|---|", *(f"| {row.what} | {NO_GPU} |" for row in rows)]
    recorded = [pair for result in results for test in result.tests for pair in test["recorded"].items()]
    if recorded:
        lines += ["", "| recorded by tests | |", "|---|---|"]
        lines += [f"| {name} | {value if device != 'cpu' else NO_GPU} |" for name, value in recorded]
    told = [(result, test) for result in results for test in result.tests if test["state"] != PASSED]
    if told and device != "cpu":
        lines += ["", "Tests that did not pass:", ""]
        lines += [f"- {test['state']} {result.part}: `{test['name']}`: {test['why']}" for result, test in told]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------- command line
def main(words: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """The exit status: 1 where a part failed, 2 where none could run: no GPU, or of each part a package is absent."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU does in a minute or two")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts alone")
    parser.add_argument("--data", type=Path, default=os.environ.get("SSL_PIPELINE_TEST_DATA"),
                        help="folder with CIFAR-10: cifar10*.tar, or train/ and val/; else SSL_PIPELINE_TEST_DATA's")  # fmt: skip
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the report")
    parser.add_argument("--machine", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    arguments.data = (
        Path(arguments.data).expanduser().resolve() if arguments.data else None
    )  # no shell expands make's ~
    if arguments.data and not arguments.data.is_dir():
        parser.error(f"{arguments.data} is no folder: --data, or SSL_PIPELINE_TEST_DATA, names the one with CIFAR-10")
    if arguments.machine:
        print(json.dumps(described()))
        return 0
    unknown = {*(arguments.only or ())} - {part.name for part in parts}
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}: there are {', '.join(part.name for part in parts)}")
    line = [sys.executable, str(Path(__file__).resolve()), "--machine"]
    try:
        asked = subprocess.run(line, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True, timeout=120)
    except subprocess.SubprocessError as error:
        print(f"torch does not tell what GPU this is: {error}", file=sys.stderr)
        return 2
    machine = json.loads(asked.stdout.splitlines()[-1])
    if arguments.device == "cuda" and not machine["gpu"]:
        print(
            "torch sees no GPU here; `make gpu-check GPU_CHECK='--device cpu --tiny'` shows that all of this runs",
            file=sys.stderr,
        )
        return 2
    parts = [part for part in parts if not arguments.only or part.name in arguments.only]
    file = arguments.output / f"{report_name(machine, arguments)}.md"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the part that runs ends too
    try:
        results = check(parts, arguments, machine, began)
    except KeyboardInterrupt:
        print(f"interrupted; {file} has the parts that were done", file=sys.stderr)
        return 130
    failed, skipped = ([result.part for result in results if result.state == state] for state in (FAILED, SKIPPED))
    told = [
        f"{len(names)} {what}: {', '.join(names)}"
        for names, what in ((failed, "failed"), (skipped, "skipped"))
        if names
    ]
    print("; ".join([f"{len(results)} parts", *told, str(file)]))
    return 1 if failed else 2 if len(skipped) == len(results) else 0


if __name__ == "__main__":
    sys.exit(main())
