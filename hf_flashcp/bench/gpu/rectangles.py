"""Steps "plans" and "rectangles": times kernels and copies under a plan, and kernels alone.

Neither sends anything: the rectangles of every rank run in turn on one device, with KV that is created beforehand. The
time of a layer is that of its slowest rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from ...attention.kernels import AttentionKernel, Layer, VarlenKernel, make_kernel
from ...data.lengths import sample_pack
from ...layout import Rectangle
from ...plan import ShardPlan
from ...plan.kernel_calls import BLOCKS_PER_CALL
from ...planning import plan_documents
from ..kernels import (
    BACKWARD,
    Shape,
    count_pairs,
    forward_flops,
    fused_kernels,
    slowest_speed,
    time_plan,
)
from ..turns import median_seconds
from . import divided_calls
from .settings import Found, Record, Settings, compile_seconds
from .timed_calls import DIRECTIONS, ROUNDS, TimedCalls, side_by_side


SHAPE = (32, 8, 128)
"""Query heads, KV heads and head dim of an 8B model."""

CP_SIZE = 8
STRATEGIES = ("search", "per_doc")

PACKED = (*([8192] * 2), *([4096] * 2), *([2048] * 2), *([1024] * 2), *([512] * 2), *([256] * 4))
PACKED_SHAPE = (64, 8, 128)
PACKED_SPEEDS = {
    **dict.fromkeys(("torch_flash", "flash_attn_2"), (344, 263)),
    "flash_attn_3": (584, 426),
}
"""TFLOP/s on an H100 for packs of 32K tokens with causal documents, read off the charts of the MagiAttention project
to within 5. Their documents have other lengths than `PACKED`."""

FULL_SPEEDS = {
    **dict.fromkeys(("torch_flash", "flash_attn_2"), (370, None)),
    "cudnn": (595, None),
    "flash_attn_3": ("650 to 750", None),
}
"""TFLOP/s of long full attention with heads of 128 on an H100, from the FlashAttention-3 paper (arXiv 2407.08608)."""

SPEEDS = "Speed of one call in bf16; published TFLOP/s are those of an H100"
COSTS = f"Cost of empty blocks and of further calls; {BLOCKS_PER_CALL:,} blocks per call are assumed"
STAGES = f"A stage of the Pile pack under cp {CP_SIZE}, in one call per round and divided by length"


def _packs(settings: Settings) -> dict[str, list[int]]:
    window = settings.sized(131072, 2048)
    packs = {corpus: sample_pack(corpus, window) for corpus in settings.sized(("pile", "wlb_llm"), ("pile",))}
    return packs if settings.rehearses else {**packs, "one document": [window // 2]}


def _shape(settings: Settings) -> Shape:
    return settings.sized(SHAPE, (4, 2, 32))


def plans(settings: Settings) -> Found:
    """Time the kernels and copies of every rank under several plans, and compare them with one call."""
    device, found, shape = settings.prepare(), Found(), _shape(settings)
    names = fused_kernels(device, Layer(torch.bfloat16, shape[2], shape[2]))
    for (pack, lengths), strategy in itertools.product(_packs(settings).items(), STRATEGIES):
        plan = plan_documents(lengths, CP_SIZE, strategy=strategy)
        # Three ways to run the layer, each twice, at 200 TFLOP/s.
        flops = 3 * 2 * (1 + BACKWARD) * forward_flops(shape, sum(n * n // 2 for n in lengths))
        for name in names:
            if found.has_time(settings, _seconds(settings, 1 + flops / 200e12, name), f"{pack}, {strategy}, {name}"):
                record = _time_plan(plan, make_kernel(name, device), shape, device)
                found.add(
                    f"One attention layer, forward and backward, cp {CP_SIZE}, {shape[0]}/{shape[1]} heads of "
                    f"{shape[2]}, bf16: the slowest rank",
                    {"pack": pack, "tokens": sum(lengths), "strategy": strategy, "kernel": name, **record},
                )
    return found


def _time_plan(plan: ShardPlan, kernel: AttentionKernel, shape: Shape, device: torch.device) -> Record:
    times = time_plan(plan, kernel, shape, torch.bfloat16, device, rounds=1)
    one, kernels, engine = (times[name] for name in ("one_call", "kernels", "engine"))
    return {
        "one call ms": 1000 * max(one),
        "kernels ms": 1000 * max(kernels),
        "kernels TFLOP/s": slowest_speed(times),
        "with copies ms": 1000 * max(engine),
        "kernels / one call": sum(kernels) / sum(one),
        "copies / one call": (sum(engine) - sum(kernels)) / sum(one),
    }


class SingleCall(NamedTuple):
    """Rectangles that are timed in one call, and the published TFLOP/s, forward and backward, by kernel."""

    name: str
    rectangles: list[Rectangle]
    causal: bool
    shape: Shape
    published: Mapping[str, tuple[Any, Any]]


def single_calls(settings: Settings) -> list[SingleCall]:
    """Return the calls whose speed is measured: a causal and a full rectangle, and packed documents."""
    tokens, packed = settings.sized((16384, PACKED), (256, [length // 64 for length in PACKED]))
    shape, of_packed = _shape(settings), settings.sized(PACKED_SHAPE, (8, 1, 32))
    return [
        SingleCall(f"causal {tokens:,}", side_by_side([(tokens, tokens)]), True, shape, {}),
        SingleCall(
            f"full {tokens:,} x {7 * tokens:,}", side_by_side([(tokens, 7 * tokens)]), False, shape, FULL_SPEEDS
        ),
        SingleCall(
            f"causal pack of {sum(packed):,}, {len(packed)} documents",
            side_by_side([(length, length) for length in packed]),
            True,
            of_packed,
            PACKED_SPEEDS,
        ),
    ]


def rectangles(settings: Settings) -> Found:
    """Time each kernel on large rectangles, and on a stage with long and short ones."""
    device, found, shape = settings.prepare(), Found(), _shape(settings)
    names = fused_kernels(device, Layer(torch.bfloat16, shape[2], shape[2]))
    for case, name in itertools.product(single_calls(settings), names):
        if found.has_time(settings, _seconds(settings, 2, name), f"{case.name}, {name}"):
            heads = "{}/{} heads of {}".format(*case.shape)
            record = {"rectangles": case.name, "layer": heads, "kernel": name}
            found.add(SPEEDS, {**record, **_speed(make_kernel(name, device), case, device)})
    varlen = [kernel for name in names if isinstance(kernel := make_kernel(name, device), VarlenKernel)]
    for kernel, direction in itertools.product(varlen, DIRECTIONS):
        if found.has_time(settings, _seconds(settings, 1, kernel.name), f"cost of blocks, {direction}, {kernel.name}"):
            sizes = settings.sized(divided_calls.GPU, divided_calls.REHEARSED)
            record = divided_calls.costs(kernel, direction, sizes, shape, device)
            found.add(COSTS, {"kernel": kernel.name, **record})
    for strategy in STRATEGIES:
        plan = plan_documents(_packs(settings)["pile"], CP_SIZE, strategy=strategy)
        for kernel, direction in itertools.product(varlen, DIRECTIONS):
            what = f"divided calls, {strategy}, {direction}, {kernel.name}"
            if found.has_time(settings, _seconds(settings, 1, kernel.name), what):
                record = divided_calls.divided_stage(plan, kernel, direction, shape, device)
                if record is not None:
                    found.add(STAGES, {"strategy": strategy, "kernel": kernel.name, **record})
    return found


def _seconds(settings: Settings, on_gpu: float, kernel: str) -> float:
    return settings.sized(on_gpu + 2 * compile_seconds(kernel), 0)


def _speed(kernel: AttentionKernel, case: SingleCall, device: torch.device) -> Record:
    calls = TimedCalls(case.rectangles, case.causal, case.shape, device)
    seconds = median_seconds(
        ROUNDS, device, **{each: partial(calls.run, each, kernel, case.rectangles) for each in DIRECTIONS}
    )
    flops = forward_flops(case.shape, count_pairs(case.rectangles, case.causal))
    found: Record = {}
    for direction, factor, published in zip(DIRECTIONS, (1, BACKWARD), case.published.get(kernel.name, (None, None))):
        found[f"{direction} ms"] = 1000 * seconds[direction]
        found[f"{direction} TFLOP/s"] = factor * flops / seconds[direction] / 1e12
        found[f"published {direction}"] = "" if published is None else published
    return found
