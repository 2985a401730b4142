"""`Rows`: a selection of rows of a buffer, read and written as views if it is a few ranges, otherwise by index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch


class Rows:
    """A selection of rows of a buffer. Rows that are written to must not occur twice.

    Copying ranges as views runs at memory bandwidth, with one operation per range. Copying by index takes a single
    operation for any number of ranges, but a lookup per row. So up to `FEW` ranges are copied as views. On a CPU more
    ranges are, too, if they have at least `LONG` rows on average (measured: 16 ranges of 128 rows merge in 0.6 of the
    time that an index takes). All other selections use an index. Exactly one of `ranges` and `index` is not `None`.

    Args:
        numbers (`np.ndarray`): the row numbers, (n,) int64. Their order is that of the rows in the other buffer, to or
            from which rows are copied.
        device (`torch.device`, *optional*): device of the buffer and of `index`; CPU by default.
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
        """Yield where each range lies in the buffer and among the n rows; cut ranges to at most `longest` rows."""
        offset = 0
        for start, stop in self.ranges:
            for first in range(start, stop, longest or stop - start):
                last = stop if longest is None else min(first + longest, stop)
                yield slice(first, last), slice(offset, offset + last - first)
                offset += last - first

    def take(self, source: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Return these rows of `source` along `dim`: a view if they are a single range, else a copy."""
        if self.index is not None:
            return source.index_select(dim, self.index)
        parts = [source.narrow(dim, start, stop - start) for start, stop in self.ranges]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, dim) if parts else source.narrow(dim, 0, 0)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy these rows of `source` (T, ...) into `target` (n, ...)."""
        if self.index is None:
            for there, here in self.pieces():
                target[here].copy_(source[there])
        elif source[0].is_contiguous():  # copying whole rows is ten times faster than copying each row head by head
            torch.index_select(source.flatten(1), 0, self.index, out=target.flatten(1))
        else:
            torch.index_select(source, 0, self.index, out=target)

    def put(self, target: torch.Tensor, values: torch.Tensor, dim: int = 0) -> None:
        """Overwrite these rows of `target` along `dim` with `values`."""
        if self.index is not None:
            target.index_copy_(dim, self.index, values.to(target.dtype))
            return
        for there, here in self.pieces():
            length = there.stop - there.start
            target.narrow(dim, there.start, length).copy_(values.narrow(dim, here.start, length))

    def add(self, target: torch.Tensor, values: torch.Tensor) -> None:
        """Add `values` (n, ...), whose dtype may be narrower, to these rows of `target` (T, ...)."""
        if self.index is not None:
            target.index_add_(0, self.index, values.to(target.dtype))
            return
        for there, here in self.pieces():
            target[there].add_(values[here])


class Group(NamedTuple):
    """A part of a list of row numbers in which no row occurs twice; `span` is its position in the list."""

    span: slice
    rows: Rows

    def to(self, device: torch.device) -> Group:
        return Group(self.span, self.rows.to(device))


def distinct_groups(numbers: np.ndarray) -> tuple[Group, ...]:
    """Split row numbers (n,) into consecutive groups, each as long as possible, in which no row occurs twice.

    Values that are added to rows group by group are summed in the same order on every device, because no two values of
    a group are added to the same row.
    """
    order = np.argsort(numbers, kind="stable")
    again = np.flatnonzero(np.diff(numbers[order]) == 0)
    before = np.full(len(numbers), -1)  # index of the previous occurrence of each number
    before[order[again + 1]] = order[again]
    latest = np.maximum.accumulate(before) if len(numbers) else before
    groups, start = [], 0
    while start < len(numbers):
        stop = int(np.searchsorted(latest, start))
        groups.append(Group(slice(start, stop), Rows(numbers[start:stop])))
        start = stop
    return tuple(groups)


def row_numbers(ranges: Iterable[tuple[int, int]]) -> np.ndarray:
    """Return the numbers in half-open ranges, (n,) int64, one range after the other."""
    starts, stops = np.fromiter(chain.from_iterable(ranges), dtype=np.int64).reshape(-1, 2).T
    lengths = stops - starts
    return np.arange(lengths.sum()) + np.repeat(starts - (lengths.cumsum() - lengths), lengths)


def concatenated(numbers: list[np.ndarray]) -> np.ndarray:
    """Concatenate int64 arrays (n,); return an empty array if there are none."""
    return np.concatenate(numbers) if numbers else np.empty(0, dtype=np.int64)
