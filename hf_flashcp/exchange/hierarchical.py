"""Exchanges in two steps, in which rows cross to a node once ([`~layout.hierarchical`] has the routes).

The second step begins when the first is done. On a GPU both run beside the local pass, on a stream of their own. A CPU
has no such stream: there the second step begins when its result is waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch

from ..layout import Stage
from .transfer import GRADIENTS, KEYS, AllToAll, Transfer


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_ON_KEYS, _ON_GRADIENTS = f"{KEYS} handed on inside nodes", f"{GRADIENTS} handed on inside nodes"


class HierarchicalTransfer:
    """Two transfers, awaited like one [`Transfer`]: `follow` posts the second step of the rows that the first one
    brought, waits for it and returns the result. `held` are the tensors that both use: the allocator must not reuse
    the memory of one stream while another reads it."""

    def __init__(
        self, first: Transfer, follow: Callable[[torch.Tensor], torch.Tensor], held: tuple[torch.Tensor, ...]
    ):
        self._first, self._follow, self._held = first, follow, held
        self._result: torch.Tensor | None = None
        self._done: torch.cuda.Event | None = None
        device = held[0].device
        if device.type == "cuda":
            stream = _stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                self._result = follow(first.wait())
                self._done = stream.record_event()

    def wait(self) -> torch.Tensor:
        if self._done is None:
            result = self._follow(self._first.wait())
        else:
            assert self._result is not None
            torch.cuda.current_stream(self._result.device).wait_event(self._done)
            result = self._result
        del self._first, self._follow, self._held, self._result
        return result


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def send_kv_over_nodes(
    packed: torch.Tensor, received: torch.Tensor, stage: Stage, group: ProcessGroup, result: torch.Tensor
) -> HierarchicalTransfer:
    """Posts the rows of a stage: `packed` (n, width) in the first step. What the rank needs is put into `received`
    (n_needed, width), source after source; `result` is returned when all of it has arrived."""
    step = stage.second_step
    assert step is not None
    arrived = packed.new_empty(sum(stage.recv_splits), packed.shape[1])

    def follow(arrived: torch.Tensor) -> torch.Tensor:
        passed = arrived.new_empty(step.second.count, arrived.shape[1])
        handed_on = step.handed_on.take(arrived)
        second = Transfer(AllToAll(handed_on, passed, step.send_splits, step.recv_splits, group, _ON_KEYS))
        step.first.put(received, step.needed.take(arrived))
        step.second.put(received, second.wait())
        return result

    first = Transfer(AllToAll(packed, arrived, stage.send_splits, stage.recv_splits, group))
    return HierarchicalTransfer(first, follow, (packed, arrived))


def send_grads_over_nodes(
    grad: torch.Tensor, home: torch.Tensor, stage: Stage, group: ProcessGroup
) -> HierarchicalTransfer:
    """Posts the gradients of what [`send_kv_over_nodes`] brought, along the same ways back. A rank that handed rows on
    adds up what comes back for each, at least in fp32, rank after rank. `grad` (n_needed, width) is contiguous; in
    `home` (n, width) the gradients of the rows that the rank sent arrive."""
    step = stage.second_step
    assert step is not None
    back = grad.new_empty(step.handed_on.count, grad.shape[1])

    def follow(back: torch.Tensor) -> torch.Tensor:
        total = grad.new_zeros(
            sum(stage.recv_splits), grad.shape[1], dtype=torch.promote_types(grad.dtype, torch.float32)
        )
        step.needed.put(total, step.first.take(grad))
        for part in step.parts:
            part.rows.add(total, back[part.span])
        summed = total.to(grad.dtype)
        return Transfer(AllToAll(summed, home, stage.recv_splits, stage.send_splits, group, GRADIENTS)).wait()

    away = step.second.take(grad)
    first = Transfer(AllToAll(away, back, step.recv_splits, step.send_splits, group, _ON_GRADIENTS))
    return HierarchicalTransfer(first, follow, (grad, away, back, home))
