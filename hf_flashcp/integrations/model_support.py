"""Which models train exactly, as far as class and config tell. The rest shows at the first step: an attention call
that asks for something we do not compute, or attention layers that never call us with a plan."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .registration import INTERNAL_NAME, NAME


EXACT_LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_model(model: PreTrainedModel) -> None:
    """Raises an `UnsupportedModelError` with the reason if `model` cannot be trained exactly."""
    config = model.config.get_text_config()
    name = type(model).__name__
    if not model._supports_attention_backend:
        raise UnsupportedModelError(
            f"{name} does not call its attention through transformers' attention interface, so flashcp never gets to "
            "see it. It cannot be trained with context parallelism."
        )
    if config._attn_implementation != INTERNAL_NAME:
        raise UnsupportedModelError(
            f'{name} runs with attn_implementation="{config._attn_implementation}". Load it with '
            f'attn_implementation="{NAME}", or call model.set_attn_implementation("{NAME}").'
        )
    reason = _reason_against(model, config)
    if reason:
        raise UnsupportedModelError(f"{name} {reason}. Train it with cp_size 1 and another attn_implementation.")


def _reason_against(model: PreTrainedModel, config: Any) -> str | None:
    if getattr(config, "is_encoder_decoder", False):
        return "is an encoder-decoder model; flashcp shards causal language models"
    if getattr(config, "is_causal", True) is False:
        return "attends in both directions (is_causal=False); flashcp computes causal attention inside documents"
    layer_types = set(getattr(config, "layer_types", None) or ())
    if others := sorted(layer_types - EXACT_LAYER_TYPES):
        return f"has layers of type {', '.join(others)}, whose state is not exchanged between ranks"
    if getattr(model, "_is_stateful", False):
        return "has recurrent layers, whose state is not exchanged between ranks"
    return None
