"""Step "layer": one attention layer split over processes that share the device, against its documents alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ...attention.kernels import CAPABILITIES
from ...doctor.layer_errors import LayerCase, layer_errors
from .settings import Found, Record, Run, Settings, fused_kernels


SIZES = (2, 4)
EXACT = 1e-12
"""Largest relative error in float64, through the formulas."""

TIMES = 2.0
"""Largest error in bf16, over that of one process in bf16."""


def cases(rehearses: bool) -> dict[str, LayerCase]:
    """Layers by name; a rehearsal has three small ones."""
    base, window = LayerCase(), 100
    if rehearses:
        base, window = LayerCase(lengths=(70, 26, 9, 1), heads=4, kv_heads=2, head_dim=16), 12
    found = {
        "per_doc": base,
        "search": base._replace(strategy="search"),
        "stages, KV fetched again": base._replace(num_stages=3, keep_received_kv=False),
        "window": base._replace(window=window),
        "window, KV fetched again": base._replace(window=window, keep_received_kv=False),
        "nodes of two ranks": base._replace(ranks_per_node=2),
        "debug mode": base._replace(debug=True),
        "heads that are not aligned": base._replace(heads=3, kv_heads=3, head_dim=20),
    }
    if rehearses:
        return {name: found[name] for name in ("per_doc", "window, KV fetched again", "nodes of two ranks")}
    return found


def layer(run: Run, settings: Settings) -> Found:
    found = Found()
    for size in SIZES:
        if not found.has_time(settings, 5, f"{size} ranks"):
            break
        by_rank = run(size, _errors)
        for record in _slowest(by_rank):
            found.add("Largest relative error of out, dQ, dK and dV", {"ranks": size, **record})
            found.require(record["error"] <= record["bound"], _problem(size, record))
    return found


def _problem(size: int, record: Record) -> str:
    return (
        f"{record['case']} in {record['dtype']} with {record['kernel']} on {size} ranks is off by "
        f"{record['error']:.1e}, more than {record['bound']:.1e}"
    )


def _slowest(by_rank: list[list[Record]]) -> list[Record]:
    """The record with the largest error over the ranks, for each case."""
    return [max(rows, key=lambda row: row["error"]) for rows in zip(*by_rank)]


def _errors(settings: Settings) -> list[Record]:
    """In a worker: every case in float64 through the formulas, and in bf16 through every fused kernel."""
    device = settings.prepare()
    found = []
    for name, case in cases(settings.rehearses).items():
        if case.ranks_per_node and dist.get_world_size() <= case.ranks_per_node:
            continue
        fused = fused_kernels(device, torch.bfloat16, case.head_dim, case.head_dim)
        for dtype, kernel in [(torch.float64, "eager"), *((torch.bfloat16, kernel) for kernel in fused)]:
            with _debug_mode(case.debug):
                made: Any = CAPABILITIES[kernel].make(False)
                ours, alone = layer_errors(case, dist.group.WORLD, device, dtype, made)
            exact = dtype == torch.float64
            # The result that comes nearest to its bound stands for the case.
            bounds = [EXACT if exact else TIMES * error for error in alone]
            error, bound = max(zip(ours, bounds), key=lambda pair: pair[0] / pair[1])
            label = str(dtype).removeprefix("torch.")
            found.append({"case": name, "kernel": kernel, "dtype": label, "error": error, "bound": bound})
    return found


@contextmanager
def _debug_mode(on: bool) -> Iterator[None]:
    """Sets `FLASHCP_DEBUG=1` inside, if `on`."""
    if on:
        os.environ["FLASHCP_DEBUG"] = "1"
    try:
        yield
    finally:
        if on:
            del os.environ["FLASHCP_DEBUG"]
