"""Fits hardware profiles to timed kernel calls and copies, and measures the error of their predictions.

A core works on one tile at a time. For a given tile and causal efficiency, `predict.layer_work.call_seconds` is then
linear in the remaining unknowns: seconds per floating-point operation, overheads per tile, and seconds per call.
Non-negative least squares on relative errors finds these for every tile and efficiency of a grid.

A GPU works on many tiles at the same time, and a call takes at least as long as its longest tile. There the tile is
given, and nonlinear least squares on logarithms of ratios finds the other unknowns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from ...data.lengths import sample_pack
from ...extras import require_extra
from ...plan import ShardPlan
from ...planning import plan_documents
from ...predict import CostModel, HardwareProfile
from ...predict.hardware_profile import Kernel, Pass
from ...predict.layer_work import Rectangles, call_seconds
from ...predict.model_shape import AttentionLayers


TILES = (16, 32, 64, 128, 256)
EFFICIENCIES = np.linspace(0.5, 1.2, 36)

STARTS = tuple((efficiency, overhead) for efficiency in (0.6, 1.0) for overhead in (30.0, 300.0))
"""Starting points of the nonlinear fit: causal efficiency, and overhead per tile in keys."""

LEAST_SECONDS = 1e-18
"""Lower bound on the fitted seconds per floating-point operation, so that none is free."""


class Call(NamedTuple):
    """A timed kernel call: the (queries, keys) of its rectangles, and the seconds of forward and backward.

    Rectangles of causal calls are squares. In the others, every query attends to every key.
    """

    causal: bool
    rectangles: tuple[tuple[int, int], ...]
    forward: float
    backward: float


def _scipy() -> Any:
    require_extra("Fits", "bench", "scipy.optimize")
    from scipy import optimize

    return optimize


def _measured(calls: Sequence[Call]) -> np.ndarray:
    """Return the measured seconds of forward and backward, (calls, 2)."""
    return np.array([[call.forward, call.backward] for call in calls])


def fit_kernel(calls: Sequence[Call], layers: AttentionLayers) -> tuple[Kernel, np.ndarray]:
    """Fit a kernel for a device that works on one tile at a time, as a CPU core does.

    Returns the kernel that predicts the calls best, and predicted / measured seconds, (calls, 2) for forward and
    backward.
    """
    measured, nnls = _measured(calls), _scipy().nnls

    def fitted(tile: int, efficiency: float) -> tuple[Kernel, np.ndarray]:
        matrix = _matrix(calls, layers, tile, efficiency) / measured[..., None]
        found, _ = nnls(matrix.reshape(len(calls) * 2, -1), np.ones(len(calls) * 2))
        return _kernel(tile, efficiency, found), matrix @ found

    found = (fitted(tile, float(efficiency)) for tile in TILES for efficiency in EFFICIENCIES)
    return min(found, key=lambda each: root_mean_square(each[1]))


def _matrix(calls: Sequence[Call], layers: AttentionLayers, tile: int, efficiency: float) -> np.ndarray:
    """Return the coefficients of the unknowns in the seconds of each call's forward and backward, (calls, 2, 7).

    The unknowns are, for each pass, the seconds per operation, and these times the tile's overhead in keys without and
    with a causal mask; the last one is the seconds per call.
    """
    tables, causal = _tables(calls), np.array([call.causal for call in calls], dtype=int)
    keys_only, with_overhead = (
        _predicted(Kernel(tile, 1, 0.0, efficiency, *[Pass(1.0, overhead)] * 2), tables, layers)
        for overhead in (0.0, 1.0)
    )
    matrix = np.zeros((len(calls), 2, 7))
    for backward, column in enumerate((0, 3)):
        matrix[:, backward, column] = keys_only[:, backward]
        matrix[range(len(calls)), backward, column + 1 + causal] = (with_overhead - keys_only)[:, backward]
    matrix[:, :, 6] = 1
    return matrix


def _kernel(tile: int, efficiency: float, found: np.ndarray) -> Kernel:
    passes = []
    for seconds, overhead, causal_overhead in (found[:3], found[3:6]):
        seconds = max(float(seconds), LEAST_SECONDS)
        passes.append(Pass(1 / seconds, float(overhead) / seconds, float(causal_overhead) / seconds))
    return Kernel(tile, 1, float(found[6]), efficiency, *passes)


def fit_device_kernel(
    calls: Sequence[Call], layers: AttentionLayers, *, units: int, tile: int = 128
) -> tuple[Kernel, np.ndarray]:
    """Fit a kernel for a device that works on `units` tiles of `tile` queries at the same time.

    Returns the same as [`fit_kernel`]. The soft L1 loss gives calls that the model cannot explain less weight than
    plain least squares would.
    """
    measured, least_squares = _measured(calls), _scipy().least_squares
    tables = _tables(calls)

    def kernel(unknowns: np.ndarray) -> Kernel:
        forward, backward, efficiency, seconds = np.exp(unknowns[:4]).tolist()
        overheads = (unknowns[4:] * tile).tolist()
        passes = Pass(forward, *overheads[:2]), Pass(backward, *overheads[2:])
        return Kernel(tile, units, seconds, efficiency, *passes)

    def errors(unknowns: np.ndarray) -> np.ndarray:
        return np.log(_predicted(kernel(unknowns), tables, layers) / measured).ravel()

    unit = Kernel(tile, 1, 0.0, 1.0, Pass(1.0, 0.0), Pass(1.0, 0.0))
    speeds = np.log((_predicted(unit, tables, layers) / measured).max(0))
    shortest = float(np.log(measured.min()))
    low = np.array([*(speeds - 3), np.log(0.1), shortest - 10, *[0.0] * 4])
    high = np.array([*(speeds + 3), np.log(3.0), shortest, *[1e4] * 4])
    found = [
        least_squares(
            errors,
            [*speeds, np.log(efficiency), shortest - 0.5, *[overhead / tile] * 4],
            bounds=(low, high),
            loss="soft_l1",
            f_scale=0.1,
        )
        for efficiency, overhead in STARTS
    ]
    best = kernel(min(found, key=lambda one: one.cost).x)
    return best, _predicted(best, tables, layers) / measured


def _tables(calls: Sequence[Call]) -> list[tuple[bool, Rectangles]]:
    """Return the causal and the other rectangles as inputs of [`call_seconds`], with one rank per call."""
    rows: dict[bool, list[tuple[int, int, int]]] = {False: [], True: []}
    for number, call in enumerate(calls):
        for queries, keys in call.rectangles:
            rows[call.causal].append((number, queries, keys - queries if call.causal else keys))
    return [(causal, Rectangles.of(table)) for causal, table in rows.items()]


def _predicted(kernel: Kernel, tables: Sequence[tuple[bool, Rectangles]], layers: AttentionLayers) -> np.ndarray:
    """Return the predicted seconds of forward and backward, (calls, 2)."""
    count = 1 + max(int(table.ranks.max()) for _, table in tables if len(table.ranks))
    options = {"cp_size": count, "layers": layers, "window": None}
    return np.stack(
        [
            sum(call_seconds(kernel, table, causal=causal, backward=backward, **options) for causal, table in tables)
            for backward in (False, True)
        ],
        1,
    )


def measured_speeds(
    kernel: Kernel,
    products: Sequence[tuple[float, float]],
    copies: Sequence[tuple[float, float, float]],
    layers: AttentionLayers,
    itemsize: int,
) -> dict[str, Any]:
    """Return the entries of a hardware profile that are measured on one device.

    Args:
        kernel: the fitted attention kernel.
        products: floating-point operations and seconds of each matrix product.
        copies: for each size, the number of rows, and the seconds to merge and to pack them. Bytes are counted as in
            `CostModel`.
        layers: the attention layers to which the rows belong.
        itemsize: bytes per element of keys and values.
    """
    merged = layers.query_heads * layers.value_dim * (2 * max(itemsize, 4) + itemsize)
    packed = layers.kv_elements_per_token * 2 * itemsize
    rows, *seconds = map(sum, zip(*copies))
    passes = {name: vars(getattr(kernel, name)) for name in ("forward", "backward")}
    sizes = {name: getattr(kernel, name) for name in ("tile", "units", "call_seconds", "causal_efficiency")}
    return {
        "linear_flops_per_second": median(flops / taken for flops, taken in products),
        "memory_bytes_per_second": rows * (merged + packed) / sum(seconds),
        "kernel": sizes | passes,
    }


class Pack(NamedTuple):
    """A random pack and the strategy that plans it, see [`sample_pack`] and [`plan_documents`]."""

    corpus: str
    strategy: str
    window: int
    seed: int

    def plan(self, cp_size: int, num_stages: int | None = None) -> ShardPlan:
        lengths = sample_pack(self.corpus, self.window, seed=self.seed)
        return plan_documents(lengths, cp_size, strategy=self.strategy, num_stages=num_stages)


def model_of_layer(profile: dict[str, Any], layers: AttentionLayers, itemsize: int) -> CostModel:
    """Return the cost model of a model that consists of this attention layer only."""
    return CostModel(HardwareProfile.from_dict(profile), 0.0, (layers,), itemsize, itemsize)


def error_summary(ratios: Sequence[float]) -> dict[str, float]:
    """Return the `median` and `largest` of |ratio - 1|, and the share that is `within_10_percent`."""
    errors = [abs(ratio - 1) for ratio in ratios]
    within = sum(error <= 0.1 for error in errors) / len(errors)
    return {"median": median(errors), "largest": max(errors), "within_10_percent": within}


def fit_line(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Fit a line to seconds over sizes, and return `(seconds at size 0, size per second)`.

    The fit uses least squares on relative errors; neither result is negative.
    """
    matrix = np.stack([np.ones(len(sizes)), np.array(sizes)], 1) / np.array(seconds)[:, None]
    (start, slope), _ = _scipy().nnls(matrix, np.ones(len(sizes)))
    return float(start), 1 / max(float(slope), LEAST_SECONDS)


def root_mean_square(ratios: np.ndarray) -> float:
    """Return the root mean square of the relative errors."""
    return math.sqrt(float(np.square(ratios - 1).mean()))
