"""What hf_flashcp takes from the inside of transformers, accelerate and TRL. A failure here says that upstream has
moved: each docstring names the upstream line, what leans on it, and what to do.

Lines are those of transformers 5.24, accelerate 1.15 and TRL 1.16; all of it holds in transformers 5.17 too.
"""

import importlib
import inspect
from pathlib import Path

import accelerate.data_loader
import pytest
import torch
import transformers
from accelerate import ParallelismConfig
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Trainer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sdpa_mask,
)
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_flashcp.integrations.registration import INTERNAL_NAME
from tests.models import SMALL


def names(function):
    return list(inspect.signature(function).parameters)


def mask_arguments(create=create_causal_mask, config=None, position_ids=None, **options):
    """The keyword arguments with which a mask function is called."""
    calls = []
    ALL_MASK_ATTENTION_FUNCTIONS.register("canary", lambda *args, **kwargs: calls.append((args, kwargs)))
    config = config or LlamaConfig(**SMALL)
    config._attn_implementation = "canary"
    create(config, torch.zeros(1, 6, 8), None, None, position_ids, **options)
    ((args, kwargs),) = calls
    assert not args
    return kwargs


def test_a_name_with_flash_in_it_is_taken_for_a_flash_kernel():
    """utils/generic.py:270, is_flash_attention_requested: the reason for the internal name. If it no longer tests for
    "flash", register "flashcp" under its own name and drop the renaming (integrations/registration.py)."""
    from transformers.utils.generic import is_flash_attention_requested

    assert is_flash_attention_requested(requested_attention_implementation="flashcp")
    assert not is_flash_attention_requested(requested_attention_implementation=INTERNAL_NAME)


def test_a_choice_of_attention_enters_through_two_doors():
    """configuration_utils.py:595, the property that configs and `from_pretrained` set, for sub-configs too, and
    modeling_utils.py:1970, set_attn_implementation. Another door, or a model with a property of its own, has to rename
    "flashcp" too (integrations/registration.py, register). HRM has one: it refuses the name by itself."""
    assert isinstance(PreTrainedConfig.__dict__["_attn_implementation"], property)
    assert names(PreTrainedModel.set_attn_implementation)[:2] == ["self", "attn_implementation"]
    config = LlamaConfig(**SMALL, attn_implementation="flashcp")
    assert config._attn_implementation == INTERNAL_NAME
    assert AutoModelForCausalLM.from_config(config).config._attn_implementation == INTERNAL_NAME
    root = Path(transformers.__file__).parent / "models"
    others = [path for path in root.glob("*/configuration_*.py") if "def _attn_implementation" in path.read_text()]
    assert {path.parent.name for path in others} <= {"hrm_text"}


def test_class_flags():
    """modeling_utils.py:1095 and 1143: what model_support.check_model reads. Find the new signal there."""
    assert PreTrainedModel._supports_attention_backend is False and PreTrainedModel._is_stateful is False
    assert AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))._supports_attention_backend


def test_mask_functions_are_called_by_keyword():
    """masking_utils.py:1005: flashcp_mask reads q_length, mask_function and local_size by name."""
    found = mask_arguments(position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    assert found["q_length"] == found["kv_length"] == 6 and "mask_function" in found
    assert names(sdpa_mask)[:3] == ["batch_size", "q_length", "kv_length"]


def test_a_window_is_the_local_size_of_its_mask():
    """masking_utils.py:1248: how attach notices a window that only the mask has."""
    config = LlamaConfig(**SMALL)
    config.sliding_window = 3
    assert mask_arguments(create_sliding_window_causal_mask, config)["local_size"] == 3


def test_blocks_that_see_ahead_show_above_the_diagonal():
    """masking_utils.py:114: what registration._check_mask_function probes for."""
    function = mask_arguments(block_sequence_ids=torch.tensor([[0, 0, -1, -1, -1, -1]]))["mask_function"]
    tokens = torch.arange(5)
    assert function(0, 0, tokens, tokens + 1).tolist() == [True, False, False, False, False]


def test_keyword_arguments_of_a_forward_reach_attention():
    """The plan travels as one. Where a model drops it the first step says so."""
    found = []

    def attention(*args, flashcp_plan=None, **kwargs):
        found.append(flashcp_plan)
        return sdpa_attention_forward(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("canary", attention)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), attn_implementation="canary")
    model(input_ids=torch.tensor([[1, 2]]), flashcp_plan="plan")
    assert found == ["plan"] * 2


def test_length_dependent_rope_looks_at_the_largest_position():
    """modeling_rope_utils.py:49 and 89: why per_document_rope.py appends a document's last position. If the length
    comes from elsewhere, give it there."""
    source = inspect.getsource(dynamic_rope_update)
    assert source.count("seq_len = torch.max(position_ids) + 1") == 2
    assert '"dynamic" in rope_type' in source and 'rope_type == "longrope"' in source


def test_the_loss_takes_shifted_labels_and_a_count():
    """loss/loss_utils.py:51: shards have shift_labels, cut after the shift. Else compute the loss in the mixin."""
    logits, shifted = torch.randn(1, 3, 5), torch.tensor([[1, -100, 2]])
    expected = torch.nn.functional.cross_entropy(logits[0], shifted[0], ignore_index=-100, reduction="sum") / 7
    options = {"num_items_in_batch": torch.tensor(7), "shift_labels": shifted, "flashcp_plan": object()}
    assert torch.allclose(ForCausalLMLoss(logits, None, 5, **options), expected)


@pytest.mark.parametrize(
    "method, parameters",
    [
        ("_get_num_items_in_batch", ["self", "batch_samples", "device"]),
        ("_prepare_context_parallel_inputs", ["self", "model", "inputs"]),
        ("_set_signature_columns_if_needed", ["self"]),
        ("create_accelerator_and_postprocess", ["self"]),
        ("prediction_step", ["self", "model", "inputs", "prediction_loss_only", "ignore_keys"]),
    ],
)
def test_trainer_methods_that_the_mixin_overrides(method, parameters):
    """trainer.py: adapt integrations/trainer.py to the new signature."""
    assert names(getattr(Trainer, method)) == parameters


def test_the_trainer_shards_before_the_forward_and_scales_the_loss():
    """trainer.py:2076, 2363 and 2215: the count of targets is divided by cp_size, the loss multiplied by the number of
    processes. If either moves, work out W S_r / N again (docs/launch.md)."""
    assert "_prepare_context_parallel_inputs" in inspect.getsource(Trainer.training_step)
    count = inspect.getsource(Trainer._get_num_items_in_batch)
    assert "get_cp_size" in count or "non_data_parallel_size" in count
    assert "loss *=" in inspect.getsource(Trainer.compute_loss)


def test_accelerate_reads_the_mesh_dimension_cp():
    """data_loader.py:1158 and parallelism_config.py:124-355, which FlashCPPlugin overrides. Without "cp" there, give
    the ranks of a group the same batches with a sampler of our own."""
    source = inspect.getsource(accelerate.data_loader.prepare_data_loader)
    assert '"cp" in torch_device_mesh.mesh_dim_names' in source
    config = ParallelismConfig()
    config._set_size("cp", 2)
    assert config.cp_size == 2 and config._get_mesh() == (("cp",), (2,))
    for name in ("non_dp_dim_names", "dp_shard_cp_dim_names", "dp_cp_dim_names"):
        assert "cp" in getattr(config, name)
    assert callable(config._validate_accelerator)


def test_accelerate_s_dispatcher_does_not_know_cp():
    """data_loader.py:1117: why dispatch_batches is refused. If it learns, allow it (integrations/trainer.py)."""
    assert '"cp"' not in inspect.getsource(accelerate.data_loader.DataLoaderDispatcher)


@pytest.mark.parametrize(
    "module, config",
    [
        ("grpo_config", "GRPOConfig"),
        ("rloo_config", "RLOOConfig"),
        ("distillation_config", "DistillationConfig"),
    ],
)
def test_trl_refuses_context_parallelism_where_we_do(module, config):
    """trl/trainer/*_config.py: guards on cp_enabled, which FlashCPPlugin has False; integrations/trl_guards.py refuses
    every trainer but SFTTrainer instead. A guard that is gone upstream says that its trainer may be let in."""
    config = getattr(importlib.import_module(f"trl.trainer.{module}"), config)
    assert "cp_enabled" in inspect.getsource(inspect.unwrap(config.__post_init__))
