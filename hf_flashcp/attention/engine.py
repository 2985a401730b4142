"""One layer's attention on one rank: which kernel runs when, what travels meanwhile, and how results are added up.

Forward, with two stages; sends depend on nothing but local KV, so everything is posted at once:

    compute   pack | local pass | stage 1, merge | stage 2, merge
    wire           | KV of stage 1 | KV of stage 2 |

Backward runs the same rectangles with the merged output and logsumexp, remote ones first, so that their dK and dV
travel while the next stage and at last the local pass are computed:

    compute   stage 1 | stage 2 | local pass       | add what came home
    wire              | dKV of 1 | dKV of 2 |

Where the received KV was not kept it is fetched again, and the local pass goes first, while that travels.

Partial outputs of rows that merge more than once, dQ, dK and dV are summed in the accumulate dtype (at least fp32), in
one order on every run and device. Nothing here waits for a device: sizes and rectangles are known to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..exchange import kv_width, named_range, send_grads_home, send_kv, split_rows
from ..layout import RankLayout, Rows, Stage
from .determinism import deterministic_algorithms
from .kernels import AttentionKernel, accumulate_dtype
from .kernels.base import merge_logsumexp


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Engine(NamedTuple):
    """How one layer runs under one plan; its methods are the layer's forward and backward.

    Shapes everywhere: query (H_q, T_r, D_k), key (H_kv, T_r, D_k), value (H_kv, T_r, D_v), out (H_q, T_r, D_v), lse
    (H_q, T_r) in the accumulate dtype; the keys of a stage (n, H_kv * (D_k + D_v)), see `pack_rows`.
    """

    group: ProcessGroup | None
    layout: RankLayout
    kernel: AttentionKernel
    scale: float
    softcap: float | None
    keep_received: bool

    @deterministic_algorithms(False)
    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Returns out, lse and the keys of each stage, none if they are not kept."""
        stages = self.layout.stages(query.device)
        transfers = send_kv(key, value, self.layout, self.group)
        with named_range("local pass"):
            out, lse = self._local_forward(query, key, value)
        if self.layout.merges_again or sinks is not None:
            out = out.to(accumulate_dtype(out.dtype))
        received = []
        for number, (stage, transfer) in enumerate(zip(stages, transfers), 1):
            keys = _ordered(transfer.wait(), stage)
            if self.keep_received:
                received.append(keys)
            if stage.rectangles:
                split = split_rows(keys, key, value)
                with named_range(f"stage {number}"):
                    part = self.kernel.forward(query, *split, stage.rectangles, **self._options(stage.causal))
                if stage.causal:  # these rows had no keys yet
                    stage.rows.put(out, part[0], dim=1)
                    stage.rows.put(lse, part[1], dim=1)
                else:
                    _merge(out, lse, *part, stage.rows)
        if sinks is not None:
            without = lse
            lse = torch.logaddexp(without, sinks.to(lse.dtype).unsqueeze(-1))
            out = out * (without - lse).exp().unsqueeze(-1)
        return out.to(query.dtype), lse, received

    @deterministic_algorithms(False)
    def backward(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        received: Sequence[torch.Tensor],
        keys_need_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns dQ, and dK and dV of this rank's tokens, as the queries of all ranks give them, in the accumulate
        dtype.

        Args:
            received: the keys of each stage, as forward returned them; fetched again if they were not kept.
            keys_need_grad: the same on every rank; without it no gradient travels, and dK and dV mean nothing.
        """
        stages = self.layout.stages(query.device)
        dtype = accumulate_dtype(query.dtype)
        grad_query = torch.zeros_like(query, dtype=dtype)
        grad_keys = key.new_zeros(key.shape[1], kv_width(key, value), dtype=dtype)
        grad_key, grad_value = split_rows(grad_keys, key, value)
        tensors = grad_out, query, key, value, out, lse
        fetched = [] if self.keep_received else send_kv(key, value, self.layout, self.group)
        if fetched:
            self._local_backward(*tensors, grad_query, grad_key, grad_value)
        home = key.new_empty(self.layout.send_rows(key.device).count if stages else 0, grad_keys.shape[1])
        transfers = []
        for index, stage in enumerate(stages):
            keys = received[index] if self.keep_received else _ordered(fetched[index].wait(), stage)
            with named_range(f"stage {index + 1}, backward"):
                wire, grad_local = self._stage_backward(stage, keys, *tensors, grad_query)
            if keys_need_grad:
                transfers.append(send_grads_home(wire, home[stage.sent], stage, self.group))
                if grad_local is not None:
                    stage.local_rows.add(grad_keys, grad_local)
            del keys, wire, grad_local
        if not fetched:
            self._local_backward(*tensors, grad_query, grad_key, grad_value)
        for transfer in transfers:
            transfer.wait()
        if transfers:
            with named_range("add what came home"):
                for part, rows in self.layout.home_groups(key.device):
                    rows.add(grad_keys, home[part])
        return grad_query, grad_key, grad_value

    def _options(self, causal: bool) -> dict[str, Any]:
        window = self.layout.window if causal else None
        return {"causal": causal, "scale": self.scale, "window": window, "softcap": self.softcap}

    def _local_forward(self, query, key, value) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and logsumexp of the local rectangles; what stands in rows outside them is not yet written."""
        rows = self.layout.local_rows(query.device)
        if rows is None:
            return self.kernel.forward(query, key, value, self.layout.local, **self._options(causal=True))
        out = query.new_empty(*query.shape[:2], value.shape[-1])
        lse = query.new_empty(query.shape[:2], dtype=accumulate_dtype(query.dtype))
        if self.layout.local:
            part = self.kernel.forward(query, key, value, self.layout.local, **self._options(causal=True))
            rows.put(out, part[0], dim=1)
            rows.put(lse, part[1], dim=1)
        return out, lse

    def _local_backward(self, grad_out, query, key, value, out, lse, grad_query, grad_key, grad_value) -> None:
        if not self.layout.local:
            return
        with named_range("local pass, backward"):
            self.kernel.backward(
                grad_out,
                query,
                key,
                value,
                out,
                lse,
                self.layout.local,
                **self._options(causal=True),
                grad_query=grad_query,
                grad_key=grad_key,
                grad_value=grad_value,
            )

    def _stage_backward(
        self, stage, keys, grad_out, query, key, value, out, lse, grad_query
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Adds to dQ; returns what [`_as_received`] makes of the gradients of the stage's keys."""
        grad = torch.zeros_like(keys, dtype=grad_query.dtype)
        if stage.rectangles:
            grad_key, grad_value = split_rows(grad, key, value)
            self.kernel.backward(
                grad_out,
                query,
                *split_rows(keys, key, value),
                out,
                lse,
                stage.rectangles,
                **self._options(stage.causal),
                grad_query=grad_query,
                grad_key=grad_key,
                grad_value=grad_value,
            )
        return _as_received(grad, stage, key.dtype)


def _ordered(keys: torch.Tensor, stage: Stage) -> torch.Tensor:
    """(n_keys, width): the keys of a stage as its rectangles find them."""
    return keys if stage.key_order is None else stage.key_order.take(keys)


def _as_received(grad: torch.Tensor, stage: Stage, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The transpose of [`_ordered`]: gradients of the received rows, in the order received and in `dtype`, and of the
    local ones."""
    if stage.local_rows is None:
        if stage.key_order is None:
            return grad.to(dtype), None
        wire = grad.new_empty(grad.shape, dtype=dtype)
        stage.key_order.put(wire, grad)
        return wire, None
    rows = grad.new_zeros(stage.received + stage.local_rows.count, grad.shape[1])
    for part, numbers in stage.order_groups:
        numbers.add(rows, grad[part])
    return rows[: stage.received].to(dtype), rows[stage.received :]


def _merge(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor, rows: Rows) -> None:
    """Writes into some rows of `out` and `lse` the attention over two disjoint sets of keys, from the attention over
    each, by their logsumexp (FlashAttention's combine step)."""
    with named_range("merge"):
        _merge_rows(out, lse, part, part_lse, rows)


def _merge_rows(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor, rows: Rows) -> None:
    if rows.index is None:
        # On a CPU few rows at a time, whose intermediates stay in its cache: measured three times as fast.
        for there, here in rows.pieces(256 if out.device.type == "cpu" else None):
            _combine(out[:, there], lse[:, there], part[:, here], part_lse[:, here])
        return
    # Rows before heads, as kernels return outputs: whole rows are copied at a time.
    by_row = out.transpose(0, 1)
    found, found_lse = by_row.index_select(0, rows.index), lse.index_select(1, rows.index)
    _combine(found.transpose(0, 1), found_lse, part, part_lse)
    by_row.index_copy_(0, rows.index, found)
    lse.index_copy_(1, rows.index, found_lse)


def _combine(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    dtype = accumulate_dtype(out.dtype)
    weight = merge_logsumexp(lse, part_lse).unsqueeze(-1)
    if out.dtype == dtype:
        out.lerp_(part.to(dtype), weight)
    else:
        out.copy_(out.to(dtype).lerp_(part.to(dtype), weight))
