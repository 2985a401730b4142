"""The attention of one layer on one rank: the order of kernel calls and transfers, and how their results are combined.

The rows that a rank sends depend only on its local KV. So forward posts all transfers before the local pass, computes
the stages as they arrive, and merges all partial outputs at the end. Backward runs the same rectangles with the merged
output and logsumexp. It starts with the received rectangles, so that their dK and dV travel while the next stages and
the local pass are computed. If the received KV was not kept, backward fetches it again and runs the local pass during
that transfer. The README in this folder shows both schedules.

Results of the local pass are final where no other rectangle and no other rank contributes. Elsewhere contributions are
added in the accumulate dtype (at least fp32) and rounded once, in the same order on every run and device. Nothing here
waits for a device, because the host knows all sizes and rectangles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..exchange import kv_width, named_range, return_grads, send_kv, split_rows
from ..layout import RankLayout, Stage
from ..layout.sums import sum_parts
from .determinism import deterministic_algorithms
from .kernels import AttentionKernel, BackwardInputs, Gradients, ScoreOptions
from .merge import merge_parts


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
        parts, received = [], []
        if self.layout.local:
            with named_range("local pass"):
                parts.append(self.kernel.forward(query, key, value, self.layout.local, self.options(True)))
        for number, (stage, transfer) in enumerate(zip(stages, transfers), 1):
            keys = _ordered(transfer.wait(), stage)
            if self.keep_received_kv:
                received.append(keys)
            if stage.rectangles:
                with named_range(f"stage {number}"):
                    seen = split_rows(keys, key, value)
                    parts.append(self.kernel.forward(query, *seen, stage.rectangles, self.options(stage.causal)))
        out, lse = merge_parts(parts, self.layout.outputs(query.device), sinks)
        return out, lse, received

    @deterministic_algorithms(False)
    def backward(self, inputs: BackwardInputs, received: Sequence[torch.Tensor], keys_need_grad: bool) -> Gradients:
        """Return dQ, dK and dV of this rank's tokens in their dtypes.

        dK and dV are summed over the queries of all ranks.

        Args:
            inputs: tensors of the forward pass and the gradient of its output.
            received: KV of each stage as returned by `forward`; it is fetched again if it was not kept.
            keys_need_grad: the same on every rank. If False, no gradients travel, and dK and dV are `None`.
        """
        _, query, key, value, _, _ = inputs
        stages = self.layout.stages(query.device)
        fetched = [] if self.keep_received_kv else send_kv(key, value, self.layout, self.group)
        local = self._local_backward(inputs) if fetched else []
        returned = key.new_empty(self.layout.send_rows(key.device).count, kv_width(key, value))
        of_stages, own_rows, transfers = [], [], []
        for index, stage in enumerate(stages):
            keys = received[index] if self.keep_received_kv else _ordered(fetched[index].wait(), stage)
            if stage.rectangles:
                with named_range(f"stage {index + 1}, backward"):
                    seen = inputs._replace(**dict(zip(("key", "value"), split_rows(keys, key, value))))
                    grads = self.kernel.backward(seen, stage.rectangles, self.options(stage.causal))
                of_stages.append(grads.query)
            if keys_need_grad:
                rows = _as_received(grads if stage.rectangles else None, stage, key, value)
                transfers.append(return_grads(rows[: stage.received], returned[stage.sent], stage, self.group))
                if stage.local_rows is not None:
                    own_rows.append(rows[stage.received :])
            keys = seen = grads = rows = None  # free them before the next stage allocates its own
        local = local if fetched else self._local_backward(inputs)
        outputs = self.layout.outputs(query.device)
        grad_query = sum_parts([*(each.query for each in local), *of_stages], outputs, query)
        if not keys_need_grad:
            return Gradients(grad_query, None, None)
        for transfer in transfers:
            transfer.wait()
        with named_range("add returned gradients"):
            return Gradients(grad_query, *self._key_gradients(local, [*own_rows, returned], key, value))

    def options(self, causal: bool) -> ScoreOptions:
        """Return the options of a kernel call."""
        return ScoreOptions(causal, self.scale, self.layout.window if causal else None, self.softcap)

    def _local_backward(self, inputs: BackwardInputs) -> list[Gradients]:
        """Return the gradients of the local pass, or an empty list if it has no rectangles."""
        if not self.layout.local:
            return []
        with named_range("local pass, backward"):
            return [self.kernel.backward(inputs, self.layout.local, self.options(True))]

    def _key_gradients(
        self, local: list[Gradients], rows: list[torch.Tensor], key: torch.Tensor, value: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """Return dK and dV of this rank's tokens, from the local pass and from `rows`, see
        [`RankLayout.key_gradients`]."""
        where = self.layout.key_gradients(key.device)
        local_keys, local_values = [each.key for each in local], [each.value for each in local]
        other_keys, other_values = zip(*(split_rows(each, key, value) for each in rows))
        for like, of_local, (*own, returned) in (key, local_keys, other_keys), (value, local_values, other_values):
            parts = [*of_local, *own]
            yield sum_parts([*parts, *where.split(returned, len(parts))], where, like)


def _ordered(keys: torch.Tensor, stage: Stage) -> torch.Tensor:
    """Return the KV of a stage, (n_keys, width), in the order in which its rectangles address it."""
    return keys if stage.key_order is None else stage.key_order.take(keys)


def _as_received(grads: Gradients | None, stage: Stage, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Reverse [`_ordered`] for the gradients of a stage's keys, which are 0 if there are none.

    Returns the gradients of the received rows in the order received, and then those of the stage's local rows, as
    (n, width) in the format of [`~exchange.pack_rows`].
    """
    rows = key.new_empty(stage.gradients.count, kv_width(key, value))
    if grads is None:
        return rows.zero_()
    for grad, out in zip((grads.key, grads.value), split_rows(rows, key, value)):
        sum_parts(stage.gradients.split(grad), stage.gradients, out, out=out)
    return rows
