"""What this process is doing: its activity, the line that its main thread is at, and what it waits for."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch


_WAITING_CODE = ("/torch/distributed/", "/torch/nn/parallel/", "/hf_flashcp/distributed/", "/hf_flashcp/exchange/")
activities: list[str | Callable[[], str]] = []  # of the `name_missing_ranks` that this process is in, innermost last
_latest: Wait | None = None


class Wait(NamedTuple):
    """A wait of this process for an exchange."""

    waited_for: str
    since: float  # time.monotonic()
    arrived: torch.cuda.Event | None  # on a GPU, which waits in place of the host; `None` while the host waits

    def is_over(self) -> bool:
        """Return whether the exchange has arrived."""
        try:
            return self.arrived is not None and self.arrived.query()
        except RuntimeError:  # a GPU that has failed, or an event of a CUDA graph, says nothing
            return True


@contextlib.contextmanager
def waiting_for(what: str, device: torch.device) -> Iterator[None]:
    """Context manager for a wait, after which the host goes on and the device's current stream may still wait."""
    global _latest
    _latest = wait = Wait(what, time.monotonic(), None)
    arrived = None
    try:
        yield
        if device.type == "cuda":
            arrived = _event(device)
            arrived.record(torch.cuda.current_stream(device))
    finally:
        _latest = arrived and wait._replace(arrived=arrived)


@cache
def _event(device: torch.device) -> torch.cuda.Event:
    return torch.cuda.Event()


def current_wait() -> Wait | None:
    """Return the exchange that this process, or its GPU, is waiting for, or `None` if there is none."""
    wait = _latest
    return None if wait is None or wait.is_over() else wait


def activity() -> str:
    """Return what this process is doing, as `name_missing_ranks` was told."""
    innermost = activities[-1] if activities else "a collective"
    return innermost() if callable(innermost) else innermost


def location() -> dict[str, Any]:
    """Return the line that this process's main thread is at, and whether it seems to wait for other ranks there.

    The line is the innermost one outside installed packages, if there is one. Whether the thread waits is judged by
    its innermost function, or by the exchange that its GPU waits for.
    """
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame is not None and frame.f_code.co_filename == threading.__file__ and frame.f_back:
        frame = frame.f_back  # the caller of a lock or join says more than the lock itself
    innermost, shown = frame, frame
    while shown is not None and f"{os.sep}site-packages{os.sep}" in shown.f_code.co_filename and shown.f_back:
        shown = shown.f_back
    if innermost is None:
        return {"at": "an unknown line", "waits": False}
    path, function = innermost.f_code.co_filename.replace(os.sep, "/"), innermost.f_code.co_name
    waits = function == "_engine_run_backward" or any(part in path for part in _WAITING_CODE)
    at = f"{shown.f_code.co_filename}:{shown.f_lineno} in {shown.f_code.co_name}"
    return {"at": f"{at} ({activity()})" if activities else at, "waits": waits or current_wait() is not None}
