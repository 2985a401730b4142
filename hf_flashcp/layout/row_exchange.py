"""`RowExchange`: the index maps with which one rank sends rows to other ranks, for layers other than attention."""

from __future__ import annotations

import numpy as np
import torch

from ..plan import ShardPlan
from ..plan.ranges import Ranges, overlaps
from ..plan.rectangles import StageKeys
from ..plan.stage_traffic import stage_traffic
from .hierarchical import hierarchical_routes
from .routes import direct_routes
from .rows import Rows
from .stage import Stage


class RowExchange:
    """The index maps of one rank for an exchange in one stage, of rows that later slices of a document need.

    Like [`RankLayout`] it has `stages` and `send_rows`, so that both kinds of exchange run alike.

    Args:
        plan (`ShardPlan`): a plan, in which ranks may be empty.
        rank (`int`): rank within the plan.
        window (`int`, *optional*): number of tokens that a token needs, its own included; all earlier tokens of its
            document if `None`.
    """

    def __init__(self, plan: ShardPlan, rank: int, window: int | None = None):
        routes_of = direct_routes if plan.ranks_per_node is None else hierarchical_routes
        traffic = stage_traffic(plan, window)
        self._routes = [routes_of(stage, rank) for stage in traffic]
        self.own = plan.slice_table.of_rank(rank)
        spans, rows = [self.own.spans], [self.own.rows]
        for stage in traffic:
            received = stage.received(rank).spans
            spans.append(received)
            rows.append(self.own.spans.total + np.cumsum(received.lengths) - received.lengths)
        self._spans, self._rows = Ranges.concatenated(spans), np.concatenate(rows)
        ascending = np.argsort(self._spans.starts, kind="stable")
        self._spans, self._rows = self._spans.select(ascending), self._rows[ascending]
        self._on: dict[torch.device, tuple[tuple[Stage, ...], Rows]] = {}

    def places(self, positions: Ranges) -> Ranges:
        """Return where tokens lie among the rank's own rows followed by the received rows, in order of arrival.

        `positions` are those of a [`SliceTable`], none of them empty.
        """
        found = overlaps(positions, self._spans)
        starts = self._rows[found.second] + found.common.starts - self._spans.starts[found.second]
        places = Ranges(starts, starts + found.common.lengths)
        assert places.total == positions.total
        return places

    def stages(self, device: torch.device) -> tuple[Stage, ...]:
        """Return one stage, or none if no rank needs any row, with its index tensors on `device`."""
        return self._maps(device)[0]

    def send_rows(self, device: torch.device) -> Rows:
        """Return the local rows that other ranks need, (n_sent,). A row may occur several times."""
        return self._maps(device)[1]

    def _maps(self, device: torch.device) -> tuple[tuple[Stage, ...], Rows]:
        if device not in self._on:
            sent = Rows(Ranges.concatenated([routes.sent for routes in self._routes])).to(device)
            stages = tuple(Stage.of(False, device, routes, StageKeys(()), 0) for routes in self._routes)
            self._on[device] = stages, sent
        return self._on[device]
