import hashlib
import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from torch import Tensor

from ssl_pipeline import cli, config, distributed
from ssl_pipeline.data.index import read_index
from ssl_pipeline.data.loader import Loader
from ssl_pipeline.evaluation import analysis, features, pictures
from ssl_pipeline.exits import BadInput, Status
from ssl_pipeline.pretrain import PretrainConfig
from ssl_pipeline.run_folder import RunFolder
from tests.ranks import on_ranks

NAMES = ["cosines", "group_norms", "neighbours", "projection", "spectrum", "views"]
QUICK = ["data.batch_size=16", "max_steps=3", "head.sparse.where=all", "head.kind=mlp", "head.hidden=24"]


@pytest.fixture(scope="module")
def data(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The few digits, of whose held-out pictures some are there twice: at the same distance from every query."""
    root = tmp_path_factory.mktemp("data") / "twice"
    shutil.copytree(few_digits, root)
    for folder in sorted((root / "val").iterdir()):
        for path in sorted(folder.iterdir())[:2]:
            shutil.copyfile(path, folder / f"again_{path.name}")
    return root


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps."""
    folder = tmp_path_factory.mktemp("analysed") / "run"
    assert called("pretrain", "smoke", f"data.root={data}", *QUICK, "--output", folder) == Status.DONE
    return folder


def called(*words: object) -> int:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ssl_pipeline.distributed.stop", lambda: None)  # the tests' own process group stays
        return cli.main([str(word) for word in words])


def result_of(folder: Path, name: str = "analysis") -> dict:
    return json.loads((folder / "results" / f"{name}.json").read_text())


def files(folder: Path) -> dict[str, str]:
    """Digests of all files of a run, but for results/."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] != "results"
    }


def options_of(folder: Path, **changes: object) -> analysis.Options:
    values = config.validate(PretrainConfig, RunFolder(folder).read_config())
    found = {"features": features.options(folder), "run": folder, "views": values.data.views, **changes}
    return config.validate(analysis.Options, found)


@torch.no_grad()
def vectors(run: Path, views: list, samples: np.ndarray | None = None) -> list[dict[str, Tensor]]:
    """r and z of each view of held-out pictures, in the order of `samples`."""
    index = read_index(features.options(run).root / "val")
    index = index if samples is None else index.select(samples)
    backbone, head, _ = features.trained(RunFolder(run))
    loader = Loader(index, views, 7, seed=0, world=distributed.start(), training=False)
    batches = [batch.views for batch in loader]
    r = [backbone(torch.cat(of_view)) for of_view in zip(*batches, strict=True)]
    return [{"representation": one.double(), "embedding": head(one).double()} for one in r]


def test_numbers_are_what_the_pictures_give(run: Path, capsys: pytest.CaptureFixture) -> None:
    before = files(run)
    assert called("analyze", run, "--pictures", 30) == Status.DONE
    first = (run / "results" / "analysis.json").read_bytes()
    drawn = {name: (run / "results" / f"{name}.png").read_bytes() for name in NAMES}
    assert called("analyze", run, "--pictures", 30) == Status.DONE
    assert (run / "results" / "analysis.json").read_bytes() == first
    assert {name: (run / "results" / f"{name}.png").read_bytes() for name in NAMES} == drawn
    assert not (run / "results" / "superseded.jsonl").exists()
    assert files(run) == before
    printed = capsys.readouterr().out
    assert "embedding_alignment: " in printed
    assert "no head" not in printed
    assert "\nhead_groups: 24\n" in printed  # a count is printed as one
    numbers = re.findall(r"^(?:representation|embedding|head)_\w+: (.*)$", printed, flags=re.MULTILINE)
    assert max(len(re.sub(r"e.*|\D", "", number).strip("0")) for number in numbers) == 6
    assert f"written to {run / 'results' / 'cosines.png'}" in printed

    found = result_of(run)
    shown = found["pictures"]
    assert (found["pictures_held_out"], found["pictures_measured"], found["pictures_in_two_views"]) == (80, 80, 30)
    assert (found["step"], found["split"], found["data_name"]) == (3, "val", "digits")
    assert found["weights"] == str(run / "checkpoints" / "step_00000003.pt")
    assert all(isinstance(value, float) for key, value in found.items() if key.startswith(("repres", "embed", "head_")))

    # Two views of thirty pictures: cosines by numpy, pair by pair.
    options = options_of(run)
    chosen = analysis._drawn(0, 1, 80)[:30]
    assert len(set(chosen.tolist())) == 30
    views = vectors(run, options.views, chosen)
    for space in ("representation", "embedding"):
        u, v = ((z[space] / z[space].norm(dim=1, keepdim=True)).numpy() for z in views)
        cosines = u @ v.T
        positive, negative = cosines.diagonal(), cosines[~np.eye(30, dtype=bool)]
        of = shown["cosines"][space]
        assert sum(of["positive"]) == 30
        assert sum(of["negative"]) == 30 * 29
        for key, values in (("positive", positive), ("negative", negative)):
            assert of[f"{key}_mean"] == pytest.approx(values.mean(), abs=2e-5)
            assert found[f"{space}_{key}_cosine"] == pytest.approx(values.mean(), abs=2e-5)
            counts = np.histogram(values, of["edges"])[0]
            assert np.abs(counts - of[key]).sum() <= 4  # a cosine on an edge may fall to either side
        assert found[f"{space}_alignment"] == pytest.approx((2 - 2 * positive).mean(), abs=5e-5)

    # All held-out pictures as they are: spectra and distances.
    (plain,) = vectors(run, [options.features.view])
    for layer, space in (("r", "representation"), ("z", "embedding")):
        z = plain[space].numpy()
        values = np.linalg.eigvalsh(np.cov(z.T, bias=True))[::-1]
        theirs = shown["spectrum"][layer]["eigenvalues"]
        np.testing.assert_allclose(theirs, values, rtol=1e-3, atol=1e-5 * values[0])
        assert found[f"{space}_participation_ratio"] == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-3)

    assert called("spectrum", run) == Status.DONE
    assert result_of(run, "spectrum").items() >= shown["spectrum"].items()
    assert (run / "results" / "spectrum.png").read_bytes() == drawn["spectrum"]

    # The head.
    (first_layer, last_layer) = shown["group_norms"]
    state = torch.load(run / "checkpoints" / "step_00000003.pt", weights_only=True)["model"]
    for layer in (first_layer, last_layer):
        norms = np.sort(np.linalg.norm(state[f"{layer['name']}.weight"].numpy(), axis=0))[::-1]
        np.testing.assert_allclose(layer["norms"], norms, rtol=1e-5)
        assert layer["threshold"] == pytest.approx(norms[0] / 100, rel=1e-5)
        assert layer["active"] == (norms > norms[0] / 100).sum()
    assert found["head_groups"] == len(last_layer["norms"]) == 24
    assert found["head_group_norm_max"] == pytest.approx(last_layer["norms"][0])


def test_neighbours_are_a_brute_force_search(run: Path) -> None:
    assert called("analyze", run, "--pictures", 2) == Status.DONE
    rows = result_of(run)["pictures"]["neighbours"]
    index = read_index(features.options(run).root / "val")
    (plain,) = vectors(run, [options_of(run).features.view])
    u = plain["representation"] / plain["representation"].norm(dim=1, keepdim=True)
    assert len({row["id"] for row in rows}) == 8
    ties = 0
    for row in rows:
        # To ten digits, so that rounding does not part those that are one picture twice.
        distances = (u - u[row["id"]]).square().sum(dim=1).numpy().round(10)
        order = [i for i in np.argsort(distances, kind="stable").tolist() if i != row["id"]][:8]
        assert [one["id"] for one in row["neighbours"]] == order
        for one in row["neighbours"]:
            assert one["cosine"] == pytest.approx(float(u[one["id"]] @ u[row["id"]]), abs=1e-5)
        ties += len(order) - len({distances[i] for i in order})
        for one in (row, *row["neighbours"]):
            assert one["path"] == index.paths[one["id"]]
            assert one["class"] == one["path"].split("/")[0]
    assert ties > 2


def test_the_projection_is_sklearns(run: Path) -> None:
    shown = analysis.run(options_of(run, pictures=2)).result["pictures"]["projection"]
    (plain,) = vectors(run, [options_of(run).features.view])
    theirs = PCA(2, svd_solver="full").fit(plain["representation"].numpy())
    scores = theirs.transform(plain["representation"].numpy())
    ours = np.array(shown["points"])
    np.testing.assert_allclose(np.abs(ours), np.abs(scores), atol=2e-3 * np.abs(scores).max())
    assert (ours[np.abs(ours).argmax(axis=0), [0, 1]] > 0).all()
    share = 100 * theirs.explained_variance_ratio_
    assert shown["axes"][1] == f"second principal component ({share[1]:.0f} % of the variance)"
    assert shown["classes"] == list("0123456789")
    assert shown["labels"] == read_index(features.options(run).root / "val").labels.tolist()


def test_pca_of_more_dimensions_than_rows_and_of_fewer_than_two() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((20, 50), (50, 20), (5, 1)):
        x = torch.randn(rows, columns, generator=generator) * torch.linspace(3, 1, columns)
        scores, shares = analysis.pca(x)
        wanted = PCA(min(2, columns), svd_solver="full").fit(x.double().numpy())
        np.testing.assert_allclose(shares[:columns], wanted.explained_variance_ratio_[:2], rtol=1e-6)
        np.testing.assert_allclose(np.abs(scores[:, :columns]), np.abs(wanted.transform(x.numpy())), atol=1e-5)
        assert scores.shape == (rows, 2)
    scores, shares = analysis.pca(torch.ones(4, 3))
    assert not scores.any()
    assert shares == (0.0, 0.0)


def test_of_many_classes_the_commonest_are_named() -> None:
    labels = np.repeat(np.arange(30), [50 if i % 3 == 0 else 20 for i in range(30)])
    classes = [f"class {i}" for i in range(30)]
    told, chosen = analysis.points(labels, classes, seed=0, most=200)
    assert told == [f"class {i}" for i in range(0, 30, 3)]
    counts = Counter(labels[chosen].tolist())
    assert all(counts[i] >= 10 for i in range(0, 30, 3))  # half of the places, shared alike, are theirs
    assert sum(counts.values()) == len(set(chosen.tolist())) == 200
    assert sum(counts[i] for i in range(30) if i % 3) > 20
    told, chosen = analysis.points(labels % 20, classes, seed=0, most=200)
    assert told == classes[:20]
    assert not np.array_equal(chosen, analysis.points(labels % 20, classes, seed=1, most=200)[1])
    told, chosen = analysis.points(np.full(9, -1), [], seed=0)
    assert told == []
    assert chosen.tolist() == list(range(9))


def test_bins_follow_the_number_of_pairs() -> None:
    """As Freedman and Diaconis have it, by numpy, but for widths that are stepped and bounded."""
    generator = np.random.default_rng(0)
    for count, spread, width in (
        (100, 0.1, 0.1),
        (5_000, 0.1, 0.02),
        (500, 0.1, 0.05),
        (10**5, 0.05, 0.01),
        (9, 2, 0.1),
    ):
        values = generator.normal(0, spread, count).clip(-1, 1)
        edges = analysis.bins(values)
        np.testing.assert_allclose(np.diff(edges), width)
        assert (edges[0], edges[-1]) == (-1, 1)
        assert 0 in edges
        theirs = np.diff(np.histogram_bin_edges(values, "fd"))[0]
        assert theirs < 1.05 * width or width == 0.1
        assert theirs > 0.4 * width or width == 0.01
    assert len(analysis.bins(np.ones(5))) == 201


def test_cosines_are_counted_in_parts() -> None:
    z1, z2 = torch.randn(2, 37, 5, generator=torch.Generator().manual_seed(0))
    whole, parts = analysis.cosine_histogram(z1, z2), analysis.cosine_histogram(z1, z2, rows=8)
    assert parts == whole
    alike = analysis.cosine_histogram(torch.ones(3, 4), torch.ones(3, 4))
    assert alike["positive"][-1] == 3
    assert alike["negative"][-1] == 6
    zeros = analysis.cosine_histogram(torch.zeros(2, 4), torch.zeros(2, 4))
    assert zeros["positive_mean"] == zeros["negative_mean"] == 0


def test_pictures_without_labels_and_weights_without_a_head(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flat = tmp_path / "flat"
    (flat / "val").mkdir(parents=True)
    for number, path in enumerate(sorted((data / "val").rglob("*.png"))[::3]):
        shutil.copyfile(path, flat / "val" / f"{number:03d}.png")
    (flat / "val" / "007.png").write_bytes(b"no picture")
    words = [run / "backbone.pth", "--data", flat, "--output", tmp_path / "out", "--pictures", 20]
    assert called("analyze", *words, "data.max_bad_fraction=1") == Status.DONE
    assert "no head: the representation alone" in capsys.readouterr().out
    found = result_of(tmp_path / "out", "analysis_backbone@flat")
    assert not [key for key in found if key.startswith(("embedding", "head"))]
    assert found["step"] is None
    assert (found["pictures_held_out"], found["pictures_in_two_views"]) == (26, 20)
    shown = found["pictures"]
    assert list(shown["cosines"]) == ["representation"]
    assert list(shown["spectrum"]) == ["r"]
    assert shown["projection"]["classes"] == []
    assert {one["class"] for row in shown["neighbours"] for one in (row, *row["neighbours"])} == {None}
    assert 7 not in {one["id"] for row in shown["neighbours"] for one in (row, *row["neighbours"])}
    assert {path.stem for path in (tmp_path / "out" / "results").glob("*.png")} == {
        f"{name}_backbone@flat" for name in NAMES if name != "group_norms"
    }
    for path in sorted((flat / "val").iterdir())[2:]:
        path.unlink()
    two = features.options(run).model_copy(update={"root": flat})
    (one, other) = analysis.run(options_of(run, features=two, projection="tsne")).result["pictures"]["neighbours"]
    assert [one["neighbours"][0]["id"], other["neighbours"][0]["id"]] == [other["id"], one["id"]]
    # Of the same backbone and the same pictures the run's own numbers are the same.
    ours, alone = (analysis.run(options_of(run, pictures=20, **of)).result for of in ({}, {"run": None}))
    same = [key for key in alone if key.startswith("representation_")]
    assert len(same) > 10
    assert [ours[key] for key in same] == [alone[key] for key in same]
    assert called("analyze", run, "--random-init", "--split", "train", "--pictures", 20) == Status.DONE
    other = result_of(run, "analysis_train_random_init")
    assert other["pictures_held_out"] == 160
    assert other["representation_effective_rank"] != ours["representation_effective_rank"]


def test_shards_are_the_folder_that_they_hold(run: Path, data: Path, tmp_path: Path) -> None:
    assert called("pack-shards", data, tmp_path / "shards", "--shard-size", "100kB") == Status.DONE
    folder, shards = (
        analysis.run(options_of(run, pictures=10, features=features.options(run).model_copy(update={"root": root})))
        for root in (data, tmp_path / "shards")
    )
    assert shards.result == folder.result
    assert shards.draw("run") == folder.draw("run")


def test_thumbnails_are_small_and_of_three_channels(tmp_path: Path) -> None:
    made = {
        "gray.png": Image.new("L", (20, 30), 200),
        "large.jpg": Image.new("RGB", (1000, 400), (255, 0, 0)),
        "see_through.png": Image.new("RGBA", (50, 50), (0, 255, 0, 128)),
        "sixteen.png": Image.new("I;16", (9, 9), 4000),
    }
    for name, picture in made.items():
        picture.save(tmp_path / name)
    (tmp_path / "cut.png").write_bytes((tmp_path / "see_through.png").read_bytes()[:60])
    (tmp_path / "none.jpg").write_bytes(b"")
    index = read_index(tmp_path)
    found = {path: analysis.thumbnail(index, i) for i, path in enumerate(index.paths)}
    assert {name for name, small in found.items() if small is None} == {"cut.png", "none.jpg"}
    shapes = {name: small.shape for name, small in found.items() if small is not None}
    assert shapes == {
        "gray.png": (30, 20, 3),
        "large.jpg": (64, 160, 3),
        "see_through.png": (50, 50, 3),
        "sixteen.png": (9, 9, 3),
    }
    assert (found["gray.png"] == 200).all()
    assert abs(found["large.jpg"][30, 80].astype(int) - [255, 0, 0]).max() < 5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipe.k=3"], "analyze has no recipe.k=3: it takes --pictures, --projection and --split"),
        (["--pictures", "1"], "`pictures` = 1"),
        (["--data", "EMPTY"], "has no folder val"),
        (["data.root=EMPTY"], "no folder"),
        (["data.root=NOVAL"], "has no val/, so nothing is held out: give --split train"),
        (["optim.name=sgd"], "'optim.name' does not change an evaluation"),
        (["--data", "ONE", "data.max_bad_fraction=1"], "has 1 readable pictures, and two are needed to compare"),
    ],
)
def test_what_cannot_be_analysed(
    words: list[str], said: str, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "one" / "val").mkdir(parents=True)
    shutil.copyfile(next((data / "val").rglob("*.png")), tmp_path / "one" / "val" / "a.png")
    (tmp_path / "noval" / "train").mkdir(parents=True)
    there = [
        word.replace("NOVAL", str(tmp_path / "noval"))
        .replace("EMPTY", str(tmp_path))
        .replace("ONE", str(tmp_path / "one"))
        for word in words
    ]
    assert called("analyze", run, *there) == Status.BAD_INPUT
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_numbers_that_are_none_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = features.network

    def diverged(options: features.Options) -> torch.nn.Module:
        found = network(options)
        torch.nn.init.constant_(next(found.parameters()), torch.nan)
        return found

    monkeypatch.setattr(features, "network", diverged)
    with pytest.raises(BadInput, match="not finite numbers: the backbone has diverged"):
        analysis.run(options_of(run, run=None, pictures=2))


def test_without_matplotlib_or_sklearn_a_sentence_says_so(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Before anything is computed."""
    monkeypatch.setattr(analysis, "_held_out", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert called("analyze", run, "--projection", "tsne") == Status.BAD_INPUT
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert called("analyze", run) == Status.BAD_INPUT
    assert capsys.readouterr().err.splitlines() == [
        "ssl-pipeline: t-SNE needs scikit-learn: pip install 'ssl-pipeline[demo]', or take --projection pca",
        "ssl-pipeline: pictures need matplotlib: pip install 'ssl-pipeline[demo]'",
    ]


def test_tsne_is_the_same_again_and_parts_what_is_apart() -> None:
    x = torch.cat([torch.randn(30, 8, generator=torch.Generator().manual_seed(i)) + 20 * i for i in range(2)])
    first, again = analysis.tsne(x, seed=1), analysis.tsne(x, seed=1)
    assert np.array_equal(first, again)
    centres = first[:30].mean(axis=0), first[30:].mean(axis=0)
    assert np.linalg.norm(centres[0] - centres[1]) > max(first[:30].std(), first[30:].std())
    assert analysis.tsne(x[:3], seed=1).shape == (3, 2)


def of_this_rank(run: str) -> dict:
    return {"json": json.dumps(analysis.run(options_of(Path(run), pictures=21)).result)}


def test_ranks_find_the_same(run: Path) -> None:
    one = json.loads(of_this_rank(str(run))["json"])
    two, other = (json.loads(found["json"]) for found in on_ranks(2, of_this_rank, str(run)))
    assert two == other
    assert two.keys() == one.keys()
    for key, value in one.items():
        if key.endswith(("lidar", "condition_number")) or "_rank" in key:
            continue  # of what is all but singular, rounding decides
        if isinstance(value, float):
            assert two[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
    for mine, theirs in zip(one["pictures"]["neighbours"], two["pictures"]["neighbours"], strict=True):
        assert mine["id"] == theirs["id"]
        assert len({n["id"] for n in mine["neighbours"]} & {n["id"] for n in theirs["neighbours"]}) >= 7
    assert two["pictures"]["projection"]["labels"] == one["pictures"]["projection"]["labels"]


def test_a_result_alone_is_drawn_in_both_colours(run: Path) -> None:
    assert called("analyze", run, "--pictures", 10) == Status.DONE
    found = result_of(run)
    for palette in (pictures.LIGHT, pictures.DARK):
        drawn = analysis.draw(found, "run", palette)
        assert set(drawn) == {"spectrum", "group_norms", "cosines", "projection"}
        if palette is pictures.LIGHT:
            for name, data in drawn.items():
                assert (run / "results" / f"{name}.png").read_bytes() == data
    assert analysis.draw({}, "run") == {}
