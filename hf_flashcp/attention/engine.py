"""One layer's attention on one rank: which kernel runs when, what travels meanwhile, and how results are added up.

Sends depend on nothing but local KV, so forward posts all of them before the local pass, then awaits and merges stage
after stage. Backward runs the same rectangles with the merged output and logsumexp, remote ones first, so that their
dK and dV travel while the next stage and at last the local pass are computed. Where the received KV was not kept it is
fetched again, and the local pass goes first, while that travels. The README beside this file draws both.

Partial outputs of rows that merge more than once, dQ, dK and dV are summed in the accumulate dtype (at least fp32), in
one order on every run and device. Nothing here waits for a device: sizes and rectangles are known to the host.
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
    """How one layer runs under one plan; its methods are the layer's forward and backward.

    Shapes everywhere: query (H_q, T_r, D_k), key (H_kv, T_r, D_k), value (H_kv, T_r, D_v), out (H_q, T_r, D_v), lse
    (H_q, T_r) in the accumulate dtype; the keys of a stage (n, H_kv * (D_k + D_v)), see [`~exchange.pack_rows`].
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
        """Returns out, lse and the keys of each stage, an empty list if they are not kept."""
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
        """Returns dQ, and dK and dV of this rank's tokens summed over the queries of all ranks, in the accumulate
        dtype, from the keys of each stage as forward returned them; they are fetched again if they were not kept.
        Without `keys_need_grad`, the same on every rank, no gradient travels, and dK and dV mean nothing."""
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
            del keys, wire, grad_local  # before the next stage's are made
        if not fetched:
            self._local_backward(inputs, grads)
        for transfer in transfers:
            transfer.wait()
        if transfers:
            with named_range("add what came home"):
                for group in self.layout.home_groups(key.device):
                    group.rows.add(grad_keys, home[group.span])
        return grads

    def _options(self, causal: bool) -> ScoreOptions:
        return ScoreOptions(causal, self.scale, self.layout.window if causal else None, self.softcap)

    def _local_forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns output and logsumexp of the local rectangles; other rows are not written yet."""
        rows, rectangles, options = self.layout.local_rows(query.device), self.layout.local, self._options(True)
        if rows is None:
            return self.kernel.forward(query, key, value, rectangles, options)
        out = query.new_empty(*query.shape[:2], value.shape[-1])
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
        """Adds to dQ; returns the gradients of the stage's keys as [`_as_received`] splits them."""
        _, _, own_key, own_value, _, _ = inputs
        grad = torch.zeros_like(keys, dtype=grad_query.dtype)
        if stage.rectangles:
            key, value = split_rows(keys, own_key, own_value)
            grads = Gradients(grad_query, *split_rows(grad, own_key, own_value))
            inputs = inputs._replace(key=key, value=value)
            self.kernel.backward(inputs, stage.rectangles, self._options(stage.causal), grads)
        return _as_received(grad, stage, own_key.dtype)


def _ordered(keys: torch.Tensor, stage: Stage) -> torch.Tensor:
    """(n_keys, width): the keys of a stage as its rectangles find them."""
    return keys if stage.key_order is None else stage.key_order.take(keys)


def _as_received(grad: torch.Tensor, stage: Stage, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The transpose of [`_ordered`]: gradients of the received rows, in the order received and in `dtype`, and of the
    local ones."""
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
