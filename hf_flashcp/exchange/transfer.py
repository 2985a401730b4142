"""One all-to-all of rows under way."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..distributed.liveness import naming
from .checksums import CheckedExchange, debug_mode
from .ranges import named_range


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


KEYS, GRADIENTS = "keys and values", "gradients of keys and values"

_seconds_waited: float | None = None


def seconds_waited() -> float | None:
    """How long this process has waited for rows of other ranks: what computation did not hide of transfers, and of the
    slowness of others. `None` before the first exchange, and on GPUs, where the host does not wait."""
    return _seconds_waited


class Transfer:
    """An all-to-all under way, to be awaited once. Until then it holds both buffers, which must live that long.

    `result` is the buffer that `received` begins, if it has more rows; `what` names the rows for errors.
    """

    def __init__(
        self,
        sent: torch.Tensor,
        received: torch.Tensor,
        send_splits: list[int],
        recv_splits: list[int],
        group: ProcessGroup,
        result: torch.Tensor | None = None,
        what: str = KEYS,
    ):
        self._checked = None
        if debug_mode():
            self._checked = CheckedExchange(sent, received, send_splits, recv_splits, group, what)
        self._sent, self._result = sent, received if result is None else result
        self._what = f"the {what} of other ranks"
        with naming(self._what):
            self._work = dist.all_to_all_single(received, sent, recv_splits, send_splits, group=group, async_op=True)

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
