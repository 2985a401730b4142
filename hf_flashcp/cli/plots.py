"""Plots of the commands, except those of plans, and what all plots share: colours and figures without a display."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from ..errors import FlashCPError
from ..extras import require_extra
from ..predict.memory import PARTS
from ..predict.training_setup import TrainingSetup
from ..simulation.remedies import described
from ..simulation.simulate import title_of
from ..simulation.sizing import Choice
from ..tables import GIB


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    "#7aa6c2",
    "#e3a35c",
    "#8fb783",
    "#d68a8a",
    "#a996c8",
    "#c9b458",
    "#7fbab0",
    "#d391b5",
    "#a8a29a",
    "#b98b6b",
)
INK = "#2b2f36"


def require_matplotlib() -> None:
    """Raise a `ConfigurationError` if matplotlib is not installed."""
    require_extra("Plots", "plot", "matplotlib")


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def remove_frame(axes: Axes, labelsize: float | None = None) -> None:
    """Remove a plot's top and right border and its tick marks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0, colors=INK, **({} if labelsize is None else {"labelsize": labelsize}))


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Write a figure in the format that the file name ends with, and report that on stderr."""
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise FlashCPError(f"Cannot write the plot to {os.fspath(path)!r}: {reason}.") from None
    print(f"plot written to {path}", file=sys.stderr)


def plot_memory(
    found: Sequence[Choice], usable: float, path: str | os.PathLike, *, window: int, setup: TrainingSetup
) -> None:
    """Draw the memory of each cp_size as a bar. `usable` is the memory that a GPU has for training, in bytes."""
    figure = new_figure(max(6.5, 1.1 * len(found) + 3.4), 4.6)
    axes = figure.subplots()
    places = range(len(found))
    # Bars end at three times the memory of a GPU. Otherwise the bars of small cp_sizes would dwarf all others.
    top = min(max(choice.memory.total for choice in found), 3 * usable) / GIB
    bottoms = [0.0] * len(found)
    for part, colour in zip(PARTS, COLOURS):
        heights = [choice.memory.parts[part] / GIB for choice in found]
        if any(height > 0.002 * top for height in heights):
            axes.bar(places, heights, 0.62, bottoms, color=colour, label=part, edgecolor="white", linewidth=0.6)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights)]
    for place, choice in zip(places, found):
        height = choice.memory.total / GIB
        if height <= 1.1 * top:
            axes.annotate(
                f"{height:,.1f}",
                (place, height),
                (0, 3),
                textcoords="offset points",
                ha="center",
                color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )
        else:
            axes.annotate(
                f"{height:,.0f} ↑", (place, 1.16 * top), (0, -3), textcoords="offset points", ha="center", va="top"
            )
    axes.axhline(usable / GIB, color=INK, linewidth=1.2, linestyle="--", label=f"usable: {usable / GIB:,.1f} GiB")
    axes.set_ylim(0, 1.18 * max(top, usable / GIB))
    labels = [
        [str(choice.cp_size), *wrap(choice.memory.peak, 14), *described(choice.setup).split(", ")] for choice in found
    ]
    axes.set_xticks(places, ["\n".join(lines) for lines in labels], fontsize=7.5)
    axes.set_xlabel("cp_size, the phase of the step with the peak memory, and the settings", color=INK)
    axes.set_ylabel("GiB per GPU", color=INK)
    axes.set_title(f"{window:,} tokens on {setup.gpus} GPUs: {setup.sharding}", fontsize=11, color=INK)
    remove_frame(axes)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    save_figure(figure, path)


_PARTS = {
    "linear": "linear layers",
    "attention": "attention kernels",
    "copies": "copies",
    "exposed": "waiting for transfers and ranks",
    "repeated": "repeated under gradient checkpointing",
    "scan": "scans of recurrent layers",
}


def plot_simulation(found: dict[str, Any], path: str | os.PathLike) -> None:
    """Draw the output of `flashcp simulate --json`, with one panel for each hardware profile and cp_size."""
    cells = found["cells"]
    figure = new_figure(8.4, 0.4 + 3.9 * len(cells))
    for axes, cell in zip(figure.subplots(len(cells), 1, squeeze=False)[:, 0], cells):
        schemes = cell["schemes"]
        bottoms = [0.0] * len(schemes)
        for (part, label), colour in zip(_PARTS.items(), COLOURS):
            widths = [1000 * row[f"{part}_seconds"] for row in schemes.values()]
            if not any(widths):
                continue
            axes.barh(range(len(schemes)), widths, 0.68, bottoms, color=colour, label=label, edgecolor="white")
            bottoms = [bottom + width for bottom, width in zip(bottoms, widths)]
        for place, (bottom, row) in enumerate(zip(bottoms, schemes.values())):
            axes.annotate(
                f"{1000 * row['step_seconds']:,.0f} ms, {row['over_reference']:.2f}x",
                (bottom, place),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color=INK,
            )
        axes.set_xlim(0, 1.24 * max(bottoms))
        axes.set_yticks(range(len(schemes)), map(title_of, schemes), fontsize=9)
        axes.invert_yaxis()
        axes.set_title(
            f"{found['window']:,} tokens, {cell['hardware']}, cp_size {cell['cp_size']}, "
            f"{cell['ranks_per_node']} ranks per node",
            fontsize=11,
            color=INK,
        )
        remove_frame(axes, labelsize=9)
        axes.set_xlabel(
            f"ms on the slowest rank, and as a multiple of {title_of(cell['reference'])}", color=INK, fontsize=9
        )
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save_figure(figure, path)


_KINDS = {
    "other operators": ("layer",),
    "linear layers": ("linear",),
    "local pass": ("local pass",),
    "stages": ("stage",),
    "pack KV, merge outputs, add returned gradients": ("pack", "merge", "add"),
    "waiting for other ranks": ("wait",),
}
"""For each kind of range, the prefixes of its ranges' names. They are drawn in this order, so the layer lies below."""
_KIND_COLOURS = dict(zip(_KINDS, ("#e4e1dc", COLOURS[0], COLOURS[2], COLOURS[4], COLOURS[5], COLOURS[3])))


def plot_layer(found: dict[str, Any], path: str | os.PathLike) -> None:
    """Draw one layer from the output of `flashcp bench step --json` on CPU.

    Forward is above backward, and each has one row for each of the first two ranks.
    """
    layer = found["layer"]
    ranks = layer["ranks"][:2]
    figure = new_figure(10, 4.6)
    for axes, direction in zip(figure.subplots(2, 1), ("forward", "backward")):
        start = min(begin for rank in ranks for _, begin, _ in rank[direction])
        for kind, prefixes in _KINDS.items():
            for place, rank in enumerate(ranks):
                bars = [
                    (1000 * (begin - start), 1000 * (end - begin))
                    for name, begin, end in rank[direction]
                    if name.startswith(prefixes)
                ]
                label = kind if place == 0 else None
                axes.broken_barh(bars, (place - 0.36, 0.72), facecolors=_KIND_COLOURS[kind], label=label)
        axes.set_yticks(range(len(ranks)), [f"rank {place}" for place in range(len(ranks))], fontsize=9)
        axes.invert_yaxis()
        axes.set_title(f"{direction} of one layer, ms", fontsize=10, color=INK, loc="left")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(colors=INK, labelsize=9)
    figure.suptitle(
        f"{layer['strategy']}, exchange: {layer['exchange']}; {found['window']:,} tokens like {layer['corpus']}, "
        f"cp_size {found['cp_size']}",
        fontsize=10,
        color=INK,
    )
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save_figure(figure, path)
