"""Small models and packed batches, for steps that run whole models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ...data import FlashCPCollator
from ...doctor.tiny import decay_slowly
from ...planning import PlanSettings


VOCABULARY = 1024


def small_llama(width: int, layers: int = 2, attention: str = "flashcp") -> LlamaForCausalLM:
    """Return a model with heads of 64 and two query heads per KV head, in fp32 on the CPU.

    Its random weights are the same in every call.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        head_dim=64,
    )
    config._attn_implementation = attention
    return LlamaForCausalLM(config).train()


HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 32,
    },
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_state": 32},
}
"""The sizes of recurrent layers, by model type: a gated delta rule, and Mamba-2."""


def small_hybrid(model_type: str, width: int, attention: str = "flashcp") -> PreTrainedModel:
    """Return a model with a recurrent layer, whose states decay slowly, and an attention layer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        head_dim=64,
        **HYBRIDS[model_type],
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    decay_slowly(model)
    return model


def random_documents(lengths: Sequence[int]) -> list[dict[str, list[int]]]:
    """Return one document with random tokens per length, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(VOCABULARY, (length,), generator=generator).tolist()} for length in lengths]


def packed_batch(lengths: Sequence[int], device: torch.device, cp_size: int = 1) -> dict[str, Any]:
    """Return the [`random_documents`] as one batch on `device`, with every document split over `cp_size` ranks."""
    batch = FlashCPCollator(settings=PlanSettings(cp_size, "per_doc"))(random_documents(lengths))
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
