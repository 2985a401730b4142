"""The command line: `flashcp COMMAND`, or `python -m hf_flashcp COMMAND`.

Each command is a module with a function `add_parser(commands)`, which adds the command's sub-parser and sets its
default `run` to a function that takes the parsed arguments. Modules import heavy packages (torch, transformers,
matplotlib) inside `run`, so that a command that only plans does not wait for torch.
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
    """Run one command and return its exit code: the command's own, or 2 for an error that the user can correct."""
    parser = argparse.ArgumentParser(prog="flashcp", description="Context parallelism for packed documents.")
    parser.add_argument("--version", action="version", version=f"hf_flashcp {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    if hasattr(sys.stdout, "reconfigure"):  # file and metric names may hold characters that cannot be encoded
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        arguments = parser.parse_args(argv)
        code = arguments.run(arguments) or 0
        sys.stdout.flush()
    except FlashCPError as error:
        print(
            f"error: {' '.join(str(error).split())}", file=sys.stderr
        )  # always one line, even if a file name contains a line break
        return 2
    except BrokenPipeError:  # the reader of a pipe has stopped, as in `flashcp plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code
