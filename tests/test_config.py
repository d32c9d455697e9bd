from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from ssl_pipeline import config
from ssl_pipeline.exits import BadInput


class Inner(config.Options):
    weight: float = 0.0
    groups: Literal["columns", "rows"] = "columns"


class Flip(config.Options):
    op: Literal["flip"]
    probability: float = 0.5


class Blur(config.Options):
    op: Literal["blur"]
    sigma: float = 1.0


class Outer(config.Options):
    rate: float
    sparse: Inner = Inner()
    ops: list[Annotated[Flip | Blur, Field(discriminator="op")]] = []


def refusal(values: dict) -> str:
    with pytest.raises(BadInput) as caught:
        config.validate(Outer, values)
    return str(caught.value)


def test_numbers_as_people_write_them() -> None:
    values = config.parse_yaml("{a: 1e-6, b: 1.5E+3, c: 3, d: .5e1, e: 1e-6x, f: -2e3}", "here")
    assert values == {"a": 1e-6, "b": 1500.0, "c": 3, "d": 5.0, "e": "1e-6x", "f": -2000.0}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rate": 1, "sparze": {"weight": 1}}, ["unknown key `sparze`", "nearest is `sparse`"]),
        ({"rate": 1, "sparse": {"wieght": 1}}, ["unknown key `sparse.wieght`", "nearest is `sparse.weight`"]),
        ({"rate": 1, "ops": [{"op": "flip", "probabilty": 1}]}, ["`ops.0.probabilty`", "`ops.0.probability`"]),
        ({"rate": 1, "ops": [{"op": "flop"}]}, ["`ops.0`", "flip"]),
        ({}, ["`rate` is missing"]),
        ({"rate": "fast"}, ["`rate` = 'fast'", "number"]),
        ({"rate": 1, "sparse": {"groups": "diagonals"}}, ["`sparse.groups` = 'diagonals'", "columns", "rows"]),
        ({"rate": float("nan")}, ["`rate`", "finite"]),
        (
            {"rate": 1, "sparse": 1e-4},
            ["`sparse` is a section: give its options by name, as sparse.weight=0.0001; they are weight, groups"],
        ),
        ({"rate": 1, "sparse": "rows"}, ["`sparse` is a section", ", as sparse.groups=rows;"]),
        ({"rate": 1, "sparse": False}, ["`sparse` is a section: give its options by name; they are weight, groups"]),
        ({"rate": 1, "sparse": [1]}, ["`sparse` is a section: give its options by name; they are weight, groups"]),
        ({"rate": 1, "sparse": None}, ["`sparse` is a section: give its options by name; they are weight, groups"]),
        (
            {"rate": 1, "ops": ["blur"]},
            ["`ops.0` is a section: give its options by name, as ops.0.op=blur; they are op"],
        ),
    ],
)
def test_a_wrong_value_is_named_with_the_way_out(values: dict, words: list[str]) -> None:
    message = refusal(values)
    assert all(word in message for word in words), message


def test_sections_and_options_together_are_named_with_where_they_came_from() -> None:
    from ssl_pipeline.pretrain import PretrainConfig

    def said(*overrides: str) -> str:
        tree = config.load("cifar10/simclr", overrides)
        with pytest.raises(BadInput) as caught:
            config.validate(PretrainConfig, tree.values, tree)
        return str(caught.value)

    assert said("head.sparse=1e-4").startswith(
        "`head.sparse` is a section (command line): give its options by name, as head.sparse.weight=0.0001; they are weight, "
    )
    assert said("method=simclr").startswith("`method` is a section: give method.name=simclr (of barlow_twins, byol, ")
    assert said("method=3").startswith("`method` is a section: give method.name=NAME (of barlow_twins, byol, ")
    assert said("optim.nesterov=true", "optim.name=sgd", "optim.momentum=0") == (
        "`optim.nesterov` (command line), `optim.momentum` (command line): nesterov needs momentum above 0: give momentum, or "
        "nesterov=false"
    )
    assert said("head.kind=identity", "head.sparse.weight=1e-3").startswith(
        "`head.sparse.weight` (command line), `head.kind` (command line): head.sparse.weight = 0.001 needs a linear layer"
    )
    assert said("optim.warmup_inclusive=true", "optim.schedule=drops").startswith(
        "`optim.warmup_inclusive` (command line), `optim.schedule` (command line): warmup_start_factor and warmup_inclusive"
    )


def test_options_are_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        config.validate(Outer, {"rate": 1}).rate = 2  # type: ignore[misc]


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_inheritance_merges_mappings_replaces_lists_and_remembers_origins(tmp_path: Path) -> None:
    write(
        tmp_path,
        base="a: {x: 1, y: 2}\nviews: [1, 2, 3]\n",
        more="a: {y: 3}\n",
        leaf="inherit: [base.yaml, more.yaml]\nviews: [9]\n",
    )
    tree = config.load(str(tmp_path / "leaf.yaml"), ["a.z=1e-4", "views.0=7"])
    assert tree.values == {"a": {"x": 1, "y": 3, "z": 1e-4}, "views": [7]}
    assert tree.origin("a.x").endswith("base.yaml")
    assert tree.origin("a.y").endswith("more.yaml")
    assert tree.origin("a.z") == "command line"
    assert tree.origin("nothing") == "default"


@pytest.mark.parametrize(
    ("files", "overrides", "words"),
    [
        ({"leaf": "inherit: [leaf.yaml]"}, [], "circle"),
        ({"leaf": "inherit: [a.yaml]", "a": "inherit: [leaf.yaml]"}, [], "circle"),
        ({"leaf": "inherit: [gone.yaml]"}, [], "gone.yaml"),
        ({"leaf": "inherit: base.yaml"}, [], "list of paths"),
        ({"leaf": "a: 1\na: 2"}, [], "twice"),
        ({"leaf": "a: [1"}, [], "not valid YAML"),
        ({"leaf": "- 1"}, [], "mapping"),
        ({"leaf": "a: !!python/object/apply:os.getcwd []"}, [], "not valid YAML"),
        ({"leaf": "a: 1"}, ["b"], "key.sub=value"),
        ({"leaf": "a: [1]"}, ["a.3=1"], "list of 1"),
    ],
)
def test_a_broken_config_is_one_sentence(tmp_path: Path, files: dict, overrides: list[str], words: str) -> None:
    write(tmp_path, **files)
    with pytest.raises(BadInput, match=words):
        config.load(str(tmp_path / "leaf.yaml"), overrides)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(BadInput, match="cifar10/simclr"):
        config.load("cifar10/simcl")


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    from ssl_pipeline.pretrain import PretrainConfig

    with pytest.raises(BadInput, match=r"method.name.*simclr"):
        config.validate(PretrainConfig, config.load("cifar10/simclr", ["method.name=simclrr"]).values)
    with pytest.raises(BadInput, match=r"unknown key `method.temprature`.*`method.temperature`"):
        config.validate(PretrainConfig, config.load("cifar10/simclr", ["method.temprature=1"]).values)
