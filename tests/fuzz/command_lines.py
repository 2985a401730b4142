"""Command lines and the files that they name, as they should be and not; and running one in this process."""

import argparse
import contextlib
import io
import json
import warnings

from hypothesis import strategies as st

from hf_flashcp.cli import estimate, main, plan, report, simulate
from hf_flashcp.errors import UnmetCapWarning
from hf_flashcp.planning import HARDWARE
from hf_flashcp.predict.hardware_profile import _loaded
from hf_flashcp.predict.model_shape import LLAMA_3_8B
from tests.fuzz.values import H100, changed, json_values, mostly


FILES = {
    "model.json": LLAMA_3_8B,
    "hardware.json": H100,
    "trainer_state.json": {
        "log_history": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "flashcp_x": 2}],
        "stateful_callbacks": {"hf_flashcp": {"args": {}, "attributes": {"kernels": {"eager": 2}}}},
    },
    "lengths.jsonl": {"length": 400},
    "lengths.txt": 400,
}
PLACES = st.sampled_from([*FILES, ".", "nowhere", "no/where", "", "\udcff", "a\nb", "a" * 300])
whole = st.sampled_from(["1", "2", "3", "64", "300", "0", "-1", "x", "9" * 30])
ratios = st.sampled_from(["1", "1.05", "2", "1e3", "inf", "0.5", "-1", "nan", "x"])
VALUES = {
    "model": mostly(st.just("model.json"), PLACES, one_in=3),
    "hardware": mostly(st.sampled_from(HARDWARE), st.just("hardware.json") | PLACES, one_in=3),
    "run_dir": mostly(st.sampled_from(["trainer_state.json", "."]), PLACES, one_in=3),
    "lengths_file": mostly(st.sampled_from(["lengths.txt", "lengths.jsonl"]), PLACES, one_in=3),
    "plot": mostly(st.just("new.svg"), PLACES | st.just("new.txt"), one_in=4),
    "html": mostly(st.just("new.html"), PLACES, one_in=4),
    "column": mostly(st.just("length"), st.text(max_size=3)),
    "lengths": mostly(st.sampled_from(["8", "8,5,3", "300,64,1"]), st.sampled_from(["0", "1,,2", "9" * 30, "-3", ""])),
    "packs": mostly(st.sampled_from(["1", "2"]), st.sampled_from(["0", "x"])),
    "gpus": mostly(st.sampled_from(["1", "2", "8"]), whole),
    "cp_size": mostly(st.sampled_from(["2", "4"]), whole),
    "window": mostly(st.sampled_from(["64", "300"]), whole),
}
"""By an argument's name; of others by its type."""
RARELY = {"plot": 1, "html": 1, "json": 12}
"""Of 20 lines, how many have an option that is not needed; 5 for others."""
COMMANDS = {"plan": plan, "estimate": estimate, "simulate": simulate, "report": report}


def parser_of(command):
    subparsers = argparse.ArgumentParser().add_subparsers()
    command.add_parser(subparsers)
    (parser,) = subparsers.choices.values()
    return parser


PARSERS = {name: parser_of(command) for name, command in COMMANDS.items()}


@st.composite
def command_lines(draw):
    name = draw(st.sampled_from(sorted(PARSERS)))
    parser, line = PARSERS[name], [name]
    exclusive = [action for group in parser._mutually_exclusive_groups for action in group._group_actions]
    chosen = [draw(st.sampled_from(exclusive))] if exclusive else []
    for action in parser._actions[1:]:  # the first is --help
        wanted = action.required or action in chosen or action.dest == "window" and chosen[0].dest != "lengths"
        if draw(st.integers(1, 20)) <= (19 if wanted else 1 if action in exclusive else RARELY.get(action.dest, 5)):
            line += action.option_strings[-1:] + draw(values_of(action))
    return line


def values_of(action):
    if action.nargs == 0:
        return st.just([])
    if action.choices:
        values = mostly(st.sampled_from([*action.choices]), st.text(max_size=2))
    else:
        values = VALUES[action.dest] if action.dest in VALUES else {int: whole, float: ratios}[action.type]
    return st.lists(values, min_size=1, max_size=2 if action.nargs == "+" else 1)


@st.composite
def file_contents(draw):
    contents = {name: json.dumps(value).encode() for name, value in FILES.items()}
    name = draw(st.sampled_from(sorted(FILES)))
    contents[name] = draw(
        st.just(contents[name])
        | st.binary(max_size=12)
        | st.text(max_size=12).map(lambda text: text.encode("utf-8", "surrogatepass"))
        | (changed(FILES[name]) if isinstance(FILES[name], dict) else json_values).map(
            lambda value: json.dumps(value).encode()
        )
    )
    return contents


def run(*line):
    """Exit code, stdout and stderr of a command line, in this process, with streams as a terminal's."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    _loaded.cache_clear()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore", (UnmetCapWarning, RuntimeWarning))
        try:
            code = main(line)
        except SystemExit as stop:
            code = stop.code
    for stream in (out, err):
        stream.flush()
    return code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")
