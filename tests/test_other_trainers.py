"""TRL's SFTTrainer and the stock Trainer: gradients at the optimizer, compared with per-document runs."""

import pytest

from hf_flashcp.errors import BatchError, ConfigurationError
from tests import trl_cases


GRADIENT = 1e-6  # relative Frobenius norm of each parameter, fp64 parameters through the models' own fp32 loss


def check(results):
    for result in results:
        assert result["gradient_error"] < GRADIENT
        assert result["loss"] == pytest.approx(result["expected_loss"], rel=GRADIENT)


@pytest.mark.parametrize("way", ["bfd", "wrapped", "collator"])
@pytest.mark.parametrize("world_size, cp_size", [(2, 2), (4, 2)])
@pytest.mark.smoke
def test_sft_trainer_behind_the_mixin(pool, way, world_size, cp_size):
    """TRL's packing with and without document boundaries, and our collator. Counters count a shared batch once."""
    results = pool.run(world_size, trl_cases.sft_step, {"way": way, "cp_size": cp_size})
    check(results)
    for result in results:
        assert result["num_tokens"] == result["tokens_seen"] == result["expected_tokens"]
        assert {"flashcp_kv_fraction", "flashcp_pair_imbalance", "flashcp_plan_ms"} <= result["log"].keys()


def test_router_loss_of_the_sft_trainer(pool):
    """The aux_loss that TRL logs is compared as well."""
    (expected,) = pool.run(1, trl_cases.router_loss_of_sft_trainer)
    for found in pool.run(3, trl_cases.router_loss_of_sft_trainer):
        assert found == pytest.approx(expected, rel=GRADIENT) and found[2] > 1


@pytest.mark.parametrize("fsdp", [False, True])
def test_sft_trainer_without_logits(pool, fsdp):
    """TRL's fused output head, whose weight FSDP2 shards, computes the loss: no tensor has the size of logits."""
    results = pool.run(2, trl_cases.sft_step, {"way": "bfd", "fsdp": fsdp})
    check(results)
    assert all(result["largest"] < result["logits"] for result in results)


def test_dft_loss_of_the_sft_trainer(pool):
    check(pool.run(2, trl_cases.sft_step, {"way": "bfd", "loss_type": "dft"}))


@pytest.mark.parametrize("way", ["bfd", "wrapped", "collator"])
@pytest.mark.parametrize("world_size, cp_size", [(2, 2), (4, 2)])
def test_stock_sft_trainer_with_the_callback(pool, way, world_size, cp_size):
    check(pool.run(world_size, trl_cases.sft_step, {"way": way, "callback": True, "cp_size": cp_size}))


@pytest.mark.parametrize(
    "world_size, options",
    [
        (2, {}),
        (3, {"gradient_accumulation_steps": 2}),
        (2, {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}),
        (2, {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}),
        (2, {"ddp_find_unused_parameters": True}),
        (2, {"ddp_find_unused_parameters": False}),
        (4, {"cp_size": 2}),
        (
            4,
            {
                "cp_size": 2,
                "activation_checkpointing": True,
                "activation_checkpointing_kwargs": {"use_reentrant": True},
                "ddp_find_unused_parameters": False,
            },
        ),
        (
            4,
            {
                "cp_size": 2,
                "activation_checkpointing": True,
                "activation_checkpointing_kwargs": {"use_reentrant": False},
                "ddp_find_unused_parameters": True,
            },
        ),
        (4, {"cp_size": 2, "gradient_accumulation_steps": 2}),
    ],
    ids=str,
)
def test_stock_trainer_with_the_callback(pool, world_size, options):
    results = pool.run(world_size, trl_cases.stock_trainer_step, options)
    check(results)
    for result in results:
        assert result["documents"] == 3
        assert {"flashcp_kv_fraction", "flashcp_token_imbalance", "flashcp_plan_ms"} <= result["log"].keys()


def check_errors(errors, kind, message):
    for error in errors:
        assert type(error) is kind and message in str(error), error


@pytest.mark.parametrize("after_training", [True, False])
def test_stock_evaluation_is_refused(pool, after_training):
    errors = pool.errors(2, trl_cases.stock_evaluation, after_training)
    check_errors(errors, ConfigurationError, "cannot evaluate under context parallelism")


def test_a_plugin_without_an_attached_model_is_noticed(pool):
    """The stock Trainer would multiply the gradient by cp_size."""
    errors = pool.errors(2, trl_cases.stock_trainer_without_the_callback, "sdpa")
    check_errors(errors, ConfigurationError, "no model is attached")
    errors = pool.errors(2, trl_cases.stock_trainer_without_the_callback, "flashcp")
    check_errors(errors, BatchError, "the batch has not been sharded")


def test_a_dispatched_iterable_dataset_is_refused(pool):
    errors = pool.errors(2, trl_cases.iterable_dataset_with_the_callback)
    check_errors(errors, ConfigurationError, "dispatch_batches")


def test_other_trainers_of_trl_are_refused(pool):
    errors = pool.errors(2, trl_cases.other_config)
    check_errors(errors, ConfigurationError, "DistillationTrainer cannot run under context parallelism: it reads")


def test_the_mixin_before_another_trainer_of_trl_is_refused(pool):
    """There the plugin comes from the environment, after the config has been created."""
    check_errors(pool.errors(2, trl_cases.mixed_trainer), ConfigurationError, "DistillationTrainer cannot run")
