"""What pictures of the command line share: colours, and a figure that needs no display."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..errors import FlashCPError


if TYPE_CHECKING:
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
    """Raises a `FlashCPError` where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise FlashCPError("Plots need matplotlib: pip install 'hf_flashcp[plot]'.") from None


def new_figure(width: float, height: float) -> Figure:
    """A figure in inches.

    Raises:
        FlashCPError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Writes it in the format of the path's ending.

    Raises:
        FlashCPError: the file cannot be written.
    """
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise FlashCPError(f"Cannot write the plot to {os.fspath(path)!r}: {error.strerror}.") from None
    except ValueError as error:
        raise FlashCPError(f"Cannot write the plot to {os.fspath(path)!r}: {error}.") from None
