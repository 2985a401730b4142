"""What one feature of a dataset holds: its documents, checked, with the labels that its masks leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from ..errors import BatchError
from ..layout.batch import IGNORE_INDEX


LOSS_MASKS = ("completion_mask", "assistant_masks")

TOKEN_COLUMNS = ("input_ids", "labels", "position_ids", "attention_mask", *LOSS_MASKS)
"""With one value for each token."""


def read_documents(index: int, feature: Mapping[str, Any], per_token_keys: Sequence[str]) -> list[dict[str, list]]:
    """The documents of feature `index` of a batch: `input_ids`, `labels`, `position_ids` if it has any, and
    `per_token_keys`."""
    if feature.get("input_ids") is None or len(feature["input_ids"]) == 0:
        raise BatchError(
            f"Feature {index} has no tokens in input_ids, only {', '.join(sorted(feature)) or 'nothing'}. Drop empty "
            "documents, or check which columns the trainer keeps (remove_unused_columns)."
        )
    if missing := [key for key in per_token_keys if feature.get(key) is None]:
        raise BatchError(
            f"Feature {index} has no {', '.join(missing)}, which per_token_keys asks for: its columns are "
            f"{', '.join(sorted(feature))}. Give every row one, and keep the column (remove_unused_columns)."
        )
    wanted = (*TOKEN_COLUMNS, *per_token_keys)
    row = {key: _as_list(feature[key]) for key in wanted if feature.get(key) is not None}
    length = len(row["input_ids"])
    for key, values in row.items():
        if len(values) != length:
            raise BatchError(
                f"Feature {index} has {length} input_ids but {len(values)} {key}: they go token by token, and labels "
                "are shifted later."
            )
    _require_no_padding(index, row.pop("attention_mask", None))
    row["labels"] = _labels(row.pop("labels", row["input_ids"]), [row.pop(key, None) for key in LOSS_MASKS])
    bounds = pairwise(accumulate(_lengths(index, feature, row), initial=0))
    return [{key: values[start:stop] for key, values in row.items()} for start, stop in bounds]


def _require_no_padding(index: int, mask: list[int] | None) -> None:
    if mask is None or mask.count(1) == len(mask):
        return
    if max(mask) > 1:
        raise BatchError(
            f"Feature {index} has an attention_mask with numbers up to {max(mask)}. If it counts documents, "
            "give their lengths as seq_lengths instead."
        )
    raise BatchError(
        f"Feature {index} has an attention_mask that masks {mask.count(0)} of {len(mask)} tokens, but nothing is "
        "padded or masked here. Tokenize without padding."
    )


def _labels(labels: list[int], masks: list[list[int] | None]) -> list[int]:
    for mask in masks:
        if mask is not None:
            labels = [label if kept else IGNORE_INDEX for label, kept in zip(labels, mask)]
    return labels


def _lengths(index: int, feature: Mapping[str, Any], row: Mapping[str, list]) -> list[int]:
    length = len(row["input_ids"])
    if feature.get("seq_lengths") is not None:
        lengths = _as_list(feature["seq_lengths"])
        if sum(lengths) != length or min(lengths) < 1:
            raise BatchError(
                f"Feature {index} has seq_lengths {lengths}, which add up to {sum(lengths)}, for {length} tokens. "
                "They must be the lengths of the documents in the row, none of them zero."
            )
        return lengths
    if "position_ids" in row:
        positions = row["position_ids"]
        starts = [t for t in range(length) if t == 0 or positions[t] != positions[t - 1] + 1]
        return [stop - start for start, stop in pairwise([*starts, length])]
    return [length]


def _as_list(values: Any) -> list:
    return values.tolist() if hasattr(values, "tolist") else list(values)
