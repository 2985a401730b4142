"""`Rows`: some rows of a buffer, which are read and written as views where they are few ranges, else by index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch


class Rows:
    """Rows of a buffer, each named once where they are written to.

    Copying a view of a range costs what memory bandwidth allows; an index costs a lookup per row, but one operation
    for any number of ranges. So up to `FEW` ranges are walked one by one, on a CPU also more if they are `LONG` on
    average (measured: 16 ranges of 128 rows merge in 0.6 of the time that an index takes), and others go by index.

    `numbers` (n,) int64 are in the order of the buffer that rows are copied to or from, which is on `device`, as is
    `index`. There are either half-open `ranges` or the `index`, in the same order.
    """

    FEW = 4
    LONG = 64

    def __init__(self, numbers: np.ndarray, device: torch.device | None = None):
        self.count = len(numbers)
        self.ranges: tuple[tuple[int, int], ...] | None = None
        self.index: torch.Tensor | None = None
        self._numbers, self._device = numbers, device or torch.device("cpu")
        on_cpu = self._device.type == "cpu"
        breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
        num_ranges = len(breaks) + 1
        if num_ranges <= self.FEW or (on_cpu and self.count >= self.LONG * num_ranges):
            firsts, lasts = np.append(0, breaks), np.append(breaks, self.count) - 1
            ranges = zip(numbers[firsts].tolist(), (numbers[lasts] + 1).tolist()) if self.count else ()
            self.ranges = tuple(ranges)
        else:
            self.index = torch.from_numpy(numbers).to(device, non_blocking=True)

    def to(self, device: torch.device) -> Rows:
        return self if device == self._device else Rows(self._numbers, device)

    def pieces(self, longest: int | None = None) -> Iterator[tuple[slice, slice]]:
        """Yields the location of each range, cut to at most `longest` rows, in the buffer and among the n rows."""
        offset = 0
        for start, stop in self.ranges:
            for first in range(start, stop, longest or stop - start):
                last = stop if longest is None else min(first + longest, stop)
                yield slice(first, last), slice(offset, offset + last - first)
                offset += last - first

    def take(self, source: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """(n, ...) these rows of `source`, which lie along `dim`: a view if they are one range, else a copy."""
        if self.index is not None:
            return source.index_select(dim, self.index)
        parts = [source.narrow(dim, start, stop - start) for start, stop in self.ranges]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, dim) if parts else source.narrow(dim, 0, 0)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copies these rows of `source` (T, ...) into `target` (n, ...)."""
        if self.index is None:
            for there, here in self.pieces():
                target[here].copy_(source[there])
        elif source[0].is_contiguous():  # a row at a time is an order of magnitude faster than a head at a time
            torch.index_select(source.flatten(1), 0, self.index, out=target.flatten(1))
        else:
            torch.index_select(source, 0, self.index, out=target)

    def put(self, target: torch.Tensor, values: torch.Tensor, dim: int = 0) -> None:
        """Writes `values` over these rows of `target`, which lie along `dim`."""
        if self.index is not None:
            target.index_copy_(dim, self.index, values.to(target.dtype))
            return
        for there, here in self.pieces():
            length = there.stop - there.start
            target.narrow(dim, there.start, length).copy_(values.narrow(dim, here.start, length))

    def add(self, target: torch.Tensor, values: torch.Tensor) -> None:
        """Adds `values` (n, ...), perhaps of a narrower dtype, to these rows of `target` (T, ...)."""
        if self.index is not None:
            target.index_add_(0, self.index, values.to(target.dtype))
            return
        for there, here in self.pieces():
            target[there].add_(values[here])


class Group(NamedTuple):
    """The part `span` of a list of row numbers, in which no row comes twice."""

    span: slice
    rows: Rows

    def to(self, device: torch.device) -> Group:
        return Group(self.span, self.rows.to(device))


def distinct_groups(numbers: np.ndarray) -> tuple[Group, ...]:
    """Row numbers (n,) in groups, one after the other and as long as they go, in which no row comes twice.

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
        groups.append(Group(slice(start, stop), Rows(numbers[start:stop])))
        start = stop
    return tuple(groups)


def row_numbers(ranges: Iterable[tuple[int, int]]) -> np.ndarray:
    """(n,) int64 the numbers in half-open ranges, one range after the other."""
    starts, stops = np.fromiter(chain.from_iterable(ranges), dtype=np.int64).reshape(-1, 2).T
    lengths = stops - starts
    return np.arange(lengths.sum()) + np.repeat(starts - (lengths.cumsum() - lengths), lengths)


def concatenated(numbers: list[np.ndarray]) -> np.ndarray:
    """(n,) int64 arrays one after the other, none if there are no arrays."""
    return np.concatenate(numbers) if numbers else np.empty(0, dtype=np.int64)
