"""Versions and checks agree in all places that mention them, and every check runs somewhere."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import scope_of


pytestmark = pytest.mark.smoke


ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RUN = (ROOT / "tests" / "run.sh").read_text(encoding="utf-8")
PINNED = dict(
    re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
)
OLDEST = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', str(PROJECT["project"]).replace("'", '"')))
PYTHONS = re.findall(r"Python :: (3\.\d+)", str(PROJECT["project"]["classifiers"]))


def short(version):
    return ".".join(version.split(".")[:2])


@pytest.mark.parametrize(
    "marker", [each.partition(":")[0] for each in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]
)
def test_every_marker_runs_by_default_or_by_a_command_that_is_documented(marker):
    left_out = re.findall(r"not (\w+)", PROJECT["tool"]["pytest"]["ini_options"]["addopts"])
    name = marker.partition("(")[0]
    assert name not in left_out or f"`python -m pytest -m {name}`" in PAGE
    assert f"`{name}`" in PAGE


def test_ci_runs_what_a_contributor_runs():
    commands = [
        line for line in (ROOT / ".ci" / "run").read_text().splitlines() if not line.startswith(("#", "set", "cd"))
    ]
    assert commands == ["bash tests/run.sh"] and "-m pytest -n 3" in RUN and " -m '" not in RUN


def test_a_module_fixture_is_made_on_one_worker():
    """Marks of groups would be ignored, silently: `pytest_xdist_make_scheduler` decides."""
    assert scope_of("tests/test_faults.py::test_killed[a]") == "tests/test_faults.py"
    assert scope_of("tests/test_plan.py::test_a[b]") == "tests/test_plan.py::test_a[b]"
    marked = [path.name for path in (ROOT / "tests").glob("test_*.py") if "xdist_" + "group" in path.read_text()]
    assert not marked


def test_options_of_the_command_are_documented():
    options = re.findall(r"^ +(--\w+)\)", RUN, re.MULTILINE)
    header = [line for line in RUN.splitlines() if line.startswith("#")]
    assert len(options) == 4
    for option in options:
        assert any(line.startswith(f"#   {option} ") for line in header) and option in PAGE, option


def test_files_of_the_quick_part_exist():
    names = [name for group in re.findall(r"tests/test_\{(.*?)\}\.py", RUN) for name in group.split(",")]
    assert len(names) > 10 and all((ROOT / "tests" / f"test_{name}.py").exists() for name in names)


@pytest.mark.parametrize("tool", [name for name in PROJECT["tool"] if name not in ("setuptools", "pytest")])
def test_every_tool_that_is_configured_is_named(tool):
    assert f"`python -m {tool}" in PAGE


def test_the_oldest_and_newest_versions_are_those_that_the_readme_names():
    names = {"torch": "torch", "transformers": "transformers", "accelerate": "accelerate", "trl": "TRL"}
    tested = [f"Python {PYTHONS[0]} to {PYTHONS[-1]}"]
    for name, shown in names.items():
        versions = list(dict.fromkeys(short(each) for each in (OLDEST[name], PINNED[name])))
        tested.append(f"{shown} {' and '.join(versions)}")
    assert f"| Tested with | {', '.join(tested)} |" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_oldest_python_is_the_same_everywhere():
    oldest = PYTHONS[0]
    assert PROJECT["project"]["requires-python"] == f">={oldest}"
    assert PROJECT["tool"]["mypy"]["python_version"] == oldest
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    for page in ("README.md", "docs/index.md"):
        assert f"with Python {oldest} or newer" in (ROOT / page).read_text(encoding="utf-8")
    assert f"Python {oldest} is the oldest" in PAGE


def test_the_models_page_was_written_with_the_pinned_versions():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    made_with = re.search(r"with transformers (\S+) and torch (\S+)\. ", page).groups()
    assert made_with == (PINNED["transformers"], PINNED["torch"]), "make it again, with the command that it names"


def test_line_numbers_of_the_canaries_are_of_the_pinned_versions():
    versions = {name: short(PINNED[name]) for name in ("transformers", "accelerate", "trl")}
    said = "Line numbers are those of transformers {transformers}, accelerate {accelerate} and TRL {trl}"
    assert said.format(**versions) in (ROOT / "tests" / "test_canaries.py").read_text(encoding="utf-8")


def third_party_imports(folder):
    """Return `{distribution: file}` for all imports in the files of a folder, at the top or in functions."""
    files = sorted((ROOT / folder).rglob("*.py"))
    ours = {"hf_flashcp", *sys.stdlib_module_names, *(path.stem for path in files)}
    found = {}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in {name.partition(".")[0] for name in names} - ours:
                found[{"yaml": "pyyaml"}.get(name, name.replace("_", "-"))] = path.relative_to(ROOT)
    return found


@pytest.mark.parametrize("folder", ["hf_flashcp", "recipes"])
def test_everything_that_is_imported_is_declared(folder):
    """As a dependency, or in an extra if only some features need it."""
    extras = PROJECT["project"]["optional-dependencies"]
    declared = {
        re.match(r"[\w-]+", each)[0]
        for group in (PROJECT["project"]["dependencies"], *extras.values())
        for each in group
    }
    imported = third_party_imports(folder)
    assert {"torch", "tqdm"} <= set(imported) and {name: imported[name] for name in set(imported) - declared} == {}
