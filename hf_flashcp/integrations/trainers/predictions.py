"""Predictions of a batch as transformers' Trainer collects them: one row per document or dataset row, on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.utils.operations import honor_type, recursively_apply

from ...data.boundaries import IGNORE_INDEX
from ...errors import ConfigurationError
from ...layout import RankPlan
from ...layout.rank_layout import token_index


Tree = Any
"""A tensor, or a list, tuple or dict of trees: what models and `preprocess_logits_for_metrics` return."""


def whole_documents(
    outputs: Tree, labels: Tree, plan: RankPlan, kept_tokens: int, preprocess: Callable[[Tree, Tree], Tree] | None
) -> tuple[Tree, Tree]:
    """Return the predictions and labels of a sharded batch, as for a padded batch with one row per document.

    Every rank of the plan's group must call it. Documents are assembled one at a time, so that if `preprocess` reduces
    logits, only one document's full logits exist at a time.

    Args:
        outputs: outputs (1, T_r, ...) for this rank's tokens.
        labels: labels of the whole batch, (1, C) or (B, T), not shifted.
        plan: plan of the batch, bound to this rank.
        kept_tokens: documents that end after this many tokens of the batch are left out.
        preprocess: function applied to the outputs and labels of each document, if given.

    Returns predictions (documents, longest, ...), after `preprocess`, and labels (documents, longest), on every rank
    of the group. Positions after the end of a document hold -100.
    """
    lengths, cp_size = plan.plan.lengths, plan.plan.cp_size
    places = [torch.from_numpy(token_index(plan.plan, rank)) for rank in range(cp_size)]
    kept = sum(1 for stop in accumulate(lengths) if stop <= kept_tokens)
    predictions, targets = [], []
    # At least one document, to get the shape that `preprocess` returns.
    for start, stop in pairwise(accumulate(lengths[: max(kept, 1)], initial=0)):
        document = recursively_apply(_document, outputs, plan, places, start, stop)
        document_labels = recursively_apply(_tokens, labels, start, stop)
        predictions.append(document if preprocess is None else preprocess(document, document_labels))
        targets.append(document_labels)
    return _rows_if(kept, stacked(predictions), stacked(targets))


def documents_of(inputs: Mapping[str, Any], plan: RankPlan, kept_tokens: int) -> dict[str, torch.Tensor]:
    """Return the tensors of a full batch that have one value per token, rearranged to one row per document."""
    shape = token_shape(inputs)
    per_token = {
        key: value for key, value in inputs.items() if isinstance(value, torch.Tensor) and value.shape[:2] == shape
    }
    kept = [stop for stop in accumulate(plan.plan.lengths) if stop <= kept_tokens]
    bounds = list(pairwise([0, *(kept or plan.plan.lengths[:1])]))
    split = {key: [value.flatten(0, 1)[a:b][None] for a, b in bounds] for key, value in per_token.items()}
    return {key: stacked(rows)[: len(kept)] for key, rows in split.items()}


def whole_rows(
    outputs: Tree, labels: Tree, kept: int, rows: int, preprocess: Callable[[Tree, Tree], Tree] | None
) -> tuple[Tree, Tree]:
    """Return the predictions and labels of the first `kept` rows of an unsharded batch, as Trainer collects them."""
    if kept < rows:  # at least one row, to get the shape that `preprocess` returns
        outputs, labels = (first_rows(tree, max(kept, 1), rows) for tree in (outputs, labels))
    if preprocess is not None:
        outputs = preprocess(outputs, labels)
    return _rows_if(kept, stacked([outputs]), labels)


def first_rows(tree: Tree, count: int, rows: int) -> Tree:
    """Return the first `count` rows of the tensors that have `rows` rows, and all other tensors unchanged."""
    return recursively_apply(lambda tensor: tensor[:count] if tensor.dim() and len(tensor) == rows else tensor, tree)


def per_token_outputs(outputs: Any, ignore_keys: Sequence[str], tokens: int | None) -> Tree:
    """Return the outputs that transformers' Trainer uses as predictions: all except the loss and `ignore_keys`.

    Raises a `ConfigurationError` if `tokens`, this rank's number of tokens of a packed batch, is given and an output
    does not have one value per token.
    """
    if isinstance(outputs, Mapping):
        found = {key: value for key, value in outputs.items() if key not in (*ignore_keys, "loss")}
    else:
        found = {f"output {index}": value for index, value in enumerate(outputs) if index}
    if tokens is not None:
        other = [key for key, value in found.items() if not _is_per_token(value, tokens)]
        if other:
            refuse_outputs(other)
    values = recursively_apply(torch.Tensor.detach, tuple(found.values()))
    return values[0] if len(values) == 1 else values


def refuse_outputs(keys: Sequence[str]) -> None:
    """Raise a `ConfigurationError` for outputs that do not have one value per token."""
    raise ConfigurationError(
        f"The model's outputs {', '.join(keys)} belong to a packed batch as a whole, but predictions are collected "
        f"per document. Leave them out: pass ignore_keys={list(keys)} to evaluate and predict, and as "
        "ignore_keys_for_eval to train."
    )


def _is_per_token(tree: Tree, tokens: int) -> bool:
    if isinstance(tree, Mapping):
        tree = tuple(tree.values())
    if isinstance(tree, (list, tuple)):
        return all(_is_per_token(each, tokens) for each in tree)
    return isinstance(tree, torch.Tensor) and tree.shape[:2] == (1, tokens)


def stacked(trees: Sequence[Tree]) -> Tree:
    """Concatenate trees of the same structure, as transformers' `nested_concat` does.

    Tensors are concatenated along the first dimension, and padded with -100 to the longest second dimension. Scalars
    become rows.
    """
    first = trees[0]
    if isinstance(first, Mapping):
        return type(first)({key: stacked([tree[key] for tree in trees]) for key in first})
    if isinstance(first, (list, tuple)):
        return honor_type(first, (stacked(parts) for parts in zip(*trees)))
    if not isinstance(first, torch.Tensor):
        raise ConfigurationError(
            f"preprocess_logits_for_metrics returned a {type(first).__name__}. Let it return tensors, or lists, "
            "tuples or dicts of them."
        )
    rows = [torch.atleast_1d(tree) for tree in trees]
    width = max(each.shape[1] for each in rows) if rows[0].dim() > 1 else 0
    return torch.cat([pad_rows(each, len(each), width) for each in rows])


def pad_rows(rows: torch.Tensor, count: int, width: int) -> torch.Tensor:
    """Return `rows`, padded with -100 to (count, width, ...)."""
    shape = (count, width, *rows.shape[2:]) if rows.dim() > 1 else (count,)
    if rows.shape == shape:
        return rows.contiguous()
    larger = rows.new_full(shape, IGNORE_INDEX)
    larger[tuple(map(slice, rows.shape))] = rows
    return larger


def _tokens(labels: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return labels.flatten(0, 1)[start:stop][None]


def _rows_if(kept: int, *trees: Tree) -> tuple[Tree, Tree]:
    """Return both trees, or empty ones of the same structure if no row is kept."""
    return trees if kept else recursively_apply(lambda rows: rows[:0], trees)


def _document(values: torch.Tensor, plan: RankPlan, places: list[torch.Tensor], start: int, stop: int) -> torch.Tensor:
    """Gather the values (1, stop - start, ...) of one document from the values (1, T_r, ...) of all ranks' tokens."""
    held = [((place >= start) & (place < stop)).nonzero().flatten().to(values.device) for place in places]
    mine = values.new_zeros(max(map(len, held)), *values.shape[2:])
    mine[: len(held[plan.rank])] = values[0, held[plan.rank]]
    parts = [mine]
    if plan.group is not None:
        parts = [torch.empty_like(mine) for _ in held]
        dist.all_gather(parts, mine, group=plan.group)
    document = values.new_empty(stop - start, *values.shape[2:])
    for part, place, rows in zip(parts, places, held):
        document[place.to(values.device)[rows] - start] = part[: len(rows)]
    return document[None]


def token_shape(inputs: Mapping[str, Any]) -> torch.Size:
    """Return the shape (rows, tokens) of a batch."""
    key = next(key for key in ("labels", "input_ids", "inputs_embeds") if inputs.get(key) is not None)
    return inputs[key].shape[:2]


def losses_by_document(
    losses: torch.Tensor, shift_labels: torch.Tensor, plan: RankPlan, kept_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss and the number of targets of each document in a sharded batch.

    Every rank of the plan's group must call it, with the losses (T_r,) and shift_labels (1, T_r) of its own tokens.
    Documents that end after `kept_tokens` tokens of the batch are left out.

    Returns two tensors of shape (documents, 1), float64 and int64.
    """
    stops = torch.tensor(plan.plan.lengths).cumsum(0)
    documents = torch.searchsorted(stops, torch.from_numpy(token_index(plan.plan, plan.rank)), right=True)
    sums = torch.zeros(2, len(stops), dtype=torch.float64, device=losses.device)
    sums.index_add_(1, documents.to(losses.device), _losses_and_targets(losses, shift_labels[0]))
    if plan.group is not None:
        dist.all_reduce(sums, group=plan.group)
    kept = int((stops <= kept_tokens).sum())
    return sums[0, :kept, None], sums[1, :kept, None].long()


def losses_by_row(logits: torch.Tensor, labels: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the results of [`losses_by_document`] for logits (B, T, V) and unshifted labels (B, T) of whole rows."""
    targets = labels[:, 1:].flatten()
    sums = _losses_and_targets(losses_of_logits(logits[:, :-1], targets), targets)
    sums = sums.view(2, len(labels), -1).sum(-1)
    return sums[0, :kept, None], sums[1, :kept, None].long()


def losses_of_logits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss of each token, 0 where it has no target, as one row."""
    return F.cross_entropy(
        logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )


def _losses_and_targets(losses: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return a float64 tensor (2, tokens): the loss of each token, and 1 if it has a target or 0 if not."""
    return torch.stack((losses.double(), (targets != IGNORE_INDEX).double()))
