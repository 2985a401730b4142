"""`FlashCPCollator`: collates documents into one packed row, with the plan that shards it."""

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
"""Largest `pad_to_multiple_of`: longer padding could exhaust memory before an error is raised."""


class FlashCPCollator(DataCollatorWithFlattening):
    """Data collator that packs documents into one row, and plans how the ranks share that row.

    It flattens documents as `DataCollatorWithFlattening` does. Every rank gets the same full row, with the plan for
    all ranks. The row is sharded later (see [`attach`]), so that trainers count the tokens and targets of the whole
    batch. The collator is stateless, deterministic and independent of the rank, so that the loader workers of all
    ranks return the same batch.

    The settings of plans belong to the [`FlashCPPlugin`]:

        args = TrainingArguments(..., parallelism_config=FlashCPPlugin(cp_size=8, strategy="flashcp"))
        collator = FlashCPCollator()

    Args:
        cp_size (`int`, *optional*): number of context-parallel ranks that share a batch. Usually left out, because it
            is taken, with all other settings, from the plugin created before, or from the environment of
            `accelerate launch`. If it is given and there is no plugin of that size, the other settings have their
            defaults.
        settings (`PlanSettings`, *optional*): settings to use instead, without a plugin.
        pad_to_multiple_of (`int`, *optional*): pads the row to a multiple of this length. The padding is a separate
            document without targets, to which no other document attends.
        pad_token_id (`int`, *optional*, defaults to 0): `input_ids` of the padding.
        per_token_keys (`Sequence[str]`, *optional*): further columns with one number per token, which are sharded with
            the tokens and passed to the model. They are 0 in padding.
        kwargs: options of `DataCollatorWithFlattening` (`return_position_ids`, `separator_id`,
            `return_flash_attn_kwargs`, `return_seq_idx`, ...).

    A feature is a document or an already packed row. The documents of a packed row are given by `seq_lengths` (as in
    TRL's packing), or else start where `position_ids` do not increase by one. All columns are lists, arrays or tensors
    with one value per token:

    - `input_ids`;
    - `position_ids`, passed to the model unchanged. Together with `seq_lengths` they may skip numbers inside a
      document;
    - `labels`, not shifted; defaults to `input_ids`;
    - `completion_mask`, `assistant_masks`: a token is not a target if one of them is 0;
    - `attention_mask`: must be all ones, because documents are not padded;
    - the columns in `per_token_keys`.

    The batch holds `input_ids`, `labels`, `position_ids` and `shift_labels` of shape (1, C) in int64, the columns in
    `per_token_keys` of shape (1, C), and a [`ShardPlan`] as `flashcp_plan`. `shift_labels` are the targets of the
    tokens, shifted before the row is sharded.

    Raises:
        BatchError: there are no documents, a document is empty, or its columns do not match its tokens or mask some.
        PlanError: the batch has fewer tokens than ranks.
        ConfigurationError: `cp_size` is neither given nor known from a plugin or a launcher.
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
                f"FlashCPCollator got {', '.join(sorted(misplaced))}: FlashCPPlugin has this setting, and the "
                "collator takes it from there. Without a plugin, pass settings=PlanSettings(...)."
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
            raise BatchError(f"per_token_keys has {', '.join(taken)}: every batch has them, so leave them out.")
        self.pad_to_multiple_of = pad_to_multiple_of
        self.pad_token_id = pad_token_id
        self.per_token_keys = tuple(per_token_keys)

    def __call__(
        self, features: Sequence[Mapping[str, Any]], return_tensors: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        if get_worker_info() is not None:
            end_with_parent()  # in a custom training loop, nothing else ends the worker with its parent
        if (return_tensors or self.return_tensors) != "pt":
            raise BatchError('FlashCPCollator only returns torch tensors: leave return_tensors at "pt".')
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
        """Use the settings of a trainer from now on.

        Raises:
            ConfigurationError: the collator was created with different settings.
        """
        found = {"state_tokens", *settings.automatic}  # with the attached model
        if "hardware" in found:
            found.add("cost_model")
        chosen = [field.name for field in dataclasses.fields(PlanSettings) if field.name not in found]
        names = chosen if self._has_own_settings else ["cp_size"]
        own, others = ({name: getattr(each, name) for name in names} for each in (self.settings, settings))
        if differing := [name for name in names if own[name] != others[name]]:
            mine, theirs = (", ".join(f"{name} {each[name]!r}" for name in differing) for each in (own, others))
            raise ConfigurationError(
                f"The collator plans with {mine}, but FlashCPPlugin with {theirs}. Create it as FlashCPCollator(), "
                "without cp_size and settings, so that it uses those of the plugin."
            )
        self.settings = settings
