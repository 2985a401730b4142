"""Runs the commands in docs/benchmarks.md again and replaces their output: each `text` block of the page is the output
of the `bash` block before it.

python docs/hooks/benchmarks_page.py [--sections TEXT ...]
"""

import argparse
import difflib
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm


HEADING_OR_BLOCK = re.compile(r"^(?:#+ (?P<heading>[^\n]+)|```(?P<kind>bash|text)\n(?P<body>.*?)^```)$", re.M | re.S)


class PageError(Exception):
    """The page, the sections asked for, or a command of the page is wrong."""


class Output(NamedTuple):
    """One output block: its section heading, the commands that print it, and the span of its lines in the page."""

    section: str
    script: str
    start: int
    stop: int


def outputs(page):
    """The output blocks of a Markdown page, in order."""
    found, section, script = [], "", None
    for match in HEADING_OR_BLOCK.finditer(page):
        if match["heading"]:
            section, script = match["heading"], None
        elif match["kind"] == "bash":
            script = match["body"]
        elif script is None:
            raise PageError(f"A text block in section {section!r} has no bash block before it.")
        else:
            found.append(Output(section, script, *match.span("body")))
            script = None
    return found


def measure(path, sections):
    """Run the commands of a page and replace their output, one block after the other.

    With `sections`, only blocks whose heading contains one of these texts are run. Returns one record per block: its
    section, the seconds that its commands took, and the lines of the difference.
    """
    try:
        page = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PageError(f"Cannot read {path} ({error.strerror}). Run this in the root of a checkout.") from None
    wanted = [
        index
        for index, output in enumerate(outputs(page))
        if not sections or any(part.lower() in output.section.lower() for part in sections)
    ]
    if not wanted:
        raise PageError(f"{path} has no section with output whose heading contains {' or '.join(sections)}.")
    report = []
    for index in (bar := tqdm(wanted, unit="block", leave=False, disable=None)):
        output = outputs(page)[index]
        bar.set_description(output.section)
        begin = time.perf_counter()
        printed = run(output)
        before = page[output.start : output.stop]
        page = page[: output.start] + printed + page[output.stop :]
        path.write_text(page, encoding="utf-8")
        diff = list(difflib.unified_diff(before.splitlines(), printed.splitlines(), lineterm="", n=0))[2:]
        report.append({"section": output.section, "seconds": time.perf_counter() - begin, "diff": diff})
    return report


def run(output):
    """The output of the commands of one block, with an empty line between two commands."""
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
            raise PageError(
                f"A command in section {output.section!r} failed ({command}): {done.stderr.strip()[-500:]}"
            )
        lines = [line.rstrip() for line in done.stdout.splitlines()]
        if any(lines):
            printed.append("\n".join(lines).strip("\n"))
    return "\n\n".join(printed) + "\n"


def text(report):
    """The seconds of each block and the lines that changed."""
    lines = []
    for row in report:
        changed = f"{len(row['diff'])} lines of difference" if row["diff"] else "unchanged"
        lines.append(f"{row['section']}: {row['seconds']:.0f} s, {changed}")
        lines += [f"    {line}" for line in row["diff"]]
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0].replace("\n", " "))
    parser.add_argument("path", nargs="?", type=Path, default=Path("docs/benchmarks.md"), metavar="FILE")
    parser.add_argument(
        "--sections", nargs="+", default=[], metavar="TEXT", help="only sections whose heading contains TEXT"
    )
    options = parser.parse_args(argv)
    try:
        print(text(measure(options.path, options.sections)))
    except PageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
