"""The name "flashcp" in transformers, and models that use it without sharding."""

import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_flashcp import RankPlan, ShardPlan, flashcp_attention, plan_documents
from hf_flashcp.errors import BatchError, UnsupportedModelError
from hf_flashcp.integrations.registration import INTERNAL_NAME
from tests.attention_cases import make_inputs, make_sinks, reference_attention
from tests.models import CONFIGS, SMALL, build_model
from tests.vision_language_cases import qwen2_5_vl


def test_importing_registers_the_name_in_either_order():
    code = """
import os, sys
import accelerate, torch._dynamo
for imports in (
    "import hf_flashcp, transformers.modeling_utils",
    "import transformers.modeling_utils, hf_flashcp",
    "import hf_flashcp, transformers; transformers.PreTrainedModel",
):
    if os.fork() == 0:
        assert not {"hf_flashcp", "transformers"} & set(sys.modules)
        exec(imports)
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as names
        os._exit("document_cp" not in names)
    assert os.wait()[1] == 0, imports
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_way_to_choose_it(tmp_path):
    model = build_model("llama")
    assert model.config._attn_implementation == INTERNAL_NAME
    model.save_pretrained(tmp_path)
    assert "flashcp" not in (tmp_path / "config.json").read_text()
    assert INTERNAL_NAME not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    for name in ("flashcp", INTERNAL_NAME):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
        assert loaded.config._attn_implementation == INTERNAL_NAME
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    plain.set_attn_implementation("flashcp")
    assert plain.config._attn_implementation == INTERNAL_NAME
    plain.set_attn_implementation("sdpa")
    assert plain.config._attn_implementation == "sdpa"


def test_a_vision_language_model_can_use_it_for_its_text_only():
    model = Qwen2_5_VLForConditionalGeneration._from_config(
        qwen2_5_vl()[1], attn_implementation={"text_config": "flashcp", "vision_config": "sdpa"}
    )
    assert model.config.text_config._attn_implementation == INTERNAL_NAME
    assert model.config.vision_config._attn_implementation == "sdpa"
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})
    model.set_attn_implementation({"text_config": "flashcp"})
    assert model.config.text_config._attn_implementation == INTERNAL_NAME
    assert model.config.vision_config._attn_implementation == "eager"


def test_a_vision_tower_under_the_name_computes_what_sdpa_does():
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration._from_config(qwen2_5_vl()[1], attn_implementation="flashcp").eval()
    patches, grid = torch.randn(32, 3 * 2 * 14 * 14), torch.tensor([[1, 4, 8]])
    ours = model.model.visual(patches, grid_thw=grid)
    model.set_attn_implementation("sdpa")
    theirs = model.model.visual(patches, grid_thw=grid)
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)


def both(family="llama", **overrides):
    return build_model(family, "flashcp", **overrides).eval(), build_model(family, "sdpa", **overrides).eval()


@pytest.mark.parametrize("family", CONFIGS)
def test_without_a_plan_padded_batches_equal_sdpa(family):
    ours, theirs = both(family)
    ids = torch.randint(0, 67, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    mask[2, 15:] = 0
    assert torch.equal(
        ours(input_ids=ids, attention_mask=mask).logits, theirs(input_ids=ids, attention_mask=mask).logits
    )
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_without_a_plan_packed_rows_are_detected_as_sdpa_does():
    ours, theirs = both()
    ids = torch.randint(0, 67, (1, 24), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in (10, 3, 11)])[None]
    for use_cache in (True, False):  # with a cache transformers does not look for packed documents
        packed = ours(input_ids=ids, position_ids=positions, use_cache=use_cache).logits
        assert torch.equal(packed, theirs(input_ids=ids, position_ids=positions, use_cache=use_cache).logits)
    alone = torch.cat([theirs(input_ids=part).logits for part in ids.split((10, 3, 11), dim=1)], dim=1)
    assert torch.allclose(packed, alone, rtol=0, atol=1e-12)


def test_without_a_plan_a_sliding_window_equals_sdpa():
    ours, theirs = both("mistral", sliding_window=5)
    ids = torch.randint(0, 67, (2, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_equals_sdpa(cache):
    ours, theirs = both()
    ids = torch.randint(1, 67, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, cache_implementation=cache, pad_token_id=0)
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**{**SMALL, "num_hidden_layers": 2, "attn_logit_softcapping": 2.0, "sliding_window": 6}),
        GptOssConfig(**{**SMALL, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 6}),
    ],
    ids=["softcap", "sinks"],
)
def test_without_a_plan_softcap_and_sinks_equal_eager(config):
    """sdpa supports neither, so the model's own eager function runs, with the mask that sdpa's mask function omits."""
    logits = []
    ids = torch.randint(0, 67, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for name in ("flashcp", "eager"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(type(config)(**config.to_dict()), attn_implementation=name).eval()
        logits.append([model(input_ids=ids).logits, model(input_ids=ids, attention_mask=mask).logits[:, 3:]])
    for ours, theirs in zip(*logits):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)


def local_inputs(lengths):
    return [tensor[None] for tensor in make_inputs(lengths, 4, 2, 8, 8, torch.float64, 0)]


def test_the_function_alone_with_a_plan_for_one_rank():
    lengths = [7, 12, 1]
    query, key, value, grad_out = local_inputs(lengths)
    expected, *_ = reference_attention(lengths, query[0], key[0], value[0], grad_out[0])
    for plan in (plan_documents(lengths, 1), RankPlan(plan_documents(lengths, 1))):
        out, weights = flashcp_attention(None, query, key, value, None, flashcp_plan=plan)
        assert weights is None and out.shape == (1, 20, 4, 8)
        assert torch.allclose(out[0].transpose(0, 1), expected, rtol=0, atol=1e-12)


def test_the_function_alone_without_a_plan():
    query, key, value, grad_out = local_inputs([9])
    expected, *_ = reference_attention([9], query[0], key[0], value[0], grad_out[0])
    out, _ = flashcp_attention(None, query, key, value, None)
    assert torch.allclose(out[0].transpose(0, 1), expected, rtol=0, atol=1e-12)


def test_the_function_alone_without_a_plan_names_unsupported_options():
    query, key, value, _ = local_inputs([9])
    with pytest.raises(BatchError, match="without a module"):
        flashcp_attention(None, query, key, value, softcap=2.0)


@pytest.mark.parametrize("options", [{"sliding_window": 5}, {"softcap": 1.5}, {"s_aux": make_sinks(4)}], ids=str)
def test_the_function_alone_with_options(options):
    lengths = [7, 12, 1]
    query, key, value, grad_out = local_inputs(lengths)
    reference = {
        "window": options.get("sliding_window"),
        "softcap": options.get("softcap"),
        "sinks": "s_aux" in options,
    }
    expected, *_ = reference_attention(lengths, query[0], key[0], value[0], grad_out[0], **reference)
    out, _ = flashcp_attention(None, query, key, value, None, flashcp_plan=plan_documents(lengths, 1), **options)
    assert torch.allclose(out[0].transpose(0, 1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"flashcp_plan": plan_documents([20], 2)}, BatchError, "not bound to a rank"),
        ({"flashcp_plan": [20]}, BatchError, "not bound to a rank"),
        ({"flashcp_plan": ShardPlan([21], 1, [[(0, 0, 21)]])}, BatchError, "one row of 21 tokens"),
        ({"attention_mask": torch.ones(1, 1, 20, 20)}, BatchError, "attention_mask of shape"),
        ({"dropout": 0.1}, UnsupportedModelError, "attention dropout"),
        ({"is_causal": False}, UnsupportedModelError, "is_causal=False"),
        ({"s_aux": torch.zeros(3)}, UnsupportedModelError, "sinks that are not one score per head"),
        ({"sliding_window": 0}, UnsupportedModelError, "a sliding window of 0 tokens"),
        ({"position_bias": torch.zeros(1)}, UnsupportedModelError, "position bias"),
        ({"indices": torch.zeros(1)}, UnsupportedModelError, "a selection of keys"),
        ({"block_indices": torch.zeros(1)}, UnsupportedModelError, "a selection of blocks of keys"),
    ],
)
def test_inexact_options_are_refused(kwargs, error, message):
    query, key, value, _ = local_inputs([8, 12])
    kwargs = {"flashcp_plan": plan_documents([8, 12], 1), **kwargs}
    with pytest.raises(error, match=message):
        flashcp_attention(None, query, key, value, **kwargs)


def test_a_window_as_long_as_the_longest_document_is_full_attention():
    query, key, value, _ = local_inputs([8, 12])
    plan = plan_documents([8, 12], 1)
    full, _ = flashcp_attention(None, query, key, value, flashcp_plan=plan)
    windowed, _ = flashcp_attention(None, query, key, value, flashcp_plan=plan, sliding_window=12)
    assert torch.equal(full, windowed)


def test_autocast_casts_as_it_does_for_sdpa():
    query, key, value, _ = (tensor.float() for tensor in local_inputs([8, 12]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = flashcp_attention(None, query, key, value.bfloat16(), flashcp_plan=plan_documents([8, 12], 1))
    assert out.dtype == torch.bfloat16


def test_registered_functions_are_ours():
    assert ALL_ATTENTION_FUNCTIONS[INTERNAL_NAME] is flashcp_attention
