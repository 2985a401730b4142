"""The structure in CONTRIBUTING.md: imports between rooms point one way, and no room, file or function is too
large."""

import ast
import graphlib
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest


pytestmark = pytest.mark.smoke


ROOT = Path(__file__).parent.parent
PACKAGE = "hf_flashcp"

BELOW = {
    "plan": set(),
    "predict": {"plan"},
    "planning": {"plan", "predict"},
    "simulation": {"plan", "predict", "planning"},
    "layout": {"plan"},
    "distributed": set(),
    "exchange": {"plan", "layout", "distributed"},
    "attention": {"plan", "layout", "distributed", "exchange"},
    "recurrence": {"plan", "layout", "distributed", "exchange"},
    "data": {"plan", "predict", "planning", "layout", "distributed"},
}
"""The rooms from which each room may import, besides `errors`."""
BELOW["integrations"] = set(BELOW) - {"simulation"}
BELOW["doctor"] = {*BELOW, "integrations"} - {"simulation"}
BELOW["bench"] = set(BELOW)
BELOW["cli"] = set(BELOW)

FREE_OF_TORCH = ("plan", "predict", "planning", "simulation")
MOST_LINES = 420
MOST_LINES_OF_CODE_IN_A_FUNCTION = 60
LARGEST_SHARE = 0.15


def modules():
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(name, path, typing_too=True):
    """Yield the modules that a file imports, at its top or in a function; with `typing_too` also under
    TYPE_CHECKING."""
    tree, known = ast.parse(path.read_text(encoding="utf-8")), dict(modules())
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in walk(tree, typing_too):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            target = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{target}.{alias.name}"
                yield inner if inner in known else target


def walk(node, typing_too):
    yield node
    for child in ast.iter_child_nodes(node):
        if typing_too or not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from walk(child, typing_too)


def room(module):
    """Return the folder of a module, or an empty string for files beside the folders."""
    return module.split(".")[1] if (ROOT / PACKAGE / module.removeprefix(f"{PACKAGE}.").split(".")[0]).is_dir() else ""


@cache
def arrows(typing_too=True):
    return {
        name: {each for each in imports(name, path, typing_too) if each.split(".")[0] == PACKAGE} - {name}
        for name, path in modules()
    }


def test_every_room_is_in_the_picture():
    folders = {path.name for path in (ROOT / PACKAGE).iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(BELOW)
    house = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert all(f"{name}/" in house for name in BELOW)


@pytest.mark.parametrize("name", BELOW)
def test_rooms_point_one_way(name):
    wrong = [
        f"{module} -> {target}"
        for module, targets in arrows().items()
        for target in targets
        if room(module) == name and room(target) not in {name, "", *BELOW[name]}
    ]
    assert not wrong


def test_no_circular_imports():
    """Check imports between files, including those in functions; imports for annotations do not count."""
    top = {name for name in arrows() if room(name) == ""}  # the package's own names are looked up when they are used
    order = graphlib.TopologicalSorter({name: targets - top for name, targets in arrows(False).items()})
    order.prepare()


@pytest.mark.parametrize("name", FREE_OF_TORCH)
def test_planning_rooms_do_not_import_torch(name):
    third_party = {
        target.split(".")[0]
        for module, path in modules()
        if room(module) == name
        for target in imports(module, path, typing_too=False)
    }
    assert third_party - {PACKAGE, "__future__", *sys.stdlib_module_names} <= {"numpy"}


def test_files_and_rooms_stay_small():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for _, path in modules()}
    assert {path.name: count for path, count in lines.items() if count > MOST_LINES} == {}
    rooms = Counter()
    for path, count in lines.items():
        rooms[path.parent] += count
    assert {path.name: count for path, count in rooms.items() if count > LARGEST_SHARE * sum(lines.values())} == {}


def test_functions_fit_a_screen():
    long = {
        f"{path.name}:{node.lineno} {node.name}": length
        for _, path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and (length := lines_of_code(node)) > MOST_LINES_OF_CODE_IN_A_FUNCTION
    }
    assert not long


def lines_of_code(function):
    body = function.body[ast.get_docstring(function) is not None and len(function.body) > 1 :]
    return body[-1].end_lineno - body[0].lineno + 1
