from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ssl_pipeline import cli
from ssl_pipeline.exits import Status

ROOT = Path(__file__).parents[1]


def test_a_mistyped_key_names_the_nearest_and_exits_2(command: Callable, tmp_path: Path) -> None:
    done = command("pretrain", "cifar10/simclr", "head.sparze.weight=1", "--output", "x")
    assert done.returncode == Status.BAD_INPUT
    assert done.stderr.strip().splitlines() == [
        "ssl-pipeline: unknown key `head.sparze` (command line); the nearest is `head.sparse`"
    ]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["config", "cifar10/simcl"], "the nearest is `cifar10/simclr`"),
        (["config", "cifar10/simclr", "optim.learning_rate=fast"], "`optim.learning_rate` = 'fast' (command line)"),
        (["config", "cifar10/simclr", "--ranks", "0"], "--ranks 0 is no number of processes"),
        (["config", "cifar10/simclr", "--ranks", "3"], "cannot be divided by 3 ranks"),
        (["config", "cifar10/simclr", "backbone.name=resnet17"], "is no timm model"),
        (["pretrain", "cifar10/simclr", "data.root=nowhere", "--output", "x"], "no folder 'nowhere/train'"),
        (["knn", "nowhere"], "neither a run folder nor a file of weights"),
        (["prepare-data", "digit", "out"], "choose among digits"),
        (["demo", "--method", "simclrr", "--data", "."], "simclr"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ssl_pipeline.distributed.stop", lambda: None)  # the tests' own process group stays
    assert cli.main(words) == Status.BAD_INPUT
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not (tmp_path / "x").exists()


def test_config_prints_values_origins_and_consequences(
    few_digits: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssl_pipeline.distributed.stop", lambda: None)
    words = ["config", "digits/simclr_sparsehead", "--ranks", "2", "--explain", f"data.root={few_digits}"]
    assert cli.main([*words, "data.batch_size=32", "optim.scale_with_batch=true"]) == 0
    out = capsys.readouterr().out
    for words_expected in (
        "head.sparse.weight = 0.0001    # _sparsehead.yaml",
        "data.batch_size = 32    # command line",
        "optim.momentum = 0.9    # default",
        "batch per rank: 16 on 2 ranks",
        "steps per epoch: 5",
        "learning rate: 0.000125",
        "head: mlp 512 -> 64",
        "last layer: 512 -> 64",
        "SparseHead: 0.0001 x L2,1 of columns",
        "views: 2 of 32 px: affine, jitter, normalize",
    ):
        assert words_expected in out
    assert cli.main(["config"]) == 0
    assert "imagenet/barlow_twins_sparsehead" in capsys.readouterr().out.splitlines()


def test_pretrain_then_evaluate_a_run_and_a_bare_file(few_digits: Path, command: Callable, tmp_path: Path) -> None:
    done = command(
        "pretrain", "smoke", f"data.root={few_digits}", "data.batch_size=16", "--output", "run", "max_steps=3"
    )
    assert done.returncode == 0, done.stderr
    done = command("knn", "run", "--k", "3")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "results" / "knn.json").read_text())
    assert {"knn3_top1", "knn3_top5"} <= result.keys()
    assert f"knn3_top1: {result['knn3_top1']:.2f} %" in done.stdout
    bare = command("knn", "run/backbone.pth", "--config", "smoke", f"data.root={few_digits}", "--k", "3")
    assert f"knn3_top1: {result['knn3_top1']:.2f} %" in bare.stdout, bare.stderr
    done = command("linear-probe", "run", "--epochs", "20", "--random-init")
    assert done.returncode == 0, done.stderr
    assert "linear_top1" in json.loads((tmp_path / "run" / "results" / "linear_probe_random_init.json").read_text())


def test_tools_are_the_verbs() -> None:
    for name, verb in (
        ("knn", "knn"),
        ("linear_probe", "linear-probe"),
        ("prepare_data", "prepare-data"),
        ("report", "report"),
    ):
        done = subprocess.run(
            [sys.executable, str(ROOT / "tools" / f"{name}.py"), "--help"], capture_output=True, text=True, check=True
        )
        assert f"ssl-pipeline {verb}" in done.stdout


def test_help_imports_nothing_heavy() -> None:
    program = "import sys; from ssl_pipeline.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n" \
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'pydantic', 'timm', 'nvidia.dali')))"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0
