"""Functions that workers run for vision-language models, on text only."""

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from hf_flashcp import FlashCPCollator, attach, shard_inputs
from hf_flashcp.doctor.float64 import float64_throughout
from hf_flashcp.planning import PlanSettings
from tests.model_cases import cp_mesh, sum_gradients, total
from tests.models import (
    SMALL,
    exact_loss_sum,
    from_one_rank,
    gradients,
    largest_error,
    make_documents,
    per_document_gradients,
    target_count,
)


_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def qwen2_5_vl():
    text = {**SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    return Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig(text_config=text, vision_config=vision)


def gemma3():
    text = {**SMALL, "sliding_window": 8, "query_pre_attn_scalar": 8}
    text["layer_types"] = ["sliding_attention", "full_attention"]
    vision = {**_VISION, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=66)
    return Gemma3ForConditionalGeneration, config


def llava():
    text = {**SMALL, "model_type": "llama"}
    vision = {**_VISION, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}
    return LlavaForConditionalGeneration, LlavaConfig(text_config=text, vision_config=vision, image_token_index=66)


MODELS = {"qwen2_5_vl": qwen2_5_vl, "gemma3": gemma3, "llava": llava}
TEXT_ONLY = {"text_config": "flashcp", "vision_config": "sdpa"}


def build(name, attn_implementation):
    torch.manual_seed(0)
    model_class, config = MODELS[name]()
    return model_class._from_config(config, attn_implementation=attn_implementation, dtype=torch.float64)


def text_errors(name, lengths):
    """Return the [gradient error, loss error] of text-only documents."""
    features = make_documents(lengths)
    for feature in features:  # 66 is the image token
        feature["input_ids"] = feature["labels"] = [min(token, 65) for token in feature["input_ids"]]
    with float64_throughout():
        reference, model = build(name, "eager"), build(name, TEXT_ONLY)
        attach(model, cp_mesh())
        expected_loss, expected = from_one_rank(per_document_gradients, reference, features)
        shard = shard_inputs(FlashCPCollator(torch.distributed.get_world_size())(features), cp_mesh())
        logits = model(**{key: value for key, value in shard.items() if "labels" not in key}).logits
        loss = exact_loss_sum(logits, shard["shift_labels"]) / target_count(features)
        loss.backward()
    ours = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert ours == set(expected) and not any("vision" in name or "visual" in name for name in ours)
    sum_gradients(model)
    trained = {name: grad for name, grad in gradients(model).items() if name in expected}
    return [largest_error(trained, expected), abs(total(loss) - expected_loss) / expected_loss]


def batch_with_images():
    model = build("qwen2_5_vl", TEXT_ONLY)
    attach(model, cp_mesh())
    batch = FlashCPCollator(torch.distributed.get_world_size())(make_documents([12, 9]))
    model(**batch, pixel_values=torch.zeros(4, 1176), image_grid_thw=torch.tensor([[1, 2, 2]]))


def flashcp_everywhere():
    attach(build("qwen2_5_vl", "flashcp"), cp_mesh())


def overlaid_mask(tokens=(2, 3, 4, 15, 16, 17)):
    """Pass token types that make Gemma 3 attend in both directions among image tokens."""
    model = build("gemma3", TEXT_ONLY).train()
    attach(model, cp_mesh())
    batch = FlashCPCollator(settings=PlanSettings(torch.distributed.get_world_size(), "whole_doc"))(
        make_documents([12, 9])
    )
    token_type_ids = torch.zeros_like(batch["input_ids"])
    token_type_ids[:, tokens] = 1
    model(**batch, token_type_ids=token_type_ids)


def mask_overlaid_on_one_rank():
    overlaid_mask((15, 16, 17))


def token_types_of_text():
    model = build("gemma3", TEXT_ONLY).train()
    attach(model, cp_mesh())
    batch = FlashCPCollator(torch.distributed.get_world_size())(make_documents([30, 21]))
    plain = model(**batch).loss
    return float(plain - model(**batch, token_type_ids=torch.zeros_like(batch["input_ids"])).loss)
