"""`AllToAll`: the rows of one uneven all-to-all."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


KEYS, GRADIENTS = "keys and values", "gradients of keys and values"


class AllToAll(NamedTuple):
    """What one rank sends and receives in one all-to-all."""

    sent: torch.Tensor  # (n_sent, width), contiguous, destination rank after destination rank
    received: torch.Tensor  # (n_received, width), where what arrives is written, source rank after source rank
    send_splits: list[int]  # rows of `sent` for each rank of the group
    recv_splits: list[int]  # rows of `received` from each
    group: ProcessGroup
    what: str = KEYS  # names the rows for errors and profilers
