"""Internals of transformers, accelerate and TRL on which hf_flashcp relies.

A failure here means that upstream has changed. Each docstring names the upstream line, the code here that relies on
it, and what to do. Line numbers are those of transformers 5.24, accelerate 1.15 and TRL 1.16; the tests also pass with
transformers 5.17.
"""

import importlib
import inspect
from pathlib import Path

import accelerate.data_loader
import accelerate.utils.fsdp_utils
import numpy as np
import pytest
import torch
import transformers
from accelerate import ParallelismConfig
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    masking_utils,
)
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
from transformers.models.auto import modeling_auto as auto

from hf_flashcp import save_attention_context_fn
from hf_flashcp.integrations.models.checkpointing import (
    CHECKPOINTING_ARGUMENT,
    enable_checkpointing,
    inside_wrappers,
    layers_run_again,
)
from hf_flashcp.integrations.models.forward_arguments import CACHES, MEDIA
from hf_flashcp.integrations.models.hybrids import MIXERS
from hf_flashcp.integrations.registration import INTERNAL_NAME
from tests.models import SMALL


def names(function):
    return list(inspect.signature(function).parameters)


def mask_arguments(create=create_causal_mask, config=None, position_ids=None, **options):
    """Return the keyword arguments with which transformers calls a mask function."""
    calls = []
    ALL_MASK_ATTENTION_FUNCTIONS.register("canary", lambda *args, **kwargs: calls.append((args, kwargs)))
    config = config or LlamaConfig(**SMALL)
    config._attn_implementation = "canary"
    create(config, torch.zeros(1, 6, 8), None, None, position_ids, **options)
    ((args, kwargs),) = calls
    assert not args
    return kwargs


def test_a_name_with_flash_in_it_is_taken_for_a_flash_kernel():
    """utils/generic.py:270, is_flash_attention_requested, is the reason for the internal name.

    If it no longer looks for "flash", register "flashcp" under its own name and drop the renaming
    (integrations/registration.py).
    """
    from transformers.utils.generic import is_flash_attention_requested

    assert is_flash_attention_requested(requested_attention_implementation="flashcp")
    assert not is_flash_attention_requested(requested_attention_implementation=INTERNAL_NAME)


def test_attention_is_chosen_in_two_places():
    """configuration_utils.py:595, the property that configs (sub-configs too) and `from_pretrained` set, and
    modeling_utils.py:1970, set_attn_implementation.

    Any further place, or a model that overrides the property, has to rename "flashcp" as well (register in
    integrations/registration.py). HRM overrides it, and refuses the name itself.
    """
    assert isinstance(PreTrainedConfig.__dict__["_attn_implementation"], property)
    assert names(PreTrainedModel.set_attn_implementation)[:2] == ["self", "attn_implementation"]
    config = LlamaConfig(**SMALL, attn_implementation="flashcp")
    assert config._attn_implementation == INTERNAL_NAME
    assert AutoModelForCausalLM.from_config(config).config._attn_implementation == INTERNAL_NAME
    root = Path(transformers.__file__).parent / "models"
    others = [path for path in root.glob("*/configuration_*.py") if "def _attn_implementation" in path.read_text()]
    assert {path.parent.name for path in others} <= {"hrm_text"}


def test_class_flags():
    """modeling_utils.py:1095 and 1143, which model_support.check_model reads. Find the new flags there."""
    assert PreTrainedModel._supports_attention_backend is False and PreTrainedModel._is_stateful is False
    assert AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))._supports_attention_backend


def test_mask_functions_are_called_by_keyword():
    """masking_utils.py:1005: flashcp_mask reads q_length, mask_function and local_size by name."""
    found = mask_arguments(position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    assert found["q_length"] == found["kv_length"] == 6 and "mask_function" in found
    assert names(sdpa_mask)[:3] == ["batch_size", "q_length", "kv_length"]


def test_a_window_is_the_local_size_of_its_mask():
    """masking_utils.py:1248, by which attach notices a sliding window that only the mask has."""
    config = LlamaConfig(**SMALL)
    config.sliding_window = 3
    assert mask_arguments(create_sliding_window_causal_mask, config)["local_size"] == 3


def test_bidirectional_blocks_show_above_the_diagonal():
    """masking_utils.py:114, for which registration._check_mask_function probes."""
    function = mask_arguments(block_sequence_ids=torch.tensor([[0, 0, -1, -1, -1, -1]]))["mask_function"]
    tokens = torch.arange(5)
    assert function(0, 0, tokens, tokens + 1).tolist() == [True, False, False, False, False]


def test_packed_documents_are_found_by_one_function(monkeypatch):
    """masking_utils.py:870: registration.py replaces find_packed_sequence_indices inside a sharded forward.

    If other code derives documents as well, positions that skip inside a document look like a mask of the model.
    """
    positions = torch.tensor([[0, 1, 2, 7, 8, 9]])
    last, tokens = torch.tensor(5), torch.arange(6)
    assert not mask_arguments(position_ids=positions)["mask_function"](0, 0, last, tokens).all()
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    assert mask_arguments(position_ids=positions)["mask_function"](0, 0, last, tokens).all()


def test_keyword_arguments_of_a_forward_reach_attention():
    """The plan is passed as a keyword argument. If a model drops it, the first step raises an error."""
    found = []

    def attention(*args, flashcp_plan=None, **kwargs):
        found.append(flashcp_plan)
        return sdpa_attention_forward(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("canary", attention)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), attn_implementation="canary")
    model(input_ids=torch.tensor([[1, 2]]), flashcp_plan="plan")
    assert found == ["plan"] * 2


def test_length_dependent_rope_looks_at_the_largest_position():
    """modeling_rope_utils.py:49 and 89, because of which per_document_rope.py appends a document's last position.

    If the length comes from elsewhere, supply it there.
    """
    source = inspect.getsource(dynamic_rope_update)
    assert source.count("seq_len = torch.max(position_ids) + 1") == 2
    assert '"dynamic" in rope_type' in source and 'rope_type == "longrope"' in source


def test_the_loss_takes_shifted_labels_and_a_count():
    """loss/loss_utils.py:51: shards have shift_labels, which are split after the shift.

    Else compute the loss in the mixin.
    """
    logits, shifted = torch.randn(1, 3, 5), torch.tensor([[1, -100, 2]])
    expected = torch.nn.functional.cross_entropy(logits[0], shifted[0], ignore_index=-100, reduction="sum") / 7
    options = {"num_items_in_batch": torch.tensor(7), "shift_labels": shifted, "flashcp_plan": object()}
    assert torch.allclose(ForCausalLMLoss(logits, None, 5, **options), expected)


@pytest.mark.parametrize(
    "method, parameters",
    [
        ("_get_num_items_in_batch", ["self", "batch_samples", "device"]),
        ("_load_callback_state", ["self"]),
        ("_prepare_context_parallel_inputs", ["self", "model", "inputs"]),
        ("_set_signature_columns_if_needed", ["self"]),
        ("create_accelerator_and_postprocess", ["self"]),
        ("prediction_step", ["self", "model", "inputs", "prediction_loss_only", "ignore_keys"]),
    ],
)
def test_trainer_methods_that_the_mixin_overrides(method, parameters):
    """trainer.py: adapt integrations/trainers/trainer.py to the new signature."""
    assert names(getattr(Trainer, method)) == parameters


def test_the_trainer_shards_before_the_forward_and_scales_the_loss():
    """trainer.py:2076, 2363 and 2215: the target count is divided by cp_size, the loss multiplied by the processes.

    If either changes, derive W S_r / N again (docs/launch.md).
    """
    assert "_prepare_context_parallel_inputs" in inspect.getsource(Trainer.training_step)
    count = inspect.getsource(Trainer._get_num_items_in_batch)
    assert "get_cp_size" in count or "non_data_parallel_size" in count
    assert "loss *=" in inspect.getsource(Trainer.compute_loss)


def test_accelerate_reads_the_mesh_dimension_cp():
    """data_loader.py:1158 and parallelism_config.py:124-355, which FlashCPPlugin overrides.

    If "cp" disappears there, give the ranks of a group the same batches with our own sampler.
    """
    source = inspect.getsource(accelerate.data_loader.prepare_data_loader)
    assert '"cp" in torch_device_mesh.mesh_dim_names' in source
    config = ParallelismConfig()
    config._set_size("cp", 2)
    assert config.cp_size == 2 and config._get_mesh() == (("cp",), (2,))
    for name in ("non_dp_dim_names", "dp_shard_cp_dim_names", "dp_cp_dim_names"):
        assert "cp" in getattr(config, name)
    assert callable(config._validate_accelerator)


def test_accelerate_s_dispatcher_does_not_know_cp():
    """data_loader.py:1117, because of which dispatch_batches is refused. If it supports cp, allow it
    (integrations/trainers/trainer.py)."""
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
    """trl/trainer/*_config.py: guards on cp_enabled, which is False in FlashCPPlugin.

    integrations/trainers/trl_guards.py refuses every trainer except SFTTrainer instead. If a guard disappears
    upstream, its trainer may be supported.
    """
    config = getattr(importlib.import_module(f"trl.trainer.{module}"), config)
    assert "cp_enabled" in inspect.getsource(inspect.unwrap(config.__post_init__))


SHARDED = {
    "input_ids",
    "inputs_embeds",
    "position_ids",
    "labels",
    "token_type_ids",
    "mm_token_type_ids",
    "moe_mm_token_type_ids",
    "task_type_ids",
    "input_shape_ids",
    "input_pronunciation_ids",
    "per_layer_inputs",
}
"""Arguments with one number or vector per token."""
SWITCHES = {
    "use_cache",
    "logits_to_keep",
    "output_router_logits",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "interpolate_pos_encoding",
    "vision_feature_layer",
    "vision_feature_layers",
    "vision_feature_select_strategy",
    "lang_ids",
}
"""Arguments that are the same on every rank; use_cache is turned off."""
BESIDE_TEXT = {
    "encoder_hidden_states",
    "encoder_attention_mask",
    "encoder_outputs",
    "cross_attention_mask",
    "full_text_row_masked_out_mask",
    "decoder_input_ids",
    "decoder_attention_mask",
    "decoder_position_ids",
    "decoder_inputs_embeds",
    "num_frames_per_video",
    "tile_fine_mask",
    "router_labels",
    "self_conditioning_logits",
    "self_conditioning_mask",
    "shared_kv_states",
    "chunk_sample_lengths",
    "padding_mask",
    "second_per_grid_ts",
    "width",
    "height",
    "state",
    "noise",
    "timestep",
    "actions",
    "lm_kwargs",
}
"""Arguments for encoders, for decoders of encoders, and for image and audio towers, none of which is sharded."""


def language_models():
    """Return the classes of causal and multimodal language models that may call our attention."""
    mappings = (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    names = {name for mapping in mappings for entry in mapping.values() for name in np.atleast_1d(entry)}
    classes = (getattr(transformers, name, None) for name in sorted(names))
    return [model for model in classes if getattr(model, "_supports_attention_backend", False)]


def test_every_argument_of_a_forward_is_known():
    """modeling_*.py: put a new name on the list that says what happens to it.

    If it replaces a name that we read, add it to integrations/models/forward_arguments.py or data/batch.py.
    """
    known = {"self", "kwargs", "attention_mask", *CACHES, *SHARDED, *SWITCHES, *BESIDE_TEXT}
    unknown = {
        name: model.__name__
        for model in language_models()
        for name in names(model.forward)
        if name not in known and not MEDIA.search(name)
    }
    assert not unknown


def test_every_argument_that_holds_a_cache_has_a_known_name():
    """cache_utils.py: transformers 5.24 renamed past_key_values and cache_params to cache."""
    found = {
        name: parameter
        for model in language_models()
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if "Cache" in str(parameter.annotation)
    }
    assert found and found.keys() <= set(CACHES)


def test_arguments_by_position_are_those_of_the_forward():
    """utils/deprecation.py: a forward that takes deprecated names keeps its signature, which attach reads."""
    assert names(LlamaForCausalLM.forward)[:4] == ["self", "input_ids", "attention_mask", "position_ids"]


def test_layers_show_whether_they_are_recomputed():
    """modeling_utils.py:3221, _set_gradient_checkpointing, which integrations/models/checkpointing.py reads.

    Flag and function have the same names with both names of the argument. `context_fn` is a keyword of the function.
    """
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    assert layers_run_again(model) == set()
    enable_checkpointing(model)
    assert layers_run_again(model) == {0, 1}
    enable_checkpointing(model, {"use_reentrant": True}, every_n_layers=2, offload=True)
    assert layers_run_again(model) == {0}
    enable_checkpointing(model, {"use_reentrant": False, "context_fn": save_attention_context_fn})
    assert layers_run_again(model) == set()


def test_wrapped_layers_show_how_they_are_recomputed():
    """torch's checkpoint_wrapper.py, with which accelerate wraps layers under FSDP2 (fsdp_utils.py:701)."""
    assert "checkpoint_wrapper(layer" in inspect.getsource(accelerate.utils.fsdp_utils.fsdp2_apply_ac)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    layers = model.model.layers
    layers[0] = offload_wrapper(checkpoint_wrapper(layers[0]))
    layers[1] = checkpoint_wrapper(layers[1], context_fn=save_attention_context_fn)
    assert layers_run_again(model) == {0}
    assert type(inside_wrappers(layers[0])).__name__ == "LlamaDecoderLayer"


def test_saved_tensor_hooks_can_be_read():
    """attention/checkpointing.py asks which hooks are around a checkpoint."""
    with (hooks := torch.autograd.graph.save_on_cpu()):
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) == (hooks.pack_hook, hooks.unpack_hook)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_checkpointing_is_called_by_one_of_two_names():
    """training_args.py:908 and trainer.py:1503, from 5.24 on: the old name warns, and will be removed in v6."""
    fields = TrainingArguments.__dataclass_fields__
    assert {CHECKPOINTING_ARGUMENT, f"{CHECKPOINTING_ARGUMENT}_kwargs"} <= fields.keys()
    assert "every_n_layers" in fields[f"{CHECKPOINTING_ARGUMENT}_kwargs"].metadata["help"]
    assert names(getattr(PreTrainedModel, f"{CHECKPOINTING_ARGUMENT}_enable"))[2:] == ["every_n_layers", "offload"]


def test_every_text_model_checkpoints_by_layers():
    """modeling_layers.py:55, GradientCheckpointingLayer: no other module recomputes its layers."""
    root = Path(transformers.__file__).parent / "models"
    files = root.glob("*/modeling_*.py")
    assert not [path.name for path in files if "_gradient_checkpointing_func(" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("family", [name for name, mixer in MIXERS.items() if mixer.functions])
def test_mixers_call_functions_of_their_modeling_file(family):
    """`integrations/models/recurrent_layers.py` replaces these functions, and calls them as `recurrence/` says.

    The wrapper around a function (integrations/hub_kernels.py:1028) keeps what `recurrence/package_kernels.py` asks
    for in its closure. If a name is new, add it to `MIXERS`.
    """
    if family not in CONFIG_MAPPING:
        pytest.skip("newer than the installed transformers")
    module, mixer = modeling_file(family), MIXERS[family]
    forward = inspect.getsource(getattr(module, mixer.name).forward)
    for name in mixer.functions:
        assert forward.count(f"{name}(") == 1
        function = getattr(module, name)
        assert names(function)[: len(POSITIONAL[name])] == POSITIONAL[name]
        function = getattr(function, "__wrapped__", function) if getattr(function, "_flashcp", False) else function
        if inspect.isfunction(function):  # a module if the package kernels is installed
            variables = inspect.getclosurevars(function).nonlocals
            assert {"implementation", "package", "is_new_implementation"} <= set(variables)
    assert ("mamba2_split_conv1d_scan_combined(" in forward) == (mixer.kind == "Mamba-2")


POSITIONAL = {
    "causal_conv1d_fn": ["hidden_states", "weight", "bias", "activation"],
    "torch_chunk_gated_delta_rule": ["query", "key", "value", "g", "beta"],
    "chunk_kimi_delta_attention": ["query", "key", "value", "g", "beta"],
    "mamba2_chunk_scan": ["hidden_states", "dt", "A", "B", "C", "chunk_size"],
}


def modeling_file(family):
    config = CONFIG_MAPPING[family]
    return importlib.import_module(config.__module__.replace("configuration_", "modeling_"))
