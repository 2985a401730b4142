"""`FlashCPCollator`: documents to one packed row and the plan that shards it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DataCollatorWithFlattening

from ..errors import BatchError, PlanError
from ..layout.batch import content_digest
from ..planning import DEFAULT_STRATEGY, STRATEGIES, CostModel, plan_documents


class FlashCPCollator(DataCollatorWithFlattening):
    """Flattens documents as `DataCollatorWithFlattening` does, and plans how ranks share them.

    The batch is the full row, the same on every rank, and the plan is for all of them: cutting happens later
    ([`attach`]), so that trainers count tokens and targets of the whole batch. Stateless and deterministic; needs
    cp_size but not the rank, so that loader workers of every rank do the same.

    Args:
        cp_size (`int`): context-parallel ranks that share a batch.
        strategy (`str`, *optional*): see [`plan_documents`], like the next three.
        cost_model (`CostModel`, *optional*): with the strategy "search", plan for the least predicted step time.
        max_imbalance (`float`, *optional*, defaults to 1.05): of attention pairs.
        max_token_imbalance (`float`, *optional*, defaults to 1.0): of tokens.
        num_stages (`int`, *optional*): see [`plan_documents`].
        kwargs: options of `DataCollatorWithFlattening` (`return_position_ids`, `separator_id`,
            `return_flash_attn_kwargs`, `return_seq_idx`, ...).

    Features hold `input_ids` and optionally `labels`, as lists or tensors: one document each, or a packed row with
    `seq_lengths` that add up to it (as TRL's packing leaves them).

    The batch has `input_ids`, `labels` and `position_ids` (1, C), `shift_labels` (1, C) (the target of each token:
    `labels` shifted before anything is cut) and `flashcp_plan`.

    Raises:
        BatchError: no documents, an empty one, labels or `seq_lengths` that do not fit the tokens.
        PlanError: fewer tokens than ranks, an unknown strategy.
    """

    def __init__(
        self,
        cp_size: int,
        *,
        strategy: str = DEFAULT_STRATEGY,
        cost_model: CostModel | None = None,
        max_imbalance: float = 1.05,
        max_token_imbalance: float = 1.0,
        num_stages: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if strategy not in STRATEGIES:
            raise PlanError(f"Unknown strategy {strategy!r}: choose one of {', '.join(map(repr, STRATEGIES))}.")
        if not isinstance(cp_size, int) or cp_size < 1:
            raise PlanError(f"cp_size must be a positive integer, got {cp_size!r}.")
        self.cp_size = cp_size
        self.strategy = strategy
        self.cost_model = cost_model
        self.max_imbalance = max_imbalance
        self.max_token_imbalance = max_token_imbalance
        self.num_stages = num_stages

    def __call__(
        self, features: Sequence[Mapping[str, Any]], return_tensors: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        if (return_tensors or self.return_tensors) != "pt":
            raise BatchError('FlashCPCollator makes torch tensors: leave return_tensors at "pt".')
        documents = [document for index, feature in enumerate(features) for document in _documents(index, feature)]
        if not documents:
            raise BatchError("The batch is empty: the collator got no documents.")
        plan = plan_documents(
            [len(document["input_ids"]) for document in documents],
            self.cp_size,
            strategy=self.strategy,
            cost_model=self.cost_model,
            max_imbalance=self.max_imbalance,
            max_token_imbalance=self.max_token_imbalance,
            num_stages=self.num_stages,
        )
        batch = super().__call__(documents, return_tensors="pt", **kwargs)
        batch["shift_labels"] = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        plan.content_digest = content_digest(batch)
        plan.row_lengths = tuple(len(feature["input_ids"]) for feature in features)
        batch["flashcp_plan"] = plan
        return batch


def _documents(index: int, feature: Mapping[str, Any]) -> list[dict[str, list[int]]]:
    """The documents of one feature, checked."""
    row = {key: _as_list(feature[key]) for key in ("input_ids", "labels") if feature.get(key) is not None}
    if not row.get("input_ids"):
        raise BatchError(
            f"Feature {index} has no tokens in input_ids. Drop empty documents, or check which columns the trainer "
            "keeps (remove_unused_columns)."
        )
    length = len(row["input_ids"])
    if len(row.get("labels", row["input_ids"])) != length:
        raise BatchError(
            f"Feature {index} has {length} input_ids but {len(row['labels'])} labels: they go token by token, and are "
            "shifted later."
        )
    lengths = feature.get("seq_lengths")
    if lengths is None:
        return [row]
    lengths = _as_list(lengths)
    if sum(lengths) != length or min(lengths) < 1:
        raise BatchError(
            f"Feature {index} has seq_lengths {lengths}, which add up to {sum(lengths)}, for {length} tokens. They "
            "must be the lengths of the documents in the row, none of them zero."
        )
    documents, start = [], 0
    for stop in torch.tensor(lengths).cumsum(0).tolist():
        documents.append({key: values[start:stop] for key, values in row.items()})
        start = stop
    return documents


def _as_list(values: Any) -> list[int]:
    return values.tolist() if hasattr(values, "tolist") else list(values)
