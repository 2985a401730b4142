"""`JoinedPlans`: several plans of the same batch as if they were one plan, so that NumPy prices them together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..plan.link_traffic import CutSlices
from ..plan.ranges import Ranges, runs
from ..plan.shard_plan import ShardPlan
from ..plan.slice_table import SliceTable


class JoinedPlans:
    """Plans of the same documents on as many ranks each, as one plan with all of their ranks and documents.

    Args:
        plans (`Sequence[ShardPlan]`): the plans.

    Attributes:
        cp_size (`int`): number of ranks of all plans together.
        ranks_of_each (`int`): number of ranks of each plan.
    """

    def __init__(self, plans: Sequence[ShardPlan]):
        self.plans, self.ranks_of_each = plans, plans[0].cp_size
        self.cp_size = len(plans) * self.ranks_of_each
        self._counted: dict[Hashable, Any] = {}

    def counted(self, key: Hashable, count: Callable[[], Any]) -> Any:
        """Return what `count` returns, which is called once per key."""
        if key not in self._counted:
            self._counted[key] = count()
        return self._counted[key]

    def hiding_window(self, window: int | None) -> int | None:
        """Return [`ShardPlan.hiding_window`], which is the same for all plans."""
        return self.plans[0].hiding_window(window)

    @cached_property
    def slice_table(self) -> SliceTable:
        """The slices of all plans."""
        tables = [plan.slice_table for plan in self.plans]
        if len(tables) == 1:
            return tables[0]
        number = np.repeat(np.arange(len(tables)), [len(table.ranks) for table in tables])
        ranks, documents, bases, starts, stops, rows = (
            np.concatenate(column)
            for column in zip(*((each.ranks, each.documents, each.bases, *each.spans, each.rows) for each in tables))
        )
        documents_of_each = len(self.plans[0].lengths)
        shift = number * (documents_of_each * self.plans[0].longest_document)
        return SliceTable(
            ranks + number * self.ranks_of_each,
            documents + number * documents_of_each,
            bases + shift,
            Ranges(starts + shift, stops + shift),
            rows,
        )

    @cached_property
    def tokens(self) -> np.ndarray:
        """Number of tokens of each rank, (cp_size,)."""
        return np.bincount(self.slice_table.ranks, self.slice_table.spans.lengths, self.cp_size).astype(np.int64)

    @cached_property
    def pairs(self) -> np.ndarray:
        """Number of attention pairs of each rank, (cp_size,)."""
        table = self.slice_table
        tokens, starts = table.spans.lengths, table.spans.starts - table.bases
        pairs = tokens * (2 * starts + tokens + 1) // 2
        ends = np.searchsorted(table.ranks, np.arange(self.cp_size + 1))
        return np.diff(np.append(0, pairs.cumsum())[ends])

    @cached_property
    def runs(self) -> tuple[np.ndarray, np.ndarray]:
        """The first and the last slice of each document on each rank, (n,) indices each."""
        table = self.slice_table
        changes = (np.diff(table.documents) != 0) | (np.diff(table.ranks) != 0)
        return runs(changes, len(table.ranks))

    @cached_property
    def cut_slices(self) -> CutSlices:
        """The slices of the documents that are cut."""
        return CutSlices.of(self.slice_table)

    @cached_property
    def stage_of(self) -> np.ndarray:
        """The stage of each ring offset in each plan, (plans, ranks_of_each) int64."""
        stages = np.zeros((len(self.plans), self.ranks_of_each), dtype=np.int64)
        for of_plan, plan in zip(stages, self.plans):
            for stage, offsets in enumerate(plan.offset_groups or ()):
                of_plan[list(offsets)] = stage
        return stages

    @property
    def num_stages(self) -> int:
        """The most stages of any plan."""
        return int(self.stage_of.max()) + 1
