"""Validation of document lengths and sizes, shared by everything that takes them."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterable
from typing import Any

from ..errors import PlanError


MOST_TOKENS = 2**31 - 1
"""The most tokens in a batch: cumulative sequence lengths are int32 in attention kernels."""


def check_size(name: str, size: Any) -> int:
    """Return `size` as a plain int; raise a `PlanError` with its `name`, e.g. "cp_size", if it is not positive."""
    try:
        checked = operator.index(size)
    except TypeError:
        checked = 0
    if checked < 1:
        raise PlanError(f"{name} must be a positive integer, got {reprlib.repr(size)}.")
    return checked


def check_lengths(lengths: Iterable[int], cp_size: int) -> tuple[tuple[int, ...], int]:
    """Return `(lengths, cp_size)` as plain ints; raise a `PlanError` that names the first entry that is not valid."""
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
            f"A batch holds at most {MOST_TOKENS:,} tokens and at most that many ranks, because attention kernels "
            "count tokens in 32 bits. Check lengths and cp_size."
        )
    if sum(checked) < cp_size:
        raise PlanError(
            f"The batch holds {sum(checked)} tokens for cp_size {cp_size}: every rank needs at least one token. "
            "Pack more documents into a batch, or lower cp_size."
        )
    return tuple(checked), cp_size
