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
from ..planning.volume import document_holders


class Rectangle(NamedTuple):
    """Queries [q_start, q_stop) against keys [k_start, k_stop), as rows of a query and a key buffer; never empty."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int


class Stage(NamedTuple):
    """One uneven all-to-all of KV and the attention that waits for it.

    Attributes:
        send_rows (`torch.Tensor`): (n_sent,) int64 local rows, destination after destination, in document order.
        send_splits (`list[int]`): rows for each rank of the group.
        recv_splits (`list[int]`): rows from each rank of the group.
        recv_order (`torch.Tensor`, *optional*): (n_received,) int64, brings the source-major buffer into document
            order; `None` where it already is.
        rectangles (`tuple[Rectangle, ...]`): local rows against rows of the ordered buffer, without a mask. Query
            ranges are disjoint and ascending.
        rows (`torch.Tensor`, *optional*): (R,) int64 local rows covered by the rectangles; `None` for all of them.
    """

    send_rows: torch.Tensor
    send_splits: list[int]
    recv_splits: list[int]
    recv_order: torch.Tensor | None
    rectangles: tuple[Rectangle, ...]
    rows: torch.Tensor | None

    def to(self, device: torch.device) -> Stage:
        return Stage(*(x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x for x in self))


class RankLayout:
    """Index maps of one rank under one plan.

    Args:
        plan (`ShardPlan`): a valid plan.
        rank (`int`): rank within the context-parallel group.
        offset_groups (`Sequence[Sequence[int]]`, *optional*): how the ring offsets 1 .. N-1 are grouped into stages;
            in a stage with offset o a rank sends to rank + o and receives from rank - o (mod N). Defaults to one
            stage of all offsets. A group in which no rank needs anything makes no stage.

    Attributes:
        token_index (`torch.Tensor`): (T_r,) int64 positions of this rank's tokens in the packed row.
        local (`tuple[Rectangle, ...]`): one causal square per local document, in rows of the local sequence.
        stages (`tuple[Stage, ...]`): as many on every rank of the group, or none at all.
    """

    def __init__(self, plan: ShardPlan, rank: int, offset_groups: Sequence[Sequence[int]] | None = None):
        self.num_tokens = sum(stop - start for _, start, stop in plan.slices[rank])
        self.longest_document = max(plan.lengths)
        self._rows = self._local_rows(plan, rank)
        self._holders = document_holders(plan.slices)
        if offset_groups is None:
            offset_groups = [range(1, plan.cp_size)]
        self.local = self._local_rectangles()
        self._stages = tuple(
            self._stage(plan, rank, offsets) for offsets in offset_groups if self._is_needed(plan, offsets)
        )
        self._on_device: dict[torch.device, tuple[Stage, ...]] = {}
        self._document_starts = np.concatenate(([0], np.cumsum(plan.lengths)))

    @cached_property
    def token_index(self) -> torch.Tensor:
        pieces = [np.arange(start, stop) + self._document_starts[document] for document, start, stop, _ in self._rows]
        return torch.from_numpy(np.concatenate(pieces))

    def stages(self, device: torch.device) -> tuple[Stage, ...]:
        """The stages with their index tensors on `device`, copied there once."""
        if device not in self._on_device:
            self._on_device[device] = tuple(stage.to(device) for stage in self._stages)
        return self._on_device[device]

    @staticmethod
    def _local_rows(plan: ShardPlan, rank: int) -> list[tuple[int, int, int, int]]:
        """`(document, start, stop, first local row)` of every slice."""
        rows, row = [], 0
        for document, start, stop in plan.slices[rank]:
            rows.append((document, start, stop, row))
            row += stop - start
        return rows

    def _local_rectangles(self) -> tuple[Rectangle, ...]:
        squares: dict[int, tuple[int, int]] = {}
        for document, start, stop, row in self._rows:
            first, _ = squares.get(document, (row, row))
            squares[document] = (first, row + stop - start)
        return tuple(Rectangle(first, last, first, last) for first, last in squares.values())

    def _is_needed(self, plan: ShardPlan, offsets: Sequence[int]) -> bool:
        return any(
            (other - rank) % plan.cp_size in offsets and end > start
            for rank, slices in enumerate(plan.slices)
            for document, start, _ in slices
            for other, end in self._holders[document].items()
            if other != rank
        )

    def _stage(self, plan: ShardPlan, rank: int, offsets: Sequence[int]) -> Stage:
        cp_size = plan.cp_size
        send_pieces, send_splits = [], [0] * cp_size
        received, recv_splits = [], [0] * cp_size
        for other in range(cp_size):
            if (other - rank) % cp_size in offsets:
                for document, start, stop, row in self._rows:
                    needed = min(stop, self._holders[document].get(other, 0)) - start
                    if needed > 0:
                        send_pieces.append(np.arange(row, row + needed))
                        send_splits[other] += needed
            if (rank - other) % cp_size in offsets:
                for document, start, stop in plan.slices[other]:
                    needed = min(stop, self._holders[document].get(rank, 0)) - start
                    if needed > 0:
                        received.append((document, start, needed, sum(recv_splits)))
                        recv_splits[other] += needed
        rectangles = self._remote_rectangles(sorted(received))
        covered = sum(rectangle.q_stop - rectangle.q_start for rectangle in rectangles)
        return Stage(
            send_rows=_to_tensor(send_pieces),
            send_splits=send_splits,
            recv_splits=recv_splits,
            recv_order=None
            if received == sorted(received)
            else _to_tensor([np.arange(offset, offset + count) for _, _, count, offset in sorted(received)]),
            rectangles=rectangles,
            rows=None
            if covered == self.num_tokens
            else _to_tensor([np.arange(rectangle.q_start, rectangle.q_stop) for rectangle in rectangles]),
        )

    def _remote_rectangles(self, received: list[tuple[int, int, int, int]]) -> tuple[Rectangle, ...]:
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
        for document, start, stop, row in self._rows:
            prefix = sum(count for piece_start, count in pieces.get(document, ()) if piece_start < start)
            if not prefix:
                continue
            k_start = first_key[document]
            rectangle = Rectangle(row, row + stop - start, k_start, k_start + prefix)
            if rectangles and rectangles[-1].q_stop == row and rectangles[-1][2:] == rectangle[2:]:
                rectangle = rectangle._replace(q_start=rectangles.pop().q_start)
            rectangles.append(rectangle)
        return tuple(rectangles)


def _to_tensor(pieces: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64))
