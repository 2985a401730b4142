"""What docs/versioning.md promises, as text: `python -m tests.public_api` writes it to tests/public_api.txt.

Names and signatures are read from the source, so that they are the same with every version of Python and transformers.
"""

import argparse
import re
from pathlib import Path

import griffe

from hf_flashcp import cli


ROOT = Path(__file__).parent.parent
SNAPSHOT = Path(__file__).with_suffix(".txt")


def names():
    """Import paths of what is in the Python reference, in its order."""
    return re.findall("^::: (.*)$", (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"), re.MULTILINE)


def described(name, each):
    """One line for a function or constant, and one more for each public member of a class or module."""
    if each.is_function:
        return [each.signature(name=name)]
    if each.is_attribute:
        return [name if "property" in each.labels or each.value is None else f"{name} = {each.value}"]
    bases = f"({', '.join(map(str, each.bases))})" if each.is_class and each.bases else ""
    lines = [f"class {each.signature(name=name) or name + bases}" if each.is_class else f"module {name}"]
    for member_name, member in each.all_members.items():
        if not (member_name.startswith("_") or member.is_alias or member.is_module):
            lines += [f"    {line}" for line in described(member_name, member)]
    return lines


def options(command, parser):
    """One line for a command and one for each of its options; of a group of commands, those of all."""
    lines = [f"{command}:"]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return [line for name, each in action.choices.items() for line in options(f"{command} {name}", each)]
        if not isinstance(action, argparse._HelpAction):
            notes = ["required"] if action.required else []
            notes += [f"one of {', '.join(map(str, action.choices))}"] if action.choices else []
            notes += [] if action.default in (None, False, argparse.SUPPRESS) else [f"default {action.default}"]
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
