"""Wrappers of accelerate, transformers and PEFT: gradients at the optimizer, compared with per-document runs."""

import importlib.util
import os

import pytest
import torch

from hf_flashcp.errors import ConfigurationError, UnsupportedModelError
from hf_flashcp.integrations.models.checkpointing import CHECKPOINTING_ARGUMENT
from tests import wrapper_cases
from tests.device import ON_CPU, compiles_for_gpus


pytestmark = pytest.mark.devices("cpu", "cuda")

EXACT = 1e-6  # relative Frobenius norm of each parameter, and loss, with the models' own fp32 loss
COMPILED = 1e-5  # inductor computes the fp32 part of an RMSNorm in a different order

DDP = "DistributedType.MULTI_CPU" if ON_CPU else "DistributedType.MULTI_GPU"
FSDP = "DistributedType.FSDP"


def check(results, kind, tolerance=EXACT):
    for result in results:
        assert result["type"] == kind
        assert result["gradient_error"] < tolerance
        assert result["loss_error"] < EXACT
        assert result["norm_error"] < tolerance


@pytest.mark.parametrize(
    "world_size, options",
    [
        (2, {}),
        (4, {}),
        (4, {"sizes": {"dp_replicate_size": 2}}),
        (8, {"sizes": {"dp_replicate_size": 2, "dp_shard_size": 2}, "per_batch": 2}),
        (2, {"fsdp": {"cpu_offload": True}}),
        (2, {"activation_checkpointing": True}),
        (4, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}),
        (4, {"overrides": {"tie_word_embeddings": True}}),
        (4, {"lora": True}),
        (4, {"strategy": "whole_doc", "masked": [0, 3]}),
        (4, {"gradient_accumulation_steps": 2, "average_tokens_across_devices": False, "masked": [3, 4, 10]}),
    ],
    ids=str,
)
def test_fsdp2(pool, world_size, options):
    """Covers meshes (cp 2 alone, with dp_shard 2, with dp_replicate 2, with both) and many options.

    Options are offload, three kinds of checkpointing, clipping, tied embeddings and LoRA. There are ranks without
    targets, and groups with few.
    """
    check(pool.run(world_size, wrapper_cases.step, {"fsdp": {}, **options}), FSDP)


OFFLOADING = {
    "activation_checkpointing": True,
    "selective": True,
    "activation_checkpointing_kwargs": {"offload": True, "every_n_layers": 2},
}


@pytest.mark.devices("cpu")
@pytest.mark.parametrize(
    "options, expected",
    [
        ({"fsdp": {"activation_checkpointing": True}}, [(1, 30, 32), (1, 30, 32)]),
        (OFFLOADING, [(1, 30, 32), (30, 4, 8), (4, 30)]),
    ],
    ids=["accelerate", "transformers"],
)
def test_fsdp2_offloads_checkpoints(pool, options, expected):
    """Ranks have 30 tokens. accelerate offloads the inputs of both layers; transformers, which checkpoints one of
    them, its input, output of attention and logsumexp."""
    results, copies = zip(*pool.run(2, wrapper_cases.offloading_step, {"fsdp": {}, **options}))
    check(results, FSDP)
    for shapes in copies:
        assert [shape for shape in shapes if 30 in shape] == expected


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
        {"gradient_accumulation_steps": 2, "masked": [3, 4, 5, 10]},
        {"gradient_accumulation_steps": 2, "average_tokens_across_devices": False, "masked": [3, 4, 10]},
        {"overrides": {"tie_word_embeddings": True}},
        {"lora": True},
    ],
    ids=str,
)
def test_ddp(pool, options):
    """dp 2 x cp 2 with gradient norm and clipping, a group without targets, unequal groups, tied embeddings, LoRA."""
    check(pool.run(4, wrapper_cases.step, options), DDP)


@pytest.mark.skipif(CHECKPOINTING_ARGUMENT == "gradient_checkpointing", reason="offload needs transformers 5.24")
@pytest.mark.parametrize("world_size, cp_size, fsdp", [(1, 1, False), (2, 2, False), (2, 2, True), (4, 4, True)])
def test_all_remedies_for_memory_together(pool, world_size, cp_size, fsdp):
    """No logits, attention kept and offloaded from every second layer, KV heads in groups, and tiles of tokens."""
    options = {
        "cp_size": cp_size,
        "sizes": {"skip_logits": True, "head_groups": 2, "mlp_tiles": 3},
        "activation_checkpointing": True,
        "selective": True,
        "offload": True,
        "masked": [0, 3],
        **({"fsdp": {}} if fsdp else {}),
    }
    check(pool.run(world_size, wrapper_cases.step, options), FSDP if fsdp else DDP)


@pytest.mark.skipif(not (ON_CPU or compiles_for_gpus()), reason="needs triton, a C compiler and Python's headers")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.load)])
def test_torch_compile(pool, backend):
    options = {"torch_compile": True, "torch_compile_backend": backend, "fsdp": {}}
    check(pool.run(2, wrapper_cases.step, options), FSDP, COMPILED)


@pytest.mark.parametrize("fsdp", [{}, {"activation_checkpointing": True}])
def test_fsdp2_in_bf16_is_as_close_to_fp64_as_a_single_process(pool, fsdp):
    for result in pool.run(4, wrapper_cases.step, {"fsdp": fsdp, "bf16": True, "dtype": torch.float32}):
        assert 0 < result["gradient_error"] <= 2 * result["single_bf16_error"]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    "way, average, expected",
    [
        ("trainer", True, 259),
        ("trainer", False, 259 / 2),
        ("evaluate", True, 259),
        ("evaluate", False, 259 / 2),
        ("callback", True, 259),
        ("shard_inputs", True, 259 / 2),
    ],
)
def test_fsdp2_in_bf16_counts_targets_exactly(pool, way, average, expected, lora):
    """bf16 has 8 bits of precision, so that 259 would become 260."""
    for counts in pool.run(2, wrapper_cases.counts_in_bf16, way, average, lora):
        assert counts == {expected}


@pytest.mark.parametrize("world_size, accumulation", [(2, 1), (4, 2)])
def test_fsdp2_in_a_users_loop(pool, world_size, accumulation):
    """The loop uses accelerate's activation checkpointing, and leaves `use_cache` on."""
    assert max(pool.run(world_size, wrapper_cases.accelerator_loop, accumulation)) < EXACT


@pytest.mark.parametrize("state_dict_type", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_fsdp2_resumes_bitwise(pool, tmp_path, state_dict_type):
    """Four ranks train as dp 2 x cp 2; the checkpoint can also be resumed with cp 4, and on two ranks with cp 2."""
    going_on = pool.run(4, wrapper_cases.train_and_save, str(tmp_path), state_dict_type, 2, False)
    losses, parameters = going_on[0]
    if state_dict_type == "FULL_STATE_DICT":
        assert wrapper_cases.differences(parameters, tmp_path / "final") == (0.0, [])
    for resumed_losses, resumed in pool.run(4, wrapper_cases.train_and_save, str(tmp_path), state_dict_type, 2, True):
        assert resumed_losses == losses and len(losses) == 4
        assert all(torch.equal(resumed[name], parameters[name]) for name in parameters)
    for world_size, cp_size in [(4, 4), (2, 2)]:
        results = pool.run(
            world_size, wrapper_cases.train_and_save, str(tmp_path), state_dict_type, cp_size, True, False
        )
        for resumed_losses, resumed in results:
            assert resumed_losses == pytest.approx(losses, rel=1e-5)
            assert all(torch.allclose(resumed[name], parameters[name], rtol=1e-4, atol=1e-6) for name in parameters)


@pytest.mark.parametrize("sharded", [False, True])
def test_an_overflow_on_one_rank_skips_the_step_on_all(pool, sharded):
    """fp16 autocast with torch.amp.GradScaler, which accelerate uses under both DDP and FSDP2: the scale halves."""
    for found in pool.run(2, wrapper_cases.scaled_steps, sharded):
        assert found == [(512.0, False, True), (512.0, True, True)]


def test_documents_grouped_by_length(pool):
    first, second = pool.run(2, wrapper_cases.grouped_by_length)
    assert first == second and len(first) == 3


def test_a_loss_that_ignores_shift_labels_is_refused(pool):
    for error in pool.errors(2, wrapper_cases.loss_that_shifts_labels):
        assert type(error) is UnsupportedModelError and "ignores shift_labels" in str(error)


@pytest.mark.parametrize(
    "arguments",
    [
        {"auto_find_batch_size": True},
        {"neftune_noise_alpha": 5.0},
        {"predict_with_generate": True},
        {"train_sampling_strategy": "batch_rebalance"},
    ],
    ids=str,
)
def test_options_that_would_not_be_exact_are_refused(pool, arguments):
    for error in pool.errors(2, wrapper_cases.refused_argument, arguments):
        assert type(error) is ConfigurationError and f"{next(iter(arguments))} cannot be used" in str(error)


@pytest.mark.skipif(
    (ON_CPU and os.environ.get("TRITON_INTERPRET") != "1") or not importlib.util.find_spec("liger_kernel"),
    reason="needs liger-kernel, triton and, on a CPU, TRITON_INTERPRET=1",
)
@pytest.mark.parametrize("cp_size", [1, 2])
def test_ligers_fused_linear_cross_entropy(pool, cp_size):
    """Runs in fp32, on a CPU with Triton's interpreter."""
    for gradient_error, loss_error in pool.run(cp_size, wrapper_cases.liger_errors):
        assert gradient_error < 1e-5 and loss_error < 1e-5
