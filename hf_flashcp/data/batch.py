"""`shard_inputs`: reduces a full packed batch to one rank's part of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from ..distributed import context_parallel_group
from ..errors import BatchError
from ..layout.rank_plan import RankPlan
from ..layout.upload import upload
from ..plan import ShardPlan
from ..planning import PlanSettings, plan_with
from ..planning.settings import current_settings
from .boundaries import IGNORE_INDEX, begins_document, require_targets_inside, shift


if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# These describe the full row. The plan replaces them.
_ROW_KEYS = ("attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def shard_inputs(
    batch: Mapping[str, Any], mesh: DeviceMesh | None, *, settings: PlanSettings | None = None
) -> dict[str, Any]:
    """Reduce a full batch to the tokens of this rank.

    Args:
        batch (`Mapping[str, Any]`): full batch, the same on every context-parallel rank. `input_ids` (or
            `inputs_embeds`) is a packed row (1, C), or B rows (B, T) without padding, which become documents of one
            row. Documents are taken from `flashcp_plan`, otherwise from `cu_seq_lens_q`, otherwise they start where
            `position_ids` do not increase by one. Without any of these, every row is one document. All tensors with
            these two leading dimensions are sharded, and so are `position_ids` of shape (3, B, T). Everything else is
            returned unchanged.
        mesh (`DeviceMesh`, *optional*): mesh that is 1-D or has a dimension "cp"; `None` for cp_size 1.
        settings (`PlanSettings`, *optional*): settings for batches without a plan. Defaults to those of the
            [`FlashCPPlugin`] created before, if its cp_size is the number of ranks in the mesh.

    The host waits for the batch's device unless the batch has a plan from [`FlashCPCollator`] or [`plan_batch`].

    Returns:
        `dict`: a new dict with tensors of shape (1, T_r, ...), and a [`RankPlan`] for this rank as `flashcp_plan`.
        `position_ids` are those of the batch, or else count from the start of each document. `shift_labels` are the
        targets of the tokens, shifted before the batch is sharded, so that no target is lost at the end of a shard.
        If there are labels and the caller gave no `num_items_in_batch`, it is set such that the mean of the ranks'
        losses is the mean over the batch's targets. A batch that is already sharded is returned unchanged.

    Raises:
        BatchError: the batch is empty, labels have another shape, a mask hides tokens, or labels cross documents.
        ConfigurationError: plan and mesh differ in cp_size.
        PlanError: a batch without a plan has fewer tokens than ranks.
    """
    batch = dict(batch)
    plan = batch.get("flashcp_plan")
    if isinstance(plan, RankPlan):
        return batch
    shape = _row_shape(batch)
    group, rank, cp_size = context_parallel_group(mesh)
    if plan is None:
        plan = plan_batch(batch, settings or current_settings(cp_size))
    elif plan.num_tokens != shape.numel():
        raise BatchError(
            f"flashcp_plan covers {plan.num_tokens} tokens, but the batch has {shape[0]} x {shape[1]}. "
            "Plan and batch must come from the same collator call."
        )
    else:
        if "attention_mask" not in plan.checked_keys:
            _check_mask(batch.get("attention_mask"))
        if "labels" not in plan.checked_keys:
            _check_labels(batch, plan.lengths)

    batch = {key: value for key, value in batch.items() if key not in _ROW_KEYS}
    tokens = token_tensor(batch)
    if batch.get("position_ids") is None:
        positions = torch.cat([torch.arange(length) for length in plan.lengths])
        batch["position_ids"] = upload(positions, tokens.device).view(shape)
    elif batch["position_ids"].shape == (1, shape[1]):
        batch["position_ids"] = batch["position_ids"].expand(shape)
    target_count = None
    if batch.get("labels") is not None:
        if batch.get("shift_labels") is None:
            batch["shift_labels"] = shift(batch["labels"])
        if batch.get("num_items_in_batch") is None:
            target_count = (batch["shift_labels"] != IGNORE_INDEX).sum().clamp(min=1).double() / cp_size
            batch["num_items_in_batch"] = target_count
    position_ids = batch["position_ids"]
    # Positions of any other shape are not sharded.
    full_row = position_ids.flatten(-2) if position_ids.shape[-2:] == shape else None
    bound = RankPlan(plan, rank, group, target_count, full_row)
    index = upload(bound.layout.token_index, tokens.device)
    sharded = {key: _shard(key, value, shape, index) for key, value in batch.items()}
    sharded["flashcp_plan"] = bound
    return sharded


def plan_batch(batch: Mapping[str, Any], settings: PlanSettings) -> ShardPlan:
    """Check a full batch as [`shard_inputs`] does, and return a plan for it.

    [`shard_inputs`] does this to batches without a plan. Before a batch moves to the device, no device has to be
    waited for: with the result as its `flashcp_plan`, the batch is sharded without reading any values.

    Raises the errors of [`shard_inputs`].
    """
    shape = _row_shape(batch)
    _check_mask(batch.get("attention_mask"))
    plan = plan_with(settings, _document_lengths(batch, shape))
    _check_labels(batch, plan.lengths)
    if plan.cp_size > 1:
        plan.content_digest = content_digest(batch)
    plan.checked_keys = frozenset(key for key in ("attention_mask", "labels") if batch.get(key) is not None)
    return plan


def content_digest(batch: Mapping[str, Any]) -> str:
    """Return a hash of a batch's tokens and labels, by which ranks check that they read the same data."""
    digest = hashlib.blake2b(digest_size=8)
    for key in ("input_ids", "labels"):
        if isinstance(batch.get(key), torch.Tensor):
            digest.update(batch[key].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def token_tensor(batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the tensor that holds a batch's tokens, `input_ids` or `inputs_embeds`."""
    for key in ("input_ids", "inputs_embeds"):
        if isinstance(batch.get(key), torch.Tensor):
            return batch[key]
    raise BatchError(f"The batch has neither input_ids nor inputs_embeds; its keys are {sorted(batch)}.")


def _row_shape(batch: Mapping[str, Any]) -> torch.Size:
    tokens = token_tensor(batch)
    shape = tokens.shape[:2]
    if tokens.dim() < 2 or shape.numel() == 0:
        raise BatchError(f"The batch has token shape {tuple(tokens.shape)}; expected (rows, tokens), neither empty.")
    for key in ("labels", "shift_labels"):
        labels = batch.get(key)
        if labels is not None and labels.shape != shape:
            raise BatchError(
                f"{key} have shape {tuple(labels.shape)}, but the tokens have {tuple(shape)}. Give one label per "
                "token."
            )
    return shape


def _check_mask(mask: Any) -> None:
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise BatchError(
            "Context parallelism attends causally inside each document and cannot honour a custom attention_mask "
            f"({f'shape {tuple(mask.shape)}' if isinstance(mask, torch.Tensor) else type(mask).__name__}). Remove it."
        )
    masked = int((mask == 0).sum())
    if masked:
        raise BatchError(
            f"attention_mask masks {masked} of {mask.numel()} tokens. A sharded batch has no padding: collate "
            "documents with FlashCPCollator or another padding-free collator. (TRL's 'wrapped' packing pads its last, "
            "shorter row in batches of several rows: pack with 'bfd', or use one row per batch.)"
        )


def _check_labels(batch: Mapping[str, Any], lengths: Sequence[int]) -> None:
    if batch.get("labels") is not None and batch.get("shift_labels") is None:
        require_targets_inside(batch["labels"], lengths)


def _document_lengths(batch: Mapping[str, Any], shape: torch.Size) -> list[int]:
    cu_seqlens = batch.get("cu_seq_lens_q")
    if cu_seqlens is not None:
        bounds = cu_seqlens.flatten().tolist()
        if not bounds:
            raise BatchError("cu_seq_lens_q is empty: it must hold the start of each document and the end of the row.")
        if bounds[0] != 0 or bounds[-1] != shape.numel():
            raise BatchError(
                f"cu_seq_lens_q runs from {bounds[0]} to {bounds[-1]}, but the batch has {shape.numel()} tokens: it "
                f"must run from 0 to {shape.numel()}."
            )
    elif (position_ids := batch.get("position_ids")) is None:
        bounds = range(0, shape.numel() + 1, shape[1])
    else:
        first = position_ids[0] if position_ids.dim() == 3 else position_ids
        bounds = [*begins_document(first).flatten().nonzero().flatten().tolist(), shape.numel()]
    return [stop - start for start, stop in pairwise(bounds)]


def _shard(key: str, value: Any, shape: torch.Size, index: torch.Tensor) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.dim() >= 2 and value.shape[:2] == shape:
        return value.flatten(0, 1).index_select(0, index).unsqueeze(0)
    if key == "position_ids" and value.dim() == 3 and value.shape[1:] == shape:
        return value.flatten(1).index_select(1, index).unsqueeze(1)
    return value
