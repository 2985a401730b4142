"""What of a causal language model decides how much memory its training takes, read from its transformers config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .model_shape import FeedForward, ModelShape, config_reader, latent_projections


# Where a config.json leaves out what its model type has as the default.
_TIED = ("cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "smollm3", "starcoder2")
_NORM_OF_EACH_HEAD = ("exaone4", "gemma3_text", "qwen3", "qwen3_moe")
_NORM_OF_ALL_HEADS = ("olmo2", "olmo3")
_FOUR_NORMS = ("gemma2", "gemma3_text", "glm4")
_NOT_GATED = ("starcoder2",)
_NORM_IN_FP32 = ("gemma", "gemma2", "gemma3_text", "gpt_oss", "olmo2", "olmo3")
_LAYER_NORM = ("starcoder2",)
# Elements that a feed-forward block keeps for each of its width: gate, activated gate, up and product, or what goes
# into the activation and what comes out; GPT-OSS clamps both, multiplies twice and adds one.
_KEPT_WIDTHS = {"starcoder2": 2, "gpt_oss": 7}


@dataclass(frozen=True)
class MemoryShape:
    """Sizes of a model: parameters, and widths of what its layers keep for backward.

    Args:
        layers (`int`): decoder layers.
        hidden (`int`): width of the residual stream.
        vocabulary (`int`): rows of the embedding, and logits of a token.
        tied (`bool`): whether the head is the embedding.
        query_heads, kv_heads, key_dim, value_dim (`int`): of attention.
        normed_width (`int`): elements of a token's queries and keys that a norm of their own sees, 0 without one.
        latent_width (`int`): of the normed latents of multi-head latent attention, 0 without it.
        latent_keys (`int`): elements of a token's keys that its values' storage holds as well, 0 without it.
        norms (`int`): norms of a layer over the hidden size.
        intermediate (`int`): width of the feed-forward block that a token meets: of mixtures of experts, of all the
            experts it is sent to and the shared ones together; the mean over layers.
        gated (`bool`): whether the block has a gate beside its up projection.
        kept_widths (`int`): elements that it keeps for backward, over its width.
        norm (`str`): what norms keep, see [`norm_bytes`].
        softcapped (`bool`): whether logits are, which keeps them once more.
        experts_per_token (`float`): experts a token is sent to, the mean over layers; 0 in dense models.
        layer_parameters (`float`): of a layer, all its experts included; the mean over layers.
    """

    layers: int
    hidden: int
    vocabulary: int
    tied: bool
    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    normed_width: int
    latent_width: int
    latent_keys: int
    norms: int
    intermediate: float
    gated: bool
    kept_widths: int
    norm: str
    softcapped: bool
    experts_per_token: float
    layer_parameters: float

    @classmethod
    def from_config(cls, config: Any) -> MemoryShape:
        """Reads a transformers config, or the dict in a config.json. Layers are taken for those of a Llama, with the
        norms, gates and experts of the model types that are known to differ.

        Raises:
            ConfigurationError: sizes that are needed are missing.
        """
        attention = ModelShape.from_config(config)  # checks the names
        read = config_reader(config)
        hidden, layers, kind = read("hidden_size"), read("num_hidden_layers"), read("model_type")
        heads = read("num_attention_heads")
        if attention.layers:
            first = attention.layers[0]
            kv_heads, key_dim, value_dim = first.kv_heads, first.key_dim, first.value_dim
        else:
            kv_heads, key_dim = read("num_key_value_heads") or heads, read("head_dim") or hidden // heads
            value_dim = key_dim
        tied = read("tie_word_embeddings")
        block = _feed_forward(read, hidden, layers, gated=kind not in _NOT_GATED)
        if read("kv_lora_rank"):
            projections = latent_projections(read, hidden, heads)
        else:
            projections = hidden * key_dim * (2 * heads + 2 * kv_heads)
        norms = 4 if kind in _FOUR_NORMS else 2
        has_norm = kind in _NORM_OF_EACH_HEAD + _NORM_OF_ALL_HEADS
        return cls(
            layers=layers,
            hidden=hidden,
            vocabulary=read("vocab_size") or 0,
            tied=kind in _TIED if tied is None else bool(tied),
            query_heads=heads,
            kv_heads=kv_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            normed_width=(heads + kv_heads) * key_dim if has_norm else 0,
            latent_width=(read("q_lora_rank") or 0) + read("kv_lora_rank") if read("kv_lora_rank") else 0,
            latent_keys=heads * read("qk_nope_head_dim") if read("kv_lora_rank") else 0,
            norms=norms,
            gated=kind not in _NOT_GATED,
            kept_widths=_KEPT_WIDTHS.get(kind, 4),
            norm="fp32" if kind in _NORM_IN_FP32 else "layer" if kind in _LAYER_NORM else "cast",
            softcapped=bool(read("final_logit_softcapping")),
            layer_parameters=projections + block.pop("parameters") + norms * hidden,
            **block,
        )

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding, and as many of a head that is not tied to it."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> float:
        """All of them, biases left out."""
        return self.layers * self.layer_parameters + (1 if self.tied else 2) * self.embedding_parameters + self.hidden

    @property
    def kv_width(self) -> int:
        """H_kv (D_k + D_v): elements of a token's keys and values."""
        return self.kv_heads * (self.key_dim + self.value_dim)

    @property
    def query_width(self) -> int:
        """H_q (D_k + D_v): elements of a token's queries and attention output."""
        return self.query_heads * (self.key_dim + self.value_dim)

    def norm_bytes(self, width: float, itemsize: int) -> float:
        """Bytes a token that a norm keeps of `width` elements: its input, in fp32, and the normed input, in the
        input's dtype ("cast", as Llama's) or in fp32 ("fp32", as Gemma's). PyTorch's own ("layer") keeps its input."""
        return width * {"cast": 4 + itemsize, "fp32": 8, "layer": itemsize}[self.norm]


def _feed_forward(read, hidden: int, layers: int, *, gated: bool) -> dict[str, Any]:
    """Widths and parameters of a layer's block, the mean over layers; all experts count as parameters."""
    matrices = 3 if gated else 2
    sizes = FeedForward.from_config(read, hidden)
    parameters: float = matrices * sizes.dense
    sparse = (layers - sizes.first_dense) / layers if sizes.chosen else 0
    if sizes.chosen:
        experts = read("num_local_experts") or read("num_experts") or read("n_routed_experts") or sizes.chosen
        of_experts = matrices * (experts * sizes.expert + sizes.shared) + experts
        parameters = (1 - sparse) * parameters + sparse * of_experts
    return {
        "intermediate": sizes.met(layers) / layers,
        "experts_per_token": sparse * sizes.chosen,
        "parameters": hidden * parameters,
    }
