"""From timed kernel calls to the kernel's entry of a hardware profile.

For a given tile and causal efficiency, `planning.layer_work.call_seconds` is linear in what is left: seconds a
floating-point operation, overheads of a tile, seconds a call. So non-negative least squares solves for them, on
relative errors, for every tile and efficiency of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import ConfigurationError
from ..planning.hardware_profile import Kernel, Pass
from ..planning.layer_work import call_seconds
from ..planning.model_shape import AttentionLayers


TILES = (16, 32, 64, 128, 256)
EFFICIENCIES = np.linspace(0.5, 1.2, 36)

LEAST_SECONDS = 1e-18
"""A floating-point operation that is fitted as free costs this much."""


class Call(NamedTuple):
    """A kernel call that was timed.

    Attributes:
        causal (`bool`): its rectangles are squares under a causal mask; else all queries see all keys.
        rectangles (`tuple[tuple[int, int], ...]`): queries and keys of each.
        forward (`float`): seconds.
        backward (`float`): seconds.
    """

    causal: bool
    rectangles: tuple[tuple[int, int], ...]
    forward: float
    backward: float


def fit_kernel(calls: Sequence[Call], layers: AttentionLayers) -> tuple[Kernel, np.ndarray]:
    """The kernel that predicts the calls best, and what it predicts over what was measured, (calls, 2): forward and
    backward. For devices that work on one tile at a time, as a core does.

    Raises:
        ConfigurationError: scipy is not installed.
    """
    try:
        from scipy.optimize import nnls
    except ImportError:
        raise ConfigurationError("Fitting needs scipy: pip install scipy.") from None
    measured = np.array([[call.forward, call.backward] for call in calls])
    best: tuple[float, Kernel, np.ndarray] | None = None
    for tile in TILES:
        for efficiency in EFFICIENCIES:
            matrix = _matrix(calls, layers, tile, float(efficiency)) / measured[..., None]
            found, _ = nnls(matrix.reshape(len(calls) * 2, -1), np.ones(len(calls) * 2))
            ratios = matrix @ found
            error = float(np.square(ratios - 1).mean())
            if best is None or error < best[0]:
                best = error, _kernel(tile, float(efficiency), found), ratios
    assert best is not None
    return best[1:]


def _matrix(calls: Sequence[Call], layers: AttentionLayers, tile: int, efficiency: float) -> np.ndarray:
    """(calls, 2, 7): what multiplies, in the seconds of each call's forward and backward, the unknowns: of either
    pass seconds an operation and those times the tile's overhead in keys, without a mask and with; seconds a call."""
    matrix = np.zeros((len(calls), 2, 7))
    for row, call in zip(matrix, calls):
        rectangles = np.array([(0, queries, 0 if call.causal else keys) for queries, keys in call.rectangles])
        for backward, column in ((False, 0), (True, 3)):
            keys_only, with_overhead = (
                float(
                    call_seconds(
                        Kernel(tile, 1, 0.0, efficiency, Pass(1.0, overhead), Pass(1.0, overhead)),
                        rectangles,
                        cp_size=1,
                        layers=layers,
                        window=None,
                        causal=call.causal,
                        backward=backward,
                    )[0]
                )
                for overhead in (0.0, 1.0)
            )
            row[int(backward), column] = keys_only
            row[int(backward), column + 1 + call.causal] = with_overhead - keys_only
        row[:, 6] = 1
    return matrix


def _kernel(tile: int, efficiency: float, found: np.ndarray) -> Kernel:
    passes = []
    for seconds, overhead, causal_overhead in (found[:3], found[3:6]):
        seconds = max(float(seconds), LEAST_SECONDS)
        passes.append(Pass(1 / seconds, float(overhead) / seconds, float(causal_overhead) / seconds))
    return Kernel(tile, 1, float(found[6]), efficiency, *passes)


def fit_line(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """`(seconds at size 0, sizes a second)`, by least squares on relative errors; neither is negative."""
    from scipy.optimize import nnls

    matrix = np.stack([np.ones(len(sizes)), np.array(sizes)], 1) / np.array(seconds)[:, None]
    (start, slope), _ = nnls(matrix, np.ones(len(sizes)))
    return float(start), 1 / max(float(slope), LEAST_SECONDS)


def root_mean_square(ratios: np.ndarray) -> float:
    """Of relative errors."""
    return math.sqrt(float(np.square(ratios - 1).mean()))
