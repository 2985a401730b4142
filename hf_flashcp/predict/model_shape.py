"""`ModelShape`: the sizes of a causal language model that determine how long it computes."""

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
"""The sizes in the config.json of Llama 3 8B."""


@dataclass(frozen=True)
class AttentionLayers:
    """A group of layers with the same attention."""

    count: int  # number of layers
    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None  # number of keys that a query sees, its own included; `None` for full attention

    @property
    def forward_flops_per_pair(self) -> int:
        """Floating-point operations per query head and query-key pair in forward: the products Q K and P V."""
        return 2 * (self.key_dim + self.value_dim)

    @property
    def backward_flops_per_pair(self) -> int:
        """The same in backward: Q K again, dO V, dQ, dK and dV. This is 2.5 times the forward if D_k = D_v."""
        return 2 * (3 * self.key_dim + 2 * self.value_dim)

    @property
    def kv_elements_per_token(self) -> int:
        """Number of elements of a token's keys and values in one layer: H_kv (D_k + D_v)."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class ModelShape:
    """The linear work and the attention layers of a model.

    Args:
        linear_flops_per_token (`float`): floating-point operations per token in forward, including the head, without
            attention's products Q K and P V. They are two per parameter that a token uses; of the experts, only those
            to which the token is sent count.
        layers (`tuple[AttentionLayers, ...]`): the attention layers, grouped by window.
    """

    linear_flops_per_token: float
    layers: tuple[AttentionLayers, ...]

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Read the sizes from a model's config, see [`ModelConfig`].

        A layer whose type is neither full nor sliding attention counts like the projections of full attention, without
        the attention.
        """
        model = ModelConfig(config)
        parameters = (
            model.layers * model.projection_parameters
            + 3 * model.hidden * model.feed_forward.met(model.layers)
            + model.hidden * model.vocabulary
        )
        heads = (model.query_heads, model.kv_heads, model.key_dim, model.value_dim)
        windows = sorted(Counter(model.windows()).items(), key=lambda item: item[0] or 0)
        return cls(2.0 * parameters, tuple(AttentionLayers(count, *heads, window) for window, count in windows))
