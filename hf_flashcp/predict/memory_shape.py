"""`MemoryShape`: the sizes of a causal language model that determine the memory for its training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .model_config import ModelConfig
from .model_shape import RecurrentLayers


# Properties of model types that their config.json does not state.
_QWEN_HYBRIDS = ("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
_SHORT_CONVOLUTIONS = ("lfm2", "lfm2_moe", "lfm3")
_TIED = (
    *("cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "smollm3", "starcoder2", "zamba2"),
    *_SHORT_CONVOLUTIONS,
)
_NORM_OF_EACH_HEAD = ("exaone4", "gemma3_text", "qwen3", "qwen3_moe", *_QWEN_HYBRIDS, *_SHORT_CONVOLUTIONS)
_NORM_OF_ALL_HEADS = ("olmo2", "olmo3", "olmo_hybrid")
_FOUR_NORMS = ("gemma2", "gemma3_text", "glm4", "lfm3")
_NORM_IN_FP32 = ("gemma", "gemma2", "gemma3_text", "gpt_oss", "olmo2", "olmo3", *_QWEN_HYBRIDS)
_LAYER_NORM = ("starcoder2",)
_NORM_AFTER_BLOCK = (*_FOUR_NORMS, "exaone4", "olmo2", "olmo3", "olmo_hybrid")
# Elements that a feed-forward block keeps per element of its width. The default of 4 is gate, activated gate, up and
# product. A block without a gate keeps the input and output of its activation. GPT-OSS also clamps gate and up,
# multiplies twice and adds one.
_KEPT_WIDTHS = {"nemotron_h": 2, "starcoder2": 2, "gpt_oss": 7}


@dataclass(frozen=True)
class MemoryShape:
    """The sizes of a model: its parameters, and the widths (in elements) of what its layers keep for backward."""

    layers: int
    attention_layers: int  # number of layers that exchange KV
    attention_share: float  # fraction of the layers that have the projections of attention
    block_share: float  # fraction of the layers that have a feed-forward block
    recurrent: RecurrentLayers | None
    hidden: int
    vocabulary: int
    tied: bool  # whether the head and the embedding share their weight
    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    output_gates: int  # elements of a token's gates of attention outputs
    normed_width: int  # elements of a token's queries and keys that have a norm of their own
    latent_width: int  # elements of normed latents in multi-head latent attention
    latent_keys: int  # elements of a token's keys that share storage with its values
    norms: int  # number of norms over the hidden size per layer
    intermediate: float  # width of the feed-forward block, all experts of a token together; mean over layers
    dense_share: float  # fraction of the layers that have a feed-forward block without experts
    dense_width: int  # width of such a block; 0 if there is none
    ends_with_block: bool  # whether a layer adds its feed-forward block's output without a norm
    gated: bool
    kept_widths: int  # elements that the block keeps for backward, per element of its width
    norm: str  # kind of norm, see `norm_bytes`
    softcapped: bool  # whether logits are softcapped, which keeps another copy of them
    experts_per_token: float  # mean over layers; 0 in dense models
    layer_parameters: float  # includes all experts; mean over layers

    @classmethod
    def from_config(cls, config: Any) -> MemoryShape:
        """Read the sizes from a model's config, see [`ModelConfig`].

        Layers are assumed to be like Llama's, except for the norms, gates, experts and mixers of known model types.
        """
        model = ModelConfig(config)
        kind, tied, latents, blocks = (
            model.model_type,
            model.read("tie_word_embeddings"),
            model.latents,
            model.feed_forward,
        )
        norms = 4 if kind in _FOUR_NORMS else 2
        has_norm = kind in _NORM_OF_EACH_HEAD + _NORM_OF_ALL_HEADS
        return cls(
            layers=model.layers,
            attention_layers=len(model.windows()),
            attention_share=model.projecting_layers / model.layers,
            block_share=(blocks.dense_layers + blocks.sparse_layers) / model.layers,
            recurrent=RecurrentLayers.of(model.mixers, model.mixing_layers) if model.mixers else None,
            hidden=model.hidden,
            vocabulary=model.vocabulary,
            tied=kind in _TIED if tied is None else bool(tied),
            query_heads=model.query_heads,
            kv_heads=model.kv_heads,
            key_dim=model.key_dim,
            value_dim=model.value_dim,
            output_gates=model.query_heads * model.value_dim if kind in _QWEN_HYBRIDS else 0,
            normed_width=(model.query_heads + model.kv_heads) * model.key_dim if has_norm else 0,
            latent_width=latents.query_rank + latents.kv_rank if latents else 0,
            latent_keys=model.query_heads * (model.key_dim - latents.rope_dim) if latents else 0,
            norms=norms,
            intermediate=blocks.met / model.layers,
            dense_share=blocks.dense_layers / model.layers,
            dense_width=blocks.dense if blocks.dense_layers else 0,
            ends_with_block=kind not in _NORM_AFTER_BLOCK,
            gated=blocks.gated,
            kept_widths=_KEPT_WIDTHS.get(kind or "", 4),
            norm="fp32" if kind in _NORM_IN_FP32 else "layer" if kind in _LAYER_NORM else "cast",
            softcapped=bool(model.read("final_logit_softcapping")),
            experts_per_token=blocks.sparse_layers * blocks.chosen / model.layers,
            layer_parameters=_layer_parameters(model) / model.layers + norms * model.hidden,
        )

    @property
    def embedding_parameters(self) -> int:
        """Number of parameters of the embedding. A head that is not tied to it has as many."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> float:
        """Number of parameters of the model, without biases."""
        return self.layers * self.layer_parameters + (1 if self.tied else 2) * self.embedding_parameters + self.hidden

    @property
    def kv_width(self) -> int:
        """Number of elements of a token's keys and values in one layer: H_kv (D_k + D_v)."""
        return self.kv_heads * (self.key_dim + self.value_dim)

    @property
    def dense_parameters(self) -> int:
        """Number of parameters of a feed-forward block without experts."""
        return (2 + self.gated) * self.hidden * self.dense_width

    def norm_bytes(self, width: float, itemsize: int) -> float:
        """Return the bytes per token that a norm over `width` elements keeps.

        Norms like Llama's ("cast") keep their input in fp32 and the normed input in the input's dtype. Those like
        Gemma's ("fp32") keep both in fp32. PyTorch's own ("layer") keeps only its input.
        """
        return width * {"cast": 4 + itemsize, "fp32": 8, "layer": itemsize}[self.norm]


def _layer_parameters(model: ModelConfig) -> float:
    """Return the number of parameters of all layers, without their norms."""
    blocks = model.feed_forward
    sparse = blocks.sparse_parameters(model.experts) + model.hidden * model.experts  # with the router
    mixers = model.mixing_layers * model.mixers.parameters if model.mixers else 0
    projections = model.projecting_layers * model.projection_parameters
    everything = projections + mixers + blocks.dense_layers * blocks.dense_parameters + blocks.sparse_layers * sparse
    return everything - model.repeated_parameters
