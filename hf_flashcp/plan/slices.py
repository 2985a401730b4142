"""`Slice`, a run of tokens of one document, and counts of the tokens and attention pairs in slices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import NamedTuple


Lengths = tuple[int, ...]
"""Number of tokens of each document."""


class Slice(NamedTuple):
    """Tokens [start, stop) of one document."""

    document: int
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.stop - self.start


class LocalSlice(NamedTuple):
    """Tokens [start, stop) of a document, which begin at row `row` of the sequence of the rank that holds them."""

    document: int
    start: int
    stop: int
    row: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.stop - self.start


def local_slices(slices: Sequence[Slice]) -> tuple[LocalSlice, ...]:
    """Return a rank's slices with the rows at which they begin in its sequence."""
    rows = accumulate((stop - start for _, start, stop in slices), initial=0)
    return tuple(LocalSlice(*piece, row) for piece, row in zip(slices, rows))


Slices = list[list[Slice]]
"""The slices of each rank."""


HeldSlice = tuple[int, int, int]
"""`(start, stop, rank)`: tokens [start, stop) of a document, and the rank that holds them. The context says which
document. This is a plain tuple for speed, because the search groups the slices of thousands of plans."""


def slices_by_document(slices: Sequence[Sequence[Slice]]) -> dict[int, list[HeldSlice]]:
    """Return the slices of each document, in the order of its tokens, with the ranks that hold them."""
    held: dict[int, list[HeldSlice]] = defaultdict(list)
    for rank, rank_slices in enumerate(slices):
        for document, start, stop in rank_slices:
            held[document].append((start, stop, rank))
    for of_document in held.values():
        of_document.sort()
    return held


def runs_by_document(slices: Sequence[Sequence[Slice]]) -> dict[int, list[tuple[int, int]]]:
    """Return the rank and the number of tokens of each run of a document's slices, in the order of its tokens.

    A run holds adjacent slices on the same rank. Documents ascend.
    """
    runs = {}
    for document, held in sorted(slices_by_document(slices).items()):
        by_rank = groupby(held, key=lambda piece: piece[2])
        runs[document] = [(rank, sum(stop - start for start, stop, _ in run)) for rank, run in by_rank]
    return runs


def attention_pairs(start: int, stop: int, window: int | None = None) -> int:
    """Return the number of query-key pairs of the queries [start, stop) of a document (W_i of FlashCP eq. 3).

    Each query sees the keys of its document up to its own, at most `window` of them if there is a window.
    """
    if window is not None and stop > window:
        inside = max(start, window)
        return (stop - inside) * window + (attention_pairs(start, inside) if start < inside else 0)
    return (stop - start) * (stop + start + 1) // 2


def rank_tokens(slices: Sequence[Sequence[Slice]]) -> list[int]:
    """Return the number of tokens of each rank."""
    return [sum(stop - start for _, start, stop in held) for held in slices]


def rank_pairs(slices: Sequence[Sequence[Slice]], window: int | None = None) -> list[int]:
    """Return the number of attention pairs of each rank, see [`attention_pairs`]."""
    if window is None:
        # `attention_pairs` is written out here because the search measures thousands of slices.
        return [sum((stop - start) * (stop + start + 1) // 2 for _, start, stop in held) for held in slices]
    return [sum(attention_pairs(start, stop, window) for _, start, stop in held) for held in slices]
