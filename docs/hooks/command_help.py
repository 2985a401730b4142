"""Replaces `<!-- flashcp COMMAND -->` in a page with the output of `flashcp COMMAND --help`.

`<!-- flashcp COMMAND * -->` stands for all subcommands of a command, each below a heading of its own.
"""

import contextlib
import io
import os
import re
from unittest import mock

from hf_flashcp.cli import main


def on_page_markdown(markdown, **kwargs):
    return re.sub(r"<!-- flashcp (.*?) ?-->", lambda match: expanded(match[1].split()), markdown)


def expanded(command):
    if command[-1:] != ["*"]:
        return f"```text\n{help_of(command)}```"
    command = command[:-1]
    names = subcommands(*command)
    return "\n\n".join(f"#### flashcp {' '.join([*command, name])}\n\n{expanded([*command, name])}" for name in names)


def subcommands(*command):
    """The names of a command's subcommands, read off its help."""
    return re.findall(r"^    (\w+)", help_of(command), re.MULTILINE)


def help_of(command):
    text, terminal = io.StringIO(), mock.patch.dict(os.environ, COLUMNS="110", NO_COLOR="1")
    with terminal, contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return text.getvalue()
