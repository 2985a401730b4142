"""Step "calibrate": measures a hardware profile of this GPU, and its error on whole attention layers.

The profile is fitted to single kernel calls, copies and linear layers. It is tested on the layers of every rank of
several plans, which run one rank at a time with KV that is created beforehand. All raw measurements are saved. Links
between GPUs cannot be measured on one GPU, so they are taken from the packaged profile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...data.lengths import sample_pack
from ...errors import ConfigurationError
from ...plan import ShardPlan
from ...planning.devices import packaged_hardware
from ...predict import CostModel, HardwareProfile
from ...predict.hardware_profile import Kernel
from ...predict.model_shape import AttentionLayers
from ..calibration import fit
from .calibration_timing import DTYPE, Sizes, time_layers, time_parts
from .settings import OUT_OF_MEMORY, Found, Record, Run, Settings


_TOKENS = 16_384

GPU = Sizes(
    shape=(32, 8, 128),
    calls=(
        *((True, ((length, length),)) for length in (128, 256, 512, 1024, 2048, 4096, 8192, _TOKENS, 2 * _TOKENS)),
        *(
            (True, ((length, length),) * (_TOKENS // length))
            for length in (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
        ),
        *(
            (True, tuple((length, length) for length in sample_pack(corpus, _TOKENS)))
            for corpus in ("pile", "wlb_llm")
        ),
        *(
            (False, ((queries, keys),))
            for queries in (128, 512, 2048, 8192, _TOKENS)
            for keys in (128, 1024, 4096, _TOKENS, 4 * _TOKENS)
        ),
        (False, ((16, 128),) * 128),
        (False, ((16, 1024),) * 64),
        (False, ((64, 128),) * 128),
        (False, ((64, 1024),) * 64),
        (False, ((256, 1024),) * 32),
        (False, ((256, 4096),) * 16),
        (False, ((1024, 4096),) * 8),
        (False, ((1024, 16_384),) * 4),
    ),
    rows=(2048, 8192, 16_384),
    tokens=8192,
    widths=((4096, 4096), (4096, 14_336), (14_336, 4096)),
    cp_size=8,
    rounds=4,
)
GPU_PACKS = (
    fit.Pack("pile", "search", 131_072, 0),
    fit.Pack("pile", "per_doc", 131_072, 0),
    fit.Pack("wlb_llm", "search", 131_072, 1),
    fit.Pack("wlb_llm", "per_doc", 131_072, 1),
    fit.Pack("wlb_llm", "search", 131_072, 0),
    fit.Pack("wlb_llm", "per_doc", 131_072, 0),
)
"""Packs that test the profile. The last two take the longest, because one of their documents has 94,000 tokens."""

REHEARSED = Sizes(
    shape=(4, 2, 16),
    calls=(
        *((True, ((length, length),)) for length in (16, 64, 128, 256)),
        *((True, ((length, length),) * (256 // length)) for length in (16, 64)),
        *((False, ((queries, keys),)) for queries in (16, 64, 256) for keys in (64, 256)),
        (False, ((16, 64),) * 8),
    ),
    rows=(256,),
    tokens=64,
    widths=((64, 64),),
    cp_size=4,
    rounds=1,
)
REHEARSED_PACKS = (fit.Pack("pile", "search", 512, 0), fit.Pack("wlb_llm", "per_doc", 512, 0))

FEWEST_CALLS = 12
"""Smallest number of timed kernel calls for which a profile is fitted."""

KERNEL, SPEEDS = "Attention kernel, fitted to single calls", "Other speeds"
LAYERS = "Attention layer of the slowest rank, forward and backward"
ERRORS, CALLS = "Error of the predicted layers", "Kernel calls"


def calibrate(run: Run, settings: Settings) -> Found:
    """Measure a profile, and compare its predictions with measured layers."""
    found = Found()
    sizes, packs = settings.sized((GPU, GPU_PACKS), (REHEARSED, REHEARSED_PACKS))
    (parts,) = run(1, time_parts, sizes)
    plans = {f"{pack.corpus}, {pack.strategy}, seed {pack.seed}": pack.plan(sizes.cp_size) for pack in packs}
    (timed,) = run(1, time_layers, sizes, plans)
    found.cut += parts.pop("cut") + timed["cut"]
    seconds = timed["layers"]
    rows = [{**pack._asdict(), "cp_size": sizes.cp_size, "seconds": each} for pack, each in zip(packs, seconds)]
    found.more["measurements"] = {**parts, "layers": rows}
    heads, kv_heads, width = sizes.shape
    layers = AttentionLayers(1, heads, kv_heads, width, width)
    profile = _fit(found, parts, layers)
    model = None if profile is None else fit.model_of_layer(profile, layers, DTYPE.itemsize)
    ratios = _compare(found, model, packs, list(plans.values()), seconds)
    if profile is not None:
        error = fit.error_summary(ratios) if ratios else {}
        found.more["profile"] = {**profile, "error": {"layers": len(ratios), "seconds": error}}
        if error:
            found.add(ERRORS, {name.replace("_", " "): value for name, value in error.items()})
    return found


def _fit(found: Found, parts: dict[str, Any], layers: AttentionLayers) -> dict[str, Any] | None:
    """Return the profile without its errors, or `None` if there are too few measurements."""
    calls = []
    for call in parts["calls"]:
        if "forward" in call:
            calls.append(fit.Call(call["causal"], call["rectangles"], call["forward"], call["backward"]))
            continue
        queries, keys = np.sum(call["rectangles"], 0).tolist()
        shape = {"rectangles": len(call["rectangles"]), "queries": queries, "keys": keys}
        found.add(CALLS, {"causal": "yes" if call["causal"] else "no", **shape, "ms": OUT_OF_MEMORY})
    if len(calls) < FEWEST_CALLS or {call.causal for call in calls} != {False, True}:
        found.cut.append(f"fit of the profile: only {len(calls)} kernel calls were timed")
        return None
    try:
        kernel, ratios = fit.fit_device_kernel(calls, layers, units=parts["units"])
    except ConfigurationError as error:  # scipy is not installed
        found.problems.append(f"{error} The measurements are saved.")
        return None
    profile = _profile(kernel, parts, layers)
    for name, column in zip(("forward", "backward"), ratios.T):
        speed = getattr(kernel, name)
        record: Record = {
            "direction": name,
            "TFLOP/s": speed.flops_per_second / 1e12,
            "tile overhead, keys": speed.tile_overhead_keys,
            "under a causal mask, keys": speed.overhead_keys(causal=True),
            "error of calls, rms": fit.root_mean_square(column),
            "largest": float(abs(column - 1).max()),
        }
        found.add(KERNEL, record)
    speeds: Record = {
        "speed under a causal mask": kernel.causal_efficiency,
        "us per call": 1e6 * kernel.call_seconds,
        "linear TFLOP/s": profile["linear_flops_per_second"] / 1e12,
        "copies TB/s": profile["memory_bytes_per_second"] / 1e12,
    }
    found.add(SPEEDS, speeds)
    return profile


def _profile(kernel: Kernel, parts: dict[str, Any], layers: AttentionLayers) -> dict[str, Any]:
    """Return a profile in the form of the packaged ones, see [`HardwareProfile.from_dict`]."""
    packaged = packaged_hardware(parts["device"])
    base = HardwareProfile.load(packaged or "h100")
    assumed = (
        f"assumed: as in {packaged}.json"
        if packaged
        else "assumed: as on an H100, because there is no profile of this GPU"
    )
    products = [(2 * one["tokens"] * one["inputs"] * one["outputs"], one["seconds"]) for one in parts["products"]]
    copies = [(one["rows"], one["merge"], one["pack"]) for one in parts["copies"]]
    heads, kv_heads, width = parts["shape"]
    profile = {
        "description": (
            f"{parts['device']}, kernel {parts['kernel']}, {parts['dtype']}, {heads}/{kv_heads} heads of {width}; "
            "measured by flashcp bench gpu"
        ),
        "sources": {
            "kernel, linear_flops_per_second, memory_bytes_per_second": "measured",
            "kernel.tile": "assumed",
            "kernel.units, memory_bytes": "reported by PyTorch",
            **dict.fromkeys(("links", "ranks_per_node"), assumed),
        },
        **fit.measured_speeds(kernel, products, copies, layers, DTYPE.itemsize),
        "links": {name: vars(getattr(base, name)) for name in ("intra_node", "inter_node")},
        "ranks_per_node": base.ranks_per_node,
    }
    if packaged:
        profile["peak_flops_per_second"] = base.peak_flops_per_second
        profile["sources"]["peak_flops_per_second"] = assumed
    if parts["memory_bytes"]:
        profile["memory_bytes"] = parts["memory_bytes"]
    return profile


def _compare(
    found: Found,
    model: CostModel | None,
    packs: Sequence[fit.Pack],
    plans: Sequence[ShardPlan],
    timed: Sequence[list[float] | str],
) -> list[float]:
    """Add a record of each layer. Return predicted / measured for those that have both."""
    ratios = []
    for pack, plan, seconds in zip(packs, plans, timed):
        record: Record = {
            "corpus": pack.corpus,
            "strategy": pack.strategy,
            "documents": len(plan.lengths),
            "longest": max(plan.lengths),
            "measured ms": seconds if isinstance(seconds, str) else 1000 * max(seconds),
        }
        if model is not None:
            time = model.step_time(plan)
            predicted = float((time.attention + time.copies).max())
            record["predicted ms"] = 1000 * predicted
            if not isinstance(seconds, str):
                ratios.append(predicted / max(seconds))
                record["predicted / measured"] = ratios[-1]
        found.add(LAYERS, record)
    return ratios
