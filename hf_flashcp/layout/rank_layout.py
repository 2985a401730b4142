"""`RankLayout`: everything a rank needs to know about a plan, as index maps built once a batch.

A rank's slices of one document, in order, form one causal sequence: every local query attends to every local key at
or before it, whatever lies between them. What is missing lies strictly before a local slice and needs no mask:

    document of 12 tokens, this rank holds a = [2,4) and b = [7,10):

              keys  0 1 2 3 4 5 6 7 8 9 . .
    a   2           R R L . . . . . . .            L  local causal sequence (a, b): one kernel call
        3           R R L L . . . . . .            R  received: rows of a x prefix [0,2),
    b   7           R R L L R R R L . .               rows of b x prefix [0,2)+[4,7): two full rectangles
        8           R R L L R R R L L .
        9           R R L L R R R L L L

KV comes rank after rank, each rank's part in document order. Without a mask the order of keys means nothing, so a
slice can use what came as it lies if the keys that it needs are in one range: always when a stage brings a document's
tokens from one rank only, and often when one long document is spread over all of them:

    of twelve tokens this rank holds 2 3, a = 6 and b = 10 11, a second 0 1 7 8 9, a third 4 5; b needs all that comes,
    a needs 0 1 4 5:

    came as         0 1 7 8 9 | 4 5        b finds its keys in one range, a does not: one gather into document order
    in two stages   0 1 7 8 9              both do, each time; a row merges once a stage
                    4 5

The gather moves each received row of K and V once forward and once backward. The other way out, a rectangle a source,
would merge every query row once more each time, which with four query heads a KV head and fp32 accumulators moves
several times the bytes: so where one slice of a stage does not find its keys in one range, the stage's keys are
gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from ..plan import ShardPlan
from ..plan.calls import KeyPiece, key_ranges
from ..plan.traffic import needed_keys, overlaps
from .hierarchical import HierarchicalRoutes, SecondStep
from .rows import Rows, distinct_groups
from .stage import Rectangle, Stage, groups_to


class LocalSlice(NamedTuple):
    """Tokens [start, stop) of a document, from local row `row` on."""

    document: int
    start: int
    stop: int
    row: int


class RankLayout:
    """Index maps of one rank under one plan, for full-attention layers.

    Args:
        plan (`ShardPlan`): a valid plan. Its `offset_groups` are the stages; a group in which no rank needs anything
            makes none.
        rank (`int`): rank within the context-parallel group.

    Attributes:
        token_index (`torch.Tensor`): (T_r,) int64 positions of this rank's tokens in the packed row.
        local (`tuple[Rectangle, ...]`): what needs no exchange, in rows of the local sequence: causal, aligned
            bottom-right.
        merges_again (`bool`): whether some row is covered by several stages.
    """

    window: int | None = None

    def __init__(self, plan: ShardPlan, rank: int):
        self.longest_document = max(plan.lengths)
        self.slices = tuple(_with_rows(plan.slices[rank]))
        self.num_tokens = sum(stop - start for _, start, stop, _ in self.slices)
        self._plan, self._rank = plan, rank
        self._needed = self._needed_keys()
        self.local = self._local_rectangles()
        self._sent: list[np.ndarray] = []
        self._stages = tuple(self._stage(offsets) for offsets in self._offset_groups(plan) if self._is_needed(offsets))
        times = np.zeros(self.num_tokens, dtype=np.int64)
        for rectangle in (rectangle for stage in self._stages for rectangle in stage.rectangles):
            times[rectangle.q_start : rectangle.q_stop] += 1
        self.merges_again = bool((times > 1).any())
        self._maps_on: dict[torch.device, _Maps] = {}

    @staticmethod
    def _offset_groups(plan: ShardPlan) -> Sequence[Sequence[int]]:
        return plan.stage_offsets

    @cached_property
    def token_index(self) -> torch.Tensor:
        return torch.from_numpy(token_index(self._plan, self._rank))

    def stages(self, device: torch.device) -> tuple[Stage, ...]:
        """As many on every rank of the group, or none at all, with their index tensors on `device`."""
        return self._on(device).stages

    def send_rows(self, device: torch.device) -> Rows:
        """(n_sent,) the local rows that other ranks need, stage after stage; a row may be named several times."""
        return self._on(device).send_rows

    def home_groups(self, device: torch.device) -> tuple[tuple[slice, Rows], ...]:
        """`send_rows` in groups in which no row comes twice: gradients added group by group are summed in one order on
        every device."""
        return self._on(device).home_groups

    def local_rows(self, device: torch.device) -> Rows | None:
        """The rows that `local` covers; `None` if they are all there are."""
        return self._on(device).local_rows

    def _on(self, device: torch.device) -> _Maps:
        """Copied to `device` once."""
        if device not in self._maps_on:
            numbers = concatenated(self._sent)
            local = rows_of(self.local)
            self._maps_on[device] = _Maps(
                tuple(stage.to(device) for stage in self._stages),
                Rows(numbers).to(device),
                groups_to(grouped(numbers), device),
                None if len(local) == self.num_tokens else Rows(local).to(device),
            )
        return self._maps_on[device]

    def _needed_keys(self) -> dict[int, dict[int, list[tuple[int, int]]]]:
        """Which tokens each rank is sent, see [`needed_keys`]."""
        return needed_keys(self._plan.slices, self.window)

    def _local_rectangles(self) -> tuple[Rectangle, ...]:
        """One causal square per local document."""
        squares: dict[int, tuple[int, int]] = {}
        for document, start, stop, row in self.slices:
            first, _ = squares.get(document, (row, row))
            squares[document] = (first, row + stop - start)
        return tuple(Rectangle(first, last, first, last) for first, last in squares.values())

    def _is_needed(self, offsets: Sequence[int]) -> bool:
        cp_size = self._plan.cp_size
        return any(
            other != rank and (other - rank) % cp_size in offsets and overlaps(start, stop, intervals)
            for rank, slices in enumerate(self._plan.slices)
            for document, start, stop in slices
            for other, intervals in self._needed.get(document, {}).items()
        )

    def _stage(self, offsets: Sequence[int]) -> Stage:
        received, exchange = self._exchange(offsets)
        order = None
        ranges = key_ranges(received, self._plan.slices[self._rank])
        if ranges is None:
            received = sorted(received)
            order = concatenated([np.arange(piece.offset, piece.offset + piece.tokens) for piece in received])
            ranges = key_ranges(received, self._plan.slices[self._rank])
        rectangles: list[Rectangle] = []
        for (_, start, stop, row), (k_start, k_stop) in zip(self.slices, ranges):
            if k_start == k_stop:
                continue
            rectangle = Rectangle(row, row + stop - start, k_start, k_stop)
            if rectangles and rectangles[-1].q_stop == row and rectangles[-1][2:] == rectangle[2:]:
                rectangle = rectangle._replace(q_start=rectangles.pop().q_start)
            rectangles.append(rectangle)
        return Stage(
            **exchange,
            local_rows=None,
            key_order=None if order is None else Rows(order),
            order_groups=() if order is None else grouped(order),
            rectangles=tuple(rectangles),
            causal=False,
            rows=Rows(rows_of(rectangles)),
        )

    def _exchange(self, offsets: Sequence[int]) -> tuple[list[KeyPiece], dict[str, Any]]:
        """What a stage brings, and how: what [`Stage`] has of it."""
        received, recv_splits = self._received(offsets)
        second_step: SecondStep | None = None
        if self._plan.ranks_per_node is None:
            sent, send_splits = self._outgoing(offsets)
        else:
            routes = HierarchicalRoutes(self._plan, self._rank, offsets, self._needed)
            before = sum(map(len, self._sent))
            self._sent.append(np.searchsorted(token_index(self._plan, self._rank), routes.sent))
            sent, send_splits = slice(before, before + len(routes.sent)), routes.send_splits
            recv_splits, second_step = routes.recv_splits, routes.second_step
        return received, {
            "sent": sent,
            "send_splits": send_splits,
            "recv_splits": recv_splits,
            "second_step": second_step,
        }

    def _outgoing(self, offsets: Sequence[int]) -> tuple[slice, list[int]]:
        """Notes the local rows for every destination, and says where they stand among all, and how many each gets."""
        cp_size = self._plan.cp_size
        before = sum(map(len, self._sent))
        splits = [0] * cp_size
        for other in range(cp_size):
            if other == self._rank or (other - self._rank) % cp_size not in offsets:
                continue
            for document, start, stop, row in self.slices:
                for first, last in overlaps(start, stop, self._needed.get(document, {}).get(other, ())):
                    self._sent.append(np.arange(row + first - start, row + last - start))
                    splits[other] += last - first
        return slice(before, before + sum(splits)), splits

    def _received(self, offsets: Sequence[int]) -> tuple[list[KeyPiece], list[int]]:
        """What is needed of others, source after source, and how much of each."""
        cp_size = self._plan.cp_size
        received, splits = [], [0] * cp_size
        offset = 0
        for other in range(cp_size):
            if other == self._rank or (self._rank - other) % cp_size not in offsets:
                continue
            for document, start, stop in self._plan.slices[other]:
                for first, last in overlaps(start, stop, self._needed.get(document, {}).get(self._rank, ())):
                    received.append(KeyPiece(document, first, last - first, offset))
                    offset += last - first
                    splits[other] += last - first
        return received, splits


def token_index(plan: ShardPlan, rank: int) -> np.ndarray:
    """(T_r,) int64 positions of a rank's tokens in the packed row."""
    starts = np.concatenate(([0], np.cumsum(plan.lengths)))
    return concatenated([np.arange(start, stop) + starts[document] for document, start, stop in plan.slices[rank]])


class _Maps(NamedTuple):
    """What [`RankLayout`] keeps on a device."""

    stages: tuple[Stage, ...]
    send_rows: Rows
    home_groups: tuple[tuple[slice, Rows], ...]
    local_rows: Rows | None


def _with_rows(slices: Sequence[tuple[int, int, int]]):
    row = 0
    for document, start, stop in slices:
        yield LocalSlice(document, start, stop, row)
        row += stop - start


def rows_of(rectangles: Sequence[Rectangle]) -> np.ndarray:
    """The local rows of all rectangles."""
    return concatenated([np.arange(rectangle.q_start, rectangle.q_stop) for rectangle in rectangles])


def grouped(numbers: np.ndarray) -> tuple[tuple[slice, Rows], ...]:
    """(n,) row numbers in groups, one behind the other, in which none comes twice."""
    return tuple((slice(start, stop), Rows(numbers[start:stop])) for start, stop in distinct_groups(numbers))


def concatenated(pieces: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
