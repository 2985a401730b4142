"""`PooledRows`: the rows that the ranks of a group read for one forward, as documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ...distributed import gather_rows, gather_values
from ...errors import BatchError
from .padded_rows import PaddedRows


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_ADVICE = "All processes of a context-parallel group must run the same forwards: start them with the same arguments."


class PooledRows:
    """The tokens of every rank's rows, on every rank.

    Args:
        tokens (`dict[str, torch.Tensor]`): the values (n, ...) of each per-token input, of all ranks' tokens in order.
        lengths (`list[list[int]]`): the tokens of each row, by rank.
    """

    def __init__(self, tokens: dict[str, torch.Tensor], lengths: list[list[int]]):
        self._tokens, self._lengths = tokens, lengths
        self._counts = [sum(each) for each in lengths]

    def lengths_of(self, ranks: Sequence[int]) -> list[int]:
        """Return the lengths of the rows of some ranks."""
        return [length for rank in ranks for length in self._lengths[rank]]

    def span_of(self, rank: int) -> slice:
        """Return where the tokens of a rank are."""
        start = sum(self._counts[:rank])
        return slice(start, start + self._counts[rank])

    def inputs_of(self, ranks: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return per-token inputs (1, C, ...) for the rows of consecutive ranks."""
        span = slice(self.span_of(ranks[0]).start, self.span_of(ranks[-1]).stop)
        return {name: values[span][None] for name, values in self._tokens.items()}


def own_rows(tokens: dict[str, torch.Tensor], rows: PaddedRows) -> PooledRows:
    """Return the rows of this rank, or of a group whose ranks all read the same rows."""
    _raise_for(rows.problem)
    if not rows.lengths:
        _raise_for("all rows are empty. Leave such batches out")
    return PooledRows(tokens, [rows.lengths])


def pool_rows(tokens: dict[str, torch.Tensor], rows: PaddedRows, group: ProcessGroup) -> PooledRows:
    """Exchange the rows of all ranks of a group, which may have different numbers of rows and tokens.

    Args:
        tokens: the integer values (n,) of each per-token input of this rank's rows.
        rows: where they are in the rows.
        group: ranks that pool their rows. All of them must call this function.

    Raises a [`BatchError`] on every rank if a rank's rows are not documents, or if ranks have different inputs.
    """
    names = sorted(tokens)
    problem = rows.problem
    if floating := [name for name in names if tokens[name].is_floating_point() or tokens[name].dim() > 1]:
        problem = f"{floating[0]} is not an integer per token, so it cannot be pooled. Use batches='shared'"
    mine = {"inputs": names, "lengths": rows.lengths, "problem": problem}
    found = gather_values("the rows of a forward", mine, group, advice=_ADVICE, error=BatchError)
    for rank, each in enumerate(found):
        _raise_for(each["problem"], f" of rank {rank}")
        if each["inputs"] != found[0]["inputs"]:
            _raise_for(f"they have {each['inputs']}, but rank 0 has {found[0]['inputs']}", f" of rank {rank}")
    lengths = [each["lengths"] for each in found]
    counts = [sum(each) for each in lengths]
    if not max(counts):
        _raise_for("all rows are empty. Leave such batches out")
    table = torch.stack([tokens[name].long() for name in names], dim=1)
    columns = torch.cat(gather_rows(table, counts, group, "tokens of other ranks")).unbind(1)
    return PooledRows({name: column.to(tokens[name].dtype) for name, column in zip(names, columns)}, lengths)


def _raise_for(problem: str | None, where: str = "") -> None:
    if problem is not None:
        raise BatchError(f"The rows{where} cannot be sharded: {problem}.")
