"""Tiny random copies of models: every size is small, but tokens attend to each other as in the original."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .tiny_sizes import FAMILIES, LENGTH, SIZES


def causal_language_models() -> dict[str, str]:
    """Return `{model_type: class name}` for every causal language model of the installed transformers."""
    return {
        model_type: names if isinstance(names, str) else names[0]
        for model_type, names in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())
    }


def tiny_copy(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a tiny config: one layer of each kind (at least two in all), four heads, few experts, no dropout.

    Sliding windows become `WINDOW` tokens, and the lengths at which RoPE changes become `LENGTH`. The copy keeps
    everything else that affects attention: softcap, sinks, biases, the ratio of query heads to KV heads, MLA's
    different widths of keys and values, layers with their own settings, and layers that share the keys of earlier
    layers.
    """
    config = config.get_text_config()
    original = config.to_dict()
    layers = _layers_to_keep(original)
    values = {name: _shrunk(name, value, original, layers) for name, value in original.items()}
    for name in _LAYER_COUNTS:
        if values.get(name):
            values[name] = len(layers)
    values.update(FAMILIES.get(config.model_type, {}))
    _shrink_rope(values)
    return type(config)(**{name: value for name, value in values.items() if name not in _DERIVED})


_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_DERIVED = {
    "_name_or_path",
    "transformers_version",
    "architectures",
    "model_type",
    "torch_dtype",
    "dtype",
    "id2label",
    "label2id",
}
# Config entries that list the indices of layers of a kind, or count the first layers, which are of another kind.
_INDEX_LISTS = ("mlp_only_layers", "full_attn_idxs", "moe_layers", "hybrid_layer_ids", "cross_attention_layers")
_FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")
_MAX_KINDS = 4  # a list with more distinct values holds sizes that change with depth


def _layers_to_keep(values: dict[str, Any]) -> list[int]:
    """Return the first layer of every kind, according to all lists and counts in the config that tell layers apart."""
    count = len(values.get("layer_types") or ()) or next((values[n] for n in _LAYER_COUNTS if values.get(n)), 2)
    by_layer = [values.get("layer_types") or [None] * count]
    for name, value in values.items():
        if name in _INDEX_LISTS and value:
            by_layer.append([layer in value for layer in range(count)])
        elif name in _FIRST_LAYERS and isinstance(value, int):
            by_layer.append([layer < value for layer in range(count)])
        elif name == "per_layer_config" and value:
            overrides = {int(layer): str(sorted(entry.items())) for layer, entry in value.items()}
            by_layer.append([overrides.get(layer) for layer in range(count)])
        elif isinstance(value, (list, tuple)) and len(value) == count and name != "architectures":
            by_layer.append([str(entry) for entry in value])
    kept: list[int] = []
    for kinds in by_layer:
        distinct = dict.fromkeys(kinds)
        if len(distinct) <= _MAX_KINDS:
            seen = {kinds[layer] for layer in kept}
            kept += [kinds.index(kind) for kind in distinct if kind not in seen]
    if len(set(kept)) < 2:
        kept += [layer for layer in (0, 1) if layer < count]
    kept = sorted(set(kept))
    # Layers that share keys and values come last, and use those of the last earlier layer of their kind.
    return kept * 2 if 0 < (values.get("num_kv_shared_layers") or 0) < count else kept


def _shrunk(name: str, value: Any, original: dict[str, Any], layers: list[int]) -> Any:
    count = len(original.get("layer_types") or ()) or original.get("num_hidden_layers")
    if name == "num_kv_shared_layers" and value:
        return len(layers) // 2 if value < count else len(layers)
    if name in _INDEX_LISTS and value:
        return [new for new, layer in enumerate(layers) if layer in value]
    if name in _FIRST_LAYERS and isinstance(value, int):
        return sum(layer < value for layer in layers)
    if name == "per_layer_config" and value:
        overrides = {int(layer): entry for layer, entry in value.items()}
        return {
            new: {each: _override(each, size, original) for each, size in overrides[layer].items()}
            for new, layer in enumerate(layers)
            if layer in overrides
        }
    if isinstance(value, (list, tuple)) and len(value) == count and name != "architectures":
        return [_size(name, value[layer], original) for layer in layers]
    if isinstance(value, float) and ("drop" in name or "jitter" in name):
        return 0.0
    if name.endswith("token_id") and value is not None:
        return 0
    return _size(name, value, original)


def _size(name: str, value: Any, original: dict[str, Any]) -> Any:
    if name not in SIZES or not isinstance(value, int) or isinstance(value, bool):
        return value
    return SIZES[name](value, original) if callable(SIZES[name]) else SIZES[name]


def _override(name: str, value: Any, original: dict[str, Any]) -> Any:
    """Return the tiny size for one layer: twice the usual size if the original is larger, half if it is smaller."""
    usual = original.get(name)
    size = _size(name, value, original)
    if not isinstance(usual, int) or size == value:
        return size
    return size if value == usual else size * 2 if value > usual else max(1, _size(name, usual, original) // 2)


def _shrink_rope(values: dict[str, Any]) -> None:
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    nested = [rope] if "rope_type" in rope else [entry for entry in rope.values() if isinstance(entry, dict)]
    width = values.get("qk_rope_head_dim") or values.get("head_dim") or 8
    for entry in nested:
        if entry.get("original_max_position_embeddings"):
            entry["original_max_position_embeddings"] = LENGTH
        if "dynamic" in str(entry.get("rope_type")):
            values["max_position_embeddings"] = LENGTH
        rotated = int(width * (entry.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0))
        for name in ("short_factor", "long_factor"):
            if entry.get(name):
                entry[name] = entry[name][: rotated // 2]


def build(config: PreTrainedConfig, attn_implementation: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Build a causal language model whose random weights depend only on the config; none is exactly 0 or 1.

    Recurrent states decay slowly, as those of initial weights would vanish before a document ends.
    """
    torch.manual_seed(0)
    config = type(config).from_dict(config.to_dict())
    model = _model_class(config)._from_config(
        config, attn_implementation=attn_implementation, experts_implementation="eager", dtype=dtype
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += (0.1 * noise).to(parameter.dtype)
    decay_slowly(model)
    return model


@torch.no_grad()
def decay_slowly(model: torch.nn.Module) -> None:
    """Let the states of recurrent layers last for hundreds of tokens, where they decay by exp(-exp(A_log) dt)."""
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.copy_(torch.linspace(-6.5, -3.0, parameter.numel()).view(parameter.shape))


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the causal language model class for a config.

    For a text config (Emu 3, Mllama), that is the class of the model to which it belongs.
    """
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    family = type(config).__module__.rpartition(".")[0]
    for name in causal_language_models().values():
        model_class = getattr(transformers, name)
        if model_class.__module__.startswith(family) and model_class.config_class is type(config):
            return model_class
    raise ValueError(f"no causal language model for {type(config).__name__}")


def default_config(model_type: str) -> PreTrainedConfig:
    """Return transformers' default config for a model type, as a decoder if the type can be either."""
    config = AutoConfig.for_model(model_type)
    if getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder:
        config.is_decoder = True
    return config
