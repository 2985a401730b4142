"""Debug mode: correct layers pass, and errors are found and named on every rank."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_flashcp import plan_documents, save_attention_context_fn
from hf_flashcp.attention import layer_to_check
from hf_flashcp.errors import BatchError, ConfigurationError, FlashCPError
from hf_flashcp.exchange.checksums import checksums
from tests import debug_cases, engine_cases
from tests.device import DEVICE


pytestmark = pytest.mark.devices("cpu", "cuda")

DTYPES = ("float64", "float32", "bfloat16", "float16")
LENGTHS = [70, 9, 33]
OPTIONS = ({}, {"window": 6}, {"softcap": 2.0}, {"sinks": True}, {"keep_received_kv": False}, {"frozen_kv": True})


def plan_of(lengths, cp_size, staged=False, strategy="per_doc"):
    plan = plan_documents(lengths, cp_size, strategy=strategy)
    return plan.with_offset_groups([[offset] for offset in range(1, cp_size)]) if staged else plan


def check(errors, kind, *fragments):
    """Check that every rank raises the same error, which contains all these texts."""
    assert len({str(error) for error in errors}) == 1
    assert type(errors[0]) is kind
    for fragment in fragments:
        assert fragment in str(errors[0])


# Checksums


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checksum_shows_every_changed_bit_and_every_swap(dtype):
    rows = torch.randn(6, 3, dtype=torch.float64).to(DEVICE, getattr(torch, dtype))
    rows[1, 1] = math.nan
    splits = [0, 4, 2]
    before = checksums(rows, splits)
    assert before == checksums(rows.clone(), splits) and before[0] == 0
    bits = rows.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()])
    for bit in range(8 * rows.element_size() - 1):
        changed = bits.clone()
        changed[2, 1] ^= 1 << bit
        after = checksums(changed.view(rows.dtype), splits)
        assert after[1] != before[1] and after[2] == before[2]
    for other in ([1, 0, 2, 3, 4, 5], [0, 1, 2, 3, 5, 4]):
        assert checksums(rows[other], splits) != before
    assert checksums(rows.flip(1).contiguous(), splits) != before
    zeros = torch.zeros(1, 4, dtype=rows.dtype, device=DEVICE)
    assert checksums(zeros, [1]) != checksums(-zeros, [1])


@given(st.permutations(range(12)))
def test_a_checksum_shows_every_order(order):
    rows = torch.arange(12, dtype=torch.float32, device=DEVICE).reshape(12, 1).contiguous()
    assert (checksums(rows[order], [12]) == checksums(rows, [12])) == (order == list(range(12)))


def test_a_checksum_of_many_elements_is_that_of_their_pieces_at_their_places(monkeypatch):
    rows = torch.randn(50, 7).to(DEVICE)
    whole = checksums(rows, [50])
    monkeypatch.setattr("hf_flashcp.exchange.checksums._CHUNK", 11)
    assert checksums(rows, [50]) == whole


@pytest.mark.parametrize(
    "number, rank, source, what",
    [(0, 1, 0, "keys and values"), (1, 0, 1, "keys and values"), (3, 2, 1, "gradients of keys and values")],
    ids=["stage 1", "stage 2", "stage 2, backward"],
)
@pytest.mark.parametrize("change", [debug_cases.flip, debug_cases.swap])
def test_rows_that_change_in_transit(pool, change, number, rank, source, what):
    """One bit or two rows change in the data that one rank receives in one of two stages, forward and backward."""
    args = plan_of(LENGTHS, 3, staged=True), number, rank, change, "received"
    errors = pool.errors(3, debug_cases.layer_with_a_bad_transfer, *args)
    said = f"from rank {source} to {rank} arrived with a different checksum."
    check(errors, FlashCPError, "Data changed during an exchange", f"rows of {what} (", said)
    assert str(errors[0]).count("rows of") == 1


@pytest.mark.parametrize(
    "number, what", [(0, "12 rows of keys and values (3,072"), (1, "6 rows of gradients of keys and values (1,536")]
)
def test_a_buffer_that_is_overwritten_before_its_rows_arrive(pool, number, what):
    """A row has H_kv (D_k + D_v) = 32 numbers of 8 bytes."""
    args = plan_of([24], 2), number, 1, debug_cases.flip, "sent"
    errors = pool.errors(2, debug_cases.layer_with_a_bad_transfer, *args)
    said = f"{what} bytes) from rank 1 to 0 were overwritten on rank 1 after they had been posted."
    check(errors, FlashCPError, "Data changed during an exchange", said)


# The reference


@pytest.mark.parametrize("cp_size", [1, 2, 3])
def test_correct_layers_pass(pool, cp_size):
    """Every dtype and layer option, one or two KV heads, heads of uneven width, one or several stages."""
    shapes = [(4, 2, 8, 8), (4, 1, 8, 12), (2, 2, 12, 8), (4, 2, 16, 16)]
    plans = [plan_of(LENGTHS, cp_size), plan_of(LENGTHS, cp_size, staged=True)]
    plans.append(plan_of(LENGTHS, cp_size, strategy="search"))
    todo = [
        ((plans[(number + turn) % 3], shape, dtype), options)
        for number, (shape, dtype) in enumerate(zip(shapes, DTYPES))
        for turn, options in enumerate(OPTIONS)
    ]
    pool.run(cp_size, debug_cases.layers, todo)


def test_inf_and_nan_in_the_data_are_not_deviations(pool):
    layer = plan_of(LENGTHS, 2), (4, 2, 8, 8), "bfloat16"
    changes = debug_cases.sick_key, debug_cases.sick_value
    pool.run(2, debug_cases.layers, [(layer, {"change": change}) for change in changes])


@pytest.mark.parametrize("what", ["the output", "dQ", "dK", "dV"])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_wrong_number_on_one_rank_is_named(pool, dtype, what):
    """In one head of one local row, a number is twice what it should be."""
    plan = plan_of([60], 2)
    assert plan.slices[1][0][:2] == (0, 15)
    errors = pool.errors(2, debug_cases.wrong_layer, plan, dtype, what)
    check(errors, FlashCPError, f"Attention of the layer in {dtype} does not match the float64 reference")
    assert f"{what} of document 0 at token 20, head 1, on rank 1 is off by" in str(errors[0])
    assert "on rank 0" not in str(errors[0])


def test_a_wrong_logsumexp_is_named_although_only_backward_uses_it(pool):
    errors = pool.errors(2, debug_cases.wrong_layer, plan_of([30, 30], 2, strategy="whole_doc"), "bfloat16", "lse")
    check(errors, FlashCPError, "the logsumexp of document 1 at token 5, head 1, on rank 1 is off by")


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_exchange_that_is_left_out_is_found_in_every_dtype(pool, dtype):
    errors = pool.errors(2, debug_cases.layer_without_exchange, plan_of([300, 40], 2), dtype)
    check(errors, FlashCPError, "does not match the float64", "of document 0 at token", "on rank 0", "on rank 1")


# Whole models


@pytest.mark.devices("cpu")
def test_layers_take_turns(monkeypatch):
    found = [layer_to_check(forward, 3) for forward in range(41)]
    assert found == [{0: 0, 10: 1, 20: 2, 30: 0, 40: 1}.get(forward) for forward in range(41)]
    monkeypatch.setenv("FLASHCP_DEBUG_EVERY", "1")
    assert [layer_to_check(forward, 3) for forward in range(4)] == [0, 1, 2, 0]


ONE, TWO = (f"LlamaAttention (layer {layer})" for layer in (0, 1))
PLAIN = [[("forward", ONE), ("backward", ONE)], [], [("forward", TWO), ("backward", TWO)]]
AGAIN = [step and [step[0], *step] for step in PLAIN]
SELECTIVE = {"use_reentrant": False, "context_fn": save_attention_context_fn}


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, PLAIN),
        ({"checkpointing": {"use_reentrant": False}}, AGAIN),
        ({"checkpointing": {"use_reentrant": True}}, AGAIN),
        ({"checkpointing": SELECTIVE}, PLAIN),
    ],
    ids=["none", "plain", "reentrant", "selective"],
)
def test_every_second_step_of_a_model_checks_a_layer(pool, options, expected):
    """A checkpointed layer runs twice, and so does its check."""
    for seen in pool.run(2, debug_cases.checked_layers, 3, 2, options):
        assert seen == expected


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_oss", "deepseek_v3"])
def test_correct_models_pass_in_bf16(pool, family):
    for seen in pool.run(3, debug_cases.checked_layers, 2, 1, {"family": family, "dtype": "bfloat16"}):
        assert [len(step) for step in seen] == [2, 2]


def test_a_wrong_layer_of_a_model_is_named(pool):
    errors = pool.errors(3, debug_cases.model_with_a_wrong_layer)
    check(errors, FlashCPError, f"Attention of {TWO} in float64 does not match the float64", "head 3, on rank 0")


@pytest.mark.parametrize(
    "environment, error, message",
    [
        ([{}, None, {}], BatchError, 'FLASHCP_DEBUG is "1" on ranks 0, 2 and null on rank 1'),
        ([{"FLASHCP_DEBUG_EVERY": "5"}, {}, {}], BatchError, 'FLASHCP_DEBUG_EVERY is "5" on rank 0 and null on ranks'),
        ([{"FLASHCP_DEBUG_EVERY": "0"}] * 3, ConfigurationError, "FLASHCP_DEBUG_EVERY is '0': it must be"),
        ([{"FLASHCP_DEBUG_EVERY": "often"}] * 3, ConfigurationError, "FLASHCP_DEBUG_EVERY is 'often': it must be"),
    ],
)
def test_environments_that_differ_or_are_wrong(pool, environment, error, message):
    check(pool.errors(3, debug_cases.one_forward, environment), error, message)


# Costs


def test_collectives_and_bytes_are_as_documented(pool):
    """The docstrings of checksums.py and `CheckedEngine`: N = 3, H_kv = 2, D_k + D_v = 20, bf16, T = 22, one stage."""
    args = plan_of([54, 12], 3), (4, 2, 8, 12), "bfloat16"
    exchange = [("gather", 8 * 3 * (3 * 3 + 2)), ("gather", 8 * 3 * 2 * 3)]
    verdict = [("gather", 8 * 3 * 7)]
    head = [("gather", 2 * 66 * 20)]
    for seen in pool.run(3, debug_cases.collectives, *args, False):
        assert seen == exchange * 2
    for seen in pool.run(3, debug_cases.collectives, *args, True):
        backward = [*head, ("sum", 8 * 66 * (20 + 2))] * 2
        assert seen == exchange + head * 2 + verdict + exchange + backward + verdict


def test_no_tensor_has_the_size_of_all_scores(pool):
    """Blocks have 2 heads x 3 queries x 600 keys, at most 2**12 scores; all scores would be 2 x 600 x 600."""
    assert pool.run(1, engine_cases.largest_tensor_of_a_check, plan_of([600], 1), 2**12)[0] <= 2**15
