"""Predictions of a batch as transformers' Trainer collects them: a row for each document or row, from all ranks."""

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
    """Predictions of a sharded batch, as a padded batch with a row per document on one device would give them, from
    outputs (1, T_r, ...) of this rank's tokens and labels of the whole batch, not shifted, (1, C) or rows of it.

    Every rank of the plan's group calls. Documents are put together one by one, so that of the full logits only one
    document's are there at a time where `preprocess` makes them smaller. Those from `kept_tokens` on are left out.

    Returns predictions (documents, longest, ...), or what `preprocess` makes of them, and labels (documents, longest),
    on every rank of the group; -100 behind the end of a document.
    """
    lengths, cp_size = plan.plan.lengths, plan.plan.cp_size
    places = [torch.from_numpy(token_index(plan.plan, rank)) for rank in range(cp_size)]
    kept = sum(1 for stop in accumulate(lengths) if stop <= kept_tokens)
    predictions, targets = [], []
    # At least one, for the shape of what `preprocess` makes of it.
    for start, stop in pairwise(accumulate(lengths[: max(kept, 1)], initial=0)):
        document = recursively_apply(_document, outputs, plan, places, start, stop)
        document_labels = recursively_apply(_tokens, labels, start, stop)
        predictions.append(document if preprocess is None else preprocess(document, document_labels))
        targets.append(document_labels)
    return _rows_if(kept, stacked(predictions), stacked(targets))


def documents_of(inputs: Mapping[str, Any], plan: RankPlan, kept_tokens: int) -> dict[str, torch.Tensor]:
    """The tensors of a full batch that have a value per token, with a row per document."""
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
    """Predictions of a batch that was not sharded, as transformers' Trainer gives them, of the first `kept` rows."""
    if kept < rows:  # one at least, for the shape of what `preprocess` makes of it
        outputs, labels = (first_rows(tree, max(kept, 1), rows) for tree in (outputs, labels))
    if preprocess is not None:
        outputs = preprocess(outputs, labels)
    return _rows_if(kept, stacked([outputs]), labels)


def first_rows(tree: Tree, count: int, rows: int) -> Tree:
    """The first `count` rows of tensors that have `rows` of them."""
    return recursively_apply(lambda tensor: tensor[:count] if tensor.dim() and len(tensor) == rows else tensor, tree)


def per_token_outputs(outputs: Any, ignore_keys: Sequence[str], tokens: int | None) -> Tree:
    """What transformers' Trainer takes for predictions: the model's outputs but for the loss and `ignore_keys`. Those
    of a packed batch, of which the rank has `tokens`, must have a value for each."""
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
    raise ConfigurationError(
        f"The model's outputs {', '.join(keys)} belong to a packed batch, but predictions are those of its documents. "
        f"Leave them out: ignore_keys={list(keys)} of evaluate and predict, ignore_keys_for_eval of train."
    )


def _is_per_token(tree: Tree, tokens: int) -> bool:
    if isinstance(tree, Mapping):
        tree = tuple(tree.values())
    if isinstance(tree, (list, tuple)):
        return all(_is_per_token(each, tokens) for each in tree)
    return isinstance(tree, torch.Tensor) and tree.shape[:2] == (1, tokens)


def stacked(trees: Sequence[Tree]) -> Tree:
    """Trees of the same structure as one: tensors one below the other, filled up with -100 to the longest second
    dimension, numbers as a row each (transformers' `nested_concat`)."""
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
    return torch.cat([filled_up(each, len(each), width) for each in rows])


def filled_up(rows: torch.Tensor, count: int, width: int) -> torch.Tensor:
    """(count, width, ...): `rows`, and -100 beside and below them."""
    shape = (count, width, *rows.shape[2:]) if rows.dim() > 1 else (count,)
    if rows.shape == shape:
        return rows.contiguous()
    larger = rows.new_full(shape, IGNORE_INDEX)
    larger[tuple(map(slice, rows.shape))] = rows
    return larger


def _tokens(labels: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return labels.flatten(0, 1)[start:stop][None]


def _rows_if(kept: int, *trees: Tree) -> tuple[Tree, Tree]:
    """Both trees, without rows if none is kept."""
    return trees if kept else recursively_apply(lambda rows: rows[:0], trees)


def _document(values: torch.Tensor, plan: RankPlan, places: list[torch.Tensor], start: int, stop: int) -> torch.Tensor:
    """(1, stop - start, ...): the values of one document, from the (1, T_r, ...) of all ranks' tokens."""
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
    key = next(key for key in ("labels", "input_ids", "inputs_embeds") if inputs.get(key) is not None)
    return inputs[key].shape[:2]


def losses_by_document(
    logits: torch.Tensor, shift_labels: torch.Tensor, plan: RankPlan, kept_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss and number of targets of each document of a sharded batch, from logits (1, T_r, V) and shift_labels
    (1, T_r) of this rank's tokens; without documents from `kept_tokens` on. Every rank of the plan's group calls, and
    gets two tensors (documents, 1), float64 and int64."""
    stops = torch.tensor(plan.plan.lengths).cumsum(0)
    documents = torch.searchsorted(stops, torch.from_numpy(token_index(plan.plan, plan.rank)), right=True)
    sums = torch.zeros(2, len(stops), dtype=torch.float64, device=logits.device)
    sums.index_add_(1, documents.to(logits.device), _losses_and_targets(logits[0], shift_labels[0]))
    if plan.group is not None:
        dist.all_reduce(sums, group=plan.group)
    kept = int((stops <= kept_tokens).sum())
    return sums[0, :kept, None], sums[1, :kept, None].long()


def losses_by_row(logits: torch.Tensor, labels: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[`losses_by_document`] of a batch that was not sharded: (B, T, V) logits and (B, T) labels, not shifted."""
    sums = _losses_and_targets(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    sums = sums.view(2, len(labels), -1).sum(-1)
    return sums[0, :kept, None], sums[1, :kept, None].long()


def _losses_and_targets(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(2, tokens), float64: of each token its loss, and 1 if it has a target."""
    losses = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="none")
    return torch.stack((losses.double(), (targets != IGNORE_INDEX).double()))
