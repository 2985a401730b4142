"""The two collectives of a stage. K and V of a token travel together as one row of H_kv * (D_k + D_v) elements.

Every rank of the group enters both, with zero splits where it has nothing to send or receive: a stage is known to
all of them from the plan.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..errors import ConfigurationError
from ..layout import RankLayout, Rows, Stage
from .missing_ranks import naming
from .ranges import named_range


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
        what: str = "keys and values",
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


def send_kv(key: torch.Tensor, value: torch.Tensor, layout: RankLayout, group: ProcessGroup) -> list[Transfer]:
    """Posts the KV rows that other ranks need, for all stages: packed at once, since they depend on nothing that the
    stages compute.

    Args:
        key (`torch.Tensor`): (H_kv, T_r, D_k).
        value (`torch.Tensor`): (H_kv, T_r, D_v).

    Returns:
        `list[Transfer]`: one a stage, of rows (n, H_kv * (D_k + D_v)) as [`pack_rows`] makes them: those received, and
        the local ones that the stage joins to them.
    """
    stages = layout.stages(key.device)
    if not stages:
        return []
    width = kv_width(key, value)
    rows = layout.send_rows(key.device)
    with named_range("pack"):
        packed = pack_rows(key, value, rows, key.new_empty(rows.count, width))
    transfers = []
    for stage in stages:
        local = stage.local_rows.count if stage.local_rows else 0
        keys = key.new_empty(stage.received + local, width)
        transfers.append(
            Transfer(
                packed[stage.sent], keys[: stage.received], stage.send_splits, stage.recv_splits, group, result=keys
            )
        )
        if local:
            pack_rows(key, value, stage.local_rows, keys[stage.received :])
    return transfers


def kv_width(key: torch.Tensor, value: torch.Tensor) -> int:
    """H_kv * (D_k + D_v): elements of a token's keys and values."""
    return key.shape[0] * (key.shape[2] + value.shape[2])


def pack_rows(key: torch.Tensor, value: torch.Tensor, rows: Rows, packed: torch.Tensor) -> torch.Tensor:
    """Copies some rows of key (H_kv, T_r, D_k) and value (H_kv, T_r, D_v) into `packed` (n, H_kv * (D_k + D_v)), which
    it returns: each row all heads of the key, then all heads of the value."""
    for source, target in zip((key, value), split_rows(packed, key, value)):
        source, target = source.transpose(0, 1), target.transpose(0, 1)
        if rows.index is None:
            for there, here in rows.pieces():
                target[here].copy_(source[there])
        elif source[0].is_contiguous():  # a row at a time is an order of magnitude faster than a head at a time
            torch.index_select(source.flatten(1), 0, rows.index, out=target.flatten(1))
        else:
            torch.index_select(source, 0, rows.index, out=target)
    return packed


def split_rows(packed: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views (H_kv, n, D_k) and (H_kv, n, D_v) of rows (n, H_kv * (D_k + D_v)) packed from key and value."""
    heads, keys = key.shape[0], key.shape[0] * key.shape[2]
    return (
        packed[:, :keys].unflatten(1, (heads, key.shape[2])).transpose(0, 1),
        packed[:, keys:].unflatten(1, (heads, value.shape[2])).transpose(0, 1),
    )


def send_grads_home(grad: torch.Tensor, home: torch.Tensor, stage: Stage, group: ProcessGroup) -> Transfer:
    """Posts the gradients of what `send_kv` received in a stage, in the order it was received.

    Args:
        grad (`torch.Tensor`): (n_received, width), contiguous.
        home (`torch.Tensor`): (n_sent, width), where those of this rank's tokens arrive.
    """
    return Transfer(grad, home, stage.recv_splits, stage.send_splits, group, what="gradients of keys and values")
