"""Timing for the step "calibrate": kernel calls, copies, linear layers and whole attention layers."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ...attention import AttentionKernel, Layer, select_kernel
from ...attention.kernels import BackwardInputs, ScoreOptions
from ...layout import Rows, accumulate_dtype
from ...plan import ShardPlan
from ..calibration.worker import Work, copies, passes, rectangles_side_by_side
from ..kernels import RankWork, Shape, device_name, random_tensors
from ..turns import median_seconds
from .settings import OUT_OF_MEMORY, Found, Settings, fits_in_memory


DTYPE = torch.bfloat16
RUN = 64
"""Rows per range, when the copied rows consist of many ranges."""

WARM_UP, TIMED = 0.15, 0.3
"""Shares of the remaining time that kernel calls may take: for one call of each, and then for the timed rounds."""

FOR_FIT = 3.0
"""Seconds that the timing of layers on a GPU leaves for the fit."""


class Sizes(NamedTuple):
    """The sizes of everything that is timed.

    Kernel calls and layers have the query heads, KV heads and head dim of `shape`. Linear layers read `tokens` rows,
    and `widths` has their input and output widths. Fewer than `rounds` rounds are timed if time is short.
    """

    shape: Shape
    calls: tuple[Work, ...]
    rows: tuple[int, ...]
    tokens: int
    widths: tuple[tuple[int, int], ...]
    cp_size: int
    rounds: int


def time_parts(settings: Settings, sizes: Sizes) -> dict[str, Any]:
    """Time kernel calls, copies and linear layers in a worker, and return plain data.

    Calls that did not fit in memory have no seconds.
    """
    device = settings.prepare()
    kernel = _kernel(device, sizes)
    found: dict[str, Any] = {"device": device_name(device), "units": 1, "memory_bytes": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found.update(units=properties.multi_processor_count, memory_bytes=properties.total_memory)
    found.update(kernel=kernel.name, shape=list(sizes.shape), dtype="bf16", calls=[], copies=[], products=[])
    cut = Found()
    if cut.has_time(settings, settings.sized(5, 0.1), "copies, linear layers and kernel calls"):
        found["products"] = _time_products(sizes, device)
        found["copies"] = _time_copies(sizes, device)
        found["calls"] = _time_calls(cut, settings, sizes, kernel, device)
    return {**found, "cut": cut.cut}


def _kernel(device: torch.device, sizes: Sizes) -> AttentionKernel:
    return select_kernel(device, Layer(DTYPE, sizes.shape[2], sizes.shape[2]))


def _time_products(sizes: Sizes, device: torch.device) -> list[dict[str, Any]]:
    """Time the forward of linear layers."""
    found = []
    for inputs, outputs in sizes.widths:
        rows, weight = (torch.randn(n, inputs, dtype=DTYPE, device=device) for n in (sizes.tokens, outputs))
        product = functools.partial(torch.nn.functional.linear, rows, weight)
        seconds = median_seconds(sizes.rounds, device, product=product)["product"]
        found.append({"tokens": sizes.tokens, "inputs": inputs, "outputs": outputs, "seconds": seconds})
    return found


def _time_copies(sizes: Sizes, device: torch.device) -> list[dict[str, Any]]:
    """Time merging and packing of one range of rows, and of every other `RUN` rows, which a GPU copies by index."""
    most = 2 * max(sizes.rows)
    query, key, value, _ = random_tensors(sizes.shape, most, most, DTYPE, device)
    found = []
    for count in sizes.rows:
        numbers = np.arange(count)
        for ranges, rows in (("one", numbers + count), ("many", numbers + numbers // RUN * RUN)):
            tensors = (tensor[:, : 2 * count] for tensor in (query, key, value))
            merge, pack = copies(*tensors, Rows(rows, device))
            seconds = median_seconds(sizes.rounds, device, merge=merge, pack=pack)
            found.append({"rows": count, "ranges": ranges, **seconds})
    return found


def _time_calls(
    found: Found, settings: Settings, sizes: Sizes, kernel: AttentionKernel, device: torch.device
) -> list[dict[str, Any]]:
    """Time each kernel call alone, those with the most work first.

    The host only launches kernels, so after a long call it is ahead of the device. Small calls are then timed without
    the latency of their launches.
    """
    begin, left = time.monotonic(), settings.seconds_left()
    warm_up = settings.until(begin + WARM_UP * left)
    inputs = _Inputs(sizes, kernel, device)
    ordered = sorted(sizes.calls, key=_pairs, reverse=True)
    rows, functions = [], {}
    for number, (causal, rectangles) in enumerate(ordered):
        if not found.has_time(warm_up, 0, f"{len(ordered) - number} of {len(ordered)} kernel calls, the smallest"):
            break
        forward, backward = inputs.functions(causal, rectangles)
        rows.append({"causal": causal, "rectangles": [list(pair) for pair in rectangles]})
        if fits_in_memory(lambda forward=forward, backward=backward: (forward(), backward())):
            functions[f"forward {number}"], functions[f"backward {number}"] = forward, backward
    one_round = time.monotonic() - begin
    rounds = max(int(min(sizes.rounds, TIMED * left / one_round - 1)), 1)
    for name, seconds in median_seconds(rounds, device, **functions).items():
        direction, number = name.split()
        rows[int(number)][direction] = seconds
    return rows


def _pairs(call: Work) -> float:
    causal, rectangles = call
    return sum(queries * keys for queries, keys in rectangles) / (2 if causal else 1)


class _Inputs:
    """Tensors that all kernel calls share; a call uses as many of their rows as it needs."""

    def __init__(self, sizes: Sizes, kernel: AttentionKernel, device: torch.device):
        queries, keys = np.max([np.sum(rectangles, 0) for _, rectangles in sizes.calls], 0).tolist()
        self.kernel = kernel
        self.query, self.key, self.value, self.grad_out = random_tensors(sizes.shape, queries, keys, DTYPE, device)
        self.out = torch.zeros_like(self.query)

    def functions(self, causal: bool, pairs: Sequence[tuple[int, int]]) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Return two functions that run forward and backward of a call, see [`Work`]."""
        rectangles = rectangles_side_by_side(pairs)
        queries, keys = rectangles[-1].q_stop, rectangles[-1].k_stop
        query, grad_out, out = (tensor[:, :queries] for tensor in (self.query, self.grad_out, self.out))
        key, value = self.key[:, :keys], self.value[:, :keys]
        dtype = accumulate_dtype(query.dtype)
        # Roughly the value for random scores; times do not depend on it.
        lse = torch.full(query.shape[:2], math.log(keys / len(pairs)), dtype=dtype, device=query.device)
        options = ScoreOptions(causal, scale=query.shape[2] ** -0.5)
        return passes(self.kernel, BackwardInputs(grad_out, query, key, value, out, lse), rectangles, options)


def time_layers(settings: Settings, sizes: Sizes, plans: Mapping[str, ShardPlan]) -> dict[str, Any]:
    """Time the attention layer of every rank of each plan in a worker.

    `layers` has one entry per plan: the seconds of forward and backward on every rank, or the reason why there are
    none.
    """
    device = settings.prepare()
    settings = settings.until(settings.deadline - settings.sized(FOR_FIT, 0.0))
    found = Found()
    kernel = _kernel(device, sizes)

    def by_rank(plan: ShardPlan, name: str) -> list[float] | str:
        seconds: list[float] = []
        needed = settings.sized(1.0, 0.05)
        for rank in range(plan.cp_size):
            if not found.has_time(settings, needed, name):
                return "out of time"
            begin = time.monotonic()

            def run(rank=rank) -> None:
                work = RankWork(plan, rank, kernel, sizes.shape, DTYPE, device)
                seconds.append(median_seconds(sizes.rounds, device, engine=work.engine)["engine"])

            if not fits_in_memory(run):
                return OUT_OF_MEMORY
            # Ranks have about the same work, so a plan that would take too long is abandoned after its first rank.
            needed = 1.2 * (time.monotonic() - begin) * (plan.cp_size - rank - 1)
        return seconds

    layers = [by_rank(plan, f"layer of {name}") for name, plan in plans.items()]
    return {"layers": layers, "cut": found.cut}
