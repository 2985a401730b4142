"""One all-to-all of rows under way."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..errors import ConfigurationError
from .missing_ranks import naming
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
        if os.environ.get("FLASHCP_DEBUG") == "1":
            _check_sizes(sent, send_splits, recv_splits, group)
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
        result = self._result
        self._work = self._sent = self._result = None
        return result


def _check_sizes(sent: torch.Tensor, send_splits: list[int], recv_splits: list[int], group: ProcessGroup) -> None:
    """Every rank's view of one all-to-all, compared before it starts (`FLASHCP_DEBUG=1`; costs a blocking gather)."""
    views: list = [None] * group.size()
    mine = {"row": [*sent.shape[1:]], "dtype": str(sent.dtype), "sends": send_splits, "receives": recv_splits}
    dist.all_gather_object(views, mine, group=group)
    ranks = dist.get_process_group_ranks(group)
    problems = [
        f"rank {ranks[a]} sends {views[a]['sends'][b]} rows to rank {ranks[b]}, which expects "
        f"{views[b]['receives'][a]}"
        for a in range(len(views))
        for b in range(len(views))
        if views[a]["sends"][b] != views[b]["receives"][a]
    ]
    shapes = [f"{view['row']} {view['dtype']}" for view in views]
    problems += [
        f"rows are {shape} on rank {rank} and {shapes[0]} on rank {ranks[0]}"
        for rank, shape in zip(ranks, shapes)
        if shape != shapes[0]
    ]
    if problems:
        raise ConfigurationError(
            f"An exchange of KV does not fit: {'; '.join(problems)}. All ranks must run the same model on the same "
            "batch."
        )
