"""Timing functions in turns, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist


Run = Callable[[], Sequence[float]]
"""Does something and returns figures of it, such as the seconds that its parts took."""


def in_turns(runs: Sequence[Run], rounds: int, *, warm_up: int = 1) -> list[list[Sequence[float]]]:
    """What every run returned in each round after `warm_up` ones. All processes start each turn together."""
    found: list[list[Sequence[float]]] = [[] for _ in runs]
    for turn in range(warm_up + rounds):
        for figures, run in zip(found, runs):
            dist.barrier()
            figure = run()
            if turn >= warm_up:
                figures.append(figure)
    return found


def median_seconds(rounds: int, device: torch.device, **functions: Callable[[], Any]) -> dict[str, float]:
    """Median seconds of each function; every round calls each once, after one round that does not count.

    On a GPU the seconds are those between two CUDA events around the call, so what the host does beside the device's
    work is not in them, and nothing waits for the device between two calls.
    """
    on_gpu = device.type == "cuda"

    def now() -> Any:
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    spans: dict[str, list[tuple[Any, Any]]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            begin = now()
            function()
            spans[name].append((begin, now()))
    if on_gpu:
        torch.cuda.synchronize()
    return {
        name: median(begin.elapsed_time(end) / 1000 if on_gpu else end - begin for begin, end in each[1:])
        for name, each in spans.items()
    }
