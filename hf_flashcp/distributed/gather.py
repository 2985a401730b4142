"""Numbers and rows of all ranks: plain collectives, which share nothing with the exchange that debug mode checks.

Without a group a rank is alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .liveness import naming


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_WHAT = "what debug mode compares (FLASHCP_DEBUG=1)"


def gather_numbers(
    numbers: Sequence[int] | Sequence[float], device: torch.device, group: ProcessGroup | None
) -> list[list]:
    """Each rank's numbers, as many from all of them: int64, or float64 if one is a float."""
    dtype = torch.float64 if any(isinstance(number, float) for number in numbers) else torch.int64
    mine = torch.tensor(numbers, dtype=dtype, device=device)
    return _gathered(mine[None], group).tolist()


def gather_rows(rows: torch.Tensor, counts: Sequence[int], group: ProcessGroup | None) -> list[torch.Tensor]:
    """The rows of each rank, (counts[rank], ...); they travel padded to as many as the fullest rank has."""
    padded = F.pad(rows, (0, 0, 0, max(counts) - len(rows)))
    return [part[:count] for part, count in zip(_gathered(padded, group).split(max(counts)), counts)]


def add_over_ranks(tensor: torch.Tensor, group: ProcessGroup | None, what: str = _WHAT) -> torch.Tensor:
    """`tensor`, in which the ranks' tensors are added up. `what` names them for errors."""
    if group is not None:
        with naming(what):
            dist.all_reduce(tensor, group=group)
    return tensor


def _gathered(rows: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    if group is None:
        return rows
    found = rows.new_empty(group.size() * len(rows), *rows.shape[1:])
    with naming(_WHAT):
        dist.all_gather_into_tensor(found, rows.contiguous(), group=group)
    return found
