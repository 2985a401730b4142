"""Numerical edge cases: inf and NaN in a document, rows without keys, batches without a target, far positions."""

import itertools
import math

import numpy as np
import pytest
import torch

from hf_flashcp import plan_documents, shard_inputs
from hf_flashcp.attention.merge import merge
from hf_flashcp.layout import RankLayout, Rows
from hf_flashcp.planning import STRATEGIES
from tests import numbers_cases


LENGTHS = [300, 40, 7, 620, 33]
SICK = 3


@pytest.mark.parametrize("options", [{}, {"window": 16}, {"sinks": True}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("kernel", ["cpu_flash", "eager"])
def test_inf_and_nan_stay_in_their_document(pool, kernel, options):
    """Other documents' out, dq, dk and dv are bitwise equal with NaN or inf in a document's q, k, v or output
    gradient."""
    if kernel == "cpu_flash" and "softcap" in options:
        pytest.skip("the flash kernel knows no softcap")
    todo = [
        (plan_documents(LENGTHS, 3, strategy=strategy), which, value)
        for strategy in STRATEGIES
        for which in range(4)
        for value in (math.nan, math.inf)
    ]
    for differences in pool.run(3, numbers_cases.differences_of_other_documents, todo, SICK, kernel, options):
        assert differences == [[0, 0, 0, 0]] * len(todo)


# Rows of two outputs, by whether they have keys in the first and in the second.
KEYS = list(itertools.product((True, False), repeat=2)) * 3
ROWS = {"ranges": range(2, 14), "index": [*range(0, 10, 2), 11, *range(12, 18)]}


def partial_outputs(dtype, empty):
    """Return two outputs (2, 12, 4) and logsumexps, in which some rows have no keys, and the output over all keys."""
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 12, 10), (2, 10, 4)
    scores, values = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    parts = []
    for which, keys in enumerate((slice(0, 6), slice(6, 10))):
        here = torch.tensor([row[which] for row in KEYS])
        lse = scores[..., keys].logsumexp(-1).masked_fill(~here, empty)
        out = scores[..., keys].softmax(-1) @ values[:, keys]
        parts.append((out.masked_fill(~here[:, None], 0).to(dtype), lse.to(torch.promote_types(dtype, torch.float32))))
        scores[..., keys] = scores[..., keys].masked_fill(~here[:, None], -torch.inf)
    return *parts, scores.softmax(-1).nan_to_num(0) @ values, scores.logsumexp(-1)


@pytest.mark.parametrize("second_first", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("empty", [-math.inf, math.inf])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-14), (torch.bfloat16, 2**-6)])
def test_rows_without_keys_do_not_affect_a_merge(dtype, bound, empty, rows, second_first):
    """Rows have keys in both parts, in one or in none; FlashAttention-2 writes inf for rows without keys."""
    first, second, expected, expected_lse = partial_outputs(dtype, empty)
    if second_first:
        first, second = second, first
    numbers = torch.tensor(list(ROWS[rows]))
    out, lse = torch.full((2, 20, 4), 7.0, dtype=dtype), torch.full((2, 20), 7.0, dtype=first[1].dtype)
    out[:, numbers], lse[:, numbers] = first
    merge(out, lse, *second, Rows(np.array(numbers)))
    assert float((out[:, numbers].double() - expected).abs().max()) <= bound
    assert torch.equal(lse[:, numbers] == -math.inf, expected_lse == -math.inf)
    assert float((lse[:, numbers].double() - expected_lse).nan_to_num(0).abs().max()) <= max(bound / 1e4, 1e-14)
    nobody = [row not in ROWS[rows] for row in range(20)]
    assert (out[:, nobody] == 7).all() and (lse[:, nobody] == 7).all()


@pytest.mark.parametrize("second_first", [False, True])
@pytest.mark.parametrize("sick_lse", [math.nan, math.inf])
def test_a_nan_row_is_not_mistaken_for_one_without_keys(sick_lse, second_first):
    """FlashAttention-2 writes a logsumexp of inf there too. Only this row is NaN, whatever it is merged with."""
    first, second, expected, _ = partial_outputs(torch.float64, math.inf)
    sick = [row for row, keys in enumerate(KEYS) if keys[1]]
    second[0][:, sick], second[1][:, sick] = math.nan, sick_lse
    if second_first:
        first, second = second, first
    out, lse = first
    merge(out, lse, *second, Rows(np.arange(12)))
    sound = [row for row in range(12) if row not in sick]
    assert out[:, sick].isnan().all() and float((out[:, sound] - expected[:, sound]).abs().max()) < 1e-14


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"window": 7}, {"sinks": True}, {"softcap": 5.0}], ids=str)
def test_passes_in_which_rows_see_no_key(pool, options, dtype):
    """Forward and backward are as exact as in one pass, with a logsumexp of -inf or inf and the empty part first or
    last."""
    plan = plan_documents([40, 7, 23], 3, strategy="per_doc")
    for results in pool.run(3, numbers_cases.errors_with_pieces_that_see_nothing, plan, dtype, options):
        *pieces, (_, whole) = results
        assert len(pieces) == 4 and all(empty for empty, _ in pieces)
        for _, errors in pieces:
            assert all(ours <= max(1e-14, 1.05 * single) for ours, single in zip(errors, whole, strict=True))


@pytest.mark.parametrize("world_size, cp_size, average", [(1, 1, True), (2, 2, False), (4, 2, True)])
def test_a_step_without_any_target(pool, world_size, cp_size, average):
    """The loss is zero without a gradient; a mean over no targets would be NaN."""
    for loss, largest in pool.run(world_size, numbers_cases.step_without_targets, cp_size, average):
        assert loss == 0 and largest == 0


def test_a_batch_without_any_target_in_a_loop():
    batch = {"input_ids": torch.arange(8)[None], "labels": torch.full((1, 8), -100)}
    assert shard_inputs(batch, None)["num_items_in_batch"] == 1


def test_positions_of_four_million_tokens():
    length = 2**22 + 1
    plan = plan_documents([5, length], 8, strategy="per_doc")
    batch = {"input_ids": torch.zeros(1, plan.num_tokens, dtype=torch.long)}
    positions = shard_inputs(batch, None)["position_ids"]
    assert positions.dtype == torch.int64 and positions[0, -1] == plan.num_tokens - 1
    held = [RankLayout(plan, rank).token_index for rank in (0, 7)]
    assert all(index.dtype == torch.int64 for index in held) and held[0].max() == plan.num_tokens - 1
    assert sum(plan.report()["pairs"]) == 15 + length * (length + 1) // 2
