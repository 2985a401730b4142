"""Gradients of whole models, compared with per-document runs on one device."""

import pytest

from hf_flashcp.errors import UnsupportedModelError
from hf_flashcp.planning import STRATEGIES, Topology
from tests import model_cases
from tests.models import CONFIGS, FAMILIES, KINDS, WHOLE_DOCUMENT_HYBRIDS, make_documents, with_skipped_positions
from tests.packs import KNOWN_PACKS


# Relative Frobenius norm of each parameter's gradient, and relative difference of the loss.
FP64 = 1e-12
FP32 = 1e-5
OWN_LOSS = 1e-6  # with the model's own loss, because transformers casts logits to fp32

LENGTHS = [40, 3, 17, 1, 25]


def check(results, gradient, own_loss=OWN_LOSS):
    for errors in results:
        for strategy, (exact_gradient, exact_loss, own_gradient, own_loss_error) in errors.items():
            assert exact_gradient < gradient and exact_loss < gradient, strategy
            assert own_gradient < own_loss and own_loss_error < own_loss, strategy


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
@pytest.mark.smoke
def test_gradients_equal_those_of_each_document_alone(pool, cp_size, family):
    results = pool.run(cp_size, model_cases.model_errors, family, LENGTHS, STRATEGIES)
    assert all(errors.keys() == set(STRATEGIES) for errors in results)
    check(results, FP64)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
def test_families(pool, cp_size, family):
    """Gradients and loss on two ranks with every strategy: windows, softcap, sinks, MLA, experts, all kinds of
    RoPE."""
    strategies = STRATEGIES if cp_size == 2 else ["per_doc", "search"][: cp_size - 1 or 1]
    for error in pool.run(cp_size, model_cases.family_errors, family, LENGTHS, strategies):
        assert error < FP64


def test_nodes(pool):
    """KV and its gradients are sent to each node once: windows, softcap, sinks, and recomputed forwards."""
    nodes = {"topology": Topology(2)}
    for checkpointing in (None, False, True):
        options = {**nodes, "checkpointing": checkpointing}
        check(pool.run(4, model_cases.model_errors_with, "llama", LENGTHS, ["per_doc"], options), FP64)
    for family in ("gemma2", "gpt_oss"):
        for error in pool.run(4, model_cases.family_errors_with, family, LENGTHS, ["per_doc"], nodes):
            assert error < FP64


@pytest.mark.parametrize("family", ["phi3, longrope", "llama, dynamic"])
def test_rope_that_depends_on_a_ranks_own_tokens_fails(pool, family):
    for error in pool.run(2, model_cases.family_errors_without_rope_hooks, family, LENGTHS):
        assert error > 1e-3


@pytest.mark.parametrize(
    "cp_size, family",
    [
        *((cp_size, family) for cp_size in (1, 3) for family in ("llama", "mistral, window", "llama, dynamic")),
        *((2, family) for family in ("llama", "mistral, window", "gemma3", "smollm3")),
        *((2, family) for family in ("phi3, longrope", "llama, dynamic", *KINDS)),
    ],
)
def test_positions_that_skip_inside_a_document(pool, cp_size, family):
    """seq_lengths defines the documents; their positions imply neither further documents nor a window."""
    options = {"features": with_skipped_positions(make_documents(LENGTHS))}
    for error in pool.run(cp_size, model_cases.family_errors_with, family, LENGTHS, STRATEGIES, options):
        assert error < FP64


@pytest.mark.parametrize("cp_size", [1, 2, 3])
def test_the_trainer_accepts_positions_that_skip(pool, cp_size):
    for difference in pool.run(cp_size, model_cases.loss_of_skipped_positions):
        assert abs(difference) < OWN_LOSS


@pytest.mark.parametrize("cp_size", [1, 2, 3])
def test_a_window_that_only_the_mask_has_is_seen_on_every_rank(pool, cp_size):
    """The window is noticed wherever documents are split, for any positions, and if all documents are shorter than
    it."""
    skipping = with_skipped_positions(make_documents([60]))
    skipping[0]["position_ids"] = [3 * position for position in range(60)]
    for arguments in (([40, 3, 17],), ([4] * 10,), ([60], skipping)):
        for error in pool.errors(cp_size, model_cases.window_of_the_mask_alone, *arguments):
            assert isinstance(error, UnsupportedModelError) and "a sliding window of 5 tokens" in str(error)


@pytest.mark.parametrize("family", WHOLE_DOCUMENT_HYBRIDS)
@pytest.mark.parametrize("cp_size", [1, 3])
def test_hybrids_on_whole_documents(pool, cp_size, family):
    """Recurrent layers whose states cannot be passed on. `test_recurrence` tests the others."""
    for error in pool.run(cp_size, model_cases.family_errors, family, LENGTHS, ["whole_doc"]):
        assert error < FP64


@pytest.mark.parametrize("name", ["ids", "odd", "three", "aligned", "small_3", "giant_and_tiny"])
@pytest.mark.smoke
def test_known_packs(pool, name):
    check(pool.run(3, model_cases.model_errors, "llama", KNOWN_PACKS[name], ["per_doc"]), FP64)


@pytest.mark.parametrize("cp_size", [2, 4])
def test_fp32(pool, cp_size):
    options = {"dtype": "float32"}
    check(pool.run(cp_size, model_cases.model_errors_with, "llama", LENGTHS, ["per_doc"], options), FP32, FP32)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": 0.9},
        {"frozen": ("k_proj", "v_proj")},
        {"frozen": ("k_proj", "v_proj", "embed", "norm")},
        {"frozen": ("embed", "q_proj")},
        {"checkpointing": True},
        {"checkpointing": False},
        {"overrides": {"tie_word_embeddings": True}},
        {"lora": ["q_proj"]},
        {"lora": ["q_proj", "v_proj"]},
    ],
    ids=str,
)
@pytest.mark.smoke
def test_variations(pool, options):
    """Prompt-masked labels, frozen projections, both kinds of gradient checkpointing, tied embeddings, LoRA."""
    check(pool.run(2, model_cases.model_errors_with, "llama", LENGTHS, ["per_doc"], options), FP64)


def test_a_rank_without_any_target(pool):
    """whole_doc gives a rank only the first document, which consists of a prompt."""
    check(pool.run(2, model_cases.rank_without_targets), FP64)


def test_the_comparison_can_fail(pool):
    """The comparison notices an attention that ignores the keys of other ranks."""
    results = pool.run(2, model_cases.without_exchange, "llama", LENGTHS)
    assert all(gradient_error > 1e-3 for gradient_error in results)


@pytest.mark.parametrize("world_size, cp_size", [(2, 2), (3, 3), (4, 2), (4, 4)])
@pytest.mark.smoke
def test_fsdp2(pool, world_size, cp_size):
    results = pool.run(world_size, model_cases.fully_sharded_errors, "llama", LENGTHS, cp_size)
    for gradient_error, loss_error, _ in results:
        assert gradient_error < OWN_LOSS and loss_error < OWN_LOSS


def test_fsdp2_mixed_precision(pool):
    """With bf16 parameters and fp32 reduction, errors are those of a single process in bf16; FSDP2 does not cast the
    plan."""
    for gradient_error, _, single in pool.run(4, model_cases.fully_sharded_errors, "llama", LENGTHS, 2, True):
        assert 0 < gradient_error <= 2 * single
