"""Tiny random models and their per-document gradients, which are the reference in all tests of whole models."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Cohere2Config,
    DeepseekV3Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    Starcoder2Config,
)

from hf_flashcp.doctor.tiny import decay_slowly, default_config, tiny_copy
from hf_flashcp.integrations.gradient_check import gradient_error
from tests.device import DEVICE


SMALL = dict(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_ROPE = {"rope_theta": 10000.0}
_FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}

# Families with plain full attention.
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
}
# The tested families. Sliding windows are shorter than the documents of the tests; some documents are shorter than
# RoPE's threshold, and some longer.
FAMILIES = {
    **CONFIGS,
    "cohere2": Cohere2Config(**SMALL, **_MIXED),
    "deepseek_v3": DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4, "head_dim": 4},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        moe_intermediate_size=16,
    ),
    "exaone4": Exaone4Config(**SMALL, **_MIXED),
    "gemma2": Gemma2Config(
        **SMALL, **_MIXED, query_pre_attn_scalar=8, attn_logit_softcapping=0.5, final_logit_softcapping=3.0
    ),
    "gemma3": Gemma3TextConfig(**SMALL, **_MIXED, query_pre_attn_scalar=8),
    "glm4": Glm4Config(**SMALL, pad_token_id=0),
    "gpt_oss": GptOssConfig(**SMALL, **_EXPERTS, sliding_window=8),
    "granite": GraniteConfig(**SMALL),
    "mistral, window": MistralConfig(**SMALL, sliding_window=8),
    "mixtral": MixtralConfig(**SMALL, **_EXPERTS, sliding_window=8),
    "olmo2": Olmo2Config(**SMALL),
    "olmo3": Olmo3Config(**SMALL, **_MIXED),
    "phi3": Phi3Config(**SMALL, pad_token_id=0, sliding_window=8),
    "phi3, longrope": Phi3Config(
        **SMALL,
        pad_token_id=0,
        original_max_position_embeddings=16,
        rope_parameters={**_ROPE, **_FACTORS, "rope_type": "longrope", "original_max_position_embeddings": 16},
    ),
    "qwen2, window": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3_moe": Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "smollm3": SmolLM3Config(**SMALL, pad_token_id=0, no_rope_layers=[1, 0]),
    "starcoder2": Starcoder2Config(**SMALL, sliding_window=8),
    "llama, dynamic": LlamaConfig(
        **{**SMALL, "max_position_embeddings": 16},
        rope_parameters={**_ROPE, "rope_type": "dynamic", "factor": 2.0},
    ),
    "llama, llama3": LlamaConfig(
        **SMALL,
        rope_parameters={
            **_ROPE,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "llama, linear": LlamaConfig(**SMALL, rope_parameters={**_ROPE, "rope_type": "linear", "factor": 2.0}),
    "llama, yarn": LlamaConfig(
        **SMALL,
        rope_parameters={**_ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ),
}

# Sizes of recurrent layers, with different numbers and widths of heads for keys and values.
_RECURRENT = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_heads": 3,
    "linear_head_dim": 16,
}


def _hybrids(*families):
    configs = {name: tiny_copy(default_config(name)) for name in families if name in CONFIG_MAPPING}
    for config in configs.values():
        for name in _RECURRENT.keys() & vars(config).keys():
            setattr(config, name, _RECURRENT[name])
    return configs


# Models with recurrent or convolutional layers beside attention, for any plan; older versions of transformers lack
# some of them. There is a family for each kind of layer in `KINDS`: gated delta rule, Kimi delta attention, Mamba-2,
# and two kinds of convolutions.
HYBRIDS = _hybrids(
    "bailing_hybrid",
    "bamba",
    "falcon_h1",
    "granitemoehybrid",
    "kimi_linear",
    "lfm2",
    "lfm2_moe",
    "lfm3",
    "nemotron_h",
    "olmo_hybrid",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
    "zamba2",
    "zaya",
)
KINDS = [name for name in ("qwen3_next", "kimi_linear", "bamba", "lfm2", "zaya") if name in HYBRIDS]
# Those for plans that keep documents whole.
WHOLE_DOCUMENT_HYBRIDS = _hybrids("jamba", "minimax", "recurrent_gemma", "zamba")


def build_model(family, attn_implementation="flashcp", dtype=torch.float64, **overrides):
    """Build a model with the same weights on every rank and device, and for every attention implementation.

    States of recurrent layers decay so slowly that the first token of a document affects the last one.
    """
    torch.manual_seed(0)
    config = {**FAMILIES, **HYBRIDS, **WHOLE_DOCUMENT_HYBRIDS}[family]
    config = type(config)(**{**config.to_dict(), **overrides})
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attn_implementation, experts_implementation="eager", dtype=torch.float64
    )
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms, biases and sinks are initialized to ones and zeros; weights of 0.02 condition ZAYA's norms badly.
            if parameter.dim() == 1 or family in HYBRIDS:
                parameter += 0.1 * torch.randn_like(parameter)
    decay_slowly(model)
    return model.to(DEVICE, dtype)


def tokenizer():
    """Return a tokenizer with one token per number in the vocabulary."""
    vocabulary = {f"<{i}>": i for i in range(SMALL["vocab_size"])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<0>")), eos_token="<1>", pad_token="<0>"
    )


def make_documents(lengths, seed=0, prompt=0.0):
    """Return documents with random tokens; the first part of their labels, given by the share `prompt`, is masked."""
    generator = torch.Generator().manual_seed(seed)
    features = []
    for length in lengths:
        ids = torch.randint(0, SMALL["vocab_size"], (length,), generator=generator).tolist()
        masked = int(length * prompt)
        features.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return features


def with_skipped_positions(features):
    """Return the same documents with positions that start anywhere and skip numbers (PoSE)."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for feature in features:
        steps = torch.randint(1, 40, (len(feature["input_ids"]),), generator=generator)
        steps[torch.rand(len(steps), generator=generator) < 0.8] = 1
        rows.append({**feature, "position_ids": (steps.cumsum(0) - 1).tolist(), "seq_lengths": [len(steps)]})
    return rows


def target_count(features):
    return sum(label != -100 for feature in features for label in feature["labels"][1:])


def exact_loss_sum(logits, shift_labels):
    """Return the summed negative log likelihood in the dtype of the logits (transformers casts them to fp32)."""
    return F.cross_entropy(logits.flatten(0, -2), shift_labels.flatten(), ignore_index=-100, reduction="sum")


def per_document_gradients(model, features, own_loss=False):
    """Return the mean loss over all targets and its gradients, with each document run alone on one device."""
    model.zero_grad()
    total, count = 0.0, target_count(features)
    for feature in features:
        inputs = {"input_ids": torch.tensor([feature["input_ids"]], device=DEVICE), "use_cache": False}
        if "position_ids" in feature:  # the mask keeps transformers from looking for documents in the positions
            inputs["position_ids"] = torch.tensor([feature["position_ids"]], device=DEVICE)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        labels = torch.tensor([feature["labels"]], device=DEVICE)
        if own_loss:
            loss = model(**inputs, labels=labels, num_items_in_batch=count).loss
        else:
            shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
            loss = exact_loss_sum(model(**inputs).logits, shifted) / count
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def from_one_rank(compute, *args, rank=0, **kwargs):
    """Returns on every rank what `compute` does on one of them. References take longer than what is tested."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return compute(*args, **kwargs)
    rank %= dist.get_world_size()
    box = [compute(*args, **kwargs) if dist.get_rank() == rank else None]
    dist.broadcast_object_list(box, rank)
    return box[0]


def gradients(model):
    return {
        name: parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def largest_error(ours, reference):
    """Return the largest relative error (Frobenius norm) of a parameter. Both sides must have the same parameters."""
    assert ours.keys() == reference.keys()
    return gradient_error(ours, reference)
