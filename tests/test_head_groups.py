"""`FlashCPPlugin(head_groups=...)`: attention in groups of KV heads is the same, and its buffers are smaller."""

import pytest
import torch

from hf_flashcp import FlashCPPlugin, save_attention_context_fn
from hf_flashcp.attention.head_groups import divide_heads
from hf_flashcp.errors import BatchError, ConfigurationError
from hf_flashcp.planning import plan_documents
from tests import attention_cases as cases
from tests import debug_cases, engine_cases, head_group_cases, vendor_cases
from tests.device import ON_CPU, ExactKernel
from tests.packs import KNOWN_PACKS
from tests.test_attention import FP64, ODD_PLAN


pytestmark = pytest.mark.devices("cpu", "cuda")

VARIANTS = ({}, {"sinks": True}, {"window": 9, "sinks": True}, {"softcap": 1.5})


@pytest.mark.parametrize(
    "query_heads, kv_heads, count, sizes",
    [
        (32, 8, 1, [8]),
        (32, 8, 3, [2, 3, 3]),
        (12, 6, 4, [1, 2, 1, 2]),
        (8, 8, 8, [1] * 8),
        (8, 2, 4, [1, 1]),
        (8, 1, 4, [1]),
    ],
)
def test_groups_are_as_equal_as_possible_and_at_most_one_per_kv_head(query_heads, kv_heads, count, sizes):
    groups = divide_heads(query_heads, kv_heads, count)
    heads = [list(range(kv_heads))[group.keys] for group in groups]
    assert [len(each) for each in heads] == sizes and sum(heads, []) == list(range(kv_heads))
    shared = query_heads // kv_heads
    for group, each in zip(groups, heads):
        assert list(range(query_heads))[group.queries] == list(range(each[0] * shared, (each[-1] + 1) * shared))


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
def test_groups_are_exact(pool, cp_size):
    """Odd slices and every stage count, kept and fetched KV, and for four ranks also the hierarchical exchange."""
    plans = [plan_documents(KNOWN_PACKS["odd"], cp_size, strategy="per_doc")]
    if cp_size > 2:
        plans.append(plans[0].with_offset_groups([[offset] for offset in range(1, cp_size)]))
    if cp_size == 4:
        plans += [ODD_PLAN, ODD_PLAN.with_offset_groups([[1, 3], [2]]), ODD_PLAN.with_ranks_per_node(2)]
    todo = [
        cases.Case(
            plan, shape, kernel="eager", options=options, keep_received_kv=number % 2 == 0, head_groups=head_groups
        )
        for plan in plans
        for number, (options, (shape, head_groups)) in enumerate(
            (options, each)
            for options in VARIANTS
            for each in (((6, 3, 8, 12), 2), ((6, 3, 12, 8), 3), ((4, 1, 8, 8), 2))
        )
    ]
    for errors in pool.run(cp_size, cases.attention_errors, todo):
        for case, error in zip(todo, errors):
            assert max(error) < FP64, (case, error)


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("cp_size", [1, 3])
def test_groups_change_no_bit(pool, cp_size):
    """Rows fill vector registers: elsewhere PyTorch computes functions of the last elements of a tensor, which groups
    have more of, without vectors."""
    plan = plan_documents([96 * cp_size, 64 * cp_size], cp_size, strategy="per_doc")
    groups = [[[offset] for offset in range(1, cp_size)], None]
    todo = [
        cases.Case(plan, (12, 6, 16, 16), dtype, kernel, offset_groups, options)
        for dtype in ("float64", "float32", "bfloat16")
        for kernel, options, offset_groups in (
            ("cpu_flash", {}, groups[0]),
            ("cpu_flash", {"sinks": True}, groups[1]),
            ("cpu_flash", {"window": 9}, groups[1]),
            ("eager", {"softcap": 1.5}, groups[1]),
        )
    ]
    for unequal in pool.run(cp_size, head_group_cases.unequal_results, todo, 4):
        assert unequal == [[]] * len(todo)


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("stand_in", ["flash_attn_2", "flash_attn_3", "cudnn"])
def test_vendors_kernels_get_groups(pool, stand_in):
    """Inputs are views of some heads, whose rows do not lie together, and one KV head has several query heads."""
    plan = plan_documents([40, 25], 2, strategy="per_doc")
    todo = [cases.Case(plan, (6, 3, 8, 8), head_groups=2), cases.Case(plan, (4, 2, 16, 16), head_groups=2)]
    for errors, calls in pool.run(2, vendor_cases.layer_errors, stand_in, todo):
        assert max(max(error) for error in errors) < FP64
        assert calls[0] == calls[1] >= 8


def test_results_lie_as_the_model_reads_them(pool):
    """The heads of a token lie together, so that no result is copied."""
    plan = plan_documents([40, 24], 2, strategy="per_doc")
    for one, two in pool.run(2, head_group_cases.layouts_in_memory, plan):
        assert one == two == [True] * 4


@pytest.mark.parametrize("head_groups", [2, 3])
def test_calls_and_exchanges_grow_and_bytes_do_not(pool, head_groups):
    """A layer with 2 KV heads has at most 2 groups; the bytes are those of a layer with 4."""
    plan = plan_documents([40, 24], 3, strategy="per_doc").with_offset_groups([[1], [2]])
    report = plan.report()
    for rank, (calls, collectives, received) in enumerate(pool.run(3, head_group_cases.work, plan, head_groups)):
        assert calls == 2 * report["kernel_calls"][rank]
        assert collectives == 2 * report["collectives"][rank]
        assert received == (report["kv_received"][rank] + report["kv_sent"][rank]) * 4 * 4 * (8 + 12)


@pytest.mark.skipif(not ON_CPU, reason="counts the blocks of the kernel for CPU")
@pytest.mark.parametrize(
    "cp_size, keep, backward", [(1, True, True), (1, True, False), (2, True, True), (2, False, True)]
)
def test_buffers_exist_for_one_group(pool, cp_size, keep, backward):
    """At the peak, all but inputs, results, kept KV and the mask is 1/n in n groups, to the byte.

    In one group, results need no other room than the buffers in which they are computed. (Forward
    alone over two ranks is left out: when an exchange frees what it sent depends on the other rank.)
    """
    plan, shape = plan_documents([512 * cp_size], cp_size, strategy="per_doc"), (16, 8, 16, 16)
    report, (heads, kv_heads, width, _) = plan.report(), shape
    for rank, peaks in enumerate(pool.run(cp_size, head_group_cases.peaks, plan, shape, keep, backward)):
        one, two, four, eight = peaks
        tokens = report["tokens"][rank] * 2 * width
        inputs = tokens * (heads + 2 * kv_heads + heads * backward)
        output = tokens * heads + report["tokens"][rank] * 4 * heads
        results = output + tokens * (heads + 2 * kv_heads) * backward
        kept = report["kv_received"][rank] * 2 * 2 * kv_heads * width * keep
        mask = 2 * ExactKernel._ROWS * ExactKernel._MASK_KEYS * heads // kv_heads
        buffers = 8 * (four - eight)
        assert [two, four, eight] == [inputs + results + kept + mask + buffers / count for count in (2, 4, 8)]
        assert one == inputs + output * backward + kept + mask + buffers and buffers > results


@pytest.mark.parametrize("kwargs, exchanges", [(None, 2), ({"context_fn": save_attention_context_fn}, 2)])
def test_models_in_groups(pool, kwargs, exchanges):
    """Each layer has two groups, also where its results are kept and the rest runs again."""
    kwargs = kwargs and {"use_reentrant": False, **kwargs}
    for error, counts in pool.run(2, engine_cases.checkpointed, "llama", [40, 3, 17, 25], kwargs, None, 2):
        assert error < FP64
        assert counts == (2 * exchanges, 4, 4)


@pytest.mark.load
def test_compiled_layers_in_groups(pool):
    packs = [[40, 3, 17, 1, 25], [30, 9], [64, 5, 7]]
    for errors, graphs, breaks in pool.run(2, head_group_cases.compiled, packs):
        assert max(errors) < FP64 and graphs == graphs[:1] * 3 and breaks == ["flashcp_attention"]


def test_debug_mode_checks_layers_in_groups(pool):
    plan = plan_documents([70, 9, 33], 3, strategy="per_doc")
    todo = [((plan, (6, 3, 8, 12)), {"head_groups": 2, **options}) for options in ({}, {"window": 6, "sinks": True})]
    pool.run(3, debug_cases.layers, todo)


@pytest.mark.parametrize("head_groups", [0, -1, 1.5, "2", None, torch.tensor(0.5)])
def test_head_groups_that_are_no_number_of_groups(head_groups):
    with pytest.raises(ConfigurationError, match="head_groups must be a positive integer, got"):
        FlashCPPlugin(cp_size=1, head_groups=head_groups)


def test_ranks_with_different_groups(pool):
    for error in pool.errors(2, head_group_cases.groups_on_one_rank):
        assert type(error) is BatchError
        assert "Ranks disagree on the batch: head_groups is 1 on rank 0 and 2 on rank 1" in str(error)
