"""Debug mode (`FLASHCP_DEBUG=1`) of the exchanges: checks that ranks agree and that data arrives unchanged.

Before an all-to-all starts, every rank tells the others how many rows it sends and expects, their dtype, and a
checksum of the rows for each rank. When the all-to-all is done, each rank recomputes the checksums of the rows it
received and of the rows it sent, and all ranks share their findings. This takes two blocking gathers, of 3 N + 2 and
2 N numbers of 8 bytes from each of N ranks.
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
_CHUNK = 2**22  # elements checksummed at a time; their int64 temporaries take 64 MB
_MIX = 0x9E3779B97F4A7C15 - 2**64


def debug_mode() -> bool:
    """Return whether `FLASHCP_DEBUG=1` is set."""
    return os.environ.get("FLASHCP_DEBUG") == "1"


class CheckedExchange:
    """The check of one all-to-all.

    Every rank creates it before the all-to-all starts. If one rank sends something other than what another expects,
    it raises a `ConfigurationError` on all ranks.
    """

    def __init__(self, rows: AllToAll):
        self._rows = rows
        self._ranks = dist.get_process_group_ranks(rows.group)
        sums = checksums(rows.sent, rows.send_splits)
        dtype = _DTYPES.index(rows.sent.dtype)
        description = [rows.sent.shape[1], dtype, *rows.send_splits, *rows.recv_splits, *sums]
        views = gather_numbers(description, rows.sent.device, rows.group)
        formats = [f"{view[0]} elements of {_DTYPES[view[1]]}" for view in views]
        size = len(self._ranks)
        self._sends, expects, self._sums = (
            [view[2 + part * size : 2 + (part + 1) * size] for view in views] for part in range(3)
        )
        ranks = self._ranks
        problems = [
            f"rank {ranks[a]} sends {self._sends[a][b]} rows of {rows.what} to rank {ranks[b]}, which expects "
            f"{expects[b][a]}"
            for a in range(size)
            for b in range(size)
            if self._sends[a][b] != expects[b][a]
        ]
        problems += [
            f"rows have {found} on rank {rank} but {formats[0]} on rank {ranks[0]}"
            for rank, found in zip(ranks, formats)
            if found != formats[0]
        ]
        if problems:
            raise ConfigurationError(
                f"An exchange differs between ranks: {'; '.join(problems)}. All ranks must run the same model "
                "on the same batch."
            )

    def compare(self) -> None:
        """Compare the checksums once the all-to-all is done. Every rank calls this.

        Raises a `FlashCPError` on all ranks if rows arrived different from how they were sent, or if their sender
        changed them during the exchange.
        """
        rows = self._rows
        me, size = rows.group.rank(), rows.group.size()
        arrived = checksums(rows.received, rows.recv_splits)
        differs = [int(arrived[source] != self._sums[source][me]) for source in range(size)]
        sent_now = checksums(rows.sent, rows.send_splits)
        overwritten = [int(after != before) for after, before in zip(sent_now, self._sums[me])]
        found = gather_numbers([*differs, *overwritten], rows.sent.device, rows.group)
        problems = [
            self._problem(source, target, found[target][source], found[source][size + target])
            for source in range(size)
            for target in range(size)
            if found[target][source] or found[source][size + target]
        ]
        if problems:
            raise FlashCPError(
                f"Data changed during an exchange: {'; '.join(problems)}. Either something wrote to the "
                "exchange's memory while it was running, or a device or the network is faulty."
            )

    def _problem(self, source: int, target: int, differs: int, overwritten: int) -> str:
        rows, count = self._rows, self._sends[source][target]
        size = count * rows.sent.element_size() * rows.sent.shape[1]
        text = f"{count} rows of {rows.what} ({size:,} bytes) from rank {self._ranks[source]} to {self._ranks[target]}"
        faults = ["arrived with a different checksum"] * differs
        faults += [f"were overwritten on rank {self._ranks[source]} after they had been posted"] * overwritten
        return f"{text} {' and '.join(faults)}"


def checksums(rows: torch.Tensor, splits: list[int]) -> list[int]:
    """Return a checksum of each part of `rows` (n, width), which `splits` divides into parts.

    The bits are read as integers of 16 or 32 bits. Each is multiplied by an odd factor that depends on its position,
    and the products are added modulo 2**64. Changing a single number always changes the checksum. Several changes, or
    rows that swap places, can go unnoticed only by coincidence.
    """
    bits = rows.detach().contiguous().view(torch.int16 if rows.element_size() == 2 else torch.int32)
    return torch.stack([_checksum(part.flatten()) for part in bits.split(splits)]).tolist()


def _checksum(bits: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for first, part in zip(range(0, len(bits), _CHUNK), bits.split(_CHUNK)):
        factors = torch.arange(first + 1, first + len(part) + 1, device=bits.device).mul_(_MIX)
        factors.bitwise_xor_(factors >> 32).bitwise_or_(1)
        total += factors.mul_(part).sum()
    return total
