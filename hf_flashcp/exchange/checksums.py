"""Debug mode (`FLASHCP_DEBUG=1`) of the exchanges: whether an all-to-all fits, and whether it brings what was sent.

Before it starts every rank tells every other what it sends and expects, in which dtype, and a checksum of each piece
(rank to rank). Where it is waited for, each rank compares what arrived and, once more, what it sent, and all hear what
any of them found. That is two gathers, which block, of 3 N + 2 and 2 N numbers of 8 bytes from each of N ranks.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..distributed.gather import gather_numbers
from ..errors import ConfigurationError, FlashCPError


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_AT_ONCE = 2**22  # elements, for which 64 MB of whole numbers are made
_MIX = 0x9E3779B97F4A7C15 - 2**64


def debug_mode() -> bool:
    return os.environ.get("FLASHCP_DEBUG") == "1"


class CheckedExchange:
    """What ranks know of one all-to-all; made before it starts, on every rank.

    Raises:
        ConfigurationError: on every rank, if what one sends is not what another expects.
    """

    def __init__(
        self,
        sent: torch.Tensor,
        received: torch.Tensor,
        send_splits: list[int],
        recv_splits: list[int],
        group: ProcessGroup,
        what: str,
    ):
        self._sent, self._received, self._group, self._what = sent, received, group, what
        self._send_splits, self._recv_splits = send_splits, recv_splits
        self._ranks = dist.get_process_group_ranks(group)
        size = group.size()
        told = [sent.shape[1], _DTYPES.index(sent.dtype), *send_splits, *recv_splits, *checksums(sent, send_splits)]
        views = gather_numbers(told, sent.device, group)
        rows = [f"{view[0]} {_DTYPES[view[1]]}" for view in views]
        self._sends, expects, self._sums = (
            [view[2 + part * size : 2 + (part + 1) * size] for view in views] for part in range(3)
        )
        self._refuse_what_does_not_fit(rows, expects)

    def _refuse_what_does_not_fit(self, rows: list[str], expects: list[list[int]]) -> None:
        ranks = self._ranks
        problems = [
            f"rank {ranks[a]} sends {self._sends[a][b]} rows to rank {ranks[b]}, which expects {expects[b][a]}"
            for a in range(len(ranks))
            for b in range(len(ranks))
            if self._sends[a][b] != expects[b][a]
        ]
        problems += [
            f"rows are {row} on rank {rank} and {rows[0]} on rank {ranks[0]}"
            for rank, row in zip(ranks, rows)
            if row != rows[0]
        ]
        if problems:
            raise ConfigurationError(
                f"An exchange of KV does not fit: {'; '.join(problems)}. All ranks must run the same model on the "
                "same batch."
            )

    def compare(self) -> None:
        """To be called on every rank when the all-to-all is done.

        Raises:
            FlashCPError: on every rank, if a piece arrived otherwise than it was sent, or has changed at its sender.
        """
        me, size = self._group.rank(), self._group.size()
        arrived = checksums(self._received, self._recv_splits)
        other = [int(arrived[source] != self._sums[source][me]) for source in range(size)]
        left = checksums(self._sent, self._send_splits)
        written = [int(mine != before) for mine, before in zip(left, self._sums[me])]
        found = gather_numbers([*other, *written], self._sent.device, self._group)
        problems = [
            self._problem(source, target, found[target][source], found[source][size + target])
            for source in range(size)
            for target in range(size)
            if found[target][source] or found[source][size + target]
        ]
        self._sent = self._received = None
        if problems:
            raise FlashCPError(
                f"An exchange of KV was changed on its way: {'; '.join(problems)}. Something wrote to the memory of "
                "an exchange under way, or a device or the network is faulty."
            )

    def _problem(self, source: int, target: int, arrived_other: int, written: int) -> str:
        rows = self._sends[source][target]
        size = rows * self._sent[:0].element_size() * self._sent.shape[1]
        text = f"{rows} rows of {self._what} ({size:,} bytes) from rank {self._ranks[source]} to {self._ranks[target]}"
        said = ["arrived with another checksum"] * arrived_other
        said += [f"were written to on rank {self._ranks[source]} after they had been posted"] * written
        return f"{text} {' and '.join(said)}"


def checksums(rows: torch.Tensor, splits: list[int]) -> list[int]:
    """One of each piece: its bits as whole numbers of 16 or 32, each times an odd number that depends on the place,
    added modulo 2**64. One number that changes always shows; several, or rows that change places, but for chance.

    Args:
        rows (`torch.Tensor`): (n, width), piece after piece.
        splits (`list[int]`): rows of each piece.
    """
    bits = rows.detach().contiguous().view(torch.int16 if rows.element_size() == 2 else torch.int32)
    return torch.stack([_checksum(piece.flatten()) for piece in bits.split(splits)]).tolist()


def _checksum(bits: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for first, part in zip(range(0, len(bits), _AT_ONCE), bits.split(_AT_ONCE)):
        factors = torch.arange(first + 1, first + len(part) + 1, device=bits.device).mul_(_MIX)
        factors.bitwise_xor_(factors >> 32).bitwise_or_(1)
        total += factors.mul_(part).sum()
    return total
