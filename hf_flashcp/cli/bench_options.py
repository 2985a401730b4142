"""Makes benchmarks commands; options that several of them have.

A benchmark is a module of `hf_flashcp.bench` with two functions: `measure` takes the command's options by their names
and returns plain data, and `text` makes tables of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from ..data.lengths import LENGTH_DISTRIBUTIONS
from ..planning import STRATEGIES
from .options import add_json, show


_NOT_MEASURED = ("run", "module", "json", "read", "output", "plot")


def add_bench(benches, name: str, module: str, text: str) -> argparse.ArgumentParser:
    """Adds the benchmark of a module below `hf_flashcp.bench`. Returns its parser, for more options."""
    parser = benches.add_parser(name, help=text)
    add_json(parser)
    parser.set_defaults(run=run, module=module)
    return parser


def run(arguments: argparse.Namespace) -> None:
    run_bench(arguments)


def run_bench(arguments: argparse.Namespace, without: Sequence[str] = (), **more: Any) -> Any:
    """Measures, prints, and returns what was found. `without` are options that `measure` does not take, `more` what it
    takes in their place."""
    module = import_module(f"hf_flashcp.bench.{arguments.module}")
    options = {name: value for name, value in vars(arguments).items() if name not in (*_NOT_MEASURED, *without)}
    model = options.pop("model", None)
    if model is not None:
        options["config"] = arguments.read(model)
    found = module.measure(**options, **more)
    show(found, module.text, arguments.json, indent=2)
    return found


def add_corpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths-from",
        choices=LENGTH_DISTRIBUTIONS,
        default="pile",
        dest="corpus",
        metavar="CORPUS",
        help="default: pile",
    )


def add_corpora(parser: argparse.ArgumentParser) -> None:
    add_several(parser, "--lengths-from", LENGTH_DISTRIBUTIONS, dest="corpora", metavar="CORPUS")


def add_strategies(parser: argparse.ArgumentParser, strategies: Sequence[str]) -> None:
    add_several(parser, "--strategies", STRATEGIES, strategies, metavar="NAME")


def add_several(
    parser: argparse.ArgumentParser,
    option: str,
    choices: Sequence[str],
    default: Sequence[str] | None = None,
    text: str = "",
    **settings: Any,
) -> None:
    """Adds an option that takes several of the choices, by default all."""
    chosen = list(choices if default is None else default)
    text += f"default: {' '.join(chosen)}"
    parser.add_argument(option, choices=choices, nargs="+", default=chosen, help=text, **settings)
