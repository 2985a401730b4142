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

Received KV of a document is kept in document order, so each local slice needs one contiguous prefix of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from ..planning import ShardPlan
from ..planning.volume import needed_keys, overlaps
from .stage import Rectangle, Stage


class LocalSlice(NamedTuple):
    """Tokens [start, stop) of a document, from local row `row` on."""

    document: int
    start: int
    stop: int
    row: int


class Piece(NamedTuple):
    """`count` tokens of a document from `start` on, at row `offset` of a buffer of keys."""

    document: int
    start: int
    count: int
    offset: int


class RankLayout:
    """Index maps of one rank under one plan, for full-attention layers.

    Args:
        plan (`ShardPlan`): a valid plan.
        rank (`int`): rank within the context-parallel group.
        offset_groups (`Sequence[Sequence[int]]`, *optional*): how the ring offsets 1 .. N-1 are grouped into stages;
            in a stage with offset o a rank sends to rank + o and receives from rank - o (mod N). Defaults to one
            stage of all offsets. A group in which no rank needs anything makes no stage.

    Attributes:
        token_index (`torch.Tensor`): (T_r,) int64 positions of this rank's tokens in the packed row.
        local (`tuple[Rectangle, ...]`): what needs no exchange, in rows of the local sequence: causal, aligned
            bottom-right.
        stages (`tuple[Stage, ...]`): as many on every rank of the group, or none at all.
    """

    window: int | None = None

    def __init__(self, plan: ShardPlan, rank: int, offset_groups: Sequence[Sequence[int]] | None = None):
        self.longest_document = max(plan.lengths)
        self.slices = tuple(_with_rows(plan.slices[rank]))
        self.num_tokens = sum(stop - start for _, start, stop, _ in self.slices)
        self._document_starts = np.concatenate(([0], np.cumsum(plan.lengths)))
        self._plan, self._rank = plan, rank
        self._needed = needed_keys(plan.slices, self.window)
        if offset_groups is None:
            offset_groups = [range(1, plan.cp_size)]
        self.local = self._local_rectangles()
        self._stages = tuple(self._stage(offsets) for offsets in offset_groups if self._is_needed(offsets))
        self._stages_on: dict[torch.device, tuple[Stage, ...]] = {}
        self._local_rows_on: dict[torch.device, torch.Tensor | None] = {}

    @cached_property
    def token_index(self) -> torch.Tensor:
        return to_tensor(
            [np.arange(start, stop) + self._document_starts[document] for document, start, stop, _ in self.slices]
        )

    def stages(self, device: torch.device) -> tuple[Stage, ...]:
        """The stages with their index tensors on `device`, copied there once."""
        if device not in self._stages_on:
            self._stages_on[device] = tuple(stage.to(device) for stage in self._stages)
        return self._stages_on[device]

    def local_rows(self, device: torch.device) -> torch.Tensor | None:
        """(R,) int64 the rows covered by `local`, copied to `device` once; `None` if they are all there are."""
        if device not in self._local_rows_on:
            rows = self.covered_rows(self.local)
            self._local_rows_on[device] = rows if rows is None else rows.to(device, non_blocking=True)
        return self._local_rows_on[device]

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
        send_rows, send_splits = self._sent(offsets)
        received, recv_splits = self._received(offsets)
        ordered = sorted(received)
        rectangles = self._remote_rectangles(ordered)
        return Stage(
            send_rows=send_rows,
            send_splits=send_splits,
            recv_splits=recv_splits,
            local_rows=None,
            key_order=None
            if received == ordered
            else to_tensor([np.arange(piece.offset, piece.offset + piece.count) for piece in ordered]),
            rectangles=rectangles,
            causal=False,
            rows=self.covered_rows(rectangles),
        )

    def _sent(self, offsets: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """Local rows for every destination, and how many each gets."""
        cp_size = self._plan.cp_size
        pieces, splits = [], [0] * cp_size
        for other in range(cp_size):
            if other == self._rank or (other - self._rank) % cp_size not in offsets:
                continue
            for document, start, stop, row in self.slices:
                for first, last in overlaps(start, stop, self._needed.get(document, {}).get(other, ())):
                    pieces.append(np.arange(row + first - start, row + last - start))
                    splits[other] += last - first
        return to_tensor(pieces), splits

    def _received(self, offsets: Sequence[int]) -> tuple[list[Piece], list[int]]:
        """What arrives, source after source, and how much from each."""
        cp_size = self._plan.cp_size
        received, splits = [], [0] * cp_size
        offset = 0
        for other in range(cp_size):
            if other == self._rank or (self._rank - other) % cp_size not in offsets:
                continue
            for document, start, stop in self._plan.slices[other]:
                for first, last in overlaps(start, stop, self._needed.get(document, {}).get(self._rank, ())):
                    received.append(Piece(document, first, last - first, offset))
                    offset += last - first
                    splits[other] += last - first
        return received, splits

    def _remote_rectangles(self, received: list[Piece]) -> tuple[Rectangle, ...]:
        """Each local slice against the prefix of its document's received tokens; equal prefixes joined.

        `received` is in document order; a received piece never straddles a local slice, so it lies wholly before
        or wholly after each.
        """
        pieces: dict[int, list[tuple[int, int]]] = {}
        first_key: dict[int, int] = {}
        offset = 0
        for document, start, count, _ in received:
            first_key.setdefault(document, offset)
            pieces.setdefault(document, []).append((start, count))
            offset += count
        rectangles: list[Rectangle] = []
        for document, start, stop, row in self.slices:
            prefix = sum(count for piece_start, count in pieces.get(document, ()) if piece_start < start)
            if not prefix:
                continue
            k_start = first_key[document]
            rectangle = Rectangle(row, row + stop - start, k_start, k_start + prefix)
            if rectangles and rectangles[-1].q_stop == row and rectangles[-1][2:] == rectangle[2:]:
                rectangle = rectangle._replace(q_start=rectangles.pop().q_start)
            rectangles.append(rectangle)
        return tuple(rectangles)

    def covered_rows(self, rectangles: Sequence[Rectangle]) -> torch.Tensor | None:
        """The local rows of all rectangles; `None` if they are all there are."""
        if sum(rectangle.q_stop - rectangle.q_start for rectangle in rectangles) == self.num_tokens:
            return None
        return to_tensor([np.arange(rectangle.q_start, rectangle.q_stop) for rectangle in rectangles])


def _with_rows(slices: Sequence[tuple[int, int, int]]):
    row = 0
    for document, start, stop in slices:
        yield LocalSlice(document, start, stop, row)
        row += stop - start


def to_tensor(pieces: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64))
