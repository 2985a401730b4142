"""`Holders`: the ranks that hold each document, in the order of its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .ranges import runs


if TYPE_CHECKING:
    from .slice_table import SliceTable


class Holders:
    """Slices in the order of their positions, and which of them are the first and last of their rank.

    Args:
        table (`SliceTable`): the slices of a valid plan.

    Attributes:
        order (`np.ndarray`): the indices in the table, (n,) int64.
        ranks (`np.ndarray`): the rank of each slice, (n,) int64.
        documents (`np.ndarray`): its document, (n,) int64, ascending.
        first (`np.ndarray`): whether its rank holds no earlier slice of the document, (n,) int64, 0 or 1.
        last (`np.ndarray`): whether its rank holds no later slice of the document, (n,) int64, 0 or 1.
        place (`np.ndarray`): how many slices of the document are before it, (n,) int64.
        left (`np.ndarray`): how many slices of the document are after it, (n,) int64.
    """

    def __init__(self, table: SliceTable):
        changes = (table.ranks[1:] != table.ranks[:-1]) | (table.documents[1:] != table.documents[:-1])
        ends = np.zeros((2, len(table.ranks)), dtype=np.int64)
        for flags, places in zip(ends, runs(changes, len(table.ranks))):
            flags[places] = 1
        self.order = table.position_order
        self.ranks, self.documents = table.by_position.ranks, table.by_position.documents
        self.first, self.last = ends[:, self.order]
        self._begins, self._ends = runs(self.documents[1:] != self.documents[:-1], len(self.documents))
        self._sizes = self._ends - self._begins + 1
        self.place = np.arange(len(self.order)) - self.of_document(self._begins)
        self.left = self.of_document(self._sizes) - 1 - self.place

    def of_document(self, values: np.ndarray) -> np.ndarray:
        """Return the value of each slice's document, given one per document, (n,)."""
        return np.repeat(values, self._sizes)

    def earlier_ranks(self) -> np.ndarray:
        """Return how many ranks hold a slice of the document that is not after each slice, (n,) int64."""
        counts = self.first.cumsum()
        return counts - self.of_document(counts[self._begins] - 1)

    def later_ranks(self) -> np.ndarray:
        """Return how many ranks hold a slice of the document that is not before each slice, (n,) int64."""
        counts = self.last.cumsum()
        return self.of_document(counts[self._ends]) - counts + self.last

    def in_table(self, values: np.ndarray) -> np.ndarray:
        """Return values of the slices in the order of the table, (n,) int64."""
        found = np.empty_like(values)
        found[self.order] = values
        return found
