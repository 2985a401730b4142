"""The command line: `flashcp COMMAND`, or `python -m hf_flashcp COMMAND`.

Each command is a module with `add_parser(commands)`, which adds its sub-parser and sets `run` to a function of the
parsed arguments. Modules import what is heavy (torch, transformers, matplotlib) inside `run`: a command line of
planning alone must not wait for torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import FlashCPError
from . import bench, doctor, estimate, plan, report, simulate


_COMMANDS = (plan, estimate, simulate, doctor, report, bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: the command's own, or 2 for whatever the user can put right."""
    parser = argparse.ArgumentParser(prog="flashcp", description="Context parallelism for packed documents.")
    parser.add_argument("--version", action="version", version=f"hf_flashcp {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    if hasattr(sys.stdout, "reconfigure"):  # names of files and metrics need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        arguments = parser.parse_args(argv)
        code = arguments.run(arguments) or 0
        sys.stdout.flush()
    except FlashCPError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # one line, whatever a file is called
        return 2
    except BrokenPipeError:  # `flashcp plan ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code
