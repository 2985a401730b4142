"""A check of a model's class and config: whether it trains exactly with context parallelism.

The first step checks the rest: whether attention calls ask for something that is not computed, and whether all
attention layers use the plan.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from ..registration import INTERNAL_NAME, NAME
from .hybrids import mixer_of


EXACT_LAYER_TYPES = {"full_attention", "sliding_attention"}
_FROM_PADDING = "counts positions from pad_token_id + 1, but the position_ids of a sharded batch count from 0"
POSITIONS_OF_THEIR_OWN = {
    **dict.fromkeys(
        ("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
        _FROM_PADDING,
    ),
    "llama4_text": "scales queries by their index in the row that a rank holds, and not by position_ids",
}
_REFUSED_HEADS = {
    "ForMultipleChoice": "scores several sequences at once, but flashcp shards causal language models and classifiers",
    "ForQuestionAnswering": "has a loss over all positions of a padded row, which depends on the padding",
}


def check_model(model: PreTrainedModel) -> None:
    """Raise an `UnsupportedModelError` with the reason if `model` cannot be trained exactly."""
    config = model.config.get_text_config()
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder model, but flashcp shards causal language models, which only have a "
            "decoder. Train it without flashcp."
        )
    if not (model._supports_attention_backend or mixer_of(model)):
        raise UnsupportedModelError(
            f"{name} does not call its attention through transformers' attention interface, so flashcp cannot replace "
            "it. It cannot be trained with context parallelism."
        )
    if config._attn_implementation != INTERNAL_NAME:
        raise UnsupportedModelError(
            f'{name} runs with attn_implementation="{config._attn_implementation}". Load it with '
            f'attn_implementation="{NAME}", or call model.set_attn_implementation("{NAME}").'
        )
    for key in model.config.sub_configs:
        sub_config = getattr(model.config, key, None) if "vision" in key or "audio" in key else None
        if sub_config is not None and sub_config._attn_implementation == INTERNAL_NAME:
            raise UnsupportedModelError(
                f"{name} has flashcp in its {type(sub_config).__name__} too, but only text is sharded. Load it with "
                'attn_implementation={"text_config": "flashcp", "vision_config": "sdpa"}, with a name for each '
                "sub-config."
            )
    reason = _reason_against(model, config)
    if reason:
        raise UnsupportedModelError(f"{name} {reason}. Train it with cp_size 1 and another attn_implementation.")


def _reason_against(model: PreTrainedModel, config: Any) -> str | None:
    if head := next((head for head in _REFUSED_HEADS if type(model).__name__.endswith(head)), None):
        return _REFUSED_HEADS[head]
    if getattr(model, "is_quantized", False):
        return "has quantized weights, for which exactness is not tested: leave quantization_config out"
    if getattr(config, "is_causal", True) is False:
        return "attends in both directions (is_causal=False), but flashcp computes causal attention only"
    if reason := POSITIONS_OF_THEIR_OWN.get(config.model_type):
        return reason
    if layer_drop := getattr(config, "layerdrop", 0) or getattr(config, "layer_drop", 0):
        return f"drops layers at random ({layer_drop}), but all ranks must run the same layers: set layerdrop to 0"
    if mixer_of(model):
        return None
    layer_types = set(getattr(config, "layer_types", None) or ())
    if others := sorted(layer_types - EXACT_LAYER_TYPES):
        return f"has layers of type {', '.join(others)}, which flashcp does not support"
    if getattr(model, "_is_stateful", False):
        return "has recurrent layers of a kind whose states flashcp does not pass between ranks"
    return None
