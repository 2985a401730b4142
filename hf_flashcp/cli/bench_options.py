"""What the benchmarks of the command line share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from ..data.lengths import LENGTH_DISTRIBUTIONS
from ..errors import PlanError


def add_corpora(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths-from",
        choices=LENGTH_DISTRIBUTIONS,
        nargs="+",
        default=list(LENGTH_DISTRIBUTIONS),
        metavar="CORPUS",
        help="default: all of them",
    )


def check_at_least(least: int, option: str, value: int) -> None:
    if value < least:
        raise PlanError(f"{option} must be at least {least}, got {value}.")


def show(found: Any, text: Callable[[Any], str], as_json: bool) -> None:
    print(json.dumps(found, indent=2) if as_json else text(found))
