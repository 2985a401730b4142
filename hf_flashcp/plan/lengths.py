"""What document lengths and cp_size have to be, checked once for everything that takes them."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterable
from typing import Any

from ..errors import PlanError


MOST_TOKENS = 2**31 - 1
"""Tokens of a batch at most: cumulative sequence lengths are int32 in attention kernels."""


def check_size(name: str, size: Any) -> int:
    """Returns `size` as a plain int, or raises a `PlanError` that names it, e.g. "cp_size"."""
    try:
        checked = operator.index(size)
    except TypeError:
        checked = 0
    if checked < 1:
        raise PlanError(f"{name} must be a positive integer, got {reprlib.repr(size)}.")
    return checked


def check_lengths(lengths: Iterable[int], cp_size: int) -> tuple[tuple[int, ...], int]:
    """Returns `(lengths, cp_size)` as plain ints, or raises a `PlanError` that names the offending entry."""
    cp_size = check_size("cp_size", cp_size)
    checked = []
    try:
        lengths = iter(lengths)
    except TypeError:
        raise PlanError(
            f"lengths must be a sequence of whole numbers of tokens, got {reprlib.repr(lengths)}."
        ) from None
    for document, length in enumerate(lengths):
        try:
            length = operator.index(length)
        except TypeError:
            raise PlanError(
                f"Document {document} has length {reprlib.repr(length)}: lengths are whole numbers of tokens."
            ) from None
        if length < 1:
            raise PlanError(
                f"Document {document} has {length} tokens. Every document needs at least one token: "
                "drop empty documents before packing."
            )
        checked.append(length)
    if not checked:
        raise PlanError("There are no documents to plan: the batch is empty.")
    if max(sum(checked), cp_size) > MOST_TOKENS:
        raise PlanError(
            f"A batch holds at most {MOST_TOKENS:,} tokens, which attention kernels count in 32 bits, and has at most "
            "as many ranks: check lengths and cp_size."
        )
    if sum(checked) < cp_size:
        raise PlanError(
            f"The batch holds {sum(checked)} tokens for cp_size {cp_size}: every rank needs at least one token. "
            "Pack more documents in a batch or lower cp_size."
        )
    return tuple(checked), cp_size
