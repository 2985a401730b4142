"""Labels of packed documents: which tokens have no target, and the shift by one that no boundary is crossed by."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..errors import BatchError
from ..plan import ShardPlan


IGNORE_INDEX = -100
"""The label of a token that is no target, as `torch.nn.functional.cross_entropy` has it."""


def shifted_labels(labels: torch.Tensor, plan: ShardPlan) -> torch.Tensor:
    """labels[t + 1] at t; the last token of a row has no target. Done before the cut, on whole documents."""
    starts = torch.tensor(plan.lengths[:-1], dtype=torch.long).cumsum(0)
    starts = starts[starts % labels.shape[1] != 0].to(labels.device)
    crossing = (labels.flatten()[starts] != IGNORE_INDEX).nonzero().flatten()
    if len(crossing):
        raise BatchError(
            f"labels at token {int(starts[crossing[0]])}, the start of a document, are not {IGNORE_INDEX}: the last "
            "token of the document before it would be trained to predict it. Collate with FlashCPCollator, or set the "
            f"labels of document starts to {IGNORE_INDEX}."
        )
    return F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
