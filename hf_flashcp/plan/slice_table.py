"""`SliceTable`: the slices of a plan as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import chain

import numpy as np

from .ranges import Ranges
from .slices import Slice


class SliceTable:
    """Slices as arrays of equal length, rank by rank.

    Tokens are numbered along a line that holds all documents in order, with gaps between them, so that a token has one
    number, its position, instead of a document and a place in it.

    Args:
        ranks (`np.ndarray`): the rank that holds each slice, (n,) int64.
        documents (`np.ndarray`): its document.
        bases (`np.ndarray`): the position of the first token of the document.
        spans (`Ranges`): the positions of its tokens, ascending for each rank.
        rows (`np.ndarray`): the row at which it begins in the sequence of its rank.
    """

    def __init__(self, ranks: np.ndarray, documents: np.ndarray, bases: np.ndarray, spans: Ranges, rows: np.ndarray):
        self.ranks, self.documents, self.bases, self.spans, self.rows = ranks, documents, bases, spans, rows

    @classmethod
    def of(cls, slices: Sequence[Sequence[Slice]]) -> SliceTable:
        """Return the table of the slices of each rank, which ascend."""
        counts = [len(of_rank) for of_rank in slices]
        numbers = chain.from_iterable(chain.from_iterable(slices))
        documents, firsts, lasts = np.fromiter(numbers, np.int64, 3 * sum(counts)).reshape(-1, 3).T
        tokens = lasts - firsts
        ranks, ends = np.repeat(np.arange(len(counts)), counts), np.append(0, tokens.cumsum())
        begins = ends[np.append(0, np.cumsum(counts))[ranks]]
        bases = documents * int(lasts.max(initial=0))
        return cls(ranks, documents, bases, Ranges(bases + firsts, bases + lasts), ends[:-1] - begins)

    def select(self, which: np.ndarray | slice) -> SliceTable:
        """Return a table of some of the slices, given by indices, a mask or a slice."""
        return SliceTable(
            self.ranks[which], self.documents[which], self.bases[which], self.spans.select(which), self.rows[which]
        )

    def of_rank(self, rank: int) -> SliceTable:
        """Return the slices of one rank of a table that is ordered by rank."""
        first, last = np.searchsorted(self.ranks, [rank, rank + 1])
        return self.select(slice(first, last))

    @cached_property
    def by_position(self) -> SliceTable:
        """The same slices in the order of their positions."""
        return self.select(np.argsort(self.spans.starts, kind="stable"))

    @property
    def query_rows(self) -> Ranges:
        """The rows of each slice in the sequence of its rank."""
        return Ranges(self.rows, self.rows + self.spans.lengths)
