from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ssl_pipeline import cli, config
from ssl_pipeline.exits import Status
from ssl_pipeline.run_folder import RunFolder, read_lines

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


def test_a_stderr_that_refuses_the_sentence_leaves_the_status() -> None:
    """As a file on the very disk that is full."""
    with Path("/dev/full").open("w") as full:
        line = [sys.executable, "-m", "ssl_pipeline", "pretrain", "nonsense", "--output", "nowhere"]
        assert subprocess.run(line, stderr=full, check=False).returncode == Status.BAD_INPUT


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


@pytest.mark.slow
def test_pretrain_then_evaluate_a_run_and_a_bare_file(few_digits: Path, command: Callable, tmp_path: Path) -> None:
    done = command(
        "pretrain", "smoke", f"data.root={few_digits}", "data.batch_size=16", "--output", "run", "max_steps=3"
    )
    assert done.returncode == 0, done.stderr
    done = command("knn", "run", "--k", "3")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "results" / "knn_k3.json").read_text())
    assert {"knn3_top1", "knn3_top5"} <= result.keys()
    assert f"knn3_top1: {result['knn3_top1']:.2f} %" in done.stdout
    bare = command("knn", "run/backbone.pth", "--config", "smoke", f"data.root={few_digits}", "--k", "3")
    assert f"knn3_top1: {result['knn3_top1']:.2f} %" in bare.stdout, bare.stderr
    done = command("linear-probe", "run", "recipe.epochs=20", "--random-init")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "results" / "linear_probe_random_init.json").read_text())
    assert result["protocol"] == "small"
    assert f"linear_top1: {result['linear_top1']:.2f} %" in done.stdout


@pytest.fixture(scope="module")
def small_run(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps on a few digits."""
    run = tmp_path_factory.mktemp("small") / "run"
    words = [f"data.root={few_digits}", "data.batch_size=16", "max_steps=3", "--output", str(run)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ssl_pipeline.distributed.stop", lambda: None)
        assert cli.main(["pretrain", "smoke", *words]) == Status.DONE
    return run


def called(*words: object) -> int:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ssl_pipeline.distributed.stop", lambda: None)  # the tests' own process group stays
        return cli.main([str(word) for word in words])


def result_of(run: Path, name: str) -> dict:
    return json.loads((run / "results" / f"{name}.json").read_text())


def test_linear_probe_by_each_protocol(small_run: Path, capsys: pytest.CaptureFixture) -> None:
    short = ["recipe.epochs=1", "recipe.batch_size=32"]
    assert called("linear-probe", small_run, "--protocol", "imagenet", "--preset", "vicreg", *short) == Status.DONE
    found = result_of(small_run, "linear_probe_imagenet")  # the data set's own protocol has the plain name
    assert (found["protocol"], found["preset"], found["learning_rate"]) == ("imagenet", "vicreg", 0.02)
    assert Path(found["folder"]).parent == small_run / "evaluations"
    assert "best_epoch_chosen_on: val" in capsys.readouterr().out
    assert called("linear-probe", small_run, "--protocol", "logistic", "recipe.c=[1.0]") == Status.DONE
    assert result_of(small_run, "linear_probe_logistic")["c"] == 1.0
    assert called("linear-probe", small_run, "recipe.epochs=2", "data.protocol=small") == Status.DONE
    found = result_of(small_run, "linear_probe")
    assert (found["protocol"], found["changed"]) == ("small", ["epochs=2", "data.protocol=small"])
    assert (found["recipe"]["epochs"], found["ranks"]) == (2, 1)
    assert called("linear-probe", small_run, "recipe.epochs=3") == Status.DONE
    (superseded,) = read_lines(small_run / "results" / "superseded.jsonl")
    assert superseded == {"name": "linear_probe", **found}


def test_semi_supervised_keeps_its_list(small_run: Path) -> None:
    words = ["semi-supervised", small_run, "--percent", "10", "recipe.epochs=1", "recipe.batch_size=10"]
    assert called(*words) == Status.DONE
    found = result_of(small_run, "semi_supervised_10percent")
    names = Path(found["labelled_list"]).read_text().split()
    assert len(names) == found["labelled_pictures"] == 20
    assert all(name.partition("/")[0].isdigit() for name in names)  # a class folder and a picture
    assert {"semi_top1", "semi_top5", "best_epoch_top1"} <= found.keys()
    assert found["preset"] == "barlow_twins"
    assert called(*words, "--preset", "swav") == Status.DONE
    assert result_of(small_run, "semi_supervised_10percent")["preset"] == "swav_10percent"


def test_transfer_and_a_backbone_that_is_no_run(small_run: Path, photos: Path, tmp_path: Path) -> None:
    view = "data.evaluation_view={size: 32, ops: [{op: center_crop, resize: 32}, {op: normalize}]}"
    assert called("knn", small_run, "--data", photos, view) == Status.DONE
    assert called("linear-probe", small_run, "--data", photos, view) == Status.DONE
    assert result_of(small_run, "linear_probe@photos")["protocol"] == "logistic"
    assert "knn5_top1" in result_of(small_run, "knn@photos")
    data = "data.root=" + config.flatten(RunFolder(small_run).read_config())["data.root"]
    file = small_run / "backbone.pth"
    assert called("knn", file, "--config", "smoke", data, "--output", tmp_path / "other") == Status.DONE
    assert result_of(tmp_path / "other", "knn_backbone").items() >= {"weights": str(file)}.items()
    assert called("report", tmp_path / "other", small_run, "--output", tmp_path / "page") == Status.DONE
    assert "knn_backbone" in (tmp_path / "page" / "report.html").read_text()


def test_where_nothing_can_be_written_is_said_before_the_work(
    small_run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("it began to work")

    for name in ("features.extract_each", "features.network", "analysis.run", "spectrum.run", "report.page", "knn.run"):
        monkeypatch.setattr(f"ssl_pipeline.evaluation.{name}", work)
    verbs = [
        ["knn", small_run],
        ["linear-probe", small_run],
        ["linear-probe", small_run, "--protocol", "imagenet"],
        ["semi-supervised", small_run, "--percent", "10"],
        ["analyze", small_run],
        ["spectrum", small_run],
        ["spectrum", small_run, small_run / "backbone.pth"],
        ["report", small_run],
    ]
    (tmp_path / "file").touch()
    for words in verbs:
        assert called(*words, "--output", tmp_path / "file" / "out") == Status.BAD_INPUT
        told = capsys.readouterr().err
        assert "file/out" in told
        assert told.endswith(": Not a directory; name another folder by --output\n")
        assert told.count("\n") == 1

    def read_only(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    for words in verbs:
        assert called(*words) == Status.BAD_INPUT
        assert capsys.readouterr().err.endswith(": Read-only file system; name another folder by --output\n")


def test_weights_are_read_once_and_an_unknown_option_shows_its_verbs_usage(
    small_run: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ssl_pipeline")
    for verb in ("knn", "linear-probe"):
        assert called(verb, small_run, *(["recipe.epochs=2"] if verb == "linear-probe" else [])) == Status.DONE
        assert sum("read as bare names" in line for line in caplog.messages) == 1, verb
        caplog.clear()
    capsys.readouterr()
    for words in (["spectrum", small_run, "--piktures", "3"], ["status", small_run, "data.name=x"], ["launch"]):
        with pytest.raises(SystemExit):
            called(*words)
        assert capsys.readouterr().err.startswith(f"usage: ssl-pipeline {words[0]} ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["linear-probe", "RUN", "--preset", "simclr"], "--preset is for the protocol imagenet, and this is small"),
        (
            ["linear-probe", "RUN", "--protocol", "imagenet", "--preset", "x"],
            "no preset 'x' of linear-probe: neither a file",
        ),
        (
            ["linear-probe", "RUN", "recipe.epoch=3"],
            "unknown key `recipe.epoch`; the nearest is `recipe.epochs`",
        ),
        (["linear-probe", "RUN", "epochs=3"], "'epochs' does not change an evaluation"),
        (["knn", "RUN", "seed=3"], "seed belongs to --random-init"),
        (["knn", "RUN", "seed=abc", "--random-init"], "`seed` = 'abc'"),
        (["knn", "RUN", "--config", "smoke"], "is a run and has its own config"),
        (["semi-supervised", "RUN", "--percent", "10", "recipe.head_rates=[1]"], "are a sweep's: give --sweep"),
        (["linear-probe", "RUN", "--protocol", "imagenet", "recipe.learning_rates=[-1]"], "greater than 0"),
        (
            ["linear-probe", "RUN", "--protocol", "imagenet", "--preset", "simclr", "recipe.optim.momentum=0"],
            "nesterov needs",
        ),
        (["knn", "timm:resnet18.a1_in1k", "--config", "smoke", "--output", "RUN"], "holds results of"),
        (["linear-probe", "RUN", "--data", "nowhere"], "--data 'nowhere' has no folder train and no val"),
        (["knn", "RUN", "recipe.k=3"], "knn has no recipe.k=3: it takes --k and --temperature"),
        (["semi-supervised", "RUN", "--percent", "0"], "`percent` = 0.0"),
        (["semi-supervised", "RUN", "--percent", "1", "data.name=imagenet"], "no list of ImageNet's 1 %"),
        (["semi-supervised", "FILE", "--config", "smoke", "--percent", "1"], "give --output FOLDER"),
    ],
)
def test_evaluations_say_what_they_lack(
    words: list[str], said: str, small_run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("SSL_PIPELINE_CACHE", str(tmp_path))
    for name in ("backbone.pth", "backbone.json"):
        shutil.copyfile(small_run / name, tmp_path / name)
    places = {"RUN": str(small_run), "FILE": str(tmp_path / "backbone.pth")}
    assert called(*(places.get(word, word) for word in words)) == Status.BAD_INPUT
    assert said in capsys.readouterr().err


def test_tools_are_the_verbs() -> None:
    for name, verb in (
        ("knn", "knn"),
        ("linear_probe", "linear-probe"),
        ("semi_supervised", "semi-supervised"),
        ("prepare_data", "prepare-data"),
        ("report", "report"),
        ("convert_to_detectron2", "convert-to-detectron2"),
        ("train_detectron2", "train-detectron2"),
        ("pack_shards", "pack-shards"),
        ("check_data", "check-data"),
        ("spectrum", "spectrum"),
    ):
        done = subprocess.run(
            [sys.executable, str(ROOT / "tools" / f"{name}.py"), "--help"], capture_output=True, text=True, check=True
        )
        assert f"ssl-pipeline {verb}" in done.stdout


@pytest.mark.parametrize(
    ("words", "status", "heavy"),
    [
        (["--help"], 0, ("torch", "numpy", "pydantic", "timm", "nvidia.dali")),
        (["config"], 0, ("torch", "numpy", "timm", "nvidia.dali")),
        (["config", "cifar10/simclt"], 2, ("torch", "numpy", "timm", "nvidia.dali")),
        (["pretrain", "cifar10/simclt", "--output", "x"], 2, ("torch", "numpy", "timm", "nvidia.dali")),
    ],
    ids=["help", "list", "wrong name", "wrong name to pretrain"],
)
def test_what_needs_nothing_heavy_imports_nothing_heavy(words: list[str], status: int, heavy: tuple[str, ...]) -> None:
    program = (
        "import sys; from ssl_pipeline.cli import main\ntry: status = main(sys.argv[1:])\n"
        f"except SystemExit as e: status = e.code or 0\nsys.exit(status + 10 * any(m in sys.modules for m in {heavy}))"
    )
    assert (
        subprocess.run([sys.executable, "-c", program, *words], capture_output=True, check=False).returncode == status
    )
