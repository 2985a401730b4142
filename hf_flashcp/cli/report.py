"""`flashcp report`: what a training run logged, as a page that a browser opens without a network."""

from __future__ import annotations

import argparse
import json
import operator
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from ..tables import table
from .options import add_json, show
from .report_page import write_page


STATE = "trainer_state.json"


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "report",
        help="make a page of plots from a training run's logs",
        description="Reads what a Trainer logged, and writes one HTML file: losses, speed, balance, KV moved "
        "and the time waited for it, over the steps.",
    )
    parser.add_argument(
        "run_dir",
        metavar="RUN",
        help=f"the run's output_dir, of which the newest {STATE} is read (a checkpoint has one, trainer.save_state() "
        "writes one), or such a file",
    )
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="where to write the page (default: report.html beside the file; with --json none)",
    )
    add_json(parser, "the summary")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Reads, writes and prints."""
    path = find_state(Path(arguments.run_dir))
    series = read_series(path)
    summary = summarize(series)
    page = Path(arguments.html) if arguments.html else None if arguments.json else path.with_name("report.html")
    if page is not None:
        write_page(page, series, summary, title=path.parent.name)
    show({"state": str(path), "summary": summary}, _text, arguments.json)
    if not arguments.json:
        print(f"Wrote {page}")


def _text(found: dict[str, Any]) -> str:
    columns = {"logged": "", "last": ".6g", "mean": ".6g", "entries": ","}
    return table(columns, [(name, *(one[key] for key in list(columns)[1:])) for name, one in found["summary"].items()])


def find_state(run_dir: Path) -> Path:
    """The newest `trainer_state.json` of a run: in its folder, or in the checkpoint of the highest step."""
    try:
        if run_dir.is_file():
            return run_dir
        checkpoints = [path for path in run_dir.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
        checkpoints.sort(key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
        for folder in (run_dir, *checkpoints):
            if (folder / STATE).is_file():
                return folder / STATE
    except OSError as error:
        raise ConfigurationError(f"Cannot look for a {STATE} in {str(run_dir)!r}: {error.strerror}.") from None
    raise ConfigurationError(
        f"There is no {STATE} in {str(run_dir)!r} or its checkpoints. Give the output_dir of a run that has saved a "
        "checkpoint, or call trainer.save_state() after training."
    )


def read_series(path: Path) -> dict[str, list[tuple[int, float]]]:
    """What was logged over the steps, by name: `[(step, value), ...]`."""
    series: dict[str, list[tuple[int, float]]] = {}
    try:
        for entry in json.loads(path.read_text(encoding="utf-8"))["log_history"]:
            for name, value in entry.items():
                if name not in ("step", "epoch") and isinstance(value, (int, float)):
                    step = operator.index(entry["step"])
                    float(step)  # or an OverflowError: plots have floats
                    series.setdefault(name, []).append((step, float(value)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ConfigurationError(
            f"{str(path)!r} is not a {STATE} of a Trainer: {type(error).__name__}: {error}."
        ) from None
    if not series:
        raise ConfigurationError(f"{str(path)!r} has no logs. Train with logging_steps=1, or any number of steps.")
    return series


def summarize(series: dict[str, list[tuple[int, float]]]) -> dict[str, dict[str, Any]]:
    """Returns the first, last, least, most and mean value of each series, and its number of `entries`."""
    summary = {}
    for name, points in series.items():
        values = [value for _, value in points]
        summary[name] = {
            "first": values[0],
            "last": values[-1],
            "least": min(values),
            "most": max(values),
            "mean": sum(values) / len(values),
            "entries": len(values),
        }
    return summary
