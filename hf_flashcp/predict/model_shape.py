"""The sizes of a causal language model that decide how long it computes, read from its transformers config."""

from __future__ import annotations

import functools
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigurationError
from ..plan.lengths import MOST_TOKENS


LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
"""The sizes in Llama 3 8B's config.json."""

_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads")
_NEEDED_WITH_LATENTS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_SIZES = (
    *_NEEDED,
    *_NEEDED_WITH_LATENTS,
    "first_k_dense_replace",
    "head_dim",
    "intermediate_size",
    "kv_lora_rank",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts",
    "num_experts_per_tok",
    "num_key_value_heads",
    "num_local_experts",
    "q_lora_rank",
    "shared_expert_intermediate_size",
    "sliding_window",
    "vocab_size",
)
_LARGEST = 2**24


@dataclass(frozen=True)
class AttentionLayers:
    """Layers with the same attention.

    Args:
        count (`int`): how many there are.
        query_heads (`int`): H_q.
        kv_heads (`int`): H_kv.
        key_dim (`int`): D_k of a head.
        value_dim (`int`): D_v of a head.
        window (`int`, *optional*): keys that a query sees, itself included; all before it if `None`.
    """

    count: int
    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    @property
    def forward_flops_per_pair(self) -> int:
        """Of one head and query-key pair: the products Q K and P V."""
        return 2 * (self.key_dim + self.value_dim)

    @property
    def backward_flops_per_pair(self) -> int:
        """Q K again, dO V, and the products for dQ, dK and dV: 2.5 times the forward where D_k = D_v."""
        return 2 * (3 * self.key_dim + 2 * self.value_dim)

    @property
    def kv_elements_per_token(self) -> int:
        """H_kv (D_k + D_v)."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class ModelShape:
    """Linear work and attention of a model.

    Args:
        linear_flops_per_token (`float`): of a forward through everything but attention's Q K and P V: two for each
            parameter that a token meets (of experts only those it is sent to), the language model's head included.
        layers (`tuple[AttentionLayers, ...]`): grouped by window.
    """

    linear_flops_per_token: float
    layers: tuple[AttentionLayers, ...]

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Reads a transformers config, or the dict in a config.json: dense and mixture-of-experts decoders with
        grouped-query or multi-head latent attention, full and sliding layers. Layers of other types (recurrent ones)
        count as full attention's projections without attention.

        Raises:
            ConfigurationError: sizes that are needed are missing, or what is there is none.
        """
        read = config_reader(config)
        needed = _NEEDED + _NEEDED_WITH_LATENTS if read("kv_lora_rank") else _NEEDED
        missing = [name for name in needed if not read(name)]
        if missing:
            raise ConfigurationError(
                f"The model's config has no {', '.join(missing)}, from which its times are predicted. Pass the config "
                "of a causal language model with transformers' usual names."
            )
        hidden, count, heads = (read(name) for name in _NEEDED)
        kv_heads = read("num_key_value_heads") or heads
        if read("kv_lora_rank"):
            key_dim = read("qk_nope_head_dim") + read("qk_rope_head_dim")
            value_dim, kv_heads = read("v_head_dim"), heads
            projections = latent_projections(read, hidden, heads)
        else:
            key_dim = value_dim = read("head_dim") or hidden // heads
            projections = hidden * key_dim * (2 * heads + 2 * kv_heads)
        parameters = (
            count * projections
            + 3 * hidden * FeedForward.from_config(read, hidden).met(count)
            + hidden * (read("vocab_size") or 0)
        )
        windows = Counter(_windows(read, count))
        layers = tuple(
            AttentionLayers(number, heads, kv_heads, key_dim, value_dim, window)
            for window, number in sorted(windows.items(), key=lambda item: item[0] or 0)
        )
        return cls(2.0 * parameters, layers)


def config_reader(config: Any) -> Callable[[str], Any]:
    """`read(name)` of a transformers config, or of the dict in a config.json: of its text model, where it has several.
    `None` for what is not there; a ConfigurationError for what cannot be meant."""
    if isinstance(config, Mapping):
        text = config.get("text_config")
        values = (text if isinstance(text, Mapping) else config).get
    else:
        values = functools.partial(getattr, config.get_text_config() if hasattr(config, "get_text_config") else config)

    def read(name: str) -> Any:
        value = values(name, None)
        if name in _SIZES:
            most = MOST_TOKENS if name == "sliding_window" else _LARGEST
            sound, kind = type(value) is int and 0 <= value <= most, f"a whole number from 0 to {most:,}"
        elif name == "layer_types":
            sound, kind = isinstance(value, (list, tuple)) and {*map(type, value)} <= {str}, "a list of names"
        else:
            sound, kind = isinstance(value, (str, int, float)), "a name, a number, true or false"
        if value is not None and not sound:
            raise ConfigurationError(f"The model's config has {name} = {reprlib.repr(value)}: it must be {kind}.")
        return value

    return read


def latent_projections(read, hidden: int, heads: int) -> int:
    """Parameters of multi-head latent attention's projections (DeepSeek-V2, arXiv 2405.04434)."""
    rank, rope, nope, value = (
        read(name) for name in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    )
    query = heads * (nope + rope)
    queries = hidden * read("q_lora_rank") + read("q_lora_rank") * query if read("q_lora_rank") else hidden * query
    return queries + hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden


@dataclass(frozen=True)
class FeedForward:
    """Widths of a model's feed-forward blocks, read from its config.

    Args:
        dense (`int`): of a block without experts.
        chosen (`int`): experts that a token is sent to; 0 in dense models.
        expert (`int`): of an expert.
        shared (`int`): of the experts that every token meets, together.
        first_dense (`int`): leading layers without experts.
    """

    dense: int
    chosen: int
    expert: int
    shared: int
    first_dense: int

    @classmethod
    def from_config(cls, read: Callable[..., Any], hidden: int) -> FeedForward:
        dense = read("intermediate_size") or 4 * hidden
        expert = read("moe_intermediate_size") or dense
        shared = expert * (read("n_shared_experts") or 0) + (read("shared_expert_intermediate_size") or 0)
        chosen = read("num_experts_per_tok") or 0
        return cls(dense, chosen, expert, shared, read("first_k_dense_replace") or 0)

    def met(self, layers: int) -> int:
        """What a token meets in all layers together."""
        if not self.chosen:
            return layers * self.dense
        return self.first_dense * self.dense + (layers - self.first_dense) * (self.chosen * self.expert + self.shared)


def _windows(read, count: int) -> list[int | None]:
    """The window of each layer with attention."""
    window, types = read("sliding_window"), read("layer_types")
    if types:
        kinds = [kind for kind in types if kind in ("full_attention", "sliding_attention")]
        return [window if kind == "sliding_attention" else None for kind in kinds]
    if window and read("use_sliding_window") is not False:
        return [window] * count
    return [None] * count
