"""Divides the rectangles of a pass into calls of a varlen kernel, and counts the thread blocks that the calls start.

A varlen call takes any number of sequences, here one per rectangle, whose key ranges must be disjoint. Two slices of
a document can attend to overlapping ranges of its keys. Therefore rectangles are dealt, in order, into as few rounds
as possible. For example, two slices of one document that attend to two prefixes of its received keys need two rounds,
which the rectangles of other documents share:

    rectangles     rows 0-2 x keys 0-4     rows 3-5 x keys 0-9     rows 6-9 x keys 10-12
    round 1        rows 0-2 x keys 0-4                             rows 6-9 x keys 10-12
    round 2                                rows 3-5 x keys 0-9

Many kernels start as many blocks for every sequence as the longest sequence of the call needs:

    one call       #########                  two calls    #########
                   ##.......                               #########
                   #........                                              ##
                   #########                                              #.        # useful, . empty

An empty block ends at once, but 100,000 of them take about half a millisecond. So a round becomes several calls, by
the length of its sequences, where the blocks saved outweigh the further calls and copies: if the sequences of a round
are adjacent rows, one call reads them in place, but calls with some of them need their rows together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from ..errors import PlanError
from .rectangles import Rectangle, rank_rectangles


if TYPE_CHECKING:
    from .shard_plan import ShardPlan


BLOCKS_PER_CALL = 4096
"""The number of empty blocks that take as long as one more call: about 20 microseconds, at 5 nanoseconds per block
(estimated, not measured)."""

ROWS_PER_BLOCK = 12
"""The number of rows of one head whose copies take as long as one empty block: queries and outputs of 128 elements in
bf16 are read and written at 2.7 TB/s (estimated, not measured)."""

Axis = Literal["queries", "keys"]


class Grid(NamedTuple):
    """How a call of a varlen kernel is divided into thread blocks, in one direction (forward or backward).

    Per head, each block takes `tile` queries or keys of one sequence, as `axis` says. If `padded`, the call starts as
    many blocks for every sequence as its longest one needs. Otherwise no block is empty. If `in_place`, sequences need
    not be adjacent, so that no rows are copied for a call.
    """

    tile: int
    axis: Axis
    padded: bool
    in_place: bool = False


class Grids(NamedTuple):
    """The grids of a kernel in forward and in backward."""

    forward: Grid
    backward: Grid


_FLASH_ATTENTION_2 = Grids(Grid(128, "queries", True), Grid(128, "keys", True))

GRIDS = {
    "torch_flash": _FLASH_ATTENTION_2,
    "flash_attn_2": _FLASH_ATTENTION_2,
    "flash_attn_3": Grids(Grid(128, "queries", False), Grid(128, "keys", True)),
    "flash_attn_4": Grids(Grid(128, "queries", False), Grid(128, "keys", False)),
    "cudnn": Grids(Grid(128, "queries", True, in_place=True), Grid(128, "keys", True, in_place=True)),
}
"""The grids of each varlen kernel, for heads of 128.

The forward of FlashAttention-3 is persistent, and FlashAttention-4 starts blocks for the total of all sequences.
cuDNN's graphs round the longest sequence and the number of sequences up, which is not counted here. Sources:
flash_fwd_launch_template.h and flash_bwd_launch_template.h of flash-attn 2.8.3 (csrc/flash_attn/src) and of
FlashAttention-3 (hopper), tile_scheduler.py of flash-attn-4 4.0.0b36 (flash_attn/cute), and the number of tiles in the
plans that cuDNN 9.20 builds for Hopper GPUs.
"""


def kernel_grids(kernel: str) -> Grids:
    """Return the grids of a varlen kernel.

    Raises:
        PlanError: there is no varlen kernel of that name.
    """
    if kernel not in GRIDS:
        raise PlanError(f"There is no varlen kernel {kernel!r}. Choose one of {', '.join(GRIDS)}.")
    return GRIDS[kernel]


def deal_calls(rectangles: Sequence[Rectangle], grid: Grid, query_heads: int) -> list[list[int]]:
    """Divide the rectangles of a pass into calls with disjoint key ranges, see above.

    Args:
        rectangles (`Sequence[Rectangle]`): rectangles in ascending order of their queries.
        grid (`Grid`): how the kernel divides a call into blocks.
        query_heads (`int`): number of query heads, for each of which a call starts its blocks.

    Returns:
        `list[list[int]]`: the indices of each call's rectangles, ascending.
    """
    return deal_passes([rectangles], grid, query_heads)[0]


def deal_passes(passes: Sequence[Sequence[Rectangle]], grid: Grid, query_heads: int) -> list[list[list[int]]]:
    """Divide the rectangles of each pass into calls, as [`deal_calls`] does."""
    rounds = [(number, dealt) for number, rectangles in enumerate(passes) for dealt in _rounds(rectangles)]
    divided = [(number, dealt) for number, dealt in rounds if grid.padded and len(dealt) > 1]
    calls: list[list[list[int]]] = [[] for _ in passes]
    last_classes = iter(_last_classes(passes, divided, grid, query_heads))
    for number, dealt in rounds:
        if not grid.padded or len(dealt) == 1:
            calls[number].append(dealt)
            continue
        of_call: dict[int, list[int]] = {}
        for index, last in zip(dealt, next(last_classes)):
            of_call.setdefault(last, []).append(index)
        calls[number] += of_call.values()
    return calls


def _last_classes(
    passes: Sequence[Sequence[Rectangle]], rounds: Sequence[tuple[int, list[int]]], grid: Grid, query_heads: int
) -> list[list[int]]:
    """Return, for each rectangle of each round, the longest length class in its call.

    `rounds` has the pass of each round, and the indices of its rectangles.
    """
    if not rounds:
        return []
    members = [[passes[number][index] for index in dealt] for number, dealt in rounds]
    sizes = list(map(len, members))
    every = np.array(list(chain.from_iterable(members)), dtype=np.int64)
    starts, stops = every[:, :2].T
    of_round = np.repeat(np.arange(len(sizes)), sizes)
    gaps = (of_round[1:] == of_round[:-1]) & (stops[:-1] != starts[1:])
    joined = np.bincount(of_round[1:][gaps], minlength=len(sizes)) == 0
    blocks = -(-(stops - starts if grid.axis == "queries" else every[:, 3] - every[:, 2]) // grid.tile)
    rows = (stops - starts) * (joined[of_round] & (not grid.in_place))
    found = LengthClasses(blocks, rows, of_round, len(sizes)).divided(query_heads).last_class
    last = found[of_round, length_classes(blocks)]
    return [part.tolist() for part in np.split(last, np.cumsum(sizes)[:-1])]


def count_blocks(plan: ShardPlan, window: int | None, kernel: str, query_heads: int) -> dict[str, list[int]]:
    """Count the varlen calls of one layer on each rank, and the blocks that they start, forward and backward together.

    `blocks_started` and `blocks_useful` are per query head. A block is useful if it has queries or keys.
    """
    passes, ranks = [], []
    for rank, (local, stages) in enumerate(rank_rectangles(plan, window)):
        passes += [local, *stages]
        ranks += [rank] * (1 + len(stages))
    counts = [[0] * plan.cp_size for _ in range(3)]
    for grid in kernel_grids(kernel):
        for rank, rectangles, dealt in zip(ranks, passes, deal_passes(passes, grid, query_heads)):
            for of_ranks, count in zip(counts, (len(dealt), *blocks_of_calls(rectangles, dealt, grid))):
                of_ranks[rank] += count
    return dict(zip(("varlen_calls", "blocks_started", "blocks_useful"), counts))


def blocks_of_calls(rectangles: Sequence[Rectangle], calls: Sequence[Sequence[int]], grid: Grid) -> tuple[int, int]:
    """Return the number of blocks per query head that the calls start, and the number of useful ones.

    `calls` holds the indices of each call's rectangles, see [`deal_calls`].
    """
    started, useful = 0, 0
    for call in calls:
        blocks = [-(-getattr(rectangles[index], grid.axis) // grid.tile) for index in call]
        useful += sum(blocks)
        started += len(call) * max(blocks) if grid.padded else sum(blocks)
    return started, useful


def folds_heads(queries: float, keys: float) -> bool:
    """Return whether backward over rectangles without a mask folds query heads into queries.

    Some kernels write gradients of keys and values for every query head, and sum them over the heads that share a KV
    head. Folded, the queries of these heads are further queries of one head, and nothing is expanded. That copies
    queries, outputs and their gradients, so it pays where there are more than twice as many keys as queries.
    """
    return keys > 2 * queries


def declared_rows(rows: float) -> int:
    """Return the bound on all rows of a call that cuDNN's graphs are built for: the next power of two from 16,384.

    Their workspace grows with it. With a common least bound, fewer graphs are built.
    """
    return power_of_two(rows, 16384)


def power_of_two(number: float, least: int) -> int:
    """Return the next power of two that is at least `least`, itself a power of two."""
    return max(least, 1 << (math.ceil(number) - 1).bit_length())


def length_classes(blocks: np.ndarray) -> np.ndarray:
    """Return the length class of sequences with so many blocks: the exponent of the next power of two, (n,) int64."""
    return np.frexp(blocks - 0.5)[1].clip(0)


class Division(NamedTuple):
    """How each pass is divided into calls.

    `last_class` holds, by pass and length class, the longest class in the same call, (passes, classes). The others are
    (passes,): the number of calls, the number of blocks per head that they start, and the number of rows that are
    copied because the pass is divided.
    """

    last_class: np.ndarray
    calls: np.ndarray
    started: np.ndarray
    copied: np.ndarray


class LengthClasses:
    """The sequences of several passes by their length class.

    Args:
        blocks (`np.ndarray`): blocks of each sequence, (n,).
        rows (`np.ndarray`): rows of each sequence that have to be copied if it shares a call with other sequences, but
            not with all sequences of the pass, (n,). 0 if they have to be copied anyway.
        passes (`np.ndarray`): the pass to which it belongs, (n,).
        num_passes (`int`): number of passes.
    """

    def __init__(self, blocks: np.ndarray, rows: np.ndarray, passes: np.ndarray, num_passes: int):
        classes = length_classes(blocks)
        shape = num_passes, int(classes.max(initial=0)) + 1
        place = passes * shape[1] + classes
        self._counts = np.bincount(place, minlength=shape[0] * shape[1]).reshape(shape)
        self._rows = np.bincount(place, rows, shape[0] * shape[1]).astype(np.int64).reshape(shape)
        longest = np.zeros(shape, dtype=np.int64)
        np.maximum.at(longest.reshape(-1), place, blocks)
        self._longest = np.maximum.accumulate(longest, axis=1)
        self._useful = np.bincount(passes, blocks, num_passes).astype(np.int64)

    def divided(self, query_heads: int) -> Division:
        """Divide each pass so that its blocks, copies and calls cost least. A call holds consecutive classes."""
        passes, classes = self._counts.shape
        sequences = self._counts.sum(1)
        started = sequences * self._longest[:, -1]
        last_class = np.full_like(self._counts, classes - 1)
        calls, copied = (sequences > 0).astype(np.int64), np.zeros(passes, dtype=np.int64)
        # One more call costs more than the empty blocks of the others.
        several = np.flatnonzero((started - self._useful) * query_heads > BLOCKS_PER_CALL)
        if len(several):
            divided = self._divided(several, query_heads)
            for values, of_several in zip((last_class, calls, started, copied), divided):
                values[several] = of_several
        return Division(last_class, calls, started, copied)

    def _divided(self, passes: np.ndarray, query_heads: int) -> Division:
        """Divide some passes, of which each may take several calls."""
        counts, longest, sums_of_rows = self._counts[passes], self._longest[passes], self._rows[passes]
        used = np.flatnonzero(counts.any(0))
        sequences, rows = _sums_before(counts[:, used]), _sums_before(sums_of_rows[:, used])
        longest = longest[:, used]
        least = np.zeros_like(sequences)  # cost of all classes before this one
        first = np.zeros_like(longest)  # the first class of the call that ends with this class
        for last in range(len(used)):
            held = sequences[:, last + 1, None] - sequences[:, : last + 1]
            copied = (rows[:, last + 1, None] - rows[:, : last + 1]) * (held > 1)
            blocks = held * longest[:, last, None] * query_heads
            cost = blocks + copied * query_heads // ROWS_PER_BLOCK + BLOCKS_PER_CALL * (held > 0)
            cost += least[:, : last + 1]
            first[:, last] = cost.argmin(1)
            least[:, last + 1] = cost.min(1)
        one_call = sequences[:, -1] * longest[:, -1] * query_heads + BLOCKS_PER_CALL  # copies nothing
        first[one_call <= least[:, -1], -1] = 0
        return self._follow(first, sequences, rows, longest, used)

    def _follow(
        self, first: np.ndarray, sequences: np.ndarray, rows: np.ndarray, longest: np.ndarray, used: np.ndarray
    ) -> Division:
        """Follow the first classes of calls, from the longest call to the shortest. Classes are those in use."""
        passes, classes = first.shape
        pass_, last_class = np.arange(passes), np.empty_like(first)
        calls, copied, started = np.zeros((3, passes), dtype=np.int64)
        end, begin = np.full((2, passes), classes, dtype=np.int64)
        for last in reversed(range(classes)):
            ends = last < begin
            end, begin = np.where(ends, last, end), np.where(ends, first[:, last], begin)
            last_class[:, last] = end
            held, of_call = (sums[:, last + 1] - sums[pass_, begin] for sums in (sequences, rows))
            calls += ends & (held > 0)
            copied += of_call * (ends & (held > 1) & (held < sequences[:, -1]))
            started += ends * held * longest[:, last]
        by_class = np.zeros((passes, self._counts.shape[1]), dtype=np.int64)
        by_class[:, used] = used[last_class]
        return Division(by_class, calls, started, copied)


def _sums_before(values: np.ndarray) -> np.ndarray:
    """Return the sums of the values before each column and of all values, (n, classes + 1) int64."""
    sums = np.zeros((values.shape[0], values.shape[1] + 1), dtype=np.int64)
    sums[:, 1:] = values.cumsum(1)
    return sums


def _rounds(rectangles: Sequence[Rectangle]) -> list[list[int]]:
    """Deal rectangles into as few rounds with disjoint key ranges as possible; return their indices, ascending."""
    rounds: list[list[int]] = []
    stops: list[int] = []
    for index in sorted(range(len(rectangles)), key=lambda index: rectangles[index].k_start):
        start, stop = rectangles[index][2:]
        number = next((number for number, end in enumerate(stops) if end <= start), len(rounds))
        if number == len(rounds):
            rounds.append([])
            stops.append(0)
        rounds[number].append(index)
        stops[number] = stop
    return [sorted(dealt) for dealt in rounds]
