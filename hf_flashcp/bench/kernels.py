"""The cost of splitting documents for the kernels: the passes of each rank, compared with one call on the same work.

The one call runs every local slice against the keys of its document from the start of the document to the end of the
slice, under a bottom-right causal mask. A rank could run it if all KV were present and in order. Nothing is sent: the
KV that a rank would receive is created beforehand, so one device can time the kernels and copies of every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from ..attention import AttentionKernel, Layer
from ..attention import engine as engine_module
from ..attention.engine import Engine
from ..attention.kernels import (
    BackwardInputs,
    Device,
    ScoreOptions,
    check_kernel_name,
    explain_kernels,
    make_kernel,
)
from ..errors import ConfigurationError
from ..exchange import kv_width, pack_rows, split_rows
from ..layout import RankLayout, Rectangle, accumulate_dtype
from ..plan import ShardPlan
from ..planning import plan_documents
from ..tables import counted, table
from .arguments import with_arguments
from .attention import DTYPES
from .turns import median_seconds


Shape = tuple[int, int, int]
"""Query heads, KV heads, head dim."""

FLOPS_PER_PAIR = 4
"""Floating-point operations of forward per query head, unit of head dim, and pair of a query and a key."""

BACKWARD = 2.5
"""Operations of backward relative to those of forward: five matrix products instead of two."""


@with_arguments("lengths", "cp_size", "heads", "kv_heads", "head_dim", "dtype", "rounds")
def measure(
    lengths: Sequence[int],
    cp_size: int,
    *,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    dtype: str = "bf16",
    device: str = "cpu",
    kernels: Sequence[str] | None = None,
    strategies: Sequence[str] = ("per_doc", "flashcp", "search"),
    num_stages: int | None = None,
    rounds: int = 5,
) -> dict[str, Any]:
    """Time forward and backward of one causal full-attention layer, rank by rank on one device.

    `kernels` has the result of [`time_plan`] for each kernel and strategy, and `chosen` names the kernel that training
    would use. By default all fused kernels that can run the layer are timed, or eager if there are none.

    Raises:
        ConfigurationError: one of `kernels` is unknown, or cannot run the layer here.
    """
    here, layer = torch.device(device), Layer(DTYPES[dtype], head_dim, head_dim)
    usable = fused_kernels(here, layer) or ["eager"]
    names = usable if kernels is None else list(kernels)
    for name in names:
        _check_usable(name, here, layer)
    plans = {each: plan_documents(lengths, cp_size, strategy=each, num_stages=num_stages) for each in strategies}
    shape = heads, kv_heads, head_dim
    found = {
        name: {
            strategy: time_plan(plan, make_kernel(name, here), shape, DTYPES[dtype], here, rounds)
            for strategy, plan in plans.items()
        }
        for name in names
    }
    return {"device": device_name(here), "chosen": usable[0], "kernels": found}


def fused_kernels(device: torch.device, layer: Layer) -> list[str]:
    """Return the kernels, except the formulas, that can run a layer on a device of this machine, fastest first."""
    explained = explain_kernels(Device.here(device), layer)
    return [name for name, reason in explained.items() if reason is None and name != "eager"]


def _check_usable(name: str, device: torch.device, layer: Layer) -> None:
    check_kernel_name(name)
    reason = explain_kernels(Device.here(device), layer)[name]
    if reason is not None:
        usable = ", ".join([*fused_kernels(device, layer), "eager"])
        raise ConfigurationError(f"The kernel {name} cannot run this layer here: it {reason}. Choose from {usable}.")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def time_plan(
    plan: ShardPlan, kernel: AttentionKernel, shape: Shape, dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Time every rank of a plan, and return lists with one value per rank.

    Three lists are median seconds: `one_call` is the one call, `kernels` are the kernel calls under the plan (local
    pass and stages), and `engine` adds packing, merging and accumulation. The fourth, `flops`, counts the operations
    of the kernel calls.
    """
    ranks = []
    for rank in range(plan.cp_size):
        work = RankWork(plan, rank, kernel, shape, dtype, device)
        seconds = median_seconds(rounds, device, one_call=work.one_call, kernels=work.kernels, engine=work.engine)
        ranks.append({**seconds, "flops": work.flops})
    return {name: [figures[name] for figures in ranks] for name in ranks[0]}


def slowest_speed(times: dict[str, list[float]]) -> float:
    """Return the TFLOP/s of the kernel calls on the rank whose calls take longest, see [`time_plan`]."""
    seconds, flops = max(zip(times["kernels"], times["flops"]))
    return flops / seconds / 1e12


def count_pairs(rectangles: Sequence[Rectangle], causal: bool) -> int:
    """Return the number of pairs of a query and a key that it sees; causal rectangles are aligned bottom-right."""
    hidden = sum(each.queries * (each.queries - 1) // 2 for each in rectangles) if causal else 0
    return sum(each.queries * each.keys for each in rectangles) - hidden


def forward_flops(shape: Shape, pairs: int) -> int:
    """Return the operations of forward; those of backward are `BACKWARD` times as many."""
    return FLOPS_PER_PAIR * shape[0] * shape[2] * pairs


def _finished(keys: torch.Tensor | None) -> SimpleNamespace:
    """Return a transfer that has already finished."""
    return SimpleNamespace(wait=lambda: keys)


class _Pass(NamedTuple):
    """The arguments of one kernel call, in forward and in backward."""

    key: torch.Tensor
    value: torch.Tensor
    rectangles: tuple[Rectangle, ...]
    causal: bool


def random_tensors(shape: Shape, rows: int, keys: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Return random query (H_q, rows, D), key and value (H_kv, keys, D), and dO (H_q, rows, D).

    They are laid out like the outputs of a model's projections: the heads of one token are contiguous in memory.
    """
    heads, kv_heads, width = shape
    sizes = ((rows, heads), (keys, kv_heads), (keys, kv_heads), (rows, heads))
    return [torch.randn(*size, width, dtype=dtype, device=device).transpose(0, 1) for size in sizes]


class RankWork:
    """One rank's attention layer on random tensors, whose received KV is created beforehand."""

    def __init__(
        self,
        plan: ShardPlan,
        rank: int,
        kernel: AttentionKernel,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.layout = RankLayout(plan, rank)
        self.kernel, self.scale, self._shape = kernel, shape[2] ** -0.5, shape
        self._engine = Engine(None, self.layout, kernel, self.scale, softcap=None, keep_received_kv=True)
        tokens = self.layout.num_tokens
        self.query, self.key, self.value, self.grad_out = random_tensors(shape, tokens, tokens, dtype, device)
        self.stages = self.layout.stages(device)
        width = kv_width(self.key, self.value)
        self.received = [torch.randn(stage.received, width, dtype=dtype, device=device) for stage in self.stages]
        whole = self._in_order()
        _, key, value, _ = random_tensors(shape, 0, whole[-1].k_stop, dtype, device)
        self._whole = _Pass(key, value, whole, causal=True)

    @property
    def flops(self) -> float:
        """Operations of the kernel calls under the plan, forward and backward."""
        pairs = count_pairs(self.layout.local, causal=True)
        pairs += sum(count_pairs(stage.rectangles, causal=False) for stage in self.stages)
        return (1 + BACKWARD) * forward_flops(self._shape, pairs)

    def _in_order(self) -> tuple[Rectangle, ...]:
        """Return rectangles of the rank's slices against keys that are ordered by document, without gaps."""
        ends = {piece.document: piece.stop for piece in self.layout.slices}
        starts = dict(zip(ends, accumulate(ends.values(), initial=0)))
        return tuple(
            Rectangle(piece.row, piece.row + piece.tokens, starts[piece.document], starts[piece.document] + piece.stop)
            for piece in self.layout.slices
        )

    def one_call(self) -> None:
        self._both([self._whole])

    def kernels(self) -> None:
        passes = [_Pass(self.key, self.value, self.layout.local, causal=True)] if self.layout.local else []
        for stage, keys in zip(self.stages, self.received):
            if stage.rectangles:
                passes.append(_Pass(*split_rows(keys, self.key, self.value), stage.rectangles, causal=False))
        self._both(passes)

    def _both(self, passes: list[_Pass]) -> None:
        """Run only the kernel calls of forward and backward; backward gets an output of zeros."""
        dtype = accumulate_dtype(self.query.dtype)
        out = torch.zeros_like(self.query)
        lse = torch.zeros(self.query.shape[:2], dtype=dtype, device=self.query.device)
        for key, value, rectangles, causal in passes:
            self.kernel.forward(self.query, key, value, rectangles, ScoreOptions(causal, self.scale))
        for key, value, rectangles, causal in passes:
            inputs = BackwardInputs(self.grad_out, self.query, key, value, out, lse)
            self.kernel.backward(inputs, rectangles, ScoreOptions(causal, self.scale))

    def engine(self) -> None:
        originals = engine_module.send_kv, engine_module.return_grads
        engine_module.send_kv = self._send_kv
        engine_module.return_grads = lambda *arguments: _finished(None)
        try:
            out, lse, received = self._engine.forward(self.query, self.key, self.value, None)
            inputs = BackwardInputs(self.grad_out, self.query, self.key, self.value, out, lse)
            self._engine.backward(inputs, received, keys_need_grad=True)
        finally:
            engine_module.send_kv, engine_module.return_grads = originals

    def _send_kv(self, key, value, layout, group) -> list[SimpleNamespace]:
        if self.received:
            rows = layout.send_rows(key.device)
            pack_rows(key, value, rows, key.new_empty(rows.count, self.received[0].shape[1]))
        return [_finished(keys) for keys in self.received]


def text(found: dict[str, Any]) -> str:
    """Return a table with the slowest rank of each kernel and strategy, and ratios of sums over ranks."""
    rows = []
    for kernel, strategies in found["kernels"].items():
        for strategy, ranks in strategies.items():
            one, kernels, engine = (ranks[name] for name in ("one_call", "kernels", "engine"))
            one_ms, kernels_ms, engine_ms = (1000 * max(seconds) for seconds in (one, kernels, engine))
            ratios = sum(kernels) / sum(one), (sum(engine) - sum(kernels)) / sum(one)
            rows.append((kernel, strategy, one_ms, kernels_ms, slowest_speed(ranks), engine_ms, *ratios))
    columns = {
        **dict.fromkeys(("kernel", "strategy"), ""),
        **dict.fromkeys(("one call\nms, slowest", "kernels\nms"), ".2f"),
        "kernels\nTFLOP/s": ".3g",
        "engine\nms": ".2f",
        **dict.fromkeys(("kernels\n/ one call", "copies\n/ one call"), ".3f"),
    }
    return (
        f"{found['device']}, {found['dtype']}, {found['heads']}/{found['kv_heads']} heads of {found['head_dim']}; "
        f"{found['chosen']} is chosen by default\n"
        f"{counted(len(found['lengths']), 'document')} of {sum(found['lengths']):,} tokens on {found['cp_size']} "
        f"ranks; forward and backward, medians of {found['rounds']} rounds\n\n" + table(columns, rows)
    )
