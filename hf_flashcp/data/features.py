"""Reads and checks the documents of one feature of a dataset, and applies its masks to the labels."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from ..errors import BatchError
from .boundaries import IGNORE_INDEX, begins_document


LOSS_MASKS = ("completion_mask", "assistant_masks")

TOKEN_COLUMNS = ("input_ids", "labels", "position_ids", "attention_mask", *LOSS_MASKS)
"""Columns with one whole number per token."""

_WHOLE = (*TOKEN_COLUMNS, "seq_lengths")


def read_documents(index: int, feature: Mapping[str, Any], per_token_keys: Sequence[str]) -> list[dict[str, list]]:
    """Return the documents of feature `index`, after checking them.

    Each has `input_ids`, `labels`, the columns in `per_token_keys`, and `position_ids` if the feature has them.
    """
    if not isinstance(feature, Mapping):
        raise BatchError(
            f"Feature {index} is of type {type(feature).__name__}, not a mapping of columns: pass a list of rows."
        )
    columns = ", ".join(sorted(map(str, feature)))
    wanted = (*TOKEN_COLUMNS, *per_token_keys)
    row = {key: _numbers(index, key, feature[key]) for key in wanted if feature.get(key) is not None}
    if not row.get("input_ids"):
        raise BatchError(
            f"Feature {index} has no tokens in input_ids; its columns are {columns or 'none'}. Drop empty documents, "
            "or check which columns the trainer keeps (remove_unused_columns)."
        )
    if missing := [key for key in per_token_keys if key not in row]:
        raise BatchError(
            f"Feature {index} has no {', '.join(missing)}, which per_token_keys asks for: its columns are {columns}. "
            "Every row needs this column, and the trainer must keep it (remove_unused_columns)."
        )
    length = len(row["input_ids"])
    for key, values in row.items():
        if len(values) != length:
            raise BatchError(
                f"Feature {index} has {length} input_ids but {len(values)} {key}: give one value per token. Do not "
                "shift labels, because they are shifted later."
            )
    _require_no_padding(index, row.get("attention_mask"))
    labels = row.get("labels", row["input_ids"])
    for mask in filter(None, map(row.get, LOSS_MASKS)):
        labels = [label if kept else IGNORE_INDEX for label, kept in zip(labels, mask)]
    row["labels"] = labels
    bounds = [*pairwise(accumulate(_lengths(index, feature, row), initial=0))]
    kept = ("input_ids", "labels", "position_ids", *per_token_keys)
    return [{key: row[key][start:stop] for key in kept if key in row} for start, stop in bounds]


def joined(documents: Sequence[Mapping[str, list]], key: str) -> list:
    """Return a column of all documents, concatenated. Missing position_ids count from the start of the document."""
    return [value for each in documents for value in each.get(key, range(len(each["input_ids"])))]


def _require_no_padding(index: int, mask: list[int] | None) -> None:
    if mask is None or mask.count(1) == len(mask):
        return
    if max(mask) > 1:
        raise BatchError(
            f"Feature {index} has an attention_mask with numbers up to {max(mask)}. If they number the documents of a "
            "packed row, give the documents' lengths as seq_lengths instead."
        )
    raise BatchError(
        f"Feature {index} has an attention_mask that masks {mask.count(0)} of {len(mask)} tokens, but packed "
        "documents have no padding. Tokenize without padding."
    )


def _lengths(index: int, feature: Mapping[str, Any], row: Mapping[str, list]) -> list[int]:
    length = len(row["input_ids"])
    if feature.get("seq_lengths") is not None:
        lengths = _numbers(index, "seq_lengths", feature["seq_lengths"])
        if sum(lengths) != length or min(lengths) < 1:
            raise BatchError(
                f"Feature {index} has seq_lengths {lengths}, which add up to {sum(lengths)}, and {length} tokens. "
                "They must be the lengths of the documents in the row, each at least 1."
            )
        return lengths
    if "position_ids" in row:
        starts = begins_document(torch.tensor(row["position_ids"])).nonzero().flatten().tolist()
        return [stop - start for start, stop in pairwise([*starts, length])]
    return [length]


def _numbers(index: int, key: str, values: Any) -> list:
    """Return a column's values, which must be whole numbers except in columns of `per_token_keys`."""
    try:
        found = np.asarray(values.tolist() if hasattr(values, "tolist") else values)
    except (TypeError, ValueError, RuntimeError):  # ragged rows, or a tensor without data
        found = np.array(None)
    if found.ndim == 1 and found.dtype.kind in "biuf" and not (found.dtype == np.uint64 and (found >= 2**63).any()):
        if key not in _WHOLE or found.dtype == np.int64:
            return values if isinstance(values, list) and found.dtype == np.int64 else found.tolist()
        with np.errstate(invalid="ignore"):
            whole = found.astype(np.int64)
        if (whole == found).all():
            return whole.tolist()
    raise BatchError(
        f"Feature {index} has {key} = {reprlib.repr(values)}, of type {type(values).__name__}: give a list or array "
        f"with a {'whole ' if key in _WHOLE else ''}number of at most 64 bits for each token."
    )
