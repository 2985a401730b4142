"""Debug mode (`FLASHCP_DEBUG=1`) of the attention: compares a layer's results with the formulas in float64.

Every rank compares its output and logsumexp in forward, and its dQ, dK and dV in backward.
[`~attention.float64_reference`] computes the expected values and how much rounding may change them.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch

from ..distributed import gather_numbers
from ..errors import ConfigurationError, FlashCPError
from ..layout import RankPlan
from .engine import Engine
from .float64_reference import Expected, KeySums, Reference
from .head_groups import GroupedEngine
from .kernels import ScoreOptions


DEFAULT_EVERY = 10
_NAMES = ("the output", "the logsumexp", "dQ", "dK", "dV")


def layer_to_check(forward: int, layers: int) -> int | None:
    """Return the index of the layer to check in a sharded forward and its backward, or `None` to check no layer.

    Every `FLASHCP_DEBUG_EVERY`th forward checks one layer, starting with the first layer and moving on by one each
    time.

    Args:
        forward: number of the sharded forward, counted from 0.
        layers: number of layers of the model.
    """
    every = os.environ.get("FLASHCP_DEBUG_EVERY", str(DEFAULT_EVERY))
    if not every.isdecimal() or int(every) == 0:
        raise ConfigurationError(f"FLASHCP_DEBUG_EVERY is {every!r}: it must be a positive whole number of forwards.")
    turn, rest = divmod(forward, int(every))
    return turn % layers if rest == 0 else None


class CheckedEngine:
    """An engine that compares the results of another one with the formulas in float64.

    Every rank of the group calls it. If a result deviates on any rank, forward or backward raises a `FlashCPError` on
    all ranks, which names the layer and the largest deviation on each affected rank.

    Forward and backward gather every KV head of the row: N T (D_k + D_v) e bytes per head, for at most T tokens on
    each of N ranks and e bytes per element. In backward, ranks also sum each head's dK, dV and limits in float64.

    Args:
        engine: computes the results.
        options: scale, window and softcap of the layer.
        plan: plan of the batch.
        layer: name of the layer.
        sinks: (H_q,) attention sinks, if the layer has them.
    """

    def __init__(
        self,
        engine: Engine | GroupedEngine,
        options: ScoreOptions,
        plan: RankPlan,
        layer: str,
        sinks: torch.Tensor | None,
    ):
        self._engine, self._options, self._plan, self._layer = engine, options, plan, layer
        self._sinks = None if sinks is None else sinks.detach()

    def forward(self, query, key, value, sinks):
        results = out, lse, _ = self._engine.forward(query, key, value, sinks)
        reference, deviations = self._begin(query.dtype)
        for head in reference.heads(key, value, len(query)):
            for block in reference.scores(head, query):
                deviations.compare("the output", out, reference.output(head, block))
                deviations.compare("the logsumexp", lse[..., None], reference.logsumexp(head, block))
        deviations.report(self._layer, query.device)
        return results

    def backward(self, inputs, received, keys_need_grad):
        grads = self._engine.backward(inputs, received, keys_need_grad)
        query = inputs.query
        reference, deviations = self._begin(query.dtype)
        for head in reference.heads(inputs.key, inputs.value, len(query)):
            sums = KeySums(head)
            for block in reference.scores(head, query):
                deviations.compare("dQ", grads.query, reference.grad_query(head, block, inputs.grad_out, sums))
            if keys_need_grad:
                grad_key, grad_value = reference.grads_of_keys(head, sums)
                deviations.compare("dK", grads.key, grad_key)
                deviations.compare("dV", grads.value, grad_value)
        deviations.report(self._layer, query.device)
        return grads

    def _begin(self, dtype: torch.dtype) -> tuple[Reference, _Deviations]:
        return Reference(self._plan, self._options, self._sinks, dtype), _Deviations(self._plan, dtype)


class _Deviation(NamedTuple):
    """The deviation of one row of one result. All fields are floats, so that ranks can exchange them."""

    excess: float = 0.0  # error / limit; 0 if nothing deviates
    name: float = 0.0  # index of the result in `_NAMES`
    document: float = 0.0
    position: float = 0.0
    head: float = 0.0
    error: float = 0.0  # 2-norm of the difference
    limit: float = 0.0  # largest 2-norm that rounding explains


class _Deviations:
    def __init__(self, plan: RankPlan, dtype: torch.dtype):
        self._plan, self._dtype = plan, dtype
        self._worst = _Deviation()

    def compare(self, name: str, ours: torch.Tensor, expected: Expected) -> None:
        """Compare rows of a result `ours` (heads, T_r, D) with the expected values.

        Rows whose expected values are not finite are skipped. In fp16, so are rows that are not finite in `ours`:
        kernels can overflow where float64 does not, and loss scaling handles that.
        """
        found = ours[expected.heads, expected.rows].double()
        errors = (found - expected.values).norm(dim=-1)
        known = expected.values.isfinite().all(-1) & expected.limits.isfinite()
        if self._dtype == torch.float16:
            known &= found.isfinite().all(-1)
        excess = torch.where(known & ~(errors <= expected.limits), errors / expected.limits, 0).nan_to_num(
            nan=math.inf
        )
        if excess.numel() == 0 or float(excess.max()) <= self._worst.excess:
            return
        head, row = divmod(int(excess.argmax()), excess.shape[1])
        local_row = expected.rows.start + row
        piece = max(piece for piece in self._plan.layout.slices if piece.row <= local_row)
        self._worst = _Deviation(
            excess=float(excess[head, row]),
            name=float(_NAMES.index(name)),
            document=float(piece.document),
            position=float(piece.start + local_row - piece.row),
            head=float(expected.heads.start + head),
            error=float(errors[head, row]),
            limit=float(expected.limits[head, row]),
        )

    def report(self, layer: str, device: torch.device) -> None:
        """Gather the deviations of all ranks, and raise the same error on each rank if there are any."""
        group = self._plan.group
        ranks = [0] if group is None else torch.distributed.get_process_group_ranks(group)
        found = [_Deviation(*numbers) for numbers in gather_numbers(self._worst, device, group)]
        problems = [
            f"{_NAMES[int(worst.name)]} of document {int(worst.document)} at token {int(worst.position)}, head "
            f"{int(worst.head)}, on rank {rank} is off by {worst.error:.2g}, but rounding explains at most "
            f"{worst.limit:.2g}"
            for rank, worst in zip(ranks, found)
            if worst.excess > 0
        ]
        if problems:
            raise FlashCPError(
                f"Attention of {layer} in {str(self._dtype).removeprefix('torch.')} does not match the float64 "
                f"reference: {'; '.join(problems)}. A kernel, the exchange or the merging of results is wrong, or "
                "memory was overwritten: see debug mode in docs/troubleshooting.md."
            )
