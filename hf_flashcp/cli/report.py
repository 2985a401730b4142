"""The `flashcp report` command: turns the logs of a training run into one HTML page."""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import ConfigurationError, FlashCPError
from ..tables import counted, table
from .options import add_json, show
from .plots import INK, new_figure, remove_frame


if TYPE_CHECKING:
    from matplotlib.axes import Axes


STATE = "trainer_state.json"


class Panel(NamedTuple):
    """One plot of the page.

    Attributes:
        heading (`str`): stands above the plot.
        unit (`str`): label of the vertical axis.
        names (`tuple[str, ...]`): what is drawn, by the names that it was logged under.
        caption (`str`): what the values mean, and what good ones look like.
        lowest (`float`, *optional*): where the vertical axis begins; by default it fits the values.
    """

    heading: str
    unit: str
    names: tuple[str, ...]
    caption: str = ""
    lowest: float | None = None


PANELS = (
    Panel(
        "Loss",
        "nats per target",
        ("loss", "eval_loss"),
        "Mean over the targets of a step or of the evaluation set. Good: falls fast at first, then slowly. Single "
        "steps scatter, because each trains on different documents.",
    ),
    Panel(
        "Speed",
        "tokens per second",
        ("flashcp_tokens_per_second",),
        "All data-parallel groups together, including the time to save checkpoints, excluding evaluation. Good: no "
        "downward trend. Steps with long documents are slower, because they need more attention per token.",
        0,
    ),
    Panel(
        "Imbalance",
        "busiest process / mean",
        ("flashcp_pair_imbalance", "flashcp_token_imbalance"),
        "Attention work (pairs of query and key) and tokens of the busiest process, divided by the mean. Good: close "
        "to 1, where all processes have the same work and none waits.",
        1,
    ),
    Panel(
        "KV share",
        "share of an all-gather",
        ("flashcp_kv_fraction",),
        "Keys and values that travel between processes. At 0% every document is on one process; at 100% every "
        "process receives everything, as with an all-gather. Good: well below 100%. Rows with one long document need "
        "the most.",
        0,
    ),
    Panel(
        "Exposed transfer",
        "ms per packed row",
        ("flashcp_exposed_transfer_ms",),
        "Time that the first process waited for keys, values and their gradients, which includes waiting for slower "
        "processes. Good: a small part of the step time. Logged on CPU only.",
        0,
    ),
    Panel(
        "Planning",
        "ms per packed row",
        ("flashcp_plan_ms",),
        "Time to plan one packed row. Good: far below the step time. In data loader workers it overlaps with "
        "training.",
        0,
    ),
    Panel(
        "Gradient norm",
        "norm before clipping",
        ("grad_norm",),
        "Good: settles after warmup. Frequent spikes suggest a lower learning rate or a longer warmup.",
        0,
    ),
    Panel("Learning rate", "learning rate", ("learning_rate",), "The schedule of the run, including warmup.", 0),
)

_SMOOTHED_FROM = 40
"""Curves of so many points or more get a running mean."""
_MOST_DRAWN = 1e100
"""Larger values are left out of plots, as infinite ones are: matplotlib cannot place ticks for them."""

_LINES = ("#2f6f9f", "#c9752b", "#4f8f47")
_SCATTERED = ("loss", "flashcp_tokens_per_second", "grad_norm", "flashcp_kv_fraction", "flashcp_exposed_transfer_ms")
"""Logged values that differ from step to step with the documents."""
_LABELS = {
    "loss": "training",
    "eval_loss": "evaluation",
    "flashcp_pair_imbalance": "attention pairs",
    "flashcp_token_imbalance": "tokens",
    "flashcp_tokens_per_second": "per step",
    "flashcp_kv_fraction": "per step",
    "flashcp_exposed_transfer_ms": "per step",
    "grad_norm": "per step",
}

Series = dict[str, list[tuple[int, float]]]


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "report",
        help="make a page of plots from a training run's logs",
        description="Reads the logs of a Trainer and writes one HTML file with plots of loss, speed, balance, KV "
        "moved and the time waited for it. The file needs no network and opens in any browser.",
    )
    parser.add_argument(
        "run_dir",
        metavar="RUN",
        help=f"the run's output_dir, one of its checkpoints, or a {STATE}. In a directory the newest {STATE} is read; "
        "checkpoints contain one, and trainer.save_state() writes one",
    )
    parser.add_argument(
        "--html",
        metavar="FILE",
        help=f"where to write the page (default: report.html beside the {STATE}; with --json no page is written)",
    )
    add_json(parser, "the summary")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Writes the page and prints the summary."""
    path = find_state(Path(arguments.run_dir))
    series = read_series(path)
    kernels, summary = read_kernels(path), summarize(series)
    page = Path(arguments.html) if arguments.html else None if arguments.json else path.with_name("report.html")
    if page is not None:
        write_page(page, series, summary, kernels, title=path.parent.name)
    show({"state": str(path), "kernels": kernels, "summary": summary}, _text, arguments.json)
    if page is not None and not arguments.json:
        print(f"\nWrote {page}\nOpen it in a browser: {page.resolve().as_uri()}")


def _text(found: dict[str, Any]) -> str:
    columns = {"metric": "", "last": ".6g", "mean": ".6g", "times logged": ","}
    rows = [(name, one["last"], one["mean"], one["entries"]) for name, one in found["summary"].items()]
    return table(columns, rows)


def find_state(run_dir: Path) -> Path:
    """Returns the newest `trainer_state.json` of a run: in its folder, else in the checkpoint of the highest step."""
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
    """Returns the logged numbers by name, each a list of `(step, value)`."""
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


def read_kernels(path: Path) -> list[str]:
    """Returns the attention kernels that ran, which only FlashCPTrainer and the mixin record."""
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))["stateful_callbacks"]["hf_flashcp"]
        return [str(name) for name in recorded["attributes"]["kernels"]]
    except (KeyError, TypeError):
        return []


def summarize(series: Series) -> dict[str, dict[str, Any]]:
    """Returns first, last, least, most and mean value of each series, and its number of entries."""
    summary = {}
    for name, points in series.items():
        values = [value for _, value in points]
        summary[name] = {"first": values[0], "last": values[-1], "least": min(values), "most": max(values)}
        summary[name] |= {"mean": sum(values) / len(values), "entries": len(values)}
    return summary


def write_page(
    path: Path, series: Series, summary: dict[str, dict[str, Any]], kernels: list[str], *, title: str
) -> None:
    """Writes the page. Panels without values are left out; every other `flashcp_` metric gets a panel of its own."""
    known = {name for panel in PANELS for name in panel.names}
    more = [Panel(name, "", (name,)) for name in series if name.startswith("flashcp_") and name not in known]
    figures = []
    for panel in (*PANELS, *more):
        if drawn := {name: series[name] for name in panel.names if name in series}:
            heading = html.escape(panel.heading)
            figures.append(
                f'<figure><h2>{heading}</h2><img src="{_draw(panel, drawn)}" alt="{heading} over the steps">'
                f"<figcaption>{html.escape(panel.caption)}</figcaption></figure>"
            )
    page = _PAGE.format(
        title=html.escape(title),
        subtitle=html.escape(_subtitle(series, kernels)),
        cards="\n".join(_cards(series, summary)),
        figures="\n".join(figures),
        summary=_summary_table(summary),
    )
    try:
        path.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise FlashCPError(f"Cannot write the page to {str(path)!r}: {error.strerror}.") from None


def _subtitle(series: Series, kernels: list[str]) -> str:
    """Returns how long the run was and which kernels ran, as far as that was recorded."""
    parts = [counted(max(step for points in series.values() for step, _ in points), "step")]
    if "num_input_tokens_seen" in series:
        parts.append(f"{series['num_input_tokens_seen'][-1][1]:,.0f} tokens")
    if "train_runtime" in series:
        seconds = series["train_runtime"][-1][1]
        parts.append(f"{seconds:,.0f} seconds" if seconds < 120 else f"{seconds / 60:,.1f} minutes")
    if kernels:
        parts.append(f"attention by {' and '.join(kernels)}")
    return ", ".join(parts)


def _cards(series: Series, summary: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yields the headline figures."""

    def card(label: str, value: str, note: str) -> str:
        return f"<div><b>{value}</b><span>{label}</span><small>{note}</small></div>"

    if loss := summary.get("loss"):
        yield card("loss", f"{loss['last']:.3f}", f"first logged: {loss['first']:.3f}")
    if loss := summary.get("eval_loss"):
        yield card("evaluation loss", f"{loss['last']:.3f}", f"lowest: {loss['least']:.3f}")
    if speed := summary.get("flashcp_tokens_per_second"):
        rates = [value for _, value in series["flashcp_tokens_per_second"] if value > 0]
        overall = len(rates) / sum(1 / rate for rate in rates) if rates else 0.0
        yield card("tokens per second", f"{overall:,.0f}", f"harmonic mean; slowest step: {speed['least']:,.0f}")
    if pairs := summary.get("flashcp_pair_imbalance"):
        yield card("attention imbalance", f"{pairs['mean']:.3f}", f"mean; 1 is even, highest: {pairs['most']:.3f}")
    if moved := summary.get("flashcp_kv_fraction"):
        yield card("KV share", f"{moved['mean']:.0%}", f"mean, of an all-gather; highest: {moved['most']:.0%}")


def _draw(panel: Panel, series: Series) -> str:
    """Returns a plot as the source of an image."""
    figure = new_figure(6.2, 2.7)
    axes = figure.subplots()
    for (name, points), colour in zip(series.items(), _LINES):
        steps, values = np.array(points, dtype=float).T
        values[~(abs(values) < _MOST_DRAWN)] = np.nan
        label = _as_drawn(_LABELS.get(name, name))
        if len(points) < _SMOOTHED_FROM:
            axes.plot(steps, values, label=label, color=colour, linewidth=1.6, marker="o", markersize=3)
        elif name in _SCATTERED:
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.4)
            axes.plot(steps, _running_mean(values), label=f"{label}, running mean", color=colour, linewidth=1.8)
        else:
            axes.plot(steps, values, label=label, color=colour, linewidth=1.6)
    axes.set_xlabel("step", color=INK, fontsize=9)
    axes.set_ylabel(panel.unit, color=INK, fontsize=9)
    remove_frame(axes, labelsize=9)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.ticklabel_format(useOffset=False, axis="y")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if panel.lowest is not None:
        _begin_axis_at(axes, panel.lowest)
    if panel.names == ("flashcp_kv_fraction",):
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    elif panel.names == ("flashcp_tokens_per_second",):
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if len(series) > 1 or axes.get_legend_handles_labels()[1] != [_as_drawn(name) for name in series]:
        axes.legend(
            loc="lower right", bbox_to_anchor=(1, 0.97), ncols=len(series), borderaxespad=0, frameon=False, fontsize=8
        )
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(drawn.getvalue()).decode()}"


def _begin_axis_at(axes: Axes, lowest: float) -> None:
    """Begins the vertical axis a little below `lowest`, unless values are lower still."""
    bottom, top = axes.get_ylim()
    top = max(top, 1.06 if lowest == 1 else top)
    if top > lowest:
        axes.set_ylim(min(bottom, lowest) if bottom < lowest else lowest - 0.03 * (top - lowest), top)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Returns the mean over a window of a tenth of the values around each, shorter at the ends; NaNs are left out."""
    reach = max(1, len(values) // 20)
    return np.array([_mean(values[max(0, place - reach) : place + reach + 1]) for place in range(len(values))])


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else np.nan


def _as_drawn(name: str) -> str:
    """Returns a name that matplotlib draws as it is: formulas and characters that are no text are escaped."""
    return name.encode("utf-8", "replace").decode().replace("$", r"\$")


def _summary_table(summary: dict[str, dict[str, Any]]) -> str:
    first = [name for panel in PANELS for name in panel.names if name in summary]
    ordered = dict.fromkeys((*first, *summary))
    columns = {"first": "first", "last": "last", "least": "minimum", "most": "maximum", "mean": "mean"}
    head = "".join(f"<th>{title}</th>" for title in ("metric", *columns.values(), "times logged"))
    rows = "\n".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{_number(summary[name][column])}</td>" for column in columns)
        + f"<td>{summary[name]['entries']:,}</td></tr>"
        for name in ordered
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>"


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Training report: {title}</title>
<style>
:root {{ color-scheme: light dark; --page: #f4f5f7; --card: #fff; --ink: #2b2f36; --soft: #626973; --line: #e0e2e6; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --page: #16181c; --card: #22252b; --ink: #e8eaed; --soft: #a2a9b4; --line: #383d46; }}
}}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto;
  max-width: 82rem; padding: 0 1rem; }}
h1 {{ margin: 0; font-size: 1.7rem; }}
h2 {{ margin: 0 0 0.4rem; font-size: 1.05rem; }}
body > p, figcaption, small {{ color: var(--soft); }}
body > p {{ margin: 0.2rem 0 1.2rem; }}
header {{ display: flex; flex-wrap: wrap; gap: 1rem; margin-bottom: 1rem; }}
header div, figure, section {{ background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 0.9rem 1.1rem; }}
header div {{ flex: 1 1 11rem; }}
header b {{ display: block; font-size: 1.6rem; line-height: 1.2; font-variant-numeric: tabular-nums; }}
header span, header small {{ display: block; }}
main {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }}
figure {{ margin: 0; }}
img {{ width: 100%; height: auto; background: #fff; border-radius: 4px; }}
figcaption {{ font-size: 13px; margin-top: 0.3rem; }}
section {{ margin-top: 1rem; overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }}
th, td {{ padding: 0.3rem 0.8rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }}
th {{ color: var(--soft); font-weight: 600; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
td:first-child {{ font-family: ui-monospace, monospace; font-size: 13px; }}
tbody tr:last-child td {{ border-bottom: 0; }}
</style>
</head>
<body>
<h1>Training report: {title}</h1>
<p>{subtitle}</p>
<header>
{cards}
</header>
<main>
{figures}
</main>
<section>
<h2>All logged values</h2>
{summary}
</section>
</body>
</html>
"""
