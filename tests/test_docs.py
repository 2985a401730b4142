"""The documentation: it builds, its code compiles, and the troubleshooting page knows every message."""

import ast
import functools
import re
import runpy
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from markdown.extensions.toc import slugify

import hf_flashcp


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


@functools.cache
def source_texts():
    return [text for tree in source_trees() for node in ast.walk(tree) if (text := text_of(node))]


def raised_messages():
    """What `raise SomeError(message)` says, apart from module `__getattr__`s, whose message is Python's own, and the
    tracebacks that the doctor's workers pass on."""
    for tree in source_trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                if ast.unparse(node.exc.args[0]) == "str(error)":
                    continue  # an error that was raised elsewhere, as another class
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


def help_of(*command):
    return runpy.run_path(str(ROOT / "docs" / "hooks" / "command_help.py"))["help_of"](command)


def commands_of(*command):
    return re.findall(r"^    (\w+)", help_of(*command), re.MULTILINE)


def links(page):
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\[[^]]*\]\(([^)]*)\)", re.sub("`[^`\n]*`", "code", text))


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    reference = (tmp_path / "site" / "reference" / "index.html").read_text(encoding="utf-8")
    for name in hf_flashcp.__all__:
        assert f'id="hf_flashcp.{name}"' in reference, name
    assert "[`" not in reference and "(`" not in reference, "a link or a type that stayed as it is in the docstring"
    for command in [(name,) for name in commands_of()] + [("bench", name) for name in commands_of("bench")]:
        assert f"usage: flashcp {' '.join(command)} [-h]" in reference, command


@pytest.mark.parametrize("command", ["doctor"])
def test_pages_of_commands_name_every_option(command):
    page = (ROOT / "docs" / f"{command}_command.md").read_text(encoding="utf-8")
    options = set(re.findall(r"^  (--[a-z-]+)", help_of(command), re.MULTILINE))
    assert len(options) >= 4 and options <= set(re.findall("--[a-z-]+", page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_are_well_formed(page):
    """Those to other sites cannot be followed here; those inside the site are checked when it builds, README's not."""
    for link in links(page):
        url = urlsplit(link)
        if url.scheme or url.netloc:
            assert url.scheme == "https" and "." in url.netloc and not re.search(r"\s", link), link
        elif url.path:
            assert (page.parent / url.path).exists(), link
        if url.path.endswith(".md") and url.fragment and not url.fragment.startswith("hf_flashcp."):
            headings = re.findall("^#+ (.*)$", (page.parent / url.path).read_text(encoding="utf-8"), re.MULTILINE)
            assert url.fragment in {slugify(heading, "-") for heading in headings}, link


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
