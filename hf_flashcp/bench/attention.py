"""Times one attention layer under each strategy, with an all-gather for comparison, and on a single process.

All cases run in turn, round after round, on the same processes of this machine (gloo, one thread each), so that other
load on the machine affects all of them equally. The ideal is the time of one process that runs PyTorch's
`scaled_dot_product_attention` on one document at a time, divided by the number of ranks.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from ..attention import AttentionKernel, Layer, document_attention, select_kernel
from ..distributed.workers import WorkerPool
from ..doctor.layer_errors import attend_one_by_one
from ..exchange import Transfer
from ..layout import RankLayout, RankPlan
from ..plan import ShardPlan
from ..plan.ranges import Ranges
from ..plan.stage_traffic import LayerTraffic, StageTraffic
from ..plan.traffic import NeededKeys
from ..planning import plan_documents
from ..predict import CostModel, HardwareProfile
from ..predict.model_shape import AttentionLayers
from ..simulation.simulate import TIMED
from ..tables import counted, records_table
from .arguments import with_arguments
from .traces import kept_and_peak, trace_events
from .turns import in_turns


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}

SINGLE = "single process"


class AllGatherLayout(RankLayout):
    """A layout in which every rank receives the KV of all other ranks, as all-gather schemes do (FlashCP eq. 4)."""

    def _stage_traffic(self):
        plan, table = self._plan, self._plan.slice_table
        ranks = np.arange(plan.cp_size)
        layer = LayerTraffic(plan, NeededKeys(ranks, Ranges(0 * ranks, 0 * ranks + table.spans.stops.max())))
        return [StageTraffic(layer, offsets) for offsets in plan.stage_offsets]


@with_arguments("lengths", "cp_size", "heads", "kv_heads", "head_dim", "dtype", "rounds")
def measure(
    lengths: Sequence[int],
    cp_size: int,
    *,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    dtype: str = "bf16",
    strategies: Sequence[str] = ("per_doc", "flashcp", "search", TIMED),
    exchanges: Sequence[str] = ("needed", "all"),
    num_stages: int | None = None,
    max_imbalance: float = 1.05,
    hardware: str = "cpu",
    head_groups: Sequence[int] = (1,),
    rounds: int = 10,
) -> dict[str, Any]:
    """Time forward and backward of one causal full-attention layer.

    "search_timed" is the strategy "search" with the layer's predicted time on `hardware`, which `FlashCPPlugin` uses
    by default on a CPU.

    `seconds`, `forward` and `waiting` are medians over rounds on the slowest rank. `ideal_share` is the median over
    rounds of the single process's time / cp_size / the case's time. Bytes received, kernel calls and collectives are
    exact counts on the rank with the most of each. Bytes count forward only; the other two count both passes. With
    several `head_groups` (see [`FlashCPPlugin`]), `peak_bytes` is the peak of PyTorch's CPU allocator beyond the
    layer's inputs and the gradient of its output, on the rank with the highest.
    """
    names = list(itertools.product(strategies, exchanges, head_groups))
    caps = {"max_imbalance": max_imbalance, "num_stages": num_stages}
    itemsize = DTYPES[dtype].itemsize
    layers = AttentionLayers(1, heads, kv_heads, head_dim, head_dim)
    model = CostModel(HardwareProfile.load(hardware), 0.0, (layers,), itemsize, itemsize)
    plans = {
        strategy: plan_documents(lengths, cp_size, cost_model=model, **caps)
        if strategy == TIMED
        else plan_documents(lengths, cp_size, strategy=strategy, **caps)
        for strategy in strategies
    }
    cases = [(plans[strategy], exchange, groups) for strategy, exchange, groups in names]
    given = list(lengths), cases, (heads, kv_heads, head_dim), dtype, rounds
    with WorkerPool() as pool:
        by_rank = pool.run(cp_size, _time_cases, *given, timeout=3600)
    single = [turn.seconds for turn in by_rank[0][0][-1]]
    found = []
    for index, (strategy, exchange, groups) in enumerate(names):
        ranks = [Turn(*zip(*turns[index])) for turns, _ in by_rank]
        seconds = _slowest(rank.seconds for rank in ranks)
        found.append(
            {
                "strategy": strategy,
                "exchange": exchange,
                "head_groups": groups,
                "seconds": median(seconds),
                "forward": median(_slowest(rank.forward for rank in ranks)),
                "waiting": max(median(rank.waiting) for rank in ranks),
                "ideal_share": median(alone / cp_size / turn for alone, turn in zip(single, seconds)),
                "bytes_received": max(rank.bytes_received[-1] for rank in ranks),
                "kernel_calls": max(rank.kernel_calls[-1] for rank in ranks),
                "collectives": max(rank.collectives[-1] for rank in ranks),
                "copies": max(plans[strategy].report()["copies"]) if exchange == "needed" and groups == 1 else None,
                "peak_bytes": max(peaks[index] for _, peaks in by_rank) if len(head_groups) > 1 else None,
            }
        )
    return {"seconds": median(single), "cases": found}


def _slowest(seconds: Iterable[Sequence[float]]) -> list[float]:
    """Return the seconds of the slowest rank in each round."""
    return [max(turn) for turn in zip(*seconds)]


class Turn(NamedTuple):
    """A rank's figures for one turn of a case, or lists of them for all turns.

    `bytes_received` counts the KV that arrived in forward. The other figures, except `forward`, cover both passes.
    """

    seconds: Any
    forward: Any
    waiting: Any
    kernel_calls: Any
    collectives: Any
    bytes_received: Any


def _time_cases(
    lengths: list[int], cases: list[tuple[ShardPlan, str, int]], shape: tuple[int, int, int], dtype: str, rounds: int
) -> tuple[list[list[Sequence[float]]], list[int]]:
    """Return the [`Turn`]s and the peak bytes of every case on this worker.

    On rank 0, those of the single process come last. Peaks are measured only for different numbers of head groups.
    """
    rank = dist.get_rank()
    kernel = _CountingKernel(select_kernel(torch.device("cpu"), Layer(DTYPES[dtype])))
    with _counted_transfers() as transfers:
        runs = []
        for plan, exchange, groups in cases:
            bound = RankPlan(plan, rank, dist.group.WORLD)
            if exchange == "all":
                bound.layout = AllGatherLayout(plan, rank)
            attend = functools.partial(document_attention, plan=bound, kernel=kernel, head_groups=groups)
            inputs = random_inputs(bound.layout.num_tokens, shape, dtype)
            runs.append(functools.partial(_turn, attend, inputs, kernel, transfers))
        alone = functools.partial(attend_one_by_one, lengths=lengths)
        if rank == 0:
            inputs = random_inputs(sum(lengths), shape, dtype)
            runs.append(functools.partial(_turn, alone, inputs, kernel, transfers))
        else:
            runs.append(tuple)  # does nothing while rank 0 runs alone
        found = in_turns(runs, rounds, warm_up=2)
        return found, [_peak_bytes(run) for run in runs] if len({groups for *_, groups in cases}) > 1 else []


def _peak_bytes(run: Callable) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    return kept_and_peak(trace_events(profiler))[1]


def _turn(attend: Callable, inputs: list[torch.Tensor], kernel: _CountingKernel, transfers: dict[str, Any]) -> Turn:
    kernel.calls = 0
    transfers.update(waiting=0.0, collectives=0, bytes=0)
    begin = time.perf_counter()
    out = attend(*inputs[:3])
    middle, received = time.perf_counter(), transfers["bytes"]
    out.backward(inputs[3])
    end = time.perf_counter()
    for tensor in inputs[:3]:
        tensor.grad = None
    return Turn(end - begin, middle - begin, transfers["waiting"], kernel.calls, transfers["collectives"], received)


def random_inputs(tokens: int, shape: tuple[int, int, int], dtype: str) -> list[torch.Tensor]:
    """Return random query, key, value and dO, each (heads, tokens, head dim).

    They are laid out like the outputs of a model's projections: the heads of one token are contiguous in memory.
    """
    heads, kv_heads, head_dim = shape
    generator = torch.Generator().manual_seed(tokens)
    tensors = []
    for count in (heads, kv_heads, kv_heads, heads):
        rows = torch.randn(tokens, count, head_dim, generator=generator).to(DTYPES[dtype])
        tensors.append(rows.transpose(0, 1))
    return [*(tensor.requires_grad_() for tensor in tensors[:3]), tensors[3]]


class _CountingKernel:
    def __init__(self, kernel: AttentionKernel):
        self._kernel, self.name, self.calls = kernel, kernel.name, 0

    def forward(self, *args):
        self.calls += 1
        return self._kernel.forward(*args)

    def backward(self, *args):
        self.calls += 1
        return self._kernel.backward(*args)


@contextmanager
def _counted_transfers():
    """Count the collectives, received bytes and seconds of waiting in this process."""
    counts = {"waiting": 0.0, "collectives": 0, "bytes": 0}
    original_init, original_wait = Transfer.__init__, Transfer.wait

    def init(self, rows, *args, **kwargs):
        counts["collectives"] += 1
        counts["bytes"] += rows.received.nbytes
        original_init(self, rows, *args, **kwargs)

    def wait(self):
        begin = time.perf_counter()
        found = original_wait(self)
        counts["waiting"] += time.perf_counter() - begin
        return found

    with patch.multiple(Transfer, __init__=init, wait=wait):
        yield counts


def text(found: dict[str, Any]) -> str:
    """Return a table with one row per case, the single process first."""
    lengths = found["lengths"]
    shown = ",".join(map(str, lengths)) if len(lengths) <= 12 else counted(len(lengths), "document")
    columns = {
        "strategy": ("strategy", ""),
        "exchange": ("exchange", ""),
        "seconds": ("ms", "ms:.1f"),
        "ideal_share": ("of ideal", ".1%"),
        "forward": ("forward", "ms:.1f"),
        "waiting": ("waiting", "ms:.1f"),
        "bytes_received": ("MiB received", "MiB:,.2f"),
        "kernel_calls": ("kernel calls", ","),
        "collectives": ("collectives", ","),
        "copies": ("copies", ","),
    }
    if found["cases"][0]["peak_bytes"] is not None:
        columns |= {"head_groups": ("head groups", ","), "peak_bytes": ("MiB at the peak", "MiB:,.1f")}
    single = {"strategy": SINGLE, "seconds": found["seconds"]}
    return (
        f"[{shown}], {counted(sum(lengths), 'token')}, {found['cp_size']} processes, {found['heads']}/"
        f"{found['kv_heads']} heads of {found['head_dim']}, {found['dtype']}; forward and backward, medians of "
        f"{found['rounds']} rounds\n\n" + records_table(columns, [single, *found["cases"]])
    )
