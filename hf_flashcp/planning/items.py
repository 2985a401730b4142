"""`Item`: a slice that is still to be placed on a rank, with what it weighs there."""

from __future__ import annotations

from typing import NamedTuple

from ..plan.slices import Slice


class Item(NamedTuple):
    """A slice with its attention pairs and tokens, both looked up too often to be counted each time. Items sort by
    pairs."""

    pairs: int
    piece: Slice
    tokens: int


def item_of(document: int, start: int, stop: int) -> Item:
    """The item of tokens [start, stop) of a document."""
    tokens = stop - start
    return Item(tokens * (stop + start + 1) // 2, Slice(document, start, stop), tokens)
