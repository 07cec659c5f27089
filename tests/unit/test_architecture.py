"""Imports go downward only, no circle; folders say what they are for; tests import no test."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from helpers import ROOT

# from the ground up; a module may import those of its own floor and of the floors below
FLOORS = [
    {"tissues", "files", "errors", "settings", "machine", "distributed"},
    {"data", "preparation", "synthesis", "network", "weights"},
    {"inference", "training", "results"},
    {"report"},
    {"commands", "segment", "workflow", "__main__"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "scripts").rglob("*.py"))
    if path != ROOT / "scripts" / "__init__.py"
}


def imported_by(path: Path) -> set[str]:
    """The modules of this project that a module imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports by a relative name"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & MODULES.keys()


def floor_of(module: str) -> int:
    return FLOOR_OF[module.split(".")[1]]


def test_imports_go_downward_only():
    for module, path in MODULES.items():
        upward = {name for name in imported_by(path) if floor_of(name) > floor_of(module)}
        assert not upward, module


def test_no_circle():
    graph = {module: imported_by(path) - {module} for module, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError
    folders: dict[str, set[str]] = {}
    for module, names in graph.items():
        folder = module.split(".")[1]
        folders[folder] = folders.get(folder, set()) | {name.split(".")[1] for name in names} - {folder}
    TopologicalSorter(folders).prepare()


def test_folders_are_few_and_say_what_they_are_for():
    entries = [path for path in (ROOT / "scripts").iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 20
    for path in (ROOT / "scripts").rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_no_test_imports_another():
    tests = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for path in (ROOT / "tests").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        froms = {str(node.module).split(".")[-1] for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not froms & (tests | {"conftest"}), path
