"""A lower bound of the predicted step time of any plan within the caps. It is computed without making a plan.

A step takes at least as long as its mean over ranks: as if all work were spread evenly, and transfers were hidden
except where they take longer than everything else. So the bound is, with means over ranks,

    linear work + sum over layers and passes of max(kernels + copies, transfers)                                 (1)

**Kernels.** Let a document of d tokens be held by ranks that own o_r tokens each. Each rank computes a causal square
over its own tokens, and rectangles without a mask for all other pairs. A square of o tokens takes at least
o (o + t) / 2 + o v_c pairs at the causal efficiency c, where t are the queries of a tile and v_c is the overhead of a
tile under a mask, in keys. The other d (d + 1) / 2 - sum of o_r (o_r + 1) / 2 pairs take no longer than they would
take without a mask, plus an overhead of b for each row with keys of other ranks: that of a tile, and in forward the
merge of the row's output. If the rank of the first token holds [0, s) at the document's start, all d - s other rows
see keys of other ranks. So the document takes at least

    d d / 2 + d (t / 2 + v_c) / c + (1 / c - 1) (s s + (d - s) (d - s) / (N - 1)) / 2 + b (d - s)                (2)

for the best s from d / N to d. Documents in layers with a window take at least their pairs and the overhead of their
tiles at the causal efficiency.

**Copies and transfers.** The KV that ranks receive is at least [`kv_lower_bound`], and the KV that enters nodes is at
least that bound with nodes in place of ranks. Each received token has been copied once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from ..plan.lengths import check_lengths
from ..plan.slices import attention_pairs
from ..predict.cost_model import BACKWARD_OF_LINEAR, CostModel
from ..predict.hardware_profile import Pass
from ..predict.model_shape import AttentionLayers
from ..predict.recurrent_costs import BACKWARD_OF_SCAN
from .caps import Caps
from .lower_bound import least_kv


class TimeBound(NamedTuple):
    """Lower bounds of a step's seconds, and what they consist of.

    `links` is the least time of transfers, of which only what exceeds kernels and copies is part of `seconds`.
    """

    seconds: float
    linear: float  # work that is done token by token, and scans
    attention: float  # kernels of attention layers
    copies: float
    links: float


def step_time_bound(
    lengths: Iterable[int],
    cp_size: int,
    cost_model: CostModel,
    max_imbalance: float = 1.05,
    max_token_imbalance: float = 1.0,
) -> TimeBound:
    """Return the least time in which `cost_model` predicts a step under any plan within the caps.

    It does not apply to plans that exceed the caps.
    """
    caps = Caps(*check_lengths(lengths, cp_size), max_imbalance, max_token_imbalance)
    moved = least_kv(caps)
    return bound_with(caps, cost_model, moved, _between_nodes(caps, cost_model.hardware.ranks_per_node))


def _between_nodes(caps: Caps, ranks_per_node: int) -> int:
    """Return the least KV that enters nodes from other nodes."""
    nodes, left_over = divmod(caps.cp_size, ranks_per_node)
    if left_over or nodes < 2:
        return 0
    of_nodes = Caps(caps.lengths, nodes, caps.max_imbalance, caps.max_token_imbalance).with_most(
        pairs=ranks_per_node * caps.most_pairs, tokens=ranks_per_node * caps.most_tokens
    )
    # If some ranks hold one token more than others, several nodes may consist of such ranks.
    of_nodes.ranks_with_most = caps.ranks_with_most if ranks_per_node == 1 else nodes
    return least_kv(of_nodes)


def bound_with(caps: Caps, cost_model: CostModel, moved: int, between: int) -> TimeBound:
    """Return [`step_time_bound`] for `moved` tokens of KV that ranks receive, `between` of them once per node."""
    hardware, cp_size = cost_model.hardware, caps.cp_size
    linear = caps.total_tokens * cost_model.linear_flops_per_token * (1 + BACKWARD_OF_LINEAR)
    linear = linear / hardware.linear_flops_per_second / cp_size + _scans(caps, cost_model)
    inside, outside = hardware.intra_node.bytes_per_second, hardware.inter_node.bytes_per_second
    # Rows take the faster link, or both at once.
    wires = inside if cp_size <= hardware.ranks_per_node else inside + outside
    wire_seconds_per_byte = max(moved / wires, between / outside) / cp_size
    seconds, attention, copies, links = linear, 0.0, 0.0, 0.0
    for layers in cost_model.layers:
        windowed = layers.window is not None and layers.window < max(caps.lengths)
        width = 0 if windowed else layers.kv_elements_per_token
        for backward in (False, True):
            itemsize = cost_model.grad_itemsize if backward else cost_model.itemsize
            touched = 8 + itemsize if backward else 2 * itemsize
            kernels = layers.count * _kernel_seconds(caps, cost_model, layers, windowed, backward)
            copying = layers.count * moved * width * touched / hardware.memory_bytes_per_second / cp_size
            wire = layers.count * wire_seconds_per_byte * width * itemsize
            seconds += max(kernels + copying, wire)
            attention, copies, links = attention + kernels, copies + copying, links + wire
    return TimeBound(seconds, linear, attention, copies, links)


def _scans(caps: Caps, cost_model: CostModel) -> float:
    layers, kernel = cost_model.recurrent, cost_model.hardware.kernel
    if layers is None:
        return 0.0
    flops = caps.total_tokens * layers.flops_per_token / caps.cp_size
    scans = flops / kernel.forward.flops_per_second + BACKWARD_OF_SCAN * flops / kernel.backward.flops_per_second
    return layers.count * (scans + 2 * kernel.call_seconds * (layers.flops_per_token > 0))


def _kernel_seconds(
    caps: Caps, cost_model: CostModel, layers: AttentionLayers, windowed: bool, backward: bool
) -> float:
    """Return the mean over ranks of the least time of one layer's kernels in one pass."""
    kernel, hardware = cost_model.hardware.kernel, cost_model.hardware
    speed = kernel.backward if backward else kernel.forward
    flops = layers.backward_flops_per_pair if backward else layers.forward_flops_per_pair
    per_pair = layers.query_heads * flops / speed.flops_per_second
    if windowed:
        seen = sum(attention_pairs(0, length, layers.window) for length in caps.lengths)
        pairs = (seen + caps.total_tokens * speed.overhead_keys(True)) / kernel.causal_efficiency
    else:
        merged = layers.query_heads * layers.value_dim * (8 + cost_model.itemsize) / hardware.memory_bytes_per_second
        per_row = speed.overhead_keys(False) + (0 if backward else merged / per_pair)
        pairs = _least_pairs(caps, kernel.tile, kernel.causal_efficiency, speed, per_row)
    return per_pair * pairs / caps.cp_size + kernel.call_seconds


def _least_pairs(caps: Caps, tile: int, efficiency: float, speed: Pass, per_row: float) -> float:
    """Return the sum of (2) over documents, where `per_row` is b."""
    lengths = np.array(caps.lengths, dtype=float)
    masked, others = 1 / efficiency - 1, max(caps.cp_size - 1, 1)
    held = lengths
    if caps.cp_size > 1:
        best = (per_row / masked if masked > 0 else np.inf) * others / caps.cp_size + lengths / caps.cp_size
        held = np.clip(best, lengths / caps.cp_size, np.minimum(lengths, max(caps.most_tokens, 1)))
        held = np.maximum(held, lengths / caps.cp_size)
    rest = lengths - held
    squares = lengths * lengths / 2 + lengths * (tile / 2 + speed.overhead_keys(True)) / efficiency
    return float((squares + masked * (held * held + rest * rest / others) / 2 + per_row * rest).sum())
