"""Reads the config of a causal language model. Only this module and `hybrid_config` know the names of its entries."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

from ..errors import ConfigurationError
from ..plan.lengths import MOST_TOKENS
from .hybrid_config import ATTENTION, FAMILIES, MIXING, Mixers, layer_kinds, mixers_of


_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads")
_NEEDED_WITH_LATENTS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_LARGEST = 2**24

# Other names of entries, which some families use in their config.json.
_OTHER_NAMES = {
    "first_k_dense_replace": ("num_dense_layers",),
    "head_dim": ("attention_head_dim",),
    "intermediate_size": ("block_ff_dim",),
    "n_shared_experts": ("num_shared_experts",),
    "num_experts_per_tok": ("num_experts_per_token",),
}
_NOT_SIZES = (
    "block_auto_adjust_ff_dim",
    "final_logit_softcapping",
    "model_type",
    "tie_word_embeddings",
    "use_attention_gate",
    "use_shared_attention_adapter",
    "use_sliding_window",
)
_LISTS_OF_NAMES = ("layer_types", "layers_block_type", "mlp_layer_types")
_LISTS_OF_LAYERS = ("attn_layer_indices", "full_attn_idxs", "hybrid_layer_ids")
_SIZES_OF_KIMI = ("head_dim", "num_heads", "short_conv_kernel_size")

# Properties of model types that their config.json does not state.
_NOT_GATED = ("nemotron_h", "starcoder2")
_GATED_ATTENTION = ("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")


class Latents(NamedTuple):
    """The widths of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), in elements."""

    query_rank: int  # 0 if queries have no latents
    kv_rank: int
    rope_dim: int  # the part of a key head that is rotated and shared by all heads


class FeedForward(NamedTuple):
    """A model's feed-forward blocks. Widths are in elements."""

    hidden: int
    gated: bool  # whether a block has a third matrix, for the gate
    dense: int  # width of a block without experts
    chosen: int  # number of experts per token; 0 in dense models
    expert: int  # width of an expert
    shared: int  # width of all experts that every token uses, together
    latent: int  # elements of a token that an expert reads, fewer than `hidden` if they are projected first
    dense_layers: int  # number of layers without experts
    sparse_layers: int  # number of layers with experts

    @property
    def met(self) -> int:
        """Width of the blocks that a token passes through, summed over layers."""
        return self.dense_layers * self.dense + self.sparse_layers * (self.chosen * self.expert + self.shared)

    @property
    def met_parameters(self) -> int:
        """Number of parameters that a token uses in all blocks, without the routers."""
        return self.dense_layers * self.dense_parameters + self.sparse_layers * self.sparse_parameters(self.chosen)

    @property
    def dense_parameters(self) -> int:
        """Number of parameters of a block without experts."""
        return (2 + self.gated) * self.hidden * self.dense

    def sparse_parameters(self, experts: int) -> int:
        """Return the number of parameters of a block with some number of experts, without its router."""
        projections = 2 * self.hidden * self.latent if self.latent != self.hidden else 0
        return (2 + self.gated) * (experts * self.expert * self.latent + self.shared * self.hidden) + projections


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


def _wrong(name: str, value: Any) -> str | None:
    """Return what an entry must be, or `None` if its value is of that kind."""
    if name in _LISTS_OF_NAMES:
        sound, kind = _is_list(value, str), "a list of names"
    elif name in _LISTS_OF_LAYERS:
        sound, kind = _is_list(value, int), "a list of whole numbers"
    elif name == "linear_attn_config":
        sound = isinstance(value, Mapping) and not any(_wrong(size, value.get(size, 1)) for size in _SIZES_OF_KIMI)
        sound, kind = sound and _is_list(value.get("full_attn_layers", []), int), "a dict of sizes and lists of layers"
    elif name == "hybrid_override_pattern":
        sound, kind = isinstance(value, str), "a string of letters"
    elif name in _NOT_SIZES:
        sound, kind = isinstance(value, (str, int, float)), "a name, a number, true or false"
    elif name == "block_ffn_dim_multiplier":
        sound, kind = type(value) in (int, float) and 0 <= value <= _LARGEST, f"a number from 0 to {_LARGEST:,}"
    else:
        most = MOST_TOKENS if name == "sliding_window" else _LARGEST
        sound, kind = type(value) is int and 0 <= value <= most, f"a whole number from 0 to {most:,}"
    return None if sound else kind


def _is_list(value: Any, of: type) -> bool:
    return isinstance(value, (list, tuple)) and {*map(type, value)} <= {of}


def has_known_mixers(config: Any) -> bool:
    """Return whether a config is that of a family whose recurrent or convolutional layers are known."""
    return config_value(_text_config(config), "model_type") in FAMILIES


def _text_config(config: Any) -> Any:
    """Return the config of the text model in a multimodal one, or the config itself."""
    if isinstance(config, Mapping):
        text = config.get("text_config")
        return text if isinstance(text, Mapping) else config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


class ModelConfig:
    """A model's config, with values checked and defaults filled in. For a multimodal model, the text model's.

    It covers dense and mixture-of-experts decoders with grouped-query or multi-head latent attention, and hybrid
    models, in which layers of known families are recurrent or convolutional.

    Args:
        config (`PreTrainedConfig` or `Mapping`): a transformers config, or the dict in a config.json.

    Raises:
        ConfigurationError: a needed value is missing or, when it is read, has the wrong type.
    """

    def __init__(self, config: Any):
        self._config: Any = _text_config(config)
        needed = _NEEDED + _NEEDED_WITH_LATENTS if self.read("kv_lora_rank") else _NEEDED
        self.model_type: str | None = self.read("model_type")
        listed = self.read("layers_block_type") or self.read("hybrid_override_pattern")
        missing = [name for name in needed if not (self.read(name) or name == "num_hidden_layers" and listed)]
        if missing:
            raise ConfigurationError(
                f"The model's config has no {', '.join(missing)}, which predictions need. Pass the config of a causal "
                "language model with transformers' usual names."
            )
        self.hidden, self.query_heads = self.read("hidden_size"), self.read("num_attention_heads")
        self.kinds = layer_kinds(self.model_type, self.read)
        self.layers = self.read("num_hidden_layers") or len(self.kinds or ())

    def read(self, name: str) -> Any:
        """Return the checked value of an entry, or `None` if the config does not have it."""
        names = (name, *_OTHER_NAMES.get(name, ()))
        values = {each: value for each in names if (value := config_value(self._config, each)) is not None}
        for given, value in values.items():
            kind = _wrong(name, value)
            if kind:
                raise ConfigurationError(f"The model's config has {given} = {reprlib.repr(value)}: it must be {kind}.")
        return next(iter(values.values()), None)

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
        read = 2 * self.hidden if self.model_type == "zamba2" else self.hidden
        return self.read("head_dim") or read // self.query_heads

    @property
    def value_dim(self) -> int:
        """Elements of a value head."""
        return self.read("v_head_dim") if self.latents else self.key_dim

    @property
    def projection_parameters(self) -> int:
        """Number of parameters in the projections of one attention layer."""
        heads, key_dim, value_dim = self.query_heads, self.key_dim, self.value_dim
        gate = 0
        if self.model_type in _GATED_ATTENTION:
            gate = self.hidden * heads * key_dim
        elif self.model_type == "bailing_hybrid" or self.model_type == "lfm3" and self._gates_heads:
            gate = self.hidden * heads
        if self.model_type == "zamba2":
            return self._zamba_projections
        if self.latents is None:
            return self.hidden * key_dim * 2 * (heads + self.kv_heads) + gate
        query_rank, kv_rank, rope_dim = self.latents
        queries = (self.hidden + heads * key_dim) * query_rank if query_rank else self.hidden * heads * key_dim
        keys_and_values = self.hidden * (kv_rank + rope_dim) + kv_rank * heads * (key_dim - rope_dim + value_dim)
        return queries + keys_and_values + heads * value_dim * self.hidden + gate

    @property
    def _gates_heads(self) -> bool:
        return self.read("use_attention_gate") is not False

    @property
    def _zamba_projections(self) -> int:
        """Parameters beside the feed-forward block: attention reads two hidden states, and a linear layer follows.

        Adapters are counted, too.
        """
        rank = self.read("adapter_rank") or 128
        adapters = rank * (self.hidden + 2 * self.feed_forward.dense)
        adapters += 3 * 2 * 2 * self.hidden * rank * bool(self.read("use_shared_attention_adapter"))
        return self._zamba_attention + self.hidden**2 + adapters

    @property
    def _zamba_attention(self) -> int:
        return self.hidden * self.key_dim * (3 * self.query_heads + 4 * self.kv_heads)

    @property
    def repeated_parameters(self) -> int:
        """Number of parameters in layers that share them with an earlier layer."""
        if self.model_type != "zamba2":
            return 0
        repeated = max(self.feed_forward.dense_layers - (self.read("num_mem_blocks") or 1), 0)
        return repeated * (self._zamba_attention + self.feed_forward.dense_parameters)

    @cached_property
    def feed_forward(self) -> FeedForward:
        """The feed-forward blocks."""
        dense = self._dense_width
        expert = self.read("moe_intermediate_size") or dense
        shared = expert * (self.read("n_shared_experts") or 0) + (self.read("shared_expert_intermediate_size") or 0)
        shared = self.read("moe_shared_expert_intermediate_size") or shared
        chosen, latent = self.read("num_experts_per_tok") or 0, self.read("moe_latent_size") or self.hidden
        if beside_experts := self.read("shared_intermediate_size"):  # Granite
            shared, chosen = beside_experts, chosen if self.read("num_local_experts") else 0
            dense = dense if chosen else beside_experts
        sizes = self.hidden, self.model_type not in _NOT_GATED, dense, chosen, expert, shared, latent
        return FeedForward(*sizes, *self._blocks(chosen))

    @property
    def _dense_width(self) -> int:
        """Width of a feed-forward block without experts."""
        dense = self.read("intermediate_size") or 4 * self.hidden
        if self.model_type == "lfm2" and self.read("block_auto_adjust_ff_dim") is not False:
            factor, multiple = self.read("block_ffn_dim_multiplier"), self.read("block_multiple_of") or 256
            dense = 2 * dense // 3
            dense = -(-int((1 if factor is None else factor) * dense) // multiple) * multiple
        return dense

    def _blocks(self, chosen: int) -> tuple[int, int]:
        """Return the numbers of feed-forward blocks without and with experts."""
        kinds, of_blocks = self.kinds or [], self.read("mlp_layer_types")
        if self.model_type == "nemotron_h":
            return kinds.count("mlp"), kinds.count("moe")
        if self.model_type == "zamba2":
            return kinds.count("hybrid"), 0
        if not chosen:
            return self.layers, 0
        leading = of_blocks.count("dense") if of_blocks else self.read("first_k_dense_replace") or 0
        return min(leading, self.layers), max(self.layers - leading, 0)

    @cached_property
    def mixers(self) -> Mixers | None:
        """Sizes of the recurrent or convolutional mixers, or `None` if the model's family is not known to have any."""
        return mixers_of(self.model_type, self.read) if self.mixing_layers else None

    @property
    def mixing_layers(self) -> int:
        """Number of layers with a recurrent or convolutional mixer."""
        return sum(kind in MIXING for kind in self.kinds or ())

    @property
    def projecting_layers(self) -> int:
        """Number of layers with the projections of attention.

        A layer of an unknown kind counts like the projections of full attention, without the attention.
        """
        return self.layers if self.mixers is None else sum(kind in ATTENTION for kind in self.kinds or ())

    @property
    def experts(self) -> int:
        """Number of experts in a layer that has experts."""
        counts = map(self.read, ("num_local_experts", "num_experts", "n_routed_experts"))
        return next(filter(None, counts), self.feed_forward.chosen)

    def windows(self) -> list[int | None]:
        """Return the sliding window of each attention layer, `None` for full attention. Other layers are left out."""
        window = self.read("sliding_window")
        if self.kinds:
            kinds = [kind for kind in self.kinds if kind in ATTENTION]
            return [window if kind == "sliding_attention" else None for kind in kinds]
        if window and self.read("use_sliding_window") is not False:
            return [window] * self.layers
        return [None] * self.layers
