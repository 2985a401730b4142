"""The promises of docs/versioning.md: names and signatures, types, pinned versions, and contents of distributions."""

import difflib
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from setuptools import build_meta, find_packages
from setuptools.config.pyprojecttoml import read_configuration

import hf_flashcp
import hf_flashcp.data
from tests import public_api


ROOT = Path(__file__).parent.parent
CHANGED = """The public API is not what tests/public_api.txt says:

{}

If that is meant, `python -m tests.public_api` writes the file anew, and CHANGELOG.md needs a line on it. If a name, an
option or a default went away or means something else, read "Deprecations" in docs/versioning.md first."""


def run(*command, **options):
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def source_files():
    return {path for path in (ROOT / "hf_flashcp").rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_public_names_signatures_and_options():
    found, promised = public_api.public_api(), public_api.SNAPSHOT.read_text(encoding="utf-8")
    lines = difflib.unified_diff(promised.splitlines(), found.splitlines(), "promised", "found", lineterm="", n=0)
    assert found == promised, CHANGED.format("\n".join(lines))


def test_everything_exported_is_in_the_reference():
    documented = set(public_api.names())
    assert {f"hf_flashcp.{name}" for name in hf_flashcp.__all__} <= documented
    for name in hf_flashcp.data.__all__:
        assert documented & {f"hf_flashcp.{name}", f"hf_flashcp.data.{name}"}, name


def test_the_changelog_begins_with_this_version():
    version = re.search(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert version == hf_flashcp.__version__ or version == "Unreleased" and "dev" in hf_flashcp.__version__


def test_types():
    """Run mypy on the files that pyproject.toml names: planning, packing, the command line, and their use."""
    run(sys.executable, "-m", "mypy", "--cache-dir", os.devnull, cwd=ROOT)


def test_packages_and_their_data_are_declared():
    tool = read_configuration(ROOT / "pyproject.toml", expand=False)["tool"]["setuptools"]
    packages = find_packages(str(ROOT), **tool["packages"]["find"])
    declared = {path for package in packages for path in (ROOT / package.replace(".", "/")).glob("*.py")}
    for package, patterns in tool["package-data"].items():
        declared |= {path for pattern in patterns for path in (ROOT / package.replace(".", "/")).glob(pattern)}
    assert declared == source_files()


def test_direct_dependencies_are_pinned():
    project = read_configuration(ROOT / "pyproject.toml", expand=False)["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(each for name, extra in extras.items() if name != "flash-attn" for each in extra),
    ]
    names = {re.match(r"[\w-]+", each)[0] for each in wanted} - {"hf_flashcp"}
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", pin) for pin in pins)
    assert names <= {pin.partition("==")[0] for pin in pins}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git says which files belong to the distribution")
def test_distributions(tmp_path, monkeypatch):
    """The source distribution has all tracked files, and the wheel built from it has only the package.

    Installed outside the repository, it runs with the dependencies of this interpreter.
    """
    tracked = {name for name in run("git", "ls-files", cwd=ROOT).splitlines() if not name.startswith(".")}
    for name in tracked:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.chdir(tmp_path / "tree")
    sdist = tmp_path / build_meta.build_sdist(tmp_path)
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = {name for name in names - tracked if not name.startswith("hf_flashcp.egg-info/")}
    assert tracked <= names and made == {"PKG-INFO", "setup.cfg"}

    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    run(*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(sdist))
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {path.relative_to(ROOT).as_posix() for path in source_files()}

    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", str(environment))
    python = environment / "bin" / "python"
    outside = {"cwd": tmp_path, "env": {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}}
    run(*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel), **outside)
    site = Path(run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    assert Path(run(str(python), "-c", "import hf_flashcp; print(hf_flashcp.__file__)", **outside)).is_relative_to(
        site
    )
    command = ["plan", "--lengths", "10,20", "--cp-size", "2"]
    table = run(str(python), "-m", "hf_flashcp", *command, **outside)
    assert table.startswith("2 documents, 30 tokens, 2 ranks")
    assert run(str(environment / "bin" / "flashcp"), *command, **outside) == table
    assert hf_flashcp.__version__ in run(str(environment / "bin" / "flashcp"), "--version", **outside)
