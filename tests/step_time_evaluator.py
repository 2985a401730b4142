"""A second opinion on step times: tiles and tokens counted one by one, sharing no code with the planner."""

import dataclasses

import numpy as np


def step_times(plan, model):
    """(cp_size,) seconds by rank, attention alone and the whole step: what `CostModel.step_time` should predict."""
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
                layer_seconds(owner, rank, layers, model, backward, plan.offset_groups) for backward in (False, True)
            )
    tokens = np.array([sum((ranks == rank).sum() for ranks in owner) for rank in range(plan.cp_size)])
    linear = tokens * 3 * model.linear_flops_per_token / model.hardware.linear_flops_per_second
    return attention, attention + linear


def layer_seconds(owner, rank, layers, model, backward, groups):
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
    sent = sum(
        seen_from(ranks, other, rank, layers.window) for ranks in owner for other in range(cp_size) if other != rank
    )
    edge = sent * elements * (8 + model.grad_itemsize if backward else 2 * model.itemsize) / memory
    local = call_seconds(local, layers, model, True, backward)
    passes = [call_seconds(stage, layers, model, layers.window is not None, backward) for stage in remote]
    wires = [wire_seconds(owner, rank, layers, model, backward, group) for group in groups]
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
    work = [(keys + speed.tile_overhead_keys) * flops_a_key for tiles in rectangles for keys in tiles]
    together = sum(work) * layers.query_heads / speed_now
    alone = max(work) * kernel.units / speed_now
    return kernel.call_seconds + max(together, alone)


def wire_seconds(owner, rank, layers, model, backward, group):
    """Tokens that others hold and this rank sees, and the other way round, node by node."""
    cp_size = max(int(ranks.max()) for ranks in owner) + 1
    arriving, leaving = np.zeros(cp_size), np.zeros(cp_size)
    for ranks in owner:
        for other in range(cp_size):
            if (rank - other) % cp_size in group:
                arriving[other] += seen_from(ranks, rank, other, layers.window)
            if (other - rank) % cp_size in group:
                leaving[other] += seen_from(ranks, other, rank, layers.window)
    profile = model.hardware
    node = np.arange(cp_size) // profile.ranks_per_node
    seconds = 0.0
    for link, which in ((profile.intra_node, node == node[rank]), (profile.inter_node, node != node[rank])):
        tokens = max(arriving[which].sum(), leaving[which].sum())
        if tokens:
            width = layers.kv_heads * (layers.key_dim + layers.value_dim)
            size = model.grad_itemsize if backward else model.itemsize
            seconds = max(seconds, link.latency_seconds + tokens * width * size / link.bytes_per_second)
    return seconds


def seen_from(ranks, viewer, holder, window):
    """How many tokens of `holder` the tokens of `viewer` attend to."""
    seen = np.zeros(len(ranks) + 1, dtype=int)
    for token in np.flatnonzero(ranks == viewer):
        seen[0 if window is None else max(0, token - window + 1)] += 1
        seen[token + 1] -= 1
    return int(((seen.cumsum()[:-1] > 0) & (ranks == holder)).sum())
