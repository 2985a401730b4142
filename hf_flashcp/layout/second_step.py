"""`SecondStep`: what a rank does in the second step of a hierarchical exchange."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

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
