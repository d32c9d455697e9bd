"""Who may import whom (docs/design.md): direct imports at module level."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ssl_pipeline"
GROUND = {"config", "distributed", "exits"}
SHARED = GROUND | {
    "sparse_head",
    "head",
    "backbone",
    "optim",
    "data",
    "checkpoint",
    "monitor",
    "preemption",
    "run_folder",
    "cluster",
    "preflight",
    "export",
    "watchdog",
    "recovery",
    "alarms",
    "compute",
}
ALLOWED = {
    "exits": set(),
    "config": {"exits"},
    "distributed": {"exits"},
    "sparse_head": GROUND,
    "head": GROUND | {"sparse_head"},
    "backbone": GROUND,
    "optim": GROUND,
    "data.index": GROUND | {"data.listing"},
    "data.randomness": GROUND,
    "data.augment": GROUND | {"data.randomness"},
    "data.loader": GROUND | {"data.augment", "data.randomness", "data.index", "data.listing"},
    "data.prepare": GROUND | {"data.index"},
    "data.bench": GROUND | {"data.index", "data.loader"},
    "methods": GROUND | {"head", "sparse_head", "backbone"},
    "checkpoint": GROUND | {"run_folder"},
    "monitor": GROUND | {"run_folder"},
    "preemption": GROUND,
    "run_folder": GROUND,
    "cluster": GROUND | {"run_folder"},
    "preflight": GROUND | {"cluster", "run_folder"},
    "export": GROUND | {"backbone", "data", "run_folder"},
    "launch": SHARED,
    "evaluation": SHARED | {"evaluation"},
    "pretrain": SHARED | {"methods", "evaluation.online"},
    "demo": None,
    "cli": None,
    "__main__": None,
    "__init__": set(),
    "data.listing": GROUND,
    "data.parallel": GROUND,
    "data.pack": GROUND | {"data.index", "data.listing", "data.parallel"},
    "data.check": GROUND | {"data.index", "data.listing", "data.parallel", "data.loader"},
    "watchdog": GROUND | {"cluster", "run_folder"},
    "recovery": GROUND | {"data.loader", "monitor", "run_folder"},
    "alarms": GROUND | {"sparse_head"},
    "evaluation.measures": GROUND | {"sparse_head", "methods"},
    "compute": GROUND | {"methods"},
}
LIBRARIES = {
    "nvidia": ("data",),
    "detectron2": ("evaluation",),
    "submitit": ("launch",),
    "apex": ("optim",),
    "yaml": ("config",),
}


def modules() -> list[str]:
    return sorted(p.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for p in PACKAGE.rglob("*.py"))


def imports(tree: ast.AST, everywhere: bool) -> set[str]:
    """Full names that are imported, at module level or everywhere."""
    found = set()
    nodes = ast.walk(tree) if everywhere else ast.iter_child_nodes(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("module", modules())
def test_module_imports_only_what_it_may(module: str) -> None:
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())
    name = module.removesuffix(".__init__")
    allowed = ALLOWED.get(name, ALLOWED.get(name.split(".")[0], set()))
    for imported in imports(tree, everywhere=False):
        if not imported.startswith("ssl_pipeline.") or allowed is None:
            continue
        ours = imported.removeprefix("ssl_pipeline.")
        if ours == "__version__":
            continue
        if name.startswith("methods.") and ours.split(".")[0] == "methods":
            others = {p.stem for p in (PACKAGE / "methods").glob("[!_]*.py")}  # a name with _ is shared, as in config
            assert others.isdisjoint(ours.split(".")), f"{module} imports another method: {imported}"
            continue
        parts = ours.split(".")
        fits = any(".".join(parts[:n]) in allowed for n in range(1, len(parts) + 1))
        assert fits, f"{module} imports {imported}; it may import {sorted(allowed)}"


@pytest.mark.parametrize("module", modules())
def test_libraries_stay_in_their_rooms(module: str) -> None:
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())
    for imported in imports(tree, everywhere=True):
        rooms = LIBRARIES.get(imported.split(".")[0])
        assert rooms is None or module.split(".")[0] in rooms, f"{module} imports {imported}"
