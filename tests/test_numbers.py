"""Numbers that go wrong stay where they are: inf and NaN in a document, batches without a target, far positions."""

import math

import pytest
import torch

from hf_flashcp import plan_documents, shard_inputs
from hf_flashcp.layout import RankLayout
from hf_flashcp.planning import STRATEGIES
from tests import numbers_cases


LENGTHS = [300, 40, 7, 620, 33]
SICK = 3


@pytest.mark.parametrize("options", [{}, {"window": 16}, {"sinks": True}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("kernel", ["cpu_flash", "eager"])
def test_what_is_not_finite_stays_in_its_document(pool, kernel, options):
    """To the last bit of out, dq, dk and dv, with NaN or inf in any of a document's q, k, v or incoming gradients."""
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


@pytest.mark.parametrize("world_size, cp_size, average", [(1, 1, True), (2, 2, False), (4, 2, True)])
def test_a_step_without_any_target(pool, world_size, cp_size, average):
    """Zero, and no gradient, where the mean over no targets would be NaN and end the run."""
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
