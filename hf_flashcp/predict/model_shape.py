"""`ModelShape`: the sizes of a causal language model that determine how long it computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .hybrid_config import Mixers
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


STATE_BYTES = 4
"""Bytes per element of the states that recurrent layers exchange. They are fp32."""


@dataclass(frozen=True)
class RecurrentLayers:
    """A group of equal recurrent or convolutional layers.

    Over a slice of a document, the state of a layer's head becomes S_out = A S_in + B. The pair (A, B) is what ranks
    exchange where documents are cut. A layer that is only convolutional has no state.
    """

    count: int  # number of layers
    heads: int
    decay_elements: int  # elements of A of a slice, all heads together
    state_elements: int  # elements of B of a slice, all heads together; a state has as many
    inner_width: int  # elements per token of the mixer's output, before the last projection
    response_width: int  # elements per token of the matrix that is applied to the entry state; 0 for Mamba-2
    chunk: int  # number of tokens that the scan computes together
    halo_tokens: int  # number of tokens before a slice that the short convolution reads
    halo_width: int  # elements of each of these tokens
    flops_per_token: int  # floating-point operations per token of the scan in forward, all heads together
    continued_flops_per_token: int  # the same for what the entry state adds, in slices that continue a document
    parameters: int  # number of parameters of one layer's projections and its convolution

    @classmethod
    def of(cls, mixers: Mixers, count: int) -> RecurrentLayers:
        """Return the layers of a model from the sizes of its mixers.

        Per token and head, the chunked form of a delta rule takes the products of queries and keys with keys, the two
        products of the inverse with keys and values, three products of queries, keys and values with the state, and
        two products that are applied to values. That of Mamba-2 takes the products of C and B once per group.
        """
        heads, key_dim, value_dim = mixers.heads, mixers.key_dim, mixers.value_dim
        scan = decay = continued = 0
        if mixers.rule == "delta":
            decay = heads * key_dim * key_dim
            per_column = 6 * key_dim + 4 * mixers.chunk
            scan = heads * (value_dim * per_column + 6 * mixers.chunk * key_dim)
            # The columns that yield A, and their product with the entry state.
            continued = heads * (key_dim * per_column + 2 * key_dim * value_dim)
        elif mixers.rule == "mamba2":
            decay = heads
            scan = heads * (4 * key_dim + 2 * mixers.chunk) * value_dim + mixers.groups * 2 * mixers.chunk * key_dim
            continued = heads * 2 * key_dim * value_dim
        return cls(
            count=count,
            heads=heads,
            decay_elements=decay,
            state_elements=heads * key_dim * value_dim,
            inner_width=heads * value_dim or mixers.convolved,
            response_width=heads * key_dim if mixers.rule == "delta" else 0,
            chunk=mixers.chunk,
            halo_tokens=mixers.kernel - 1,
            halo_width=mixers.convolved,
            flops_per_token=scan,
            continued_flops_per_token=continued,
            parameters=mixers.parameters,
        )

    @property
    def summary_bytes(self) -> int:
        """Bytes of the pair (A, B) of one slice in one layer. Gradients have as many."""
        return STATE_BYTES * (self.decay_elements + self.state_elements)


@dataclass(frozen=True)
class ModelShape:
    """The linear work, the attention layers and the recurrent layers of a model.

    Args:
        linear_flops_per_token (`float`): floating-point operations per token in forward, including the head, without
            attention's products Q K and P V. They are two per parameter that a token uses; of the experts, only those
            to which the token is sent count.
        layers (`tuple[AttentionLayers, ...]`): the attention layers, grouped by window.
        recurrent (`RecurrentLayers`, *optional*): the recurrent or convolutional layers of a hybrid model.
    """

    linear_flops_per_token: float
    layers: tuple[AttentionLayers, ...]
    recurrent: RecurrentLayers | None = None

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Read the sizes from a model's config, see [`ModelConfig`].

        A layer of an unknown kind counts like the projections of full attention, without the attention.
        """
        model = ModelConfig(config)
        recurrent = None if model.mixers is None else RecurrentLayers.of(model.mixers, model.mixing_layers)
        parameters = (
            model.projecting_layers * model.projection_parameters
            + (recurrent.count * recurrent.parameters if recurrent else 0)
            + model.feed_forward.met_parameters
            + model.hidden * model.vocabulary
        )
        heads = (model.query_heads, model.kv_heads, model.key_dim, model.value_dim)
        windows = sorted(Counter(model.windows()).items(), key=lambda item: item[0] or 0)
        layers = tuple(AttentionLayers(count, *heads, window) for window, count in windows)
        return cls(2.0 * parameters, layers, recurrent)

    def state_tokens(self, itemsize: int) -> float:
        """Return how many tokens have as many bytes of KV as the summaries of one slice, summed over all layers.

        It is 0 without recurrent layers that have a state, or without attention layers.

        Args:
            itemsize (`int`): bytes per element of K and V.
        """
        return state_tokens(self.layers, self.recurrent, itemsize)


def state_tokens(layers: Sequence[AttentionLayers], recurrent: RecurrentLayers | None, itemsize: int) -> float:
    """Return the price of a received state in tokens of KV, see [`ModelShape.state_tokens`]."""
    kv_bytes = itemsize * sum(each.count * each.kv_elements_per_token for each in layers)
    return recurrent.count * recurrent.summary_bytes / kv_bytes if recurrent and kv_bytes else 0.0
