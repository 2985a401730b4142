"""Independent prediction of step times, which counts tiles and tokens one by one and shares no code with the
planner."""

import dataclasses

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
            local.append(tiles_of(len(mine), model))
            for run in runs:
                for stage, group in enumerate(groups):
                    sources = [(rank - offset) % cp_size for offset in group]
                    missing = int(np.isin(ranks[: run[0]], sources).sum())
                    if missing:
                        remote[stage].append([missing for _ in tiles_of(len(run), model)])
                        rows[stage] += len(run)
            continue
        most = layers.window + model.hardware.kernel.tile
        for run in runs:
            waiting = min(len(run), layers.window - 1) if run[0] else 0
            before = min(run[0], layers.window - 1)
            for count, keys, where in ((waiting, before, remote[0]), (len(run) - waiting, waiting, local)):
                if count:
                    where.append([min(keys + size, most) for size in tiles_of(count, model)])
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


def tiles_of(rows, model):
    tile = model.hardware.kernel.tile
    return [(index + 1) * tile for index in range(-(-rows // tile))]


def call_seconds(rectangles, layers, model, causal, backward):
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
    work = [(keys + overhead) * flops_a_key for tiles in rectangles for keys in tiles]
    together = sum(work) * layers.query_heads / speed_now
    alone = max(work) * kernel.units / speed_now
    return kernel.call_seconds + max(together, alone)


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
