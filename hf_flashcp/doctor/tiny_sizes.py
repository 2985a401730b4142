"""Sizes that replace those of the original config in a tiny copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


WINDOW = 8
"""Sliding window of a tiny copy, in tokens; some documents of the check are longer and some shorter."""

LENGTH = 16
"""Length in tokens at which a tiny copy's RoPE changes; some documents of the check are longer and some shorter."""


def _kv_heads(value: int, values: dict[str, Any]) -> int:
    heads = values.get("num_attention_heads") or values.get("n_head") or value
    return 4 if value >= heads else min(value, 2)


def _at_most(limit: int) -> Callable[[int, dict[str, Any]], int]:
    return lambda value, values: min(value, limit)


SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "vocab_size_per_layer_input": 67,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "model_dim", "dim_model"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "dim_ff"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "encoder_layers", "decoder_layers"), _at_most(2)),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), _kv_heads),
    **dict.fromkeys(
        ("head_dim", "global_head_dim", "swa_head_dim", "attention_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"),
        8,
    ),
    **dict.fromkeys(("v_head_dim", "swa_v_head_dim"), 6),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "moe_top_k"), _at_most(2)),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_intermediate_size"), 16),
    "hidden_size_per_layer_input": 16,
    **dict.fromkeys(("n_group", "num_expert_group"), _at_most(2)),
    "topk_group": 1,
    **dict.fromkeys(("num_nextn_predict_layers", "num_mtp_layers"), 0),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 256),
    **dict.fromkeys(("sliding_window", "sliding_window_size"), WINDOW),
    "original_max_position_embeddings": LENGTH,
    # The position from which scores are scaled up, and the number of keys that a sparse layer selects.
    **dict.fromkeys(("floor_scale", "log_scaling_n_floor"), 16),
    **dict.fromkeys(("index_topk", "index_block_size"), 4),
    "index_topk_blocks": 2,
    "attention_chunk_size": 8,
    "num_attention_heads_per_layer": lambda value, values: 8 if value > values["num_attention_heads"] else 4,
    "query_pre_attn_scalar": 8,
    "rotary_dim": 8,
    "laurel_rank": 8,
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("mamba_num_heads", "mamba_head_dim", "ssm_state_size"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_num_value_heads"), 8),
    "linear_num_key_heads": 4,
}

_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
_ZAMBA = {"num_key_value_heads": 4, "attention_head_dim": 16, "attention_hidden_size": 64}

# Families whose sizes constrain each other, and so need values of their own.
FAMILIES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 16, "index_head_dim": 8},
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 16, "expert_ffn_hidden_size": 16, "zero_expert_num": 1},
    "phi4_multimodal": {
        "vision_config": {**_TOWER, "num_hidden_layers": 2},
        "audio_config": {
            **_TOWER,
            "num_blocks": 1,
            **dict.fromkeys(("ext_pw_out_channel", "depthwise_separable_out_channel", "nemo_conv_channels"), 32),
        },
    },
    "xmod": {"default_language": "en_XX"},
    **dict.fromkeys(("bailing_hybrid", "kimi_linear"), {"mlp_layer_types": ["dense", "dense"]}),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), {"head_dim": 8}),
    "falcon_h1": {"mamba_d_ssm": 64},
    **dict.fromkeys(("lfm2", "lfm2_moe"), {"layer_types": ["conv", "full_attention"]}),
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        **_ZAMBA,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "mamba", "hybrid"],
        "hybrid_layer_ids": [2],
        **_ZAMBA,
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
    },
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
}
