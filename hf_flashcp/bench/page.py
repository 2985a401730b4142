"""docs/benchmarks.md from the commands that it shows: each `text` block is what the `bash` block before it prints."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ..errors import ConfigurationError
from ..tables import counted


_HEADING_OR_BLOCK = re.compile(r"^(?:#+ (?P<heading>[^\n]+)|```(?P<kind>bash|text)\n(?P<body>.*?)^```)$", re.M | re.S)


class Output(NamedTuple):
    """A block of output: the heading it stands under, the commands that print it, and where its lines are in the
    page."""

    section: str
    script: str
    start: int
    stop: int


def outputs(page: str) -> list[Output]:
    """The blocks of output of a page in Markdown, in their order."""
    found, section, script = [], "", None
    for match in _HEADING_OR_BLOCK.finditer(page):
        if match["heading"]:
            section, script = match["heading"], None
        elif match["kind"] == "bash":
            script = match["body"]
        elif script is None:
            raise ConfigurationError(
                f"A text block under {section!r} has no bash block of its own before it: put the commands there that "
                "print it."
            )
        else:
            found.append(Output(section, script, *match.span("body")))
            script = None
    return found


def measure(path: Path, sections: list[str]) -> list[dict[str, Any]]:
    """Runs the commands of a page, or of the sections whose heading contains one of these, and puts what they print in
    the place of what they printed before; one section is written before the next one runs."""
    try:
        page = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error.strerror}): run this in a checkout.") from None
    wanted = [
        index
        for index, output in enumerate(outputs(page))
        if not sections or any(part.lower() in output.section.lower() for part in sections)
    ]
    if not wanted:
        raise ConfigurationError(f"No section of {path} with output is called like {', '.join(sections)}.")
    report = []
    for index in (bar := tqdm(wanted, unit="block", leave=False, disable=None)):
        output = outputs(page)[index]
        bar.set_description(output.section)
        begin = time.perf_counter()
        printed = _run(output)
        before = page[output.start : output.stop]
        page = page[: output.start] + printed + page[output.stop :]
        path.write_text(page, encoding="utf-8")
        diff = list(difflib.unified_diff(before.splitlines(), printed.splitlines(), lineterm="", n=0))[2:]
        report.append({"section": output.section, "seconds": time.perf_counter() - begin, "diff": diff})
    return report


def _run(output: Output) -> str:
    """What the commands print, with an empty line between two; `python` is the one that runs this."""
    printed = []
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    for command in output.script.replace("\\\n", " ").splitlines():
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": path, "COLUMNS": "200"},
        )
        if done.returncode:
            raise ConfigurationError(
                f"A command under {output.section!r} failed ({command}): {done.stderr.strip()[-500:]}"
            )
        lines = [line.rstrip() for line in done.stdout.splitlines()]
        if any(lines):
            printed.append("\n".join(lines).strip("\n"))
    return "\n\n".join(printed) + "\n"


def text(report: list[dict[str, Any]]) -> str:
    """The sections, and which lines changed."""
    lines = []
    for row in report:
        difference = f"{counted(len(row['diff']), 'line')} of difference" if row["diff"] else "as before"
        lines.append(f"{row['section']}: {row['seconds']:.0f} s, {difference}")
        lines += [f"    {line}" for line in row["diff"]]
    return "\n".join(lines)
