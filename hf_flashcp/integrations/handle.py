"""`ContextParallelHandle`: the hooks of an attached model, and what its forwards have shown."""

from __future__ import annotations

import functools
import inspect
import logging
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from ..attention import layer_to_check
from ..data.batch import shard_inputs, token_tensor
from ..data.boundaries import IGNORE_INDEX, without_starts
from ..distributed import require_agreement
from ..distributed.exchange_group import acquire_exchange_group, release_exchange_group
from ..distributed.process_group import context_parallel_group
from ..errors import BatchError, ConfigurationError
from ..exchange import debug_mode
from ..layout import RankPlan
from ..plan import ShardPlan
from ..planning import PlanSettings
from ..tables import counted
from .descriptions import SAME_BATCH, describe_batch
from .models.checkpointing import layers_run_again
from .models.first_forward import check_first_forward
from .models.forward_arguments import can_shard, has_cache, media
from .models.head_loss import HeadLoss, LogitsChoice, without_skip_logits, without_stand_in
from .models.hybrids import mixer_of
from .models.loss_check import LossCheck
from .models.per_document_rope import follows_earlier_documents, hook_length_dependent_rope
from .models.per_slice_mixers import hook_mixers, require_whole_documents
from .models.recurrent_layers import pass_states
from .models.router_loss import scale_mean_terms
from .models.sharded_forward import ShardedForward, current_sharded_forward, set_sharded_forward
from .models.tiled_mlp import tile_blocks
from .plugin import FlashCPPlugin
from .whole_rows.turns import Turns
from .whole_rows.whole_rows import WholeRows


logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.utils.hooks import RemovableHandle


class ContextParallelHandle:
    """The handle of an attached model, returned by [`attach`].

    Attributes:
        plan (`RankPlan`, *optional*): plan of the latest sharded forward.
        plan_settings (`PlanSettings`): settings for batches without a plan.
        kernels (`dict[str, int]`): number of attention layers by the name of the kernel that ran them in the first
            sharded forward.
        losses_add_up (`bool`): meaning of the `num_items_in_batch` that a caller passes. If `True` (the default), it
            is the number of targets on all ranks, and the sum of the ranks' losses is the mean over targets. If
            `False`, it is the number of targets of the group divided by cp_size, and the mean of the ranks' losses is
            the mean over targets.
        skip_logits (`bool`): whether the losses of training, and with `skip_logits=True` in the plugin all losses, are
            computed without logits, unless the batch has `skip_logits`.
        token_losses (`torch.Tensor`, *optional*): (T_r,), losses of this rank's tokens in the latest sharded forward.
            Only a forward without gradients and without logits has them.
        rows (`WholeRows`, *optional*): reads whole padded rows, if [`read_rows`] was called.
        turns (`Turns`, *optional*): runs forwards in turns, if rows are read with "turns".
        group (`ProcessGroup`, *optional*): group in which the ranks of the mesh exchange KV, shared by their attached
            models; `None` for cp_size 1. Under NCCL, its communicator has buffers of its own on the GPU.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mesh: DeviceMesh | None,
        settings: PlanSettings,
        plugin: FlashCPPlugin | None,
        on_plan: Callable[[ShardPlan], None] | None,
        outermost: torch.nn.Module,
    ):
        self.plan: RankPlan | None = None
        self.kernels: dict[str, int] = {}
        self.losses_add_up: bool = True
        self.rows: WholeRows | None = None
        self.turns: Turns | None = None
        self.mesh = mesh
        mixer = mixer_of(model)
        self._needs_whole = mixer if mixer is not None and mixer.needs_whole_documents else None
        self.plan_settings: PlanSettings = settings.with_whole_documents() if self._needs_whole else settings
        self._plan_in_seq_idx = pass_states(model)
        self._on_plan = on_plan
        self._keep_received_kv = getattr(plugin, "keep_received_kv", None)
        self._of_layers = {name: getattr(plugin, name, None) for name in ("kernel", "head_groups")}
        self._global_router_loss = getattr(plugin, "global_router_loss", False)
        self.skip_logits: bool = getattr(plugin, "skip_logits", None) is True
        self._logits_choice = LogitsChoice(required=self.skip_logits)
        self._skips_logits = False  # in the latest forward
        self._head_loss: HeadLoss | None = None
        self.token_losses: torch.Tensor | None = None
        self._checked = self._loss_checked = self._loss_unknown = False
        self._loss_check: LossCheck | None = None
        self._windows: set[int | None] = set()  # that the layers of the latest forward asked for
        self._stock_coefficients: dict[str, float] = {}
        self._forwards = 0
        self._count: Any = None
        self._parameters = list(inspect.signature(model.forward).parameters)
        self._mlp_tiles = getattr(plugin, "mlp_tiles", 1)
        self._hooks = [
            *tile_blocks(model, self._mlp_tiles),
            outermost.register_forward_pre_hook(self._keep_count, with_kwargs=True, prepend=True),
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
            *hook_length_dependent_rope(model),
            *hook_mixers(model),
        ]
        self._mesh_group, _, cp_size = context_parallel_group(mesh)
        self.group: ProcessGroup | None = None
        if self._mesh_group is not None and cp_size > 1:
            self.group = acquire_exchange_group(self._mesh_group)

    def read_rows(self, model: PreTrainedModel, batches: str, *, of_backbone: bool = False) -> None:
        """From now on, shard forwards over whole padded rows, instead of packed batches. See [`WholeRows`].

        Args:
            model (`PreTrainedModel`): the attached model.
            batches (`str`): "shared", "own" or "turns", see [`FlashCPPlugin`].
            of_backbone (`bool`, *optional*, defaults to `False`): whether the attached model is a backbone, whose
                outputs stay those of this rank's tokens.
        """
        self.rows = WholeRows(self.group, self.plan_settings, batches, of_backbone=of_backbone)
        if batches == "turns" and self.group is not None:
            if follows_earlier_documents(model):
                raise ConfigurationError(
                    f"batches is 'turns', but {type(model).__name__} has a dynamic RoPE, whose frequencies depend on "
                    "earlier rows, so a forward that runs again would give other outputs. Use 'own'."
                )
            self.turns = Turns(self.rows, self._run_sharded)
            self.turns.wrap(model)

    def add_hooks(self, hooks: list[RemovableHandle]) -> None:
        """Add hooks that [`remove`] removes too."""
        self._hooks += hooks

    def remove(self) -> None:
        """Remove the hooks, so that the model behaves as before [`attach`], and give the process group back.

        Call it on every rank, after the backward of the last forward.
        """
        for hook in self._hooks:
            hook.remove()
        if self.group is not None:
            self.group = None
            if self.plan is not None:
                self.plan = self.plan.with_group(None)
            release_exchange_group(self._mesh_group)

    def __deepcopy__(self, memo: dict) -> ContextParallelHandle:
        return self  # process groups cannot be copied, so a copied model shares the handle

    def __getstate__(self) -> dict[str, Any]:
        # Process groups cannot be saved. A whole model saved by `torch.save` is attached for cp_size 1 when loaded.
        groups = dict.fromkeys(("mesh", "_mesh_group", "group", "plan", "rows", "turns"))
        choice = LogitsChoice(required=self.skip_logits)
        return {**vars(self), **groups, "_on_plan": None, "_checked": False, "_logits_choice": choice}

    def shard(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Apply [`shard_inputs`] with this handle's mesh, group and settings, if the hooks would shard the batch."""
        if not can_shard(batch, on_one_rank=self.mesh is None):
            return batch
        batch = shard_inputs(batch, self.mesh, settings=self.plan_settings)
        plan = batch["flashcp_plan"]
        if self.group is not None and plan.group is self._mesh_group:
            batch["flashcp_plan"] = plan.with_group(self.group)
        return batch

    @torch.compiler.disable
    def _keep_count(self, model, args, kwargs):
        """Remember `num_items_in_batch` before FSDP2 casts floating-point tensors to its param_dtype."""
        self._count = kwargs.get("num_items_in_batch")

    def _restore_count(self, batch: dict[str, Any]) -> None:
        given, kept, self._count = batch.get("num_items_in_batch"), self._count, None
        if not isinstance(given, torch.Tensor) or given.dtype not in (torch.bfloat16, torch.float16):
            return
        if not isinstance(kept, torch.Tensor) or kept.dtype == given.dtype:
            raise BatchError(
                f"num_items_in_batch arrives as {given.dtype}, which cannot hold a count, because FSDP2 casts "
                "floating-point tensors. Pass an integer, or call attach after accelerator.prepare."
            )
        batch["num_items_in_batch"] = kept

    @torch.compiler.disable
    def _before_forward(self, model, args, kwargs):
        batch = {**dict(zip(self._parameters, args)), **kwargs}
        if self.rows is not None:
            if not self.rows.takes(batch):
                self.rows.current = None
                return args, without_skip_logits(model, kwargs)
            packed = batch if self.turns is None else self.turns.replayed_batch(batch)
            if packed is None:
                self.turns.begin()
                return (), batch
            return (), self._enter(model, self.rows.pack(batch) if self.turns is None else packed)
        asking = ("flashcp_plan", "labels", "shift_labels")
        wanted = model.training or any(batch.get(key) is not None for key in asking)
        if not (wanted and can_shard(batch, on_one_rank=self.mesh is None)):
            if self.mesh is not None and batch.get("labels") is not None and has_cache(batch):
                raise BatchError(
                    "The batch has labels and a key-value cache, which does not hold the tokens of other ranks. Do "
                    "not pass a cache to forwards with labels."
                )
            return args, without_skip_logits(model, kwargs)
        return (), self._enter(model, batch)

    def _enter(self, model: PreTrainedModel, batch: dict[str, Any]) -> dict[str, Any]:
        """Enter a sharded forward, and return its arguments."""
        if found := media(batch):
            raise BatchError(
                f"The batch has {', '.join(found)}. flashcp shards text only: the inputs of vision and audio towers, "
                "and their masks, would be lost. Train on text-only batches."
            )
        self._restore_count(batch)
        if not self._checked:
            pass_states(model)  # a process that loaded the model together with its hooks has not done so
        batch, earlier = self.shard(batch), self.plan
        self.plan = batch["flashcp_plan"] = self._with_layers(batch["flashcp_plan"], model)
        if self._needs_whole is not None:
            require_whole_documents(self.plan.plan, model, self._needs_whole)
        batch.pop("seq_idx", None)  # the plan defines the documents
        if self._plan_in_seq_idx:
            batch["seq_idx"] = self.plan
        # A cache would hold only part of the keys, carry a document's state into the next document, and grow when a
        # layer runs again in backward.
        batch["use_cache"] = False
        self._skips_logits = self._logits_choice.skips(model, batch, self.skip_logits)
        self._agree_and_copy_maps(token_tensor(batch).device, earlier)
        if model.training and torch.is_grad_enabled() and self._on_plan is not None:
            self._on_plan(self.plan.plan)
        self._share_loss(model, batch)
        return batch

    def _agree_and_copy_maps(self, device: torch.device, earlier: RankPlan | None) -> None:
        """Check that all ranks have the same batch, and start copying index maps before waiting for other ranks."""
        copy_maps = functools.partial(self.plan.copy_maps, device, self._windows, earlier)
        if self.plan.group is None:
            copy_maps()
            return
        described = describe_batch(self.plan, self._skips_logits, self._mlp_tiles)
        require_agreement(
            "the batch", described, self.plan.group, advice=SAME_BATCH, error=BatchError, meanwhile=copy_maps
        )

    def _with_layers(self, plan: RankPlan, model: PreTrainedModel) -> RankPlan:
        again, checked = plan.layers_run_again, None
        if self._keep_received_kv is None and model.training:
            again |= layers_run_again(model)
        if debug_mode():
            checked = layer_to_check(self._forwards, model.config.get_text_config().num_hidden_layers)
            self._forwards += 1
        return plan.with_layers(self._keep_received_kv, again, checked, **self._of_layers)

    def _share_loss(self, model: PreTrainedModel, batch: dict[str, Any]) -> None:
        """Enter the sharded forward, and prepare the loss.

        Loss terms that are not sums over targets are reduced to this rank's share.
        """
        plan, count = self.plan, batch.get("num_items_in_batch")
        # The batch's loss is either the mean or the sum of the ranks' losses.
        averaged = count is None or count is plan.target_count or not self.losses_add_up
        ranks = plan.plan.cp_size
        tokens = plan.layout.num_tokens / plan.plan.num_tokens
        self._stock_coefficients = scale_mean_terms(model, tokens * ranks if averaged else tokens)
        group = plan.group
        if self._global_router_loss and model.training and dist.is_initialized():
            group, ranks = dist.group.WORLD, dist.get_world_size()
        set_sharded_forward(
            ShardedForward(model, plan, not self._checked, group, router_weight=1.0 if averaged else 1 / ranks)
        )
        shifted = batch.get("labels") is not None and batch.get("shift_labels") is not None
        if shifted and plan.plan.cp_size == 1:
            batch["labels"] = without_starts(batch["labels"], plan.plan.lengths)
        elif shifted:
            batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
        if self._skips_logits:
            self._head_loss = self._logits_choice.begin(model, batch)
        if shifted and plan.plan.cp_size > 1 and not self._loss_checked:
            self._loss_check = LossCheck(model, batch, watch=self._loss_unknown)

    @torch.compiler.disable
    def _after_forward(self, model, args, kwargs, output):
        if self.turns is not None and self.turns.end():
            return None
        return self._finish(model, kwargs, output)

    def _run_sharded(self, model: PreTrainedModel, batch: dict[str, Any], forward: Callable[..., Any]) -> Any:
        """Run a forward on a packed batch, as the hooks do."""
        sharded, output = self._enter(model, batch), None
        try:
            output = forward(**sharded)
        finally:
            changed = self._finish(model, sharded, output)
        return output if changed is None else changed

    def _finish(self, model: PreTrainedModel, kwargs: dict[str, Any], output: Any) -> Any:
        """Leave a sharded forward, and return its output, or `None` if that does not change."""
        forward = current_sharded_forward()
        if forward is None or forward.model is not model:
            return None
        check, head = self._leave(model)
        if output is None:  # the forward raised an error
            return None
        repeated = False
        while head is not None and self._logits_choice.must_repeat(model, head, output, repeated):
            self._skips_logits, repeated = head.problem is None, True
            forward, check, head, output = self._run_again(model, kwargs)
        self.token_losses = None if head is None else head.token_losses
        self._windows = forward.attention_windows
        if forward.router_loss is not None and isinstance(output, dict) and output.get("aux_loss") is not None:
            output["aux_loss"] = forward.router_loss
        if not self._checked:
            check_first_forward(model, forward)
            self.kernels = dict(Counter(forward.kernels.values()))
            _log_kernels(model, self.kernels)
            self._checked = True
        if check is not None:
            self._loss_checked = check.finish(output, forward, other_terms=bool(self._stock_coefficients))
            self._loss_unknown = not self._loss_checked
        output = output if head is None else without_stand_in(output)
        return output if self.rows is None else self.rows.unpack(output, self.plan)

    def _leave(self, model: PreTrainedModel) -> tuple[LossCheck | None, HeadLoss | None]:
        """Leave the sharded forward, and put back everything that was replaced for it."""
        set_sharded_forward(None)
        for name, coefficient in self._stock_coefficients.items():
            setattr(model, name, coefficient)
        check, head = self._loss_check, self._head_loss
        self._loss_check = self._head_loss = None
        for replaced in (check, head):
            if replaced is not None:
                replaced.restore()
        return check, head

    def _run_again(
        self, model: PreTrainedModel, batch: dict[str, Any]
    ) -> tuple[ShardedForward, LossCheck | None, HeadLoss | None, Any]:
        """Run a forward again whose head could not compute the loss."""
        self._share_loss(model, batch)
        forward = current_sharded_forward()
        assert forward is not None
        try:
            output = model.forward(**batch)
        finally:
            check, head = self._leave(model)
        return forward, check, head, output


def _log_kernels(model: PreTrainedModel, kernels: dict[str, int]) -> None:
    layers = ", ".join(f"{name} ({counted(count, 'layer')})" for name, count in kernels.items())
    logger.info(f"Attention of {type(model).__name__} runs with {layers} on {model.device}.")
