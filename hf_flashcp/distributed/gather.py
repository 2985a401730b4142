"""Gathers numbers and rows of all ranks, with plain collectives.

They share no code with the exchange of KV, so that debug mode can check it with them. A group of `None` means a single
rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .failures import naming


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_WHAT = "values that debug mode compares (FLASHCP_DEBUG=1)"


def gather_numbers(
    numbers: Sequence[int] | Sequence[float], device: torch.device, group: ProcessGroup | None
) -> list[list]:
    """Return the numbers of each rank. All ranks pass equally many; they travel as float64 if one is a float, else as
    int64."""
    dtype = torch.float64 if any(isinstance(number, float) for number in numbers) else torch.int64
    mine = torch.tensor(numbers, dtype=dtype, device=device)
    return _gathered(mine[None], group).tolist()


def gather_rows(
    rows: torch.Tensor, counts: Sequence[int], group: ProcessGroup | None, what: str = _WHAT
) -> list[torch.Tensor]:
    """Return the rows of each rank, (counts[rank], width). They travel padded to the largest count. Errors call them
    `what`."""
    padded = F.pad(rows, (0, 0, 0, max(counts) - len(rows)))
    return [part[:count] for part, count in zip(_gathered(padded, group, what).split(max(counts)), counts)]


def add_over_ranks(tensor: torch.Tensor, group: ProcessGroup | None, what: str = _WHAT) -> torch.Tensor:
    """Sum the tensors of all ranks into `tensor`, in place, and return it. Errors call the tensors `what`."""
    if group is not None:
        with naming(what):
            dist.all_reduce(tensor, group=group)
    return tensor


def _gathered(rows: torch.Tensor, group: ProcessGroup | None, what: str = _WHAT) -> torch.Tensor:
    if group is None:
        return rows
    found = rows.new_empty(group.size() * len(rows), *rows.shape[1:])
    with naming(what):
        dist.all_gather_into_tensor(found, rows.contiguous(), group=group)
    return found
