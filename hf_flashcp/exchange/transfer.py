"""`AllToAll`, the rows of one uneven all-to-all, and `Transfer`, which posts and awaits them."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from ..distributed.liveness import naming
from .checksums import CheckedExchange, debug_mode


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

KEYS, GRADIENTS = "keys and values", "gradients of keys and values"
_NOTHING = contextlib.nullcontext()
_seconds_waited: float | None = None


def named_range(name: str) -> contextlib.AbstractContextManager:
    """`torch.profiler.record_function("flashcp: NAME")` while a profiler runs (an NVTX range under
    `torch.autograd.profiler.emit_nvtx`), else nothing."""
    if torch.autograd._profiler_enabled():
        return torch.profiler.record_function(f"flashcp: {name}")
    return _NOTHING


def seconds_waited() -> float | None:
    """How long this process has waited for rows of other ranks, because computation did not hide their transfer or
    because those ranks were slow. `None` before the first exchange, and on GPUs, where the host does not wait."""
    return _seconds_waited


class AllToAll(NamedTuple):
    """What one rank sends and receives in one all-to-all."""

    sent: torch.Tensor  # (n_sent, width), contiguous, destination rank after destination rank
    received: torch.Tensor  # (n_received, width), where what arrives is written, source rank after source rank
    send_splits: list[int]  # rows of `sent` for each rank of the group
    recv_splits: list[int]  # rows of `received` from each
    group: ProcessGroup
    what: str = KEYS  # names the rows for errors and profilers


class Transfer:
    """An all-to-all under way, to be awaited once. Until then it holds both buffers, which must live that long.
    `result` is the buffer whose first rows are `rows.received`, if it has more rows."""

    def __init__(self, rows: AllToAll, result: torch.Tensor | None = None):
        self._checked = CheckedExchange(rows) if debug_mode() else None
        self._sent, self._result = rows.sent, rows.received if result is None else result
        self._what = f"the {rows.what} of other ranks"
        with naming(self._what):
            self._work = dist.all_to_all_single(
                rows.received, rows.sent, rows.recv_splits, rows.send_splits, group=rows.group, async_op=True
            )

    def wait(self) -> torch.Tensor:
        """(n, ...) rows: those received, source rank after source rank, and what `result` has behind them."""
        global _seconds_waited
        begin = time.perf_counter()
        with naming(self._what), named_range(f"wait for {self._what}"):
            self._work.wait()
        if self._sent.device.type == "cpu":
            _seconds_waited = (_seconds_waited or 0.0) + time.perf_counter() - begin
        if self._checked is not None:
            self._checked.compare()
        result = self._result
        self._work = self._sent = self._result = self._checked = None
        return result
