"""`gather_tokens`, losses of gathered tokens, and single forwards over whole rows."""

import functools

import pytest
import torch
from transformers.models.auto import modeling_auto

from hf_flashcp import RankPlan, gather_tokens, plan_documents
from hf_flashcp.errors import BatchError, ConfigurationError, UnsupportedModelError
from tests import gather_cases
from tests.models import FAMILIES
from tests.test_row_trainers import check, check_errors


LENGTHS = [40, 3, 17, 9, 25, 2, 30, 7]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_gathered_values_are_the_whole_row(pool, dtype):
    for size, lengths, width in ((2, LENGTHS, ()), (3, [5], ()), (4, LENGTHS, (2, 3))):
        pool.run(size, gather_cases.gathered, lengths, dtype, width)


def test_one_rank_needs_no_group():
    plan = RankPlan(plan_documents([3, 2], 1))
    values = torch.arange(5.0)[None].requires_grad_()
    whole = gather_tokens(values, plan)
    whole.sum().backward()
    assert torch.equal(whole, values[0]) and torch.equal(values.grad, torch.ones(1, 5))


def test_values_of_other_tokens_are_refused():
    plan = plan_documents([3, 2], 1)
    with pytest.raises(ConfigurationError, match="plan is a ShardPlan"):
        gather_tokens(torch.zeros(1, 5), plan)
    with pytest.raises(BatchError, match=r"this rank has 5 tokens of the batch: pass values of shape \(1, 5, ...\)"):
        gather_tokens(torch.zeros(1, 4), RankPlan(plan))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_loop_with_a_loss_of_whole_documents(pool, size):
    for found in pool.run(size, gather_cases.loop_of_documents, LENGTHS):
        assert found["loss"] == pytest.approx(found["expected"], rel=1e-12)
        assert found["error"] < 1e-12


@pytest.mark.parametrize("processes, cp_size, accumulation", [(2, 2, 2), (3, 3, 2), (4, 2, 1)])
def test_a_loss_function_that_gathers_tokens(pool, processes, cp_size, accumulation):
    found = pool.run(processes, gather_cases.custom_loss, cp_size, accumulation)
    (expected,) = pool.run(1, gather_cases.custom_loss, 1)
    check(found, {**expected, "logs": found[0]["logs"], "evaluation": found[0]["evaluation"]})
    assert found[0]["logs"][0]["loss"] == pytest.approx(expected["logs"][0]["loss"], rel=1e-6)
    assert found[0]["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-9)


ROWS = {
    "padding after": [(0, 9, 3, 4), (0, 12, 0, 5), (0, 2, 10, 1)],
    "padding before and after": [(4, 9, 2, 4), (0, 12, 3, 5), (9, 3, 3, 1)],
    "no targets, and an empty row": [(0, 9, 3, 0), (0, 0, 12, 0), (0, 12, 0, 0)],
    "all tokens are targets": [(0, 9, 3, 9), (0, 12, 0, 12)],
}


@pytest.mark.parametrize("batches", ["shared", "own", "turns"])
@pytest.mark.parametrize("rows", ROWS)
def test_forwards_over_rows(pool, rows, batches):
    for error in pool.run(2, functools.partial(gather_cases.rows_forward, ROWS[rows], batches=batches)):
        assert error < 1e-12


@pytest.mark.parametrize("batches", ["own", "turns"])
def test_ranks_with_different_rows(pool, batches):
    """Rank 1 has no targets, and rank 2 more rows and shorter ones."""
    of_rank = [ROWS["padding after"], [(2, 7, 0, 0)], [(0, 3, 0, 1), (0, 4, 2, 2), (1, 5, 0, 2), (0, 6, 0, 6)]]
    forward = functools.partial(gather_cases.rows_forward, None, batches=batches, of_rank=of_rank)
    for error in pool.run(3, forward):
        assert error < 1e-12


def test_a_rank_with_empty_rows_only(pool):
    of_rank = [ROWS["padding after"], [(0, 0, 5, 0)]]
    for error in pool.run(2, functools.partial(gather_cases.rows_forward, None, batches="own", of_rank=of_rank)):
        assert error < 1e-12


@pytest.mark.parametrize("batches, rank", [("shared", 0), ("own", 1), ("turns", 1)])
def test_padding_between_tokens_is_refused_on_every_rank(pool, batches, rank):
    errors = pool.errors(2, gather_cases.hole_in_a_row, batches, rank)
    check_errors(errors, BatchError, "row 1 has padding between its tokens")


def test_a_head_that_pools_tokens_is_refused(pool):
    errors = pool.errors(2, gather_cases.pooled_head)
    check_errors(errors, UnsupportedModelError, "has no head that scores each token by itself")


def test_an_empty_prompt_with_padding_before_it_is_refused(pool):
    rows = [(0, 0, 9, 0), (0, 9, 0, 3), (4, 5, 0, 5)]
    for batches in ("shared", "own"):
        errors = pool.errors(2, functools.partial(gather_cases.rows_forward, rows, batches=batches))
        check_errors(errors, BatchError, "row 2 begins with padding, and its first token is a target")


@pytest.mark.parametrize(
    "forward, arguments, error, message",
    [
        (gather_cases.narrow_mask, (), BatchError, "attention_mask has shape (2, 8), but the rows have (2, 9)"),
        (gather_cases.other_rows_on_each_rank, (), BatchError, "Ranks disagree on the batch"),
        (gather_cases.other_inputs_on_each_rank, (), BatchError, "of rank 1 cannot be sharded: they have"),
        (gather_cases.embedded_rows, ("own",), BatchError, "inputs_embeds is not an integer per token"),
        (gather_cases.empty_rows, ("shared",), BatchError, "all rows are empty"),
        (gather_cases.empty_rows, ("own",), BatchError, "all rows are empty"),
        (
            gather_cases.unrecorded_turns,
            (),
            ConfigurationError,
            "needs a training step that runs each turn's",
        ),
    ],
)
def test_forwards_that_are_refused_on_every_rank(pool, forward, arguments, error, message):
    check_errors(pool.errors(2, forward, *arguments), error, message)


@pytest.mark.parametrize("head", ["sequence", "token"])
def test_classification_heads_of_all_families(pool, head):
    """A padded batch, compared with the plain model.

    Its rotary embeddings may not depend on the longest row, because those of a document depend on its own length.
    """
    known = getattr(modeling_auto, f"MODEL_FOR_{head.upper()}_CLASSIFICATION_MAPPING_NAMES")
    names = [name for name, config in FAMILIES.items() if config.model_type in known]
    names = [name for name in names if not name.endswith(("dynamic", "longrope"))]
    for errors in pool.run(2, gather_cases.head_errors, names, head):
        routed_in_fp32 = errors.pop("deepseek_v3")
        assert routed_in_fp32 < 1e-6 and len(errors) > 10
        assert {name: error for name, error in errors.items() if error > 1e-12} == {}


def test_replayed_forwards_have_the_same_dropout_and_rows(pool):
    assert max(pool.run(2, gather_cases.replay)) < 1e-12


def test_a_copied_model_runs_in_turns_with_its_own_parameters(pool):
    assert all(pool.run(2, gather_cases.copied_model))


def test_turns_refuse_frequencies_that_depend_on_earlier_rows(pool):
    pool.run(2, gather_cases.dynamic_rope, "own")
    errors = pool.errors(2, gather_cases.dynamic_rope, "turns")
    check_errors(errors, ConfigurationError, "dynamic RoPE, whose frequencies depend on earlier rows")
