"""One attention layer under every kind of plan, compared with each document alone on one device in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flashcp.attention import Layer
from hf_flashcp.planning import STRATEGIES, ShardPlan, kv_bytes, plan_documents
from tests import attention_cases as cases
from tests.device import ExactKernel, fused_kernels, usable_kernels
from tests.packs import KNOWN_PACKS, arbitrary_plans, plans_of


pytestmark = pytest.mark.devices("cpu", "cuda")

EXACT = usable_kernels(Layer(torch.float64))
FP64 = 1e-12  # relative Frobenius norm of out, dq, dk, dv
FP32 = 1e-5
SHAPES = [(4, 2, 8, 8), (8, 8, 16, 16), (8, 2, 16, 16), (5, 5, 8, 8), (4, 1, 12, 8), (4, 4, 8, 12)]
SHORT_PACKS = [name for name, lengths in KNOWN_PACKS.items() if sum(lengths) <= 1100]

# One document over four ranks with gaps on each, another on two; many odd slices.
ODD_PLAN = ShardPlan(
    [23, 9, 4],
    4,
    [
        [(0, 0, 2), (0, 7, 8), (0, 20, 21), (1, 3, 5)],
        [(0, 2, 5), (0, 10, 16), (2, 0, 4)],
        [(0, 5, 7), (0, 8, 10), (0, 22, 23), (1, 0, 3)],
        [(0, 16, 20), (0, 21, 22), (1, 5, 9)],
    ],
)


@pytest.mark.parametrize(
    "cp_size, kernel",
    [(cp_size, kernel) for cp_size in (1, 2, 3, 4) for kernel in EXACT if kernel != "eager" or cp_size in (1, 3)],
)
def test_known_packs_are_exact(pool, cp_size, kernel):
    todo = [cases.Case(plan, (4, 2, 8, 8), kernel=kernel) for name in SHORT_PACKS for plan in plans_of(name, cp_size)]
    for errors in pool.run(cp_size, cases.attention_errors, todo):
        for case, error in zip(todo, errors):
            assert max(error) < FP64, (case, error)


@pytest.mark.parametrize(
    "name, shape, cp_size",
    [("ring_flash_attention", (5, 5, 8, 8), 2), ("ring_flash_attention_128", (5, 5, 128, 128), 3)],
)
def test_long_packs_are_exact(pool, name, shape, cp_size):
    plan = plan_documents(KNOWN_PACKS[name], cp_size)
    for errors in pool.run(cp_size, cases.attention_error, plan, shape):
        assert max(errors) < FP64


@pytest.mark.parametrize("cp_size", [5, 7, 8])
def test_many_and_odd_ranks_are_exact(pool, cp_size):
    todo = [
        cases.Case(plan_documents(KNOWN_PACKS[name], cp_size, strategy=strategy), shape)
        for name, shape in (
            ("blocks_of_128", (8, 2, 64, 64)),
            ("six_of_150", (8, 8, 64, 64)),
            ("fewer_tokens_than_chunks", (4, 2, 8, 8)),
        )
        for strategy in STRATEGIES
    ]
    for errors in pool.run(cp_size, cases.attention_errors, todo):
        for case, error in zip(todo, errors):
            assert max(error) < FP64, (case, error)


@pytest.mark.parametrize("kernel", EXACT)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.smoke
def test_head_shapes_are_exact(pool, shape, kernel):
    """Grouped queries, one KV head, values narrower and wider than keys."""
    for errors in pool.run(4, cases.attention_error, ODD_PLAN, shape, "float64", kernel):
        assert max(errors) < FP64


@pytest.mark.parametrize("cp_size", [2, 3, 4])
@settings(max_examples=80)
@given(data=st.data())
@pytest.mark.smoke
def test_arbitrary_plans_are_exact(pool, cp_size, data):
    case = cases.Case(data.draw(arbitrary_plans(cp_size)), (4, 2, 8, 8), kernel=data.draw(st.sampled_from(EXACT)))
    for errors in pool.run(cp_size, cases.attention_errors, [case]):
        assert max(errors[0]) < FP64


@pytest.mark.parametrize("offset_groups", [[[1, 2, 3]], [[1], [2], [3]], [[3], [1, 2]], [[1, 3], [2]]])
@given(data=st.data())
@settings(max_examples=15)
def test_stages_of_any_ring_offsets_are_exact(pool, offset_groups, data):
    plan = data.draw(arbitrary_plans(4))
    args = (plan, (4, 2, 8, 8), "float64", ExactKernel.name, offset_groups)
    for errors in pool.run(4, cases.attention_error, *args):
        assert max(errors) < FP64


@pytest.mark.parametrize("kernel", EXACT)
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
def test_fp32(pool, cp_size, kernel):
    todo = [
        cases.Case(plan, (4, 2, 8, 8), "float32", kernel)
        for name in ("mixed", "odd", "giant_and_tiny", "seven")
        for plan in plans_of(name, cp_size)
    ]
    for errors in pool.run(cp_size, cases.attention_errors, todo):
        for case, error in zip(todo, errors):
            assert max(error) < FP32, (case, error)


@pytest.mark.parametrize("kernel", [*EXACT, *fused_kernels(key_dim=16, value_dim=16)])
@pytest.mark.parametrize("cp_size", [2, 3, 4])
def test_bf16_error_is_within_twice_that_of_a_single_device(pool, cp_size, kernel):
    todo = [
        cases.Case(plan_documents(KNOWN_PACKS[name], cp_size, strategy=strategy), (8, 2, 16, 16), kernel=kernel)
        for name in ("mixed", "halves", "seven", "giant_and_tiny")
        for strategy in STRATEGIES
    ]
    for errors in pool.run(cp_size, cases.bf16_errors, todo):
        for case, pairs in zip(todo, errors):
            for ours, single in pairs:
                assert ours <= 2 * single, (case, pairs)


VARIANTS = {
    "window 1": {"window": 1},
    "window 2": {"window": 2},
    "window 5": {"window": 5},
    "window 9": {"window": 9},
    "window 100": {"window": 100},
    "window 100000": {"window": 100000},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "window, sinks": {"window": 6, "sinks": True},
    "window, softcap": {"window": 7, "softcap": 2.0},
    "all": {"window": 12, "softcap": 0.7, "sinks": True},
}


def exact_kernels(options):
    return usable_kernels(Layer(torch.float64, softcap="softcap" in options))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
def test_variants_are_exact(pool, cp_size, variant):
    """Sliding windows shorter and longer than slices and documents, softcap, sinks, and combinations found in
    models."""
    options = VARIANTS[variant]
    todo = [
        cases.Case(plan, shape, kernel=kernel, options=options)
        for name in ("ids", "odd", "uneven", "three", "small_3", "giant_and_tiny")
        for plan in plans_of(name, cp_size)
        for kernel in exact_kernels(options)
        for shape in ((4, 2, 8, 8), (4, 4, 12, 8))
    ]
    for errors in pool.run(cp_size, cases.attention_errors, todo):
        for case, error in zip(todo, errors):
            assert max(error) < FP64, (case, error)


@pytest.mark.parametrize("cp_size", [2, 3, 4])
@settings(max_examples=80)
@given(data=st.data())
def test_variants_of_arbitrary_plans_are_exact(pool, cp_size, data):
    plan = data.draw(arbitrary_plans(cp_size))
    options = {
        "window": data.draw(st.none() | st.integers(1, 45)),
        "softcap": data.draw(st.sampled_from([None, 1.0])),
        "sinks": data.draw(st.booleans()),
    }
    kernel = data.draw(st.sampled_from(exact_kernels(options)))
    for errors in pool.run(cp_size, cases.attention_error, plan, (4, 2, 8, 8), "float64", kernel, None, options):
        assert max(errors) < FP64


@pytest.mark.parametrize("kernel", EXACT)
def test_windows_longer_than_a_block_of_queries_are_exact(pool, kernel):
    options = {"window": 300}
    plan = plan_documents([1500, 700, 90], 3, strategy="per_doc")
    for errors in pool.run(3, cases.attention_error, plan, (2, 1, 8, 8), "float64", kernel, None, options):
        assert max(errors) < FP64


@pytest.mark.parametrize("window", [4, 6])
def test_a_window_one_too_long_or_too_short_fails(pool, window):
    """The comparison notices a window that is off by one; the reference has 5."""
    plan = plan_documents([40, 17], 2, strategy="per_doc")
    for errors in pool.run(2, cases.error_of_another_window, plan, 5, window):
        assert min(errors) > 1e-3


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("variant", ["window 9", "softcap", "sinks", "all"])
def test_variants_in_fp32_and_bf16(pool, cp_size, variant):
    options, shape = VARIANTS[variant], (8, 2, 16, 16)
    plans = [plan_documents(KNOWN_PACKS[name], cp_size, strategy="per_doc") for name in ("mixed", "giant_and_tiny")]
    exact, fused = exact_kernels(options), fused_kernels(16, 16, softcap="softcap" in options)
    todo = [cases.Case(plan, shape, "float32", kernel, options=options) for plan in plans for kernel in exact]
    for errors in pool.run(cp_size, cases.attention_errors, todo):
        assert max(map(max, errors)) < FP32
    todo = [cases.Case(plan, shape, kernel=kernel, options=options) for plan in plans for kernel in [*exact, *fused]]
    for errors in pool.run(cp_size, cases.bf16_errors, todo):
        for case, pairs in zip(todo, errors):
            for ours, single in pairs:
                assert ours <= 2 * single, (case, pairs)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("document", [0, 1, 3])
@pytest.mark.smoke
def test_changing_a_document_changes_no_other(pool, strategy, document):
    plan = plan_documents([30, 25, 7, 40], 3, strategy=strategy)
    for changed in pool.run(3, cases.leak_probe, plan, document):
        assert changed == [index == document for index in range(4)]


NAMED_TRAFFIC = [
    # plan, tokens received by each rank, tokens sent by each rank
    (plan_documents([16], 2, strategy="per_doc"), [8, 4], [4, 8]),
    (plan_documents([24, 24], 3, strategy="per_doc"), [32, 24, 16], [16, 24, 32]),
    (plan_documents([6, 10], 2, strategy="per_seq"), [6, 4], [4, 6]),
    (plan_documents([9, 4], 4, strategy="whole_doc"), [2, 0, 0, 1], [0, 0, 2, 1]),
    (ODD_PLAN, [17 + 3, 7, 18, 17 + 5], [6 + 3 + 2 + 2, 9 + 18, 6 + 6 + 6, 8 + 1]),
]


@pytest.mark.parametrize("plan, received, sent", NAMED_TRAFFIC)
@pytest.mark.smoke
def test_the_report_counts_the_sent_tokens(pool, plan, received, sent):
    report = plan.report()
    assert report["kv_received"] == received
    assert report["kv_sent"] == sent
    for rank, calls in enumerate(pool.run(plan.cp_size, cases.counted_traffic, plan, (4, 2, 8, 12))):
        forward, backward = calls  # one collective each way
        row = kv_bytes(1, num_kv_heads=2, key_dim=8, value_dim=12, itemsize=4)
        assert forward["received"] == received[rank]
        assert forward["sent"] == report["kv_sent"][rank]
        assert forward["bytes_received"] == received[rank] * row
        assert backward["received"] == report["grad_received"][rank]
        assert backward["sent"] == report["grad_sent"][rank]
        assert backward["bytes_received"] == report["grad_received"][rank] * row


@pytest.mark.parametrize("window", [1, 2, 4, 9, 30])
@pytest.mark.parametrize(
    "plan", [ODD_PLAN, plan_documents([24, 24, 3], 3, strategy="per_doc")], ids=["odd", "per_doc"]
)
def test_only_the_missing_part_of_windows_is_sent(pool, plan, window):
    report = plan.report(window=window)
    assert report["kv_received"] == tokens_seen_but_not_held(plan, window)
    results = pool.run(plan.cp_size, cases.counted_traffic, plan, (4, 2, 8, 12), None, {"window": window})
    for rank, calls in enumerate(results):
        if window == 1:
            assert calls == [] and report["kv_total"] == 0
            continue
        forward, backward = calls
        assert forward["received"] == backward["sent"] == report["kv_received"][rank]
        assert forward["sent"] == backward["received"] == report["kv_sent"][rank]
        assert forward["bytes_received"] == forward["received"] * kv_bytes(1, 2, 8, 12, 4)


def tokens_seen_but_not_held(plan, window):
    """Count them one token at a time."""
    counts = []
    for slices in plan.slices:
        held = {(document, token) for document, start, stop in slices for token in range(start, stop)}
        seen = {(document, key) for document, token in held for key in range(max(0, token - window + 1), token + 1)}
        counts.append(len(seen - held))
    return counts


def test_layers_of_different_heads_share_a_plan(pool):
    """Heads, head dimensions and windows differ between layers: one batch, one plan, two layouts."""
    for errors in pool.run(3, cases.errors_of_different_layers, plan_documents([40, 17, 8], 3, strategy="per_doc")):
        assert max(errors) < FP64


def test_stages_carry_each_token_once(pool):
    report = ODD_PLAN.report()
    for rank, calls in enumerate(pool.run(4, cases.counted_traffic, ODD_PLAN, (4, 2, 8, 8), [[1], [2], [3]])):
        assert len(calls) == 6
        assert sum(call["received"] for call in calls[:3]) == report["kv_received"][rank]
        assert sum(call["sent"] for call in calls[3:]) == report["grad_sent"][rank]


def test_stages_without_transfers_do_not_exist(pool):
    # All KV goes from rank 0 to rank 1, so only the first of the three ring offsets is needed.
    plan = ShardPlan([8, 4, 4], 4, [[(0, 0, 4)], [(0, 4, 8)], [(1, 0, 4)], [(2, 0, 4)]])
    for calls in pool.run(4, cases.counted_traffic, plan, (4, 2, 8, 8), [[1], [2], [3]]):
        assert len(calls) == 2


@pytest.mark.parametrize("cp_size", [2, 4])
def test_whole_documents_need_no_collective(pool, cp_size):
    plan = plan_documents([100, 80, 44, 70], cp_size, strategy="whole_doc")
    assert pool.run(cp_size, cases.collectives_seen, plan) == [0] * cp_size
    moving = plan_documents([100, 80, 44, 70], cp_size, strategy="per_doc")
    assert pool.run(cp_size, cases.collectives_seen, moving) == [2] * cp_size


def test_transfers_are_posted_before_and_awaited_after_the_local_work(pool):
    orders = pool.run(2, cases.issue_order, plan_documents([16], 2, strategy="per_doc"))
    forward = ["post", "local forward", "wait", "remote forward"]
    backward = ["remote backward", "post", "local backward", "wait"]
    assert orders == [forward + backward] * 2


def test_frozen_keys_and_values_send_no_gradient(pool):
    orders = pool.run(2, cases.issue_order, plan_documents([16], 2, strategy="per_doc"), True)
    assert orders == [["post", "local forward", "wait", "remote forward", "remote backward", "local backward"]] * 2


def test_strided_inputs_and_expanded_gradients(pool):
    for difference in pool.run(3, cases.awkward_layouts, plan_documents([30, 25, 7], 3)):
        assert difference < 1e-13
