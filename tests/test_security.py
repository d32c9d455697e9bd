"""Attacks by files, names and folders of strangers, each with a payload that works where nothing stops it (docs/security.md)."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ssl_pipeline import checkpoint, cli, cluster, config, distributed, export, launch, optim
from ssl_pipeline.data import check, listing, pack, prepare
from ssl_pipeline.data import index as indexes
from ssl_pipeline.data.augment import ViewSpec
from ssl_pipeline.data.loader import Loader
from ssl_pipeline.evaluation import report
from ssl_pipeline.exits import BadInput, Status
from ssl_pipeline.run_folder import RunFolder

ROOT = Path(__file__).parents[1]


class Payload:
    """Pickled as a call that makes a folder, by which a test sees that it ran."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "ran"


def fires(marker: Path, unsafe: Callable[[], Any]) -> None:
    """That the payload works, so that its silence afterwards means something."""
    unsafe()
    marker.rmdir()


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """`ssl-pipeline` in this process: (status, stdout, stderr)."""
    monkeypatch.setattr("ssl_pipeline.distributed.stop", lambda: None)  # the tests' own process group stays

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.main([str(word) for word in words])
        told = capsys.readouterr()
        return status, told.out, told.err

    return run


@pytest.fixture(scope="module")
def words(few_digits: Path) -> list[str]:
    """Of a run of three steps."""
    return ["smoke", f"data.root={few_digits}", "data.batch_size=16", "max_steps=3", "checkpoint.every_steps=1"]


@pytest.fixture(scope="module")
def whole_run(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run, made by somebody who lets all write everywhere."""
    run = tmp_path_factory.mktemp("security") / "run"
    before = os.umask(0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ssl_pipeline.distributed.stop", lambda: None)
        assert cli.main(["pretrain", *words, "--output", str(run)]) == Status.DONE
    assert os.umask(before) == 0  # the caller's own is put back
    return run


@pytest.fixture
def a_run(whole_run: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


# -------------------------------------------------------------------------------------------------- files with weights
def weights(kind: str, folder: Path, marker: Path) -> Path:
    """A file of weights with a payload."""
    content = {"model": {"conv1.weight": Payload(marker)}, "__author__": "x", "matching_heuristics": True}
    path = folder / {"pkl": "weights.pkl", "safetensors": "weights.safetensors"}.get(kind, "weights.pth")
    if kind in ("zip", "legacy"):
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
        fires(marker, lambda: torch.load(path, weights_only=False))
    else:
        path.write_bytes(pickle.dumps(content))
        fires(marker, lambda: pickle.loads(path.read_bytes()))  # noqa: S301
    return path


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "pkl", "safetensors"])
@pytest.mark.parametrize("verb", ["knn", "linear-probe", "semi-supervised", "export", "convert-to-detectron2"])
def test_a_file_of_weights_runs_no_code(
    verb: str, kind: str, call: Callable, words: list[str], marker: Path, tmp_path: Path
) -> None:
    file = weights(kind, tmp_path, marker)
    more = {
        "knn": [words[1]],
        "linear-probe": [words[1]],
        "semi-supervised": [words[1], "--percent", 10, "--output", tmp_path / "out"],
        "export": [tmp_path / "out.pth", "--format", "torchvision"],
        "convert-to-detectron2": [tmp_path / "out.pkl"],
    }[verb]
    status, _, told = call(verb, file, *more, "--config", "smoke")
    assert not marker.exists()
    assert status == Status.BAD_INPUT
    assert "Traceback" not in told
    assert re.search(r"which is not read because it could run code|can be read safely: ", told.splitlines()[-1]), told


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_a_checkpoint_runs_no_code(kind: str, call: Callable, words: list[str], a_run: Path, marker: Path) -> None:
    for file in (a_run / "checkpoints").iterdir():
        state = {**torch.load(file, weights_only=True), "versions": Payload(marker)}
        torch.save(state, file, _use_new_zipfile_serialization=kind == "zip")
        fires(marker, lambda file=file: torch.load(file, weights_only=False))
    status, _, told = call("pretrain", *words, "max_steps=4", "--output", a_run)
    assert not marker.exists()
    assert status == Status.BAD_INPUT
    assert "no checkpoint in" in told.splitlines()[-1]


class Shaped:
    """Pickled as a tensor of two numbers whose shape, strides and offset are not so."""

    def __init__(self, shape: tuple[int, ...], offset: int = 0) -> None:
        self.shape, self.offset = shape, offset

    def __reduce__(self) -> Any:
        storage = torch.zeros(2)._typed_storage()
        strides = (1,) * len(self.shape)
        return torch._utils._rebuild_tensor_v2, (storage, self.offset, self.shape, strides, False, OrderedDict())


@pytest.mark.parametrize(
    ("shape", "offset"), [((-5,), 0), ((2**48,), 0), ((2**62, 4), 0), ((1,), 2**50), ((1,), -(2**40))]
)
def test_a_shape_that_no_storage_has_is_a_damaged_checkpoint(shape: Any, offset: int, tmp_path: Path) -> None:
    torch.save({"format": 1, "step": 1, "model": {"w": Shaped(shape, offset)}}, tmp_path / "step_00000001.pt")
    with pytest.raises(BadInput, match=r"step_00000001.pt: it cannot be read: \S+"):
        checkpoint.read_newest(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["model"].update({"backbone.conv1.weight": torch.zeros(1).expand(10**5, 10**5)}), "is (100000, 100"),
        (lambda s: s["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(1)), "of tensor 0 is (1,), not ("),
        (lambda s: s["optimizer"]["state"][0].update(momentum_buffer="x"), "does not fit the config's optimizer"),
        (lambda s: s["optimizer"].update(param_groups=[]), "does not fit the config's optimizer"),
        (lambda s: s.update(step="3"), "it is not a checkpoint of this tool"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_other_shapes_is_one_sentence(
    change: Callable, said: str, call: Callable, words: list[str], a_run: Path
) -> None:
    for file in (a_run / "checkpoints").iterdir():
        state = torch.load(file, weights_only=True)
        change(state)
        torch.save(state, file)
    status, _, told = call("pretrain", *words, "max_steps=4", "--output", a_run)
    assert status == Status.BAD_INPUT
    assert said in told.splitlines()[-1]


@pytest.mark.parametrize("name", ["lars", "sgd", "adam", "adamw", "lamb"])
@pytest.mark.parametrize("kind", ["short", "one number for all"])
def test_fused_kernels_get_tensors_of_the_parameters_layout(name: str, kind: str) -> None:
    """They write as many numbers as the parameter has, wherever the state ends: a stranger's checkpoint could crash us."""
    p = torch.nn.Parameter(torch.zeros(64, 32).t())
    group = {"params": [p], "name": "x", "lr": "scheduled", "decay": False, "adapt": True}
    optimizer = optim.build([group], optim.Options(name=name), 256)
    p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.state_dict()
    key = "momentum_buffer" if name in ("lars", "sgd") else "exp_avg_sq"
    state["state"][0][key] = torch.ones(()) if kind == "short" else torch.ones(()).expand(32, 64)
    if kind == "short":
        with pytest.raises(BadInput, match=rf"{key} of tensor 0 is \(\), not \(32, 64\)"):
            optim.load(optimizer, state)
    else:
        optim.load(optimizer, state)
        found = optimizer.state[p][key]
        assert torch.equal(found, torch.ones(32, 64))
        assert found.untyped_storage().nbytes() == 4 * 32 * 64
        assert found.stride() == p.stride()


def test_a_checkpoint_that_unpacks_to_more_than_it_is_is_not_read(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "c", {"step": 1, "model": {"w": torch.zeros(10**6)}}, 1)
    with (
        zipfile.ZipFile(tmp_path / "c" / "step_00000001.pt") as plain,
        zipfile.ZipFile(tmp_path / "c" / "step_00000002.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    bomb = tmp_path / "c" / "step_00000002.pt"
    assert torch.load(bomb, weights_only=True)["model"]["w"].nbytes > 100 * bomb.stat().st_size  # torch unpacks it
    with pytest.raises(ValueError, match="it is compressed"):
        checkpoint.read(bomb)


@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained", "pretrained_cfg", "cache_dir"])
def test_arguments_of_a_backbone_load_nothing(
    name: str, call: Callable, words: list[str], a_run: Path, marker: Path, tmp_path: Path
) -> None:
    """timm.create_model(checkpoint_path=...) unpickles in some of its versions."""
    evil = weights("legacy", tmp_path, marker)
    said = f"{name} loads weights, and a config describes a network alone"
    status, _, told = call("pretrain", *words, f"backbone.arguments={{{name}: {evil}}}", "--output", tmp_path / "other")
    assert (status, said in told) == (Status.BAD_INPUT, True), told
    beside = json.loads((a_run / "backbone.json").read_text())
    beside["arguments"][name] = str(evil)
    (a_run / "backbone.json").write_text(json.dumps(beside))
    for source in (a_run, a_run / "backbone.pth"):
        status, _, told = call("export", source, tmp_path / "out.safetensors", "--format", "safetensors")
        assert (status, said in told) == (Status.BAD_INPUT, True), told
    assert not marker.exists()


@pytest.mark.parametrize("name", ["hf-hub:evil/model", "local-dir:/evil", "timm/hf-hub:evil/model"])
def test_no_name_of_a_backbone_is_an_address(name: str, call: Callable, words: list[str], tmp_path: Path) -> None:
    status, _, told = call("config", *words, f"backbone.name={name}")
    assert (status, "is no timm model" in told) == (Status.BAD_INPUT, True), told
    status, _, told = call("export", f"timm:{name}", tmp_path / "x.pth", "--format", "timm")
    assert (status, "timm has no weights" in told) == (Status.BAD_INPUT, True), told


# ------------------------------------------------------------------------------------------------------------------ YAML
TAGS = [
    "!!python/object/apply:os.mkdir [{marker}]",
    "!!python/object/apply:os.mkdir {{args: [{marker}]}}",
    "!!python/object/new:os.mkdir [{marker}]",
    "!!python/object/apply:subprocess.check_call [[mkdir, {marker}]]",
]


@pytest.mark.parametrize("tag", TAGS)
def test_yaml_makes_no_objects(
    tag: str, call: Callable, words: list[str], a_run: Path, marker: Path, tmp_path: Path
) -> None:
    text = tag.format(marker=marker)
    fires(marker, lambda: yaml.unsafe_load(text))
    evil = tmp_path / "evil.yaml"
    evil.write_text(f"epochs: {text}\n")
    child = tmp_path / "a" / "child.yaml"
    child.parent.mkdir()
    child.write_text("inherit: [../b/../evil.yaml]\n")
    (tmp_path / "b").mkdir()
    with (a_run / "config.yaml").open("a") as file:
        file.write(f"more: {text}\n")
    for line in (
        ["config", evil],
        ["config", child],
        ["pretrain", evil, "--output", tmp_path / "r"],
        ["pretrain", *words, f"epochs={text}", "--output", tmp_path / "r"],
        ["knn", a_run],
        ["status", a_run],
        ["report", a_run],
        ["export", a_run, tmp_path / "x.pth", "--format", "timm"],
        ["linear-probe", a_run / "backbone.pth", "--config", evil],
        ["launch", "pretrain", evil, "--output", tmp_path / "r", "--dry-run"],
    ):
        status, _, told = call(*line)
        assert not marker.exists()
        assert status == Status.BAD_INPUT, line
        assert "could not determine a constructor for the tag" in told.splitlines()[-1]
    assert not (tmp_path / "r").exists()


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, "by its aliases"),
        ("a: &a {b: *a}", "or itself, by its aliases"),
        ("a: &a [*a]", "or itself, by its aliases"),
        ("a: " + "[" * 5000, "is not valid YAML"),
        ("a: 2001-99-99", "is not valid YAML"),
        ("a: !!timestamp x", "is not valid YAML"),
        ("a: !!int ''", "is not valid YAML"),
        ("a: " + "9" * 5000, "is not valid YAML"),
        ('inherit: ["a\\0b"]', "must be a list of paths"),
        ("inherit: [/dev/zero]", "and there is no file /dev/zero"),
    ],
)
def test_yaml_that_would_fill_the_memory_or_fits_no_type_is_one_sentence(
    text: str, said: str, call: Callable, tmp_path: Path
) -> None:
    (tmp_path / "evil.yaml").write_text(text)
    status, _, told = call("config", tmp_path / "evil.yaml")
    assert status == Status.BAD_INPUT
    assert said in told
    assert len(told.splitlines()) == 1


# ------------------------------------------------------------------------------------------------------- names and shells
NAMES = [
    "a b",
    "x; mkdir ran; #",
    "$(mkdir ran)",
    "`mkdir ran`",
    "'; mkdir ran; '",
    '"; mkdir ran; "',
    "x && mkdir ran",
    "| mkdir ran",
    "x\\",
    "-x",
    "..",
    "*",
]
LINES = ["x\nmkdir ran\n#", "x\rmkdir ran", "p'\nmkdir ran #"]


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[list[str]]]:
    """srun and sbatch that only note their words, first on PATH; returns the words of each call."""
    folder, noted = tmp_path / "stubs", tmp_path / "noted"
    folder.mkdir()
    for name in ("srun", "sbatch"):
        (folder / name).write_text(f'#!/bin/bash\nprintf "%s\\0" {name} "$@" >> {noted}\nprintf "\\n\\0" >> {noted}\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def calls() -> list[list[str]]:
        text = noted.read_bytes().decode() if noted.exists() else ""
        noted.unlink(missing_ok=True)
        return [part.split("\0")[:-1] for part in text.split("\n\0")[:-1]]

    return calls


def bash(text: str, folder: Path) -> None:
    subprocess.run(["bash", "-c", text], cwd=folder, capture_output=True, timeout=60, check=False)  # noqa: S607


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_a_run_is_a_command_of_its_job(
    name: str, call: Callable, words: list[str], stubs: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = f"--output={name}"
    place = str((tmp_path / name / "logs").absolute())
    asked = [f"--{key}={name}" for key in ("partition", "account", "qos", "constraint", "exclude", "dependency", "mem")]
    monkeypatch.setattr(launch, "_possible", lambda run, values: (["knn"], []))
    for line in (
        ["launch", "pretrain", *words, output, "--dry-run", *asked],
        ["experiment", *words, output, "--dry-run", *asked],
    ):
        status, script, told = call(*line)
        assert status == Status.DONE, told
        bash(script, tmp_path)
        calls = stubs()
        assert calls  # the script ran
        assert all(run[0] == "srun" and Path(run[-1]).parent == Path(place) for run in calls)
    status, told, _ = call("plan", *words, output, *asked, "--measure-seconds", 0)
    by_sbatch = next(line for line in told.splitlines() if line.startswith("by sbatch:"))
    bash(by_sbatch.removeprefix("by sbatch:"), tmp_path)
    (run,) = stubs()
    assert run[-len(words) :] == words
    assert f"--partition={name}" in run
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", LINES)
def test_a_name_that_ends_a_line_of_a_job_is_refused(
    name: str, call: Callable, words: list[str], stubs: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for line, said in (
        (["launch", "pretrain", *words, "--output", name, "--dry-run"], "stands in a job's script"),
        (["launch", "pretrain", *words, "--output", "r", f"--partition={name}", "--dry-run"], "`partition` = "),
        (["experiment", *words, "--output", name, "--dry-run"], "stands in a job's script"),
        (["plan", *words, "--output", name, "--measure-seconds", 0], "stands in a job's script"),
    ):
        status, script, told = call(*line)
        bash(script, tmp_path)
        assert not (tmp_path / "ran").exists()
        assert (status, said in told) == (Status.BAD_INPUT, True), told
    with pytest.raises(BadInput, match="stands in a job's script"):
        launch.submit([launch.Job(["knn", "x"])], launch.Resources(), "knn", tmp_path / name)
    assert stubs() == []


def test_an_option_with_a_lines_end_stays_in_the_comment_of_a_dry_run(
    call: Callable, whole_run: Path, stubs: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, script, told = call("launch", "--dry-run", "knn", whole_run, "data.name=x\nmkdir ran")
    assert status == Status.DONE, told
    bash(script, tmp_path)
    assert len(stubs()) == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("values", ["../../x,b", "a/../../..,b", ".."])
def test_no_value_of_an_array_leads_out_of_the_run(
    values: str, call: Callable, words: list[str], tmp_path: Path
) -> None:
    status, _, told = call(
        "launch", "--array", f"data.name={values}", "pretrain", *words, "--output", tmp_path / "a" / "run"
    )
    assert (status, "holds `..`" in told) == (Status.BAD_INPUT, True), told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "slurm").glob("*.sh") if path.name != "job.sh"))
def test_no_name_is_a_command_of_the_job_scripts(
    script: str, stubs: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    monkeypatch.setenv("SLURM_SUBMIT_DIR", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for number, name in enumerate([*NAMES, *LINES]):
        given = [f"runs/{number}/{name}", f"data.name={name}", name, "--preset", name]
        monkeypatch.setenv("PYTHON", name)  # a path with blanks is one too
        monkeypatch.setenv("RUN", f"runs/{number}/{name}")
        subprocess.run(["bash", f"slurm/{script}", *given], cwd=tmp_path, capture_output=True, timeout=60, check=False)  # noqa: S607
        assert not list(tmp_path.rglob("ran")), name
        (run,) = stubs()
        assert name in run[:8]  # the interpreter
        assert run[-4:] == given[-4:]
        assert given[0] in run


def test_make_takes_a_method_as_one_word(tmp_path: Path) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    program = tmp_path / ".venv" / "bin" / "ssl-pipeline"
    program.write_text('#!/bin/bash\nprintf "%s\\n" "$@" > words\n')
    program.chmod(0o755)
    for name in ("Makefile", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv" / ".installed").touch()
    method = "x'; mkdir ran; \"`mkdir ran`"
    subprocess.run(["make", "demo", f"METHOD={method}"], cwd=tmp_path, capture_output=True, timeout=60, check=True)  # noqa: S607
    assert (tmp_path / "words").read_text().splitlines() == [
        "demo",
        "--method",
        method,
        "--output",
        f"runs/demo_{method}",
    ]
    assert not (tmp_path / "ran").exists()


def test_a_job_of_a_strangers_diary_is_no_word_for_slurm(
    a_run: Path, call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(cluster, "ask", lambda *words: asked.append(words))
    for job in ("--uid=0", "1 2", "$(mkdir ran)", "5"):
        RunFolder(a_run).record("submitted", verb="knn\x1b[2J", job=job, cluster="slurm")
    status, out, _ = call("status", a_run)
    assert status == Status.DONE
    assert {word for words in asked for word in words if "5" in word or "-uid" in word or " 2" in word} == {"5"}
    assert "\x1b" not in out


# --------------------------------------------------------------------------------------------------------------- archives
def png(width: int = 8, height: int = 8) -> bytes:
    made = io.BytesIO()
    Image.new("RGB", (width, height)).save(made, "PNG")
    return made.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **more: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    for key, value in more.items():
        setattr(info, key, value)
    return info


def test_an_archive_writes_nowhere_else(call: Callable, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    source, out = tmp_path / "evil.tar", tmp_path / "made" / "out"
    with tarfile.open(source, "w", format=tarfile.PAX_FORMAT) as archive:
        for split in ("train", "val"):
            archive.addfile(member(f"{split}/a/good.png", size=len(png()), mode=0o6777), io.BytesIO(png()))
        for name in (
            "../../outside/train/a/1.png", "train/../outside/2.png", "train/a/../../../../outside/3.png", "train/../../4.png",
            f"{outside}/5.png", "/train/a/../6.png", "val/../train/7.png", "train/a/.8.png", "train/a/..",
        ):  # fmt: skip
            archive.addfile(member(name, size=len(png())), io.BytesIO(png()))
        archive.addfile(member("train/link", tarfile.SYMTYPE, str(outside)))
        archive.addfile(member("train/link/9.png", size=len(png())), io.BytesIO(png()))
        archive.addfile(member("val/link/9.png", size=len(png())), io.BytesIO(png()))
        archive.addfile(member("train/a/10.png", tarfile.SYMTYPE, "/etc/passwd"))
        archive.addfile(member("train/a/11.png", tarfile.LNKTYPE, "/etc/passwd"))
        archive.addfile(member("train/a/12.png", tarfile.FIFOTYPE))
        archive.addfile(member("train/a/13.png", tarfile.CHRTYPE, devmajor=1, devminor=5))
    status, told, _ = call("prepare-data", "folder", out, "--source", source)
    assert status == Status.DONE, told
    assert list(outside.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.tar", "made", "outside"]
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    assert files == {f"{split}/{name}" for split in ("train", "val") for name in ("a/good.png", "link/9.png")}
    for path in out.rglob("*"):
        assert stat.S_ISDIR(path.lstat().st_mode) or stat.S_IMODE(path.lstat().st_mode) & 0o7133 == 0


def test_a_zip_writes_nowhere_else(call: Callable, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        for name in (
            "train/a/x.png",
            "val/a/x.png",
            "../train/a/1.png",
            "train/a/../../../2.png",
            "train\\..\\..\\3.png",
        ):
            archive.writestr(name, png())
        link = zipfile.ZipInfo("train/b")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc")
    status, _, told = call("prepare-data", "folder", tmp_path / "out", "--source", tmp_path / "evil.zip")
    assert status == Status.DONE, told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.zip", "out"]
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.png")) == ["x.png", "x.png"]
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_a_place_that_another_one_made_before_is_not_written_to(
    call: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / ".out.partial").symlink_to(tmp_path / "outside")
    (tmp_path / "source").mkdir()
    for split in ("train", "val"):
        (tmp_path / "source" / split / "a").mkdir(parents=True)
        (tmp_path / "source" / split / "a" / "x.png").write_bytes(png())
    seen: list[Path] = []
    write = prepare._write
    monkeypatch.setattr(prepare, "_write", lambda picture, target: (write(picture, target), seen.append(target)))
    status, _, told = call("prepare-data", "folder", tmp_path / "out", "--source", tmp_path / "source")
    assert (status, "cannot make" in told) == (Status.BAD_INPUT, True), told
    assert seen == []


@pytest.mark.parametrize("kind", ["gz", "xz", "zip", "sparse"])
def test_an_archive_that_unpacks_to_far_more_than_it_is_is_refused(kind: str, call: Callable, tmp_path: Path) -> None:
    source, size = tmp_path / f"bomb.{kind}", 70_000_000
    zeros = bytes(size)
    if kind == "zip":
        with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("val/a/x.png", png())
            archive.writestr("train/a/x.png", zeros)
    elif kind == "sparse":
        real = 2**40
        headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "train/a/x.png",
                   "GNU.sparse.realsize": str(real)}  # fmt: skip
        with tarfile.open(source, "w", format=tarfile.PAX_FORMAT) as archive:
            info = member("GNUSparseFile.0/x.png", size=512, pax_headers=headers)
            archive.addfile(info, io.BytesIO(f"1\n{real}\n0\n".encode().ljust(512, b"\0")))
        with tarfile.open(source) as archive:
            assert archive.next().size == real  # so it is read as one
    else:
        with tarfile.open(source, f"w:{kind}") as archive:
            archive.addfile(member("val/a/x.png", size=len(png())), io.BytesIO(png()))
            archive.addfile(member("train/a/x.png", size=size), io.BytesIO(zeros))
    assert source.stat().st_size < 200_000
    status, _, told = call("prepare-data", "folder", tmp_path / "out", "--source", source)
    assert (status, "which no pictures have" in told) == (Status.BAD_INPUT, True), told
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_a_name_that_no_file_can_have_is_one_sentence(call: Callable, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "evil.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for split in ("train", "val"):
            info = member(f"{split}/a/x.png", size=len(png()), pax_headers={"path": f"{split}/a/x\0.png"})
            archive.addfile(info, io.BytesIO(png()))
    status, _, told = call("prepare-data", "folder", tmp_path / "out", "--source", tmp_path / "evil.tar")
    assert (status, "null byte" in told, len(told.splitlines())) == (Status.BAD_INPUT, True, 1), told


# ----------------------------------------------------------------------------------------------------------------- shards
@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two pictures of two classes, packed."""
    for name in ("a", "b"):
        (tmp_path / "plain" / "train" / name).mkdir(parents=True)
        (tmp_path / "plain" / "train" / name / "x.png").write_bytes(png())
    pack.pack(tmp_path / "plain", tmp_path / "packed", processes=1)
    (tmp_path / "secret").write_bytes(b"secret" * 1000)
    return tmp_path / "packed" / "train"


@pytest.mark.parametrize(
    "changed",
    [
        {"spans": [[0, 2**62, 2**62], [0, 0, 1]]},  # whose sum is negative in 64 bits
        {"spans": [[0, -4096, 6000], [0, 0, 1]]},
        {"spans": [[0, 0, 2**40], [0, 0, 1]]},
        {"spans": [[-1, 0, 1], [0, 0, 1]]},
        {"spans": [[7, 0, 1], [0, 0, 1]]},
        {"labels": [-5, 0]},
        {"labels": [2**62, 0]},
        {"shards": listing.blob(["../../secret"]), "shard_sizes": [6000], "spans": [[0, 0, 6], [0, 6, 6]]},
        {"version": np.float64("inf")},
    ],
    ids=",".join,
)
def test_an_index_that_points_elsewhere_is_not_used(changed: dict[str, Any], shards: Path) -> None:
    with np.load(shards / "index.npz") as file:
        values = {name: file[name] for name in file.files}
    values |= {key: np.asarray(value) for key, value in changed.items()}
    np.savez(shards / "index.npz", **values)
    assert isinstance(indexes.read_shard_index(shards), str)
    with pytest.raises(BadInput, match="are not what `pack-shards`"):
        indexes.read_index(shards)
    (shards.parent / "plan.json").unlink()  # shards of others
    found = indexes.read_index(shards)  # by the tars themselves
    assert [found.read(sample).tobytes() for sample in range(2)] == [png()] * 2


def test_an_index_unpickles_nothing(shards: Path, marker: Path) -> None:
    with np.load(shards / "index.npz") as file:
        values = {name: file[name] for name in file.files}
    np.savez(shards / "index.npz", **{**values, "classes": np.array([Payload(marker)], dtype=object)})
    fires(marker, lambda: np.load(shards / "index.npz", allow_pickle=True)["classes"])
    assert indexes.read_shard_index(shards) == "it is damaged"
    assert not marker.exists()


def test_no_place_outside_a_file_is_read(tmp_path: Path) -> None:
    """Not even after the index was looked at: its shard may have become shorter, or it may be a tar's own word."""
    (tmp_path / "0.tar").write_bytes(bytes(1000))
    for offset, size in ((0, 1001), (999, 2), (-1, 1), (2**62, 2**62), (0, 2**50), (10, -5)):
        spans = np.array([[0, offset, size]])
        with pytest.raises(OSError, match="the file ends"):
            indexes.Index(tmp_path, ("x",), np.zeros(1), (), spans, ("0.tar",)).read(0)


def test_an_index_that_unpacks_to_more_than_it_is_is_not_read(shards: Path) -> None:
    with np.load(shards / "index.npz") as file:
        values = {name: file[name] for name in file.files}
    np.savez_compressed(shards / "index.npz", **values, more=np.zeros(10**7))
    assert indexes.read_shard_index(shards) == "it is damaged"


def test_links_in_a_shard_lead_nowhere(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        archive.addfile(member("a.png", size=len(png())), io.BytesIO(png()))
        archive.addfile(member("a.cls", size=1), io.BytesIO(b"0"))
        archive.addfile(member("b.cls", tarfile.SYMTYPE, "c.cls"))
        archive.addfile(member("c.cls", tarfile.SYMTYPE, "b.cls"))
        archive.addfile(member("d.cls", tarfile.SYMTYPE, "/etc/passwd"))
        archive.addfile(member("e.cls", tarfile.DIRTYPE))
        archive.addfile(member("f.png", tarfile.SYMTYPE, "/etc/passwd"))
    found = indexes.read_index(tmp_path)
    assert (found.paths, found.classes) == (("0.tar/a.png",), ("0",))


def test_what_is_no_file_is_packed_as_an_empty_one(call: Callable, tmp_path: Path) -> None:
    (tmp_path / "plain" / "train" / "a").mkdir(parents=True)
    (tmp_path / "plain" / "train" / "a" / "x.png").symlink_to("/dev/null")
    status, _, told = call("pack-shards", tmp_path / "plain", tmp_path / "out", "--processes", 1)
    assert (status, "x.png: no regular file" in told) == (Status.DONE, True), told
    assert len(indexes.read_index(tmp_path / "out" / "train").read(0)) == 0


# --------------------------------------------------------------------------------------------------------------- pictures
def header(width: int, height: int) -> bytes:
    """A PNG's beginning that says so of its size, before one row of pixels."""
    good = bytearray(png())
    good[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    good[29:33] = zipfile.crc32(bytes(good[12:29])).to_bytes(4, "big")
    return bytes(good)


def test_a_picture_of_too_many_pixels_is_left_out_and_a_wide_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "train" / "a"
    root.mkdir(parents=True)
    (root / "bomb.png").write_bytes(header(100_000, 100_000))
    for number in range(3):
        (root / f"{number}.png").write_bytes(png())
    (root / "wide.png").write_bytes(png(20_000, 200))
    view = {"size": 8, "ops": [{"op": "crop_resize"}, {"op": "normalize"}]}
    index = indexes.read_index(tmp_path / "train")
    data = Loader(index, [config.validate(ViewSpec, view)], 5, seed=0, world=distributed.start(), threads=1)
    (batch,) = data
    assert [Path(index.paths[sample]).name for sample in data.all_bad()] == ["bomb.png"]
    assert "bomb.png: more than 178,956,970 pixels" in caplog.text
    assert "wide.png" in {Path(index.paths[sample]).name for sample in batch.ids}
    data.close()


# ------------------------------------------------------------------------------------------------------------ the terminal
def test_no_name_of_a_file_moves_the_cursor_or_writes_a_line(
    call: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "\x1b[2J\x9b31m\r\nssl-pipeline: all is well\u202egnp.png"
    found = check.Report(1, [(name, name)], Counter({"gray": 1}), {"gray": name})
    monkeypatch.setattr(check, "check", lambda root, processes: found)
    _, out, _ = call("check-data", tmp_path)
    assert len(out.splitlines()) == 3
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.getLogger("ssl_pipeline").handlers[0].formatter)  # the program's own
    record = logging.LogRecord("ssl_pipeline", logging.WARNING, "", 0, "unreadable picture %s", (name,), None)
    handler.emit(record)
    _, _, told = call("knn", tmp_path / f"{name}.pth", "--config", "smoke", "data.root=x")
    (tmp_path / "evil.pth").write_bytes(b"c\x1b[2Jall is well\nx\n.")  # a function of this module
    _, _, held = call("export", tmp_path / "evil.pth", tmp_path / "x.pth", "--format", "timm")
    assert "\\x1b[2Jall" in held
    for text in (out, stream.getvalue(), told, held.replace("[2Jall", "[2Jall is well")):
        assert not re.search("[\x1b\x9b\r\u202e]", text)
        assert "\nssl-pipeline: all is well" not in text
        assert "all is well" in text
    assert len(stream.getvalue().splitlines()) == 1


# ------------------------------------------------------------------------------------------------------------- run folders
def test_a_run_is_its_owners(whole_run: Path) -> None:
    """Whatever the umask: jobs run what lies in logs/, and who may change a run's config decides what the next start does."""
    for path in [whole_run, *whole_run.rglob("*")]:
        assert path.lstat().st_mode & 0o022 == 0, path
        assert path.lstat().st_uid == os.geteuid()


LINKED = [".lock", ".config.yaml.partial", "metrics.jsonl", "jobs.jsonl", "views.png", "results/.knn_k3.json.partial",
          "results/superseded.jsonl", "checkpoints/.step_00000004.pt.partial", ".backbone.pth.partial"]  # fmt: skip


@pytest.mark.parametrize("name", LINKED)
def test_nothing_is_written_through_a_link_in_a_strangers_run(
    name: str, call: Callable, words: list[str], a_run: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.write_text("precious")
    (a_run / name).parent.mkdir(exist_ok=True)
    (a_run / name).unlink(missing_ok=True)
    (a_run / name).symlink_to(mine)
    for line in (
        ["pretrain", *words, "max_steps=4", "--output", a_run],
        ["knn", a_run, "--k", 3],
        ["linear-probe", a_run],
        ["semi-supervised", a_run, "--percent", 10],
        ["launch", "--cluster", "local", "knn", a_run, "--k", 3],
        ["report", a_run],
    ):
        status, _, told = call(*line)
        assert (status, "is a link or a device" in told.splitlines()[-1]) == (Status.BAD_INPUT, True), told
        assert mine.read_text() == "precious"


@pytest.mark.parametrize("name", ["checkpoints", "results", "backbones", "logs", "tensorboard"])
def test_no_folder_of_a_run_lies_elsewhere(name: str, a_run: Path, words: list[str], call: Callable) -> None:
    shutil.rmtree(a_run / name, ignore_errors=True)
    other = a_run.with_name("other")
    other.mkdir()
    (other / "step_00000001.pt").write_text("precious")
    (a_run / name).symlink_to(other)
    status, _, told = call("pretrain", *words, "max_steps=4", "--output", a_run)
    assert (status, "is a link or a device" in told) == (Status.BAD_INPUT, True), told
    assert [path.name for path in other.iterdir()] == ["step_00000001.pt"]


def test_a_link_may_stand_for_the_whole_run(a_run: Path, words: list[str], call: Callable) -> None:
    link = a_run.with_name("link")
    link.symlink_to(a_run)
    assert call("pretrain", *words, "--output", link)[0] == Status.DONE


def test_a_pipe_in_a_run_stops_nobody(a_run: Path, words: list[str], call: Callable) -> None:
    os.mkfifo(a_run / ".config.yaml.partial")
    assert call("pretrain", *words, "max_steps=4", "--output", a_run)[0] == Status.BAD_INPUT


def test_a_report_shows_nothing_from_elsewhere(a_run: Path, call: Callable, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"auths": "hunter2"}')
    out = tmp_path / "out"
    for name in ("results/docker.json", "views.png"):
        (a_run / name).parent.mkdir(exist_ok=True)
        (a_run / name).unlink(missing_ok=True)
        (a_run / name).symlink_to(secret)
        status, _, told = call("report", a_run, "--output", out)
        assert (status, "is a link or a device" in told) == (Status.BAD_INPUT, True), told
        (a_run / name).unlink()
    assert not out.exists()
    out.mkdir()
    for name in ("report.html", "report.md", ".report.html.partial"):
        (out / name).symlink_to(secret)
    assert call("report", a_run, "--output", out)[0] == Status.DONE
    assert secret.read_text() == '{"auths": "hunter2"}'
    assert not (out / "report.html").is_symlink()


def test_another_users_run_is_left_alone(
    a_run: Path, words: list[str], call: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in a_run.rglob("*") if path.is_file()}
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(a_run).st_uid + 1)
    for line in (
        ["pretrain", *words, "max_steps=4", "--output", a_run],
        ["knn", a_run],
        ["linear-probe", a_run],
        ["semi-supervised", a_run, "--percent", 10],
        ["launch", "pretrain", *words, "--output", a_run],
    ):
        status, _, told = call(*line)
        assert (status, "belongs to user" in told.splitlines()[-1]) == (Status.BAD_INPUT, True), told
    assert before == {path: path.read_bytes() for path in a_run.rglob("*") if path.is_file()}
    (a_run / "logs").mkdir(exist_ok=True)
    with pytest.raises(BadInput, match="belongs to user"):
        launch.submit([launch.Job(["report", "x"])], launch.Resources(cluster="local"), "report", a_run / "logs")


def test_pickles_in_the_logs_of_a_strangers_run_are_not_loaded(
    a_run: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job on this machine has its process's number, which can be guessed: here all those that may come next."""
    payload = a_run / "logs" / "payload.pkl"
    payload.parent.mkdir(exist_ok=True)
    payload.write_bytes(pickle.dumps(Payload(marker)))
    fires(marker, lambda: pickle.loads(payload.read_bytes()))  # noqa: S301
    number = subprocess.Popen([sys.executable, "-c", ""])
    number.wait()
    for place in (payload.parent, payload.parent / "report_1"):
        place.mkdir(exist_ok=True)
        for following in range(number.pid, number.pid + 3000):
            for what in ("submitted", "0_result"):
                os.link(payload, place / f"{following}_{what}.pkl")
    # One that fails writes no result, so that what lies there is its result.
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 0)
    lost = launch.Job(["report", "nowhere"])
    (job,) = launch.submit([lost], launch.Resources(cluster="local"), "report", payload.parent)
    assert number.pid < int(job.job_id) < number.pid + 3000
    assert "has not produced any output" in str(job.exception())
    assert not marker.exists()
    assert "no run folder" in (payload.parent / "report_2" / f"{job.job_id}_0_log.out").read_text()


def test_a_run_that_others_may_write_to_is_named(a_run: Path, caplog: pytest.LogCaptureFixture) -> None:
    RunFolder(a_run).require_own()
    assert "others can write to" not in caplog.text
    a_run.chmod(0o777)
    RunFolder(a_run).require_own()
    assert "others can write to" in caplog.text


def test_an_export_is_not_written_through_a_link(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("precious")
    for name in (".x.partial.pkl", "x.pkl"):
        (tmp_path / name).symlink_to(mine)
    export._put(tmp_path / "x.pkl", lambda partial: partial.write_text("weights"), lambda partial: None)
    assert (mine.read_text(), (tmp_path / "x.pkl").read_text()) == ("precious", "weights")


def test_a_listing_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_PIPELINE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "pictures"
    root.mkdir()
    (root / "x.png").write_bytes(png())
    (tmp_path / "cache" / "listings").mkdir(parents=True)
    monkeypatch.setattr(listing, "CACHED_FROM", 1)
    monkeypatch.setattr(listing, "SETTLED", -1.0)
    listing.listing(root)
    (kept,) = (tmp_path / "cache" / "listings").iterdir()
    values = listing.read_arrays(kept)
    listing.write_arrays(kept, {**values, "pictures": listing.blob(["../../etc/x.png"])})
    assert listing.listing(root).pictures == ("../../etc/x.png",)  # it would be
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(kept).st_uid + 1)
    assert listing.listing(root).pictures == ("x.png",)


# --------------------------------------------------------------------------------------------------------------- the report
class Scripts(HTMLParser):
    """Whatever in a page would run or load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [tag] * (tag in ("script", "iframe", "object", "embed", "svg", "link", "base", "form"))
        self.found += [name for name, _ in attrs if name.startswith("on")]
        loaded = [value or "" for name, value in attrs if name in ("src", "srcset", "href", "data", "action")]
        ours = ("data:image/png;base64,", "data:image/jpeg;base64,", "#")
        self.found += [value[:60] for value in loaded if not value.startswith(ours)]


EVIL = "\"><script>alert(1)</script><img src=x onerror=alert(1)>[x](javascript:alert(1))' onload='alert(1)"


def test_nothing_of_a_run_is_a_script_in_its_report(whole_run: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / EVIL.replace("/", "\N{DIVISION SLASH}"))
    shutil.copytree(whole_run, run.path)
    values = run.read_config()
    values["data"]["name"] = values["backbone"]["name"] = EVIL
    values["method"]["name"] = EVIL
    run.config.write_text(config.dump_yaml(values))
    run.write_result("knn", {EVIL: EVIL, "knn5_top1": 1.0, "changed": [EVIL], "preset": EVIL, "chosen_on": EVIL})
    run.write_result("other", {"rows": [{EVIL: EVIL}], "deep": {EVIL: {EVIL: EVIL}}})
    versions = {EVIL: EVIL, "torch": EVIL}
    run.record("start", host=EVIL, nodes=EVIL, device=EVIL, step=0, steps=3, ranks=1, versions=versions, pictures=EVIL)
    layer = {EVIL: EVIL, "eigenvalues": [1.0, 0.5], "rank": 2}
    points = {"axes": [EVIL, EVIL], "points": [[0, 1]], "labels": [0], "classes": [EVIL]}
    norms = [{"name": EVIL, "groups": EVIL, "norms": [1.0], "threshold": 0.1, "active": 1}]
    run.write_result("spectrum", {"r": layer, "z": layer})
    run.write_result(f"knn_{EVIL.replace('/', '')}", {"knn5_top1": 1.0})
    shown = {"projection": points, "group_norms": norms, "cosines": {EVIL: EVIL}}
    run.write_result(
        f"analysis_{EVIL.replace('/', '')}", {f"head_{EVIL}": 1.0, f"embedding_{EVIL}": 2.0, "pictures": shown}
    )
    with run.metrics.open("a") as file:
        file.write(json.dumps({"step": 3, f"heldout_{EVIL}": 1.0}) + "\n")
    assert Scripts(f"<p title='{EVIL}'>").found  # so it is one
    for runs in ([run], [run, RunFolder(whole_run)]):  # alone, and beside another one with all that differs
        page = report.page(runs, title=EVIL, note=EVIL)
        assert Scripts(page).found == []
        parts = set(re.findall('<section id="([a-z]+)">', page))
        assert {"measures", "spectra", "head", "projection", "heldout", "config", "environment"} <= parts
    markdown = re.sub("(`+).*?\\1", "", report.markdown([run], title=EVIL, note=EVIL))
    assert "<script" not in markdown
    assert "<img" not in markdown
    assert not re.search(r"(?<!\\)\]\(javascript", markdown)


def test_results_that_are_too_deep_to_read_are_one_sentence(a_run: Path, call: Callable) -> None:
    (a_run / "results").mkdir(exist_ok=True)
    (a_run / "results" / "knn.json").write_text("[" * 200_000 + "]" * 200_000)
    status, _, told = call("report", a_run)
    assert (status, "is no JSON" in told) == (Status.BAD_INPUT, True), told


# ------------------------------------------------------------------------------------------------------------- the source
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.startfile", "tempfile.mktemp"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "pickle.load", "pickle.loads", "pickle.Unpickler"),
    *("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "pd.read_pickle", "shutil.unpack_archive"),
}
PLAIN = {
    "torch.load": ("weights_only", "True"),
    "torch.hub.load_state_dict_from_url": ("weights_only", "True"),
    "entry.get_state_dict": ("weights_only", "True"),
    "np.load": ("allow_pickle", "False"),
    "numpy.load": ("allow_pickle", "False"),
    "yaml.load": ("Loader", "_Loader"),
    "Image.open": ("formats", None),
    "cfg.merge_from_file": ("allow_unsafe", "False"),
}
"""Calls and what each must say of itself."""


def dangers(tree: ast.AST, file: str = "") -> list[str]:
    """What in a module could run a stranger's data as code, or a name as a command."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            imported = {alias.name for alias in node.names}
            known = file == "export.py" or imported == {"UnpicklingError"}
            found += [f"import {name}" for name in names if name.split(".")[0] in PICKLES and not known]
        if not isinstance(node, ast.Call):
            continue
        call, words = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        last = call.rpartition(".")[2]
        first = node.args[0] if node.args else None
        if (
            call in CALLS
            or call.startswith(("os.exec", "os.spawn"))
            or last in ("extractall", "extract_all", "extract")
        ):
            known = call in ("features.extract", "extract")
            found += [] if known else [call]
        if call.startswith("dist.") and "_object" in last:
            found.append(call)
        if re.fullmatch(r"yaml\.\w+", call) and last not in ("load", "safe_dump"):
            found.append(call)
        if words.get("shell", "False") != "False":
            found.append(f"{call}(shell)")
        if call.startswith("subprocess.") and isinstance(first, (ast.Constant, ast.JoinedStr, ast.BinOp)):
            found.append(f"{call} of a string")
        if last == "import_module" and "ssl_pipeline.methods." not in ast.unparse(node):
            found.append(call)
        if call in PLAIN:
            key, value = PLAIN[call]
            if key not in words or (value is not None and words[key] != value):
                found.append(f"{call} without {key}")
    return found


@pytest.mark.parametrize(
    "text",
    [
        "os.system('ls')", "eval('1')", "exec(x)", "subprocess.run('ls', shell=True)", "subprocess.run(f'ls {x}')",
        "subprocess.run(x, shell=y)", "import pickle", "from pickle import loads", "from cloudpickle import load",
        "torch.load(x)", "torch.load(x, weights_only=False)", "np.load(x)", "np.load(x, allow_pickle=True)", "yaml.load(x)",
        "yaml.load(x, Loader=yaml.UnsafeLoader)", "yaml.unsafe_load(x)", "tar.extractall(p)", "tar.extract(m)",
        "tempfile.mktemp()", "dist.all_gather_object(a, b)", "dist.broadcast_object_list(a)", "Image.open(x)",
        "importlib.import_module(name)", "os.execvp(a, b)", "__import__(x)",
    ],
)  # fmt: skip
def test_dangers_are_seen(text: str) -> None:
    assert dangers(ast.parse(text))


def test_the_source_has_no_dangers() -> None:
    files = [*(ROOT / "ssl_pipeline").rglob("*.py"), *(ROOT / "tools").glob("*.py"), ROOT / "setup.py"]
    assert len(files) > 50
    found = {f"{path.relative_to(ROOT)}": dangers(ast.parse(path.read_text()), path.name) for path in files}
    assert {path: what for path, what in found.items() if what} == {}
    for script in (*(ROOT / "slurm").glob("*.sh"), ROOT / ".ci" / "run"):
        assert not re.search(r"\beval\b|\b(ba)?sh -c\b", script.read_text()), script
