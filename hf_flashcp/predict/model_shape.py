"""The sizes of a causal language model that decide how long it computes, read from its transformers config."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from .model_config import ModelConfig


LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
"""The sizes in Llama 3 8B's config.json."""


@dataclass(frozen=True)
class AttentionLayers:
    """Layers with the same attention; a query sees `window` keys, itself included, or all before it."""

    count: int
    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    @property
    def forward_flops_per_pair(self) -> int:
        """Floating-point operations per head and query-key pair: the products Q K and P V."""
        return 2 * (self.key_dim + self.value_dim)

    @property
    def backward_flops_per_pair(self) -> int:
        """The same of the backward: Q K again, dO V, dQ, dK and dV, 2.5 times the forward where D_k = D_v."""
        return 2 * (3 * self.key_dim + 2 * self.value_dim)

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of a token's keys and values: H_kv (D_k + D_v)."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class ModelShape:
    """Linear work and attention of a model: floating-point operations of a forward through everything but attention's
    Q K and P V, which are two for each parameter that a token meets (of experts only those it is sent to), the
    language model's head included; and layers with attention, grouped by window."""

    linear_flops_per_token: float
    layers: tuple[AttentionLayers, ...]

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Reads a model's config, see [`ModelConfig`]. Layers of other types than full and sliding attention count as
        full attention's projections without attention."""
        model = ModelConfig(config)
        parameters = (
            model.layers * model.projection_parameters
            + 3 * model.hidden * model.feed_forward.met(model.layers)
            + model.hidden * model.vocabulary
        )
        heads = (model.query_heads, model.kv_heads, model.key_dim, model.value_dim)
        windows = sorted(Counter(model.windows()).items(), key=lambda item: item[0] or 0)
        return cls(2.0 * parameters, tuple(AttentionLayers(count, *heads, window) for window, count in windows))
