import csv
import gc
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ssl_pipeline import checkpoint, cli, config, distributed
from ssl_pipeline.data.index import read_index
from ssl_pipeline.evaluation import features, pictures, spectrum
from ssl_pipeline.exits import Status
from ssl_pipeline.pretrain import PretrainConfig, build_method
from ssl_pipeline.run_folder import RunFolder
from tests.ranks import on_ranks

NUMBERS = ("rank", "rank_1e-6", "rank_1e-4", "rank_1e-2")


def run_of(folder: Path, root: Path, *overrides: str, dead: int = 0) -> Path:
    """A run that was stopped at step 7, whose head's `dead` first outputs are always 0."""
    options = config.validate(PretrainConfig, config.load("smoke", [f"data.root={root}", *overrides]).values)
    method = build_method(options)
    with torch.no_grad():
        if dead:
            method.head.last_layer.weight[:dead] = 0
            method.head.last_layer.bias[:dead] = 0
    run = RunFolder(folder)
    run.describe(options.model_dump(mode="json"))
    torch.save(method.evaluated_backbone().state_dict(), run.backbone)
    checkpoint.write(run.checkpoints, {"step": 7, "model": method.state_dict(), "monitor": {}}, keep=1)
    return folder


def measured(folder: Path, batch_size: int = 16) -> dict:
    source = features.options(folder).model_copy(update={"batch_size": batch_size})
    return spectrum.run(spectrum.Options(features=source, run=folder))


def called(*words: object) -> int:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ssl_pipeline.distributed.stop", lambda: None)  # the tests' own process group stays
        return cli.main([str(word) for word in words])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_stream_gives_what_numpy_gives_of_all_at_once(few_digits: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", few_digits, dead=5)
    found = measured(run)
    backbone, head, _ = features.trained(RunFolder(run))
    r = features.features_of(
        backbone, read_index(few_digits / "val"), features.options(run), distributed.start()
    ).values.double()
    z = head.double()(r).detach()
    for layer, whole in (("r", r), ("z", z)):
        singular = np.linalg.svd((whole - whole.mean(dim=0)).numpy(), compute_uv=False)
        expected = np.zeros(whole.shape[1])
        expected[: len(singular)] = singular**2 / len(whole)
        of = found[layer]
        assert (of["count"], of["dimensions"]) == whole.shape
        np.testing.assert_allclose(of["eigenvalues"], expected, rtol=1e-5, atol=1e-9 * expected[0])
        limits = (whole.shape[1] * np.finfo(np.float32).eps, 1e-6, 1e-4, 1e-2)
        assert [of[name] for name in NUMBERS] == [int((expected > expected[0] * limit).sum()) for limit in limits]
    assert found["r"]["eigenvalues"] == sorted(found["r"]["eigenvalues"], reverse=True)
    # Five outputs are constant: five eigenvalues are 0, however small the others are.
    assert found["z"]["rank_1e-6"] <= 27
    assert all(value <= 1e-14 * found["z"]["eigenvalues"][0] for value in found["z"]["eigenvalues"][-5:])
    assert (found["split"], found["step"]) == ("val", 7)


def test_an_identity_has_one_spectrum(few_digits: Path, tmp_path: Path) -> None:
    found = measured(run_of(tmp_path / "run", few_digits, "head.kind=identity", "head.sparse.weight=0"))
    assert found["z"] == found["r"]
    assert found["r"]["dimensions"] == 64


class Wide(nn.Module):
    """Pictures to 300 features by a fixed projection; notes how many rows of such features are held when it is called."""

    num_features = 300

    def __init__(self) -> None:
        super().__init__()
        self.held: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = [one for one in gc.get_objects() if type(one) is torch.Tensor and one.shape[1:] == (300,)]
        self.held.append(sum(len(one) for one in held if len(one) != 300))  # not of the covariance
        return x.flatten(1) @ torch.cos(torch.arange(x[0].numel() * 300) % 1009).view(-1, 300)


def test_no_more_is_held_of_more_pictures(few_digits: Path, tmp_path: Path) -> None:
    for copy in range(3):
        for path in (few_digits / "val").glob("*/*"):
            folder = tmp_path / "three" / path.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / f"{copy}_{path.name}")
    options = features.options(run_of(tmp_path / "run", few_digits)).model_copy(update={"batch_size": 20})
    peaks = []
    for folder, count in ((few_digits / "val", 60), (tmp_path / "three", 180)):
        wide = Wide().eval()
        found = spectrum.spectra(wide, None, read_index(folder), options, distributed.start())
        assert (found["r"]["count"], len(wide.held)) == (count, count // 20)
        peaks.append(max(wide.held))
    assert peaks[0] == peaks[1] <= 60


def on_this_rank(runs: list[str]) -> list[dict]:
    return [measured(Path(run), batch_size=8) for run in runs]


def test_two_ranks_and_one_measure_the_same(few_digits: Path, tmp_path: Path) -> None:
    """Of a split of which the last batch leaves a rank without a picture."""
    (tmp_path / "odd" / "val").mkdir(parents=True)
    for number, path in enumerate(sorted((few_digits / "val").glob("*/*"))[:17]):
        shutil.copyfile(path, tmp_path / "odd" / "val" / f"{number:02d}.png")  # no classes: no labels are needed
    runs = [str(run_of(tmp_path / "run", tmp_path / "odd"))]
    (one,) = on_this_rank(runs)
    (first,), (second,) = on_ranks(2, on_this_rank, runs)
    assert first == second
    for layer in spectrum.LAYERS:
        assert first[layer]["count"] == one[layer]["count"] == 17
        assert 0 < first[layer]["rank"] == one[layer]["rank"] <= 16
        np.testing.assert_allclose(
            first[layer]["eigenvalues"], one[layer]["eigenvalues"], rtol=1e-4, atol=1e-9 * one[layer]["eigenvalues"][0]
        )


def test_the_verb_writes_a_table_and_a_picture_of_each_run_and_of_all(
    few_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one = run_of(tmp_path / "one", few_digits, "head.kind=identity", "head.sparse.weight=0")
    two = run_of(tmp_path / "deep" / "two", few_digits, dead=3)
    assert called("spectrum", two) == Status.DONE
    result = json.loads((two / "results" / "spectrum.json").read_text())
    out = capsys.readouterr().out
    for layer, size in (("r", 64), ("z", 32)):
        of = result[layer]
        said = (
            f"{layer}: of {size} eigenvalues {of['rank']} above lambda_max * {size} * eps(float32), "
            f"{of['rank_1e-6']} above 1e-6, {of['rank_1e-4']} above 1e-4, {of['rank_1e-2']} above 1e-2 of lambda_max; 60 pictures"
        )
        assert said + (", which fill 59 dimensions at most" if layer == "r" else "") in out.splitlines()
    assert (result["step"], result["ranks"]) == (7, 1)
    assert result["weights"] == str(two / "checkpoints" / "step_00000007.pt")
    rows = rows_of(two / "results" / "spectrum.csv")
    assert list(rows[0]) == ["layer", "index", "eigenvalue", "log10"]
    for layer in spectrum.LAYERS:
        own = [row for row in rows if row["layer"] == layer]
        assert [int(row["index"]) for row in own] == list(range(1, len(own) + 1))
        assert [float(row["eigenvalue"]) for row in own] == result[layer]["eigenvalues"]
        for row in own:
            value = float(row["eigenvalue"])
            assert float(row["log10"]) == (pytest.approx(math.log10(value)) if value else -math.inf)
    assert (two / "results" / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    assert called("spectrum", one, two, "--output", tmp_path / "figure", "--split", "train") == Status.DONE
    rows = rows_of(tmp_path / "figure" / "spectrum_train.csv")
    assert [(name, layer) for name, layer in dict.fromkeys((row["run"], row["layer"]) for row in rows)] == [
        ("one", "r"), ("one", "z"), ("two", "r"), ("two", "z"),
    ]  # fmt: skip
    assert (tmp_path / "figure" / "spectrum_train.png").is_file()
    both = json.loads((tmp_path / "figure" / "spectrum_train.json").read_text())
    assert [both[name]["r"]["count"] for name in ("one", "two")] == [160, 160]
    assert not (one / "results").exists()  # with --output nothing is written elsewhere
    assert called("spectrum", one, two / "backbone.pth", "--split", "train") == Status.DONE
    assert json.loads((one / "results" / "spectrum_train.json").read_text())["r"] == both["one"]["r"]
    assert json.loads((two / "results" / "spectrum_train_backbone.json").read_text())["r"] == both["two"]["r"]
    assert (tmp_path / "spectrum_train.png").is_file()
    assert called("spectrum", two / "backbone.pth") == Status.DONE
    bare = json.loads((two / "results" / "spectrum_backbone.json").read_text())
    assert bare["r"] == result["r"]
    assert "z" not in bare


def test_output_takes_everything_and_data_names_other_pictures(few_digits: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", few_digits)
    before = sorted(run.rglob("*"))
    other = tmp_path / "other"
    (other / "test").mkdir(parents=True)
    for number, path in enumerate(sorted((few_digits / "val").rglob("*.png"))[:20]):
        shutil.copyfile(path, other / "test" / f"{number}.png")
    out = tmp_path / "out"
    assert called("spectrum", run, "--output", out) == Status.DONE
    assert called("spectrum", run / "backbone.pth", "--output", tmp_path / "file") == Status.DONE
    assert called("spectrum", run, "--data", other, "--split", "test", "--output", out) == Status.DONE
    assert sorted(run.rglob("*")) == before
    names = [f"spectrum{what}.{ending}" for what in ("", "_test@other") for ending in ("csv", "json", "png")]
    assert sorted(path.name for path in (out / "results").iterdir()) == names
    assert {path.name for path in (tmp_path / "file" / "results").iterdir()} == {
        f"spectrum_backbone.{ending}" for ending in ("csv", "json", "png")
    }
    found = json.loads((out / "results" / "spectrum_test@other.json").read_text())
    assert (found["r"]["count"], found["data_name"]) == (20, "other")
    assert found["weights"] == str(run / "checkpoints" / "step_00000007.pt")
    assert json.loads((out / "results" / "spectrum.json").read_text())["r"]["count"] == 60


def test_what_cannot_be_measured_is_said(
    few_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_of(tmp_path / "run", few_digits)
    run_of(tmp_path / "bare", few_digits)
    shutil.rmtree(tmp_path / "bare" / "checkpoints")
    run_of(tmp_path / "diverged", few_digits)
    state = checkpoint.read(tmp_path / "diverged" / "checkpoints" / "step_00000007.pt")
    state["model"]["head.layers.0.bias"][0] = float("nan")
    checkpoint.write(tmp_path / "diverged" / "checkpoints", state, keep=1)
    shutil.copyfile(tmp_path / "run" / "backbone.pth", tmp_path / "alone.pth")
    for words, said in (
        (["bare"], "'bare' has no checkpoint, and backbone.pth holds no head: its representation alone"),
        (["diverged"], "some features are not finite numbers"),
        (["alone.pth"], "is bare weights: give --config NAME"),
        (["nowhere"], "'nowhere' is neither a run folder nor a file of weights"),
        (["run", "./run"], "'run' is given twice"),
        (["run", "--split", "../val"], "--split '../val' is no name of a folder"),
        (["run", "--split", "test"], "no folder"),
        (["run", "--data", "run"], "--data 'run' has no folder val"),
        (["run", "data.rooot=x"], "unknown key `data.rooot`"),
        (["run", "epochs=3"], "'epochs=3' is neither a run folder nor a file of weights"),
    ):
        assert called("spectrum", *words) == Status.BAD_INPUT, words
        error = capsys.readouterr().err
        assert said in error
        assert "Traceback" not in error
    assert not list(tmp_path.rglob("spectrum*"))


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / ".spectrum.csv.partial").symlink_to(tmp_path / "mine")
    spectrum.write_file(tmp_path / "spectrum.csv", b"ours")
    assert (tmp_path / "mine").read_text() == "precious"
    assert (tmp_path / "spectrum.csv").read_bytes() == b"ours"
    assert not (tmp_path / "spectrum.csv").is_symlink()


def test_a_picture_of_zeros_and_of_names_that_are_code(tmp_path: Path) -> None:
    """Constant features, rank-deficient ones, one picture: a logarithm of 0 fails nowhere, and no warning is made."""
    zeros = {"eigenvalues": [0.0] * 4, "rank": 0}
    few = {"eigenvalues": [3.0, 0.5, 1e-17, 0.0], "rank": 2}
    for runs in ({"a": {"r": zeros}}, {"$a_b$ \n\x1b": {"r": few, "z": few}, "b" * 300: {"r": zeros, "z": few}}):
        for palette in (pictures.LIGHT, pictures.DARK):
            assert pictures.spectrum(runs, palette).startswith(b"\x89PNG")
