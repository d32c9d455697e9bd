"""Every packaged config, built with its real sizes on no memory, against a committed table of parameter counts."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from ssl_pipeline import config, distributed
from ssl_pipeline.pretrain import PretrainConfig, build_method

COUNTS = Path(__file__).parent / "data" / "parameter_counts.json"
PAPER = Path(config.__file__).parent / "evaluation" / "paper_results.yaml"
OURS = {"imagenet/simclr_vit_small_sparsehead"}  # no row of the paper, and no counterpart without SparseHead
EXPECTED = (
    OURS
    | {
        f"{data}/{method}{sparse}"
        for data in ("digits", "cifar10", "cifar100", "imagenet")
        for method in ("simclr", "byol", "barlow_twins")
        for sparse in ("", "_sparsehead")
    }
    | {"smoke"}
)


def built(name: str) -> tuple[PretrainConfig, torch.nn.Module]:
    options = config.validate(PretrainConfig, config.load(name).values)
    with torch.device("meta"):
        return options, build_method(options)


def test_these_are_all() -> None:
    assert set(config.packaged_names()) == EXPECTED
    assert json.loads(COUNTS.read_text()).keys() == EXPECTED


@pytest.mark.parametrize("name", config.packaged_names())
def test_parameter_counts_are_as_committed(name: str) -> None:
    _, method = built(name)
    counts = {child: sum(p.numel() for p in module.parameters()) for child, module in method.named_children()}
    assert counts == json.loads(COUNTS.read_text())[name]


@pytest.mark.parametrize("name", config.packaged_names())
def test_forward_with_the_real_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # On one rank a collective changes nothing, and gloo cannot read tensors without memory.
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda x: None)
    monkeypatch.setattr(distributed.dist, "all_gather", lambda parts, x: parts[0].copy_(x))
    options, method = built(name)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        state = {key: torch.empty_like(value, device="cpu") for key, value in method.state_dict().items()}
        views = [torch.empty(8, 3, view.size, view.size) for view in options.data.views for _ in range(view.count)]
        output = torch.func.functional_call(method, state, (views,))
    assert output.loss.shape == ()
    assert output.features.shape == (8, method.backbone.num_features)
    assert output.embeddings.shape == (8, options.head.output)
    assert ("sparse_penalty" in output.logs) == (name.endswith("_sparsehead") or name == "smoke")


@pytest.mark.parametrize("name", sorted(EXPECTED - {"smoke"}))
def test_a_leaf_is_a_short_lab_note(name: str) -> None:
    text = (config.packaged_configs() / f"{name}.yaml").read_text()
    assert len(text.splitlines()) <= 15
    start = "sbatch slurm/pretrain_imagenet.sh" if name.startswith("imagenet/") else "ssl-pipeline pretrain"
    assert f"{start} {name}" in text
    data, method = name.split("/")
    if name in OURS:
        assert "# Expect: no reference value" in text
    elif data != "digits":
        paper = yaml.safe_load(PAPER.read_text())["linear_and_knn"][method][data]
        (note,) = [line for line in text.splitlines() if line.startswith("# Expect")]
        assert [float(number) for number in re.findall(r"\d+\.\d+", note)[:2]] == paper


def test_sparsehead_configs_differ_in_the_penalty_alone() -> None:
    for name in sorted(EXPECTED - OURS):
        if name.endswith("_sparsehead"):
            with_it = config.flatten(config.load(name).values)
            without = config.flatten(config.load(name.removesuffix("_sparsehead")).values)
            changed = {key for key in with_it if with_it[key] != without.get(key)}
            assert changed == {"head.sparse.weight", "head.sparse.groups"}
            assert with_it["head.sparse.weight"] == 1e-4


def test_what_methods_md_says_of_the_official_recipes() -> None:
    def resolved(name: str) -> PretrainConfig:
        return config.validate(PretrainConfig, config.load(name).values)

    simclr = resolved("imagenet/simclr")
    assert simclr.optim.learning_rate * simclr.data.batch_size / 256 == pytest.approx(4.8)
    assert (simclr.method.temperature, simclr.optim.weight_decay, simclr.head.layers) == (0.1, 1e-6, 2)  # type: ignore[attr-defined]
    assert resolved("imagenet/byol").optim.weight_decay == 1.5e-6
    barlow = resolved("imagenet/barlow_twins")
    assert (barlow.optim.learning_rate_1d, barlow.head.output, barlow.optim.final_factor) == (0.0048, 8192, 0.001)
    for method in ("simclr", "byol", "barlow_twins"):
        assert resolved(f"imagenet/{method}").backbone.zero_init_last is True
        assert resolved(f"imagenet/{method}").epochs == resolved(f"cifar10/{method}").epochs == 1000
        assert resolved(f"cifar10/{method}").backbone.zero_init_last is False
        assert resolved(f"cifar10/{method}").data.batch_size == 512
        assert resolved(f"cifar10/{method}").optim.learning_rate == 3e-3
