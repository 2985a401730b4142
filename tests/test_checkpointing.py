"""All kinds of activation checkpointing: exact gradients, number of exchanges, and where received KV is kept."""

import pytest

from hf_flashcp.errors import BatchError
from tests import checkpointing_cases
from tests.models import KINDS, WHOLE_DOCUMENT_HYBRIDS


pytestmark = pytest.mark.devices("cpu", "cuda")

FP64 = 1e-12


@pytest.mark.parametrize("cp_size, lora", [(1, False), (2, False), (2, True), (3, False)])
def test_every_combination_is_exact(pool, cp_size, lora):
    """All kinds of checkpointing, every second layer, offload, received KV kept or not."""
    for found in pool.run(cp_size, checkpointing_cases.errors, lora):
        assert len(found) == 36 and max(found.values()) < FP64


@pytest.mark.parametrize("cp_size, family", [(1, "lfm2"), *((2, family) for family in KINDS), (3, "qwen3_next")])
def test_recurrent_layers_of_cut_documents_run_again_alike(pool, cp_size, family):
    """Gradients are those without checkpointing, bit by bit."""
    for found in pool.run(cp_size, checkpointing_cases.hybrid_differences, family, "per_doc"):
        assert len(found) == 12 and max(found.values()) == 0


@pytest.mark.parametrize("family", WHOLE_DOCUMENT_HYBRIDS)
def test_hybrids_on_whole_documents_are_exact(pool, family):
    for found in pool.run(2, checkpointing_cases.hybrid_differences, family, "whole_doc"):
        assert len(found) == 6 and max(found.values()) < FP64


WRAPPED = [
    ("llama", "per_doc"),
    *((family, "per_doc") for family in KINDS),
    *((family, "whole_doc") for family in WHOLE_DOCUMENT_HYBRIDS),
]


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("family, strategy", WRAPPED)
def test_wrappers_around_layers_are_exact(pool, family, strategy, attach_first):
    """Wrappers as in FSDP2's activation checkpointing, added before or after the model is attached."""
    for found in pool.run(2, checkpointing_cases.wrapped_errors, family, strategy, attach_first):
        everything = found.pop(
            "everything offloaded"
        )  # other strides change the rounding of the parts that hybrids compute in fp32
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
