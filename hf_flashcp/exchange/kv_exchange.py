"""The two collectives of a stage. K and V of a token travel together as one row (H_kv, D_k + D_v).

Every rank of the group enters both, with zero splits where it has nothing to send or receive: a stage is known to
all of them from the plan.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..errors import ConfigurationError
from ..layout import Stage


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Transfer:
    """An all-to-all under way. Holds the sent buffer, which must live until the transfer is over."""

    def __init__(self, sent: torch.Tensor, send_splits: list[int], recv_splits: list[int], group: ProcessGroup):
        if os.environ.get("FLASHCP_DEBUG") == "1":
            _check_sizes(sent, send_splits, recv_splits, group)
        self._sent = sent
        self._received = sent.new_empty((sum(recv_splits), *sent.shape[1:]))
        self._work = dist.all_to_all_single(self._received, sent, recv_splits, send_splits, group=group, async_op=True)

    def wait(self) -> torch.Tensor:
        """(n_received, ...) rows, source rank after source rank."""
        self._work.wait()
        self._sent = None
        return self._received


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


def send_kv(key: torch.Tensor, value: torch.Tensor, stage: Stage, group: ProcessGroup) -> Transfer:
    """Posts the KV rows that other ranks need.

    Args:
        key (`torch.Tensor`): (H_kv, T_r, D_k).
        value (`torch.Tensor`): (H_kv, T_r, D_v).

    Returns:
        `Transfer`: of rows (n, H_kv, D_k + D_v).
    """
    return Transfer(kv_rows(key, value, stage.send_rows), stage.send_splits, stage.recv_splits, group)


def kv_rows(key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(n, H_kv, D_k + D_v), contiguous: some rows of key (H_kv, T_r, D_k) and value (H_kv, T_r, D_v) side by side."""
    return torch.cat((key.index_select(1, rows), value.index_select(1, rows)), dim=-1).transpose(0, 1).contiguous()


def send_grads_home(grad: torch.Tensor, stage: Stage, group: ProcessGroup) -> Transfer:
    """Posts the gradients (n_received, H_kv, D_k + D_v) of what `send_kv` received, in the order it was received."""
    return Transfer(grad.contiguous(), stage.recv_splits, stage.send_splits, group)
