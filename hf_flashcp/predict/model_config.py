"""Reads the config of a causal language model. Only this module knows the names of its entries."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

from ..errors import ConfigurationError
from ..plan.lengths import MOST_TOKENS


_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads")
_NEEDED_WITH_LATENTS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_NOT_SIZES = ("final_logit_softcapping", "model_type", "tie_word_embeddings", "use_sliding_window")
_LARGEST = 2**24


class Latents(NamedTuple):
    """The widths of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), in elements."""

    query_rank: int  # 0 if queries have no latents
    kv_rank: int
    rope_dim: int  # the part of a key head that is rotated and shared by all heads


class FeedForward(NamedTuple):
    """The widths of a model's feed-forward blocks, in elements."""

    dense: int  # width of a block without experts
    chosen: int  # number of experts per token; 0 in dense models
    expert: int  # width of an expert
    shared: int  # width of all experts that every token uses, together
    first_dense: int  # number of leading layers without experts

    def met(self, layers: int) -> int:
        """Return the width of the blocks that a token passes through, summed over layers."""
        if not self.chosen:
            return layers * self.dense
        return self.first_dense * self.dense + (layers - self.first_dense) * (self.chosen * self.expert + self.shared)


def config_value(config: Any, name: str) -> Any:
    """Return a value of a transformers config or of the dict in a config.json.

    The result is `None` if there is no such value, or if reading it fails because layers have different values.
    """
    if isinstance(config, Mapping):
        return config.get(name)
    try:
        return getattr(config, name, None)
    except Exception:
        return None


class ModelConfig:
    """A model's config, with values checked and defaults filled in. For a multimodal model, the text model's.

    It covers dense and mixture-of-experts decoders with grouped-query or multi-head latent attention.

    Args:
        config (`PreTrainedConfig` or `Mapping`): a transformers config, or the dict in a config.json.

    Raises:
        ConfigurationError: a needed value is missing or, when it is read, has the wrong type.
    """

    def __init__(self, config: Any):
        if isinstance(config, Mapping):
            text = config.get("text_config")
            self._config: Any = text if isinstance(text, Mapping) else config
        else:
            self._config = config.get_text_config() if hasattr(config, "get_text_config") else config
        needed = _NEEDED + _NEEDED_WITH_LATENTS if self.read("kv_lora_rank") else _NEEDED
        missing = [name for name in needed if not self.read(name)]
        if missing:
            raise ConfigurationError(
                f"The model's config has no {', '.join(missing)}, which predictions need. Pass the config of a causal "
                "language model with transformers' usual names."
            )
        self.hidden, self.layers, self.query_heads = (self.read(name) for name in _NEEDED)

    def read(self, name: str) -> Any:
        """Return the checked value of an entry, or `None` if the config does not have it."""
        value = config_value(self._config, name)
        if name == "layer_types":
            sound, kind = isinstance(value, (list, tuple)) and {*map(type, value)} <= {str}, "a list of names"
        elif name in _NOT_SIZES:
            sound, kind = isinstance(value, (str, int, float)), "a name, a number, true or false"
        else:
            most = MOST_TOKENS if name == "sliding_window" else _LARGEST
            sound, kind = type(value) is int and 0 <= value <= most, f"a whole number from 0 to {most:,}"
        if value is not None and not sound:
            raise ConfigurationError(f"The model's config has {name} = {reprlib.repr(value)}: it must be {kind}.")
        return value

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary; 0 if the config does not have it."""
        return self.read("vocab_size") or 0

    @cached_property
    def latents(self) -> Latents | None:
        """Widths of attention's latents, or `None` if it has none."""
        if not self.read("kv_lora_rank"):
            return None
        return Latents(self.read("q_lora_rank") or 0, self.read("kv_lora_rank"), self.read("qk_rope_head_dim"))

    @property
    def kv_heads(self) -> int:
        """Number of KV heads that attention sees. With latents there are as many as query heads."""
        return self.query_heads if self.latents else self.read("num_key_value_heads") or self.query_heads

    @property
    def key_dim(self) -> int:
        """Elements of a key head."""
        if self.latents:
            return self.read("qk_nope_head_dim") + self.latents.rope_dim
        return self.read("head_dim") or self.hidden // self.query_heads

    @property
    def value_dim(self) -> int:
        """Elements of a value head."""
        return self.read("v_head_dim") if self.latents else self.key_dim

    @property
    def projection_parameters(self) -> int:
        """Number of parameters in the projections of one attention layer."""
        heads, key_dim, value_dim = self.query_heads, self.key_dim, self.value_dim
        if self.latents is None:
            return self.hidden * key_dim * 2 * (heads + self.kv_heads)
        query_rank, kv_rank, rope_dim = self.latents
        queries = (self.hidden + heads * key_dim) * query_rank if query_rank else self.hidden * heads * key_dim
        keys_and_values = self.hidden * (kv_rank + rope_dim) + kv_rank * heads * (key_dim - rope_dim + value_dim)
        return queries + keys_and_values + heads * value_dim * self.hidden

    @cached_property
    def feed_forward(self) -> FeedForward:
        """Widths of the feed-forward blocks."""
        dense = self.read("intermediate_size") or 4 * self.hidden
        expert = self.read("moe_intermediate_size") or dense
        shared = expert * (self.read("n_shared_experts") or 0) + (self.read("shared_expert_intermediate_size") or 0)
        chosen = self.read("num_experts_per_tok") or 0
        return FeedForward(dense, chosen, expert, shared, self.read("first_k_dense_replace") or 0)

    @property
    def experts(self) -> int:
        """Number of experts in a layer that has experts."""
        counts = map(self.read, ("num_local_experts", "num_experts", "n_routed_experts"))
        return next(filter(None, counts), self.feed_forward.chosen)

    def windows(self) -> list[int | None]:
        """Return the sliding window of each attention layer, `None` for full attention. Other layers are left out."""
        window, types = self.read("sliding_window"), self.read("layer_types")
        if types:
            kinds = [kind for kind in types if kind in ("full_attention", "sliding_attention")]
            return [window if kind == "sliding_attention" else None for kind in kinds]
        if window and self.read("use_sliding_window") is not False:
            return [window] * self.layers
        return [None] * self.layers
