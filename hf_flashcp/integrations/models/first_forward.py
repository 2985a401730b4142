"""Checks in the first sharded forward: whether all attention layers used the plan, and which masks were built."""

from __future__ import annotations

from transformers import PreTrainedModel

from ...distributed import require_agreement
from ...errors import UnsupportedModelError
from .hybrids import mixer_of
from .per_slice_mixers import count_attention_modules
from .recurrent_layers import check_mixers
from .sharded_forward import ShardedForward


def check_first_forward(model: PreTrainedModel, forward: ShardedForward) -> None:
    """Raise an `UnsupportedModelError` on every rank if a layer attended without the plan or a mask would be lost."""
    name, config = type(model).__name__, model.config.get_text_config()
    expected = count_attention_modules(model) if mixer_of(model) else config.num_hidden_layers
    if len(forward.kernels) != expected:
        raise UnsupportedModelError(
            f"{len(forward.kernels)} attention layers of {name} called flashcp with the batch's plan, but "
            f"the model has {expected}. The others did not attend, or only to this rank's tokens, so gradients would "
            "be wrong. This model cannot be trained with context parallelism."
        )
    check_mixers(model, forward.mixer_calls)
    # Masks can depend on tokens, and every rank has different tokens, so perhaps only one rank finds the problem.
    if forward.plan.group is not None:
        found = {"a mask over the causal one": forward.has_other_mask}
        advice = "Masks that depend on the batch are not supported: train this model with cp_size 1."
        require_agreement("the model's masks", found, forward.plan.group, advice=advice, error=UnsupportedModelError)
    if forward.has_other_mask:
        raise UnsupportedModelError(
            f"{name} builds a mask of its own over the causal one, which context parallelism with flashcp does not "
            'support. Train it with attn_implementation="sdpa" and cp_size 1.'
        )
    dropped = forward.mask_windows - forward.attention_windows
    if dropped and "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        raise UnsupportedModelError(
            f"{name} builds masks for a sliding window of {max(dropped)} tokens, but none of its attention layers "
            "asks for that window, so it would be lost. Turn the window off in the config, or train this model with "
            "cp_size 1."
        )
