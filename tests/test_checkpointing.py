"""All kinds of activation checkpointing: exact gradients, number of exchanges, and where received KV is kept."""

import contextlib
import functools

import pytest
import torch
from torch.autograd.graph import save_on_cpu

from hf_flashcp import FlashCPTrainer, save_attention_context_fn
from hf_flashcp.attention.checkpointing import kept_or_computed
from hf_flashcp.errors import BatchError, ConfigurationError
from hf_flashcp.integrations.models.checkpointing import CHECKPOINTING_ARGUMENT, enable_checkpointing
from tests import checkpointing_cases
from tests.accelerate_state import fresh_accelerate
from tests.device import DEVICE
from tests.models import KINDS, WHOLE_DOCUMENT_HYBRIDS, build_model
from tests.trainer_cases import training_arguments


pytestmark = pytest.mark.devices("cpu", "cuda")

FP64 = 1e-12


@pytest.mark.parametrize("cp_size, lora", [(1, False), (2, False), (2, True), (4, False)])
def test_every_combination_is_exact(pool, cp_size, lora):
    """All kinds of checkpointing, every second or third layer, offload, received KV kept or not: gradients are those
    without checkpointing, bit by bit."""
    for error, found in pool.run(cp_size, checkpointing_cases.errors, lora):
        assert error < FP64
        assert len(found) == 36 and max(found.values()) == 0


@pytest.mark.devices("cpu")
def test_offload_leaves_neither_inputs_nor_attention_results_on_the_device(pool):
    """Either all three layers are checkpointed, or the first and the third one. Without `offload` the device keeps
    their inputs, and with attention kept its results too. Offloaded results are not computed again either."""
    for found, inputs, results in pool.run(2, checkpointing_cases.kept_bytes_by_kind):
        for every, layers in ((1, 3), (2, 2)):
            least, *calls = found["plain", every, True]
            assert found["plain", every, False] == (least + layers * inputs, *calls)
            assert found["attention kept", every, True] == (least, 3 * 2, 3 * 2)
            assert found["attention kept", every, False] == (least + layers * (inputs + results), 3 * 2, 3 * 2)


@pytest.mark.devices("cpu")
@pytest.mark.skipif(torch.accelerator.is_available(), reason="activations are on an accelerator")
def test_offload_runs_without_an_accelerator():
    """There transformers asks for pinned memory, which PyTorch does not have."""
    model, tokens = build_model("llama", "sdpa").train(), torch.arange(9)[None]
    enable_checkpointing(model, offload=True)
    model(tokens, labels=tokens).loss.backward()


def results():
    by_token = torch.randn(5, 2, 3, device=DEVICE)
    return by_token.transpose(0, 1), by_token.new_ones(2, 5), [by_token.permute(1, 2, 0), by_token[:0]]


@pytest.mark.parametrize("hooks", [contextlib.nullcontext, save_on_cpu, functools.partial(save_on_cpu, True)])
def test_kept_attention_results_return_once_as_they_were(hooks):
    with hooks():
        first, second = save_attention_context_fn()
    with first:
        kept = [kept_or_computed(results) for _ in range(2)]
    with second:
        for (out, lse, received), ours in zip(kept, [kept_or_computed(results) for _ in kept]):
            for one, other in zip((out, lse, *received), (*ours[:2], *ours[2]), strict=True):
                assert torch.equal(one, other) and one.stride() == other.stride() and one.device == other.device
        with pytest.raises(RuntimeError, match="for one backward pass"):
            kept_or_computed(results)
    assert kept_or_computed(lambda: "computed") == "computed"


def test_an_attention_output_that_changes_after_it_is_kept_raises():
    first, second = save_attention_context_fn()
    with first:
        kept_or_computed(results)[0].add_(1)
    with second, pytest.raises(RuntimeError, match="changed the output of its attention in place"):
        kept_or_computed(results)


def test_attention_is_not_kept_by_the_reentrant_kind():
    """PyTorch refuses it."""
    model = build_model("llama", "sdpa").train()
    enable_checkpointing(model, {"use_reentrant": True, "context_fn": save_attention_context_fn})
    with pytest.raises(ValueError, match="only supported when use_reentrant=False"):
        model(torch.arange(9, device=DEVICE)[None])


@pytest.mark.parametrize("every", [0, -2, 1.5, "2"])
def test_trainers_refuse_an_every_n_layers_below_one(every):
    fresh_accelerate()
    args = training_arguments(activation_checkpointing=True, activation_checkpointing_kwargs={"every_n_layers": every})
    with pytest.raises(ConfigurationError, match=f"every_n_layers in .* is {every!r}. It must be a positive integer"):
        FlashCPTrainer(model=build_model("llama"), args=args)


def test_trainers_know_the_name_of_the_context_function():
    fresh_accelerate()
    options = {"use_reentrant": False, "context_fn": str(save_attention_context_fn)}
    assert not callable(options["context_fn"])
    args = training_arguments(activation_checkpointing=True, activation_checkpointing_kwargs=options)
    FlashCPTrainer(model=build_model("llama"), args=args)
    assert getattr(args, f"{CHECKPOINTING_ARGUMENT}_kwargs")["context_fn"] is save_attention_context_fn


@pytest.mark.parametrize("cp_size, family", [(1, "lfm2"), *((2, family) for family in KINDS), (3, "qwen3_next")])
def test_recurrent_layers_of_cut_documents_run_again_alike(pool, cp_size, family):
    """Gradients are those without checkpointing, bit by bit."""
    for found in pool.run(cp_size, checkpointing_cases.hybrid_differences, family, "per_doc"):
        assert len(found) == 12 and max(found.values()) == 0


# RecurrentGemma's scans take a step per token.
WHOLE = [
    pytest.param(family, marks=pytest.mark.load if family == "recurrent_gemma" else ())
    for family in WHOLE_DOCUMENT_HYBRIDS
]


@pytest.mark.parametrize("family", WHOLE)
def test_hybrids_on_whole_documents_are_exact(pool, family):
    for found in pool.run(2, checkpointing_cases.hybrid_differences, family, "whole_doc"):
        assert len(found) == 6 and max(found.values()) < FP64


WRAPPED = [
    ("llama", "per_doc"),
    *((family, "per_doc") for family in KINDS),
    *(pytest.param(*family.values, "whole_doc", marks=family.marks) for family in WHOLE),
]


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("family, strategy", WRAPPED)
def test_wrappers_around_layers_are_exact(pool, family, strategy, attach_first):
    """Wrappers as in FSDP2's activation checkpointing, added before or after the model is attached."""
    for found in pool.run(2, checkpointing_cases.wrapped_errors, family, strategy, attach_first):
        # Other strides change the rounding of the parts that hybrids compute in fp32.
        everything = found.pop("everything offloaded")
        assert len(found) == 4 and max(found.values()) < FP64
        assert everything < (FP64 if family == "llama" else 1e-6)


@pytest.mark.parametrize("keep", [None, True, False])
def test_a_forward_whose_saved_tensors_are_offloaded_is_exact(pool, keep):
    assert max(pool.run(2, checkpointing_cases.offloaded_forward_error, keep)) < FP64


@pytest.mark.parametrize(
    "kind, every, keep, kept_by_plan, exchanges",
    [
        (None, 1, None, True, 4 * 2),
        (None, 1, None, False, 4 * 3),
        ("plain", 1, None, False, 4 * 3),  # forward, recomputed forward, backward
        ("plain", 1, False, True, 4 * 4),
        ("plain", 2, None, True, 2 * 3 + 2 * 2),
        ("plain", 2, None, False, 2 * 3 + 2 * 3),
        ("reentrant", 2, None, False, 2 * 3 + 2 * 3),
        ("plain", 2, True, False, 2 * 3 + 2 * 2),
        ("plain", 2, False, True, 2 * 4 + 2 * 3),
        ("attention kept", 1, None, True, 4 * 2),
        ("attention kept", 1, None, False, 4 * 3),
        ("attention kept", 1, True, False, 4 * 2),
    ],
)
def test_recomputed_layers_keep_received_kv(pool, kind, every, keep, kept_by_plan, exchanges):
    """This is the default; other layers follow the plan."""
    found = pool.run(2, checkpointing_cases.exchanges, kind, every, keep, kept_by_plan)
    assert found == [exchanges, exchanges]


def test_ranks_that_differ_in_checkpointing_raise(pool):
    for error in pool.errors(2, checkpointing_cases.checkpointed_on_one_rank):
        assert isinstance(error, BatchError)
        assert "layers_run_again is [0, 1] on rank 0 and [] on rank 1" in str(error)
