"""What the division of varlen calls by length saves, and the cost of empty blocks and of further calls.

`plan.kernel_calls` divides calls by an estimate, `BLOCKS_PER_CALL`, and hardware profiles estimate `block_seconds`.
The costs measured here should replace both.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch

from ...attention.kernels import VarlenKernel
from ...layout import Rectangle
from ...plan import ShardPlan
from ...plan.kernel_calls import Grid, Grids, blocks_of_calls, deal_calls
from ...plan.rectangles import rank_rectangles
from ..kernels import Shape
from ..turns import median_seconds
from .settings import Record
from .timed_calls import ROUNDS, Direction, TimedCalls, side_by_side


class Sizes(NamedTuple):
    """The sequences from which costs are measured.

    For the cost of a call, `sequences` sequences of one block of queries and `keys` blocks of keys run in `calls`
    calls. For that of an empty block, one of as many sequences has `longest` blocks, and the others have one.
    """

    sequences: int
    longest: int
    keys: int
    calls: int


GPU = Sizes(sequences=256, longest=256, keys=8, calls=8)
REHEARSED = Sizes(sequences=4, longest=2, keys=1, calls=2)


def undivided(kernel: VarlenKernel) -> VarlenKernel:
    """Return a kernel that makes one call per round, whatever the lengths of the sequences."""
    changed = copy.copy(kernel)
    changed.grids = Grids(*(_undivided(grid) for grid in kernel.grids))
    return changed


def _undivided(grid: Grid) -> Grid:
    return grid._replace(padded=False)


def divided_stage(
    plan: ShardPlan, kernel: VarlenKernel, direction: Direction, shape: Shape, device: torch.device
) -> Record | None:
    """Time the stage with the most empty blocks in one call per round, and as the kernel divides it.

    The result is `None` if the plan has no stages, or if no block of the kernel is empty.
    """
    stages = [stage for _, stages in rank_rectangles(plan) for stage in stages]
    grid: Grid = getattr(kernel.grids, direction)
    if not grid.padded or not stages:
        return None

    def blocks(stage: tuple[Rectangle, ...], dealt_by: Grid) -> tuple[int, int, int]:
        dealt = deal_calls(stage, dealt_by, shape[0])
        started, useful = blocks_of_calls(stage, dealt, grid)
        return len(dealt), shape[0] * started, shape[0] * useful

    def empty(stage: tuple[Rectangle, ...]) -> int:
        _, started, useful = blocks(stage, _undivided(grid))
        return started - useful

    stage = max(stages, key=empty)
    calls, one_per_round = TimedCalls(stage, False, shape, device), undivided(kernel)
    seconds = median_seconds(
        ROUNDS,
        device,
        one_per_round=lambda: calls.run(direction, one_per_round, stage),
        divided=lambda: calls.run(direction, kernel, stage),
    )
    record: Record = {"direction": direction, "rectangles": len(stage), "useful blocks": blocks(stage, grid)[2]}
    for dealt_by, name, label in ((_undivided(grid), "one_per_round", "undivided"), (grid, "divided", "divided")):
        num_calls, started, _ = blocks(stage, dealt_by)
        record |= {f"calls {label}": num_calls, f"blocks {label}": started, f"ms {label}": 1000 * seconds[name]}
    return record


def costs(kernel: VarlenKernel, direction: Direction, sizes: Sizes, shape: Shape, device: torch.device) -> Record:
    """Measure the cost of a further call and of an empty block.

    The further calls are those of equally long sequences in several calls instead of one. The empty blocks are those
    that one long sequence causes in a call with many short ones. If the kernel's grid is not padded, there are none,
    and their cost should be about 0.
    """
    grid: Grid = getattr(kernel.grids, direction)
    equal = side_by_side([(grid.tile, grid.tile * sizes.keys)] * sizes.sequences)
    step = sizes.sequences // sizes.calls
    parts = [equal[first : first + step] for first in range(0, len(equal), step)]
    call = _saved_by_one_call(kernel, direction, parts, shape, device) / (len(parts) - 1)
    blocks = [sizes.longest, *[1] * (sizes.sequences - 1)]
    unequal = side_by_side(
        [(grid.tile * n, grid.tile) if grid.axis == "queries" else (grid.tile, grid.tile * n) for n in blocks]
    )
    saved = _saved_by_one_call(kernel, direction, [unequal[:1], unequal[1:]], shape, device)
    empty = shape[0] * sum(sizes.longest - n for n in blocks)
    block = (call - saved) / empty
    record = {
        "direction": direction,
        "padded": "yes" if grid.padded else "no",
        "us per further call": 1e6 * call,
        "ns per empty block": 1e9 * block,
    }
    return {**record, "blocks per call": call / block} if grid.padded and block > 0 else record


def _saved_by_one_call(
    kernel: VarlenKernel, direction: Direction, parts: list[list[Rectangle]], shape: Shape, device: torch.device
) -> float:
    """Return by how many seconds one call for all rectangles is faster than one call for each part."""
    kernel, whole = undivided(kernel), [rectangle for part in parts for rectangle in part]
    calls = TimedCalls(whole, False, shape, device)
    seconds = median_seconds(
        ROUNDS,
        device,
        one=lambda: calls.run(direction, kernel, whole),
        parts=lambda: [calls.run(direction, kernel, part) for part in parts],
    )
    return seconds["parts"] - seconds["one"]
