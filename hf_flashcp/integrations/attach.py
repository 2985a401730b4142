"""`attach`: adds hooks to a model that shard its batches, and checks the model before and in the first step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from transformers import PreTrainedModel

from ..attention.kernels import check_activated_kernel
from ..distributed import require_agreement
from ..distributed.process_group import context_parallel_group
from ..errors import ConfigurationError, UnsupportedModelError
from ..plan import ShardPlan
from ..planning.settings import current_owner, current_settings
from .descriptions import SAME_MODEL, describe_model
from .handle import ContextParallelHandle
from .models.classification import backbone_of, gather_scores
from .models.model_support import check_model
from .models.router_loss import share_router_losses
from .plugin import FlashCPPlugin
from .surroundings import plan_for_surroundings


logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def attach(
    model: torch.nn.Module,
    accelerator_or_mesh: Accelerator | DeviceMesh | None,
    *,
    plugin: FlashCPPlugin | None = None,
    on_plan: Callable[[ShardPlan], None] | None = None,
) -> ContextParallelHandle:
    """Make `model(**batch)` run on this rank's part of a full packed batch.

    After this call, every forward in training mode, and every forward with labels or a plan, shards its batch (see
    [`shard_inputs`]), so an ordinary training loop needs no other change. All other forwards, such as those of
    `generate()`, run as without this library, and so do padded batches with cp_size 1. The first sharded forward
    checks that every attention layer used the plan, and logs the kernels that ran.

    A model with a classification head takes padded batches instead. All its forwards without a cache are sharded with
    a cp_size above 1, and its outputs are those of the whole batch, on every rank (docs/preference.md).

    Args:
        model (`torch.nn.Module`): a transformers model loaded with `attn_implementation="flashcp"`, which may be
            wrapped (DDP, FSDP2, PEFT, torch.compile).
        accelerator_or_mesh (`Accelerator` or `DeviceMesh`, *optional*): an Accelerator with a [`FlashCPPlugin`], or a
            mesh that is 1-D or has a dimension "cp"; `None` for cp_size 1.
        plugin (`FlashCPPlugin`, *optional*): settings to use with a mesh. Defaults to the last plugin created, if its
            cp_size is the number of ranks in the mesh. An Accelerator already has its plugin.
        on_plan (`Callable`, *optional*): function that is called with the plan of each forward in training mode, for
            metrics.

    With torch.compile, compile the layers: `for layer in model.model.layers: layer.compile(dynamic=True)`, or
    `TorchDynamoPlugin(use_regional_compilation=True, dynamic=True)` in accelerate. Then the only graph breaks are the
    attention calls, and no pack causes a recompilation. (Without `dynamic=True`, the second pack recompiles once.)
    Compiling the whole model also works (`torch.compile(model, dynamic=True)`). It has further graph breaks before the
    layers, where the batch is sharded and the mask is created, and it compiles the loss at the second pack, because
    the first forward checks the loss function.

    Returns:
        `ContextParallelHandle`: handle with a method `remove()` and the latest `plan`. Attaching a model again
        replaces its earlier handle.

    Raises:
        UnsupportedModelError: the model's gradients would not be exact. The message gives the reason.
        ConfigurationError: the Accelerator or mesh is not suitable, or the attention kernel that was activated in
            PyTorch does not run on this GPU.

    A forward raises a [`BatchError`] if its batch cannot be sharded or differs between ranks, and a
    [`ConfigurationError`] if the plugin's kernel cannot run a layer.
    """
    inner = transformers_model(model)
    check_model(inner)
    backbone = backbone_of(inner)
    check_activated_kernel()
    mesh = accelerator_or_mesh
    if isinstance(accelerator_or_mesh, Accelerator):
        if plugin is not None:
            raise ConfigurationError("The Accelerator has its own parallelism_config: leave plugin out.")
        mesh, plugin = _accelerator_mesh(accelerator_or_mesh)
    group, _, cp_size = context_parallel_group(mesh)
    if plugin is not None and plugin.cp_size != cp_size:
        raise ConfigurationError(
            f"FlashCPPlugin has cp_size {plugin.cp_size}, but the mesh has {cp_size} ranks. Pass the plugin of this "
            "mesh."
        )
    batches = getattr(plugin, "batches", None) or "shared"
    if backbone is not inner and batches == "turns":
        raise ConfigurationError(
            "batches is 'turns', but a classification head scores all rows of a batch at once. Use 'own', with fewer "
            "rows per batch."
        )
    if cp_size > 1:
        require_agreement("the model", describe_model(inner, group), group, advice=SAME_MODEL)
    share_router_losses(inner)
    plugin = plugin or current_owner(cp_size)
    settings = current_settings(cp_size) if plugin is None else plugin.plan_settings
    itemsize = _training_itemsize(inner, accelerator_or_mesh)
    if group is None or cp_size == 1:
        settings.for_model(inner.config, itemsize)
    else:
        plan_for_surroundings(settings, inner, mesh, group, itemsize)
    earlier = attached_handle(inner)
    handle = ContextParallelHandle(backbone, mesh, settings, plugin, on_plan, model)
    if backbone is not inner:
        handle.read_rows(backbone, batches, of_backbone=True)
        handle.add_hooks(gather_scores(inner, handle))
    if earlier is not None:
        earlier.remove()
    return handle


def attached_handle(model: torch.nn.Module) -> ContextParallelHandle | None:
    """Return the handle of an attached model, or `None` if the model is not attached."""
    hooks = backbone_of(transformers_model(model))._forward_pre_hooks.values()
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return next((owner for owner in owners if isinstance(owner, ContextParallelHandle)), None)


def transformers_model(model: torch.nn.Module) -> PreTrainedModel:
    """Return the transformers model inside wrappers such as DDP, torch.compile and PEFT."""
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(inner).__name__} is not a transformers model. Load one with "
            'AutoModelForCausalLM.from_pretrained(..., attn_implementation="flashcp").'
        )
    return inner


def _training_itemsize(model: PreTrainedModel, accelerator_or_mesh: Accelerator | DeviceMesh | None) -> int:
    """Return the size in bytes of an element of keys and values."""
    if getattr(accelerator_or_mesh, "mixed_precision", "no") in ("bf16", "fp16"):
        return 2
    return model.dtype.itemsize


def _accelerator_mesh(accelerator: Accelerator) -> tuple[DeviceMesh | None, FlashCPPlugin | None]:
    config = accelerator.parallelism_config
    if config is not None and not isinstance(config, FlashCPPlugin):
        raise ConfigurationError(
            f"The Accelerator has a {type(config).__name__}. Give it "
            "parallelism_config=FlashCPPlugin(cp_size=...) instead."
        )
    return (accelerator.torch_device_mesh if config is not None and config.cp_size > 1 else None), config
