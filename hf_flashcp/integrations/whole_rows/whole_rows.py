"""`WholeRows`: what a forward over whole padded rows does before and after its sharded part.

    rows of a rank        documents of a plan              outputs of tokens         outputs of rows
    a a a . .             | a a a | b b b b | c c |        rank 0:  x x x x          x x x . .
    b b b b .     ->        rank 0      rank 1      ->     rank 1:  y y y y y  ->    x y y y .
    c c . . .                                                                        y y . . .

With `shared` batches, all ranks of a group have read the same rows, and each of them gets the outputs of these rows.
With `own` batches, each rank has rows of its own. They are pooled into one plan, and each rank gets the outputs of its
own rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ...data.batch import content_digest, token_tensor
from ...distributed import add_over_ranks
from ...errors import BatchError, UnsupportedModelError
from ...exchange import gather_tokens
from ...planning import PlanSettings, plan_with
from ..models.forward_arguments import has_cache
from .padded_rows import PaddedRows
from .pooled_rows import PooledRows, own_rows, pool_rows


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ...layout import RankPlan


class WholeRows:
    """Turns rows into a packed batch before a sharded forward, and its outputs into outputs of rows afterwards.

    Args:
        group (`ProcessGroup`, *optional*): group in which the ranks exchange KV. `None` for cp_size 1, where rows stay
            as they are.
        settings (`PlanSettings`): how rows are planned.
        batches (`str`): "shared", "own" or "turns", see [`FlashCPPlugin`].
        of_backbone (`bool`, *optional*, defaults to `False`): whether the forward is that of a backbone, all of whose
            forwards without a cache are sharded. Otherwise it is that of a causal language model with TRL's fused
            output head, of which only forwards that use this head with labels are sharded.
    """

    def __init__(self, group: ProcessGroup | None, settings: PlanSettings, batches: str, *, of_backbone: bool = False):
        self.group, self.batches, self._of_backbone = group, batches, of_backbone
        self._settings = settings
        self.current: tuple[PaddedRows, PooledRows] | None = None  # that were read last
        self._ranks: list[int] = []  # whose rows the latest packed batch holds

    def takes(self, batch: dict[str, Any]) -> bool:
        """Return whether a forward with these arguments is sharded."""
        if self.group is None:
            return False
        if self._of_backbone:
            return not has_cache(batch)
        return bool(batch.get("fused_lm_head")) and batch.get("labels") is not None

    def read(self, batch: dict[str, Any]) -> None:
        """Find the documents in the rows of a forward, and exchange them with other ranks unless they are shared."""
        tokens = token_tensor(batch)
        mask = batch.get("attention_mask")
        if mask is not None and mask.shape != tokens.shape[:2]:
            raise BatchError(
                f"attention_mask has shape {tuple(mask.shape)}, but the rows have {tuple(tokens.shape[:2])}. Context "
                "parallelism attends causally inside each row: pass a mask of padding, or none."
            )
        rows = PaddedRows(tokens, mask)
        packed = {
            name: rows.pack_labels(value) if name == "labels" else rows.pack(value)
            for name, value in batch.items()
            if self._is_per_token(name, value, tokens)
        }
        shared = self.batches == "shared"
        self.current = rows, own_rows(packed, rows) if shared else pool_rows(packed, rows, self.group)

    def pack(self, batch: dict[str, Any], ranks: list[int] | None = None) -> dict[str, Any]:
        """Return a forward's arguments with one packed row and its plan, for [`shard_inputs`].

        Args:
            batch: the forward's arguments, with rows (B, T).
            ranks: ranks whose rows are packed, of those read before. By default, reads the rows, and packs them all.
        """
        if ranks is None:
            self.read(batch)
            ranks = [0] if self.batches == "shared" else list(range(self.group.size()))
        self._ranks = ranks
        tokens = token_tensor(batch)
        others = {
            name: value
            for name, value in batch.items()
            if name != "attention_mask" and not self._is_per_token(name, value, tokens)
        }
        _, pooled = self.current
        inputs = pooled.inputs_of(ranks)
        plan = plan_with(self._settings, pooled.lengths_of(ranks))
        plan.checked_keys = frozenset(["labels"])
        if self.batches == "shared":
            plan.content_digest = content_digest(inputs)
        return {**others, **inputs, "flashcp_plan": plan}

    def unpack(self, output: Any, plan: RankPlan) -> Any:
        """Return the outputs of a sharded forward as outputs of this rank's rows.

        Per-token outputs (1, T_r) become rows (B, T - 1), as those of TRL's fused output head: the output at a
        position is for the next token. Other ranks' rows are left out. A router loss stays. `loss` is dropped, because
        it belongs to this rank's tokens. The outputs of a backbone stay as they are.
        """
        if self._of_backbone:
            return output
        for name, value in list(output.items()):
            if name == "loss":
                output[name] = None
            elif isinstance(value, torch.Tensor) and value.dim() == 0:
                output[name] = _MeanGradient.apply(value, plan.group)
            elif isinstance(value, torch.Tensor):
                output[name] = self.rows_of(value, plan)[:, :-1]
            elif value is not None:
                raise UnsupportedModelError(
                    f"The forward returns {name}, which does not have one value per token, so it cannot be returned "
                    "for whole rows. Turn this output off."
                )
        return output

    def rows_of(self, values: torch.Tensor, plan: RankPlan) -> torch.Tensor:
        """Return the values (1, T_r, ...) of this rank's tokens as those of this rank's rows, (B, T, ...).

        If the packed batch holds only rows of another rank, returns the values (1, C, ...) of its tokens.
        """
        whole, (rows, pooled) = gather_tokens(values, plan), self.current
        if self.batches == "shared":
            return rows.unpack(whole)
        rank = self.group.rank()
        if rank not in self._ranks:
            return whole[None]
        return rows.unpack(whole if len(self._ranks) == 1 else whole[pooled.span_of(rank)])

    def _is_per_token(self, name: str, value: Any, tokens: torch.Tensor) -> bool:
        if name == "attention_mask" or not isinstance(value, torch.Tensor):
            return False
        return value.dim() >= 2 and value.shape[:2] == tokens.shape[:2]


class _MeanGradient(torch.autograd.Function):
    """A value that all ranks of a group share, whose gradient is the mean of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor):
        return add_over_ranks(gradient.clone(), ctx.group, "the gradient of a router loss") / ctx.group.size(), None
