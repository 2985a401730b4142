"""Step "layer": compares one attention layer, split over processes that share the device, with each document alone."""

from __future__ import annotations

import os
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from ...attention.kernels import Layer, make_kernel
from ...doctor.layer_errors import LayerCase, layer_errors
from ..kernels import fused_kernels
from .settings import Found, Record, Run, Settings


SIZES = (2, 4)
EXACT = 1e-12
"""Largest allowed relative error in float64, computed with the formulas."""

TIMES = 2.0
"""Largest allowed ratio of the error in bf16 to the error of one process in bf16."""


def cases(rehearses: bool) -> dict[str, LayerCase]:
    """Return the layers by name; on a CPU, only three small ones."""
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
    """Check the output and gradients of every case on 2 and 4 ranks."""
    found = Found()
    for size in SIZES:
        if not found.has_time(settings, 5, f"{size} ranks"):
            break
        for by_rank in zip(*run(size, _errors)):
            record = {"ranks": size, **max(by_rank, key=lambda row: row["error"])}
            what = f"{record['case']} in {record['dtype']} with {record['kernel']} on {size} ranks"
            found.add_error("Largest relative error of out, dQ, dK and dV", record, what)
    return found


def _errors(settings: Settings) -> list[Record]:
    """Check every case in a worker: in float64 with the formulas, and in bf16 with every fused kernel."""
    device = settings.prepare()
    found = []
    for name, case in cases(settings.rehearses).items():
        if case.ranks_per_node and dist.get_world_size() <= case.ranks_per_node:
            continue
        fused = fused_kernels(
            device, Layer(torch.bfloat16, case.head_dim, case.head_dim, window=case.window is not None)
        )
        for dtype, kernel in [(torch.float64, "eager"), *((torch.bfloat16, kernel) for kernel in fused)]:
            with patch.dict(os.environ, {"FLASHCP_DEBUG": "1"} if case.debug else {}):
                made: Any = make_kernel(kernel, device)
                ours, alone = layer_errors(case, dist.group.WORLD, device, dtype, made)
            exact = dtype == torch.float64
            # Of the four results, report the one that is closest to its bound.
            bounds = [EXACT if exact else TIMES * error for error in alone]
            error, bound = max(zip(ours, bounds), key=lambda pair: pair[0] / pair[1])
            label = str(dtype).removeprefix("torch.")
            found.append({"case": name, "kernel": kernel, "dtype": label, "error": error, "bound": bound})
    return found
