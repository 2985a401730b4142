"""The engine: stages, calls and copies, precision, memory. tests/test_attention.py tests exactness."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flashcp.attention import save_attention_context_fn
from hf_flashcp.errors import BatchError, PlanError
from hf_flashcp.layout import RankLayout, RankPlan, Rows
from hf_flashcp.planning import STRATEGIES, ShardPlan, plan_documents
from tests import attention_cases as cases
from tests import engine_cases
from tests.device import DEVICE, ON_CPU
from tests.packs import KNOWN_PACKS, arbitrary_plans
from tests.test_attention import FP64, ODD_PLAN


pytestmark = pytest.mark.devices("cpu", "cuda")


# Stages


@pytest.mark.devices("cpu")
def test_offset_groups_belong_to_a_plan():
    plan = plan_documents([40, 24], 4, strategy="per_doc")
    staged = plan.with_offset_groups([[3, 1], [2]])
    assert plan.offset_groups is None and staged.offset_groups == ((1, 3), (2,))
    assert staged != plan and staged.digest != plan.digest
    assert staged.digest != plan.with_offset_groups([[2], [1, 3]]).digest
    assert staged.with_offset_groups(None) == plan and staged.with_offset_groups(None).digest == plan.digest
    assert "offset_groups" not in plan.to_dict()
    again = ShardPlan.from_dict(json.loads(json.dumps(staged.to_dict())))
    assert again == staged and again.digest == staged.digest


@pytest.mark.devices("cpu")
@pytest.mark.parametrize(
    "groups", [[[1, 2]], [[1, 2], [2, 3]], [[1, 2, 3], []], [[0, 1, 2, 3]], [[1, 2, 4]], [1, 2, 3], "123"]
)
def test_offset_groups_that_are_not_a_partition_are_refused(groups):
    with pytest.raises(PlanError, match="offset_groups are"):
        plan_documents([40], 4).with_offset_groups(groups)


STAGES = {
    "one": None,
    "two": lambda cp_size: [range(1, cp_size, 2), range(2, cp_size, 2)],
    "all": lambda cp_size: [[offset] for offset in range(1, cp_size)],
}


@pytest.mark.parametrize("stages", ["two", "all"])
@pytest.mark.parametrize("cp_size", [3, 4])
def test_strategies_and_variants_in_stages_are_exact(pool, cp_size, stages):
    """Every strategy with full attention and variants, in several stages; the other tests use one stage."""
    groups = STAGES[stages](cp_size)
    todo = [
        cases.Case(
            plan_documents(KNOWN_PACKS[name], cp_size, strategy=strategy), (4, 2, 8, 12), offset_groups=groups, **more
        )
        for name in ("ids", "odd", "three", "giant_and_tiny")
        for strategy in STRATEGIES
        for more in (
            {},
            {"options": {"sinks": True}},
            {"options": {"softcap": 1.5}, "kernel": "eager"},
            {"options": {"window": 9, "sinks": True}},
        )
    ]
    for errors in pool.run(cp_size, cases.attention_errors, todo):
        for case, error in zip(todo, errors):
            assert max(error) < FP64, (case, error)


def test_eight_ranks_in_stages_are_exact(pool):
    plan = plan_documents(KNOWN_PACKS["mixed"], 8, strategy="per_doc")
    todo = [
        cases.Case(plan, (4, 2, 8, 8), offset_groups=groups)
        for groups in ([[1, 2, 3], [4, 5, 6, 7]], STAGES["all"](8))
    ]
    for errors in pool.run(8, cases.attention_errors, todo):
        assert max(max(error) for error in errors) < FP64


def test_the_next_transfer_is_posted_before_a_stage_is_computed(pool):
    plan = plan_documents([24, 24], 3, strategy="per_doc").with_offset_groups([[1], [2]])
    forward = ["post", "post", "local forward", "wait", "remote forward", "wait", "remote forward"]
    backward = ["remote backward", "post", "remote backward", "post", "local backward", "wait", "wait"]
    assert pool.run(3, cases.issue_order, plan) == [forward + backward] * 3


def test_every_rank_enters_a_stage_that_any_rank_needs(pool):
    """All KV goes from rank 0 to rank 1; the other ranks post empty transfers, in both directions."""
    plan = ShardPlan([8, 4, 4], 4, [[(0, 0, 4)], [(0, 4, 8)], [(1, 0, 4)], [(2, 0, 4)]])
    orders = pool.run(4, cases.issue_order, plan.with_offset_groups([[1], [2], [3]]))
    idle = ["post", "local forward", "wait", "post", "local backward", "wait"]
    busy = ["post", "local forward", "wait", "remote forward", "remote backward", "post", "local backward", "wait"]
    assert orders == [idle, busy, idle, idle]


def test_profilers_see_named_ranges(pool):
    plan = plan_documents([40, 24], 3, strategy="per_doc").with_offset_groups([[1], [2]])
    arrives, leaves = (
        "wait for the keys and values of other ranks",
        "wait for the gradients of keys and values of other ranks",
    )
    for names in pool.run(3, engine_cases.ranges, plan):
        forward = ["pack", "local pass", arrives, "stage 1", arrives, "stage 2", "merge"]
        expected = [*forward, "stage 1, backward", "stage 2, backward", "local pass, backward", leaves, leaves]
        assert [name for name in names if name in expected] == [name for name in expected if name in names]
        assert {"pack", "local pass", arrives, "local pass, backward", leaves, "add returned gradients"} <= set(names)


# Rows


ROWS = {
    "none": ([], True),
    "one range": (range(10, 40), True),
    "four short ranges": ([0, 1, 5, 6, 9, 20, 21], True),
    "five short ranges": ([0, 1, 5, 6, 9, 20, 21, 30], False),
    "five long ranges": ([row for start in range(0, 500, 100) for row in range(start, start + 64)], True),
    "out of order": ([*range(300, 400), *range(0, 100)], True),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_ranges_if_these_are_few_or_long(name):
    numbers, as_ranges = ROWS[name]
    as_ranges = as_ranges and (ON_CPU or not name.startswith("five"))
    rows = Rows(np.array(numbers, dtype=np.int64), DEVICE)
    index = torch.tensor(list(numbers), dtype=torch.int64, device=DEVICE)
    assert (rows.ranges is not None) == (rows.index is None) == as_ranges
    source, values = torch.randn(500, 3).to(DEVICE), torch.randn(len(numbers), 3).to(DEVICE)
    assert torch.equal(rows.take(source), source[index])
    assert torch.equal(_after(rows.put, source, values), source.index_copy(0, index, values))
    assert torch.equal(
        _after(rows.add, source, values.bfloat16()), source.index_add(0, index, values.bfloat16().float())
    )
    on_gpu = Rows(np.array(numbers, dtype=np.int64), torch.device("meta"))
    assert (on_gpu.ranges is None) == (name not in ("none", "one range"))
    for longest in (None, 7):
        if as_ranges:
            pieces = list(rows.pieces(longest))
            assert [row for there, _ in pieces for row in range(there.start, there.stop)] == list(numbers)
            assert [row for _, here in pieces for row in range(here.start, here.stop)] == list(range(len(numbers)))


def _after(change, target, values):
    target = target.clone()
    change(target, values)
    return target


@pytest.mark.devices("cpu")
@given(st.lists(st.integers(0, 12), max_size=30))
def test_groups_of_rows_are_as_long_as_they_can_be(numbers):
    spans = Rows(np.array(numbers, dtype=np.int64)).distinct_spans()
    groups = [numbers[span] for span in spans]
    assert sum(groups, []) == numbers
    assert all(len(set(group)) == len(group) for group in groups)
    assert all(following[0] in group for group, following in zip(groups, groups[1:]))


# Counts


@pytest.mark.devices("cpu")
@settings(max_examples=200)
@given(plan=arbitrary_plans(), stages=st.sampled_from(sorted(STAGES)), window=st.none() | st.integers(1, 45))
def test_the_report_agrees_with_the_layouts(plan, stages, window):
    if STAGES[stages] and plan.cp_size > 2:
        plan = plan.with_offset_groups(STAGES[stages](plan.cp_size))
    report = plan.report(window=window)
    full = window is None or window >= max(plan.lengths)
    for rank in range(plan.cp_size):
        layout = RankLayout(plan, rank, None if full else window)
        stages = layout.stages(engine_cases.CPU)
        sends = layout.send_rows(engine_cases.CPU).count > 0
        brings = [stage for stage in stages if stage.rectangles]
        outputs = 2 * (len(brings) > 0 and not (len(brings) == 1 and not layout.local))
        keys = sends + (sends or any(stage.local_rows for stage in stages))
        copies = outputs + keys + sum(2 if stage.key_order else 1 for stage in brings)
        assert report["collectives"][rank] == 2 * len(stages)
        assert report["kernel_calls"][rank] == 2 * (bool(layout.local) + len(brings))
        assert report["copies"][rank] == copies


# K and V of a range of rows need a `copy_` each to be packed, and so do the gradients of received keys. A range is
# merged by a `lerp_`, and takes an `add_` for the gradients of its queries, and one each for the returned gradients of
# its K and V. More than four ranges share one index operator. `cat` puts keys into document order.
def copies(copy=0, lerp=0, add=0, **more):
    return {"copy_": copy, "lerp_": lerp, "add_": add, **more}


ONE_DOCUMENT = plan_documents([16], 2, strategy="per_doc")
TWO_DOCUMENTS = plan_documents([24, 24], 3, strategy="per_doc")
NAMED_COUNTS = {
    # collectives; for each rank kernel calls, copies as the report counts them, and operators that copy
    "one document": (ONE_DOCUMENT, 2, [(4, 5, copies(4, 1, 3))] * 2),
    "whole documents": (plan_documents([16, 16], 2, strategy="whole_doc"), 0, [(2, 0, {})] * 2),
    "zigzag, used as it arrives": (plan_documents([32], 4, strategy="per_doc"), 2, [(4, 5, copies(8, 1, 7))] * 4),
    "two documents, gathered": (
        TWO_DOCUMENTS,
        2,
        [
            (4, 6, copies(8, 2, 10, index_select=1, index_copy_=2)),
            (4, 6, copies(14, 1, 7, cat=1)),
            (4, 6, copies(12, 1, 5, cat=1)),
        ],
    ),
    "two documents, staged": (
        TWO_DOCUMENTS.with_offset_groups([[1], [2]]),
        4,
        [(6, 6, copies(12, 4, 12)), (6, 6, copies(10, 3, 9)), (6, 6, copies(8, 2, 6))],
    ),
}


@pytest.mark.parametrize("name", NAMED_COUNTS)
def test_collectives_kernel_calls_and_copies_are_those_of_the_report(pool, name):
    plan, collectives, expected = NAMED_COUNTS[name]
    report = plan.report()
    for rank, (found, (kernel_calls, passes, operators)) in enumerate(
        zip(pool.run(plan.cp_size, engine_cases.counts, plan), expected)
    ):
        assert found["collectives"] == report["collectives"][rank] == collectives
        assert found["kernel_calls"] == report["kernel_calls"][rank] == kernel_calls
        assert report["copies"][rank] == passes
        assert found["copies"] == operators


@pytest.mark.parametrize("window", [None, 5])
def test_many_slices_take_few_operators_and_no_values_are_read(pool, window):
    """With fourteen documents on four ranks, no operator waits for the device, and many documents need no more
    operators."""
    few, many = (plan_documents([40] * count, 4, strategy="per_doc") for count in (7, 14))
    options = {"window": window}
    for one, other in zip(*(pool.run(4, engine_cases.counts, plan, options) for plan in (few, many))):
        assert one["synchronising"] == other["synchronising"] == {}
        assert other["kernel_calls"] == 4 and other["copies"] == one["copies"]


# Precision


def test_bf16_error_does_not_grow_with_ranks_and_stages(pool):
    """The error of dK and dV at cp 8 is no larger than on one rank.

    Kernels round partial results of out and dQ to bf16, which is one rounding more than on one rank: 1.16 times the
    error here, and 1.41 times if rounding were the only error. More ranks or stages do not add roundings, because
    partial results are summed in fp32.

    On a GPU, kernels have smaller errors, so the rounding of sent and merged tensors weighs more; at most, it equals
    the whole error of a single rank.
    """
    all_of_it = 1.05 * 2**0.5
    to_one, to_two = ((1.2, 1.2, 1.1, 1.1), 1.1) if ON_CPU else ((all_of_it,) * 4, 1.2)
    lengths, shape = [1024, 512, 256, 128, 128], (8, 2, 64, 64)
    errors = {}
    for cp_size, stages in ((1, "one"), (2, "one"), (8, "one"), (8, "all")):
        plan = plan_documents(lengths, cp_size, strategy="per_doc")
        plan = plan.with_offset_groups(STAGES["all"](cp_size)) if stages == "all" else plan
        errors[cp_size, stages] = pool.run(cp_size, engine_cases.errors_in_bf16, plan, shape)[0]
    one, two = errors[1, "one"], errors[2, "one"]
    for eight in (errors[8, "one"], errors[8, "all"]):
        assert all(ours <= limit * single for ours, single, limit in zip(eight, one, to_one))
        assert all(ours <= to_two * before for ours, before in zip(eight, two))
    assert all(staged <= 1.05 * whole for staged, whole in zip(errors[8, "all"], errors[8, "one"]))


@pytest.mark.parametrize("stages", STAGES)
def test_two_runs_are_equal_to_the_last_bit(pool, stages):
    groups = STAGES[stages] and STAGES[stages](4)
    for strategy in ("per_doc", "search"):
        plan = plan_documents(KNOWN_PACKS["seven"], 4, strategy=strategy).with_offset_groups(groups)
        for options in ({}, {"window": 60}):
            for different in pool.run(4, engine_cases.differences_between_runs, plan, options):
                assert different == [0, 0, 0, 0]


# Memory


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("window", [None, 8])
def test_saved_bytes_are_as_documented(pool, keep, window):
    """Compare with the formula in function.py for e = 2, E = 4."""
    plan = plan_documents([40, 24], 3, strategy="per_doc")
    heads, kv_heads, key_dim, value_dim = 4, 2, 8, 12
    args = (plan, (heads, kv_heads, key_dim, value_dim), "bfloat16", {"keep_received_kv": keep, "window": window})
    report = plan.report(window=window)
    for rank, found in enumerate(pool.run(3, engine_cases.saved_bytes, *args)):
        tokens, received = report["tokens"][rank], report["kv_received"][rank]
        own = tokens * (2 * (heads + kv_heads) * (key_dim + value_dim) + 4 * heads)
        kept = received * 2 * kv_heads * (key_dim + value_dim) if keep else 0
        if window and keep:
            bands = found - own - kept  # the rank's own tokens, twice if they lie in overlapping bands
            assert 0 < bands <= 2 * tokens * 2 * kv_heads * (key_dim + value_dim)
        else:
            assert found == own + kept


@pytest.mark.skipif(not ON_CPU, reason="counts the blocks of the kernel for CPU")
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("stages", ["one", "all"])
def test_peak_memory_of_a_layer(pool, stages, keep):
    """The peak at cp N is at most that of one process / N, plus the rows below; no tensor has about T x T elements.

    A received row adds its KV, its gradients in fp32 and as sent, and those of a kernel's block. A sent row adds one
    row in bf16 and one in fp32. Stages add outputs in fp32.
    """
    lengths, shape, cp_size = [4096, 1024, 512], (4, 2, 32, 32), 4
    single, largest = pool.run(1, engine_cases.peak_memory, plan_documents(lengths, 1), shape, {})[0]
    assert largest < lengths[0] ** 2 / 8
    plan = plan_documents(lengths, cp_size, strategy="per_doc")
    plan = plan.with_offset_groups(STAGES["all"](cp_size)) if stages == "all" else plan
    report = plan.report()
    kv, outputs = 2 * (32 + 32), 4 * 32 * sum(lengths) / cp_size
    results = pool.run(cp_size, engine_cases.peak_memory, plan, shape, {"keep_received_kv": keep})
    for rank, (peak, largest) in enumerate(results):
        received, sent = report["kv_received"][rank] * kv, report["kv_sent"][rank] * kv
        more = received * (2 + 4 + 2 + 2) + sent * (2 + 4) + (4 * outputs if stages == "all" else 0)
        assert single / cp_size < peak <= single / cp_size + more
        assert largest < lengths[0] ** 2 / 8


@pytest.mark.parametrize("stages", STAGES)
def test_keys_fetched_again_are_exact(pool, stages):
    groups = STAGES[stages] and STAGES[stages](4)
    plans = [ODD_PLAN, *(plan_documents(KNOWN_PACKS["three"], 4, strategy=strategy) for strategy in STRATEGIES)]
    todo = [
        cases.Case(plan, (4, 2, 8, 12), offset_groups=groups, options=options, keep_received_kv=False)
        for plan in plans
        for options in ({}, {"window": 9}, {"sinks": True})
    ]
    for errors in pool.run(4, cases.attention_errors, todo):
        assert max(max(error) for error in errors) < FP64


@pytest.mark.devices("cpu")
def test_keys_are_fetched_again_if_a_rank_receives_more_than_four_tokens_per_own_token():
    """One document over six ranks: the first rank holds the first and last twelfth, and receives all others."""
    near, far = (RankPlan(plan_documents([60], size, strategy="per_doc"), 0, FakeGroup(size)) for size in (5, 6))
    assert near.plan.report()["kv_received"][0] / near.layout.num_tokens <= 4 and near.keep_received_kv
    assert far.plan.report()["kv_received"][0] / far.layout.num_tokens == 5 and not far.keep_received_kv


class FakeGroup:
    def __init__(self, cp_size):
        self._size = cp_size

    def size(self):
        return self._size


# Whole models


SELECTIVE = {"use_reentrant": False, "context_fn": save_attention_context_fn}


@pytest.mark.parametrize(
    "kwargs, keep, exchanges, forwards",
    [
        (None, None, 2, 2),
        ({"use_reentrant": False}, None, 3, 4),
        ({"use_reentrant": True}, None, 3, 4),
        (SELECTIVE, None, 2, 2),
        (SELECTIVE, False, 3, 2),
        (None, False, 3, 2),
    ],
    ids=["none", "plain", "reentrant", "selective", "selective, fetched again", "fetched again"],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_selective_checkpointing_attends_and_exchanges_once(pool, family, kwargs, keep, exchanges, forwards):
    """Forward of a layer takes a local and a remote kernel call and an exchange, and so does backward."""
    for error, counts in pool.run(2, engine_cases.checkpointed, family, [40, 3, 17, 25], kwargs, keep):
        assert error < FP64
        assert counts == (exchanges, forwards, 2)


def test_selective_checkpointing_in_a_trainer(pool):
    """Set the option through TrainingArguments, which trackers log as JSON."""
    for error, counts in pool.run(2, engine_cases.selective_trainer, [40, 3, 17], SELECTIVE):
        assert error < 1e-6 and counts == (2, 2, 2)


def test_ranks_that_differ_in_keeping_kv_raise(pool):
    for error in pool.errors(2, engine_cases.keep_on_one_rank):
        assert isinstance(error, BatchError) and "keep_received_kv is true on rank 0 and false on rank 1" in str(error)


@pytest.mark.parametrize(
    "whole, backend, breaks",
    [
        (False, "aot_eager", ["flashcp_attention"]),
        (True, "eager", ["LossCheck", "flashcp_attention", "flashcp_mask"]),
    ],
)
def test_compiled_models(pool, whole, backend, breaks):
    """Compiled models have the same gradients, and a further pack compiles no new graph.

    Graphs break at the attention call. In a whole model they also break at the mask, before the layers, and once at
    the loss, which is checked on the first pack and compiled on the second. Debug mode changes none of this.
    """
    packs = [[40, 3, 17, 1, 25], [30, 9], [64, 5, 7], [33, 20, 20]]
    for errors, graphs, found in pool.run(2, engine_cases.compiled, packs, backend, whole):
        assert max(errors) < FP64
        assert graphs == [graphs[0], *[graphs[0] + whole] * 3]
        assert found == breaks
