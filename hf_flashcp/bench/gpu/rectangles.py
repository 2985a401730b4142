"""Steps "plans" and "rectangles": times kernels and copies under a plan, and kernels alone.

Neither sends anything: the rectangles of every rank run in turn on one device, with KV that is created beforehand. The
time of a layer is that of its slowest rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from ...attention.kernels import CAPABILITIES, AttentionKernel, BackwardInputs, Gradients, ScoreOptions
from ...attention.kernels.varlen import deal_rounds
from ...data.lengths import sample_pack
from ...layout import RankLayout, Rectangle
from ...plan import ShardPlan
from ...planning import plan_documents
from ..kernels import Shape, random_tensors, time_plan
from ..turns import median_seconds
from .settings import Found, Record, Settings, fused_kernels


SHAPE = (32, 8, 128)
"""Query heads, KV heads and head dim of an 8B model."""

CP_SIZE = 8
STRATEGIES = ("search", "per_doc")
TILE = 128
"""Queries per block of a kernel, used to count the blocks that it starts."""


def _packs(settings: Settings) -> dict[str, list[int]]:
    window = settings.sized(131072, 2048)
    packs = {corpus: sample_pack(corpus, window) for corpus in settings.sized(("pile", "wlb_llm"), ("pile",))}
    return packs if settings.rehearses else {**packs, "one document": [window]}


def _shape(settings: Settings) -> Shape:
    return settings.sized(SHAPE, (4, 2, 32))


def plans(settings: Settings) -> Found:
    """Time the kernels and copies of every rank under several plans, and compare them with one call."""
    device, found, shape = settings.prepare(), Found(), _shape(settings)
    for name in fused_kernels(device, torch.bfloat16, shape[2], shape[2]):
        for (pack, lengths), strategy in itertools.product(_packs(settings).items(), STRATEGIES):
            # Three ways to run the layer, each twice, at 200 TFLOP/s; forward has 2 of the 7 products.
            flops = 3 * 2 * 3.5 * 4 * shape[0] * shape[2] * sum(n * n / 2 for n in lengths)
            needed = settings.sized(1 + flops / 200e12, 0)
            if found.has_time(settings, needed, f"{pack}, {strategy}, {name}"):
                plan = plan_documents(lengths, CP_SIZE, strategy=strategy)
                record = _time_plan(plan, CAPABILITIES[name].make(False), shape, device)
                found.add(
                    f"One attention layer, forward and backward, cp {CP_SIZE}, {sum(lengths):,} tokens, "
                    f"{shape[0]}/{shape[1]} heads of {shape[2]}, bf16: the slowest rank",
                    {"pack": pack, "strategy": strategy, "kernel": name, **record},
                )
    return found


def _time_plan(plan: ShardPlan, kernel: AttentionKernel, shape: Shape, device: torch.device) -> Record:
    one, kernels, engine = time_plan(plan, kernel, shape, torch.bfloat16, device, rounds=1).values()
    return {
        "one call ms": 1000 * max(one),
        "kernels ms": 1000 * max(kernels),
        "with copies ms": 1000 * max(engine),
        "kernels / one call": sum(kernels) / sum(one),
        "copies / one call": (sum(engine) - sum(kernels)) / sum(one),
    }


def rectangles(settings: Settings) -> Found:
    """Time each kernel on large rectangles, and on a stage with long and short ones."""
    device, found, shape = settings.prepare(), Found(), _shape(settings)
    names = fused_kernels(device, torch.bfloat16, shape[2], shape[2])
    tokens = settings.sized(16384, 256)
    alone = {
        f"causal {tokens:,}": ([Rectangle(0, tokens, 0, tokens)], True),
        f"full {tokens:,} x {7 * tokens:,}": ([Rectangle(0, tokens, 0, 7 * tokens)], False),
    }
    for name in names:
        for what, (one, causal) in alone.items():
            if found.has_time(settings, settings.sized(2, 0), f"{what}, {name}"):
                title = f"Speed of one call, {shape[0]}/{shape[1]} heads of {shape[2]}, bf16"
                record = _speed(CAPABILITIES[name].make(False), one, causal, shape, device)
                found.add(title, {"rectangle": what, "kernel": name, **record})
    for strategy in STRATEGIES:
        plan = plan_documents(_packs(settings)["pile"], CP_SIZE, strategy=strategy)
        for name in names:
            if found.has_time(settings, settings.sized(2, 0), f"length classes, {strategy}, {name}"):
                record = _classes(plan, CAPABILITIES[name].make(False), shape, device)
                title = f"A stage of the Pile pack under cp {CP_SIZE}, in one call and grouped by length, forward"
                found.add(title, {"strategy": strategy, "kernel": name, **record})
    return found


def _tensors(todo: Sequence[Rectangle], shape: Shape, device: torch.device) -> list[torch.Tensor]:
    """Return query, key, value and grad_out for these rectangles."""
    rows, keys = max(r.q_stop for r in todo), max(r.k_stop for r in todo)
    return random_tensors(shape, rows, keys, torch.bfloat16, device)


def _speed(
    kernel: AttentionKernel, todo: Sequence[Rectangle], causal: bool, shape: Shape, device: torch.device
) -> Record:
    query, key, value, grad_out = _tensors(todo, shape, device)
    options = ScoreOptions(causal, scale=shape[2] ** -0.5)
    inputs = BackwardInputs(grad_out, query, key, value, *kernel.forward(query, key, value, todo, options))
    grads = Gradients.zeros(query, key, value)
    seconds = median_seconds(
        5,
        device,
        forward=lambda: kernel.forward(query, key, value, todo, options),
        backward=lambda: kernel.backward(inputs, todo, options, grads),
    )
    pairs = sum(r.queries * r.keys / (2 if causal else 1) for r in todo)
    flops = 4 * shape[0] * shape[2] * pairs
    return {
        "forward ms": 1000 * seconds["forward"],
        "TFLOP/s": flops / seconds["forward"] / 1e12,
        "backward ms": 1000 * seconds["backward"],
        "backward TFLOP/s": 2.5 * flops / seconds["backward"] / 1e12,
    }


def _classes(plan: ShardPlan, kernel: AttentionKernel, shape: Shape, device: torch.device) -> Record:
    """Time the stage with the most blocks without queries, in one call and with rectangles grouped by length."""
    layouts = [RankLayout(plan, rank) for rank in range(plan.cp_size)]
    stages = [
        stage.rectangles for layout in layouts for stage in layout.stages(torch.device("cpu")) if stage.rectangles
    ]
    todo = max(stages, key=lambda stage: started_blocks(stage, shape[0]) - useful_blocks(stage, shape[0]))
    groups = list(length_classes(todo))
    query, key, value, _ = _tensors(todo, shape, device)
    options = ScoreOptions(causal=False, scale=shape[2] ** -0.5)

    def call(part: Sequence[Rectangle]) -> None:
        kernel.forward(query, key, value, part, options)

    seconds = median_seconds(5, device, one=lambda: call(todo), classes=lambda: [call(group) for group in groups])
    return {
        "rectangles": len(todo),
        "blocks": started_blocks(todo, shape[0]),
        "useful": useful_blocks(todo, shape[0]),
        "one call ms": 1000 * seconds["one"],
        "classes": len(groups),
        "blocks by class": sum(started_blocks(group, shape[0]) for group in groups),
        "by class ms": 1000 * seconds["classes"],
    }


def length_classes(todo: Sequence[Rectangle]) -> Iterator[list[Rectangle]]:
    """Group rectangles by their number of queries, rounded up to a power of two of `TILE`; groups keep the order."""
    classes: dict[int, list[Rectangle]] = {}
    for rectangle in todo:
        blocks = -(-rectangle.queries // TILE)
        classes.setdefault((blocks - 1).bit_length(), []).append(rectangle)
    yield from classes.values()


def started_blocks(todo: Sequence[Rectangle], heads: int) -> int:
    """Return the number of blocks that the kernel's calls start.

    Per head, a call starts as many blocks for every sequence as its longest sequence needs.
    """
    calls = [found.sequences for found in deal_rounds(tuple(todo), torch.device("cpu"))]
    return heads * sum((len(call.cu_seqlens_q) - 1) * -(-call.max_seqlen_q // TILE) for call in calls)


def useful_blocks(todo: Sequence[Rectangle], heads: int) -> int:
    """Return the number of blocks that have queries."""
    return heads * sum(-(-rectangle.queries // TILE) for rectangle in todo)
