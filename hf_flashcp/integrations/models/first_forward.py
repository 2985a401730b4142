"""What only a forward shows about a model: which layers called us with the plan, and which masks were built."""

from __future__ import annotations

from transformers import PreTrainedModel

from ...distributed import require_agreement
from ...errors import UnsupportedModelError
from .per_document_mixers import count_attention_modules, needs_whole_documents
from .sharded_forward import ShardedForward


def check_first_forward(model: PreTrainedModel, forward: ShardedForward) -> None:
    """Raises an `UnsupportedModelError` on every rank if a layer attended without the plan, or if a mask would be
    dropped."""
    name, config = type(model).__name__, model.config.get_text_config()
    expected = count_attention_modules(model) if needs_whole_documents(model) else config.num_hidden_layers
    if len(forward.attention_modules) != expected:
        raise UnsupportedModelError(
            f"{len(forward.attention_modules)} attention layers of {name} called flashcp with the batch's plan, but "
            f"the model has {expected}. The others attended to this rank's tokens only, or did not attend at all: the "
            "gradients would be wrong. This model cannot be trained with context parallelism."
        )
    # Masks can depend on tokens, which ranks share, so one rank alone may see what is wrong.
    if forward.plan.group is not None:
        found = {"a mask over the causal one": forward.has_other_mask}
        advice = "They depend on the batch; train this model with cp_size 1."
        require_agreement("the model's masks", found, forward.plan.group, advice=advice, error=UnsupportedModelError)
    if forward.has_other_mask:
        raise UnsupportedModelError(
            f"{name} builds a mask of its own over the causal one, which context parallelism with flashcp does not "
            'compute. Train it with attn_implementation="sdpa" and cp_size 1.'
        )
    dropped = forward.mask_windows - forward.attention_windows
    if dropped and "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        raise UnsupportedModelError(
            f"{name} builds masks for a sliding window of {max(dropped)} tokens, but none of its attention layers "
            "asks for that window: it would be dropped. This model cannot be trained with context parallelism, unless "
            "its config turns the window off."
        )
