"""Preferences made from files found on every machine: a user pastes a function of Python's standard library and asks
for its docstring; the true one is preferred to the same words in a random order."""

import ast
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from stdlib_corpus import source_files
from tqdm.auto import tqdm


PAIRS = 400
LONGEST_CODE, LONGEST_DOCSTRING = 600, 300  # characters
FEWEST_WORDS = 5


def write_pairs(path: Path) -> None:
    """Writes one JSON line {"prompt": ..., "chosen": ..., "rejected": ...} per function."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = tqdm(source_files(), desc="Reading docstrings", unit="file", leave=False, disable=None)
    found = [each for _, source in files for each in functions(source)]
    with path.open("w") as lines:
        for code, docstring in random.Random(0).sample(found, min(PAIRS, len(found))):
            lines.write(json.dumps(pair(code, docstring)) + "\n")


def functions(source: str) -> Iterator[tuple[str, str]]:
    """Yields the code without docstring and the docstring of each short function at the top level of a module."""
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or len(node.body) == 1:
            continue
        docstring = ast.get_docstring(node) or ""
        text = node.body[0]
        code = "\n".join(lines[node.lineno - 1 : text.lineno - 1] + lines[text.end_lineno : node.end_lineno])
        if len(code) <= LONGEST_CODE and len(docstring) <= LONGEST_DOCSTRING:
            if len(set(docstring.split())) >= FEWEST_WORDS:
                yield code, docstring


def pair(code: str, docstring: str) -> dict[str, list[dict[str, str]]]:
    question = f"Write a docstring for this function:\n\n{code}"
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": docstring}],
        "rejected": [{"role": "assistant", "content": shuffled(docstring)}],
    }


def shuffled(text: str) -> str:
    """Returns the words of a text, which has at least two different ones, in another order. Spaces stay in place."""
    words, generator = re.split(r"(\s+)", text), random.Random(text)
    while (result := "".join(words)) == text:
        mixed = words[::2]
        generator.shuffle(mixed)
        words[::2] = mixed
    return result
