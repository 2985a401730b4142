"""`Holders`: the ranks that hold each document, in the order of its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .ranges import runs


if TYPE_CHECKING:
    from .slice_table import SliceTable


class Holders:
    """Slices in the order of their positions, and which of them are the last of their rank.

    Args:
        table (`SliceTable`): the slices of a valid plan.

    Attributes:
        order (`np.ndarray`): the indices in the table, (n,) int64.
        ranks (`np.ndarray`): the rank of each slice, (n,) int64.
        documents (`np.ndarray`): its document, (n,) int64, ascending.
        last (`np.ndarray`): whether its rank holds no later slice of the document, (n,).
        place (`np.ndarray`): how many slices of the document are before it, (n,) int64.
        left (`np.ndarray`): how many slices of the document are after it, (n,) int64.
    """

    def __init__(self, table: SliceTable):
        changes = (table.ranks[1:] != table.ranks[:-1]) | (table.documents[1:] != table.documents[:-1])
        self.order = table.position_order
        self.ranks, self.documents = table.by_position.ranks, table.by_position.documents
        self.last = np.append(changes, True)[self.order]
        begins, ends = runs(self.documents[1:] != self.documents[:-1], len(self.documents))
        self._sizes = ends - begins + 1
        self.place = np.arange(len(self.order)) - self.of_document(begins)
        self.left = self.of_document(self._sizes) - 1 - self.place

    def of_document(self, values: np.ndarray) -> np.ndarray:
        """Return the value of each slice's document, given one per document, (n,)."""
        return np.repeat(values, self._sizes)

    def in_table(self, values: np.ndarray) -> np.ndarray:
        """Return values of the slices in the order of the table, (n,) int64."""
        found = np.empty_like(values)
        found[self.order] = values
        return found
