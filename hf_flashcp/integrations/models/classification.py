"""Models with a classification head: their backbone is sharded, and the scores of their head are gathered.

    input_ids (B, T) -> backbone, sharded: (1, T_r, H) -> head: (1, T_r, labels) -> gathered: (B, T, labels)

The model's forward goes on with the scores of whole rows, so transformers' own code chooses the token to read and
computes the loss. Only scores are gathered, never hidden states.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError


if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from ..handle import ContextParallelHandle

_CLASSIFIER = re.compile("For(Sequence|Token)Classification$")


def is_classifier(model: torch.nn.Module) -> bool:
    """Return whether a transformers model has a head that scores sequences or tokens."""
    return _CLASSIFIER.search(type(model).__name__) is not None


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a model whose forwards are sharded: a classifier's backbone, and all of other models."""
    if not is_classifier(model):
        return model
    backbone = model.base_model
    if backbone is model or not isinstance(backbone, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no backbone of its own to shard. Train it without flashcp."
        )
    return backbone


def gather_scores(model: PreTrainedModel, handle: ContextParallelHandle) -> list[RemovableHandle]:
    """Make the heads of a classifier return scores of whole rows, and return the hooks that do this.

    Args:
        model: the classifier.
        handle: handle of its backbone, which reads whole rows.
    """
    gathered = _GatheredScores(model, handle)
    backbone = backbone_of(model)
    heads = [child for child in model.children() if child is not backbone and any(True for _ in child.parameters())]
    return [head.register_forward_hook(gathered.after_head) for head in heads] + [
        model.register_forward_hook(gathered.after_forward)
    ]


class _GatheredScores:
    def __init__(self, model: PreTrainedModel, handle: ContextParallelHandle):
        self._model, self._handle = model, handle
        self._found = False

    def after_head(self, head: torch.nn.Module, args: tuple, scores: Any) -> torch.Tensor | None:
        rows, plan = self._handle.rows, self._handle.plan
        if rows.current is None or plan is None:
            return None
        local = (1, plan.layout.num_tokens)
        if args[0].shape[:2] != local:
            return None
        if not isinstance(scores, torch.Tensor) or scores.shape[:2] != local:
            _refuse(self._model)
        self._found = True
        return rows.rows_of(scores, plan)

    def after_forward(self, model: torch.nn.Module, args: tuple, output: Any) -> None:
        rows, found = self._handle.rows, self._found
        sharded, rows.current, self._found = rows.current is not None, None, False
        if sharded and not found:
            _refuse(model)


def _refuse(model: torch.nn.Module) -> NoReturn:
    raise UnsupportedModelError(
        f"{type(model).__name__} has no head that scores each token by itself, so its scores cannot be gathered. "
        "Train it with cp_size 1."
    )
