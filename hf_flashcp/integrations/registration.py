"""`attn_implementation="flashcp"`: the attention function, its mask function, and their registration in transformers.

transformers treats every attention name that contains "flash" as a FlashAttention kernel (utils/generic.py,
`is_flash_attention_requested`): it requires a package, prepares different masks, and sends vision towers down a code
path that we do not support. More than a hundred model files import this test by name, so we cannot replace it.
Instead, "flashcp" is translated to `INTERNAL_NAME` wherever users choose an attention implementation. The internal
name is registered too, and can be used directly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu
from transformers import PreTrainedConfig, PreTrainedModel, masking_utils, modeling_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention import document_attention
from ..attention.function import kernel_for
from ..errors import BatchError, UnsupportedModelError
from ..layout import RankPlan
from ..plan import ShardPlan
from .models import sharded_forward
from .models.sharded_forward import ShardedForward, current_sharded_forward
from .replacement import replaced_once


NAME = "flashcp"
INTERNAL_NAME = "document_cp"


@torch.compiler.disable
def flashcp_attention(
    module: torch.nn.Module | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    flashcp_plan: RankPlan | ShardPlan | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention inside each document of a packed batch whose tokens are distributed over ranks.

    Args:
        module (`torch.nn.Module`, *optional*): attention layer that calls this function.
        query (`torch.Tensor`): (1, H_q, T_r, D_k), this rank's tokens with RoPE applied; bf16, fp16, fp32 or fp64.
        key (`torch.Tensor`): (1, H_kv, T_r, D_k).
        value (`torch.Tensor`): (1, H_kv, T_r, D_v).
        attention_mask (`torch.Tensor`, *optional*): refused together with a plan.
        scaling (`float`, *optional*): factor applied to the scores; defaults to D_k ** -0.5.
        dropout (`float`, *optional*, defaults to 0.0): attention dropout, refused together with a plan.
        sliding_window (`int`, *optional*): number of keys that a query sees, including its own.
        softcap (`float`, *optional*): if given, scores become softcap * tanh(scores / softcap).
        s_aux (`torch.Tensor`, *optional*): (H_q,) attention sinks: one additional score per head in every softmax,
            without a value.
        flashcp_plan (`RankPlan`, *optional*): plan from [`shard_inputs`]; a [`ShardPlan`] is accepted if its cp_size
            is 1. Without a plan the function calls transformers' sdpa attention, or the model's eager attention if it
            uses softcap or sinks, which sdpa does not support.
        kwargs: other arguments of the layer. Those that ask for another kind of attention are refused, and all others
            are ignored.

    Returns:
        `tuple`: output (1, T_r, H_q, D_v) in the dtype of `query`, and `None` for the attention weights.

    Raises:
        BatchError: the plan is not bound to a rank, tensors do not match it, or a mask was passed.
        UnsupportedModelError: the layer asks for something that would not be exact or that no kernel computes, or it
            attends causally without a plan inside a sharded forward.
    """
    if flashcp_plan is None:
        options = {"sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
        kwargs.update({name: value for name, value in options.items() if value is not None})
        return _attention_without_plan(module, query, key, value, attention_mask, scaling, dropout, kwargs)
    plan = _bound(flashcp_plan)
    _refuse_what_is_not_exact(module, sliding_window, s_aux, query, dropout, kwargs)
    if attention_mask is not None:
        raise BatchError(
            f"{_name(module)} got an attention_mask of shape {tuple(attention_mask.shape)} together with a plan, "
            "which replaces masks. Call hf_flashcp.attach(model, accelerator) before training, and do not pass a "
            "mask. Models that build their own masks cannot be sharded."
        )
    num_tokens = plan.layout.num_tokens
    if query.shape[0] != 1 or query.shape[2] != num_tokens or key.shape[2] != num_tokens:
        raise BatchError(
            f"{_name(module)} got queries {tuple(query.shape)} and keys {tuple(key.shape)}, but the plan gives rank "
            f"{plan.rank} one row of {num_tokens} tokens. Shard the batch with shard_inputs, and train without "
            "key-value cache and prompt tokens."
        )
    query, key, value = _same_dtype(query, key, value)
    kernel = kernel_for(query, value, sliding_window, softcap, plan.kernel)
    if forward := current_sharded_forward():
        forward.kernels[id(module)] = kernel.name
        forward.attention_windows.add(sliding_window)
    layer = getattr(module, "layer_idx", None)
    out = document_attention(
        query[0],
        key[0],
        value[0],
        plan,
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux if s_aux is None else s_aux.flatten(),
        keep_received_kv=True if layer in plan.layers_run_again else None,
        kernel=kernel,
        check_as=_name(module) if layer is not None and layer == plan.checked_layer else None,
    )
    return out.transpose(0, 1).unsqueeze(0).contiguous(), None


def _bound(plan: RankPlan | ShardPlan) -> RankPlan:
    if isinstance(plan, RankPlan):
        return plan
    if isinstance(plan, ShardPlan) and plan.cp_size == 1:
        return RankPlan(plan)
    raise BatchError(
        f"flashcp_plan is {plan!r}, which is not bound to a rank: the batch has not been sharded. Use FlashCPTrainer, "
        "call hf_flashcp.attach(model, accelerator), or call shard_inputs(batch, mesh) for every batch."
    )


# Keyword arguments by which models ask for other kinds of attention.
_OTHER_OPTIONS = {
    "position_bias": "a position bias",
    "indices": "a selection of keys (indices)",
    "block_indices": "a selection of blocks of keys (block_indices)",
    "sinks": "sinks under another name than s_aux",
}


def _refuse_what_is_not_exact(module, sliding_window, s_aux, query, dropout: float, kwargs: dict[str, Any]) -> None:
    reasons = {
        "attention dropout": dropout,
        "is_causal=False": not _is_causal(module, kwargs),
        **{what: kwargs.get(name) is not None for name, what in _OTHER_OPTIONS.items()},
        f"a sliding window of {sliding_window} tokens": sliding_window is not None and sliding_window < 1,
        "attention sinks that are not one score per head": s_aux is not None and s_aux.numel() != query.shape[1],
    }
    kind = layer_type(module)
    if kind == "sliding_attention" and sliding_window is None:
        reasons["a sliding window in its mask alone, but not in its attention call"] = True
    if kind == "full_attention" and sliding_window is not None:
        reasons[f"a sliding window of {sliding_window} tokens in a layer of type full_attention"] = True
    for what, asked in reasons.items():
        if asked:
            raise UnsupportedModelError(
                f"{_name(module)} asks for {what}, which context parallelism with flashcp does not compute. Train "
                'this model with attn_implementation="sdpa" or "eager" and cp_size 1'
                + (", or set the attention dropout in its config to 0." if what == "attention dropout" else ".")
            )


def layer_type(module) -> str | None:
    """Return the entry of `config.layer_types` for an attention layer, or `None` if it is unknown."""
    layer_types = getattr(getattr(module, "config", None), "layer_types", None)
    layer = getattr(module, "layer_idx", None)
    return layer_types[layer] if layer_types and layer is not None and layer < len(layer_types) else None


def _is_causal(module, kwargs: dict[str, Any]) -> bool:
    is_causal = kwargs.get("is_causal")
    return is_causal if is_causal is not None else getattr(module, "is_causal", True)


def _name(module: torch.nn.Module | None) -> str:
    if module is None:
        return "flashcp_attention"
    layer = getattr(module, "layer_idx", None)
    return type(module).__name__ + (f" (layer {layer})" if layer is not None else "")


def _same_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast tensors to the autocast dtype, as autocast does for sdpa.

    Under autocast, RoPE can return queries and keys in fp32 while values are in bf16.
    """
    device_type = tensors[0].device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        return tuple(tensor.to(dtype) if tensor.dtype != torch.float64 else tensor for tensor in tensors)
    return tensors


def _attention_without_plan(module, query, key, value, attention_mask, scaling, dropout, kwargs):
    if current_sharded_forward() is not None and _is_causal(module, kwargs):
        raise UnsupportedModelError(
            f"{_name(module)} was called without flashcp_plan inside a sharded forward: the model does not pass the "
            "keyword arguments of its forward to its attention layers, so they would attend to this rank's tokens "
            "only. It cannot be trained with context parallelism."
        )
    if "softcap" in kwargs or "s_aux" in kwargs:
        if module is None:
            raise BatchError(
                "flashcp_attention got softcap or s_aux without flashcp_plan and without a module, whose eager "
                "attention would compute them. Pass the plan or the module."
            )
        eager = sys.modules[type(module).__module__].eager_attention_forward
        mask = _additive_mask(attention_mask, query, key, _is_causal(module, kwargs))
        return eager(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    if module is None and query.shape[1] != key.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


def _additive_mask(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, is_causal: bool):
    """Convert a mask for sdpa to the additive mask of eager attention.

    For sdpa, `None` means an ordinary causal mask, or no mask if there is one query or attention is not causal.
    """
    if mask is None:
        q_len, kv_len = query.shape[2], key.shape[2]
        if not is_causal or q_len == 1:
            return None
        mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(
        ~mask, torch.finfo(query.dtype).min
    )


@torch.compiler.disable
def flashcp_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Return no mask inside a sharded forward, where the plan replaces masks, and otherwise the mask for sdpa.

    A mask other than causal would be lost. The first sharded forward records such masks, so that they can be refused.
    """
    forward = current_sharded_forward()
    q_length = kwargs.get("q_length", args[1] if len(args) > 1 else None)
    if forward is None or q_length != forward.plan.layout.num_tokens:
        return sdpa_mask(*args, **kwargs)
    if kwargs.get("local_size") == 0:
        return None  # the window is turned off, and attention calls that ask for it are refused
    if kwargs.get("local_size") is not None:
        forward.mask_windows.add(kwargs["local_size"])
    if forward.is_first and "mask_function" in kwargs:
        _check_mask_function(forward, kwargs["mask_function"])
    return None


def _check_mask_function(forward: ShardedForward, mask_function: Callable) -> None:
    """Probe a mask function of masking_utils.py in O(T_r), and record a window or another kind of mask.

    The mask is causal if no token sees the next one and the probed token sees all tokens before it. It is a sliding
    window if the probed token sees only the last of them. The function uses a token's index in the local row, because
    `_find_no_packed_documents` keeps transformers from looking for documents there. The probed token has the same
    index on every rank, so all ranks find the same window.
    """
    tokens = torch.arange(forward.plan.layout.num_tokens)
    last = min(sum(stop - start for _, start, stop in slices) for slices in forward.plan.plan.slices) - 1
    try:
        ahead = bool(mask_function(0, 0, tokens[:-1], tokens[1:]).any())
        seen = mask_function(0, 0, tokens[last], tokens[: last + 1]).flatten()
    except IndexError:  # the function looks up tokens of the full row
        ahead, seen = True, tokens
    count = int(seen.sum())
    if ahead or count == 0 or not bool(seen[-count:].all()):
        forward.has_other_mask = True
    elif count < len(seen):
        forward.mask_windows.add(count)


def _find_no_packed_documents(find: Callable) -> Callable:
    """Return a version of `find` that finds no packed documents inside a sharded forward.

    transformers treats every position that does not follow the previous one as the start of a packed document. Inside
    a sharded forward the plan defines the documents, while boundaries between a rank's slices, and positions that skip
    numbers, would look like further documents.
    """

    def find_packed_sequence_indices(position_ids: torch.Tensor) -> torch.Tensor | None:
        if torch.compiler.is_compiling():
            return None if sharded_forward.is_inside() else find(position_ids)
        forward = current_sharded_forward()
        if forward is not None and position_ids.shape[-1] == forward.plan.layout.num_tokens:
            return None
        return find(position_ids)

    return find_packed_sequence_indices


def _internal_name(implementation: Any) -> Any:
    """Replace "flashcp" by the internal name, in a name or a (nested) dict of names for sub-configs."""
    if isinstance(implementation, dict):
        return {key: _internal_name(value) for key, value in implementation.items()}
    return INTERNAL_NAME if implementation == NAME else implementation


def _offload_if_possible(save: Callable) -> Callable:
    """Let `offload` leave activations in place on a machine without an accelerator.

    There transformers asks for pinned memory (modeling_utils.py, `_activation_checkpointing_enable`), which PyTorch
    does not have without an accelerator.
    """

    def save_if_possible(**options: Any) -> save_on_cpu:
        return save(**options) if torch.accelerator.is_available() else save()

    return save_if_possible


def register() -> None:
    """Register the name in transformers. `import hf_flashcp` calls this, and further calls change nothing."""
    ALL_ATTENTION_FUNCTIONS.register(INTERNAL_NAME, flashcp_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(INTERNAL_NAME, flashcp_mask)
    masking_utils.find_packed_sequence_indices = replaced_once(
        masking_utils.find_packed_sequence_indices, _find_no_packed_documents
    )
    if hasattr(modeling_utils, "save_on_cpu"):
        modeling_utils.save_on_cpu = replaced_once(modeling_utils.save_on_cpu, _offload_if_possible)
    # Users choose an implementation in two ways. `from_pretrained(attn_implementation=...)`, `from_config` and config
    # classes set this property (configuration_utils.py), but `set_attn_implementation` does not.
    names = PreTrainedConfig._attn_implementation
    set_name = replaced_once(names.fset, lambda stock: lambda config, value: stock(config, _internal_name(value)))
    PreTrainedConfig._attn_implementation = property(names.fget, set_name, names.fdel, names.__doc__)
    PreTrainedModel.set_attn_implementation = replaced_once(
        PreTrainedModel.set_attn_implementation,
        lambda stock: (
            lambda self, attn_implementation, *args, **kwargs: stock(
                self, _internal_name(attn_implementation), *args, **kwargs
            )
        ),
    )
