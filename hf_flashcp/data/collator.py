"""`FlashCPCollator`: documents to one packed row and the plan that shards it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import get_worker_info
from transformers import DataCollatorWithFlattening

from ..distributed.parent_process import end_with_parent
from ..errors import BatchError, ConfigurationError
from ..planning import PlanSettings, plan_with
from ..planning.settings import current_settings
from .batch import content_digest
from .boundaries import IGNORE_INDEX, shift
from .features import joined, read_documents


MOST_PADDING = 2**24
"""The largest `pad_to_multiple_of`: longer padding would fill the memory before any error could be raised."""


class FlashCPCollator(DataCollatorWithFlattening):
    """Flattens documents as `DataCollatorWithFlattening` does, and plans how ranks share them.

    The batch is the full row, the same on every rank, and the plan is for all of them: cutting happens later
    ([`attach`]), so that trainers count tokens and targets of the whole batch. Stateless and deterministic, and knows
    nothing of its rank, so that loader workers of every rank do the same.

    How ranks share them is set in one place, the [`FlashCPPlugin`]:

        args = TrainingArguments(..., parallelism_config=FlashCPPlugin(cp_size=8, strategy="flashcp"))
        collator = FlashCPCollator()

    Args:
        cp_size (`int`, *optional*): context-parallel ranks that share a batch. Leave it out: it comes with everything
            else from the plugin made before, or from the environment of `accelerate launch`. Alone, without a plugin
            of that size, it means default settings.
        settings (`PlanSettings`, *optional*): in place of both, for use without a plugin.
        pad_to_multiple_of (`int`, *optional*): C is a multiple of it. The padding is a document of its own: no other
            attends to it, and it has no targets.
        pad_token_id (`int`, *optional*, defaults to 0): in `input_ids` of padding.
        per_token_keys (`Sequence[str]`, *optional*): further columns with a number for each token, which go to the
            model and are sharded with the tokens. They are 0 in padding.
        kwargs: options of `DataCollatorWithFlattening` (`return_position_ids`, `separator_id`,
            `return_flash_attn_kwargs`, `return_seq_idx`, ...).

    Features are documents, or packed rows with `seq_lengths` (as TRL's packing leaves them), or without them with
    `position_ids` that start again at each document. Values are lists, arrays or tensors, one for each token:

    - `input_ids`;
    - `position_ids`, which go to the model as they are; beside `seq_lengths` they may skip inside a document;
    - `labels` (defaults to `input_ids`), not shifted;
    - `completion_mask`, `assistant_masks`: tokens where one of them is 0 are no targets;
    - `attention_mask`: all ones, nothing is padded here;
    - whatever `per_token_keys` names.

    The batch has `input_ids`, `labels` and `position_ids` (1, C), `shift_labels` (1, C) (the target of each token:
    `labels` shifted before anything is cut), all int64, those of `per_token_keys` (1, C), and `flashcp_plan`, a
    [`ShardPlan`].

    Raises:
        BatchError: no documents, an empty one, values that do not fit the tokens, masked tokens.
        PlanError: fewer tokens than ranks.
        ConfigurationError: no cp_size, and neither a plugin nor a launcher that says it.
    """

    def __init__(
        self,
        cp_size: int | None = None,
        *,
        settings: PlanSettings | None = None,
        pad_to_multiple_of: int | None = None,
        pad_token_id: int = 0,
        per_token_keys: Sequence[str] = (),
        **kwargs: Any,
    ):
        if misplaced := {field.name for field in dataclasses.fields(PlanSettings)} & kwargs.keys():
            raise ConfigurationError(
                f"{', '.join(sorted(misplaced))}: FlashCPPlugin has this setting, and FlashCPCollator() takes it from "
                "there. Without a plugin pass settings=PlanSettings(...)."
            )
        super().__init__(**kwargs)
        if settings is not None and cp_size not in (None, settings.cp_size):
            raise ConfigurationError(
                f"cp_size is {cp_size}, but the settings have {settings.cp_size}: leave cp_size out."
            )
        self.settings = settings or current_settings(cp_size)
        self._has_own_settings = settings is not None
        if pad_to_multiple_of is not None and (
            not isinstance(pad_to_multiple_of, int) or not 1 <= pad_to_multiple_of <= MOST_PADDING
        ):
            raise BatchError(
                f"pad_to_multiple_of must be a positive integer, at most {MOST_PADDING:,}, got {pad_to_multiple_of!r}."
            )
        if not isinstance(pad_token_id, int) or not -(2**63) <= pad_token_id < 2**63:
            raise BatchError(f"pad_token_id must be a token of the vocabulary, got {pad_token_id!r}.")
        if isinstance(per_token_keys, str) or not {*map(type, per_token_keys)} <= {str}:
            raise BatchError(f"per_token_keys must be a list of names, got {per_token_keys!r}.")
        if taken := [key for key in per_token_keys if key in ("input_ids", "labels", "position_ids")]:
            raise BatchError(f"per_token_keys has {', '.join(taken)}: every batch has them, leave them out.")
        self.pad_to_multiple_of = pad_to_multiple_of
        self.pad_token_id = pad_token_id
        self.per_token_keys = tuple(per_token_keys)

    def __call__(
        self, features: Sequence[Mapping[str, Any]], return_tensors: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        if get_worker_info() is not None:
            end_with_parent()  # in a loop of the user's own nothing else makes the worker do so
        if (return_tensors or self.return_tensors) != "pt":
            raise BatchError('FlashCPCollator makes torch tensors: leave return_tensors at "pt".')
        documents = [
            document
            for index, feature in enumerate(features)
            for document in read_documents(index, feature, self.per_token_keys)
        ]
        if not documents:
            raise BatchError("The batch is empty: the collator got no documents.")
        row_lengths = tuple(len(feature["input_ids"]) for feature in features)
        padding = -sum(row_lengths) % (self.pad_to_multiple_of or 1)
        if padding:
            zeros = {key: [0] * padding for key in self.per_token_keys}
            ids, labels = [self.pad_token_id] * padding, [IGNORE_INDEX] * padding
            documents.append({"input_ids": ids, "labels": labels, **zeros})
        plan = plan_with(self.settings, [len(document["input_ids"]) for document in documents])
        batch = super().__call__(documents, return_tensors="pt", **kwargs)
        if padding:
            batch["labels"][:, -padding:] = IGNORE_INDEX
        batch["shift_labels"] = shift(batch["labels"])
        if any("position_ids" in document for document in documents) and self.return_position_ids:
            batch["position_ids"] = torch.tensor([joined(documents, "position_ids")])
        for key in self.per_token_keys:
            batch[key] = torch.tensor([joined(documents, key)])
        plan.content_digest = content_digest(batch)
        plan.row_lengths = row_lengths
        batch["flashcp_plan"] = plan
        return batch

    def share_settings(self, settings: PlanSettings) -> None:
        """Plans with the settings of a trainer from now on.

        Raises:
            ConfigurationError: the collator was made for others.
        """
        names = [field.name for field in dataclasses.fields(PlanSettings)] if self._has_own_settings else ["cp_size"]
        own, others = ({name: getattr(each, name) for name in names} for each in (self.settings, settings))
        if differing := [name for name in names if own[name] != others[name]]:
            mine, theirs = (", ".join(f"{name} {each[name]!r}" for name in differing) for each in (own, others))
            raise ConfigurationError(
                f"The collator plans with {mine}, but FlashCPPlugin with {theirs}. Make the collator by "
                "FlashCPCollator(), without cp_size and settings: it takes the plugin's."
            )
        self.settings = settings
