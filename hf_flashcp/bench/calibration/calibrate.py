"""Measures a hardware profile of this machine's CPU cores, and the error of its predictions for attention layers.

The profile is fitted to single kernel calls, copies, transfers and matrix products. Transfers are timed in wall-clock
seconds, everything else in CPU seconds. The profile is then tested on whole attention layers under plans of random
packs that the fit has not seen, with the kernels, copies and transfers of every rank overlapped as in training.
Layers are timed both ways, because other programs and waiting add to wall-clock seconds but not to CPU seconds.
"""

from __future__ import annotations

import itertools
import platform
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

from ...distributed.workers import WorkerPool
from ...plan import ShardPlan
from ...predict import CostModel
from ...predict.model_shape import AttentionLayers
from ...tables import table
from ..arguments import with_arguments
from ..attention import DTYPES
from . import fit, worker


LENGTHS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Side lengths of the timed causal squares. Each is timed alone, and in a call with 2,048 tokens of such squares."""

QUERIES, KEYS = (64, 128, 256, 512, 1024, 2048), (64, 256, 1024, 4096)
"""Numbers of queries and keys of the timed rectangles without a mask; all combinations are timed."""

ROWS = (128, 512, 2048)
BYTES = tuple(2**power for power in range(12, 24))
WIDTHS, TOKENS = (256, 512, 1024), 1024

_WHOLE = 2048

CLOCKS = ("seconds", "cpu_seconds")


@with_arguments("window", "cp_size", "heads", "kv_heads", "head_dim", "dtype", "rounds")
def measure(
    corpora: Sequence[str],
    window: int,
    cp_size: int,
    packs: int,
    *,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 64,
    dtype: str = "fp32",
    strategies: Sequence[str] = ("search", "per_doc"),
    num_stages: int | None = None,
    rounds: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Time the parts, fit a `profile` to them, and time layers to test it.

    `fit` has the root mean square errors of the fitted kernel calls. Each entry of `layers` has, for both clocks, the
    measured and predicted seconds of the slowest rank; waiting is not part of the CPU seconds. `error` summarizes the
    errors.
    """
    shape, layers = (heads, kv_heads, head_dim), AttentionLayers(1, heads, kv_heads, head_dim, head_dim)
    itemsize = DTYPES[dtype].itemsize
    ways = itertools.cycle(itertools.product(strategies, corpora))
    drawn = [fit.Pack(corpus, strategy, window, seed + i) for i, (strategy, corpus) in zip(range(packs), ways)]
    plans = [pack.plan(cp_size, num_stages) for pack in drawn]
    with WorkerPool() as pool, tqdm(total=6, unit="part", leave=False, disable=None) as bar:

        def timed(what: str, function, *arguments, over_ranks=np.mean) -> list[list[float]]:
            bar.set_description(what)
            found = pool.run(cp_size, function, *arguments, timeout=3600)
            bar.update()
            return over_ranks(found, axis=0).tolist()

        work = _calls()
        calls = timed("kernel calls", worker.time_calls, work, shape, dtype, rounds)
        copies = timed("copies", worker.time_copies, ROWS, shape, dtype, 4 * rounds)
        transfers = timed("transfers", worker.time_transfers, BYTES, 4 * rounds)
        products = timed("matrix products", worker.time_products, TOKENS, WIDTHS, dtype, 4 * rounds)
        bar.set_description("fit")
        kernel, ratios = fit.fit_kernel([fit.Call(*call, *seconds) for call, seconds in zip(work, calls)], layers)
        bar.update()
        latency, rate = fit.fit_line(BYTES, [seconds for (seconds,) in transfers])
        link = {"bytes_per_second": rate, "latency_seconds": latency}
        flops = [(2 * TOKENS * width * width, seconds) for width, (seconds,) in zip(WIDTHS, products)]
        moved = [(rows, *seconds) for rows, seconds in zip(ROWS, copies)]
        profile = {
            "sources": {"all": "measured; links between nodes are taken to be as fast as those inside one"},
            **fit.measured_speeds(kernel, flops, moved, layers, itemsize),
            "links": {"intra_node": link, "inter_node": link},
            "ranks_per_node": cp_size,
            "description": f"cores of {platform.processor() or platform.machine()}, {cp_size} processes of one "
            f"thread, {dtype}, {heads}/{kv_heads} heads of {head_dim}; measured by flashcp bench calibrate",
        }
        slowest = timed("layers", worker.time_layers, plans, shape, dtype, rounds, over_ranks=np.max)
    model = fit.model_of_layer(profile, layers, itemsize)
    rows = [_beside(*measured, model) for measured in zip(drawn, plans, slowest)]
    error = {name: fit.error_summary([_ratio(row, name) for row in rows]) for name in CLOCKS}
    errors = {name: fit.root_mean_square(column) for name, column in zip(("forward", "backward"), ratios.T)}
    profile["error"] = {"layers": len(rows), **error}
    return {"profile": profile, "fit": {"calls": len(work), **errors}, "layers": rows, "error": error}


def _beside(pack: fit.Pack, plan: ShardPlan, measured: list[float], model: CostModel) -> dict[str, Any]:
    """Return the measured and predicted seconds of a layer's slowest rank, for each of the `CLOCKS`."""
    time = model.step_time(plan)
    predicted = time.attention_seconds, float((time.attention + time.copies).max())
    return {
        **{"corpus": pack.corpus, "strategy": pack.strategy, "seed": pack.seed},
        **{"documents": len(plan.lengths), "longest": max(plan.lengths)},
        **{clock: {"measured": m, "predicted": p} for clock, m, p in zip(CLOCKS, measured, predicted)},
    }


def _ratio(row: dict[str, Any], clock: str) -> float:
    return row[clock]["predicted"] / row[clock]["measured"]


def _calls() -> list[worker.Work]:
    squares = {(length,) * times for length in LENGTHS for times in (1, max(_WHOLE // length, 1))}
    causal = [(True, tuple((length, length) for length in lengths)) for lengths in sorted(squares)]
    return causal + [(False, ((queries, keys),)) for queries in QUERIES for keys in KEYS]


def text(found: dict[str, Any]) -> str:
    """Return a table of the fitted kernel, and one of the layers that test it."""
    profile, kernel = found["profile"], found["profile"]["kernel"]
    link = profile["links"]["intra_node"]
    lines = [
        profile["description"],
        "",
        _kernel_table(kernel, found["fit"]),
        f"tiles of {kernel['tile']} queries, speed under a causal mask {kernel['causal_efficiency']:.2f}, a call "
        f"{1e6 * kernel['call_seconds']:.0f} us; {found['fit']['calls']} calls fitted",
        f"linear {profile['linear_flops_per_second'] / 1e9:.1f} GFLOP/s, copies "
        f"{profile['memory_bytes_per_second'] / 1e9:.1f} GB/s, link {link['bytes_per_second'] / 1e9:.2f} GB/s after "
        f"{1e6 * link['latency_seconds']:.0f} us",
        "",
        f"one attention layer, forward and backward, of {len(found['layers'])} packs of {found['window']:,} tokens on "
        f"{found['cp_size']} ranks; medians of {found['rounds']} rounds, predicted / measured",
        "",
        _layers_table(found["layers"]),
        "",
    ]
    for name, what in zip(CLOCKS, ("seconds", "CPU seconds")):
        error = found["error"][name]
        lines.append(
            f"error of predicted {what + ':':12} median {error['median']:.1%}, largest {error['largest']:.1%}, "
            f"{error['within_10_percent']:.0%} of the packs within 10%"
        )
    return "\n".join(lines)


def _kernel_table(kernel: dict[str, Any], fit: dict[str, Any]) -> str:
    columns = {"": "", "GFLOP/s": ".1f", "tile overhead, keys": ".0f", "causal": ".0f", "error of calls (rms)": ".1%"}
    rows = []
    for name in ("forward", "backward"):
        speed = kernel[name]
        overheads = (speed["tile_overhead_keys"], speed["causal_tile_overhead_keys"])
        rows.append((name, speed["flops_per_second"] / 1e9, *overheads, fit[name]))
    return table(columns, rows)


def _layers_table(layers: list[dict[str, Any]]) -> str:
    columns = {"corpus": "", "strategy": "", "packs": ",", "ms": ".1f"}
    for what in ("seconds", "CPU seconds"):
        columns |= dict.fromkeys((f"{what}\nmedian", f"{what}\nleast", f"{what}\nmost"), ".3f")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in layers:
        groups.setdefault((row["corpus"], row["strategy"]), []).append(row)
    rows = []
    for names, group in groups.items():
        ratios = [[_ratio(row, clock) for row in group] for clock in CLOCKS]
        figures = (figure for one in ratios for figure in (median(one), min(one), max(one)))
        rows.append((*names, len(group), 1000 * median(row["seconds"]["measured"] for row in group), *figures))
    return table(columns, rows)
