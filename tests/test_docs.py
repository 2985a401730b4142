"""The documentation: it builds, stays short, its links and code are sound, and the messages it quotes exist."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from markdown.extensions.toc import slugify

import hf_flashcp


pytestmark = pytest.mark.smoke


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_PAGES, MOST_WORDS = 20, 25_000
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


def source_texts():
    for path in (ROOT / "hf_flashcp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if text := text_of(node):
                yield text


def first_cells():
    for line in (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            yield line.split(" | ")[0]


def fragments():
    return [part for cell in first_cells() if not FROM_OTHERS.search(cell) for part in re.findall("`([^`]+)`", cell)]


def pattern(fragment):
    """A regular expression for the fragment, in which `...` stands for anything."""
    return re.compile(".*".join(map(re.escape, fragment.split("..."))), re.DOTALL)


def code_blocks(page, language):
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def help_of(*command):
    return runpy.run_path(str(ROOT / "docs" / "hooks" / "command_help.py"))["help_of"](command)


def commands_of(*command):
    return re.findall(r"^    (\w+)", help_of(*command), re.MULTILINE)


def links(page):
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\[[^]]*\]\(([^)]*)\)", re.sub("`[^`\n]*`", "code", text))


def is_well_formed(page, link):
    url = urlsplit(link)
    if url.scheme or url.netloc:
        return url.scheme == "https" and "." in url.netloc and not re.search(r"\s", link)
    target = page.parent / url.path
    if not target.exists():
        return False
    if not url.path.endswith(".md") or not url.fragment or url.fragment.startswith("hf_flashcp."):
        return True
    headings = re.findall("^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
    return url.fragment in {slugify(heading, "-") for heading in headings}


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


def test_the_docs_stay_short():
    pages = sorted((ROOT / "docs").glob("*.md"))
    words = sum(len(page.read_text(encoding="utf-8").split()) for page in pages)
    assert len(pages) <= MOST_PAGES and words <= MOST_WORDS, f"{len(pages)} pages, {words} words"


def test_links_are_well_formed():
    """Checks addresses of other sites, and files and headings here. The build checks links inside docs/ too."""
    wrong = [f"{page.name}: {link}" for page in PAGES for link in links(page) if not is_well_formed(page, link)]
    assert not wrong, "\n".join(wrong)


def test_messages_of_the_troubleshooting_page_exist():
    texts, known = list(source_texts()), fragments()
    unknown = [each for each in known if not any(map(pattern(each).search, texts))]
    assert len(known) >= 40 and not unknown, "\n".join(unknown)


def test_python_blocks_compile():
    blocks = [(page, block) for page in PAGES for block in code_blocks(page, "python") if ">>>" not in block]
    assert len(blocks) >= 10
    for page, block in blocks:
        compile(re.sub(r"^  ", "", block, flags=re.MULTILINE) if block.startswith("  ") else block, page.name, "exec")
