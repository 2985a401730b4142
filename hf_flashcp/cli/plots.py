"""Colours of all pictures of the command line, and figures that need no display."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from ..errors import FlashCPError
from ..extras import require_extra


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
    """Raises a `ConfigurationError` where matplotlib is not installed."""
    require_extra("Plots", "plot", "matplotlib")


def new_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def remove_frame(axes: Axes, labelsize: float | None = None) -> None:
    """Leaves of a plot's frame the axes on the left and below, without ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0, colors=INK, **({} if labelsize is None else {"labelsize": labelsize}))


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a figure in the format of the path's ending, and says so on stderr."""
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise FlashCPError(f"Cannot write the plot to {os.fspath(path)!r}: {reason}.") from None
    print(f"plot written to {path}", file=sys.stderr)
