"""What splitting costs the kernels: each rank's passes under a plan, against one call on the same work.

The one call has every local slice against the contiguous keys of its document up to its end, under a bottom-right
causal mask: what a rank could run if all KV lay there in order. Nothing is sent here; received KV stands ready, so
that one device shows for every rank of a plan what kernels and copies cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..attention import AttentionKernel, select_kernel
from ..attention import engine as engine_module
from ..attention.engine import Engine
from ..exchange.kv_exchange import pack_rows
from ..layout import RankLayout, Rectangle
from ..plan import ShardPlan
from ..planning import plan_documents
from ..tables import counted, table
from .attention import DTYPES
from .turns import median_seconds


def measure(
    lengths: Sequence[int],
    cp_size: int,
    *,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    dtype: str = "bf16",
    device: str = "cpu",
    strategies: Sequence[str] = ("per_doc", "flashcp", "search"),
    num_stages: int | None = None,
    rounds: int = 5,
) -> dict[str, Any]:
    """Forward and backward of one causal full-attention layer, rank by rank on one device.

    Returns:
        `dict`, JSON-serializable: the arguments, the `kernel`'s name and the `device`'s, and `strategies`, each with
        lists by rank of median seconds: `one_call`, `kernels` (local pass and stages) and `engine` (with packing,
        merges and additions).
    """
    chosen = torch.device(device)
    kernel = select_kernel(chosen, dtype=DTYPES[dtype], key_dim=head_dim, value_dim=head_dim)
    found = {}
    for strategy in strategies:
        plan = plan_documents(lengths, cp_size, strategy=strategy, num_stages=num_stages)
        found[strategy] = time_plan(plan, kernel, (heads, kv_heads, head_dim), DTYPES[dtype], chosen, rounds)
    return {
        "lengths": list(lengths),
        "cp_size": cp_size,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "dtype": dtype,
        "rounds": rounds,
        "kernel": kernel.name,
        "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else "CPU",
        "strategies": found,
    }


def time_plan(
    plan: ShardPlan,
    kernel: AttentionKernel,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
) -> dict[str, list[float]]:
    """Returns by rank the median seconds of `one_call`, of the `kernels` under the plan, and of the `engine`."""
    ranks = []
    for rank in range(plan.cp_size):
        work = RankWork(plan, rank, kernel, shape, dtype, device)
        ranks.append(median_seconds(rounds, device, one_call=work.one_call, kernels=work.kernels, engine=work.engine))
    return {name: [seconds[name] for seconds in ranks] for name in ranks[0]}


class _Ready:
    """A transfer that is over."""

    def __init__(self, keys: torch.Tensor | None = None):
        self._keys = keys

    def wait(self) -> torch.Tensor | None:
        return self._keys


class RankWork:
    """One rank's layer, on random tensors, with received KV standing ready."""

    def __init__(
        self,
        plan: ShardPlan,
        rank: int,
        kernel: AttentionKernel,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ):
        heads, kv_heads, head_dim = shape
        self.layout = RankLayout(plan, rank)
        self.kernel, self.scale = kernel, head_dim**-0.5
        self._engine = Engine(None, self.layout, kernel, self.scale, softcap=None, keep_received=True)

        def random(tokens: int, count: int) -> torch.Tensor:
            return torch.randn(tokens, count, head_dim, dtype=dtype, device=device).transpose(0, 1)

        tokens = self.layout.num_tokens
        self.query, self.grad_out = random(tokens, heads), random(tokens, heads)
        self.key, self.value = random(tokens, kv_heads), random(tokens, kv_heads)
        self.stages = self.layout.stages(device)
        width = 2 * kv_heads * head_dim
        self.received = [torch.randn(stage.received, width, dtype=dtype, device=device) for stage in self.stages]
        self.whole_key, self.whole_value, self.whole = self._in_order(plan, rank, random, kv_heads)

    @staticmethod
    def _in_order(plan: ShardPlan, rank: int, random: Callable, kv_heads: int):
        """Keys and values of every document up to this rank's last token of it, and its slices against them."""
        ends = {document: stop for document, _, stop in plan.slices[rank]}
        starts, count = {}, 0
        for document, end in ends.items():
            starts[document], count = count, count + end
        rectangles, row = [], 0
        for document, start, stop in plan.slices[rank]:
            first = starts[document]
            rectangles.append(Rectangle(row, row + stop - start, first, first + stop))
            row += stop - start
        return random(count, kv_heads), random(count, kv_heads), tuple(rectangles)

    def one_call(self) -> None:
        self._both([(self.whole_key, self.whole_value, self.whole, True)])

    def kernels(self) -> None:
        passes = [(self.key, self.value, self.layout.local, True)] if self.layout.local else []
        for stage, keys in zip(self.stages, self.received):
            if stage.rectangles:
                passes.append((*engine_module.split_rows(keys, self.key, self.value), stage.rectangles, False))
        self._both(passes)

    def _both(self, passes: list[tuple[torch.Tensor, torch.Tensor, tuple[Rectangle, ...], bool]]) -> None:
        """The kernel calls of forward and backward and nothing else, with whatever output comes first."""
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        out = torch.zeros_like(self.query)
        lse = torch.zeros(self.query.shape[:2], dtype=dtype, device=self.query.device)
        for key, value, rectangles, causal in passes:
            self.kernel.forward(self.query, key, value, rectangles, causal=causal, scale=self.scale)
        grad_query = torch.zeros_like(self.query, dtype=dtype)
        for key, value, rectangles, causal in passes:
            grads = {
                "grad_query": grad_query,
                "grad_key": torch.zeros_like(key, dtype=dtype),
                "grad_value": torch.zeros_like(value, dtype=dtype),
            }
            inputs = (self.grad_out, self.query, key, value, out, lse, rectangles)
            self.kernel.backward(*inputs, causal=causal, scale=self.scale, **grads)

    def engine(self) -> None:
        originals = engine_module.send_kv, engine_module.send_grads_home
        engine_module.send_kv = self._send_kv
        engine_module.send_grads_home = lambda *arguments: _Ready()
        try:
            out, lse, received = self._engine.forward(self.query, self.key, self.value, None)
            self._engine.backward(self.grad_out, self.query, self.key, self.value, out, lse, received, True)
        finally:
            engine_module.send_kv, engine_module.send_grads_home = originals

    def _send_kv(self, key, value, layout, group) -> list[_Ready]:
        if self.received:
            rows = layout.send_rows(key.device)
            pack_rows(key, value, rows, key.new_empty(rows.count, self.received[0].shape[1]))
        return [_Ready(keys) for keys in self.received]


def text(found: dict[str, Any]) -> str:
    """A table of each strategy's slowest rank, and of the means over ranks."""
    rows = []
    for strategy, ranks in found["strategies"].items():
        one, kernels, engine = (ranks[name] for name in ("one_call", "kernels", "engine"))
        slowest = (1000 * max(seconds) for seconds in (one, kernels, engine))
        rows.append((strategy, *slowest, sum(kernels) / sum(one), (sum(engine) - sum(kernels)) / sum(one)))
    columns = {
        "strategy": "",
        **dict.fromkeys(("one call\nms, slowest", "kernels\nms", "engine\nms"), ".2f"),
        **dict.fromkeys(("kernels\n/ one call", "copies\n/ one call"), ".3f"),
    }
    return (
        f"{found['device']}, kernel {found['kernel']}, {found['dtype']}, {found['heads']}/{found['kv_heads']} heads "
        f"of {found['head_dim']}\n"
        f"{counted(len(found['lengths']), 'document')} of {sum(found['lengths']):,} tokens on {found['cp_size']} "
        f"ranks; forward and backward, medians of {found['rounds']} rounds\n\n" + table(columns, rows)
    )
