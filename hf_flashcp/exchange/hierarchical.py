"""The hierarchical exchange, in two steps: rows cross to each node once and are then forwarded inside it.

[`~layout.hierarchical`] computes the routes. The second step starts when the first is done. On a GPU both run on a
separate stream, beside the local pass. On a CPU, which has no streams, the second step starts when its result is
awaited.
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


_FORWARDED_KEYS = f"{KEYS} forwarded inside nodes"
_FORWARDED_GRADIENTS = f"{GRADIENTS} forwarded inside nodes"


class HierarchicalTransfer:
    """Two consecutive transfers that are awaited like one [`Transfer`].

    Args:
        first: transfer of the first step.
        follow: function that takes the rows received by `first`, posts the second step, waits for it and returns the
            result.
        held: tensors that both steps use. They are kept alive until the end, because the allocator must not reuse
            memory of one stream while another stream reads it.
    """

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
    """Post the rows `packed` (n, width) that this rank sends in the first step of a stage.

    The rows that this rank needs are written to `received` (n_needed, width), ordered by source rank. The transfer
    returns `result` when all of them have arrived.
    """
    step = stage.second_step
    assert step is not None
    arrived = packed.new_empty(sum(stage.recv_splits), packed.shape[1])

    def follow(arrived: torch.Tensor) -> torch.Tensor:
        arrived_second = arrived.new_empty(step.second.count, arrived.shape[1])
        forwarded = step.handed_on.take(arrived)
        splits = step.send_splits, step.recv_splits
        second = Transfer(AllToAll(forwarded, arrived_second, *splits, group, _FORWARDED_KEYS))
        step.first.put(received, step.needed.take(arrived))
        step.second.put(received, second.wait())
        return result

    first = Transfer(AllToAll(packed, arrived, stage.send_splits, stage.recv_splits, group))
    return HierarchicalTransfer(first, follow, (packed, arrived))


def send_grads_over_nodes(
    grad: torch.Tensor, home: torch.Tensor, stage: Stage, group: ProcessGroup
) -> HierarchicalTransfer:
    """Post the gradients of the rows that [`send_kv_over_nodes`] delivered, along the same routes in reverse.

    A rank that forwarded rows sums the gradients that come back for each of them, in at least fp32 and in the order of
    ranks.

    Args:
        grad: (n_needed, width), contiguous; gradients of the rows that this rank received.
        home: (n, width); receives the gradients of the rows that this rank sent.
        stage: stage of the exchange.
        group: process group of the exchange.
    """
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

    outgoing = step.second.take(grad)
    first = Transfer(AllToAll(outgoing, back, step.recv_splits, step.send_splits, group, _FORWARDED_GRADIENTS))
    return HierarchicalTransfer(first, follow, (grad, outgoing, back, home))
