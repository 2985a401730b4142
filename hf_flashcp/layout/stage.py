"""What one exchange brings and the attention that waits for it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .rows import Group, Rows


class Rectangle(NamedTuple):
    """Queries [q_start, q_stop) against keys [k_start, k_stop), as rows of a query and a key buffer; never empty."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int

    @property
    def queries(self) -> int:
        return self.q_stop - self.q_start

    @property
    def keys(self) -> int:
        return self.k_stop - self.k_start


class SecondStep(NamedTuple):
    """What a rank does in the second step of a hierarchical exchange, and with what both steps have brought."""

    handed_on: Rows  # rows that the first step brought, for one rank of the node after the other
    parts: tuple[Group, ...]  # `handed_on` by rank
    send_splits: list[int]  # rows of `handed_on` for each rank of the group
    recv_splits: list[int]  # rows that the second step brings from each
    needed: Rows  # rows that the first step brought and the rank itself needs
    first: Rows  # their places among all that the rank needs, source after source
    second: Rows  # the places there of what the second step brings, in its order

    def to(self, device: torch.device) -> SecondStep:
        return self._replace(
            handed_on=self.handed_on.to(device),
            parts=tuple(part.to(device) for part in self.parts),
            needed=self.needed.to(device),
            first=self.first.to(device),
            second=self.second.to(device),
        )


class Stage(NamedTuple):
    """One uneven all-to-all of KV, or two for a hierarchical exchange, and the attention that waits for it.

    `key_order` has the received rows followed by the local ones in the order in which the rectangles find their keys;
    a row may be named twice where there are local ones, else each comes once. It is `None` where the rectangles find
    them as they arrive.
    """

    sent: slice  # its rows in what the rank packs for all stages, by destination, in document order
    send_splits: list[int]  # rows for each rank of the group
    recv_splits: list[int]  # rows from each rank of the group
    second_step: SecondStep | None  # of a hierarchical exchange, whose first step the fields above describe
    local_rows: Rows | None  # rows of the rank's own KV, which join the received ones behind them
    key_order: Rows | None
    order_groups: tuple[Group, ...]  # `key_order` in groups in which no row comes twice
    rectangles: tuple[Rectangle, ...]  # local rows against rows of the ordered keys; disjoint, ascending queries
    causal: bool  # whether the rectangles are, aligned bottom-right; without a mask if not
    rows: Rows  # the local rows that the rectangles cover

    @property
    def received(self) -> int:
        """Number of rows that arrive and are needed."""
        if self.second_step is None:
            return sum(self.recv_splits)
        return self.second_step.first.count + self.second_step.second.count

    def to(self, device: torch.device) -> Stage:
        return self._replace(
            second_step=self.second_step and self.second_step.to(device),
            local_rows=self.local_rows and self.local_rows.to(device),
            key_order=self.key_order and self.key_order.to(device),
            order_groups=tuple(group.to(device) for group in self.order_groups),
            rows=self.rows.to(device),
        )
