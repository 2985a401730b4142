"""`Rows`: some rows of a buffer, which copies take as views where they are few ranges, and by index otherwise."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch


class Rows:
    """Rows of a buffer, each named once where they are written to.

    Copying a view of a range costs what memory bandwidth allows; an index costs a lookup a row, but one operation for
    any number of ranges. So up to `FEW` ranges are walked one by one, on a CPU also more if they are `LONG` on average
    (measured: 16 ranges of 128 rows merge in 0.6 of the time that an index takes), and others go by index.

    Args:
        numbers (`np.ndarray`): (n,) int64 row numbers, in the order of the buffer that they are copied to or from.
        device (`torch.device`, *optional*): where that is, and the index; defaults to the CPU.

    Attributes:
        count (`int`): n.
        ranges (`tuple[tuple[int, int], ...]`, *optional*): half-open, in the same order; `None` if there is an index.
        index (`torch.Tensor`, *optional*): (n,) int64; `None` if there are ranges.
    """

    FEW = 4
    LONG = 64

    def __init__(self, numbers: np.ndarray, device: torch.device | None = None):
        self.count = len(numbers)
        self.ranges: tuple[tuple[int, int], ...] | None = None
        self.index: torch.Tensor | None = None
        self._numbers = numbers
        on_cpu = device is None or device.type == "cpu"
        breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
        num_ranges = len(breaks) + 1
        if num_ranges <= self.FEW or (on_cpu and self.count >= self.LONG * num_ranges):
            firsts, lasts = np.append(0, breaks), np.append(breaks, self.count) - 1
            if self.count:
                self.ranges = tuple(zip(numbers[firsts].tolist(), (numbers[lasts] + 1).tolist()))
            else:
                self.ranges = ()
        else:
            self.index = torch.from_numpy(numbers).to(device, non_blocking=True)

    def to(self, device: torch.device) -> Rows:
        """The same rows for buffers on `device`."""
        return Rows(self._numbers, device)

    def pieces(self, longest: int | None = None) -> Iterator[tuple[slice, slice]]:
        """Of rows that are ranges: where each, cut to at most `longest` rows, lies in the buffer that it is part of,
        and in the n rows."""
        offset = 0
        for start, stop in self.ranges:
            for first in range(start, stop, longest or stop - start):
                last = stop if longest is None else min(first + longest, stop)
                yield slice(first, last), slice(offset, offset + last - first)
                offset += last - first

    def take(self, source: torch.Tensor) -> torch.Tensor:
        """(n, ...) a copy of these rows of `source` (T, ...)."""
        if self.index is not None:
            return source.index_select(0, self.index)
        return torch.cat([source[there] for there, _ in self.pieces()]) if self.count else source[:0]

    def put(self, target: torch.Tensor, values: torch.Tensor, dim: int = 0) -> None:
        """Writes `values` over these rows of `target`, which lie along `dim`."""
        if self.index is not None:
            target.index_copy_(dim, self.index, values.to(target.dtype))
            return
        for there, here in self.pieces():
            target.movedim(dim, 0)[there] = values.movedim(dim, 0)[here]

    def add(self, target: torch.Tensor, values: torch.Tensor) -> None:
        """Adds `values` (n, ...), perhaps of a narrower dtype, to these rows of `target` (T, ...)."""
        if self.index is not None:
            target.index_add_(0, self.index, values.to(target.dtype))
            return
        for there, here in self.pieces():
            target[there].add_(values[here])

    def __repr__(self) -> str:
        return f"Rows({self.ranges if self.index is None else self.index.tolist()})"


def distinct_groups(numbers: np.ndarray) -> list[tuple[int, int]]:
    """Ranges of `numbers` (n,), one after the other and as long as they go, in which no number comes twice.

    Values added to rows group by group are summed in one order on every device: inside a group no two meet.
    """
    order = np.argsort(numbers, kind="stable")
    again = np.flatnonzero(np.diff(numbers[order]) == 0)
    before = np.full(len(numbers), -1)  # where each number came last
    before[order[again + 1]] = order[again]
    latest = np.maximum.accumulate(before) if len(numbers) else before
    groups, start = [], 0
    while start < len(numbers):
        stop = int(np.searchsorted(latest, start))
        groups.append((start, stop))
        start = stop
    return groups
