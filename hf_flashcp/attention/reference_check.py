"""Debug mode (`FLASHCP_DEBUG=1`) of the attention: a layer's results are held against the formulas in float64.

Every rank compares its output and logsumexp; in backward dQ, and dK and dV, to which all ranks' queries add.
[`~attention.float64_reference`] computes what they should be and how far rounding may take them from it.
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
from .kernels import ScoreOptions


DEFAULT_EVERY = 10
_NAMES = ("the output", "the logsumexp", "dQ", "dK", "dV")


def layer_to_check(forward: int, layers: int) -> int | None:
    """Returns which of a model's `layers` is checked in its sharded forward number `forward`, from 0, and in the
    backward of that: one in every `FLASHCP_DEBUG_EVERY`th, each time the next."""
    every = os.environ.get("FLASHCP_DEBUG_EVERY", str(DEFAULT_EVERY))
    if not every.isdecimal() or int(every) == 0:
        raise ConfigurationError(f"FLASHCP_DEBUG_EVERY is {every!r}: it must be a whole number of forwards, from 1.")
    turn, rest = divmod(forward, int(every))
    return turn % layers if rest == 0 else None


class CheckedEngine:
    """An [`Engine`] whose results are compared. Every rank of the group calls it; in forward or in backward it raises
    a `FlashCPError` on all of them with the `layer` and the largest deviation of each rank that has one."""

    def __init__(self, engine: Engine, plan: RankPlan, layer: str, sinks: torch.Tensor | None):
        self._engine, self._plan, self._layer = engine, plan, layer
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
        options = ScoreOptions(True, self._engine.scale, self._engine.layout.window, self._engine.softcap)
        return Reference(self._plan, options, self._sinks, dtype), _Deviations(self._plan, dtype)


class _Deviation(NamedTuple):
    """By how much one row of one result is off; all numbers, so that ranks can exchange them."""

    excess: float = 0.0  # error / limit, 0 where there is no deviation
    name: float = 0.0  # the result, as an index of `_NAMES`
    document: float = 0.0
    position: float = 0.0
    head: float = 0.0
    error: float = 0.0  # in the 2-norm, like `limit`
    limit: float = 0.0


class _Deviations:
    def __init__(self, plan: RankPlan, dtype: torch.dtype):
        self._plan, self._dtype = plan, dtype
        self._worst = _Deviation()

    def compare(self, name: str, ours: torch.Tensor, expected: Expected) -> None:
        """Compares rows of a result (heads, T_r, D) with what float64 gives. Where data are not finite there is
        nothing to compare. In fp16 kernels overflow on the way to what float64 finds finite, on any device; loss
        scaling sees that."""
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
        """Gathers the deviations of all ranks; raises the same error on each if there is any."""
        group = self._plan.group
        ranks = [0] if group is None else torch.distributed.get_process_group_ranks(group)
        found = [_Deviation(*numbers) for numbers in gather_numbers(self._worst, device, group)]
        problems = [
            f"{_NAMES[int(worst.name)]} of document {int(worst.document)} at token {int(worst.position)}, head "
            f"{int(worst.head)}, on rank {rank} is off by {worst.error:.2g}, where rounding explains {worst.limit:.2g}"
            for rank, worst in zip(ranks, found)
            if worst.excess > 0
        ]
        if problems:
            raise FlashCPError(
                f"Attention of {layer} in {str(self._dtype).removeprefix('torch.')} is not what float64 gives: "
                f"{'; '.join(problems)}. A kernel, the exchange or what merges them is wrong there, or memory was "
                "overwritten: see docs/troubleshooting.md, what debug mode found."
            )
