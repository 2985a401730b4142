"""`RankLayout`: everything that a rank needs to know about a plan, as index maps that are built once per batch.

[`~plan.rectangles`] draws which rows attend to which keys, and in which order they are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from ..plan import ShardPlan
from ..plan.rectangles import Rectangle, local_rectangles, stage_keys, stage_traffic
from ..plan.stage_traffic import StageTraffic, local_slices
from .hierarchical import hierarchical_routes
from .routes import Routes, direct_routes, rows_of_slices
from .rows import Group, Rows, concatenated, distinct_groups, row_numbers
from .stage import Stage


class RankLayout:
    """The index maps of one rank under a valid plan, for layers with full attention or with a sliding window.

    In full attention each of the plan's `offset_groups` is a stage, except those in which no rank needs any rows. With
    a window there is at most one stage.

    Args:
        plan (`ShardPlan`): a valid plan.
        rank (`int`): rank within the plan.
        window (`int`, *optional*): number of keys that a query sees, its own included: the `sliding_window` of
            transformers, at least 1. Full attention if `None`.

    Attributes:
        local (`tuple[Rectangle, ...]`): attention among the rank's own rows, which needs no exchange. The rectangles
            are causal and aligned bottom-right.
        merges_again (`bool`): whether some row is covered by several stages.
        window (`int`, *optional*): the sliding window.
    """

    def __init__(self, plan: ShardPlan, rank: int, window: int | None = None):
        self.window = window
        self.longest_document = plan.longest_document
        self.slices = local_slices(plan.slices[rank])
        self.num_tokens = sum(piece.tokens for piece in self.slices)
        self._plan, self._rank = plan, rank
        self.local = local_rectangles(self.slices, window)
        routes_of = direct_routes if plan.ranks_per_node is None else hierarchical_routes
        routes = [routes_of(traffic, rank) for traffic in self._stage_traffic()]
        self._sent = concatenated([of_stage.sent for of_stage in routes])
        begins = accumulate((len(of_stage.sent) for of_stage in routes), initial=0)
        self._stages = tuple(self._stage(of_stage, begin) for of_stage, begin in zip(routes, begins))
        covered = row_numbers((r.q_start, r.q_stop) for stage in self._stages for r in stage.rectangles)
        self.merges_again = bool((np.bincount(covered) > 1).any())
        self._maps_on: dict[torch.device, _Maps] = {}

    def _stage_traffic(self) -> list[StageTraffic]:
        """Return what travels in each stage. `AllGatherLayout` of the benchmarks sends more."""
        return stage_traffic(self._plan, self.window)

    @cached_property
    def token_index(self) -> torch.Tensor:
        """Positions of this rank's tokens in the packed row, (T_r,) int64."""
        return torch.from_numpy(token_index(self._plan, self._rank))

    def stages(self, device: torch.device) -> tuple[Stage, ...]:
        """Return the stages, with their index tensors on `device`. Every rank of the group has equally many."""
        return self._on(device).stages

    def send_rows(self, device: torch.device) -> Rows:
        """Return the local rows that other ranks need, (n_sent,), stage by stage. A row may occur several times."""
        return self._on(device).send_rows

    def home_groups(self, device: torch.device) -> tuple[Group, ...]:
        """Return `send_rows` in groups in which no row occurs twice.

        Gradients that are added group by group are summed in the same order on every device.
        """
        return self._on(device).home_groups

    def local_rows(self, device: torch.device) -> Rows | None:
        """Return the rows that `local` covers, or `None` if it covers all local rows."""
        return self._on(device).local_rows

    def _on(self, device: torch.device) -> _Maps:
        """Return the maps on `device`, which are copied there once."""
        if device not in self._maps_on:
            local = rows_of(self.local)
            self._maps_on[device] = _Maps(
                tuple(stage.to(device) for stage in self._stages),
                Rows(self._sent, device),
                tuple(group.to(device) for group in distinct_groups(self._sent)),
                None if len(local) == self.num_tokens else Rows(local, device),
            )
        return self._maps_on[device]

    def _stage(self, routes: Routes, begin: int) -> Stage:
        """Return a stage whose rows begin at `begin` among all rows that the rank sends."""
        keys = stage_keys(self.slices, routes.received, self.window)
        order = None if keys.order is None else row_numbers(keys.order)
        return Stage(
            sent=slice(begin, begin + len(routes.sent)),
            send_splits=routes.send_splits,
            recv_splits=routes.recv_splits,
            second_step=routes.second_step,
            local_rows=None if keys.own is None else Rows(rows_of_slices(keys.own)),
            key_order=None if order is None else Rows(order),
            order_groups=() if order is None else distinct_groups(order),
            rectangles=keys.rectangles,
            causal=self.window is not None,
            rows=Rows(rows_of(keys.rectangles)),
        )


class _Maps(NamedTuple):
    """The index maps that [`RankLayout`] keeps on one device."""

    stages: tuple[Stage, ...]
    send_rows: Rows
    home_groups: tuple[Group, ...]
    local_rows: Rows | None


def token_index(plan: ShardPlan, rank: int) -> np.ndarray:
    """Return the positions of a rank's tokens in the packed row, (T_r,) int64."""
    starts = [0, *accumulate(plan.lengths)]
    return row_numbers(
        (starts[document] + start, starts[document] + stop) for document, start, stop in plan.slices[rank]
    )


def rows_of(rectangles: Sequence[Rectangle]) -> np.ndarray:
    """Return the local rows that rectangles cover, (n,) int64."""
    return row_numbers((rectangle.q_start, rectangle.q_stop) for rectangle in rectangles)
