"""Attention layers of a model, grouped by what they need, with their sizes and the kernels that would run them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from ..attention.kernels import CAPABILITIES, explain_kernels
from ..predict.model_config import config_value


def layer_groups(config: PreTrainedConfig, layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Group the recorded layers of a tiny copy (see [`Diagnosis`]) by their type and options.

    Sizes come from the real config, as far as it names them in the usual way. The number of layers in a group comes
    from the config's `layer_types`.
    """
    config = config.get_text_config()
    types = list(getattr(config, "layer_types", None) or [])
    groups: dict[str, dict[str, Any]] = {}
    for layer in layers:
        kind = layer["type"] or "full_attention"
        extras = [name for name in ("softcap", "sinks") if layer[name]]
        label = ", ".join([kind.removesuffix("_attention"), *extras])
        key_dim = _key_dim(config)
        value_dim = config_value(config, "v_head_dim") or key_dim
        kernels = {}
        for device in ("cpu", "cuda"):
            softcap = 1.0 if layer["softcap"] else None
            explained = explain_kernels(device, softcap, dtype=torch.bfloat16, key_dim=key_dim, value_dim=value_dim)
            chosen = next(name for name, reason in explained if reason is None)
            kernels[device] = {
                "kernel": chosen,
                "status": CAPABILITIES[chosen].status,
                "not": {name: reason for name, reason in explained if reason is not None},
            }
        groups[label] = {
            "kind": label,
            "layers": types.count(kind) if types else config.num_hidden_layers,
            "heads": config_value(config, "num_attention_heads"),
            "kv_heads": _kv_heads(config),
            "key_dim": key_dim,
            "value_dim": value_dim,
            "window": config_value(config, "sliding_window") if layer["window"] is not None else None,
            "softcap": layer["softcap"],
            "sinks": layer["sinks"],
            "kernels": kernels,
        }
    return list(groups.values())


def _kv_heads(config: PreTrainedConfig) -> int | None:
    if config_value(config, "kv_lora_rank"):
        return config_value(config, "num_attention_heads")  # MLA passes expanded keys to attention
    return config_value(config, "num_key_value_heads") or config_value(config, "num_attention_heads")


def _key_dim(config: PreTrainedConfig) -> int | None:
    if config_value(config, "qk_nope_head_dim"):
        return config.qk_nope_head_dim + config.qk_rope_head_dim
    heads, hidden_size = config_value(config, "num_attention_heads"), config_value(config, "hidden_size")
    return config_value(config, "head_dim") or (hidden_size // heads if heads and hidden_size else None)
