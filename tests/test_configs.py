"""Every packaged config, built with its real sizes on no memory, against a committed table of parameter counts."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from ssl_pipeline import config, distributed, optim
from ssl_pipeline.exits import BadInput
from ssl_pipeline.pretrain import PretrainConfig, build_method

COUNTS = Path(__file__).parent / "data" / "parameter_counts.json"
PAPER = Path(config.__file__).parent / "evaluation" / "paper_results.yaml"
OURS = {"imagenet/simclr_vit_small_sparsehead"}  # no row of the paper, and no counterpart without SparseHead
FIGURES = {
    f"stl10/figure1_{head}_{network}" for head in ("identity", "linear", "mlp") for network in ("resnet18", "resnet50")
} | {
    *(f"cifar10/figure1_{head}" for head in ("identity", "linear", "mlp")),
    *(f"{data}/figure3_{head}" for data in ("stl10", "cifar10") for head in ("dense", "sparse")),
    "cifar10/figure3_sparser",
}
METHODS = ("simclr", "byol", "barlow_twins", "simsiam", "vicreg", "w_mse", "ssl_hsic", "swav")
EXPECTED = (
    OURS
    | FIGURES
    | {
        f"{data}/{method}{sparse}"
        for data in ("digits", "cifar10", "cifar100", "stl10", "tiny_imagenet", "imagenet100", "imagenet")
        for method in METHODS
        for sparse in ("", "_sparsehead")
    }
    | {"smoke"}
)
SMALL = ("cifar10/", "cifar100/", "stl10/", "tiny_imagenet/")


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
    monkeypatch.setattr(distributed, "_all_gather", lambda whole, x: whole.copy_(x))
    options, method = built(name)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        state = {key: torch.empty_like(value, device="cpu") for key, value in method.state_dict().items()}
        rows = options.data.batch_size  # on no memory; fewer than a method's slices would not do
        views = [torch.empty(rows, 3, view.size, view.size) for view in options.data.views for _ in range(view.count)]
        output = torch.func.functional_call(method, state, (views,))
    assert output.loss.shape == ()
    assert output.features.shape == (rows, method.backbone.num_features)
    assert output.embeddings.shape == (rows, options.head.output)
    assert ("sparse_penalty" in output.logs) == (
        name.endswith(("_sparsehead", "_sparse", "_sparser")) or name == "smoke"
    )


@pytest.mark.parametrize("name", sorted(EXPECTED - {"smoke"}))
def test_a_leaf_is_a_short_lab_note(name: str) -> None:
    text = (config.packaged_configs() / f"{name}.yaml").read_text()
    assert len(text.splitlines()) <= 15
    start = "sbatch slurm/pretrain_imagenet.sh" if name.startswith("imagenet") else "ssl-pipeline pretrain"
    assert f"{start} {name}" in text
    data, method = name.split("/")
    if data != "digits":
        paper = yaml.safe_load(PAPER.read_text())["linear_and_knn"].get(method, {}).get(data, [])
        expected = [number for number in paper if number is not None]
        (note,) = [line for line in text.splitlines() if line.startswith("# Expect")]
        found = [float(number) for number in re.findall(r"(\d+\.\d+)[ ,]", note)]
        assert found == expected
        assert ("no reference value" in note) == (not expected)


def test_sparsehead_configs_differ_in_the_penalty_alone() -> None:
    for name in sorted(EXPECTED - OURS - FIGURES):
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
    simsiam = resolved("imagenet/simsiam")
    assert simsiam.optim.learning_rate * simsiam.data.batch_size / 256 == pytest.approx(0.1)
    assert (simsiam.optim.name, simsiam.optim.weight_decay, simsiam.optim.exclude_1d) == ("sgd", 1e-4, False)
    assert (simsiam.optim.warmup_epochs, simsiam.optim.cosine_per, simsiam.method.predictor_rate) == (
        0,
        "epoch",
        "constant",
    )  # type: ignore[attr-defined]
    assert [op.op for op in simsiam.data.views[0].ops][-3:] == ["blur", "flip", "normalize"]  # type: ignore[attr-defined]
    vicreg = resolved("imagenet/vicreg")
    assert (vicreg.optim.learning_rate, vicreg.optim.learning_rate_1d, vicreg.optim.final_factor) == (0.2, None, 0.001)
    assert vicreg.data.views == barlow.data.views
    for method in ("simclr", "byol", "barlow_twins", "simsiam", "vicreg"):
        assert resolved(f"imagenet/{method}").backbone.zero_init_last is True
        assert resolved(f"imagenet/{method}").epochs == resolved(f"cifar10/{method}").epochs == 1000
        assert resolved(f"cifar10/{method}").backbone.zero_init_last is False
        assert resolved(f"cifar10/{method}").data.batch_size == 512
        assert resolved(f"cifar10/{method}").optim.learning_rate == 3e-3


def test_what_methods_md_says_of_swav() -> None:
    swav = config.validate(PretrainConfig, config.load("imagenet/swav").values)
    assert [(view.count, view.size) for view in swav.data.views] == [(2, 224), (6, 96)]
    rates = [
        optim.base_rate(swav.optim, swav.data.batch_size) * optim.rate_factor(swav.optim, step, 312, 1000)
        for step in (0, 3119, 3120, 311_999)
    ]
    assert rates == pytest.approx([0.3, 4.8, 4.8, 0.0048])
    assert (swav.optim.name, swav.optim.exclude_1d, swav.optim.weight_decay) == ("larc", False, 1e-6)
    assert (swav.head.layers, swav.head.hidden, swav.head.output, swav.head.hidden_bias) == (2, 2048, 128, True)
    assert swav.method.queue_length == 0  # type: ignore[attr-defined]
    assert swav.backbone.zero_init_last is False
    assert swav.epochs == 1000
    for data, prototypes in (("cifar10", 100), ("cifar100", 1000)):
        small = config.validate(PretrainConfig, config.load(f"{data}/swav").values)
        assert small.method.prototypes == prototypes  # type: ignore[attr-defined]
        assert (small.data.batch_size, small.optim.learning_rate, small.head.output) == (512, 3e-3, 64)


def value_lines(name: str) -> Counter[str]:
    """The lines of a leaf that give a value."""
    lines = map(str.strip, (config.packaged_configs() / f"{name}.yaml").read_text().splitlines())
    return Counter(line for line in lines if line and not line.startswith(("#", "inherit:")))


def test_what_leaves_share_stands_in_a_file_that_they_inherit() -> None:
    lines = {name: value_lines(name) for name in config.packaged_names()}
    shared = {
        (one, other): (lines[one] & lines[other]).total() for one, other in itertools.combinations(sorted(lines), 2)
    }
    assert {pair: count for pair, count in shared.items() if count > 5} == {}


def read(*names: str) -> dict:
    """The keys that files of configs/ give themselves, flattened; later files win."""
    found: dict = {}
    for name in names:
        found |= config.flatten(config.parse_yaml((config.packaged_configs() / f"{name}.yaml").read_text(), name))
    found.pop("inherit", None)
    return found


@pytest.mark.parametrize(
    "name", [name for name in sorted(EXPECTED - FIGURES) if name.startswith(SMALL) and "sparse" not in name]
)
def test_a_method_wins_over_the_data_set_and_this_over_the_protocol(name: str) -> None:
    data, method = name.split("/")
    given = read(f"{data}/_base", f"_methods/{method}", name)
    given = {key: value for key, value in given.items() if not key.startswith("data.views")}  # lists are replaced whole
    resolved = config.flatten(config.load(name).values)
    assert {key: resolved[key] for key in given} == given


@pytest.mark.parametrize(
    ("data", "epochs", "rate", "output", "stem", "size", "unlabelled", "evaluation"),
    [
        ("cifar10", 1000, 3e-3, 64, "small", 32, None, ["normalize"]),
        ("cifar100", 1000, 3e-3, 64, "small", 32, None, ["normalize"]),
        ("stl10", 2000, 2e-3, 128, "small_maxpool", 64, ["unlabeled"], ["center_crop", "normalize"]),
        ("tiny_imagenet", 1000, 2e-3, 128, "small_maxpool", 64, None, ["normalize"]),
    ],
)
def test_the_small_data_protocol(
    data: str, epochs: int, rate: float, output: int, stem: str, size: int, unlabelled: list[str] | None,
    evaluation: list[str],
) -> None:  # fmt: skip
    for method, sizes in {"simclr": (1024, output), "byol": (1024, output), "barlow_twins": (2048, 2048)}.items():
        found = config.validate(PretrainConfig, config.load(f"{data}/{method}").values)
        assert (found.data.name, found.data.protocol, found.data.unlabelled) == (data, "small", unlabelled)
        assert (found.epochs, found.optim.learning_rate, found.data.batch_size) == (epochs, rate, 512)
        assert (found.backbone.name, found.backbone.stem, found.backbone.zero_init_last) == ("resnet18", stem, False)
        assert (found.head.layers, found.head.hidden, found.head.output) == (2, *sizes)
        assert [(view.count, view.size) for view in found.data.views] == [(2, size)]
        assert found.data.evaluation_view.size == size
        assert [op.op for op in found.data.evaluation_view.ops] == evaluation  # type: ignore[attr-defined]
        pixels = found.data.views[0].normalize
        assert found.data.evaluation_view.normalize == pixels
    if data == "stl10":
        crop = found.data.evaluation_view.ops[0]
        assert (crop.resize, crop.interpolation) == (70, "bicubic")  # type: ignore[union-attr]


def test_imagenet100_is_imagenet_on_other_pictures() -> None:
    for name in sorted(EXPECTED):
        if name.startswith("imagenet100/"):
            ours = config.flatten(config.load(name).values)
            theirs = config.flatten(config.load(name.replace("imagenet100/", "imagenet/")).values)
            changed = {key: value for key, value in ours.items() if value != theirs.get(key)}
            assert ours.keys() == theirs.keys()
            assert changed.pop("method.freeze_prototypes_steps", None) == (30 if "swav" in name else None)  # an epoch
            assert changed == {"data.name": "imagenet100", "data.root": "data/imagenet100"}
            assert (ours["data.protocol"], ours["backbone.name"]) == ("imagenet", "resnet50")


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_the_figures_runs_are_simclr_with_as_many_embeddings_as_representations(name: str) -> None:
    options, method = built(name)
    data, short = name.split("/")
    width = method.backbone.num_features
    assert width == method.head.outputs == options.head.output
    assert (options.method.name, options.method.temperature) == ("simclr", 0.5)  # type: ignore[attr-defined]
    figure, head, *_ = short.split("_")
    assert options.head.kind == (head if figure == "figure1" else "mlp")
    # h is I, W, or two layers: no batch norm rescales z, and no layer is narrower than d.
    layers = [module for module in method.head.layers if isinstance(module, torch.nn.Linear)]
    assert [layer.weight.shape for layer in layers] == [(width, width)] * {"identity": 0, "linear": 1, "mlp": 2}[
        options.head.kind
    ]
    assert not layers or method.head.layers[-1] is layers[-1]
    assert options.head.sparse.weight == {"sparse": 1e-4, "sparser": 1e-2}.get(head, 0)
    if data == "stl10":
        assert width == (512 if short.endswith("resnet18") else 2048)
        assert (options.epochs, options.optim.name, options.optim.learning_rate) == (2000, "adam", 2e-3)
        assert (options.optim.weight_decay, options.data.unlabelled) == (1e-6, ["unlabeled"])


def test_figure_3_differs_in_the_penalty_alone() -> None:
    for data in ("stl10", "cifar10"):
        dense, sparse = (config.flatten(config.load(f"{data}/figure3_{kind}").values) for kind in ("dense", "sparse"))
        changed = {key: value for key, value in sparse.items() if value != dense.get(key)}
        assert changed == {"head.sparse.weight": 1e-4, "head.sparse.groups": "columns"}
    assert config.load("stl10/figure3_dense").values == config.load("stl10/figure1_mlp_resnet50").values


def test_an_identity_has_nothing_to_be_sparse() -> None:
    values = config.load("stl10/figure1_identity_resnet18", ["head.sparse.weight=1e-4"]).values
    with pytest.raises(
        BadInput, match=r"head.sparse.weight = 0.0001 needs a linear layer, and head.kind = identity has none"
    ):
        config.validate(PretrainConfig, values)
