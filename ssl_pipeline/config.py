"""From YAML files to typed, frozen options. This module is the ground: it knows no option of anyone.

A config file is a mapping. Its `inherit: [path, ...]` names other files, relative to its own folder; they are merged
in order, mappings deeply, anything else replaced, and the file itself is merged last. `key.sub=value` overrides of the
command line come after all files. What results is validated by a pydantic model whose fields are the documentation.

Every error is a `BadInput`: one sentence that names the key, the file it came from, and the nearest valid key.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import itertools
import json
import pkgutil
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny, TypeAdapter, ValidationError

from ssl_pipeline.exits import BadInput


class Options(BaseModel):
    """Base of every options class: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=Options)


# ---------------------------------------------------------------------------------------------------------------- YAML
class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-6 as a number (PyYAML follows YAML 1.1: a string) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not a string", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


LARGEST = 100_000
"""Values of a YAML text, with what its aliases stand for, above which it is no config."""


def parse_yaml(text: str, origin: str) -> Any:
    """Plain data of a YAML text. Raises BadInput, naming `origin` and the line, where the text is not valid."""
    try:
        found = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except Exception as error:  # PyYAML raises many types where a value does not fit its tag, or brackets go too deep
        raise BadInput(f"{origin} is not valid YAML: {' '.join(str(error).split()) or type(error).__name__}") from None
    count, waiting = 1, [found]
    while waiting:  # a few lines of aliases of aliases stand for more than any memory holds
        value = waiting.pop()
        below = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
        count += len(below)
        if count > LARGEST:
            raise BadInput(f"{origin} holds more than {LARGEST:,} values, or itself, by its aliases: leave these out")
        waiting += below
    return found


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML text of plain data, keys in their order, short lists on one line."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)


# --------------------------------------------------------------------------------------------------------- inheritance
@dataclass
class Tree:
    """A merged config: plain nested `values`, and for every dotted leaf key the file (or command line) it came from."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def merge(self, values: Mapping[str, Any], origin: str, prefix: str = "") -> None:
        """Lay `values` over this tree: mappings deeply, everything else replaced."""
        here = self.values
        for part in filter(None, prefix.split(".")):
            here = here[part]
        for key, value in values.items():
            dotted = f"{prefix}{key}"
            if isinstance(value, Mapping):
                if not isinstance(here.get(key), dict):
                    self._forget(dotted)
                    here[key] = {}
                self.merge(value, origin, f"{dotted}.")
            else:
                self._forget(dotted)
                here[key] = value
                self.origins[dotted] = origin

    def _forget(self, dotted: str) -> None:
        for known in [k for k in self.origins if k == dotted or k.startswith(f"{dotted}.")]:
            del self.origins[known]

    def set(self, dotted: str, value: Any, origin: str) -> None:
        """Set one key. A number in the path is a place in a list, as in `data.views.0.size`."""
        here: Any = self.values
        parts = dotted.split(".")
        for depth, part in enumerate(parts):
            last = depth == len(parts) - 1
            if isinstance(here, list):
                if not part.isdigit() or int(part) >= len(here):
                    raise BadInput(
                        f"`{dotted}`: `{'.'.join(parts[:depth])}` is a list of {len(here)}; "
                        f"name one of its places, 0 to {len(here) - 1}, instead of {part!r}"
                    )
                if last:
                    here[int(part)] = value
                else:
                    here = here[int(part)]
            elif last:
                self._forget(dotted)
                here[part] = value
            else:
                if not isinstance(here.get(part), (dict, list)):
                    here[part] = {}
                here = here[part]
        self.origins[dotted] = origin

    def origin(self, dotted: str) -> str:
        """Where a key's value came from: a file's name, `command line`, or `default`."""
        parts = dotted.split(".")
        for depth in range(len(parts), 0, -1):
            found = self.origins.get(".".join(parts[:depth]))
            if found:
                return found
        below = (found for key, found in self.origins.items() if key.startswith(f"{dotted}."))
        return next(below, "default")


def packaged_configs() -> Path:
    """The folder of the configs that come with the project: inside an installed package, beside it in a checkout."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "configs"


def packaged_names() -> list[str]:
    """Names of all packaged configs that can be run, as `cifar10/simclr`."""
    root = packaged_configs()
    files = (path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))
    foreign = "detectron2"  # its configs are in its own form
    return sorted(
        name for name in files if not any(part.startswith("_") or part == foreign for part in name.split("/"))
    )


def presets(folder: str) -> list[str]:
    """Names of the packaged recipes in a folder of configs/."""
    files = sorted((packaged_configs() / folder).glob("*.yaml"))
    return [path.stem for path in files if not path.stem.startswith("_")]


def find(name: str) -> Path:
    """The file of a config given as a path or as a packaged name. Raises BadInput with the nearest names."""
    for candidate in (Path(name), packaged_configs() / f"{name}.yaml"):
        if candidate.is_file():
            return candidate.resolve()
    raise BadInput(f"no config {name!r}: neither a file nor a packaged config{_nearest(name, packaged_names())}")


def load(name: str, overrides: Iterable[str] = ()) -> Tree:
    """Read a config with everything it inherits, and lay `key.sub=value` overrides over it.

    Raises BadInput for a missing file, a cycle, invalid YAML, or an override that is not `key=value`.
    """
    tree = Tree()
    _load_into(tree, find(name), ())
    apply_overrides(tree, overrides)
    return tree


def apply_overrides(tree: Tree, overrides: Iterable[str]) -> None:
    """Lay `key.sub=value` texts over a tree; values are read as YAML."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
            raise BadInput(f"override {override!r} is not of the form key.sub=value, as in optim.learning_rate=0.3")
        tree.set(key, parse_yaml(text, f"the value of {key} on the command line"), "command line")


def _load_into(tree: Tree, path: Path, chain: tuple[Path, ...]) -> None:
    if path in chain:
        cycle = " -> ".join(str(p) for p in (*chain[chain.index(path) :], path))
        raise BadInput(f"configs inherit from each other in a circle: {cycle}")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read config {path}: {error}") from None
    if not isinstance(values, dict):
        raise BadInput(f"{path} holds a {type(values).__name__}; a config is a mapping of keys to values")
    parents = values.pop("inherit", [])
    if not isinstance(parents, list) or not all(isinstance(parent, str) and "\0" not in parent for parent in parents):
        raise BadInput(f"`inherit` in {path} must be a list of paths, as in [../_base.yaml]")
    for parent in parents:
        parent_path = (path.parent / parent).resolve()
        if not parent_path.is_file():
            raise BadInput(f"{path} inherits {parent!r}, and there is no file {parent_path}")
        _load_into(tree, parent_path, (*chain, path))
    root = packaged_configs().resolve()
    tree.merge(values, path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path))


# ---------------------------------------------------------------------------------------------------------- validation
def validate(model: type[Model], values: Any, tree: Tree | None = None, prefix: str = "") -> Model:
    """Options of class `model` from plain data.

    `prefix` is the dotted key under which `values` stand, for the messages. Raises BadInput with one line an error.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise BadInput("\n".join(_sentence(model, e, tree, prefix) for e in error.errors(include_url=False))) from None


def _sentence(model: type[Options], error: Any, tree: Tree | None, prefix: str) -> str:
    key, siblings, sections = _locate(model, error["loc"])
    key = f"{prefix}{key}".rstrip(".")
    origin = tree.origin(key) if tree and key else "default"
    source = "" if origin == "default" else f" ({origin})"
    parent = key.rpartition(".")[0]
    if error["type"] == "extra_forbidden":
        here = [f"{parent}.{name}" if parent else name for name in siblings]
        return f"unknown key `{key}`{source}{_nearest(key, here)}"
    if error["type"] == "missing":
        return f"`{key}` is missing: give it in the config or as {key}=VALUE"
    given = error["input"]
    if sections and error["type"].startswith("model_") and not isinstance(given, Mapping):
        return _no_section(key, given, source, sections)
    message = error["msg"].removeprefix("Value error, ")
    if not key:
        return message
    if error["type"] == "value_error" and sections and tree:  # of what several options are together
        named = (word if word.startswith(f"{key}.") else f"{key}.{word}" for word in re.findall(r"[\w.]*\w", message))
        known = [f"`{name}` ({tree.origins[name]})" for name in dict.fromkeys(named) if name in tree.origins]
        return f"{', '.join(known) or f'`{key}`'}: {message}"
    shown = "" if isinstance(given, (dict, list, BaseModel)) else f" = {given!r}"
    if error["type"] == "list_type" and isinstance(given, str):
        message += f", as {key}=[{given}]"
    return f"`{key}`{shown}{source}: {message[0].lower()}{message[1:]}"


def _no_section(key: str, given: Any, source: str, sections: list[type[Options]]) -> str:
    """The sentence for a value in the place of a section; several `sections` are the forms which that may have."""
    shared = [name for name in sections[0].model_fields if all(name in section.model_fields for section in sections)]
    example = ""
    for section, name in itertools.product(sections, [] if isinstance(given, list) else shared):
        info = section.model_fields[name]
        kind: Any = Annotated[info.annotation, info]
        with contextlib.suppress(ValidationError):
            TypeAdapter(kind).validate_python(given, strict=True)
            example = f", as {key}.{name}={given if isinstance(given, str) else json.dumps(given)}"
            break
    return f"`{key}` is a section{source}: give its options by name{example}; they are {', '.join(shared)}"


def _locate(model: type[Options], location: tuple[Any, ...]) -> tuple[str, list[str], list[type[Options]]]:
    """The dotted key of a pydantic location, the names of the fields among which its last part stands, and the forms of the
    section that stands there; none where it is an option."""
    key: list[str] = []
    siblings: list[str] = []
    kind: Any = model
    for part in location:
        members = [m for m in _members(kind) if isinstance(m, type) and issubclass(m, Options)]
        tagged = [m for m in members if part in _tags(m)]
        if tagged and not isinstance(part, int):  # pydantic puts a union's tag into the location; it is no key
            kind = tagged[0]
            continue
        fields = {name: info for m in members for name, info in m.model_fields.items()}
        siblings = list(fields)
        key.append(str(part))
        if part in fields:
            kind = fields[part].annotation
        elif isinstance(part, int):
            kind = next((a for m in _members(kind) for a in get_args(m)), None)
        else:
            kind = None
    return ".".join(key), siblings, [m for m in _members(kind) if isinstance(m, type) and issubclass(m, Options)]


def _members(kind: Any) -> list[Any]:
    """The alternatives of an annotation, with Annotated and Optional taken off."""
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [m for a in get_args(kind) for m in _members(a)]
    return [kind]


def _tags(model: type[Options]) -> list[Any]:
    return [
        a for f in model.model_fields.values() if get_origin(f.annotation) is Literal for a in get_args(f.annotation)
    ]


def _nearest(word: str, choices: Iterable[str]) -> str:
    choices = list(choices)
    short = word.rpartition(".")[2]  # lr for learning_rate is the likeliest of all
    close = [
        name for name in choices if "".join(part[0] for part in name.rpartition(".")[2].split("_") if part) == short
    ]
    close = close or difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if close:
        return f"; the nearest is `{close[0]}`"
    return f"; choose among {', '.join(choices)}" if choices else ""


def method_names() -> list[str]:
    """Names of all methods: the files in ssl_pipeline/methods."""
    spec = importlib.util.find_spec("ssl_pipeline.methods")
    assert spec is not None
    found = pkgutil.iter_modules(spec.submodule_search_locations)
    return sorted(module.name for module in found if not module.name.startswith("_"))


def _method_options(value: Any) -> Any:
    """`method: {name: NAME, ...}` -> the Options of ssl_pipeline/methods/NAME.py."""
    if isinstance(value, Options):
        return value
    names = method_names()
    if not isinstance(value, Mapping):
        example = value if value in names else "NAME"
        raise BadInput(f"`method` is a section: give method.name={example} (of {', '.join(names)})")
    name = value.get("name")
    if name not in names:
        raise BadInput(f"`method.name` = {name!r} is no method{_nearest(str(name), names)} (of {', '.join(names)})")
    return validate(importlib.import_module(f"ssl_pipeline.methods.{name}").Options, value, prefix="method.")


MethodOptions = Annotated[SerializeAsAny[Options], BeforeValidator(_method_options)]
"""The field `method` of a config: the options of the method that `method.name` names."""


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted leaf keys of nested mappings and of lists of mappings."""
    if isinstance(values, Mapping) and values:
        return {k: v for key, value in values.items() for k, v in flatten(value, f"{prefix}{key}.").items()}
    if isinstance(values, list) and any(isinstance(v, Mapping) for v in values):
        return {k: v for place, value in enumerate(values) for k, v in flatten(value, f"{prefix}{place}.").items()}
    return {prefix[:-1]: values}
