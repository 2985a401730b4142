"""The two collectives of a stage: KV in forward, gradients of KV in backward.

The keys and values of a token travel together as one row of H_kv * (D_k + D_v) elements. Every rank of the group takes
part in both collectives, with zero splits if it has nothing to send or receive: all ranks know the stages from the
plan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..layout import RankLayout, Rows, Stage, fused
from .hierarchical import HierarchicalTransfer, return_grads_over_nodes, send_rows_over_nodes
from .transfer import GRADIENTS, KEYS, AllToAll, Transfer, named_range


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def send_kv(
    key: torch.Tensor, value: torch.Tensor, layout: RankLayout, group: ProcessGroup
) -> list[Transfer | HierarchicalTransfer]:
    """Post the rows of key (H_kv, T_r, D_k) and value (H_kv, T_r, D_v) that other ranks need, for all stages.

    All rows are packed together, because they do not depend on anything that the stages compute.

    Returns one transfer per stage. Its result has rows (n, H_kv * (D_k + D_v)) in the format of [`pack_rows`]: first
    the received rows, then the local rows that the stage attends to beside them.
    """
    stages = layout.stages(key.device)
    if not stages:
        return []
    width = kv_width(key, value)
    rows = layout.send_rows(key.device)
    with named_range("pack"):
        packed = pack_rows(key, value, rows, key.new_empty(rows.count, width))
    transfers: list[Transfer | HierarchicalTransfer] = []
    for stage in stages:
        local = stage.local_rows.count if stage.local_rows else 0
        keys = key.new_empty(stage.received + local, width)
        transfers.append(send_rows(packed[stage.sent], keys, stage, group))
        if local:
            pack_rows(key, value, stage.local_rows, keys[stage.received :])
    return transfers


def send_rows(
    sent: torch.Tensor, result: torch.Tensor, stage: Stage, group: ProcessGroup, what: str = KEYS
) -> Transfer | HierarchicalTransfer:
    """Post the rows of one stage.

    Args:
        sent: (n_sent, width), contiguous, ordered by destination rank.
        result: (n, width); its first rows receive those of other ranks, ordered by source rank. Awaiting the transfer
            returns it.
        stage: stage of the exchange.
        group: process group of the exchange.
        what: name of the rows in errors and profiles.
    """
    received = result[: stage.received]
    if stage.second_step is not None:
        return send_rows_over_nodes(sent, received, stage, group, result, what)
    return Transfer(AllToAll(sent, received, stage.send_splits, stage.recv_splits, group, what), result)


def kv_width(key: torch.Tensor, value: torch.Tensor) -> int:
    """Return the number of elements in the keys and values of one token, H_kv * (D_k + D_v)."""
    return key.shape[0] * (key.shape[2] + value.shape[2])


def pack_rows(key: torch.Tensor, value: torch.Tensor, rows: Rows, packed: torch.Tensor) -> torch.Tensor:
    """Copy `rows` of key (H_kv, T_r, D_k) and value (H_kv, T_r, D_v) into `packed` (n, H_kv * (D_k + D_v)).

    Each packed row holds all heads of the key, then all heads of the value. Returns `packed`.
    """
    for source, target in zip((key, value), split_rows(packed, key, value)):
        if rows.index is not None and source.stride(2) == 1 and fused.runs_on(source):
            fused.take_rows(source, rows.index, target)
        else:
            rows.copy(source.transpose(0, 1), target.transpose(0, 1))
    return packed


def split_rows(packed: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys (H_kv, n, D_k) and values (H_kv, n, D_v) in `packed` (n, H_kv * (D_k + D_v)), as views."""
    (heads, _, key_dim), value_dim = key.shape, value.shape[2]
    count, step, begin = len(packed), packed.stride(0), packed.storage_offset()
    return (
        packed.as_strided((heads, count, key_dim), (key_dim, step, 1), begin),
        packed.as_strided((heads, count, value_dim), (value_dim, step, 1), begin + heads * key_dim),
    )


def return_grads(
    grad: torch.Tensor, returned: torch.Tensor, stage: Stage, group: ProcessGroup, what: str = GRADIENTS
) -> Transfer | HierarchicalTransfer:
    """Post the gradients of the rows that `send_kv` or `send_rows` received in a stage.

    Args:
        grad: (n_received, width), contiguous, in the order in which the rows were received.
        returned: (n_sent, width); receives the gradients of the rows that this rank sent.
        stage: stage of the exchange.
        group: process group of the exchange.
        what: name of the rows in errors and profiles.
    """
    if stage.second_step is not None:
        return return_grads_over_nodes(grad, returned, stage, group, what)
    return Transfer(AllToAll(grad, returned, stage.recv_splits, stage.send_splits, group, what))
