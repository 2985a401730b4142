"""Timing of functions that run in turn, so that other load on the machine affects all of them equally."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist


Run = Callable[[], Sequence[float]]
"""A function that does something and returns figures about it, for example the seconds that its parts took."""


def in_turns(runs: Sequence[Run], rounds: int, *, warm_up: int = 1) -> list[list[Sequence[float]]]:
    """Call every run once per round, and return its figures for each round after the `warm_up` rounds.

    All processes of the group start each turn together.
    """
    found: list[list[Sequence[float]]] = [[] for _ in runs]
    for turn in range(warm_up + rounds):
        for figures, run in zip(found, runs):
            dist.barrier()
            figure = run()
            if turn >= warm_up:
                figures.append(figure)
    return found


def median_seconds(rounds: int, device: torch.device, **functions: Callable[[], Any]) -> dict[str, float]:
    """Return the median seconds of each function. Every round calls each function once; a first round is not counted.

    On a GPU, the time is that between two CUDA events around the call. It does not include work of the host that
    overlaps with the device, and nothing waits for the device between two calls.
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
