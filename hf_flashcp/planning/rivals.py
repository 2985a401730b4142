"""The plans of the strategies other than "search", without those that are certain to be slower than a known plan."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..plan.slice_table import SliceColumns
from ..plan.slices import Slices
from ..predict.cost_model import BACKWARD_OF_LINEAR, CostModel
from ..predict.hardware_profile import Kernel, Pass
from .algorithm1 import algorithm1, promising_rounds
from .caps import Caps
from .sharding import per_doc_columns, per_seq, whole_doc


MOST_SLICES = 1 << 18
"""Plans are left out if more slices would have to be built for them. They are "per_doc" and its like, for thousands of
documents on hundreds of ranks."""


def rivals(
    caps: Caps, cost_model: CostModel, seconds: float, with_flashcp: bool = True
) -> Iterator[Slices | SliceColumns]:
    """Yield the plans of all other strategies that are within the caps and may take at most so many seconds.

    Those of "flashcp" are left out without `with_flashcp`. A plan of "flashcp" that splits all documents is "per_doc".
    """
    floors = flashcp_floors(caps, cost_model)
    if with_flashcp:
        first = next(iter(promising_rounds(caps, caps.longest_first)))
        if floors[first:].min() <= seconds and (found := algorithm1(caps, most_work=MOST_SLICES)):
            yield found
    if floors[-1] <= seconds and 2 * caps.cp_size * len(caps.lengths) <= MOST_SLICES:
        for rotate_ranks in (False, True):
            yield per_doc_columns(caps.lengths, caps.cp_size, rotate_ranks)
    yield from filter(caps.allow, (shard(caps.lengths, caps.cp_size) for shard in (whole_doc, per_seq)))


def flashcp_floors(caps: Caps, cost_model: CostModel) -> np.ndarray:
    """Return lower bounds of the step time of plans with the 0, 1, 2, ... longest documents Per-Doc, (n + 1,) seconds.

    The bound is the mean over ranks of the time of linear work and of attention kernels. Whole documents count as if
    they had no mask. Windowed layers are left out.
    """
    lengths = np.array([caps.lengths[document] for document in caps.longest_first])
    hardware, cp_size = cost_model.hardware, caps.cp_size
    linear = caps.total_tokens * cost_model.linear_flops_per_token * (1 + BACKWARD_OF_LINEAR)
    floors = np.full(len(lengths) + 1, linear / hardware.linear_flops_per_second)
    for layers in cost_model.layers:
        if layers.window is not None and layers.window < lengths[0]:
            continue
        for speed, flops in (
            (hardware.kernel.forward, layers.forward_flops_per_pair),
            (hardware.kernel.backward, layers.backward_flops_per_pair),
        ):
            per_pair = layers.count * layers.query_heads * flops / speed.flops_per_second
            zigzags = _zigzag_keys(lengths, cp_size, hardware.kernel, speed) * hardware.kernel.tile
            whole = lengths * (lengths + 1) / 2
            rest = whole[::-1].cumsum()[::-1]
            floors += per_pair * (np.append(0, zigzags.cumsum()) + np.append(rest, 0))
    return floors / cp_size


def _zigzag_keys(lengths: np.ndarray, cp_size: int, kernel: Kernel, speed: Pass) -> np.ndarray:
    """Return at least how many keys the tiles of a Per-Doc document see on all ranks together, overheads included.

    Rank i < N - 1 attends from two chunks of c tokens to i c and (2N - 2 - i) c keys of other ranks, and rank N - 1
    from two adjacent chunks to (N - 1) c keys.
    """
    chunk = lengths // (2 * cp_size)
    tiles, both = -(-chunk // kernel.tile), -(-2 * chunk // kernel.tile)
    squares = kernel.tile * both * (both + 1) / 2 + both * speed.overhead_keys(True)
    remote = tiles * chunk * (2 * cp_size - 2) * (cp_size - 1) + both * chunk * (cp_size - 1)
    rectangles = tiles * (2 * cp_size - 3) + both if cp_size > 1 else 0
    return cp_size * squares / kernel.causal_efficiency + remote + rectangles * speed.overhead_keys(False)
