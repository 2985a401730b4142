"""Checks that the slices of a plan partition its documents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import PlanError
from .slice_table import SliceColumns
from .slices import Lengths, Slice, slices_by_document


def is_partition(columns: SliceColumns, lengths: Lengths, cp_size: int) -> bool:
    """Return whether the slices are a partition of the documents over `cp_size` ranks, none of which is empty."""
    counts, documents, starts, stops = columns
    if len(counts) != cp_size or not counts.all() or documents.min() < 0 or documents.max() >= len(lengths):
        return False
    ends = np.array(lengths).cumsum()
    bases = np.append(0, ends[:-1])[documents]
    firsts, lasts = bases + starts, bases + stops
    if starts.min() < 0 or not ((starts < stops) & (lasts <= ends[documents])).all():
        return False
    # Wherever slices of a partition end, and nowhere else, other slices begin.
    firsts.sort()
    lasts.sort()
    return bool(firsts[0] == 0 and lasts[-1] == ends[-1] and (firsts[1:] == lasts[:-1]).all())


def require_partition(slices: Sequence[Sequence[Slice]], lengths: Lengths, cp_size: int) -> None:
    """Raise a `PlanError` that names the first wrong rank, document and tokens, if there are any."""
    if len(slices) != cp_size:
        raise PlanError(f"The plan has slices for {len(slices)} ranks, but cp_size is {cp_size}.")
    for rank, rank_slices in enumerate(slices):
        if not rank_slices:
            raise PlanError(f"Rank {rank} holds no tokens: every rank needs at least one.")
        for document, start, stop in rank_slices:
            if not 0 <= document < len(lengths):
                raise PlanError(
                    f"Rank {rank} holds a slice of document {document}, but the plan has {len(lengths)} documents."
                )
            if not 0 <= start < stop <= lengths[document]:
                raise PlanError(
                    f"Rank {rank} holds tokens [{start}, {stop}) of document {document}, "
                    f"which has {lengths[document]} tokens."
                )
    held = slices_by_document(slices)
    for document, length in enumerate(lengths):
        if document not in held:
            raise PlanError(f"Document {document} is on no rank. Assign each of its tokens to one rank.")
        position = 0
        for start, stop, rank in (*held[document], (length, length, -1)):
            if start > position:
                raise PlanError(
                    f"Tokens [{position}, {start}) of document {document} are on no rank. Assign each of them to "
                    "one rank."
                )
            if rank >= 0 and start < position:
                raise PlanError(
                    f"Tokens of document {document}, from token {start} on, are on rank {rank} and on another "
                    "rank. Assign each token to one rank."
                )
            position = stop
