"""Attention layers of a model, grouped by what they need, with their sizes and the kernels that would run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..attention.kernels import CAPABILITIES, Device, Layer, explain_kernels, faster_kernels
from ..predict.model_config import config_value


def devices_to_report(gpus: Sequence[str] = ()) -> dict[str, Device]:
    """Return the devices whose kernels are reported, by name.

    These are the GPUs that `gpus` names. By default it is this machine's GPU, or, if there is none, a CPU and any GPU.

    Raises a `ConfigurationError` if a GPU's name is unknown.
    """
    if gpus:
        return {name.lower(): Device.named(name) for name in gpus}
    if torch.cuda.is_available():
        return {torch.cuda.get_device_name(): Device.here("cuda")}
    return {"cpu": Device("cpu"), "cuda": Device("cuda")}


def layer_groups(
    config: PreTrainedConfig, layers: list[dict[str, Any]], devices: Mapping[str, Device]
) -> list[dict[str, Any]]:
    """Group the recorded layers of a tiny copy (see [`Diagnosis`]) by their type and options.

    Sizes come from the real config, as far as it names them in the usual way. The number of layers in a group comes
    from the config's `layer_types`. Kernels are those of the given devices, with the packages of this machine.
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
        needs = Layer(torch.bfloat16, key_dim, value_dim, window=layer["window"] is not None, softcap=layer["softcap"])
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
            "kernels": {name: _kernels(device, needs) for name, device in devices.items()},
        }
    return list(groups.values())


def _kernels(device: Device, layer: Layer) -> dict[str, Any]:
    """Return the kernel of a layer on a device, its status, and why each kernel that comes before it does not run.

    Kernels for other types of devices are left out. `faster` holds the kernels that would run if they were installed,
    and how to install each.
    """
    explained = explain_kernels(device, layer)
    chosen = next(name for name, reason in explained.items() if reason is None)
    before = list(explained)[: list(explained).index(chosen)]
    candidates = [name for name in before if device.type in (CAPABILITIES[name].devices or (device.type,))]
    return {
        "kernel": chosen,
        "status": CAPABILITIES[chosen].status,
        "not": {name: explained[name] for name in candidates},
        "faster": {name: CAPABILITIES[name].install for name in faster_kernels(device, layer)},
    }


def _kv_heads(config: PreTrainedConfig) -> int | None:
    if config_value(config, "kv_lora_rank"):
        return config_value(config, "num_attention_heads")  # MLA passes expanded keys to attention
    return config_value(config, "num_key_value_heads") or config_value(config, "num_attention_heads")


def _key_dim(config: PreTrainedConfig) -> int | None:
    if config_value(config, "qk_nope_head_dim"):
        return config.qk_nope_head_dim + config.qk_rope_head_dim
    heads, hidden_size = config_value(config, "num_attention_heads"), config_value(config, "hidden_size")
    return config_value(config, "head_dim") or (hidden_size // heads if heads and hidden_size else None)
