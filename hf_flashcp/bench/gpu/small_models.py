"""Small Llama models and packed batches, for steps that run whole models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ...data import FlashCPCollator
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


def random_documents(lengths: Sequence[int]) -> list[dict[str, list[int]]]:
    """Return one document with random tokens per length, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(VOCABULARY, (length,), generator=generator).tolist()} for length in lengths]


def packed_batch(lengths: Sequence[int], device: torch.device, cp_size: int = 1) -> dict[str, Any]:
    """Return the [`random_documents`] as one batch on `device`, with every document split over `cp_size` ranks."""
    batch = FlashCPCollator(settings=PlanSettings(cp_size, "per_doc"))(random_documents(lengths))
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
