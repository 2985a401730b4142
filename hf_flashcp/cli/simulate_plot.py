"""A picture of a simulation: one bar per scheme, the parts of its step stacked."""

from __future__ import annotations

import os
from typing import Any

from ..simulation.simulate import title_of
from .plots import COLOURS, INK, new_figure, remove_frame, save_figure


_PARTS = {
    "linear": "linear layers",
    "attention": "attention kernels",
    "copies": "copies",
    "exposed": "waiting for transfers and ranks",
    "repeated": "repeated under gradient checkpointing",
}


def plot_simulation(found: dict[str, Any], path: str | os.PathLike) -> None:
    """Draws one panel for each hardware profile and cp_size of what `flashcp simulate --json` prints."""
    cells = found["cells"]
    figure = new_figure(10, 0.3 + 4.3 * len(cells))
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
                fontsize=8,
                color=INK,
            )
        axes.set_xlim(0, 1.18 * max(bottoms))
        axes.set_yticks(range(len(schemes)), map(title_of, schemes), fontsize=8)
        axes.invert_yaxis()
        axes.set_title(
            f"{found['window']:,} tokens, {cell['hardware']}, cp_size {cell['cp_size']}, "
            f"{cell['ranks_per_node']} ranks per node",
            fontsize=10,
            color=INK,
        )
        remove_frame(axes, labelsize=8)
        axes.set_xlabel(
            f"ms of the slowest rank, and how many times {title_of(cell['reference'])}", color=INK, fontsize=9
        )
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save_figure(figure, path)
