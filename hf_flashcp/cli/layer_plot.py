"""A picture of a trace: what two ranks do during the forward and backward of one layer."""

from __future__ import annotations

import os
from typing import Any

from .plots import COLOURS, INK, new_figure, save_figure


_KINDS = {
    "other operators": ("layer",),
    "linear layers": ("linear",),
    "local pass": ("local pass",),
    "stages": ("stage",),
    "pack, merge, add what came home": ("pack", "merge", "add"),
    "waiting for other ranks": ("wait",),
}
"""Beginnings of the names of ranges by kind; drawn in this order, the layer below the rest."""
_COLOURS = dict(zip(_KINDS, ("#e4e1dc", COLOURS[0], COLOURS[2], COLOURS[4], COLOURS[5], COLOURS[3])))


def plot_layer(found: dict[str, Any], path: str | os.PathLike) -> None:
    """Draws forward above backward, a row for each of the first two ranks, of what `flashcp bench step --json` prints,
    measured on CPU."""
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
                axes.broken_barh(bars, (place - 0.36, 0.72), facecolors=_COLOURS[kind], label=label)
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
