"""Steps that all ranks of a launch (torchrun) run together, in the launched processes themselves."""

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
    """Processes that a launcher has started: 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


STEP_SECONDS = 60
"""Seconds after which a collective of a step gives up waiting for a rank."""


def join(settings: Settings, step_seconds: float = STEP_SECONDS) -> Callable[[], Ranks]:
    """Joins the launch's process group. The first rank may come late: it runs the steps of one GPU before.

    Under gloo a collective that waits longer than `step_seconds` raises an error; under NCCL its watchdog ends the
    process, and with it the run. Every call of what is returned makes ranks with a group of their own: after a
    collective that timed out a group cannot be used again.
    """
    device = torch.device("cpu")
    if settings.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    patient, limit = timedelta(seconds=TOTAL_SECONDS + 60), timedelta(seconds=step_seconds)
    joined = dist.is_initialized()
    if not joined:
        dist.init_process_group(settings.sized("cpu:gloo,cuda:nccl", "gloo"), timeout=patient)
    # What a rank says of a step may come as late as others wait for it.
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
    """Every rank calls it; the first one has the results."""
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
        said = "; ".join(f"rank {rank}: {message}" for rank, message in enumerate(messages) if message)
        if results is not None:
            status = status_of(error, settings) if error else FAILED if said else status_of_found(found)
            row = row_of(step, results.machine, status, time.monotonic() - begin, found, said)
            results.add(row)
            on_row(step, row)
