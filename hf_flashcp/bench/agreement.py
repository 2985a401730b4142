"""How long ranks take to compare their plans at every step."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

from ..tables import table


def measure(world_sizes: list[int], rounds: int = 300) -> dict[str, Any]:
    """Returns the `rounds`, and by number of gloo processes on this machine the median `milliseconds` of a comparison
    on the slowest rank."""
    from ..distributed.workers import WorkerPool

    with WorkerPool() as pool:
        medians = {size: max(pool.run(size, _median_milliseconds, rounds)) for size in world_sizes}
    return {"rounds": rounds, "milliseconds": medians}


def _median_milliseconds(rounds: int) -> float:
    import torch.distributed as dist

    from ..distributed import require_agreement
    from ..planning import plan_documents

    plan = plan_documents([4096, 1024, 512], 2)
    seconds = []
    for turn in range(rounds):
        begin = time.perf_counter()
        require_agreement("the batch", {"turn": turn, "plan": plan.digest}, dist.group.WORLD, advice="")
        seconds.append(time.perf_counter() - begin)
    return 1000 * median(seconds)


def text(found: dict[str, Any]) -> str:
    """A table with a row for each number of processes."""
    title = f"comparing a plan's digest, {found['rounds']} rounds, slowest rank's median"
    return f"{title}\n\n" + table({"processes": ",", "ms": ".3f"}, found["milliseconds"].items())
