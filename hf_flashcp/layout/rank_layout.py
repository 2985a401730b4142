"""`RankLayout`: everything that a rank needs to know about a plan, as index maps that are built once per batch.

A rank's slices of a document, in order, form one causal sequence: every local query attends to every local key at or
before it, even if tokens between the slices are on other ranks. The keys that are missing lie strictly before a local
slice, so that attention to them needs no mask:

    document of 12 tokens, this rank holds a = [2,4) and b = [7,10):

              keys  0 1 2 3 4 5 6 7 8 9 . .
    a   2           R R L . . . . . . .            L  local causal sequence (a, b): one kernel call
        3           R R L L . . . . . .            R  received: rows of a x prefix [0,2),
    b   7           R R L L R R R L . .               rows of b x prefix [0,2)+[4,7): two full rectangles
        8           R R L L R R R L L .
        9           R R L L R R R L L L

KV arrives rank by rank, and the rows of each rank arrive in document order. Without a mask the order of keys does not
matter, so a slice can use keys where they arrived if all keys that it needs are in one range. This is always so when a
stage brings tokens of a document from a single rank, and often when one long document is spread over all ranks:

    A document has 12 tokens: this rank holds 2 3, a = 6 and b = 10 11, a second rank 0 1 7 8 9, and a third 4 5.
    Slice b needs all received tokens, slice a needs 0 1 4 5.

    one stage       0 1 7 8 9 | 4 5        the keys of b are in one range, those of a are not: gather the stage's keys
    two stages      0 1 7 8 9              both find their keys in one range in each stage, and merge once per stage
                    4 5

If the keys of any slice of a stage are not in one range, all keys of the stage are gathered into document order. The
gather moves each received row of K and V once in forward and once in backward. The alternative, one rectangle per
source, would merge every query row once more per source. With four query heads per KV head and fp32 accumulators that
moves several times as many bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from ..plan import ShardPlan
from ..plan.calls import KeyPiece, key_ranges
from ..plan.traffic import needed_keys
from .hierarchical import hierarchical_routes
from .routes import Needed, Routes, StageTraffic, direct_routes, local_slices
from .rows import Group, Rows, concatenated, distinct_groups, row_numbers
from .stage import Rectangle, Stage


class StageKeys(NamedTuple):
    """Where a rank's queries find their keys in a stage; `order`, (n,) int64, is the `key_order` of [`Stage`]."""

    rectangles: tuple[Rectangle, ...]
    order: np.ndarray | None
    local_rows: Rows | None = None


class RankLayout:
    """The index maps of one rank under a valid plan, for full-attention layers.

    Each of the plan's `offset_groups` is a stage, except those in which no rank needs any rows.

    Attributes:
        local (`tuple[Rectangle, ...]`): attention among the rank's own rows, which needs no exchange. The rectangles
            are causal and aligned bottom-right.
        merges_again (`bool`): whether some row is covered by several stages.
        window (`int`, *optional*): sliding window in tokens; `None` except in [`WindowLayout`].
    """

    def __init__(self, plan: ShardPlan, rank: int, window: int | None = None):
        self.window = window
        self.longest_document = plan.longest_document
        self.slices = local_slices(plan.slices[rank])
        self.num_tokens = sum(piece.tokens for piece in self.slices)
        self._plan, self._rank = plan, rank
        self.local = self._local_rectangles()
        routes = self._routes()
        self._sent = concatenated([of_stage.sent for of_stage in routes])
        begins = accumulate((len(of_stage.sent) for of_stage in routes), initial=0)
        self._stages = tuple(self._stage(of_stage, begin) for of_stage, begin in zip(routes, begins))
        covered = row_numbers((r.q_start, r.q_stop) for stage in self._stages for r in stage.rectangles)
        self.merges_again = bool((np.bincount(covered) > 1).any())
        self._maps_on: dict[torch.device, _Maps] = {}

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

    def _local_rectangles(self) -> tuple[Rectangle, ...]:
        """Return one causal square per local document."""
        squares: dict[int, Rectangle] = {}
        for piece in self.slices:
            first = squares[piece.document].q_start if piece.document in squares else piece.row
            stop = piece.row + piece.tokens
            squares[piece.document] = Rectangle(first, stop, first, stop)
        return tuple(squares.values())

    def _needed_keys(self) -> Needed:
        return needed_keys(self._plan.slices, self.window)

    def _routes(self) -> list[Routes]:
        """Return the routes of each stage in which some rank needs rows."""
        plan, needed = self._plan, self._needed_keys()
        groups = plan.stage_offsets if self.window is None else [range(1, plan.cp_size)]
        stages = [StageTraffic(plan, offsets, needed) for offsets in groups]
        routes = direct_routes if plan.ranks_per_node is None else hierarchical_routes
        return [routes(traffic, self._rank) for traffic in stages if not traffic.is_empty()]

    def _stage(self, routes: Routes, begin: int) -> Stage:
        """Return a stage whose rows begin at `begin` among all rows that the rank sends."""
        keys = self._stage_keys(routes.received)
        return Stage(
            sent=slice(begin, begin + len(routes.sent)),
            send_splits=routes.send_splits,
            recv_splits=routes.recv_splits,
            second_step=routes.second_step,
            local_rows=keys.local_rows,
            key_order=None if keys.order is None else Rows(keys.order),
            order_groups=() if keys.order is None else distinct_groups(keys.order),
            rectangles=keys.rectangles,
            causal=self.window is not None,
            rows=Rows(rows_of(keys.rectangles)),
        )

    def _stage_keys(self, received: Sequence[KeyPiece]) -> StageKeys:
        own = self._plan.slices[self._rank]
        order, ranges = None, key_ranges(received, own)
        if ranges is None:
            in_order = sorted(received)
            order = row_numbers((offset, offset + tokens) for _, _, tokens, offset in in_order)
            ranges = key_ranges(in_order, own)
        rectangles: list[Rectangle] = []
        for piece, keys in zip(self.slices, ranges):
            if keys[0] == keys[1]:
                continue
            first = piece.row
            if rectangles and rectangles[-1].q_stop == first and rectangles[-1][2:] == keys:
                first = rectangles.pop().q_start
            rectangles.append(Rectangle(first, piece.row + piece.tokens, *keys))
        return StageKeys(tuple(rectangles), order)


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
