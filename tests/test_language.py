"""The language of code and docs: phrases that readers stumble over, and first lines of public docstrings."""

import ast
import re
from pathlib import Path

import pytest

import hf_flashcp


pytestmark = pytest.mark.smoke


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_flashcp"

_UNIT = "GiB|MiB|KiB|GB|bytes|milliseconds|seconds|ms|tokens|operations"
_ONE_THING = "(?:one|an?) (?:entry|line|row|call|value|batch|exchange|stage|step)"
_THING = "GPU|rank|node|process|token|layer|micro-step|step|row|pack|batch|document|operation|call"
_NO_CLAUSE = r"(?! (?:\w+s|can|may|must|would|will)\b)"  # "the tokens a rank holds" is fine
_NOT_A = "JSON|partition|multiple|list|number|name|mesh|DeviceMesh|CostModel|Topology|ShardPlan|profile|folder"

# A pattern, a text that it must find, and one that it must not find.
PHRASES = [
    (rf"\b(?:{_UNIT}) an? (?:{_THING})\b{_NO_CLAUSE}", "8 GiB a GPU", "the tokens a rank holds"),
    (rf"\b{_ONE_THING} an? (?:{_THING})\b{_NO_CLAUSE}", "one entry a layer", "one entry per layer"),
    (r"\bin vain\b", "waited in vain for rank 3", "in vainly"),
    (r"\bverdicts?\b", "its verdicts", "its results"),
    (r"\broll(?: |-)calls?\b", "a roll call of all ranks", "to roll back calls"),
    (r"\bwhereabouts\b", "its whereabouts", "where about"),
    (r"\bgiants?\b", "one giant", "gigantic"),
    (r"\bpeel(?:s|ed|ing)?\b", "peeled off", "peer"),
    (r"\brelay(?:s|ed|ing)?\b", "relays between nodes", "prelayernorm"),
    (r"\bfillers\b", "packed with fillers", "filler tokens"),
    (r"\bthat (?:is|are) none\b", "a mesh that is none", "that is None"),
    (r"\b(?:what|who) is there\b", "asks who is there", "what is it"),
    (rf"(?<!here) is no (?:{_NOT_A})\b", "which is no JSON", "There is no list, and there is no profile"),
]


def texts():
    """Yield every file that users or contributors read, as `(name, text)`."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for folder in (PACKAGE, ROOT / "recipes"):
        files += [path for path in folder.rglob("*") if path.suffix in (".py", ".md", ".sh", ".yaml", ".json")]
    for path in sorted(files):
        yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def found(pattern, text):
    """Return `line: phrase` for each match. A phrase may be broken over two lines."""
    matches = re.finditer(pattern.replace(" ", r"\s+"), text)
    return [f"{text.count(chr(10), 0, match.start()) + 1}: {' '.join(match[0].split())}" for match in matches]


@pytest.mark.parametrize("pattern", [pytest.param(pattern, id=bad) for pattern, bad, _ in PHRASES])
def test_no_file_has_the_phrase(pattern):
    assert [f"{name}:{each}" for name, text in texts() for each in found(pattern, text)] == []


@pytest.mark.parametrize("pattern, bad, good", [pytest.param(*each, id=each[1]) for each in PHRASES])
def test_patterns_find_what_they_should_and_nothing_else(pattern, bad, good):
    assert found(pattern, f"First line.\n{bad}.") and found(pattern, bad.replace(" ", "\n    "))
    assert not found(pattern, good)


def docstrings(tree, public_only):
    """Yield `(name, docstring or None)` of a module, and of its functions and classes at any depth.

    With `public_only`, functions inside functions and names with a leading underscore are left out.
    """
    yield "", ast.get_docstring(tree)
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not (public_only and node.name.startswith("_")):
            inner = [("", ast.get_docstring(node))]
            if isinstance(node, ast.ClassDef) or not public_only:
                inner = docstrings(node, public_only)
            yield from ((f"{node.name}.{name}".rstrip("."), each) for name, each in inner)


def documented_constants(tree):
    """Yield the names that a module assigns at its top level with a string below them as documentation."""
    for node, following in zip(tree.body, tree.body[1:]):
        if isinstance(node, ast.Assign) and isinstance(following, ast.Expr):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def problem_of(docstring):
    """Return what a machine can see to be wrong with the first paragraph of a public docstring, or `None`."""
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    if not re.search(r"[.:?][\"'`)\]]*$", paragraph):
        return "is not a sentence"
    if re.match(r"(?:Of|That|Which|Whether it)\b", paragraph):
        return "has no subject"
    if re.match(r"(?!transformers|accelerate)[a-z]", paragraph):
        return "begins with a lower-case word"
    return None


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def test_public_docstrings_begin_with_a_sentence():
    assert [
        f"{path} {name}: {problem}"
        for path, tree in modules()
        for name, docstring in docstrings(tree, public_only=True)
        if docstring is not None and (problem := problem_of(docstring))
    ] == []


def test_no_docstring_begins_with_of():
    assert [
        f"{path} {name}"
        for path, tree in modules()
        for name, docstring in docstrings(tree, public_only=False)
        if (docstring or "").startswith("Of ")
    ] == []


def test_everything_that_is_exported_has_a_docstring():
    documented = {path.rpartition("/")[2].removesuffix(".py") for path, tree in modules() if ast.get_docstring(tree)}
    for _, tree in modules():
        documented |= {name for name, docstring in docstrings(tree, public_only=True) if docstring}
        documented |= set(documented_constants(tree))
    assert set(hf_flashcp.__all__) - documented == set()


@pytest.mark.parametrize(
    "docstring, problem",
    [
        ("Return the step time of the slowest rank.", None),
        ("`flashcp plan`: show how documents would be sharded.", None),
        ('Does a window fit?\n\nNeeds no "torch"', None),
        ("Seconds per tile\n\nMore.", "is not a sentence"),
        ("The names. And their", "is not a sentence"),
        ("Of the slowest rank.", "has no subject"),
        ("Whether it fits.", "has no subject"),
        ("Which ranks wait.", "has no subject"),
        ("That of the slowest rank.", "has no subject"),
        ("transformers' config for a model.", None),
        ("seconds per tile.", "begins with a lower-case word"),
    ],
)
def test_problems_of_docstrings_are_seen(docstring, problem):
    assert problem_of(docstring) == problem


def test_docstrings_at_any_depth_are_read():
    tree = ast.parse(
        '"""A."""\nclass B:\n    """B."""\n    def c(self):\n        """C."""\n'
        '        def d():\n            """Of d."""\ndef _e():\n    """Of e."""\n'
    )
    assert dict(docstrings(tree, public_only=True)) == {"": "A.", "B": "B.", "B.c": "C."}
    assert dict(docstrings(tree, public_only=False)) == {
        "": "A.",
        "B": "B.",
        "B.c": "C.",
        "B.c.d": "Of d.",
        "_e": "Of e.",
    }
