"""Independent prediction of step times, which counts tiles and tokens one by one and shares no code with the
planner."""

import dataclasses
import math

import numpy as np


def step_times(plan, model):
    """Return the seconds that `CostModel.step_time` should predict, by rank, for attention alone and for the whole
    step."""
    owner = [np.full(length, -1) for length in plan.lengths]
    for rank, slices in enumerate(plan.slices):
        for document, start, stop in slices:
            owner[document][start:stop] = rank
    attention = np.zeros(plan.cp_size)
    for layers in model.layers:
        if layers.window is not None and layers.window >= max(plan.lengths):
            layers = dataclasses.replace(layers, window=None)
        for rank in range(plan.cp_size):
            attention[rank] += layers.count * sum(
                layer_seconds(owner, rank, layers, model, backward, plan.offset_groups, plan.ranks_per_node)
                for backward in (False, True)
            )
    tokens = np.array([sum((ranks == rank).sum() for ranks in owner) for rank in range(plan.cp_size)])
    linear = tokens * 3 * model.linear_flops_per_token / model.hardware.linear_flops_per_second
    return attention, attention + linear


def layer_seconds(owner, rank, layers, model, backward, groups, ranks_per_node):
    cp_size = max(int(ranks.max()) for ranks in owner) + 1
    if layers.window is not None or groups is None:
        groups = [range(1, cp_size)]
    local, remote, rows = [], [[] for _ in groups], [0 for _ in groups]
    for ranks in owner:
        mine = np.flatnonzero(ranks == rank)
        if not len(mine):
            continue
        runs = np.split(mine, np.flatnonzero(np.diff(mine) != 1) + 1)
        if layers.window is None:
            local.append((len(mine), 0))
            for run in runs:
                for stage, group in enumerate(groups):
                    sources = [(rank - offset) % cp_size for offset in group]
                    missing = int(np.isin(ranks[: run[0]], sources).sum())
                    if missing:
                        remote[stage].append((len(run), missing))
                        rows[stage] += len(run)
            continue
        for run in runs:
            waiting = min(len(run), layers.window - 1) if run[0] else 0
            before = min(run[0], layers.window - 1)
            for count, keys, where in ((waiting, before, remote[0]), (len(run) - waiting, waiting, local)):
                if count:
                    where.append((count, keys))
    memory = model.hardware.memory_bytes_per_second
    elements = layers.kv_heads * (layers.key_dim + layers.value_dim)
    steps = [traffic_of(owner, layers.window, group, ranks_per_node) for group in groups]
    copied = sum(first[rank].sum() for first, _ in steps)
    if ranks_per_node:
        copied += sum(first[:, rank].sum() + second[rank].sum() + second[:, rank].sum() for first, second in steps)
    edge = copied * elements * (8 + model.grad_itemsize if backward else 2 * model.itemsize) / memory
    local = call_seconds(local, layers, model, True, backward)
    passes = [call_seconds(stage, layers, model, layers.window is not None, backward) for stage in remote]
    wires = [wire_seconds(first, second, rank, layers, model, backward) for first, second in steps]
    clock, link = 0.0, 0.0
    if backward:
        for work, wire in zip(passes, wires):
            clock += work
            link = max(link, clock) + wire
        return max(clock + local, link) + edge
    clock = local
    for work, wire, merged in zip(passes, wires, rows):
        link += wire
        clock = max(clock, link) + work
        clock += merged * layers.query_heads * layers.value_dim * (8 + model.itemsize) / memory
    return clock + edge


def call_seconds(rectangles, layers, model, causal, backward):
    """Return the seconds of a pass over rectangles, given as queries and the number of keys before them."""
    if not rectangles:
        return 0.0
    kernel = model.hardware.kernel
    speed = kernel.backward if backward else kernel.forward
    products = (3 * layers.key_dim + 2 * layers.value_dim) if backward else layers.key_dim + layers.value_dim
    flops_a_key = 2 * kernel.tile * products
    speed_now = speed.flops_per_second * (kernel.causal_efficiency if causal else 1)
    overhead = speed.tile_overhead_keys
    if causal and speed.causal_tile_overhead_keys is not None:
        overhead = speed.causal_tile_overhead_keys
    keys_seen = [keys for queries, before in rectangles for keys in tiles_of(queries, before, layers, kernel, causal)]
    work = [(keys + overhead) * flops_a_key for keys in keys_seen]
    together = sum(work) * layers.query_heads / speed_now
    alone = max(work) * kernel.units / speed_now
    calls, empty = 1, 0
    if kernel.block_seconds:
        sizes = [before + causal * queries if backward else queries for queries, before in rectangles]
        joined = causal and layers.window is None  # the documents of the local pass are adjacent
        sequences = [
            (math.ceil(size / kernel.tile), queries * joined) for size, (queries, _) in zip(sizes, rectangles)
        ]
        calls, empty = cheapest_division(sequences, layers.query_heads)
    return kernel.call_seconds * calls + max(together, alone) + kernel.block_seconds * layers.query_heads * empty


def tiles_of(queries, before, layers, kernel, causal):
    """Return the keys that each tile of queries sees."""
    for first in range(0, queries, kernel.tile):
        keys = before + first + kernel.tile if causal else before
        yield min(keys, layers.window + kernel.tile) if causal and layers.window is not None else keys


def cheapest_division(sequences, heads):
    """Return the number of calls and of empty blocks per head, copies included, if sequences are divided by length.

    A sequence is `(blocks, rows to copy)`. All ways to divide the powers of two into runs are tried. Sequences of one
    run share a call. An empty block of one head costs 1, and a call costs 4096. Unless a call has one sequence or all
    of them, twelve copied rows of one head cost 1, too. Of equally good divisions, a single call counts, then the one
    with the longest last run, then the one with the longest run before it, and so on.
    """
    powers = sorted({math.ceil(math.log2(blocks)) for blocks, _ in sequences})
    tried = []
    for cuts in range(2 ** (len(powers) - 1)):
        runs = [[]]
        for index, power in enumerate(powers):
            runs[-1].append([each for each in sequences if 2**power / 2 < each[0] <= 2**power])
            if cuts >> index & 1:
                runs.append([])
        calls = [sum(run, []) for run in runs]
        empty = sum(max(call)[0] - blocks for call in calls for blocks, _ in call)
        copied = [sum(rows for _, rows in call) for call in calls if 1 < len(call) < len(sequences)]
        cost = empty * heads + 4096 * len(runs) + sum(rows * heads // 12 for rows in copied)
        order = [-len(run) for run in reversed(runs)] if len(runs) > 1 else []
        tried.append((cost, order, empty + sum(copied) / 12))
    _, runs, empty = min(tried)
    return max(len(runs), 1), empty


def wire_seconds(first, second, rank, layers, model, backward):
    """Return the seconds of the transfers between nodes, and then those of forwarding within the node."""
    profile = model.hardware
    node = np.arange(len(first)) // profile.ranks_per_node
    width = layers.kv_heads * (layers.key_dim + layers.value_dim)
    size = model.grad_itemsize if backward else model.itemsize

    def seconds(link, traffic, which):
        tokens = max(traffic[which, rank].sum(), traffic[rank, which].sum())
        return link.latency_seconds + tokens * width * size / link.bytes_per_second if tokens else 0.0

    inside = node == node[rank]
    together = max(seconds(profile.intra_node, first, inside), seconds(profile.inter_node, first, ~inside))
    return together + seconds(profile.intra_node, second, node >= 0)


def traffic_of(owner, window, group, ranks_per_node):
    """Return the tokens sent from rank to rank in each of two steps; without ranks_per_node, there is only one
    step."""
    cp_size = max(int(ranks.max()) for ranks in owner) + 1
    first, second = np.zeros((2, cp_size, cp_size))
    for ranks in owner:
        seen = np.array([seen_by(ranks, viewer, window) for viewer in range(cp_size)])
        for holder in np.unique(ranks):
            needed = seen & (ranks == holder)
            viewers = [viewer for viewer in range(cp_size) if (viewer - holder) % cp_size in group]
            for viewer in viewers:
                if not ranks_per_node or viewer // ranks_per_node == holder // ranks_per_node:
                    first[holder, viewer] += needed[viewer].sum()
            if not ranks_per_node:
                continue
            for node in {viewer // ranks_per_node for viewer in viewers} - {holder // ranks_per_node}:
                middle = node * ranks_per_node + holder % ranks_per_node
                there = [viewer for viewer in viewers if viewer // ranks_per_node == node]
                first[holder, middle] += needed[there].any(0).sum()
                for viewer in there:
                    second[middle, viewer] += needed[viewer].sum() if viewer != middle else 0
    return first, second


def seen_by(ranks, viewer, window):
    """Return the tokens to which the tokens of `viewer` attend."""
    seen = np.zeros(len(ranks) + 1, dtype=int)
    for token in np.flatnonzero(ranks == viewer):
        seen[0 if window is None else max(0, token - window + 1)] += 1
        seen[token + 1] -= 1
    return seen.cumsum()[:-1] > 0
