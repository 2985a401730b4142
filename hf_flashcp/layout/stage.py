"""`Stage`: one exchange of KV and the attention that waits for it."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from ..plan.rectangles import Rectangle
from .parts import Parts
from .rows import Rows


class SecondStep(NamedTuple):
    """What a rank forwards in the second step of a hierarchical exchange, and where it puts the rows of both steps."""

    forwarded: Rows  # rows from the first step that the rank forwards, by destination
    send_splits: list[int]  # number of rows of `forwarded` for each rank of the group
    recv_splits: list[int]  # number of rows that the second step brings from each rank
    needed: Rows  # rows from the first step that the rank itself needs
    first: Rows  # places of these rows among all rows that the rank needs, which are ordered by source
    second: Rows  # places there of the rows that the second step brings, in order of arrival
    sums: Parts  # rows from the first step: the `needed` ones, and those that are forwarded to each destination

    def to(self, device: torch.device) -> SecondStep:
        forwarded, needed = self.forwarded.to(device), self.needed.to(device)
        ends = [0, *accumulate(rows.count for rows in self.sums.rows[1:])]
        by_destination = forwarded.parts([slice(*span) for span in pairwise(ends)])
        return self._replace(
            forwarded=forwarded,
            needed=needed,
            first=self.first.to(device),
            second=self.second.to(device),
            sums=Parts([needed, *by_destination], self.sums.count, device),
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
    gradients: Parts  # the rows of `key_order`, or all received rows, as the gradients of the keys come in that order
    rectangles: tuple[Rectangle, ...]  # local rows against rows of the ordered keys; disjoint, ascending queries
    causal: bool  # whether the rectangles have a causal mask, aligned bottom-right; if not, they have no mask

    @property
    def received(self) -> int:
        """Number of received rows that the rank itself needs."""
        if self.second_step is None:
            return sum(self.recv_splits)
        return self.second_step.first.count + self.second_step.second.count
