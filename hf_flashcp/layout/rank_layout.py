"""`RankLayout`: everything that a rank needs to know about a plan, as index maps that are built once per batch.

[`~plan.rectangles`] draws which rows attend to which keys, and in which order they are kept.
"""

from __future__ import annotations

from functools import cached_property, partial
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from ..plan import ShardPlan
from ..plan.ranges import Ranges
from ..plan.rectangles import local_rectangles, query_rows, stage_keys
from ..plan.slices import LocalSlice, local_slices
from ..plan.stage_traffic import StageTraffic, stage_traffic
from .hierarchical import hierarchical_routes
from .parts import Parts
from .routes import direct_routes
from .rows import Rows
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
        window (`int`, *optional*): the sliding window.
    """

    def __init__(self, plan: ShardPlan, rank: int, window: int | None = None):
        self.window = window
        self.longest_document = plan.longest_document
        self._plan, self._rank = plan, rank
        self._table = plan.slice_table.of_rank(rank)
        self.num_tokens = self._table.spans.total
        self.local = local_rectangles(self._table, window)
        routes_of = direct_routes if plan.ranks_per_node is None else hierarchical_routes
        stages = self._stage_traffic()
        self._routes = [routes_of(traffic, rank) for traffic in stages]
        self._keys = [stage_keys(self._table, traffic.received(rank), window) for traffic in stages]
        self._maps_on: dict[torch.device, _Maps] = {}

    def _stage_traffic(self) -> list[StageTraffic]:
        """Return what travels in each stage. `AllGatherLayout` of the benchmarks sends more."""
        return stage_traffic(self._plan, self.window)

    @cached_property
    def slices(self) -> tuple[LocalSlice, ...]:
        """The rank's slices with the rows at which they begin."""
        return local_slices(self._plan.columns.of_rank(self._rank))

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

    def outputs(self, device: torch.device) -> Parts:
        """Return the local rows whose outputs come from the local pass, and from each stage that has rectangles.

        There is no part for a local pass without rectangles.
        """
        return self._on(device).outputs

    def key_gradients(self, device: torch.device) -> Parts:
        """Return the local rows whose KV gradients come from the local pass, from stages, and from other ranks.

        There is a part for the local pass if it has rectangles, one for each stage with `local_rows`, and parts for
        `send_rows`.
        """
        return self._on(device).key_gradients

    def _on(self, device: torch.device) -> _Maps:
        """Return the maps on `device`, which are copied there once."""
        if device not in self._maps_on:
            sent = Rows(Ranges.concatenated([routes.sent for routes in self._routes])).to(device)
            begins = accumulate((sum(routes.send_splits) for routes in self._routes), initial=0)
            stages = tuple(map(partial(Stage.of, self.window is not None, device), self._routes, self._keys, begins))
            passes = self.local, *(keys.rectangles for keys in self._keys)
            outputs = [Rows(query_rows(rectangles), device) for rectangles in passes if rectangles]
            whole = [Rows(Ranges.of([(0, self.num_tokens)]), device)] if self.local else []
            own = [stage.local_rows for stage in stages if stage.local_rows is not None]
            keys = [*whole, *own, *sent.parts(sent.distinct_spans())]
            self._maps_on[device] = _Maps(
                stages, sent, Parts(outputs, self.num_tokens, device), Parts(keys, self.num_tokens, device)
            )
        return self._maps_on[device]


class _Maps(NamedTuple):
    """The index maps that [`RankLayout`] keeps on one device."""

    stages: tuple[Stage, ...]
    send_rows: Rows
    outputs: Parts
    key_gradients: Parts


def token_index(plan: ShardPlan, rank: int) -> np.ndarray:
    """Return the positions of a rank's tokens in the packed row, (T_r,) int64."""
    held = plan.slice_table.of_rank(rank)
    shift = (np.cumsum(plan.lengths) - plan.lengths)[held.documents] - held.bases
    return Ranges(held.spans.starts + shift, held.spans.stops + shift).numbers()
