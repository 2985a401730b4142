"""`python -m tests.fuzz TARGET --seconds 600`: a property of tests/test_fuzz.py, fed by coverage (needs atheris)."""

import argparse
import importlib.util
import os
import random
import re
import signal
import sys
import time
import traceback
from pathlib import Path

import hypothesis

import tests.conftest  # noqa: F401


os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

TARGETS = ("collator", "planner", "plan_json", "command_line", "config")
SEEDS = 128
LIMITS = ("-timeout=60", "-rss_limit_mb=3072", "-len_control=0", "-max_len=8192")
"""Seconds that an input may take, MiB of the process; and inputs as long as they like from the start."""
SLOW = [f"hf_flashcp.planning.{name}" for name in ("search_build", "search_pack", "search_repair", "search_supply")]
"""Followed for the planner alone."""


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600, metavar="N", help="default: %(default)s")
    parser.add_argument("--folder", type=Path, default="outputs/fuzz", help="of inputs that are kept (%(default)s)")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="an input that was kept: show its values")
    arguments = parser.parse_args()
    if arguments.replay:
        return replay(arguments.target, arguments.replay.read_bytes())
    if importlib.util.find_spec("atheris") is None:
        parser.error("atheris is not installed: pip install 'hf_flashcp[dev,fuzz]'")
    folder = arguments.folder / arguments.target
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    for seed in range(SEEDS):
        (folder / "corpus" / f"seed-{seed}").write_bytes(random.Random(seed).randbytes(64 << seed % 7))
    inputs, edges, findings = 0, 0, set()
    begin = time.monotonic()
    while (left := round(begin + arguments.seconds - time.monotonic())) > 0:
        tried = 0
        for line in lines_of(lambda: fuzz(arguments.target, folder, left)):
            print(line, end="", flush=True)
            if status := re.match(r"#(\d+)\s.*cov: (\d+)", line):
                tried, edges = int(status[1]), max(edges, int(status[2]))
            elif found := re.match(r"finding: (.*)|==\d+== ?(ERROR: libFuzzer: [^(]*)", line):
                findings.add(found[1] or found[2].strip())
        if not tried:
            sys.exit("It ended before the first input, as said above.")
        inputs += tried
    print(
        f"{arguments.target}: {inputs:,} inputs in {time.monotonic() - begin:.0f} s, {edges:,} edges, "
        f"{len(findings)} findings"
    )
    for finding in sorted(findings):
        print(f"  {finding}")
    return bool(findings)


def lines_of(function):
    """What a process of its own, which libFuzzer ends as it likes, writes on stderr."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.dup2(writing, sys.stderr.fileno())
        function()
        os._exit(1)
    os.close(writing)
    try:
        with open(reading, errors="replace") as lines:
            yield from lines
    finally:  # it may not be at its end: whoever reads may be interrupted
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def fuzz(name, folder, seconds):
    import atheris

    with atheris.instrument_imports(include=["hf_flashcp"], exclude=[] if name == "planner" else SLOW):
        feed = target(name)
    seen = set()

    def one(data):
        try:
            feed(data)
        except Exception as error:
            here = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in here if "hf_flashcp" in frame.filename or "test_fuzz" in frame.filename]
            place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
            finding = f"{type(error).__name__} at {place}"
            if finding not in seen:
                seen.add(finding)
                kept = folder / f"{type(error).__name__}-{place.replace(':', '-')}"
                kept.write_bytes(data)
                print(f"finding: {finding}: {str(error)[:200]!r}, kept in {kept}", file=sys.stderr, flush=True)

    options = [*LIMITS, f"-max_total_time={seconds}", f"-artifact_prefix={folder}/"]
    atheris.Setup([sys.argv[0], *options, str(folder / "corpus")], one)
    atheris.Fuzz()


def target(name):
    """A function of bytes, which draws the property's values from them."""
    from tests import test_fuzz

    return getattr(test_fuzz, f"test_{name}").hypothesis.fuzz_one_input


def replay(name, data):
    hypothesis.settings.register_profile("replay", verbosity=hypothesis.Verbosity.verbose)
    hypothesis.settings.load_profile("replay")
    return target(name)(data) is None


if __name__ == "__main__":
    sys.exit(main())
