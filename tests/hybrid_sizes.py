"""Configs of hybrid models for tests of predictions: small ones of every family, and that of a large model."""

_DELTA = {"linear_num_value_heads": 6, "linear_num_key_heads": 3, "linear_key_head_dim": 10,
          "linear_value_head_dim": 14, "linear_conv_kernel_dim": 5}  # fmt: skip
_KDA = {"linear_num_heads": 6, "linear_head_dim": 10, "linear_conv_kernel_dim": 5, "kv_lora_rank": 12,
        "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14, "num_local_experts": 3,
        "num_experts_per_tok": 3, "moe_intermediate_size": 40, "n_group": 1, "topk_group": 1,
        "n_shared_experts": 2, "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"]}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 6, "mamba_d_conv": 5, "mamba_expand": 2}
_GROUPED = {"num_key_value_heads": 2, "num_hidden_layers": 4}
HYBRIDS = {
    "qwen3_next": {**_GROUPED, **_DELTA, "head_dim": 24, "num_experts": 3, "num_experts_per_tok": 3,
                   "moe_intermediate_size": 40, "shared_expert_intermediate_size": 20},
    "qwen3_5_text": {**_GROUPED, **_DELTA, "head_dim": 24},
    "qwen3_5_moe_text": {**_GROUPED, **_DELTA, "head_dim": 24, "num_experts": 3, "num_experts_per_tok": 3,
                         "moe_intermediate_size": 40, "shared_expert_intermediate_size": 20},
    "kimi_linear": _KDA,
    "bailing_hybrid": {**_KDA, "short_conv_kernel_size": 5, "head_dim": 10},
    "olmo_hybrid": {**_GROUPED, "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 10,
                    "linear_value_head_dim": 14, "linear_conv_kernel_dim": 5},
    "bamba": {**_GROUPED, **_MAMBA, "attn_layer_indices": [2]},
    "granitemoehybrid": {**_GROUPED, **_MAMBA, "num_local_experts": 3, "num_experts_per_tok": 3,
                         "shared_intermediate_size": 20,
                         "layer_types": ["linear_attention"] * 3 + ["full_attention"]},
    "falcon_h1": {**_GROUPED, **_MAMBA, "mamba_d_ssm": 56, "head_dim": 16},
    "nemotron_h": {"num_key_value_heads": 2, "head_dim": 24, "mamba_num_heads": 8, "mamba_head_dim": 7,
                   "ssm_state_size": 6, "n_groups": 2, "conv_kernel": 5, "n_routed_experts": 3,
                   "num_experts_per_tok": 3, "moe_intermediate_size": 40, "n_shared_experts": 1,
                   "moe_shared_expert_intermediate_size": 20, "moe_latent_size": 30, "chunk_size": 32,
                   "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"]},
    "zamba2": {"n_mamba_heads": 8, "mamba_ngroups": 2, "mamba_d_state": 6, "mamba_d_conv": 5, "adapter_rank": 4,
               "num_hidden_layers": 3, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"],
               "use_shared_attention_adapter": True},
    "lfm2": {**_GROUPED, "conv_L_cache": 5, "layer_types": ["conv", "conv", "full_attention", "conv"],
             "block_multiple_of": 20},
    "lfm2_moe": {**_GROUPED, "conv_L_cache": 5, "layer_types": ["conv", "conv", "full_attention", "conv"],
                 "num_experts": 3, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "num_dense_layers": 1},
    "lfm3": {**_GROUPED, "conv_L_cache": 5, "sliding_window": 16,
             "layer_types": ["conv", "sliding_attention", "full_attention", "conv"]},
}  # fmt: skip
"""Sizes of small hybrid models in which no two sizes that could be confused are equal."""
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
          "vocab_size": 100, "pad_token_id": 0}  # fmt: skip

QWEN3_NEXT = {
    "model_type": "qwen3_next", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 16,
    "num_key_value_heads": 2, "head_dim": 256, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    "num_experts": 512, "num_experts_per_tok": 10, "vocab_size": 151936, "linear_num_value_heads": 32,
    "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
}  # fmt: skip
"""The sizes of Qwen3-Next-80B-A3B, as in its config.json."""
