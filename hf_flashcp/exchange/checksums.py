"""Debug mode (`FLASHCP_DEBUG=1`) of the exchanges: whether an all-to-all fits, and whether it brings what was sent.

Before an all-to-all starts every rank tells every other what it sends and expects, in which dtype, and a checksum of
the rows for each rank. When it is done, each rank compares what arrived and, once more, what it sent, and all learn
what any of them found. That takes two blocking gathers, of 3 N + 2 and 2 N numbers of 8 bytes from each of N ranks.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..distributed.gather import gather_numbers
from ..errors import ConfigurationError, FlashCPError


if TYPE_CHECKING:
    from .transfer import AllToAll

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_AT_ONCE = 2**22  # elements, for which 64 MB of whole numbers are made
_MIX = 0x9E3779B97F4A7C15 - 2**64


def debug_mode() -> bool:
    return os.environ.get("FLASHCP_DEBUG") == "1"


class CheckedExchange:
    """What ranks know of one all-to-all. It is made before that starts, on every rank, and raises a
    `ConfigurationError` on all of them if what one sends is not what another expects."""

    def __init__(self, rows: AllToAll):
        self._rows = rows
        self._ranks = dist.get_process_group_ranks(rows.group)
        sums = checksums(rows.sent, rows.send_splits)
        dtype = _DTYPES.index(rows.sent.dtype)
        told = [rows.sent.shape[1], dtype, *rows.send_splits, *rows.recv_splits, *sums]
        views = gather_numbers(told, rows.sent.device, rows.group)
        formats = [f"{view[0]} {_DTYPES[view[1]]}" for view in views]
        size = len(self._ranks)
        self._sends, expects, self._sums = (
            [view[2 + part * size : 2 + (part + 1) * size] for view in views] for part in range(3)
        )
        ranks = self._ranks
        problems = [
            f"rank {ranks[a]} sends {self._sends[a][b]} rows to rank {ranks[b]}, which expects {expects[b][a]}"
            for a in range(size)
            for b in range(size)
            if self._sends[a][b] != expects[b][a]
        ]
        problems += [
            f"rows are {found} on rank {rank} and {formats[0]} on rank {ranks[0]}"
            for rank, found in zip(ranks, formats)
            if found != formats[0]
        ]
        if problems:
            raise ConfigurationError(
                f"An exchange of KV does not fit: {'; '.join(problems)}. All ranks must run the same model on the "
                "same batch."
            )

    def compare(self) -> None:
        """Called on every rank when the all-to-all is done: raises a `FlashCPError` on all of them if a piece arrived
        otherwise than it was sent, or has changed at its sender."""
        rows = self._rows
        me, size = rows.group.rank(), rows.group.size()
        arrived = checksums(rows.received, rows.recv_splits)
        other = [int(arrived[source] != self._sums[source][me]) for source in range(size)]
        left = checksums(rows.sent, rows.send_splits)
        written = [int(mine != before) for mine, before in zip(left, self._sums[me])]
        found = gather_numbers([*other, *written], rows.sent.device, rows.group)
        problems = [
            self._problem(source, target, found[target][source], found[source][size + target])
            for source in range(size)
            for target in range(size)
            if found[target][source] or found[source][size + target]
        ]
        if problems:
            raise FlashCPError(
                f"An exchange of KV was changed on its way: {'; '.join(problems)}. Something wrote to the memory of "
                "an exchange under way, or a device or the network is faulty."
            )

    def _problem(self, source: int, target: int, arrived_other: int, written: int) -> str:
        rows, count = self._rows, self._sends[source][target]
        size = count * rows.sent.element_size() * rows.sent.shape[1]
        text = f"{count} rows of {rows.what} ({size:,} bytes) from rank {self._ranks[source]} to {self._ranks[target]}"
        said = ["arrived with another checksum"] * arrived_other
        said += [f"were written to on rank {self._ranks[source]} after they had been posted"] * written
        return f"{text} {' and '.join(said)}"


def checksums(rows: torch.Tensor, splits: list[int]) -> list[int]:
    """A checksum of each part of rows (n, width): its bits as integers of 16 or 32 bits, each times an odd number that
    depends on the place, added modulo 2**64. A change of one number always shows; changes of several, or rows that
    change places, show except by chance."""
    bits = rows.detach().contiguous().view(torch.int16 if rows.element_size() == 2 else torch.int32)
    return torch.stack([_checksum(part.flatten()) for part in bits.split(splits)]).tolist()


def _checksum(bits: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for first, part in zip(range(0, len(bits), _AT_ONCE), bits.split(_AT_ONCE)):
        factors = torch.arange(first + 1, first + len(part) + 1, device=bits.device).mul_(_MIX)
        factors.bitwise_xor_(factors >> 32).bitwise_or_(1)
        total += factors.mul_(part).sum()
    return total
