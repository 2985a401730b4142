"""Writes the API that docs/versioning.md covers to tests/public_api.txt: `python -m tests.public_api`.

Names and signatures are read from the source, so they do not depend on the versions of Python and transformers.
"""

import argparse
import re
from pathlib import Path

import griffe

from hf_flashcp import cli


ROOT = Path(__file__).parent.parent
SNAPSHOT = Path(__file__).with_suffix(".txt")


def names():
    """Return the import paths of everything in the Python reference, in its order."""
    return re.findall("^::: (.*)$", (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"), re.MULTILINE)


def described(name, each):
    """Return one line for a function, attribute or constant, and one more per public member of a class or module."""
    if each.is_function:
        return [each.signature(name=name)]
    if each.is_attribute:
        return [f"{name} = {each.value}" if each.parent.is_module else name]
    bases = f"({', '.join(map(str, each.bases))})" if each.is_class and each.bases else ""
    lines = [f"class {each.signature(name=name) or name + bases}" if each.is_class else f"module {name}"]
    for member_name, member in each.all_members.items():
        if not (member_name.startswith("_") or member.is_module or member.is_alias and not member.inherited):
            target = member.final_target if member.is_alias else member
            lines += [f"    {line}" for line in described(member_name, target)]
    return lines


def options(command, parser):
    """Return one line for a command and one per option; for a group of commands, those of all commands except
    bench."""
    lines = [f"{command}:"]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            named = [(name, each) for name, each in action.choices.items() if name != "bench"]
            return [line for name, each in named for line in options(f"{command} {name}", each)]
        if not isinstance(action, argparse._HelpAction):
            notes = ["required"] if action.required else []
            notes += [f"one of {', '.join(map(str, action.choices))}"] if action.choices else []
            if action.default is not None and action.default is not False and action.default != argparse.SUPPRESS:
                notes.append(f"default {action.default}")
            written = " ".join(filter(None, (", ".join(action.option_strings), action.metavar)))
            lines.append(f"    {written}" + (f" ({'; '.join(notes)})" if notes else ""))
    return lines


def public_api():
    package = griffe.load("hf_flashcp", search_paths=[ROOT], resolve_aliases=True)
    lines = []
    for name in names():
        each = package[name.removeprefix("hf_flashcp.")]
        lines += described(name, each.final_target if each.is_alias else each)
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    for command in cli._COMMANDS:
        command.add_parser(commands)
    return "\n".join([*lines, *options("flashcp", parser)]) + "\n"


if __name__ == "__main__":
    SNAPSHOT.write_text(public_api(), encoding="utf-8")
