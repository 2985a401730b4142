"""The doctor: tiny copies, its results and its page."""

import json
import os

import pytest
import torch
from transformers import (
    AutoConfig,
    DeepseekV3Config,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    Phi3Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from hf_flashcp.attention.kernels import EXPERIMENTAL, TESTED, capabilities, flash_attention_3
from hf_flashcp.cli import main
from hf_flashcp.doctor import diagnosis as doctor
from hf_flashcp.doctor.float64 import float64_throughout
from hf_flashcp.doctor.gradients import GRADIENT_FLOOR, run_check
from hf_flashcp.doctor.tiny import build, causal_language_models, default_config, tiny_copy
from hf_flashcp.integrations.gradient_check import gradient_error


def run(capsys, line):
    code = main(line.split())
    out, err = capsys.readouterr()
    return code, out, err


def test_a_tiny_copy_is_small_and_keeps_how_tokens_attend():
    gemma = tiny_copy(Gemma2Config())
    assert gemma.layer_types == ["sliding_attention", "full_attention"] and gemma.sliding_window == 8
    assert gemma.attn_logit_softcapping == 50.0 and (gemma.num_attention_heads, gemma.num_key_value_heads) == (4, 2)
    assert tiny_copy(GptOssConfig()).layer_types == ["sliding_attention", "full_attention"]
    deepseek = tiny_copy(DeepseekV3Config())
    assert deepseek.qk_nope_head_dim + deepseek.qk_rope_head_dim != deepseek.v_head_dim
    assert tiny_copy(Qwen3Config(num_key_value_heads=32)).num_key_value_heads == 4
    assert tiny_copy(Qwen3MoeConfig()).num_experts == 4
    phi = tiny_copy(
        Phi3Config(
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 48,
                "long_factor": [2.0] * 48,
                "original_max_position_embeddings": 4096,
            }
        )
    )
    assert (
        phi.rope_parameters["original_max_position_embeddings"] == 16 and len(phi.rope_parameters["long_factor"]) == 4
    )
    for config in (gemma, deepseek, phi):
        assert sum(parameter.numel() for parameter in build(config, "eager").parameters()) < 200_000


def test_a_tiny_copy_does_not_modify_the_config():
    config = Gemma2Config()
    before = config.to_dict()
    tiny_copy(config)
    assert config.to_dict() == before


def test_everything_in_fp64():
    x = torch.randn(3, 4, dtype=torch.float64)
    with float64_throughout():
        for y in (
            x.float(),
            x.to(torch.float32),
            x.to(dtype=torch.float32),
            torch.nn.functional.softmax(x, dim=-1, dtype=torch.float32),
            torch.zeros(2, dtype=torch.float32),
        ):
            assert y.dtype == torch.float64
        assert torch.equal(x.float(), x) and x.to(torch.bfloat16).dtype == torch.bfloat16
    assert x.float().dtype == torch.float32


def test_the_error_of_a_gradient_that_should_be_zero_is_measured_against_the_others():
    reference = {"weight": torch.tensor([3.0, 4.0]), "key bias": torch.tensor([1e-17])}
    zero = {**reference, "key bias": torch.tensor([3e-17])}
    assert gradient_error(zero, reference, floor=GRADIENT_FLOOR) < 1e-14
    assert gradient_error(zero, reference) == pytest.approx(2)
    wrong = {**reference, "weight": torch.tensor([3.0, 4.5])}
    assert gradient_error(wrong, reference, floor=GRADIENT_FLOOR) == pytest.approx(0.1)


def test_a_supported_model(capsys, monkeypatch, tmp_path):
    """Check a directory that has a config but no weights, as a report and as JSON."""
    monkeypatch.setattr(capabilities, "installed_version", lambda package: None)
    monkeypatch.setattr(flash_attention_3, "operators", lambda: None)
    LlamaConfig(num_attention_heads=32, num_key_value_heads=8, architectures=["LlamaForCausalLM"]).save_pretrained(
        tmp_path
    )
    code, out, _ = run(capsys, f"doctor {tmp_path} --cp-size 3")
    assert code == 0 and out.rstrip().endswith("supported")
    assert "LlamaForCausalLM (llama), cp_size 3" in out and "on 3 processes" in out
    assert f"CUDA: torch_flash is {EXPERIMENTAL}" in out
    code, out, _ = run(capsys, f"doctor {tmp_path / 'config.json'} --json")
    found = json.loads(out)
    assert code == 0 and found["result"] == "supported" and found["gradient_error"] < 1e-12
    (group,) = found["layers"]
    assert (group["layers"], group["heads"], group["kv_heads"], group["key_dim"]) == (32, 32, 8, 128)
    kernels = {device: (chosen["kernel"], chosen["status"]) for device, chosen in group["kernels"].items()}
    assert kernels == {"cpu": ("cpu_flash", TESTED), "cuda": ("torch_flash", EXPERIMENTAL)}


def test_a_model_of_several_kinds_of_layers(capsys):
    found = json.loads(run(capsys, "doctor gpt_oss --json")[1])
    kinds = {group["kind"]: group for group in found["layers"]}
    assert set(kinds) == {"sliding, sinks", "full, sinks"}
    assert kinds["sliding, sinks"]["window"] == 128 and kinds["full, sinks"]["window"] is None
    assert kinds["sliding, sinks"]["layers"] == 18


@pytest.mark.parametrize(
    "config, message",
    [
        ("bloom", "refused: does not call its attention through transformers' attention interface"),
        ("llama4", "refused: Llama4ForCausalLM scales queries by their index in the row"),
        ("doge", "refused: DogeAttention (layer 0) got an attention_mask"),
        (LlamaConfig(attention_dropout=0.1), "to change: set attention_dropout to 0 (it is 0.1)"),
    ],
)
def test_refused_models_exit_with_1(capsys, tmp_path, config, message):
    if not isinstance(config, str):
        config.save_pretrained(tmp_path)
        config = str(tmp_path)
    code, out, _ = run(capsys, f"doctor {config}")
    assert code == 1 and message in out


@pytest.mark.parametrize(
    "line, message",
    [
        ("doctor", "doctor takes one model"),
        ("doctor llama --all-models", "doctor takes one model"),
        ("doctor llama --cp-size 0", "--cp-size must be at least 1"),
        ("doctor no/such-model", "No usable config for 'no/such-model'"),
    ],
)
def test_wrong_arguments_exit_with_2(capsys, line, message):
    code, out, err = run(capsys, line)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_a_wrong_gradient_is_refused(pool, monkeypatch):
    found = {"stage": "done", "error": None, "refused": False, "gradient_error": 1e-3, "loss_error": 0.0}
    monkeypatch.setattr(doctor, "run_check", lambda *args: found)
    diagnosis = doctor.diagnose(LlamaConfig(), pool)
    assert (diagnosis.result, diagnosis.reason) == (
        "refused",
        "gradients differ by 1e-03 from those of documents run alone",
    )


def _abort(*_):
    os.abort()


def test_a_check_that_crashes_is_reported(pool, monkeypatch):
    monkeypatch.setattr("hf_flashcp.doctor.gradients.check_gradients", _abort)
    found = run_check(pool, tiny_copy(LlamaConfig()), 2, "per_doc", 60.0)
    assert found["stage"] == "lost" and "died with exit code" in found["error"]
    monkeypatch.undo()
    assert run_check(pool, tiny_copy(LlamaConfig()), 2, "per_doc", 60.0)["stage"] == "done"


PROMISED = (
    "llama qwen2 qwen3 qwen3_moe mistral mixtral phi3 olmo2 olmo3 gemma2 gemma3_text gpt_oss cohere2 deepseek_v3 glm4 "
    "smollm3 granite starcoder2 exaone4"
).split()


def test_the_documented_page_has_every_promised_family():
    with open("docs/models.md") as file:
        supported = file.read().partition("## Supported")[2].partition("\n## ")[0]
    for model_type in PROMISED:
        assert f"`{model_type}`" in supported


def test_every_causal_language_model_is_known():
    assert set(PROMISED) <= set(causal_language_models())
    assert isinstance(default_config("llama"), type(AutoConfig.for_model("llama")))
