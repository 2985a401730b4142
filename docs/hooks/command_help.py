"""Replaces `<!-- flashcp COMMAND -->` in a page by what `flashcp COMMAND --help` prints."""

import contextlib
import io
import os
import re
from unittest import mock

from hf_flashcp.cli import main


def on_page_markdown(markdown, **kwargs):
    return re.sub(r"<!-- flashcp (.*?) ?-->", lambda match: f"```text\n{help_of(match[1].split())}```", markdown)


def help_of(command):
    text, terminal = io.StringIO(), mock.patch.dict(os.environ, COLUMNS="110", NO_COLOR="1")
    with terminal, contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return text.getvalue()
