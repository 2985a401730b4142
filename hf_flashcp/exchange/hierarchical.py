"""The hierarchical exchange, in two steps: rows cross to each node once and are then forwarded inside it.

[`~layout.hierarchical`] computes the routes. The second step starts when the first is done. On a GPU this happens on
two streams beside the local pass: one starts second steps as soon as rows arrive, the other puts their results in
place. The steps have separate process groups, so a stage never waits for the second step of the stage before. On a
CPU, which has no streams, the second step starts when its result is awaited.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch

from ..distributed.exchange_group import second_step_group
from ..layout import Stage
from ..layout.sums import sum_parts
from .transfer import AllToAll, Transfer


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_FORWARDED = "{} forwarded inside nodes"


class HierarchicalTransfer:
    """Two consecutive transfers that are awaited like one [`Transfer`].

    Args:
        first: transfer of the first step.
        forward: function that takes the rows received by `first`, and returns the rows of the second step.
        finish: function that takes the rows received in both steps, and returns the result.
        held: further tensors that the steps use. They are kept alive until the end, as are all rows, because the
            allocator must not reuse memory of one stream while another stream reads it.
    """

    def __init__(
        self,
        first: Transfer,
        forward: Callable[[torch.Tensor], AllToAll],
        finish: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        held: tuple[torch.Tensor, ...],
    ):
        self._first, self._forward, self._finish, self._held = first, forward, finish, held
        self._result: torch.Tensor | None = None
        self._done: torch.cuda.Event | None = None
        device = held[0].device
        if device.type == "cuda":
            forwarding, finishing = _streams(device)
            forwarding.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(forwarding):
                started = self._start_second()
            finishing.wait_stream(forwarding)
            with torch.cuda.stream(finishing):
                self._result = self._end_second(*started)
                self._done = finishing.record_event()

    def _start_second(self) -> tuple[torch.Tensor, Transfer]:
        arrived = self._first.wait()
        rows = self._forward(arrived)
        self._held += (arrived, rows.sent, rows.received)
        return arrived, Transfer(rows)

    def _end_second(self, arrived: torch.Tensor, second: Transfer) -> torch.Tensor:
        return self._finish(arrived, second.wait())

    def wait(self) -> torch.Tensor:
        if self._done is None:
            result = self._end_second(*self._start_second())
        else:
            assert self._result is not None
            torch.cuda.current_stream(self._result.device).wait_event(self._done)
            result = self._result
        del self._first, self._forward, self._finish, self._held, self._result
        return result


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    # Their copies must not wait until attention kernels of the local pass leave room.
    return torch.cuda.Stream(device, priority=-1), torch.cuda.Stream(device, priority=-1)


def send_rows_over_nodes(
    packed: torch.Tensor, received: torch.Tensor, stage: Stage, group: ProcessGroup, result: torch.Tensor, what: str
) -> HierarchicalTransfer:
    """Post the rows `packed` (n, width) that this rank sends in the first step of a stage.

    The rows that this rank needs are written to `received` (n_needed, width), ordered by source rank. The transfer
    returns `result` when all of them have arrived.
    """
    step = stage.second_step
    assert step is not None
    arrived = packed.new_empty(sum(stage.recv_splits), packed.shape[1])
    inside = second_step_group(group)

    def forward(arrived: torch.Tensor) -> AllToAll:
        buffer = arrived.new_empty(step.second.count, arrived.shape[1])
        forwarded = step.forwarded.take(arrived)
        return AllToAll(forwarded, buffer, step.send_splits, step.recv_splits, inside, _FORWARDED.format(what))

    def finish(arrived: torch.Tensor, arrived_second: torch.Tensor) -> torch.Tensor:
        step.first.put(received, step.needed.take(arrived))
        step.second.put(received, arrived_second)
        return result

    first = Transfer(AllToAll(packed, arrived, stage.send_splits, stage.recv_splits, group, what))
    return HierarchicalTransfer(first, forward, finish, (packed,))


def return_grads_over_nodes(
    grad: torch.Tensor, returned: torch.Tensor, stage: Stage, group: ProcessGroup, what: str
) -> HierarchicalTransfer:
    """Post the gradients of the rows that [`send_rows_over_nodes`] delivered, along the same routes in reverse.

    A rank that forwarded rows sums the gradients that come back for each of them, in at least fp32 and in the order of
    ranks.

    Args:
        grad: (n_needed, width), contiguous; gradients of the rows that this rank received.
        returned: (n, width); receives the gradients of the rows that this rank sent.
        stage: stage of the exchange.
        group: process group of the exchange.
        what: name of the rows in errors and profiles.
    """
    step = stage.second_step
    assert step is not None
    back = grad.new_empty(step.forwarded.count, grad.shape[1])
    inside = second_step_group(group)

    def forward(back: torch.Tensor) -> AllToAll:
        parts = [step.first.take(grad)[None], *step.sums.split(back[None], first=1)]
        summed = sum_parts(parts, step.sums, grad[None])[0]
        return AllToAll(summed, returned, stage.recv_splits, stage.send_splits, group, what)

    outgoing = step.second.take(grad)
    first = Transfer(AllToAll(outgoing, back, step.recv_splits, step.send_splits, inside, _FORWARDED.format(what)))
    return HierarchicalTransfer(first, forward, lambda _, arrived: arrived, (grad, outgoing))
