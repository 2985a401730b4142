"""Document boundaries in a row, and labels that are shifted by one token without crossing a boundary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..errors import BatchError


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


def shift_inside_documents(labels: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Apply [`shift`] to labels (B, T) of rows that hold whole documents one after another.

    Raises a `BatchError` if the first token of a document would become a target of the document before it.
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
    return shift(labels)


def without_starts(labels: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Return labels (1, C) that can be shifted as one row, because no document's first token is a target."""
    return labels.index_fill(1, _starts(lengths, labels.device), IGNORE_INDEX)


def _starts(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor((0, *lengths[:-1])).cumsum(0).to(device)
