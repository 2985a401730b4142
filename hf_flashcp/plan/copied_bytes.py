"""Counts the bytes that one layer's copies move on each rank, outside of attention kernels.

Before and after the kernels, rows of Q, K, V and their gradients are packed, put in order, merged and added up. The
counts are what fused kernels read and write on a GPU (`layout.fused`, `attention.fused_merge`), without index maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from .ranges import Ranges, coverage
from .rectangles import StageKeys, local_rectangles, query_rows, stage_keys
from .stage_traffic import stage_traffic


if TYPE_CHECKING:
    from .shard_plan import ShardPlan


class RowBytes(NamedTuple):
    """Bytes per token: Q, an output or their gradients; a logsumexp; K and V or their gradients."""

    query: int
    logsumexp: int
    keys: int

    @classmethod
    def of(cls, query_heads: int, kv_heads: int, head_dim: int, itemsize: int) -> RowBytes:
        """Return them for heads of keys and values that are equally wide."""
        head = head_dim * itemsize
        return cls(query_heads * head, query_heads * max(itemsize, 4), 2 * kv_heads * head)


def bytes_copied(plan: ShardPlan, window: int | None, row: RowBytes) -> list[int]:
    """Return the bytes that each rank reads and writes, forward and backward together, if received KV is kept."""
    stages = stage_traffic(plan, window)
    found = []
    for rank in range(plan.cp_size):
        slices = plan.slice_table.of_rank(rank)
        local, count = local_rectangles(slices, window), slices.spans.total
        keys = [stage_keys(slices, stage.received(rank), window) for stage in stages]
        received = [stage.received(rank).spans.total for stage in stages]
        sent = [stage.sent(rank).sender_rows for stage in stages]
        own = [each.own for each in keys if each.own is not None]
        passes = local, *(each.rectangles for each in keys)
        outputs = [query_rows(rectangles) for rectangles in passes if rectangles]
        whole = [Ranges.of([(0, count)])] if local else []
        moved_outputs = _rows_added(outputs, count)
        moved_keys = 2 * sum(each.total for each in sent) + sum(map(_rows_of_stage, keys, received))
        moved_keys += _rows_added([*whole, *own, *sent], count)
        found.append(moved_outputs * (2 * row.query + row.logsumexp) + moved_keys * row.keys)
    return found


def _rows_added(parts: Sequence[Ranges], count: int) -> int:
    """Return how many rows are read and written to add up parts of `count` rows.

    If the first part has all rows, the others are added to it, and rows that only it has are left alone.
    """
    covered = coverage(parts, count)
    if parts and parts[0].joined().total == count:
        covered = covered[covered > 1]
    return int(covered.sum()) + len(covered)


def _rows_of_stage(keys: StageKeys, received: int) -> int:
    """Return how many rows are read and written to put a stage's keys in order, and to pack their gradients."""
    if keys.order is None:
        return 2 * received
    own = 0 if keys.own is None else keys.own.total
    gathered = 2 * keys.order.total if len(keys.order.joined().starts) > 1 else 0  # a single range is read in place
    return 2 * own + gathered + keys.order.total + received + own
