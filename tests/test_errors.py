"""User mistakes raise one clear error of our types on every rank, at the latest in the first step, and nothing
hangs."""

import os
from types import SimpleNamespace

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.utils import DistributedType

from hf_flashcp import FlashCPPlugin, errors, plan_documents
from hf_flashcp.errors import BatchError, ConfigurationError, FlashCPError, PlanError, UnsupportedModelError
from hf_flashcp.integrations.models.hybrids import MIXERS
from hf_flashcp.integrations.models.per_slice_mixers import require_whole_documents
from hf_flashcp.planning import STRATEGIES
from tests import error_cases


pytestmark = pytest.mark.smoke


def check(results, error, message):
    for raised in results:
        assert type(raised) is error, raised
        assert isinstance(raised, FlashCPError)
        assert message in str(raised)


@pytest.mark.parametrize(
    "name, message",
    [
        ("bloom", "attention interface"),
        ("stablelm", "attention interface"),
        ("mamba", "attention interface"),
        ("window in the mask alone", "a sliding window in its mask alone"),
        ("window in the mask alone, no layer types", "masks for a sliding window of 8 tokens"),
        ("layerdrop", "drops layers at random"),
        ("positions from padding", "counts positions from pad_token_id + 1"),
        ("dropout", "set the attention dropout in its config to 0"),
        ("bidirectional", "is_causal=False"),
    ],
)
def test_models_that_would_not_be_exact_are_refused(pool, name, message):
    check(pool.errors(2, error_cases.train_step, name), UnsupportedModelError, message)


@pytest.mark.parametrize(
    "kind, error, message",
    [
        ("sdpa", UnsupportedModelError, 'attn_implementation="flashcp"'),
        ("plain module", UnsupportedModelError, "not a transformers model"),
        ("encoder-decoder", UnsupportedModelError, "is an encoder-decoder model"),
        ("stock parallelism config", ConfigurationError, "parallelism_config=FlashCPPlugin"),
        ("mesh without cp", ConfigurationError, 'none of them "cp"'),
    ],
)
def test_attaching_to_the_wrong_thing(pool, kind, error, message):
    check(pool.errors(2, error_cases.attach_to, kind), error, message)


def test_a_layer_that_bypasses_our_attention(pool):
    check(pool.errors(2, error_cases.never_calls_us), UnsupportedModelError, "1 attention layers of LlamaForCausalLM")


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"attention_mask": torch.cat([torch.zeros(1, 4), torch.ones(1, 17)], 1)}, BatchError, "masks 4 of 21 tokens"),
        ({"attention_mask": torch.ones(1, 1, 21, 21)}, BatchError, "custom attention_mask"),
        ({"labels": torch.zeros(1, 20)}, BatchError, "labels have shape"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, BatchError, "neither empty"),
        ({"flashcp_plan": plan_documents([12, 10], 2)}, BatchError, "covers 22 tokens"),
        ({"flashcp_plan": plan_documents([12, 9], 3)}, ConfigurationError, "cp_size 3"),
        (
            {"flashcp_plan": None, "input_ids": torch.ones(1, 1, dtype=torch.long), "position_ids": None}
            | {"labels": None, "shift_labels": None},
            PlanError,
            "1 tokens for cp_size 2",
        ),
    ],
)
def test_bad_batches(pool, changes, error, message):
    check(pool.errors(2, error_cases.forward_with, changes), error, message)


def test_a_split_document_in_a_model_with_recurrent_layers(pool):
    check(
        pool.errors(2, error_cases.train_step, "jamba"),
        BatchError,
        "(Mamba-1) that need whole documents, but the plan",
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("cp_size", [2, 3])
@pytest.mark.parametrize("num_documents", [1, 2, 3])
def test_the_advice_about_whole_documents_fits_the_batch(num_documents, cp_size, strategy):
    plan = plan_documents([12] * (num_documents - 1) + [13], cp_size, strategy=strategy)
    if strategy == "whole_doc" and num_documents >= cp_size:
        require_whole_documents(plan, torch.nn.Identity(), MIXERS["jamba"])
        return
    if all(stop - start == plan.lengths[d] for slices in plan.slices for d, start, stop in slices):
        return
    with pytest.raises(BatchError, match="Identity has layers \\(Mamba-1\\) that need whole documents") as raised:
        require_whole_documents(plan, torch.nn.Identity(), MIXERS["jamba"])
    count = f"The batch has {num_documents} document{'s' if num_documents > 1 else ''} for {cp_size} ranks: put at "
    assert (count in str(raised.value)) == (num_documents < cp_size)
    assert ('strategy="whole_doc"' in str(raised.value)) == (num_documents >= cp_size)


def test_an_error_leaves_nothing_behind(pool):
    assert pool.run(2, error_cases.recovers_after_an_error) == [None, None]


@pytest.mark.parametrize(
    "arguments, environment, message",
    [
        ({"cp_size": 3}, {}, "cp_size 3 does not divide the 2 processes"),
        ({"cp_size": 4}, {}, "cp_size 4 does not divide the 2 processes"),
        ({"cp_size": 0}, {}, "positive integer"),
        ({"cp_size": 2, "dp_shard_size": "2"}, {}, "dp_shard_size must be a positive integer, got '2'"),
        ({}, {"PARALLELISM_CONFIG_CP_SIZE": "two"}, "cp_size must be a positive integer, got 'two'"),
        ({}, {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": ""}, "dp_replicate_size must be a positive integer, got ''"),
        ({"cp_size": 2, "tp_size": 2}, {}, "tp_size is 2"),
        ({"cp_size": 2, "tp_size": 2, "dp_replicate_size": 2}, {}, "tp_size is 2"),
        ({"cp_size": 2, "sp_size": 2}, {}, "sp_size is 2"),
        ({"cp_size": 2, "dp_shard_size": 2}, {}, "make their product 1"),
        ({"cp_size": 2, "strategy": "zigzag"}, {}, "Unknown strategy 'zigzag'"),
        ({"cp_size": 2, "cp_backend": "ring"}, {}, 'cp_backend is "ring"'),
        ({"cp_size": 2, "cp_handler": object()}, {}, "cp_handler"),
        (
            {},
            {"PARALLELISM_CONFIG_CP_SIZE": "3", "PARALLELISM_CONFIG_CP_BACKEND": "flashcp"},
            "cp_size 3 does not divide",
        ),
        ({"cp_size": 2}, {"FLASHCP_STRATEGY": "zigzag"}, "Unknown strategy 'zigzag'"),
    ],
)
def test_parallelism_that_does_not_fit(pool, arguments, environment, message):
    check(pool.errors(2, error_cases.make_plugin, arguments, environment), ConfigurationError, message)


@pytest.mark.parametrize(
    "distributed_type, is_fsdp2, message",
    [(DistributedType.DEEPSPEED, False, "DeepSpeed"), (DistributedType.FSDP, False, "fsdp_version: 2")],
)
def test_wrappers_that_do_not_fit(distributed_type, is_fsdp2, message):
    accelerator = SimpleNamespace(distributed_type=distributed_type, is_fsdp2=is_fsdp2)
    with pytest.raises(ConfigurationError, match=message):
        FlashCPPlugin(cp_size=2)._validate_accelerator(accelerator)


def test_arguments_win_over_the_environment(monkeypatch):
    monkeypatch.setitem(os.environ, "PARALLELISM_CONFIG_CP_SIZE", "4")
    monkeypatch.setitem(os.environ, "PARALLELISM_CONFIG_CP_BACKEND", "flashcp")
    monkeypatch.setitem(os.environ, "FLASHCP_STRATEGY", "per_seq")
    assert FlashCPPlugin().cp_size == 4 and FlashCPPlugin().strategy == "per_seq"
    plugin = FlashCPPlugin(cp_size=2, strategy="whole_doc")
    assert (plugin.cp_size, plugin.cp_backend, plugin.strategy, plugin.cp_enabled) == (
        2,
        "flashcp",
        "whole_doc",
        False,
    )


@pytest.mark.parametrize(
    "trainer, training, message",
    [
        ({}, {"label_smoothing_factor": 0.1}, "label_smoothing_factor cannot be used"),
        ({"compute_loss_func": error_cases.a_loss}, {}, "compute_loss_func"),
        ({}, {"eval_use_gather_object": True}, "eval_use_gather_object cannot be used"),
        ({}, {"label_names": ["labels", "weights"]}, r"label_names is ['labels', 'weights']"),
        ({}, {"label_names": []}, r"label_names is []"),
        ({}, {"parallelism_config": ParallelismConfig()}, "parallelism_config is a ParallelismConfig"),
    ],
)
def test_trainer_options_that_would_be_wrong(pool, trainer, training, message):
    check(pool.errors(2, error_cases.make_trainer, trainer, training), ConfigurationError, message)


def test_a_prediction_step_of_a_trainer_behind_ours_is_refused(pool):
    check(pool.errors(2, error_cases.make_trainer_with_its_own_step), ConfigurationError, "_OwnStep has a prediction_")


def test_every_error_is_a_value_error_with_one_base():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and not issubclass(kind, Warning)]
    assert len(kinds) == 5 and all(issubclass(kind, FlashCPError) and issubclass(kind, ValueError) for kind in kinds)
