"""Document boundaries in a row, and labels that are shifted by one token without crossing a boundary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..errors import BatchError
from ..layout.upload import upload


IGNORE_INDEX = -100
"""The label of tokens that are not targets, the default `ignore_index` of `torch.nn.functional.cross_entropy`."""


def begins_document(position_ids: torch.Tensor) -> torch.Tensor:
    """Return a mask (..., T) of the tokens of a packed row at which documents begin.

    A document begins wherever `position_ids` (..., T) do not increase by one.
    """
    begins = torch.ones(position_ids.shape, dtype=torch.bool, device=position_ids.device)
    begins[..., 1:] = position_ids.diff(dim=-1) != 1
    return begins


def shift(labels: torch.Tensor) -> torch.Tensor:
    """Return the targets of tokens (..., T): `labels[t + 1]` at token t, and `IGNORE_INDEX` at the last token."""
    return F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]


def require_targets_inside(labels: torch.Tensor, lengths: Sequence[int]) -> None:
    """Raise a `BatchError` if [`shift`] would make the first token of a document a target of the one before it.

    The labels (B, T) are those of rows that hold whole documents one after another. Waits for their device.
    """
    starts = _starts(lengths, labels.device)
    starts = starts[starts % labels.shape[1] != 0]
    crossing = (labels.flatten()[starts] != IGNORE_INDEX).nonzero().flatten()
    if len(crossing):
        raise BatchError(
            f"labels at token {int(starts[crossing[0]])}, the start of a document, are not {IGNORE_INDEX}: the "
            "previous document would be trained to predict this token. Collate with FlashCPCollator, or set the "
            f"labels of document starts to {IGNORE_INDEX}."
        )


def without_starts(labels: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Return labels (1, C) that can be shifted as one row, because no document's first token is a target."""
    return labels.index_fill(1, _starts(lengths, labels.device), IGNORE_INDEX)


def _starts(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return upload(torch.tensor((0, *lengths[:-1])).cumsum(0), device)
