"""`Ranges`: half-open ranges of whole numbers as arrays, and where ranges overlap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np


class Ranges(NamedTuple):
    """Half-open ranges [start, stop), in any order."""

    starts: np.ndarray  # (n,) int64
    stops: np.ndarray  # (n,) int64

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]]) -> Ranges:
        """Return `(start, stop)` pairs as ranges."""
        return cls(*np.fromiter(chain.from_iterable(pairs), dtype=np.int64).reshape(-1, 2).T)

    @classmethod
    def of_numbers(cls, numbers: np.ndarray) -> Ranges:
        """Return the fewest ranges that hold the numbers, (n,) int64, in their order."""
        firsts, lasts = runs(np.diff(numbers) != 1, len(numbers))
        return cls(numbers[firsts], numbers[lasts] + 1)

    @classmethod
    def concatenated(cls, parts: Sequence[Ranges]) -> Ranges:
        """Return the ranges of several parts, one part after the other."""
        empty = np.empty(0, dtype=np.int64)
        return cls(*(np.concatenate([empty, *edges]) for edges in zip(*parts))) if parts else cls(empty, empty)

    @property
    def lengths(self) -> np.ndarray:
        """How many numbers each range holds, (n,) int64."""
        return self.stops - self.starts

    @property
    def total(self) -> int:
        """How many numbers all ranges hold."""
        return int((self.stops - self.starts).sum())

    def numbers(self) -> np.ndarray:
        """Return the numbers in the ranges, (total,) int64, one range after the other."""
        starts, stops = self.filled()
        ends = (stops - starts).cumsum()
        steps = np.ones(ends[-1] if len(ends) else 0, dtype=np.int64)  # from each number to the next
        steps[:1] = starts[:1]
        steps[ends[:-1]] = starts[1:] - stops[:-1] + 1
        return steps.cumsum(out=steps)

    def filled(self) -> Ranges:
        """Return the ranges that are not empty."""
        return self if (self.starts < self.stops).all() else self.select(self.starts < self.stops)

    def select(self, which: np.ndarray | slice) -> Ranges:
        """Return some of the ranges, given by indices, a mask or a slice."""
        return Ranges(self.starts[which], self.stops[which])

    def joined(self) -> Ranges:
        """Return the same numbers in the same order in as few ranges as possible, none of them empty."""
        filled = self.filled()
        firsts, lasts = runs(filled.starts[1:] != filled.stops[:-1], len(filled.starts))
        return Ranges(filled.starts[firsts], filled.stops[lasts])

    def cut(self, edges: np.ndarray) -> Ranges:
        """Return the same numbers in more ranges, none of them empty, of which one ends at each of the ascending
        `edges` of `numbers()`."""
        ends = self.lengths.cumsum()
        cuts = np.sort(np.concatenate([ends, edges]), kind="stable")
        stops = cuts[np.diff(cuts, prepend=0) > 0]
        holders = np.searchsorted(ends, stops)
        lengths = np.diff(stops, prepend=0)
        last = self.stops[holders] - (ends[holders] - stops)
        return Ranges(last - lengths, last)


def coverage(parts: Sequence[Ranges], count: int) -> np.ndarray:
    """Return in how many ranges of all parts each of the numbers below `count` lies, (count,) int64."""
    starts, stops = Ranges.concatenated(parts)
    changes = np.bincount(starts, minlength=count + 1) - np.bincount(stops, minlength=count + 1)
    return changes.cumsum()[:count]


def runs(breaks: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the first and of the last item of each run of `count` items, (n,) int64 each.

    `breaks` says, for every item but the first, whether a run begins with it.
    """
    lasts = np.append(np.flatnonzero(breaks), count - 1)[:count]
    return np.append(0, lasts[:-1] + 1)[:count], lasts


def stable_order(numbers: np.ndarray) -> np.ndarray:
    """Return the indices that sort small non-negative numbers and keep the order of equal ones, (n,) int64."""
    # NumPy sorts numbers of 16 bits by radix, in a tenth of the time.
    return np.argsort(numbers.astype(np.min_scalar_type(numbers.max(initial=0))), kind="stable")


class Overlaps(NamedTuple):
    """Where ranges overlap others, from [`overlaps`]."""

    first: np.ndarray  # (n,) index of a range of the first list
    second: np.ndarray  # (n,) index of a range of the second list
    common: Ranges  # the numbers that both hold


def overlaps(ranges: Ranges, others: Ranges) -> Overlaps:
    """Return where `ranges`, none of them empty, overlap `others`, which are ascending and disjoint.

    The result is ordered by the indices of `ranges`, then by those of `others`.
    """
    low = np.searchsorted(others.stops, ranges.starts, "right")
    found = Ranges(low, np.searchsorted(others.starts, ranges.stops, "left"))
    first, second = np.repeat(np.arange(len(low)), found.lengths), found.numbers()
    starts = np.maximum(ranges.starts[first], others.starts[second])
    return Overlaps(first, second, Ranges(starts, np.minimum(ranges.stops[first], others.stops[second])))
