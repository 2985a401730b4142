"""`Rows`: a selection of rows of a buffer, read and written as views if it is a few ranges, otherwise by index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch

from ..plan.ranges import Ranges, stable_order
from .upload import upload


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which partial outputs, logsumexp and gradients are summed: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def empty_rows(count: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return an empty tensor (heads, count, D) for heads like those of `like` (heads, any, D), which lie together in
    every row."""
    heads, _, width = like.shape
    return like.new_empty(count, heads, width, dtype=dtype).transpose(0, 1)


class Rows:
    """A selection of rows of a buffer. Rows that are written to must not occur twice.

    A single range is a view. Several ranges are copied as views on a CPU, if they are up to `FEW`, or have at least
    `LONG` rows on average (measured: 16 ranges of 128 rows merge in 0.6 of the time that an index takes). All other
    selections use an index, which takes a single operation for any number of ranges: on a GPU, every operation keeps
    the host busy. Exactly one of `ranges` and `index` is not `None`.

    Args:
        rows (`Ranges` or `np.ndarray`): the row numbers, as ranges or as an array (n,) int64. Their order is that of
            the rows in the other buffer, to or from which rows are copied.
        device (`torch.device`, *optional*): device of the buffer and of `index`; CPU by default.
        part_of (`tuple[Rows, slice]`, *optional*): the selection of which these rows are a part, and where; for
            [`~Rows.parts`].

    Attributes:
        spans (`Ranges`): the row numbers.
        count (`int`): how many they are.
    """

    FEW = 4
    LONG = 64

    def __init__(
        self,
        rows: Ranges | np.ndarray,
        device: torch.device | None = None,
        part_of: tuple[Rows, slice] | None = None,
    ):
        ranges = rows if isinstance(rows, Ranges) else Ranges.of_numbers(rows)
        self.spans = ranges.joined() if part_of is None else ranges
        self.count = self.spans.total if part_of is None else part_of[1].stop - part_of[1].start
        self._device, self._part_of = device or torch.device("cpu"), part_of
        starts, stops = self.spans
        as_ranges = len(starts) <= 1
        if self._device.type == "cpu":
            as_ranges = len(starts) <= self.FEW or self.count >= self.LONG * len(starts)
        self.ranges = tuple(zip(starts.tolist(), stops.tolist())) if as_ranges else None

    @cached_property
    def index(self) -> torch.Tensor | None:
        """The row numbers, (n,) int64, made on first use."""
        if self.ranges is not None:
            return None
        if self._part_of is not None:
            whole, span = self._part_of
            if whole.index is not None:
                return whole.index[span]
        return upload(torch.from_numpy(self.spans.numbers()), self._device)

    def to(self, device: torch.device) -> Rows:
        """Return these rows with their index on `device`, which is copied there now."""
        rows = self if device == self._device else Rows(self.spans, device)
        rows.index  # noqa: B018
        return rows

    def parts(self, spans: Sequence[slice]) -> list[Rows]:
        """Return consecutive parts of the n rows. The index of a part is a view of this one if both have an index."""
        edges = np.array([0, *(span.stop for span in spans)])
        cut = self.spans.cut(edges)
        bounds = np.searchsorted(cut.lengths.cumsum(), edges, "right").tolist()
        return [
            Rows(Ranges(cut.starts[first:last], cut.stops[first:last]), self._device, (self, span))
            for first, last, span in zip(bounds, bounds[1:], spans)
        ]

    def distinct_spans(self) -> list[slice]:
        """Split the n rows into consecutive parts, each as long as possible, in which no row occurs twice."""
        starts, stops = self.spans
        # Cut ranges at each other's ends, so that any two of the resulting atoms are equal or disjoint.
        is_edge = np.zeros(stops.max(initial=0) + 1, dtype=bool)
        is_edge[starts] = is_edge[stops] = True
        number, edges = is_edge.cumsum(dtype=np.int32), np.flatnonzero(is_edge)
        atoms = Ranges(number[starts] - 1, number[stops] - 1).numbers()
        if np.bincount(atoms).max(initial=0) <= 1:
            return [slice(0, self.count)] if self.count else []
        begins = np.append(0, np.diff(edges)[atoms].cumsum())
        order = stable_order(atoms)
        again = np.flatnonzero(np.diff(atoms[order]) == 0)
        before = np.full(len(atoms), -1)  # index of the previous occurrence of each atom
        before[order[again + 1]] = order[again]
        latest, first, spans = np.maximum.accumulate(before), 0, []
        while first < len(atoms):
            last = latest.searchsorted(first)
            spans.append(slice(int(begins[first]), int(begins[last])))
            first = last
        return spans

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
        if self.ranges == ((0, source.shape[dim]),):
            return source
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

    def add_all(self, target: torch.Tensor, values: torch.Tensor) -> None:
        """Add `values` (n, ...) to these rows of `target` (T, ...), which may occur several times, always in the same
        order."""
        for rows, span in self._distinct_parts:
            rows.add(target, values[span])

    @cached_property
    def _distinct_parts(self) -> list[tuple[Rows, slice]]:
        spans = self.distinct_spans()
        return list(zip(self.parts(spans), spans))

    def add(self, target: torch.Tensor, values: torch.Tensor) -> None:
        """Add `values` (n, ...), whose dtype may be narrower, to these rows of `target` (T, ...)."""
        if self.index is not None:
            target.index_add_(0, self.index, values.to(target.dtype))
            return
        for there, here in self.pieces():
            target[there].add_(values[here])
