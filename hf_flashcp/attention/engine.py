"""The attention of one layer on one rank: the order of kernel calls and transfers, and how their results are combined.

The rows that a rank sends depend only on its local KV, so forward posts all transfers before the local pass, and then
awaits and merges one stage after another. Backward runs the same rectangles with the merged output and logsumexp. It
starts with the received rectangles, so that their dK and dV travel while the next stages and the local pass are
computed. If the received KV was not kept, backward fetches it again and runs the local pass during that transfer. The
README in this folder shows both schedules.

Partial outputs of rows that merge more than once, dQ, dK and dV are summed in the accumulate dtype (at least fp32), in
the same order on every run and device. Nothing here waits for a device, because the host knows all sizes and
rectangles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..exchange import kv_width, named_range, send_grads_home, send_kv, split_rows
from ..layout import RankLayout, Stage
from .determinism import deterministic_algorithms
from .kernels import AttentionKernel, BackwardInputs, Gradients, ScoreOptions, accumulate_dtype
from .merge import add_sinks, merge


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Engine(NamedTuple):
    """The forward and backward pass of one layer's attention under one plan.

    Shapes in all methods: query (H_q, T_r, D_k), key (H_kv, T_r, D_k), value (H_kv, T_r, D_v), out (H_q, T_r, D_v),
    lse (H_q, T_r) in the accumulate dtype, and the KV of a stage (n, H_kv * (D_k + D_v)), see
    [`~exchange.pack_rows`].
    """

    group: ProcessGroup | None
    layout: RankLayout
    kernel: AttentionKernel
    scale: float
    softcap: float | None
    keep_received_kv: bool

    @deterministic_algorithms(False)
    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Return out, lse and a list with the KV of each stage, which is empty if received KV is not kept."""
        stages = self.layout.stages(query.device)
        transfers = send_kv(key, value, self.layout, self.group)
        with named_range("local pass"):
            out, lse = self._local_forward(query, key, value)
        if self.layout.merges_again or sinks is not None:
            out = out.to(accumulate_dtype(out.dtype))
        received = []
        for number, (stage, transfer) in enumerate(zip(stages, transfers), 1):
            keys = _ordered(transfer.wait(), stage)
            if self.keep_received_kv:
                received.append(keys)
            if stage.rectangles:
                with named_range(f"stage {number}"):
                    part, part_lse = self.kernel.forward(
                        query, *split_rows(keys, key, value), stage.rectangles, self._options(stage.causal)
                    )
                if stage.causal:  # these rows had no keys yet
                    stage.rows.put(out, part, dim=1)
                    stage.rows.put(lse, part_lse, dim=1)
                else:
                    merge(out, lse, part, part_lse, stage.rows)
        if sinks is not None:
            out, lse = add_sinks(out, lse, sinks)
        return out.to(query.dtype), lse, received

    @deterministic_algorithms(False)
    def backward(self, inputs: BackwardInputs, received: Sequence[torch.Tensor], keys_need_grad: bool) -> Gradients:
        """Return dQ, dK and dV of this rank's tokens in the accumulate dtype.

        dK and dV are summed over the queries of all ranks.

        Args:
            inputs: tensors of the forward pass and the gradient of its output.
            received: KV of each stage as returned by `forward`; it is fetched again if it was not kept.
            keys_need_grad: the same on every rank. If False, no gradients travel, and dK and dV are meaningless.
        """
        _, query, key, value, _, _ = inputs
        stages = self.layout.stages(query.device)
        dtype = accumulate_dtype(query.dtype)
        grad_keys = key.new_zeros(key.shape[1], kv_width(key, value), dtype=dtype)
        grads = Gradients(torch.zeros_like(query, dtype=dtype), *split_rows(grad_keys, key, value))
        fetched = [] if self.keep_received_kv else send_kv(key, value, self.layout, self.group)
        if fetched:
            self._local_backward(inputs, grads)
        home = key.new_empty(self.layout.send_rows(key.device).count if stages else 0, grad_keys.shape[1])
        transfers = []
        for index, stage in enumerate(stages):
            keys = received[index] if self.keep_received_kv else _ordered(fetched[index].wait(), stage)
            with named_range(f"stage {index + 1}, backward"):
                wire, grad_local = self._stage_backward(stage, keys, inputs, grads.query)
            if keys_need_grad:
                transfers.append(send_grads_home(wire, home[stage.sent], stage, self.group))
                if grad_local is not None:
                    stage.local_rows.add(grad_keys, grad_local)
            del keys, wire, grad_local  # free them before the next stage allocates its own
        if not fetched:
            self._local_backward(inputs, grads)
        for transfer in transfers:
            transfer.wait()
        if transfers:
            with named_range("add returned gradients"):
                for group in self.layout.home_groups(key.device):
                    group.rows.add(grad_keys, home[group.span])
        return grads

    def _options(self, causal: bool) -> ScoreOptions:
        return ScoreOptions(causal, self.scale, self.layout.window if causal else None, self.softcap)

    def _local_forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output and logsumexp of the local rectangles. All other rows are uninitialized."""
        rows, rectangles, options = self.layout.local_rows(query.device), self.layout.local, self._options(True)
        if rows is None:
            return self.kernel.forward(query, key, value, rectangles, options)
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[-1]).transpose(0, 1)
        lse = query.new_empty(query.shape[:2], dtype=accumulate_dtype(query.dtype))
        if rectangles:
            part, part_lse = self.kernel.forward(query, key, value, rectangles, options)
            rows.put(out, part, dim=1)
            rows.put(lse, part_lse, dim=1)
        return out, lse

    def _local_backward(self, inputs: BackwardInputs, grads: Gradients) -> None:
        if self.layout.local:
            with named_range("local pass, backward"):
                self.kernel.backward(inputs, self.layout.local, self._options(True), grads)

    def _stage_backward(
        self, stage: Stage, keys: torch.Tensor, inputs: BackwardInputs, grad_query: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Add the stage's part to dQ, and return the gradients of its KV as split by [`_as_received`]."""
        _, _, own_key, own_value, _, _ = inputs
        grad = torch.zeros_like(keys, dtype=grad_query.dtype)
        if stage.rectangles:
            key, value = split_rows(keys, own_key, own_value)
            grads = Gradients(grad_query, *split_rows(grad, own_key, own_value))
            inputs = inputs._replace(key=key, value=value)
            self.kernel.backward(inputs, stage.rectangles, self._options(stage.causal), grads)
        return _as_received(grad, stage, own_key.dtype)


def _ordered(keys: torch.Tensor, stage: Stage) -> torch.Tensor:
    """Return the KV of a stage, (n_keys, width), in the order in which its rectangles address it."""
    return keys if stage.key_order is None else stage.key_order.take(keys)


def _as_received(grad: torch.Tensor, stage: Stage, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Reverse [`_ordered`] for gradients.

    Returns the gradients of the received rows, in `dtype` and in the order received, and the gradients of the local
    rows, or `None` if the stage has none.
    """
    if stage.local_rows is not None:
        rows = grad.new_zeros(stage.received + stage.local_rows.count, grad.shape[1])
        for group in stage.order_groups:
            group.rows.add(rows, grad[group.span])
        return rows[: stage.received].to(dtype), rows[stage.received :]
    if stage.key_order is None:
        return grad.to(dtype), None
    wire = grad.new_empty(grad.shape, dtype=dtype)
    stage.key_order.put(wire, grad)
    return wire, None
