"""`attach`: hooks on a model that shard its batches, and what it checks before and at the first step."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version

from .. import __version__ as hf_flashcp_version
from ..attention import layer_to_check
from ..attention.kernels import check_activated_kernel
from ..errors import BatchError, ConfigurationError, UnsupportedModelError
from ..exchange import debug_mode, require_agreement
from ..layout import RankPlan, shard_inputs
from ..layout.batch import IGNORE_INDEX, context_parallel_group
from ..planning import DEFAULT_STRATEGY, ShardPlan
from .model_support import check_model, config_value
from .per_document_mixers import (
    count_attention_modules,
    hook_mixers,
    needs_whole_documents,
    require_whole_documents,
)
from .per_document_rope import hook_length_dependent_rope
from .plugin import FlashCPPlugin
from .sharded_forward import current_sharded_forward, enter_sharded_forward, leave_sharded_forward


if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def attach(
    model: torch.nn.Module,
    accelerator_or_mesh: Accelerator | DeviceMesh | None,
    *,
    strategy: str | None = None,
    on_plan: Callable[[ShardPlan], None] | None = None,
    keep_received_kv: bool | None = None,
) -> ContextParallelHandle:
    """Makes `model(**batch)` run on this rank's part of a full packed batch.

    From here on a forward in training mode, or with labels or a plan, shards its batch ([`shard_inputs`]), so a plain
    training loop stays as it is. Forwards without them, `generate()` among them, run as they would without us, as do
    padded batches at cp_size 1. The first sharded forward checks that every attention layer called us with the plan.

    Args:
        model (`torch.nn.Module`): a transformers model loaded with `attn_implementation="flashcp"`, bare or wrapped
            (DDP, FSDP2, PEFT, torch.compile).
        accelerator_or_mesh (`Accelerator` or `DeviceMesh`, *optional*): an Accelerator with a [`FlashCPPlugin`], or a
            mesh that is 1-D or has a dimension "cp"; `None` for cp_size 1.
        strategy (`str`, *optional*): for batches that come without a plan, see [`plan_documents`]; defaults to the
            plugin's.
        on_plan (`Callable`, *optional*): called with the plan of each forward in training mode, for metrics.
        keep_received_kv (`bool`, *optional*): whether a layer keeps the KV that it received in forward until its
            backward (`True`: more memory), or fetches it again (`False`: more traffic); the same on every rank.
            Defaults to the plugin's; if that is `None` too, kept under gradient checkpointing, where it is held for
            one layer at a time, and otherwise as the plan says (see [`RankPlan`]).

    With torch.compile, compile the layers: `for layer in model.model.layers: layer.compile(dynamic=True)` (accelerate:
    `TorchDynamoPlugin(use_regional_compilation=True, dynamic=True)`). The only graph breaks are then the attention
    calls. Without `dynamic=True` the second pack recompiles once, after that or with it no pack does. A whole model
    compiles too (`torch.compile(model, dynamic=True)`), with further breaks before its layers, where the batch is
    sharded and where the mask is left out.

    Returns:
        `ContextParallelHandle`: with `.remove()` and the latest `.plan`. Attaching again replaces the earlier handle.

    Raises:
        UnsupportedModelError: the model's gradients would not be exact, and why.
        ConfigurationError: the Accelerator or mesh does not fit, or the attention kernel that was activated in PyTorch
            does not run on this GPU.

    A forward raises a [`BatchError`] for batches that cannot be sharded, or that differ between ranks.
    """
    inner = transformers_model(model)
    check_model(inner)
    check_activated_kernel()
    mesh = accelerator_or_mesh
    if isinstance(accelerator_or_mesh, Accelerator):
        mesh, plugin = _accelerator_mesh(accelerator_or_mesh)
        strategy = strategy or getattr(plugin, "strategy", None)
        if keep_received_kv is None:
            keep_received_kv = getattr(plugin, "keep_received_kv", None)
    group, _, cp_size = context_parallel_group(mesh)
    if cp_size > 1:
        require_agreement("the model", _description(inner, cp_size), group, advice=_SAME_MODEL)
    if (earlier := attached_handle(inner)) is not None:
        earlier.remove()
    return ContextParallelHandle(inner, mesh, strategy or DEFAULT_STRATEGY, on_plan, keep_received_kv)


def attached_handle(model: torch.nn.Module) -> ContextParallelHandle | None:
    """The handle whose hooks a model has."""
    owners = (getattr(hook, "__self__", None) for hook in transformers_model(model)._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, ContextParallelHandle)), None)


class ContextParallelHandle:
    """What [`attach`] returns.

    Attributes:
        plan (`RankPlan`, *optional*): of the latest sharded forward.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mesh: DeviceMesh | None,
        strategy: str,
        on_plan: Callable[[ShardPlan], None] | None,
        keep_received_kv: bool | None,
    ):
        self.plan: RankPlan | None = None
        self.mesh = mesh
        self._whole_documents = needs_whole_documents(model)
        self._strategy = "whole_doc" if self._whole_documents else strategy
        self._on_plan = on_plan
        self._keep_received_kv = keep_received_kv
        self._checked = False
        self._forwards = 0
        self._targets: torch.Tensor | None = None
        self._parameters = list(inspect.signature(model.forward).parameters)
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, always_call=True),
            *hook_length_dependent_rope(model),
            *hook_mixers(model),
        ]

    def remove(self) -> None:
        """Takes the hooks off; the model behaves as before [`attach`]."""
        for hook in self._hooks:
            hook.remove()

    def __deepcopy__(self, memo: dict) -> ContextParallelHandle:
        return self  # process groups cannot be copied; a copied model stays attached through the same handle

    def shard(self, batch: dict[str, Any]) -> dict[str, Any]:
        """[`shard_inputs`] with this handle's mesh and strategy, for batches that the hooks would shard."""
        return shard_inputs(batch, self.mesh, strategy=self._strategy) if self._can_shard(batch) else batch

    def _can_shard(self, batch: dict[str, Any]) -> bool:
        if batch.get("flashcp_plan") is not None:
            return True
        padded_on_one_rank = self.mesh is None and batch.get("attention_mask") is not None
        return batch.get("past_key_values") is None and not padded_on_one_rank

    @torch.compiler.disable
    def _before_forward(self, model, args, kwargs):
        batch = {**dict(zip(self._parameters, args)), **kwargs}
        wanted = model.training or any(
            batch.get(key) is not None for key in ("flashcp_plan", "labels", "shift_labels")
        )
        if not (wanted and self._can_shard(batch)):
            return None
        if media := sorted(key for key, value in batch.items() if value is not None and _MEDIA.search(key)):
            raise BatchError(
                f"The batch has {', '.join(media)}. flashcp shards text: what images, video and audio need of a "
                "vision or audio tower, and the masks around them, would be lost. Train on text-only batches."
            )
        batch = self.shard(batch)
        self.plan = batch["flashcp_plan"]
        if self._whole_documents:
            require_whole_documents(self.plan.plan, model)
            batch.pop("seq_idx", None)
        # A cache would hold part of the keys or a document's state for the next one, and grow when a layer runs again.
        batch["use_cache"] = False
        if self._keep_received_kv is not None:
            self.plan.keep_received = self._keep_received_kv
        elif model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            self.plan.keep_received = True
        if self.plan.group is not None:
            require_agreement(
                "the batch",
                _description_of_batch(self.plan),
                self.plan.group,
                advice=_SAME_BATCH,
                error=BatchError,
            )
        if debug_mode():
            layers = model.config.get_text_config().num_hidden_layers
            self.plan.checked_layer = layer_to_check(self._forwards, layers)
            self._forwards += 1
        if model.training and self._on_plan is not None:
            self._on_plan(self.plan.plan)
        if batch.get("labels") is not None and batch.get("shift_labels") is not None:
            # A loss that shifts labels by itself would lose the targets at cuts: it finds none at all (_check_loss).
            batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
            self._targets = None if self._checked else batch["shift_labels"]
        enter_sharded_forward(model, self.plan, is_first=not self._checked)
        return (), batch

    @torch.compiler.disable
    def _after_forward(self, model, args, output):
        forward = current_sharded_forward()
        if forward is None or forward.model is not model:
            return
        leave_sharded_forward()
        if output is not None and not self._checked:  # None: the forward raised
            config = model.config.get_text_config()
            expected = count_attention_modules(model) if self._whole_documents else config.num_hidden_layers
            if len(forward.attention_modules) != expected:
                raise UnsupportedModelError(
                    f"{len(forward.attention_modules)} attention layers of {type(model).__name__} called flashcp with "
                    f"the batch's plan, but the model has {expected}. The others attended to this rank's "
                    "tokens only, or did not attend at all: the gradients would be wrong. This model cannot be "
                    "trained with context parallelism."
                )
            dropped = forward.mask_windows - forward.attention_windows
            if dropped and "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"]):
                raise UnsupportedModelError(
                    f"{type(model).__name__} builds masks for a sliding window of {max(dropped)} tokens, "
                    "but none of its attention layers asks for that window: it would be dropped. This model cannot "
                    "be trained with context parallelism, unless its config turns the window off."
                )
            self._check_loss(model, output)
            self._checked = True

    def _check_loss(self, model: PreTrainedModel, output: Any) -> None:
        targets, self._targets = self._targets, None
        loss = output.get("loss") if isinstance(output, dict) else None
        if targets is None or loss is None or not (targets != IGNORE_INDEX).any():
            return
        logits = output.get("logits")
        if loss == 0 or (loss.isnan() and (logits is None or logits.isfinite().all())):
            raise UnsupportedModelError(
                f"{type(model).__name__} computes its loss from labels and not from shift_labels: shifting the part "
                "that a rank holds would lose the targets at the cuts. Use transformers' own loss, or one that takes "
                "shift_labels."
            )


# How models call what comes from images, video and audio; mm_token_type_ids and token_type_ids come with text too.
_MEDIA = re.compile(
    "pixel|image|video|audio|patch|input_features|input_values|spatial_shapes|bbox|qformer|perceiver|protein|"
    "aspect_ratio|per_grid|feature_attention_mask|cross_attention_states|mm_encoder_outputs"
)
_SAME_MODEL = "Start every process with the same packages, model and cp_size."
_SAME_BATCH = (
    "All processes of a context-parallel group must read the same batch: let accelerate prepare the data loader (it "
    "knows FlashCPPlugin's cp_size), give a shuffling loader of your own a generator with the same seed on every "
    "rank, use one strategy, and set FLASHCP_DEBUG for all or none."
)


def transformers_model(model: torch.nn.Module) -> PreTrainedModel:
    """The model inside of DDP, torch.compile and PEFT."""
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(inner).__name__} is not a transformers model: load one with "
            'AutoModelForCausalLM.from_pretrained(..., attn_implementation="flashcp").'
        )
    return inner


def _description(model: PreTrainedModel, cp_size: int) -> dict[str, Any]:
    config = model.config.get_text_config()
    shapes = str([(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()])
    return {
        "cp_size": cp_size,
        "hf_flashcp": hf_flashcp_version,
        "torch": torch.__version__,
        "transformers": transformers_version,
        "model class": type(model).__name__,
        "dtype": str(model.dtype),
        "layers": config.num_hidden_layers,
        "heads": [config_value(config, "num_attention_heads"), config_value(config, "num_key_value_heads")],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "shapes": hashlib.blake2b(shapes.encode(), digest_size=8).hexdigest(),
    }


def _description_of_batch(bound: RankPlan) -> dict[str, Any]:
    return {
        "documents": len(bound.plan.lengths),
        "tokens": bound.plan.num_tokens,
        "plan": bound.plan.digest[:16],
        "content": bound.plan.content_digest,
        "keep_received_kv": bound.keep_received,
        **{name: os.environ.get(name) for name in ("FLASHCP_DEBUG", "FLASHCP_DEBUG_EVERY")},
    }


def _accelerator_mesh(accelerator: Accelerator) -> tuple[DeviceMesh | None, FlashCPPlugin | None]:
    config = accelerator.parallelism_config
    if config is not None and not isinstance(config, FlashCPPlugin):
        raise ConfigurationError(
            f"The Accelerator has a {type(config).__name__}. Give it "
            "parallelism_config=FlashCPPlugin(cp_size=...) instead."
        )
    if config is None or config.cp_size == 1:
        mesh = None
    else:
        mesh = accelerator.torch_device_mesh
    return mesh, config
