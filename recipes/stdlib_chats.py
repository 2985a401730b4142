"""Long conversations made from files found on every machine: a user pastes a source file of Python's standard library
and asks what its functions and classes are for; the assistant answers with their docstrings."""

import ast
import json
from pathlib import Path

from stdlib_corpus import source_files
from tqdm.auto import tqdm


QUESTIONS = 3  # per conversation


def write_chats(path: Path) -> None:
    """Writes one JSON line {"messages": [...]} per source file with docstrings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lines:
        for name, source in tqdm(source_files(), desc="Reading docstrings", unit="file", leave=False, disable=None):
            answers = list(docstrings(source).items())[:QUESTIONS]
            if answers:
                lines.write(json.dumps({"messages": conversation(name, source, answers)}) + "\n")


def docstrings(source: str) -> dict[str, str]:
    """Returns the docstrings of the functions and classes at the top level of a module, by name."""
    module = ast.parse(source)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name: text for node in module.body if isinstance(node, kinds) and (text := ast.get_docstring(node))}


def conversation(name: str, source: str, answers: list[tuple[str, str]]) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": "You answer questions about source files with their docstrings."}]
    for number, (what, answer) in enumerate(answers):
        question = f"What does the docstring of {what} say?"
        if number == 0:
            question = f"This is {name}:\n\n{source}\n\n{question}"
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages
