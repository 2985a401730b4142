"""The work of a plan's ranks in one attention layer: rectangles, stages of the exchange, and seconds per kernel call.

The time of a kernel call is computed from its tiles. A tile is `tile` queries of one head against the keys that they
see. A fixed overhead, expressed in keys, is added to each tile; it is what makes short rectangles slow. No call is
shorter than its longest tile, which one unit of the device computes alone. Kernels that start empty blocks take
further time for them, and for dividing the rectangles into several calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..plan.kernel_calls import ROWS_PER_BLOCK, LengthClasses
from ..plan.link_traffic import LinkTraffic, Nodes, entry_links, full_links, staged_entries, window_entries
from ..plan.shard_plan import ShardPlan
from .hardware_profile import Kernel
from .joined_plans import JoinedPlans
from .model_shape import AttentionLayers


_NO_WINDOW = 1 << 40


class Rectangles:
    """Rectangles of queries and keys that kernel calls compute, as (n,) int64 columns.

    All queries of a rectangle see all of its keys. Under a causal mask these keys lie before the queries, which also
    see each other's keys causally. What does not depend on a kernel's speed is counted once.
    """

    def __init__(self, ranks: np.ndarray, queries: np.ndarray, keys: np.ndarray):
        self.ranks, self.queries, self.keys = ranks, queries, keys
        self._counted: dict[tuple, Any] = {}

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, int]]) -> Rectangles:
        """Make the columns from `(rank, queries, keys)` rows."""
        return cls(*np.array(rows, dtype=np.int64).reshape(-1, 3).T)

    def tiles(self, tile: int, cp_size: int, window: int | None, causal: bool) -> Tiles:
        """Count the tiles of each rank's call."""
        key = tile, cp_size, window, causal
        if key not in self._counted:
            self._counted[key] = Tiles.of(self, *key)
        return self._counted[key]

    def empty_blocks(
        self, tile: int, cp_size: int, window: int | None, causal: bool, backward: bool, query_heads: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Count each rank's calls, (cp_size,), and the empty blocks per head that take as long as the empty blocks and
        the copied rows of these calls, (cp_size,)."""
        backward = backward and not (causal and not self.keys.any())  # squares have as many keys as queries
        key = tile, cp_size, window, causal, backward, query_heads
        if key not in self._counted:
            blocks = -(-((self.keys + self.queries * causal) if backward else self.queries) // tile)
            joined = causal and window is None  # squares of adjacent documents; other rows have gaps between them
            divided = LengthClasses(blocks, self.queries * joined, self.ranks, cp_size).divided(query_heads)
            empty = divided.started - np.bincount(self.ranks, blocks, cp_size)
            self._counted[key] = divided.calls, empty + divided.copied / ROWS_PER_BLOCK
        return self._counted[key]


class Tiles(NamedTuple):
    """The tiles of one call of each rank, (cp_size,) each."""

    keys: np.ndarray  # keys that the tiles see, in sum
    tiles: np.ndarray  # number of tiles
    longest: np.ndarray  # keys of the tile that sees the most
    used: np.ndarray  # whether the rank has any rectangles

    @classmethod
    def of(cls, rectangles: Rectangles, tile: int, cp_size: int, window: int | None, causal: bool) -> Tiles:
        """Count the tiles of `tile` queries."""
        ranks, queries, before = rectangles.ranks, rectangles.queries, rectangles.keys
        tiles = -(-queries // tile)
        if causal:
            # Tile i = 1, 2, ... sees before + i x tile keys, at most a window plus a tile.
            most = (window or _NO_WINDOW) + tile
            growing = tiles if window is None else np.clip((most - before) // tile, 0, tiles)
            keys = before * growing + tile * growing * (growing + 1) / 2 + (tiles - growing) * most
            longest = np.minimum(before + tiles * tile, most)
        else:
            keys, longest = tiles * before, before
        most_keys = np.zeros(cp_size, dtype=np.int64)
        np.maximum.at(most_keys, ranks, longest)
        counts = np.bincount(ranks, tiles, cp_size)
        return cls(np.bincount(ranks, keys, cp_size), counts, most_keys, counts > 0)


class StageWork(NamedTuple):
    """One exchange of KV and the rectangles that wait for it. In windowed layers they have a causal mask.

    Traffic is in tokens whose KV travels in forward.
    """

    rectangles: Rectangles
    received: np.ndarray  # (2, cp_size): from ranks of the same node, and from other nodes
    sent: np.ndarray  # (2, cp_size): to ranks of the same node, and to other nodes
    forwarded: np.ndarray  # (2, cp_size): received and sent in the second step of a hierarchical exchange
    copied: np.ndarray  # (cp_size,): packed to be sent, and in a hierarchical exchange also put in place

    @classmethod
    def of(cls, rectangles: Rectangles, links: LinkTraffic, hierarchical: bool) -> StageWork:
        """Return the work of a stage with some traffic."""
        copied = links.sent.sum(0)
        if hierarchical:
            # Forwarded rows are packed again. All rows that the rank needs, from either step, are put in place.
            copied = copied + links.forwarded.sum(0) + links.received.sum(0)
        return cls(rectangles, *links, copied)


def layer_work(
    plans: JoinedPlans, window: int | None, ranks_per_node: int, hierarchical: bool
) -> tuple[Rectangles, list[StageWork]]:
    """Return the local rectangles, which have a causal mask, and the stages in which any KV travels.

    Windowed layers have at most one stage.
    """
    nodes = Nodes(plans.cp_size, plans.ranks_of_each, ranks_per_node)
    if window is not None:
        local, waiting = plans.counted(("window", window), lambda: _window_rectangles(plans, window))
        entries = plans.counted(("entries", window), lambda: window_entries(plans.slice_table, window))
        links = entry_links(entries, 1, nodes, hierarchical)
        rectangles = [waiting]
    elif plans.num_stages == 1:
        local, remote = plans.counted("rectangles", lambda: _full_rectangles(plans))
        links, rectangles = [full_links(plans.cut_slices, nodes, hierarchical)], [remote]
    else:
        local, _ = plans.counted("rectangles", lambda: _full_rectangles(plans))
        staged = plans.counted("staged", lambda: staged_entries(plans.cut_slices, plans.stage_of))
        links = entry_links(staged.entries, plans.num_stages, nodes, hierarchical)
        rectangles = plans.counted("staged rectangles", lambda: _staged_rectangles(plans, staged.keys))
    works = [StageWork.of(*each, hierarchical) for each in zip(rectangles, links)]
    return local, [work for work in works if work.received.any()]


class LargestCalls(NamedTuple):
    """The largest kernel calls of a plan, over all ranks and layers."""

    keys: int  # the most keys in a stage
    masked: bool  # whether that stage has a causal mask
    sequences: int  # the most rectangles in a call


def largest_calls(plan: ShardPlan, layers: Sequence[AttentionLayers]) -> LargestCalls:
    """Return the sizes of the largest kernel calls in any of the layers."""
    joined = JoinedPlans([plan])
    stages, sequences = [(0, False)], [0]
    for window in {plan.hiding_window(each.window) for each in layers}:
        if window is None:
            local, remote = _full_rectangles(joined)
            _, stages_of_layer = layer_work(joined, None, plan.cp_size, hierarchical=False)
            keys = [int(stage.received.sum(0).max()) for stage in stages_of_layer]
        else:
            local, remote = _window_rectangles(joined, window)
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
    flops_per_pair = layers.backward_flops_per_pair if backward else layers.forward_flops_per_pair
    per_key = kernel.tile * flops_per_pair / (speed.flops_per_second * (kernel.causal_efficiency if causal else 1))
    overhead = speed.overhead_keys(causal)
    tiles = rectangles.tiles(kernel.tile, cp_size, window, causal)
    total = (tiles.keys + tiles.tiles * overhead) * (layers.query_heads * per_key)
    alone = (tiles.longest + tiles.used * overhead) * (kernel.units * per_key)
    seconds = np.maximum(total, alone)
    if not kernel.block_seconds or not len(rectangles.ranks):
        return seconds + kernel.call_seconds * tiles.used
    calls, empty = rectangles.empty_blocks(kernel.tile, cp_size, window, causal, backward, layers.query_heads)
    return seconds + kernel.call_seconds * calls + kernel.block_seconds * layers.query_heads * empty


def _full_rectangles(plans: JoinedPlans) -> tuple[Rectangles, Rectangles]:
    """Return `(local, remote)` rectangles of a full-attention layer.

    A rank's slices of a document form one causal square. Each slice also sees all tokens before it that other ranks
    hold, without a mask.
    """
    table, (firsts, lasts) = plans.slice_table, plans.runs
    tokens, starts = table.spans.lengths, table.spans.starts - table.bases
    ends = tokens.cumsum()
    owned = ends[lasts] - ends[firsts] + tokens[firsts]
    local = Rectangles(table.ranks[firsts], owned, np.zeros_like(owned))
    before = ends - tokens
    keys = starts - before + np.repeat(before[firsts], lasts - firsts + 1)
    waits = np.flatnonzero(keys)
    return local, Rectangles(table.ranks[waits], tokens[waits], keys[waits])


def _window_rectangles(plans: JoinedPlans, window: int) -> tuple[Rectangles, Rectangles]:
    """Return `(local, remote)` rectangles of a windowed layer.

    Local rows see no keys before their slice. The others, at the start of a slice, wait for their band of keys.
    """
    table = plans.slice_table
    tokens, starts = table.spans.lengths, table.spans.starts - table.bases
    waiting = np.where(starts > 0, np.minimum(tokens, window - 1), 0)
    waits, stays = np.flatnonzero(waiting), np.flatnonzero(waiting < tokens)
    local = Rectangles(table.ranks[stays], (tokens - waiting)[stays], waiting[stays])
    return local, Rectangles(table.ranks[waits], waiting[waits], np.minimum(starts, window - 1)[waits])


def _staged_rectangles(plans: JoinedPlans, keys: np.ndarray) -> list[Rectangles]:
    """Return, for each stage, the rectangles of slices against the keys before them that come in that stage."""
    slices = plans.cut_slices
    return [
        Rectangles(slices.ranks[waits], slices.tokens[waits], of_stage[waits])
        for of_stage, waits in ((of_stage, np.flatnonzero(of_stage)) for of_stage in keys.T)
    ]
