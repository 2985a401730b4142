"""`Slice`: a run of tokens of one document, and what is counted from the slices that ranks hold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple


Lengths = tuple[int, ...]
"""Tokens of each document."""


class Slice(NamedTuple):
    """Tokens `start` to `stop` (half-open) of one document."""

    document: int
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.stop - self.start


Slices = list[list[Slice]]
"""The slices of each rank."""


HeldSlice = tuple[int, int, int]
"""`(start, stop, rank)`: tokens of a document that is known from the context, and the rank that holds them. Unpack it
by these names; it is a plain tuple because the search groups the slices of thousands of plans."""


def slices_by_document(slices: Sequence[Sequence[Slice]]) -> dict[int, list[HeldSlice]]:
    """The slices of each document in the order of its tokens, with the ranks that hold them."""
    held: dict[int, list[HeldSlice]] = defaultdict(list)
    for rank, rank_slices in enumerate(slices):
        for document, start, stop in rank_slices:
            held[document].append((start, stop, rank))
    for of_document in held.values():
        of_document.sort()
    return held


def attention_pairs(start: int, stop: int, window: int | None = None) -> int:
    """Query-key pairs of tokens [start, stop) under a causal mask inside the document (FlashCP eq. 3: W_i), of at most
    `window` keys per query."""
    if window is not None and stop > window:
        inside = max(start, window)
        return (stop - inside) * window + (attention_pairs(start, inside) if start < inside else 0)
    return (stop - start) * (stop + start + 1) // 2


def rank_tokens(slices: Sequence[Sequence[Slice]]) -> list[int]:
    return [sum(stop - start for _, start, stop in held) for held in slices]


def rank_pairs(slices: Sequence[Sequence[Slice]], window: int | None = None) -> list[int]:
    """Attention pairs of each rank, causal inside documents (FlashCP eq. 3), of at most `window` keys per query."""
    if window is None:
        # Written out: the search measures thousands of slices with it.
        return [sum((stop - start) * (stop + start + 1) // 2 for _, start, stop in held) for held in slices]
    return [sum(attention_pairs(start, stop, window) for _, start, stop in held) for held in slices]
