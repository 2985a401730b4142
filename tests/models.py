"""Tiny random models and their per-document gradients, the reference of every test of a whole model."""

import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)


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
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
}


def build_model(family, attn_implementation="flashcp", dtype=torch.float64, **overrides):
    """The same weights on every rank and for every attention implementation."""
    torch.manual_seed(0)
    config = type(CONFIGS[family])(**{**CONFIGS[family].to_dict(), **overrides})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation, dtype=torch.float64).to(
        dtype
    )


def make_documents(lengths, seed=0, prompt=0.0):
    """Features with random tokens; the first `prompt` part of each document's labels is masked."""
    generator = torch.Generator().manual_seed(seed)
    features = []
    for length in lengths:
        ids = torch.randint(0, SMALL["vocab_size"], (length,), generator=generator).tolist()
        masked = int(length * prompt)
        features.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return features


def target_count(features):
    return sum(label != -100 for feature in features for label in feature["labels"][1:])


def exact_loss_sum(logits, shift_labels):
    """Summed negative log likelihood in the logits' own dtype (transformers casts logits to fp32)."""
    return F.cross_entropy(logits.flatten(0, -2), shift_labels.flatten(), ignore_index=-100, reduction="sum")


def per_document_gradients(model, features, own_loss=False):
    """Mean loss over all targets and its gradients, each document run alone, on one device."""
    model.zero_grad()
    total, count = 0.0, target_count(features)
    for feature in features:
        ids = torch.tensor([feature["input_ids"]])
        labels = torch.tensor([feature["labels"]])
        if own_loss:
            loss = model(input_ids=ids, labels=labels, num_items_in_batch=count).loss
        else:
            loss = exact_loss_sum(model(input_ids=ids).logits, F.pad(labels, (0, 1), value=-100)[:, 1:]) / count
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def gradients(model):
    return {
        name: parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def largest_error(ours, reference):
    """Largest relative Frobenius norm over parameters, which must be the same ones."""
    assert ours.keys() == reference.keys()
    errors = {}
    for name, expected in reference.items():
        norm, difference = expected.double().norm(), (ours[name].double() - expected.double()).norm()
        errors[name] = float(difference / norm if norm > 0 else difference)
    return max(errors.values())
