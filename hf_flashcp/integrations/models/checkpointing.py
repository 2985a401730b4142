"""Activation checkpointing, as transformers (before 5.24: gradient checkpointing), accelerate and PyTorch turn it on.

The new name is that of arguments and methods. Layers have kept theirs (modeling_utils.py,
`_set_gradient_checkpointing`): `gradient_checkpointing` says whether a layer runs again in backward, and
`_gradient_checkpointing_func` runs it. FSDP2's own activation checkpointing wraps layers in a `CheckpointWrapper`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper, CheckpointWrapper
from transformers import PreTrainedModel, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer


CHECKPOINTING_ARGUMENT = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)
"""The argument's name in the installed transformers; that of its options ends in `_kwargs`."""


def enable_checkpointing(model: PreTrainedModel, kwargs: dict[str, Any] | None = None, **options: Any) -> None:
    """`model.activation_checkpointing_enable`, by its name in the installed transformers."""
    getattr(model, f"{CHECKPOINTING_ARGUMENT}_enable")(kwargs, **options)


def layers_run_again(model: torch.nn.Module) -> frozenset[int]:
    """The `layer_idx` of attention modules that backward runs again and that hold nothing until then: not those under
    a `context_fn` (`save_attention_context_fn`), whose results are held from forward on, as without checkpointing."""
    return frozenset(
        module.layer_idx
        for layer in _checkpointed(model)
        for module in layer.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
    )


def inside_wrappers(layer: torch.nn.Module) -> torch.nn.Module:
    """The layer that checkpoint and offload wrappers call."""
    while isinstance(layer, ActivationWrapper):
        layer = layer._checkpoint_wrapped_module
    return layer


def _checkpointed(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    for module in model.modules():
        if isinstance(module, CheckpointWrapper):
            run = module.checkpoint_fn
        elif isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            run = module._gradient_checkpointing_func
        else:
            continue
        if getattr(run, "keywords", {}).get("context_fn") is None:
            yield module
