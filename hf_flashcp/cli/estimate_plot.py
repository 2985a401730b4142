"""A picture of an estimate: the memory of every cp_size, stacked by part, beside what a GPU has."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..predict.memory import PARTS
from ..predict.training_setup import TrainingSetup
from ..simulation.sizing import Choice
from ..tables import GIB
from .plots import COLOURS, INK, new_figure, remove_frame, save_figure


def plot_memory(
    found: Sequence[Choice], usable: float, path: str | os.PathLike, *, window: int, setup: TrainingSetup
) -> None:
    """Draws one bar for each cp_size; `usable` bytes are what a GPU has for training."""
    figure = new_figure(max(7, 1.1 * len(found) + 4), 4.8)
    axes = figure.subplots()
    places = range(len(found))
    # A few sizes without context parallelism would flatten all others: bars end at a few times what a GPU has.
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
                f"{height:,.1f}", (place, height), (0, 3), textcoords="offset points", ha="center", color=INK
            )
        else:
            axes.annotate(
                f"{height:,.0f} ↑", (place, 1.16 * top), (0, -3), textcoords="offset points", ha="center", va="top"
            )
    axes.axhline(usable / GIB, color=INK, linewidth=1.2, linestyle="--", label=f"usable: {usable / GIB:,.1f} GiB")
    axes.set_ylim(0, 1.18 * max(top, usable / GIB))
    axes.set_xticks(places, [f"{choice.cp_size}\n{choice.memory.peak}" for choice in found], fontsize=8)
    axes.set_xlabel("cp_size, and the moment of the step at which memory is highest", color=INK)
    axes.set_ylabel("GiB per GPU", color=INK)
    axes.set_title(
        f"{window:,} tokens on {setup.gpus} GPUs: {setup.sharding}, "
        f"gradient checkpointing {setup.gradient_checkpointing}",
        fontsize=11,
        color=INK,
    )
    remove_frame(axes)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    save_figure(figure, path)
