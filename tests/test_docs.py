"""The documentation: it builds, its code compiles, and the troubleshooting page knows every message."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FROM_OTHERS = re.compile(r"\(from \w+\)")


def text_of(node):
    """A string expression as one text, `...` for what is only known when it runs; None for anything else."""
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.JoinedStr(values=values):
            return "".join(text_of(value) or "..." for value in values)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return (text_of(left) or "...") + (text_of(right) or "...")


def source_trees():
    return [ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "hf_flashcp").rglob("*.py"))]


def source_texts():
    return [text for tree in source_trees() for node in ast.walk(tree) if (text := text_of(node))]


def raised_messages():
    """What `raise SomeError(message)` says, apart from module `__getattr__`s, whose message is Python's own, and the
    tracebacks that the doctor's workers pass on."""
    for tree in source_trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                if ast.unparse(node.exc.func) not in ("AttributeError", "WorkerFailure"):
                    yield text_of(node.exc.args[0])


def first_cells():
    for line in (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            yield line.split(" | ")[0]


def fragments():
    return [part for cell in first_cells() if not FROM_OTHERS.search(cell) for part in re.findall("`([^`]+)`", cell)]


def says(fragment, text):
    """Whether the fragment is part of the text; a `...` of the fragment stands for anything."""
    return re.search(".*".join(map(re.escape, fragment.split("..."))), text, re.DOTALL) is not None


def code_blocks(page, language):
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "site" / "index.html").exists()


@pytest.mark.parametrize("fragment", fragments())
def test_messages_of_the_troubleshooting_page_exist(fragment):
    assert any(says(fragment, text) for text in source_texts())


def test_every_error_has_a_row():
    known = fragments()
    missing = [message for message in raised_messages() if not any(says(part, message) for part in known)]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_compile(page):
    for block in code_blocks(page, "python"):
        if ">>>" not in block:
            compile(
                re.sub(r"^  ", "", block, flags=re.MULTILINE) if block.startswith("  ") else block, page.name, "exec"
            )


def test_blocks_are_found():
    assert sum(len(code_blocks(page, "python")) for page in PAGES) >= 10 and len(fragments()) >= 50
