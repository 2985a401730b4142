"""What one exchange brings and the attention that waits for it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .hierarchical import SecondStep
from .rows import Rows


class Rectangle(NamedTuple):
    """Queries [q_start, q_stop) against keys [k_start, k_stop), as rows of a query and a key buffer; never empty."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int


class Stage(NamedTuple):
    """One uneven all-to-all of KV, or two for a hierarchical exchange, and the attention that waits for it.

    Attributes:
        sent (`slice`): its rows in what the rank packs for all stages together, destination after destination, in
            document order.
        send_splits (`list[int]`): rows for each rank of the group.
        recv_splits (`list[int]`): rows from each rank of the group.
        local_rows (`Rows`, *optional*): of the rank's own KV, which join the received behind them.
        key_order (`Rows`, *optional*): the received rows followed by the local ones in the order in which the
            rectangles find their keys; a row may be named twice where there are local ones, else each comes once.
            `None` where the rectangles find them as they arrive.
        order_groups (`tuple[tuple[slice, Rows], ...]`): `key_order` in groups in which no row comes twice.
        rectangles (`tuple[Rectangle, ...]`): local rows against rows of the ordered keys. Query ranges are disjoint
            and ascending.
        causal (`bool`): whether the rectangles are causal, aligned bottom-right; without a mask if not.
        rows (`Rows`): the local rows that the rectangles cover.
        second_step (`SecondStep`, *optional*): the second step of an exchange over several nodes, of which `sent`,
            `send_splits` and `recv_splits` are the first.
    """

    sent: slice
    send_splits: list[int]
    recv_splits: list[int]
    local_rows: Rows | None
    key_order: Rows | None
    order_groups: tuple[tuple[slice, Rows], ...]
    rectangles: tuple[Rectangle, ...]
    causal: bool
    rows: Rows
    second_step: SecondStep | None = None

    @property
    def received(self) -> int:
        """Rows that arrive and are needed."""
        return (
            sum(self.recv_splits)
            if self.second_step is None
            else self.second_step.first.count + self.second_step.second.count
        )

    def to(self, device: torch.device) -> Stage:
        return self._replace(
            local_rows=self.local_rows and self.local_rows.to(device),
            key_order=self.key_order and self.key_order.to(device),
            order_groups=groups_to(self.order_groups, device),
            rows=self.rows.to(device),
            second_step=self.second_step and self.second_step.to(device),
        )


def groups_to(groups: tuple[tuple[slice, Rows], ...], device: torch.device) -> tuple[tuple[slice, Rows], ...]:
    return tuple((part, rows.to(device)) for part, rows in groups)
