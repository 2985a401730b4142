"""Support for recurrent and convolutional layers on plans that cut documents.

The mixers of these layers call module-level functions of their modeling file: a short convolution, and a scan. Those
functions are replaced there, once, by ones that pass states and tokens between ranks if they get a plan, and that call
the original otherwise. The plan arrives with the keyword arguments that a layer hands to its mixer, as in attention
layers, so it also reaches layers that run again in backward.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from ...layout import RankPlan
from ...recurrence import delta_rule, mamba2, short_convolution
from ...recurrence.package_kernels import refuse_old_package
from ..replacement import replaced_once
from . import sharded_forward
from .hybrids import mixer_class, mixer_modules, mixer_of
from .sharded_forward import current_sharded_forward


_ADAPTERS: dict[str, Callable] = {
    "causal_conv1d_fn": short_convolution,
    "torch_chunk_gated_delta_rule": delta_rule,
    "chunk_kimi_delta_attention": delta_rule,
    "mamba2_chunk_scan": mamba2,
}
# Runs convolution, scan, norm and projection in one kernel, where no state can be passed in between.
_FUSED = "mamba2_split_conv1d_scan_combined"


def pass_states(model: PreTrainedModel) -> bool:
    """Replace the functions that the model's mixers call, in their modeling files.

    Returns whether mixers hand `seq_idx`, but no other keyword arguments, to these functions (lfm2 before 5.24), so
    that the plan has to take its place.

    Raises:
        UnsupportedModelError: a function is missing, or a convolution lies outside of the mixers.
    """
    mixer, found = mixer_of(model), mixer_modules(model)
    if mixer is None:
        return False
    classes = {mixer_class(each, mixer) for each in found.values()}
    for module in {each.__module__ for each in classes}:
        namespace = sys.modules[module]
        for name in mixer.functions:
            stock = getattr(namespace, name, None)
            if stock is None:
                raise UnsupportedModelError(
                    f"{type(model).__name__} has {mixer.name} layers, but {module} has no function {name}, through "
                    "which flashcp passes states between ranks. Use the version of transformers that docs/models.md "
                    "was made with."
                )
            setattr(namespace, name, replaced_once(stock, functools.partial(_passing_states, name)))
        if (fused := getattr(namespace, _FUSED, None)) is not None:
            setattr(namespace, _FUSED, replaced_once(fused, _never_with_a_plan))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv1d) and not any(name.startswith(f"{each}.") for each in found):
            raise UnsupportedModelError(
                f"{type(model).__name__} has a convolution {name} outside of its {mixer.name} layers, which would not "
                "see the tokens of other ranks. Train it with cp_size 1 and another attn_implementation."
            )
    return any("seq_idx" in inspect.signature(each.forward).parameters for each in classes)


def check_mixers(model: PreTrainedModel, calls: Counter[str]) -> None:
    """Raise an `UnsupportedModelError` if a mixer of the first forward did not call our functions.

    `calls` are the calls of each function with the batch's plan.
    """
    mixer, found = mixer_of(model), mixer_modules(model)
    if mixer is None:
        return
    for name in mixer.functions:
        if calls[name] != len(found):
            raise UnsupportedModelError(
                f"{calls[name]} of the {len(found)} {mixer.name} layers of {type(model).__name__} called {name} with "
                "the batch's plan. The others did not exchange states, for example because they run a kernel from the "
                "hub, so gradients would be wrong. Load the model without use_kernels."
            )


def _passing_states(name: str, stock: Callable) -> Callable:
    """Return a version of a modeling file's function that runs on slices of documents if it gets a plan."""
    refuse_old_package(stock)
    adapter = _ADAPTERS[name]

    @torch.compiler.disable
    def run(plan: RankPlan, *args: Any, **kwargs: Any) -> Any:
        if (forward := current_sharded_forward()) is not None:
            forward.mixer_calls[name] += 1
        return adapter(stock, plan, *args, **kwargs)

    def function(*args: Any, flashcp_plan: RankPlan | None = None, **kwargs: Any) -> Any:
        if flashcp_plan is None and isinstance(kwargs.get("seq_idx"), RankPlan):
            flashcp_plan = kwargs.pop("seq_idx")
        if flashcp_plan is not None:
            return run(flashcp_plan, *args, **kwargs)
        if sharded_forward.is_inside():
            raise UnsupportedModelError(
                f"{name} ran inside a sharded forward, but its layer was not given flashcp_plan, so its state would "
                "leak from document to document. This model cannot be trained with context parallelism."
            )
        return stock(*args, **kwargs)

    return function


def _never_with_a_plan(stock: Callable) -> Callable:
    """Return a version of the fused function that leaves the work to the others, as it does without its package."""

    def function(*args: Any, flashcp_plan: RankPlan | None = None, **kwargs: Any) -> Any:
        return None if flashcp_plan is not None else stock(*args, **kwargs)

    return function
