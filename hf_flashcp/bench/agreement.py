"""The time that ranks take to compare their plans in every step."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist

from ..distributed import require_agreement
from ..distributed.workers import WorkerPool
from ..planning import plan_documents
from ..tables import table
from .turns import median_seconds


def measure(world_sizes: list[int], rounds: int = 300) -> dict[str, Any]:
    """Time the comparison of plans between gloo processes on this machine.

    `milliseconds` has the median on the slowest rank for each number of processes.
    """
    with WorkerPool() as pool:
        medians = {size: max(pool.run(size, _median_milliseconds, rounds)) for size in world_sizes}
    return {"rounds": rounds, "milliseconds": medians}


def _median_milliseconds(rounds: int) -> float:
    plan, turns = plan_documents([4096, 1024, 512], 2), itertools.count()

    def compare() -> None:
        require_agreement("the batch", {"turn": next(turns), "plan": plan.digest}, dist.group.WORLD, advice="")

    return 1000 * median_seconds(rounds, torch.device("cpu"), compare=compare)["compare"]


def text(found: dict[str, Any]) -> str:
    """Return a table with one row per number of processes."""
    title = f"comparing a plan's digest, {found['rounds']} rounds, slowest rank's median"
    return f"{title}\n\n" + table({"processes": ",", "ms": ".3f"}, found["milliseconds"].items())
