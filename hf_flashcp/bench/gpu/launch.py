"""Steps that all ranks of a launch (torchrun) run together, in the launched processes themselves."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .cluster import Ranks
from .runner import FAILED, PASSED, TOTAL_SECONDS, Results, Row, row_of, status_of
from .settings import Found, Settings
from .steps import ClusterStep


def launched_ranks() -> int:
    """How many processes a launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def join(settings: Settings) -> Ranks:
    """Joins the launch's process group. The first rank may come late: it runs the steps of one GPU before."""
    device = torch.device("cpu")
    if settings.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = settings.sized("cpu:gloo,cuda:nccl", "gloo")
        dist.init_process_group(backend, timeout=timedelta(seconds=TOTAL_SECONDS + 60))
    ranks = list(range(dist.get_world_size()))
    return Ranks(dist.new_group(ranks, backend=settings.sized("nccl", "gloo")), device)


def run_together(
    steps: Sequence[ClusterStep],
    settings: Settings,
    ranks: Ranks,
    results: Results | None,
    on_row: Callable[[Any, Row | None], None],
) -> None:
    """Every rank calls it; the first one has the results."""
    for step in steps:
        begin = time.monotonic()
        found, error = Found(), None
        on_row(step, None)
        try:
            settings.prepare()
            found = step.run(ranks, settings.until(begin + step.seconds))
        except Exception as raised:  # a step must not end the run
            error = raised
        messages: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(messages, error and f"{type(error).__name__}: {error}")
        said = "; ".join(f"rank {rank}: {message}" for rank, message in enumerate(messages) if message)
        if results is not None:
            status = FAILED if found.problems or said else PASSED
            if error is not None:
                status = status_of(error, settings)
            row = row_of(step, results.machine, status, time.monotonic() - begin, found, said)
            results.add(row)
            on_row(step, row)
