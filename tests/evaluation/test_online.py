"""What is measured while the backbone is trained, and that it changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils._pytree import tree_flatten

from ssl_pipeline import checkpoint, distributed, pretrain
from ssl_pipeline.data.index import pretraining_index, read_index
from ssl_pipeline.evaluation import features, knn, measures, online
from ssl_pipeline.exits import BadInput, Status
from ssl_pipeline.monitor import TIME_KEYS
from ssl_pipeline.preemption import Preemption
from ssl_pipeline.run_folder import RunFolder, checkpoint_file, read_lines
from tests.ranks import on_ranks
from tests.test_pretrain import options

ON = (
    "online.linear=true", "online.knn_every_epochs=1", "online.knn_train=100", "online.knn_val=30",
    "online.measures_every_epochs=1", "online.measures_pictures=40",
)  # fmt: skip
OFF = ("online.linear=false",)


def rows(run: Path) -> list[dict]:
    """metrics.jsonl less the clock's keys."""
    return [{k: v for k, v in row.items() if k not in TIME_KEYS} for row in read_lines(run / "metrics.jsonl")]


def without_online(found: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("online")} for row in found if "loss" in row]


def test_a_missing_val_is_told_of_at_the_start_and_test_is_offered(
    few_digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train").symlink_to(few_digits / "train")
    chosen = options(tmp_path / "d", "epochs=1", "max_steps=1")
    for there in ("train", "test", "val"):
        if there == "test":
            (tmp_path / "d" / "test").mkdir()
        if there == "val":
            (tmp_path / "d" / "val").symlink_to(few_digits / "val")
        caplog.clear()
        assert pretrain.pretrain(chosen, tmp_path / there) == Status.DONE
        assert ("without it evaluations need --data FOLDER" in caplog.text) == (there != "val")
        assert ("is there: name it val, or lay a link" in caplog.text) == (there == "test")
    (tmp_path / "d" / "val").unlink()
    with pytest.raises(BadInput, match=r"no folder .*/d/val', and .*/d/test' is there: name it val, or lay a link"):
        features.pictures_of(tmp_path / "d", "val")


@pytest.mark.parametrize("method", ["simclr", "byol"])
def test_a_run_with_them_is_a_run_without_bit_for_bit(few_digits: Path, tmp_path: Path, method: str) -> None:
    for name, overrides in (("on", ON), ("off", OFF)):
        chosen = options(few_digits, "epochs=2", "max_steps=14", *overrides, method=method)  # 10 an epoch
        assert pretrain.pretrain(chosen, tmp_path / name) == Status.DONE
    on, off = (checkpoint.read(checkpoint_file(tmp_path / name / "checkpoints", 14)) for name in ("on", "off"))
    for part in ("model", "optimizer", "loader", "random"):
        ours, theirs = (tree_flatten(state[part]) for state in (on, off))
        assert ours[1] == theirs[1]
        assert all(
            torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            for a, b in zip(ours[0], theirs[0], strict=True)
        )
    assert without_online(rows(tmp_path / "on")) == rows(tmp_path / "off")
    assert on["online"]
    assert not off["online"]


def test_the_probe_is_a_plain_adam_on_detached_features(few_digits: Path) -> None:
    chosen = options(few_digits)
    index = read_index(few_digits / "train")
    world = distributed.start()
    before = torch.get_rng_state()
    probe = online.Online(online.Options(), chosen.data, 12, chosen.backbone, index, (None, None), 3, world)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    theirs = nn.Linear(12, 10)
    optimizer = torch.optim.Adam(theirs.parameters(), 1e-3)
    features_ = torch.randn(64, 12, requires_grad=True)
    labels = features_[:, :10].argmax(dim=1)
    for step in range(300):
        finite = torch.tensor(step != 100)
        kept = [p.clone() for p in probe.parameters()]
        logs = probe.step(features_, labels, finite)
        loss = F.cross_entropy(theirs(features_.detach()), labels)
        torch.testing.assert_close(logs["online_loss"], loss.detach(), rtol=1e-5, atol=1e-6)
        if step == 100:  # the run's own update was skipped
            assert all(torch.equal(p, q) for p, q in zip(probe.parameters(), kept, strict=True))
            continue
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logs["online_top1"] > 60  # of ten classes
    assert logs["online_top5"] > logs["online_top1"]
    assert features_.grad is None


def test_its_knn_is_knn_on_fixed_subsets(few_digits: Path, tmp_path: Path) -> None:
    chosen = options(few_digits, "epochs=2", "max_steps=20", "online.knn_every_epochs=1")
    pretrain.pretrain(chosen, tmp_path / "all")
    notes = [row for row in rows(tmp_path / "all") if "online_knn5_top1" in row]
    assert [row["step"] for row in notes] == [10, 20]
    source = features.options(tmp_path / "all")
    train, test = features.extract(source, "train"), features.extract(source, "val")
    whole = knn.evaluate(train, test, 5, [])
    assert notes[-1]["online_knn5_top1"] == pytest.approx(whole["knn5_top1"])
    assert notes[-1]["online_knn5_top5"] == pytest.approx(whole["knn5_top5"])
    index = read_index(few_digits / "train")
    some = online._some(index, 50, 0)
    assert some.paths == online._some(index, 50, 0).paths != online._some(index, 50, 1).paths
    assert len(set(some.paths)) == 50
    assert len(set(some.labels.tolist())) > 5
    assert online._some(index, 1000, 0) is index


def of_heldout(run: Path) -> list[dict]:
    return [row for row in rows(run) if "heldout_embedding_rankme" in row]


def test_its_measures_are_those_of_the_held_out_pictures(few_digits: Path, tmp_path: Path) -> None:
    chosen = options(
        few_digits, "epochs=3", "max_steps=30", "online.measures_every_epochs=2", "monitor.tensorboard=true"
    )
    assert pretrain.pretrain(chosen, tmp_path / "all") == Status.DONE
    only = options(few_digits, "epochs=1", "max_steps=10", *OFF, "online.measures_every_epochs=1")
    assert pretrain.pretrain(only, tmp_path / "only") == Status.DONE
    assert [row["step"] for row in of_heldout(tmp_path / "all")] == [20]
    [row] = of_heldout(tmp_path / "only")
    seen = features.extract(features.options(tmp_path / "only"), "val").values
    assert len(seen) == 60
    head = features.trained(RunFolder(tmp_path / "only")).head
    with torch.no_grad():
        expected = measures.measure(seen, head(seen))
    assert row.keys() == {"step", "epoch", *(f"heldout_{name}" for name in expected)}
    assert {name: row[f"heldout_{name}"] for name in expected} == pytest.approx(expected, rel=1e-4)
    shown = EventAccumulator(str(tmp_path / "all" / "tensorboard"))
    shown.Reload()
    [event] = shown.Scalars("heldout_embedding_rankme")
    assert (event.step, event.value) == (20, pytest.approx(of_heldout(tmp_path / "all")[0]["heldout_embedding_rankme"]))


def test_measures_need_pictures_alone_and_no_run_ends_for_them(
    few_digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "val"):
        (tmp_path / "flat" / split).mkdir(parents=True)
        for place, path in enumerate(sorted((few_digits / split).rglob("*.png"))[:32]):
            (tmp_path / "flat" / split / f"{place:02}.png").symlink_to(path)
    chosen = options(tmp_path / "flat", "epochs=1", *ON, "online.measures_pictures=20")
    assert pretrain.pretrain(chosen, tmp_path / "run") == Status.DONE
    [row] = of_heldout(tmp_path / "run")
    assert not any(name.startswith("online") for name in row)
    assert 1 < row["heldout_representation_effective_rank"] < 20
    monkeypatch.setattr(online, "_finite", lambda *values: False)  # as of a run that diverged
    assert pretrain.pretrain(chosen, tmp_path / "diverged") == Status.DONE
    assert not of_heldout(tmp_path / "diverged")
    (tmp_path / "flat" / "val").rename(tmp_path / "flat" / "test")
    assert pretrain.pretrain(chosen, tmp_path / "without") == Status.DONE
    assert not of_heldout(tmp_path / "without")
    assert "no measures while training: no folder" in caplog.text


def test_what_is_not_finite_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed.start()
    assert online._finite(torch.ones(2), torch.ones(0))
    assert not online._finite(torch.ones(2), torch.tensor([0, torch.nan]))
    assert not online._finite(torch.tensor([torch.inf]))


def test_it_goes_on_where_it_was(few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = options(few_digits, "epochs=2", "max_steps=14", *ON)
    pretrain.pretrain(chosen, tmp_path / "whole")
    calls: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(Preemption, "requested", lambda self: (calls.append(0), len(calls) == 7)[1])
        assert pretrain.pretrain(chosen, tmp_path / "cut") == Status.STOPPED
    pretrain.pretrain(chosen, tmp_path / "cut")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_switched_on_in_the_middle_it_starts_there(few_digits: Path, tmp_path: Path) -> None:
    pretrain.pretrain(options(few_digits, "epochs=2", "max_steps=4", *OFF), tmp_path / "run")
    pretrain.pretrain(options(few_digits, "epochs=2", "max_steps=8", *ON), tmp_path / "run")
    found = rows(tmp_path / "run")
    assert ["online_top1" in row for row in found] == [False] * 4 + [True] * 4


def test_without_classes_there_is_nothing_to_measure(few_digits: Path, tmp_path: Path) -> None:
    one_class = tmp_path / "data" / "train" / "all"
    one_class.parent.mkdir(parents=True)
    one_class.symlink_to(few_digits / "train")
    pretrain.pretrain(options(tmp_path / "data", "epochs=1", "max_steps=2", *ON), tmp_path / "run")
    assert not any(key.startswith("online") for row in rows(tmp_path / "run") for key in row)


@pytest.fixture(scope="module")
def partly_labelled(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 labelled and 100 unlabelled training pictures."""
    root = tmp_path_factory.mktemp("partly")
    for split in ("train", "val"):
        (root / split).symlink_to(few_digits / split)
    (root / "unlabeled").mkdir()
    for place, path in enumerate(sorted((few_digits / "train").rglob("*.png"))[:100]):
        (root / "unlabeled" / f"{place}.png").symlink_to(path)
    return root


def test_pictures_without_labels_are_pretrained_on_and_measure_nothing(partly_labelled: Path, tmp_path: Path) -> None:
    chosen = options(partly_labelled, "data.unlabelled=[unlabeled]", "epochs=1", *ON)
    assert pretrain.consequences(chosen, 1)["training pictures"] == 260
    assert pretrain.cost(chosen)["images"] == 256
    assert pretrain.pretrain(chosen, tmp_path / "run") == Status.DONE
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found if "loss" in row] == list(range(1, 17))  # 260 // 16
    assert all(0 <= row["online_top1"] <= row["online_top5"] <= 100 for row in found if "loss" in row)
    assert 0 <= found[-1]["online_knn5_top1"] <= 100
    source = features.options(tmp_path / "run")
    assert len(features.pictures(source, "train")) == 160  # what the probes and k-nn see


def on_this_rank_with_labels_missing(root: str) -> torch.Tensor:
    """Loss, accuracies and the trained weights after steps in which ranks have different numbers of labels, one none."""
    chosen = options(Path(root), "data.unlabelled=[unlabeled]")
    index = pretraining_index(chosen.data.root, chosen.data.unlabelled)
    world = distributed.start()
    probe = online.Online(online.Options(), chosen.data, 12, chosen.backbone, index, (None, None), 3, world)
    values = []
    for inputs, labels in steps_with_labels_missing():
        mine = slice(world.rank * 8 // world.size, (world.rank + 1) * 8 // world.size)
        logs = probe.step(inputs[mine], labels[mine], torch.tensor(True))
        values.append(distributed.mean_over_ranks(torch.stack(list(logs.values()))))
    return torch.cat([*values, *(p.detach().flatten() for p in probe.parameters())])


def steps_with_labels_missing() -> list[tuple[torch.Tensor, torch.Tensor]]:
    drawn = torch.Generator().manual_seed(0)
    known = [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2], [5], []]  # the first rank of two has places 0 to 3
    steps = []
    for places in known:
        inputs = torch.randn(8, 12, generator=drawn)
        labels = torch.full((8,), -1)
        labels[places] = inputs[places, :10].argmax(dim=1)
        steps.append((inputs, labels))
    return steps


def test_the_probe_trains_on_the_labelled_pictures_alone(partly_labelled: Path) -> None:
    one = on_this_rank_with_labels_missing(str(partly_labelled))
    torch.manual_seed(3)
    theirs = nn.Linear(12, 10)
    optimizer = torch.optim.Adam(theirs.parameters(), 1e-3)
    expected = []
    for inputs, labels in steps_with_labels_missing():
        seen = labels >= 0
        logits = theirs(inputs[seen])
        loss = F.cross_entropy(logits, labels[seen]) if seen.any() else 0 * logits.sum()
        right = logits.topk(5, dim=1).indices == labels[seen][:, None]
        top = [100 * right[:, :k].any(dim=1).float().mean() if seen.any() else torch.tensor(0.0) for k in (1, 5)]
        expected.append(torch.stack([loss.detach(), *top]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected += [p.detach().flatten() for p in theirs.parameters()]
    torch.testing.assert_close(one, torch.cat(expected), rtol=1e-5, atol=1e-6)
    for rank in on_ranks(2, on_this_rank_with_labels_missing, str(partly_labelled)):
        torch.testing.assert_close(rank, one, rtol=1e-4, atol=1e-5)


def on_this_rank(root: str, into: str) -> torch.Tensor:
    chosen = options(Path(root), "epochs=1", "max_steps=10", *ON)
    pretrain.pretrain(chosen, Path(into))
    distributed.gather_json(None)
    found = rows(Path(into))
    values = [[row["online_loss"], row["online_top1"]] for row in found if "loss" in row]
    note = [found[-1]["online_knn5_top1"], found[-1]["online_knn5_top5"]]
    measured = [value for name, value in found[-1].items() if name.startswith("heldout") and "condition" not in name]
    assert len(measured) == 20
    return torch.cat([torch.tensor([*values, note], dtype=torch.float64).flatten(), torch.tensor(measured)])


def test_two_ranks_are_one(few_digits: Path, tmp_path: Path) -> None:
    two = on_ranks(2, on_this_rank, str(few_digits), str(tmp_path / "2"))
    one = on_this_rank(str(few_digits), str(tmp_path / "1"))
    torch.testing.assert_close(two[0][0:20:2], one[0:20:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two[0][20:22], one[20:22], rtol=0, atol=7)  # two of thirty pictures
    torch.testing.assert_close(two[0][22:], one[22:], rtol=1e-3, atol=1e-3)
