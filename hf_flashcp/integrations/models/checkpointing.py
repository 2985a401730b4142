"""Support for the activation checkpointing of transformers, accelerate and PyTorch.

Before transformers 5.24, it is called gradient checkpointing. From 5.24 on, arguments and methods have the new name,
while layers keep the old one (modeling_utils.py, `_set_gradient_checkpointing`): `gradient_checkpointing` says whether
a layer runs again in backward, and `_gradient_checkpointing_func` runs it. FSDP2's activation checkpointing in
accelerate wraps layers in a `CheckpointWrapper`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper, CheckpointWrapper
from transformers import PreTrainedModel, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from ...attention.checkpointing import save_attention_context_fn
from ...errors import ConfigurationError


CHECKPOINTING_ARGUMENT = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)
"""Name of the argument in the installed transformers. The name of the argument for its options ends in `_kwargs`."""


def enable_checkpointing(model: PreTrainedModel, kwargs: dict[str, Any] | None = None, **options: Any) -> None:
    """Call `model.activation_checkpointing_enable`, by its name in the installed transformers."""
    getattr(model, f"{CHECKPOINTING_ARGUMENT}_enable")(kwargs, **options)


def complete_checkpointing_options(args: TrainingArguments) -> None:
    """Check `every_n_layers`, and put [`save_attention_context_fn`] in the place of its name.

    The name is what a YAML file can hold. transformers divides by an `every_n_layers` of 0, and takes other numbers to
    mean something else, so a [`ConfigurationError`] is raised unless it is a positive integer.
    """
    options = getattr(args, f"{CHECKPOINTING_ARGUMENT}_kwargs") or {}
    if options.get("context_fn") == save_attention_context_fn:
        options["context_fn"] = save_attention_context_fn
    every = options.get("every_n_layers", 1)
    if not isinstance(every, int) or every < 1:
        raise ConfigurationError(
            f"every_n_layers in {CHECKPOINTING_ARGUMENT}_kwargs is {every!r}. It must be a positive integer: 1 for "
            "every layer, 2 for every second one."
        )


def layers_run_again(model: torch.nn.Module) -> frozenset[int]:
    """Return the `layer_idx` of attention modules that run again in backward and keep nothing from forward.

    Layers with a `context_fn`, such as `save_attention_context_fn`, are not among them, because they keep their
    attention results from forward, as layers without checkpointing do.
    """
    return frozenset(
        module.layer_idx
        for layer in _checkpointed(model)
        for module in layer.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
    )


def inside_wrappers(layer: torch.nn.Module) -> torch.nn.Module:
    """Return the layer inside checkpoint and offload wrappers."""
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
