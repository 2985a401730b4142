"""`flashcp report`: what a training run logged, as a page that a browser opens without a network."""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import operator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import ConfigurationError, FlashCPError
from ..tables import table
from .options import add_json, show
from .plots import COLOURS, INK, new_figure, remove_frame


STATE = "trainer_state.json"


class Panel(NamedTuple):
    """A plot of the page: its heading, what is drawn, as it was logged, and the text below."""

    heading: str
    names: tuple[str, ...]
    caption: str = ""


PANELS = (
    Panel(
        "Loss (nats per target)", ("loss", "eval_loss"), "mean over the targets of a step, or of the evaluation set"
    ),
    Panel(
        "Tokens per second",
        ("flashcp_tokens_per_second",),
        "of all data-parallel groups, with the time of saving and without that of evaluation",
    ),
    Panel(
        "Imbalance (max / mean over ranks)",
        ("flashcp_pair_imbalance", "flashcp_token_imbalance"),
        "of attention pairs and of tokens; 1 is even",
    ),
    Panel(
        "KV moved, as a share of an all-gather",
        ("flashcp_kv_fraction",),
        "0: nothing travels; 1: every rank receives everything",
    ),
    Panel(
        "Exposed transfer (ms per pack)",
        ("flashcp_exposed_transfer_ms",),
        "how long the first rank waited for KV and its gradients, slower ranks included; logged on CPU alone",
    ),
    Panel("Planning (ms per pack)", ("flashcp_plan_ms",), "in loader workers it costs the step nothing"),
    Panel("Gradient norm", ("grad_norm",), "before clipping"),
    Panel("Learning rate", ("learning_rate",)),
)

_MOST_DRAWN = 1e100
"""Beyond which a value is left out of plots, as infinite ones are: matplotlib cannot place its ticks."""

Series = dict[str, list[tuple[int, float]]]


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
        raise ConfigurationError(
            f"Cannot read the folder {str(run_dir)!r} to find a {STATE}: {error.strerror}."
        ) from None
    raise ConfigurationError(
        f"There is no {STATE} in {str(run_dir)!r} or its checkpoints. Pass the output_dir of a run that has saved a "
        "checkpoint, or call trainer.save_state() after training."
    )


def read_series(path: Path) -> Series:
    """What was logged over the steps, by name: `[(step, value), ...]`."""
    series: Series = {}
    try:
        for entry in json.loads(path.read_text(encoding="utf-8"))["log_history"]:
            for name, value in entry.items():
                if name not in ("step", "epoch") and isinstance(value, (int, float)):
                    step = operator.index(entry["step"])
                    float(step)  # raises an OverflowError if it is too large to plot
                    series.setdefault(name, []).append((step, float(value)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ConfigurationError(
            f"{str(path)!r} is not a Trainer's {STATE}: {type(error).__name__}: {error}."
        ) from None
    if not series:
        raise ConfigurationError(
            f"{str(path)!r} has no logged values. Train with logging_steps set, for example to 1."
        )
    return series


def summarize(series: Series) -> dict[str, dict[str, Any]]:
    summary = {}
    for name, points in series.items():
        values = [value for _, value in points]
        summary[name] = {"first": values[0], "last": values[-1], "least": min(values), "most": max(values)}
        summary[name] |= {"mean": sum(values) / len(values), "entries": len(values)}
    return summary


def write_page(path: Path, series: Series, summary: dict[str, dict[str, Any]], *, title: str) -> None:
    """Writes the page; panels of what was not logged are left out, and every other `flashcp_` metric gets one."""
    known = {name for panel in PANELS for name in panel.names}
    more = [Panel(name, (name,)) for name in series if name.startswith("flashcp_") and name not in known]
    figures = []
    for heading, names, caption in (*PANELS, *more):
        if drawn := {name: series[name] for name in names if name in series}:
            figures.append(
                f'<figure><img src="{_draw(heading, drawn)}" alt="{html.escape(heading)} over the steps">'
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )
    steps = max(step for points in series.values() for step, _ in points)
    page = _PAGE.format(
        title=html.escape(title), steps=f"{steps:,}", figures="\n".join(figures), summary=_summary_table(summary)
    )
    try:
        path.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise FlashCPError(f"Cannot write the page to {str(path)!r}: {error.strerror}.") from None


def _draw(heading: str, series: Series) -> str:
    """Returns the source of an image."""
    figure = new_figure(6.2, 2.9)
    axes = figure.subplots()
    for (name, points), colour in zip(series.items(), COLOURS):
        steps, values = np.array(points, dtype=float).T
        values[~(abs(values) < _MOST_DRAWN)] = np.nan
        few = len(points) < 40
        style = {"color": colour, "linewidth": 1.6, "marker": "o" if few else None, "markersize": 3}
        axes.plot(steps, values, label=_as_drawn(name), **style)
    axes.set_title(_as_drawn(heading), fontsize=11, color=INK, loc="left")
    axes.set_xlabel("step", color=INK)
    remove_frame(axes)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.ticklabel_format(useOffset=False, axis="y")
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(drawn.getvalue()).decode()}"


def _as_drawn(name: str) -> str:
    """Returns a name without formulas, and without what cannot be written as text."""
    return name.encode("utf-8", "replace").decode().replace("$", r"\$")


def _summary_table(summary: dict[str, dict[str, Any]]) -> str:
    columns = ("first", "last", "least", "most", "mean", "entries")
    head = "".join(f"<th>{column}</th>" for column in ("logged", *columns))
    rows = "\n".join(
        f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{values[column]:.6g}</td>" for column in columns) + "</tr>"
        for name, values in summary.items()
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: training run</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #2b2f36; background: #fff; margin: 2rem auto; max-width: 82rem;
  padding: 0 1rem; }}
main {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1.5rem; }}
figure {{ margin: 0; }}
img {{ width: 100%; height: auto; }}
figcaption {{ color: #6a707a; font-size: 13px; }}
table {{ border-collapse: collapse; margin-top: 1rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.2rem 0.8rem; text-align: right; border-bottom: 1px solid #e6e6e6; }}
th:first-child, td:first-child {{ text-align: left; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{steps} steps, from what the Trainer logged.</p>
<main>
{figures}
</main>
<h2>Numbers</h2>
{summary}
</body>
</html>
"""
