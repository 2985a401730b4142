"""`Stage`: one exchange of KV and the attention that waits for it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..plan.rectangles import Rectangle
from .rows import Group, Rows


class SecondStep(NamedTuple):
    """What a rank forwards in the second step of a hierarchical exchange, and where it puts the rows of both steps."""

    handed_on: Rows  # rows from the first step that the rank forwards, by destination
    parts: tuple[Group, ...]  # `handed_on`, one group per destination
    send_splits: list[int]  # number of rows of `handed_on` for each rank of the group
    recv_splits: list[int]  # number of rows that the second step brings from each rank
    needed: Rows  # rows from the first step that the rank itself needs
    first: Rows  # places of these rows among all rows that the rank needs, which are ordered by source
    second: Rows  # places there of the rows that the second step brings, in order of arrival

    def to(self, device: torch.device) -> SecondStep:
        return self._replace(
            handed_on=self.handed_on.to(device),
            parts=tuple(part.to(device) for part in self.parts),
            needed=self.needed.to(device),
            first=self.first.to(device),
            second=self.second.to(device),
        )


class Stage(NamedTuple):
    """One uneven all-to-all of KV (two in a hierarchical exchange) and the attention that waits for it.

    `key_order` lists rows of the received KV followed by `local_rows`, in the order in which the rectangles expect
    their keys. A row may occur twice if there are local rows; otherwise each occurs once. `key_order` is `None` if the
    rectangles use the keys in order of arrival.
    """

    sent: slice  # the stage's part of the rows that the rank packs for all stages, by destination, in document order
    send_splits: list[int]  # number of rows for each rank of the group
    recv_splits: list[int]  # number of rows from each rank of the group
    second_step: SecondStep | None  # of a hierarchical exchange, whose first step the fields above describe
    local_rows: Rows | None  # rows of the rank's own KV that are appended to the received rows
    key_order: Rows | None
    order_groups: tuple[Group, ...]  # `key_order` in groups in which no row occurs twice
    rectangles: tuple[Rectangle, ...]  # local rows against rows of the ordered keys; disjoint, ascending queries
    causal: bool  # whether the rectangles have a causal mask, aligned bottom-right; if not, they have no mask
    rows: Rows  # the local rows that the rectangles cover

    @property
    def received(self) -> int:
        """Number of received rows that the rank itself needs."""
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
