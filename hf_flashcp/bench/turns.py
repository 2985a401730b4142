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
    clock = _EventClock() if device.type == "cuda" else _HostClock()
    for turn in range(rounds + 1):
        for name, function in functions.items():
            clock.run(name, function, counts=turn > 0)
    return {name: median(seconds) for name, seconds in clock.seconds().items()}


class _HostClock:
    def __init__(self):
        self._seconds: dict[str, list[float]] = {}

    def run(self, name: str, function: Callable[[], Any], counts: bool) -> None:
        begin = time.perf_counter()
        function()
        if counts:
            self._seconds.setdefault(name, []).append(time.perf_counter() - begin)

    def seconds(self) -> dict[str, list[float]]:
        return self._seconds


class _EventClock:
    def __init__(self):
        self._events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}

    def run(self, name: str, function: Callable[[], Any], counts: bool) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        if counts:
            self._events.setdefault(name, []).append((begin, end))

    def seconds(self) -> dict[str, list[float]]:
        torch.cuda.synchronize()
        return {name: [b.elapsed_time(e) / 1000 for b, e in pairs] for name, pairs in self._events.items()}
