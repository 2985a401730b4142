"""Runs the steps that all ranks of a launch (torchrun) execute together, in the launched processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ...doctor.cluster import gathered
from .cluster import Ranks
from .runner import FAILED, TOTAL_SECONDS, Results, Row, row_of, status_of, status_of_found
from .settings import Found, Settings, Step


def launched_ranks() -> int:
    """Return the number of processes that a launcher has started, or 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Return whether this process is the one that writes files and prints."""
    return int(os.environ.get("RANK", "0")) == 0


STEP_SECONDS = 60
"""Timeout of the collectives of a step, in seconds."""


def join(settings: Settings, step_seconds: float = STEP_SECONDS) -> Callable[[], Ranks]:
    """Join the launch's process group, and return a function that creates [`Ranks`].

    The first rank may join late, because it runs the steps for one GPU first. Each call of the returned function
    creates a new group, because a group cannot be used after a collective has timed out. With gloo, a collective that
    waits longer than `step_seconds` raises an error. With NCCL, the watchdog ends the process, and so the run.
    """
    device = torch.device("cpu")
    if settings.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    patient, limit = timedelta(seconds=TOTAL_SECONDS + 60), timedelta(seconds=step_seconds)
    joined = dist.is_initialized()
    if not joined:
        dist.init_process_group(settings.sized("cpu:gloo,cuda:nccl", "gloo"), timeout=patient)
    # Ranks report a step over this group, which therefore waits as long as a step may take on any of them.
    everyone = list(range(dist.get_world_size()))
    control = dist.new_group(everyone, backend="gloo", timeout=patient)
    dist.barrier(control)
    if not joined:
        dist.distributed_c10d._set_pg_timeout(limit, dist.group.WORLD)
    backend = settings.sized("nccl", "gloo")
    return lambda: Ranks(dist.new_group(everyone, backend=backend, timeout=limit), control, device)


def run_together(
    steps: Sequence[Step],
    settings: Settings,
    new_ranks: Callable[[], Ranks],
    results: Results | None,
    on_row: Callable[[Any, Row | None], None],
) -> None:
    """Run steps on all ranks. Every rank must call this function; only the first one passes `results`."""
    for step in steps:
        begin, ranks = time.monotonic(), new_ranks()
        found, error = Found(), None
        on_row(step, None)
        try:
            settings.prepare()
            found = step.run(ranks, settings.until(begin + step.seconds))
        except Exception as raised:  # a step must not end the run
            error = raised
        messages = gathered(error and f"{type(error).__name__}: {error}", ranks.control)
        problem = "; ".join(f"rank {rank}: {message}" for rank, message in enumerate(messages) if message)
        if results is not None:
            status = status_of(error, settings) if error else FAILED if problem else status_of_found(found)
            row = row_of(step, results.machine, status, time.monotonic() - begin, found, problem)
            results.add(row)
            on_row(step, row)
