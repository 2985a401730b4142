"""`AllToAll`, which describes one uneven all-to-all, and `Transfer`, which posts and awaits it."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from ..distributed.failures import naming
from ..distributed.location import waiting_for
from .checksums import CheckedExchange, debug_mode


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

KEYS, GRADIENTS = "keys and values", "gradients of keys and values"
_NOTHING = contextlib.nullcontext()
_seconds_waited: float | None = None


def named_range(name: str) -> contextlib.AbstractContextManager:
    """Return a profiler range called "flashcp: NAME", or an empty context if no profiler is running.

    Under `torch.autograd.profiler.emit_nvtx` it is an NVTX range.
    """
    if torch.autograd._profiler_enabled():
        return torch.profiler.record_function(f"flashcp: {name}")
    return _NOTHING


def seconds_waited() -> float | None:
    """Return how many seconds this process has spent waiting for rows from other ranks.

    It waits if computation does not hide the transfer, or if the other ranks are slower. The result is `None` before
    the first exchange and on GPUs, where the host does not wait.
    """
    return _seconds_waited


class AllToAll(NamedTuple):
    """The rows that one rank sends and receives in one all-to-all."""

    sent: torch.Tensor  # (n_sent, width), contiguous, ordered by destination rank
    received: torch.Tensor  # (n_received, width), buffer for the received rows, ordered by source rank
    send_splits: list[int]  # number of rows of `sent` for each rank of the group
    recv_splits: list[int]  # number of rows of `received` from each rank of the group
    group: ProcessGroup
    what: str = KEYS  # name of the rows in errors and profiles


class Transfer:
    """A running all-to-all, to be awaited once. It keeps both buffers alive until then.

    Args:
        rows: rows to send and to receive.
        result: larger buffer whose first rows are `rows.received`, if there is one. `wait` returns it.
    """

    def __init__(self, rows: AllToAll, result: torch.Tensor | None = None):
        self._checked = CheckedExchange(rows) if debug_mode() else None
        self._sent, self._result = rows.sent, rows.received if result is None else result
        self._what = f"the {rows.what} of other ranks"
        with naming(self._what):
            self._work = dist.all_to_all_single(
                rows.received, rows.sent, rows.recv_splits, rows.send_splits, group=rows.group, async_op=True
            )

    def wait(self) -> torch.Tensor:
        """Wait for the received rows and return them, ordered by source rank, or `result` if it was given."""
        global _seconds_waited
        begin = time.perf_counter()
        with naming(self._what), named_range(f"wait for {self._what}"), waiting_for(self._what, self._sent.device):
            self._work.wait()
        if self._sent.device.type == "cpu":
            _seconds_waited = (_seconds_waited or 0.0) + time.perf_counter() - begin
        if self._checked is not None:
            self._checked.compare()
        result = self._result
        self._work = self._sent = self._result = self._checked = None
        return result
