"""The work of a plan's ranks in one attention layer: rectangles, stages of the exchange, and seconds per kernel call.

The time of a kernel call is computed from its tiles. A tile is `tile` queries of one head against the keys that they
see. A fixed overhead, expressed in keys, is added to each tile; it is what makes short rectangles slow. No call is
shorter than its longest tile, which one unit of the device computes alone. Kernels that start empty blocks take
further time for them, and for dividing the rectangles into several calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..plan.hierarchical_traffic import hierarchical_traffic
from ..plan.kernel_calls import ROWS_PER_BLOCK, LengthClasses
from ..plan.shard_plan import ShardPlan
from ..plan.slices import Slice, slices_by_document
from ..plan.traffic import by_link
from .hardware_profile import Kernel
from .model_shape import AttentionLayers


_NO_WINDOW = 1 << 40


class Rectangles(NamedTuple):
    """Rectangles of queries and keys that kernel calls compute, as (n,) int64 columns.

    All queries of a rectangle see all of its keys. Under a causal mask these keys lie before the queries, which also
    see each other's keys causally.
    """

    ranks: np.ndarray
    queries: np.ndarray
    keys: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, int]]) -> Rectangles:
        """Make the columns from `(rank, queries, keys)` rows."""
        return cls(*np.array(rows, dtype=np.int64).reshape(-1, 3).T)


class StageWork(NamedTuple):
    """One exchange of KV and the rectangles that wait for it. In windowed layers they have a causal mask.

    Traffic is in tokens whose KV travels in forward.
    """

    rectangles: Rectangles
    received: np.ndarray  # (2, cp_size): from ranks of the same node, and from other nodes
    sent: np.ndarray  # (2, cp_size): to ranks of the same node, and to other nodes
    forwarded: np.ndarray  # (2, cp_size): received and sent in the second step of a hierarchical exchange
    copied: np.ndarray  # (cp_size,): packed to be sent, and in a hierarchical exchange also put in place


def layer_work(plan: ShardPlan, window: int | None, ranks_per_node: int) -> tuple[Rectangles, list[StageWork]]:
    """Return the local rectangles, which have a causal mask, and the stages in which any KV travels.

    Windowed layers have at most one stage.
    """
    groups = plan.offset_groups
    local, remote = _full_rectangles(plan.slices) if window is None else _window_rectangles(plan.slices, window)
    if window is not None or groups is None or len(groups) < 2:
        work = _stage(plan, remote, window, None, ranks_per_node)
        return local, [work] if work.received.any() else []
    staged = _staged_rectangles(plan.slices, plan.cp_size, groups)
    works = [_stage(plan, rectangles, None, group, ranks_per_node) for rectangles, group in zip(staged, groups)]
    return local, [work for work in works if work.received.any()]


def _stage(
    plan: ShardPlan, rectangles: Rectangles, window: int | None, group: Sequence[int] | None, ranks_per_node: int
) -> StageWork:
    cp_size = plan.cp_size
    nothing = np.zeros((2, cp_size), dtype=np.int64)
    if plan.ranks_per_node is not None:
        first, second = hierarchical_traffic(plan.slices, plan.ranks_per_node, window, group)
        received, sent = by_link(first, ranks_per_node)
        forwarded = np.array([second.sum(0), second.sum(1)])
        # Forwarded rows are packed again. All rows that the rank needs, from either step, are put in place.
        return StageWork(rectangles, received, sent, forwarded, sent.sum(0) + forwarded.sum(0) + received.sum(0))
    if group is not None:
        received, sent = by_link(plan.kv_traffic() * np.isin(_ring_offsets(cp_size), group), ranks_per_node)
    elif cp_size <= ranks_per_node and window is None:
        received, sent = (np.array([tokens, [0] * cp_size]) for tokens in plan.kv_moved())
    else:
        received, sent = by_link(plan.kv_traffic(window), ranks_per_node)
    return StageWork(rectangles, received, sent, nothing, sent.sum(0))


class LargestCalls(NamedTuple):
    """The largest kernel calls of a plan, over all ranks and layers."""

    keys: int  # the most keys in a stage
    masked: bool  # whether that stage has a causal mask
    sequences: int  # the most rectangles in a call


def largest_calls(plan: ShardPlan, layers: Sequence[AttentionLayers]) -> LargestCalls:
    """Return the sizes of the largest kernel calls in any of the layers."""
    stages, sequences = [(0, False)], [0]
    for window in {plan.hiding_window(each.window) for each in layers}:
        if window is None:
            local, remote = _full_rectangles(plan.slices)
            traffic, offset = plan.kv_traffic(), _ring_offsets(plan.cp_size)
            keys = [int((traffic * np.isin(offset, group)).sum(0).max()) for group in plan.stage_offsets]
        else:
            local, remote = _window_rectangles(plan.slices, window)
            bands = np.bincount(remote.ranks, remote.queries + remote.keys, plan.cp_size)  # one per rectangle
            keys = [int(bands.max())]
        stages += [(count, window is not None) for count in keys]
        sequences += [int(np.bincount(each.ranks, minlength=plan.cp_size).max()) for each in (local, remote)]
    return LargestCalls(*max(stages), max(sequences))


def call_seconds(
    kernel: Kernel,
    rectangles: Rectangles,
    *,
    cp_size: int,
    layers: AttentionLayers,
    window: int | None,
    causal: bool,
    backward: bool,
) -> np.ndarray:
    """Return the seconds of each rank's kernel calls for its rectangles, (cp_size,); 0 for ranks without rectangles.

    Rectangles whose keys overlap, which take separate calls, are counted as if they shared one.
    """
    speed = kernel.backward if backward else kernel.forward
    ranks, queries, before = rectangles
    tiles = -(-queries // kernel.tile)
    if causal:
        # Tile i = 1, 2, ... sees before + i x tile keys, at most a window plus a tile.
        most = (window or _NO_WINDOW) + kernel.tile
        growing = np.clip((most - before) // kernel.tile, 0, tiles)
        keys = before * growing + kernel.tile * growing * (growing + 1) / 2 + (tiles - growing) * most
        longest = np.minimum(before + tiles * kernel.tile, most)
    else:
        keys, longest = tiles * before, before
    flops_per_pair = layers.backward_flops_per_pair if backward else layers.forward_flops_per_pair
    per_key = kernel.tile * flops_per_pair / (speed.flops_per_second * (kernel.causal_efficiency if causal else 1))
    overhead = speed.overhead_keys(causal)
    total = np.bincount(ranks, (keys + tiles * overhead) * layers.query_heads * per_key, cp_size)
    alone = np.zeros(cp_size)
    np.maximum.at(alone, ranks, (longest + overhead) * kernel.units * per_key)
    calls, empty = (np.bincount(ranks, minlength=cp_size) > 0).astype(np.int64), np.zeros(cp_size)
    if kernel.block_seconds and len(ranks):
        blocks = -(-((before + queries * causal) if backward else queries) // kernel.tile)
        joined = causal and window is None  # squares of adjacent documents; other rows have gaps between them
        divided = LengthClasses(blocks, queries * joined, ranks, cp_size).divided(layers.query_heads)
        calls, empty = divided.calls, divided.started - np.bincount(ranks, blocks, cp_size)
        empty = empty + divided.copied / ROWS_PER_BLOCK
    return np.maximum(total, alone) + kernel.call_seconds * calls + kernel.block_seconds * layers.query_heads * empty


def _ring_offsets(cp_size: int) -> np.ndarray:
    """Return the ring offset from each sender to each receiver, (cp_size, cp_size) int64, [sender][receiver]."""
    return (np.arange(cp_size) - np.arange(cp_size)[:, None]) % cp_size


def _full_rectangles(slices: Sequence[Sequence[Slice]]) -> tuple[Rectangles, Rectangles]:
    """Return `(local, remote)` rectangles of a full-attention layer.

    A rank's slices of a document form one causal square. Each slice also sees all tokens before it that other ranks
    hold, without a mask.
    """
    local, remote = [], []
    for rank, held in enumerate(slices):
        last, owned = None, 0
        for document, start, stop in held:
            if document != last:
                if owned:
                    local.append((rank, owned, 0))
                last, owned = document, 0
            if start > owned:
                remote.append((rank, stop - start, start - owned))
            owned += stop - start
        if owned:
            local.append((rank, owned, 0))
    return Rectangles.of(local), Rectangles.of(remote)


def _window_rectangles(slices: Sequence[Sequence[Slice]], window: int) -> tuple[Rectangles, Rectangles]:
    """Return `(local, remote)` rectangles of a windowed layer.

    Local rows see no keys before their slice. The others, at the start of a slice, wait for their band of keys.
    """
    local, remote = [], []
    for rank, held in enumerate(slices):
        for _, start, stop in held:
            waiting = min(stop - start, window - 1) if start else 0
            if waiting:
                remote.append((rank, waiting, min(start, window - 1)))
            if start + waiting < stop:
                local.append((rank, stop - start - waiting, waiting))
    return Rectangles.of(local), Rectangles.of(remote)


def _staged_rectangles(
    slices: Sequence[Sequence[Slice]], cp_size: int, groups: Sequence[Sequence[int]]
) -> list[Rectangles]:
    """Return, for each stage, the rectangles of slices against the keys before them that come in that stage."""
    group_of = {offset: index for index, group in enumerate(groups) for offset in group}
    found: list[list[tuple[int, int, int]]] = [[] for _ in groups]
    for of_document in slices_by_document(slices).values():
        for index, (start, stop, rank) in enumerate(of_document):
            keys = [0] * len(groups)
            for other_start, other_stop, other in of_document[:index]:
                if other != rank:
                    keys[group_of[(rank - other) % cp_size]] += other_stop - other_start
            for rectangles, count in zip(found, keys):
                if count:
                    rectangles.append((rank, stop - start, count))
    return [Rectangles.of(rectangles) for rectangles in found]
