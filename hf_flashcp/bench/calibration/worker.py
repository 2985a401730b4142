"""Timing in the processes of `bench calibrate`: kernel calls, copies, transfers, matrix products, attention layers.

All processes time the same part at the same moment. As in training, they then compete for caches and memory.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ...attention import Layer, document_attention, select_kernel
from ...attention.kernels import AttentionKernel, BackwardInputs, ScoreOptions
from ...attention.merge import merge as merge_rows
from ...exchange import AllToAll, Transfer, kv_width, pack_rows
from ...layout import RankPlan, Rectangle, Rows, accumulate_dtype
from ...plan import ShardPlan
from ...planning import plan_documents
from ..attention import DTYPES, random_inputs
from ..kernels import Shape
from ..turns import Run, in_turns


Work = tuple[bool, tuple[tuple[int, int], ...]]
"""A kernel call: whether it is causal, and the (queries, keys) of each rectangle."""

cpu_clock = time.thread_time
"""CPU seconds of this thread; time that other programs take from the core is not included."""


def _timed(*functions: Callable[[], Any], clock: Callable[[], Any] = cpu_clock) -> Run:
    """Return a function that calls these functions in order and returns the seconds that each took."""

    def run() -> list[Any]:
        times = [clock()]
        for function in functions:
            function()
            times.append(clock())
        return [after - before for before, after in zip(times, times[1:])]

    return run


def _medians(runs: Sequence[Run], rounds: int) -> list[list[float]]:
    """Return the medians over rounds of every run's figures."""
    return [[median(column) for column in zip(*figures)] for figures in in_turns(runs, rounds)]


def time_calls(calls: Sequence[Work], shape: Shape, dtype: str, rounds: int) -> list[list[float]]:
    """Return the CPU seconds of each call's forward and backward.

    Causal calls run as the local pass of a layer, so they include the overhead of autograd and the engine.
    """
    kernel = select_kernel(torch.device("cpu"), Layer(DTYPES[dtype]))
    runs = []
    for causal, rectangles in calls:
        if causal:
            plan = plan_documents([queries for queries, _ in rectangles], 1)
            runs.append(_layer(RankPlan(plan), shape, dtype, kernel, cpu_clock))
        else:
            runs.append(_timed(*_rectangles(rectangles, shape, dtype, kernel)))
    return _medians(runs, rounds)


def time_layers(plans: Sequence[ShardPlan], shape: Shape, dtype: str, rounds: int) -> list[list[float]]:
    """Return the seconds and the CPU seconds of one layer, forward and backward, on this rank under each plan."""
    kernel = select_kernel(torch.device("cpu"), Layer(DTYPES[dtype]))

    def clocks() -> np.ndarray:
        return np.array([time.perf_counter(), cpu_clock()])

    runs = []
    for plan in plans:
        layer = _layer(RankPlan(plan, dist.get_rank(), dist.group.WORLD), shape, dtype, kernel, clocks)
        runs.append(lambda layer=layer: sum(layer()))
    return _medians(runs, rounds)


def _layer(plan: RankPlan, shape: Shape, dtype: str, kernel: AttentionKernel, clock: Callable[[], Any]) -> Run:
    *inputs, grad_out = random_inputs(plan.layout.num_tokens, shape, dtype)
    outputs: list[torch.Tensor] = []
    return _timed(
        lambda: outputs.append(document_attention(*inputs, plan, kernel=kernel)),
        lambda: torch.autograd.grad(outputs.pop(), inputs, grad_out),
        clock=clock,
    )


def rectangles_side_by_side(sizes: Sequence[tuple[int, int]]) -> tuple[Rectangle, ...]:
    """Return rectangles with the given (queries, keys), placed one after the other without overlap."""
    rectangles: list[Rectangle] = []
    queries = keys = 0
    for count, against in sizes:
        rectangles.append(Rectangle(queries, queries + count, keys, keys + against))
        queries, keys = queries + count, keys + against
    return tuple(rectangles)


def _rectangles(
    sizes: Sequence[tuple[int, int]], shape: Shape, dtype: str, kernel: AttentionKernel
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    rectangles = rectangles_side_by_side(sizes)
    query, _, _, grad_out = (tensor.detach() for tensor in random_inputs(rectangles[-1].q_stop, shape, dtype))
    _, key, value, _ = (tensor.detach() for tensor in random_inputs(rectangles[-1].k_stop, shape, dtype))
    options = ScoreOptions(causal=False, scale=shape[2] ** -0.5)
    out, lse = kernel.forward(query, key, value, rectangles, options)
    return passes(kernel, BackwardInputs(grad_out, query, key, value, out, lse), rectangles, options)


def passes(
    kernel: AttentionKernel, inputs: BackwardInputs, rectangles: Sequence[Rectangle], options: ScoreOptions
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return two functions that run forward and backward of a kernel call.

    As in a layer, backward includes allocating and clearing the gradients to which it adds.
    """
    tensors = inputs.query, inputs.key, inputs.value
    return (
        lambda: kernel.forward(*tensors, rectangles, options),
        lambda: kernel.backward(inputs, rectangles, options),
    )


def time_copies(rows: Sequence[int], shape: Shape, dtype: str, rounds: int) -> list[list[float]]:
    """Return, for each number of rows, the CPU seconds to merge them into twice as many, and to pack their KV."""
    runs = []
    for count in rows:
        inputs = (tensor.detach() for tensor in random_inputs(2 * count, shape, dtype)[:3])
        runs.append(_timed(*copies(*inputs, Rows(np.arange(count, 2 * count)))))
    return _medians(runs, rounds)


def copies(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return a function that merges a partial output into `rows` of an output, and one that packs the KV of `rows`.

    Both do what the engine does.
    """
    out = torch.zeros_like(query, dtype=accumulate_dtype(query.dtype))
    lse = torch.zeros(query.shape[:2], dtype=out.dtype, device=query.device)
    part, part_lse = query[:, : rows.count].clone(), torch.zeros_like(lse[:, : rows.count])
    packed = key.new_empty(rows.count, kv_width(key, value))
    return lambda: merge_rows(out, lse, part, part_lse, rows), lambda: pack_rows(key, value, rows, packed)


def time_transfers(bytes_moved: Sequence[int], rounds: int) -> list[list[float]]:
    """Return, for each size, the seconds to receive so many bytes from the next rank and send them to the previous."""
    return _medians([_transfer(count) for count in bytes_moved], rounds)


def _transfer(count: int) -> Run:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sent, received = torch.zeros(count, dtype=torch.uint8), torch.empty(count, dtype=torch.uint8)
    sends = [count * (other == (rank - 1) % ranks) for other in range(ranks)]
    receives = [count * (other == (rank + 1) % ranks) for other in range(ranks)]
    rows = AllToAll(sent, received, sends, receives, dist.group.WORLD)
    return _timed(lambda: Transfer(rows).wait(), clock=time.perf_counter)


def time_products(tokens: int, widths: Sequence[int], dtype: str, rounds: int) -> list[list[float]]:
    """Return the CPU seconds of the forward of a square linear layer of each width, on `tokens` tokens."""
    runs = []
    for width in widths:
        rows, weight = (torch.randn(size, width).to(DTYPES[dtype]) for size in (tokens, width))
        runs.append(_timed(functools.partial(torch.nn.functional.linear, rows, weight)))
    return _medians(runs, rounds)
