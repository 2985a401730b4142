"""`Stage`: one exchange of KV and the attention that waits for it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..plan.ranges import Ranges
from ..plan.rectangles import Rectangle, StageKeys
from .parts import Parts
from .routes import Routes
from .rows import Rows
from .second_step import SecondStep


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

    @classmethod
    def of(cls, causal: bool, device: torch.device, routes: Routes, keys: StageKeys, begin: int) -> Stage:
        """Return a stage whose rows begin at `begin` among all rows that the rank sends."""
        order = None if keys.order is None else Rows(keys.order).to(device)
        own = None if keys.own is None or not keys.own.total else Rows(keys.own).to(device)
        received = sum(routes.recv_splits)
        if routes.second_step is not None:
            received = routes.second_step.first.count + routes.second_step.second.count
        in_order = Rows(Ranges.of([(0, received)]), device) if order is None else order
        return cls(
            sent=slice(begin, begin + sum(routes.send_splits)),
            send_splits=routes.send_splits,
            recv_splits=routes.recv_splits,
            second_step=routes.second_step and routes.second_step.to(device),
            local_rows=own,
            key_order=order,
            gradients=Parts.of(in_order, received + (own.count if own else 0), device),
            rectangles=keys.rectangles,
            causal=causal,
        )

    @property
    def received(self) -> int:
        """Number of received rows that the rank itself needs."""
        if self.second_step is None:
            return sum(self.recv_splits)
        return self.second_step.first.count + self.second_step.second.count
