"""Calls functions in another thread, so that the caller can give up on a call that never returns."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """Call a function in another thread; return its result, or `None` if it takes too long or the store is gone.

    Another thread is needed because a call to a store whose process is stopped never returns.
    """
    helper = _idle_helpers.pop() if _idle_helpers else _Helper()
    helper.functions.put(function)
    try:
        result, error = helper.outcomes.get(timeout=seconds)
    except queue.Empty:
        helper.functions.put(None)  # ends the helper's thread if the call ever returns
        return None
    _idle_helpers.append(helper)
    if error is not None and not isinstance(error, (dist.DistError, RuntimeError)):
        raise error
    return result


class _Helper:
    """A thread that calls functions one after the other until it receives `None`."""

    def __init__(self) -> None:
        self.functions: queue.SimpleQueue = queue.SimpleQueue()
        self.outcomes: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._run, name="flashcp-helper", daemon=True).start()

    def _run(self) -> None:
        while (function := self.functions.get()) is not None:
            try:
                outcome = function(), None
            except Exception as error:
                outcome = None, error
            self.outcomes.put(outcome)
            del function, outcome  # do not keep them alive until the next call


_idle_helpers: list[_Helper] = []
os.register_at_fork(after_in_child=_idle_helpers.clear)  # a forked process does not have its parent's threads
