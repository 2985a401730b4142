"""`Parts`: which rows of a result each of several partial results covers.

For a result of six rows, of which a first part covers all, a second part rows 2 and 3, and a third part rows 2 and 5:

    rows of the result    0  1  2  3  4  5
    first part            0  1  2  3  4  5         `places` holds this table, transposed:
    second part           -  -  0  1  -  -         the row of each part, or -1
    third part            -  -  0  -  -  1
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..plan.ranges import coverage
from .rows import Rows
from .upload import upload


class Parts:
    """The rows of a result that each of several partial results covers; a part covers no row twice.

    Args:
        rows (`Sequence[Rows]`): the rows of each part, in the order in which the part has them.
        count (`int`): number of rows of the result.
        device (`torch.device`, *optional*): device of the results; CPU by default.

    Attributes:
        rows (`tuple[Rows, ...]`): the rows of each part.
        count (`int`): number of rows of the result.
        begins_whole (`bool`): whether the first part covers all rows in order.
        disjoint (`bool`): whether no row is covered twice.
        complete (`bool`): whether every row is covered.
        most (`int`): the largest number of parts that cover the same row.
    """

    def __init__(self, rows: Sequence[Rows], count: int, device: torch.device | None = None):
        self.rows, self.count, self._device = tuple(rows), count, device or torch.device("cpu")
        covered = coverage([each.spans for each in rows], count)
        self.most = int(covered.max(initial=0))
        self.disjoint, self.complete = self.most <= 1, bool(covered.all())
        self.begins_whole = len(rows) > 0 and rows[0].ranges == (((0, count),) if count else ())
        self._places: torch.Tensor | None = None
        if self._device.type == "cuda":
            self.places  # noqa: B018

    @classmethod
    def of(cls, rows: Rows, count: int, device: torch.device | None = None) -> Parts:
        """Divide rows, some of which may occur twice, into consecutive parts, each as long as possible.

        Values that are added part by part are summed in the same order on every device, because no two values of a
        part are added to the same row.
        """
        return cls(rows.parts(rows.distinct_spans()), count, device)

    @property
    def places(self) -> torch.Tensor:
        """The row of each part that covers a row of the result, or -1: (count, parts) int32, made on first use."""
        if self._places is None:
            table = np.full((self.count, len(self.rows)), -1, dtype=np.int32)
            for part, rows in enumerate(self.rows):
                table[rows.spans.numbers(), part] = np.arange(rows.count)
            self._places = upload(torch.from_numpy(table), self._device)
        return self._places

    def split(self, values: torch.Tensor, first: int = 0) -> Sequence[torch.Tensor]:
        """Split `values` (heads, n, D), which has the rows of all parts from `first` on, into these parts."""
        return values.split([rows.count for rows in self.rows[first:]], dim=1)
