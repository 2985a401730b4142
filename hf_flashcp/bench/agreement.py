"""What it costs that ranks compare plans at every step."""

from __future__ import annotations

import time
from statistics import median
from typing import Any


def measure(world_sizes: list[int], rounds: int = 300) -> dict[str, Any]:
    """Median milliseconds of one comparison, slowest rank, for each number of gloo processes on this machine."""
    import torch.multiprocessing as mp

    medians = {}
    for world_size in world_sizes:
        context = mp.get_context("spawn")
        results = context.SimpleQueue()
        mp.spawn(_worker, (world_size, _free_port(), rounds, results), nprocs=world_size)
        medians[world_size] = max(results.get() for _ in range(world_size))
    return {"rounds": rounds, "milliseconds": medians}


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _worker(rank: int, world_size: int, port: int, rounds: int, results) -> None:
    import torch
    import torch.distributed as dist

    from ..exchange import require_agreement
    from ..planning import plan_documents

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    plan = plan_documents([4096, 1024, 512], 2)
    seconds = []
    for turn in range(rounds):
        begin = time.perf_counter()
        require_agreement("the batch", {"turn": turn, "plan": plan.digest}, dist.group.WORLD, advice="")
        seconds.append(time.perf_counter() - begin)
    results.put(1000 * median(seconds))
    dist.destroy_process_group()
