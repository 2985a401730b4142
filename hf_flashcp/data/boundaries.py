"""Where the documents of a row begin, and labels that are shifted by one without crossing a boundary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..errors import BatchError


IGNORE_INDEX = -100
"""The label of a token that is no target, as `torch.nn.functional.cross_entropy` has it."""


def begins_document(position_ids: torch.Tensor) -> torch.Tensor:
    """(..., T) bool: whether a document begins at a token of a packed row (..., T): positions do not go up by one."""
    begins = torch.ones(position_ids.shape, dtype=torch.bool, device=position_ids.device)
    begins[..., 1:] = position_ids.diff(dim=-1) != 1
    return begins


def shift(labels: torch.Tensor) -> torch.Tensor:
    """The targets of tokens (..., T): `labels[t + 1]` at t, and none at the end."""
    return F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]


def shift_inside_documents(labels: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """[`shift`] of rows (B, T) that hold documents one after the other; done before rows are cut, on whole documents.
    A `BatchError` says where a document's first token would become the target of the document before it."""
    starts = _starts(lengths, labels.device)
    starts = starts[starts % labels.shape[1] != 0]
    crossing = (labels.flatten()[starts] != IGNORE_INDEX).nonzero().flatten()
    if len(crossing):
        raise BatchError(
            f"labels at token {int(starts[crossing[0]])}, the start of a document, are not {IGNORE_INDEX}: the last "
            "token of the document before it would be trained to predict it. Collate with FlashCPCollator, or set the "
            f"labels of document starts to {IGNORE_INDEX}."
        )
    return shift(labels)


def without_starts(labels: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """(1, C) labels that may be shifted as one row: no document's first token is a target."""
    return labels.index_fill(1, _starts(lengths, labels.device), IGNORE_INDEX)


def _starts(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor((0, *lengths[:-1])).cumsum(0).to(device)
