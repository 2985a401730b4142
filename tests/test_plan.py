import json
import os
import pickle
import subprocess
import sys
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_flashcp.data.lengths import sample_pack
from hf_flashcp.errors import FlashCPError, PlanError
from hf_flashcp.layout import RankPlan
from hf_flashcp.plan import shard_plan
from hf_flashcp.plan.kernel_calls import GRIDS
from hf_flashcp.planning import STRATEGIES, ShardPlan, kv_bytes, plan_documents
from tests.independent_plan_checker import check_plan
from tests.kernel_cases import EmulatedVarlen
from tests.kernel_cases import make as kernel_inputs
from tests.kernel_cases import run as run_kernel
from tests.packs import KNOWN_PACKS, arbitrary_plans


pytestmark = pytest.mark.smoke


def owners(plan):
    """Return {(document, token): rank}, without code of the library."""
    found = {}
    for rank, slices in enumerate(plan.slices):
        for document, start, stop in slices:
            for token in range(start, stop):
                assert (document, token) not in found
                found[document, token] = rank
    return found


def brute_force_report(plan):
    """Count traffic and work for every query and key."""
    owner = owners(plan)
    tokens, pairs, received, sent = ([0] * plan.cp_size for _ in range(4))
    wanted = set()
    for (document, query), rank in owner.items():
        tokens[rank] += 1
        pairs[rank] += query + 1
        for key in range(query + 1):
            if owner[document, key] != rank:
                wanted.add((document, key, rank))
    for document, key, rank in wanted:
        received[rank] += 1
        sent[owner[document, key]] += 1
    return tokens, pairs, received, sent


lengths_and_cp_size = st.integers(1, 9).flatmap(
    lambda cp_size: st.tuples(
        st.lists(st.integers(1, 60), min_size=1, max_size=8).map(
            lambda lengths: lengths if sum(lengths) >= cp_size else [*lengths, cp_size]
        ),
        st.just(cp_size),
    )
)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(lengths_and_cp_size)
def test_every_strategy_partitions_the_documents(strategy, case):
    lengths, cp_size = case
    plan = plan_documents(lengths, cp_size, strategy=strategy)
    assert set(owners(plan)) == {(d, t) for d, length in enumerate(lengths) for t in range(length)}
    assert all(plan.slices)
    assert plan == plan_documents(lengths, cp_size, strategy=strategy)
    for slices in plan.slices:
        assert list(slices) == sorted(slices)
        assert all(a[0] != b[0] or a[2] < b[1] for a, b in zip(slices, slices[1:])), "slices must not touch"


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "per_doc"},
        {"strategy": "per_doc", "rotate_ranks": True},
        {"strategy": "per_seq"},
        {"strategy": "flashcp"},
    ],
)
@given(lengths_and_cp_size)
def test_tokens_are_equal_within_one(options, case):
    tokens = plan_documents(*case, **options).report()["tokens"]
    assert max(tokens) - min(tokens) <= 1


@given(lengths_and_cp_size)
def test_whole_doc_sends_nothing_if_there_are_enough_documents(case):
    lengths, cp_size = case
    plan = plan_documents(lengths, cp_size, strategy="whole_doc")
    cuts = sum(map(len, plan.slices)) - len(lengths)
    assert cuts == max(cp_size - len(lengths), 0)
    if len(lengths) >= cp_size:
        assert plan.report()["kv_total"] == 0


@given(arbitrary_plans())
def test_report_equals_a_query_by_query_count(plan):
    report = plan.validate().report()
    assert (report["tokens"], report["pairs"], report["kv_received"], report["kv_sent"]) == brute_force_report(plan)
    assert report["grad_sent"] == report["kv_received"] and report["grad_received"] == report["kv_sent"]
    assert report["kv_total"] == sum(report["kv_sent"])
    assert report["kv_all_gather"] == (plan.cp_size - 1) * sum(plan.lengths)


@given(arbitrary_plans())
def test_reported_states_equal_a_run_by_run_count(plan):
    report, counts = plan.report(), check_plan(plan.lengths, plan.cp_size, plan.slices)
    for name in ("states_received", "states_sent", "state_grads_received", "state_grads_sent"):
        assert report[name] == counts[name].tolist()


def test_states_of_a_known_plan():
    """Rank 0 needs the states of ranks 1 and 2 for its last slice. Document 2 is whole."""
    slices = [[(0, 0, 30), (0, 80, 100)], [(0, 30, 60)], [(0, 60, 80), (1, 0, 3)], [(1, 3, 5), (2, 0, 7)]]
    report = ShardPlan([100, 5, 7], 4, slices).validate().report()
    assert (report["states_received"], report["states_sent"]) == ([2, 1, 2, 1], [2, 2, 2, 0])
    assert (report["state_grads_received"], report["state_grads_sent"]) == ([2, 2, 2, 0], [2, 1, 2, 1])


@given(arbitrary_plans())
def test_json_round_trip_keeps_plan_and_digest(plan):
    again = ShardPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan and again.digest == plan.digest


def test_digest_is_stable_and_distinguishes_plans():
    plan = plan_documents([100, 80, 44], 2, strategy="per_doc")
    assert plan.digest == "6175049f4a5da30e0cbbcdf61f2a12f49ee172f51fb7a8fa542c32714b4c9d3b"
    assert plan.digest != plan_documents([100, 80, 44], 3).digest
    assert plan.digest != plan_documents([80, 100, 44], 2).digest


def test_zigzag_of_one_document():
    plan = plan_documents([16], 2, strategy="per_doc")
    assert plan.slices == (((0, 0, 4), (0, 12, 16)), ((0, 4, 12),))
    report = plan.report()
    assert report["tokens"] == [8, 8]
    assert report["pairs"] == [68, 68]
    assert report["kv_received"] == [8, 4]
    assert report["kv_sent"] == [4, 8]
    assert report["kv_fraction"] == 12 / 16


def test_left_over_tokens_go_round_the_zigzag_from_document_to_document():
    # Four chunks per document: 5 = 4 + 1 gives the left-over token to chunk 0, the next document's to 1, then 2, 3.
    plan = plan_documents([5, 5, 5, 5], 2, strategy="per_doc")
    assert plan.slices[0] == ((0, 0, 2), (0, 4, 5), (1, 0, 1), (1, 4, 5), (2, 0, 1), (2, 4, 5), (3, 0, 1), (3, 3, 5))
    assert plan.slices[1] == ((0, 2, 4), (1, 1, 4), (2, 1, 4), (3, 1, 3))


def test_rotating_ranks_spreads_receiving_and_keeps_the_total():
    fixed = plan_documents([64] * 8, 4, strategy="per_doc").report()
    rotated = plan_documents([64] * 8, 4, strategy="per_doc", rotate_ranks=True).report()
    assert fixed["kv_total"] == rotated["kv_total"] == 3 * 3 * 512 // 4
    assert max(fixed["kv_received"]) == 3 * 512 // 4
    assert max(rotated["kv_received"]) == min(rotated["kv_received"]) == 3 * 3 * 512 // 16


def test_per_seq_cuts_the_row_and_not_the_documents():
    plan = plan_documents([6, 10], 2, strategy="per_seq")
    assert plan.slices == (((0, 0, 4), (1, 6, 10)), ((0, 4, 6), (1, 0, 6)))


def test_whole_doc_gives_an_empty_rank_one_token_of_the_longest_document():
    assert plan_documents([9, 4], 2, strategy="whole_doc").slices == (((0, 0, 9),), ((1, 0, 4),))
    plan = plan_documents([9, 4], 4, strategy="whole_doc")
    assert plan.slices == (((0, 2, 9),), ((1, 0, 4),), ((0, 0, 1),), ((0, 1, 2),))
    assert plan.report()["kv_received"] == [2, 0, 0, 1]


@pytest.mark.parametrize("name", KNOWN_PACKS)
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4, 5, 7])
def test_known_packs(name, cp_size):
    for strategy in STRATEGIES:
        plan = plan_documents(KNOWN_PACKS[name], cp_size, strategy=strategy)
        report = plan.report()
        assert sum(report["tokens"]) == sum(KNOWN_PACKS[name])


def test_flashcp_keeps_documents_whole_if_the_caps_allow_it():
    # Pairs 36 | 10 + 10 with a mean of 28, tokens 8 | 8: within 1.3, so nothing is sent.
    plan = plan_documents([8, 4, 4], 2, strategy="flashcp", max_imbalance=1.3)
    assert plan.slices == (((0, 0, 8),), ((1, 0, 4), (2, 0, 4)))


def test_flashcp_splits_the_longest_document_over_all_ranks_otherwise():
    # Within 1.05 of 28 the first document must be split (18 pairs each); the others go one to each rank.
    plan = plan_documents([8, 4, 4], 2, strategy="flashcp")
    assert plan.slices == (((0, 0, 2), (0, 6, 8), (1, 0, 4)), ((0, 2, 6), (2, 0, 4)))
    assert plan.report()["kv_total"] == 6


def test_flashcp_moves_the_head_of_the_shortest_document_to_equalize_tokens():
    # Whole: pairs 15 | 10 + 6, tokens 5 | 7. One token must move: the first of rank 1's shortest document.
    plan = plan_documents([5, 4, 3], 2, strategy="flashcp")
    assert plan.slices == (((0, 0, 5), (2, 0, 1)), ((1, 0, 4), (2, 1, 3)))
    assert plan.report()["pairs"] == [16, 15]
    assert plan.report()["kv_received"] == [0, 1]


def test_flashcp_moves_whole_documents_before_heads():
    # Tokens 6 | 8, one must move: moving a document of one token costs nothing.
    plan = plan_documents([6, 2, 2, 1, 1, 1, 1], 2, strategy="flashcp", max_imbalance=1.5)
    assert plan.slices[0] == ((0, 0, 6), (3, 0, 1))
    assert plan.report()["kv_total"] == 0


def test_flashcp_uses_the_room_that_the_token_cap_leaves():
    # Tokens 5 | 7 with a mean of 6: within 1.2, so nothing has to move.
    plan = plan_documents([5, 4, 3], 2, strategy="flashcp", max_token_imbalance=1.2)
    assert plan.slices == (((0, 0, 5),), ((1, 0, 4), (2, 0, 3)))


def test_flashcp_equals_per_doc_if_nothing_else_fits():
    for lengths, cp_size in (([40], 4), ([1, 1, 1], 2), ([7, 7, 7], 2)):
        ours = plan_documents(lengths, cp_size, strategy="flashcp", max_imbalance=1.0)
        assert ours == plan_documents(lengths, cp_size, strategy="per_doc")


@given(lengths_and_cp_size, st.sampled_from([1.0, 1.05, 1.3, 3.0]), st.sampled_from([1.0, 1.1, 2.0, float("inf")]))
def test_flashcp_keeps_to_its_caps(case, max_imbalance, max_token_imbalance):
    lengths, cp_size = case
    plan = plan_documents(
        lengths, cp_size, strategy="flashcp", max_imbalance=max_imbalance, max_token_imbalance=max_token_imbalance
    )
    report = plan.report()
    tokens = report["tokens"]
    assert max(tokens) - min(tokens) <= 1 or report["token_imbalance"] <= max_token_imbalance
    if report["pair_imbalance"] > max_imbalance:
        assert plan == plan_documents(lengths, cp_size, strategy="per_doc")


def test_bytes_on_the_wire():
    assert kv_bytes(1000, num_kv_heads=8, key_dim=128, value_dim=128, itemsize=2) == 1000 * 8 * 256 * 2


@pytest.mark.parametrize(
    "lengths, cp_size, options, message",
    [
        ([], 2, {}, "no documents"),
        ([4, 0, 3], 2, {}, "Document 1 has 0 tokens"),
        ([4, -2], 2, {}, "Document 1 has -2 tokens"),
        ([4.5, 3], 2, {}, "Document 0 has length 4.5"),
        ([1, 1], 3, {}, "2 tokens for cp_size 3"),
        ([8], 0, {}, "cp_size must be a positive integer, got 0"),
        ([8], 2.0, {}, "cp_size must be a positive integer, got 2.0"),
        ([8], 2, {"strategy": "zigzag"}, "Unknown strategy 'zigzag'"),
        ([8], 2, {"max_imbalance": 0.9}, "max_imbalance is 0.9"),
        ([8], 2, {"max_token_imbalance": float("nan")}, "max_token_imbalance is nan"),
        ([8], 2, {"max_imbalance": 10**400}, "max_imbalance is 1000"),
        ([8], 2, {"cost_model": "h100"}, "cost_model is 'h100', not a CostModel: pass CostModel.from_config"),
        ([8], 2, {"cost_model": {}}, "cost_model is {}, not a CostModel: pass"),
        ([8], 2, {"strategy": "per_seq", "rotate_ranks": True}, "rotate_ranks is an option of the strategy 'per_doc'"),
    ],
)
def test_bad_lengths_are_named(lengths, cp_size, options, message):
    with pytest.raises(PlanError, match=message) as error:
        plan_documents(lengths, cp_size, **options)
    assert isinstance(error.value, FlashCPError) and isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    "slices, message",
    [
        ([[(0, 0, 8)]], "slices for 1 ranks"),
        ([[(0, 0, 8)], []], "Rank 1 holds no tokens"),
        ([[(0, 0, 4)], [(0, 5, 8)]], r"Tokens \[4, 5\) of document 0 are on no rank"),
        ([[(0, 0, 5)], [(0, 4, 8)]], "from token 4 on, are on rank 1 and on another"),
        ([[(0, 0, 4)], [(0, 4, 7)]], r"Tokens \[7, 8\) of document 0 are on no rank"),
        ([[(0, 0, 4)], [(0, 4, 9)]], "which has 8 tokens"),
        ([[(0, 0, 4)], [(1, 4, 8)]], "slice of document 1, but the plan has 1"),
        ([[(0, 0)], [(0, 4, 8)]], "triples"),
    ],
)
def test_bad_plans_are_named(slices, message):
    with pytest.raises(PlanError, match=message):
        ShardPlan([8], 2, slices).validate()


def test_a_missing_document_is_named():
    with pytest.raises(PlanError, match="Document 1 is on no rank"):
        ShardPlan([4, 4], 2, [[(0, 0, 2)], [(0, 2, 4)]]).validate()


def test_from_dict_names_missing_keys():
    with pytest.raises(PlanError, match="Missing: slices"):
        ShardPlan.from_dict({"lengths": [4], "cp_size": 1})


def test_planning_needs_no_torch():
    code = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
import hf_flashcp
from hf_flashcp import ShardPlan, plan_documents
print(plan_documents([100, 80, 44], 2).digest)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == plan_documents([100, 80, 44], 2).digest


def test_plans_are_the_same_under_any_hash_seed():
    """Each rank of a launcher has its own hash seed; workers of a pool share one."""
    code = "from hf_flashcp.planning import STRATEGIES, plan_documents\n"
    code += "print([plan_documents([40, 3, 17, 9, 25, 1, 30, 7], 3, strategy=name).digest for name in STRATEGIES])"
    found = {
        subprocess.check_output([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in "01"
    }
    assert len(found) == 1


def test_traffic_is_counted_once_per_plan_and_window(monkeypatch):
    plan, counted = plan_documents([40, 33, 9], 1), []
    for name in ("kv_moved", "traffic_matrix"):
        count = getattr(shard_plan, name)
        monkeypatch.setattr(shard_plan, name, lambda *args, count=count: counted.append(args[1:]) or count(*args))
    for window in (None, 4, None, 4, 40, 41):  # no document is longer than 40
        plan.report(window)
        plan.kv_traffic(window)
    RankPlan(plan)
    assert sorted(map(str, counted)) == ["()", "(4,)", "(None,)"]
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan and not (again._moved or again._traffic or "slice_table" in vars(again))


PLANS = {
    "zigzag": cache(lambda: plan_documents([4096], 2, strategy="per_doc")),
    "one long, many short": cache(lambda: plan_documents([32768, *[64] * 512], 2, strategy="per_doc")),
    "pile, search": cache(lambda: plan_documents(sample_pack("pile", 131072), 8)),
    "pile, per_doc": cache(lambda: plan_documents(sample_pack("pile", 131072), 8, strategy="per_doc")),
}
# By plan and kernel: calls, blocks started and blocks useful of each rank, for 32 query heads.
BLOCKS = {
    # 16 and 16 blocks for the local pass; 8 queries' and 16 keys' blocks for the stage of rank 0, 16 and 8 on rank 1.
    ("zigzag", "torch_flash"): ([4, 4], [56, 56], [56, 56]),
    ("zigzag", "flash_attn_4"): ([4, 4], [56, 56], [56, 56]),
    # Each rank: 128 + 512 blocks for the local pass in each direction; for the stage 64 + 512 and 128 + 512.
    ("one long, many short", "torch_flash"): ([8, 8], [2496, 2496], [2496, 2496]),
    ("one long, many short", "flash_attn_3"): ([6, 6], [2496, 2496], [2496, 2496]),
    ("one long, many short", "flash_attn_4"): ([4, 4], [2496, 2496], [2496, 2496]),
    # To divide more passes, FlashAttention-2 would have to copy the rows of adjacent documents.
    ("pile, search", "torch_flash"): (
        [6, 6, 4, 4, 4, 4, 4, 2],
        [595, 1922, 1425, 982, 644, 681, 649, 480],
        [437, 412, 353, 362, 278, 319, 347, 260],
    ),
    ("pile, search", "flash_attn_3"): (
        [5, 6, 4, 4, 4, 4, 4, 2],
        [516, 1167, 889, 682, 461, 500, 509, 370],
        [437, 412, 353, 362, 278, 319, 347, 260],
    ),
    ("pile, search", "cudnn"): (
        [6, 8, 6, 6, 6, 4, 4, 2],
        [595, 464, 435, 482, 324, 681, 649, 480],
        [437, 412, 353, 362, 278, 319, 347, 260],
    ),
    ("pile, search", "flash_attn_4"): ([4, 6, 4, 4, 4, 4, 4, 2], *[[437, 412, 353, 362, 278, 319, 347, 260]] * 2),
    ("pile, per_doc", "cudnn"): (
        [14, 17, 17, 19, 19, 18, 18, 13],
        [2162, 2664, 2775, 2617, 2556, 2688, 2717, 1738],
        [1562, 1828, 1824, 1817, 1809, 1812, 1813, 1175],
    ),
}


@pytest.mark.parametrize("plan, kernel", BLOCKS, ids=map(", ".join, BLOCKS))
def test_calls_and_blocks_of_named_plans(plan, kernel):
    report = PLANS[plan]().report(kernel=kernel)
    assert (report["varlen_calls"], report["blocks_started"], report["blocks_useful"]) == BLOCKS[plan, kernel]


def test_calls_of_few_heads_are_divided_less():
    """199 documents of one block start 15 empty ones each: that is worth a call for 32 heads, but not for one."""
    plan = plan_documents([2048, *[128] * 199], 1)
    for query_heads, calls, started in ((1, 2, 2 * 16 * 200), (32, 4, 2 * (16 + 199))):
        report = plan.report(kernel="torch_flash", query_heads=query_heads)
        assert (report["varlen_calls"], report["blocks_started"]) == ([calls], [started])
        assert report["blocks_useful"] == [2 * (16 + 199)]


class Counting(EmulatedVarlen):
    """A varlen kernel that checks and counts its calls, and returns zeros."""

    def __init__(self, kernel):
        super().__init__()
        self.grids, self.counts = GRIDS[kernel], [0, 0, 0]

    def _count(self, sequences, backward):
        grid = self.grids[backward]
        cumulative = sequences.cu_seqlens_q if grid.axis == "queries" else sequences.cu_seqlens_k
        longest = sequences.max_seqlen_q if grid.axis == "queries" else sequences.max_seqlen_k
        useful = sum(-(-length // grid.tile) for length in cumulative.diff().tolist())
        started = (len(cumulative) - 1) * -(-longest // grid.tile) if grid.padded else useful
        self.counts = [total + more for total, more in zip(self.counts, (1, started, useful))]

    def _forward_call(self, query, key, value, sequences, options):
        self._check(query, key, value, sequences)
        self._count(sequences, backward=False)
        return torch.zeros_like(query), query.new_zeros(query.shape[1], query.shape[0])

    def _backward_call(self, inputs, sequences, options):
        self._check(*inputs[1:4], sequences)
        self._count(sequences, backward=True)
        return tuple(torch.zeros_like(tensor) for tensor in inputs[1:4])


class Ranks:
    """A group of so many ranks."""

    def __init__(self, ranks):
        self._ranks = ranks

    def size(self):
        return self._ranks


@pytest.mark.parametrize("kernel", ["torch_flash", "flash_attn_3", "flash_attn_4"])
@pytest.mark.parametrize(
    "plan, groups, window",
    [
        ("zigzag", None, None),
        ("one long, many short", None, None),
        ("one long, many short", None, 300),
        ("pile, search", [[1], [2, 3], [4, 5, 6, 7]], None),
        ("pile, per_doc", None, None),
    ],
)
def test_calls_and_blocks_are_those_of_a_varlen_kernel(plan, groups, window, kernel):
    plan = PLANS[plan]().with_offset_groups(groups)
    report = plan.report(window, kernel=kernel, query_heads=4)
    for rank in range(plan.cp_size):
        layout = RankPlan(plan, rank, Ranks(plan.cp_size)).layout_for(window)
        stages = [stage.rectangles for stage in layout.stages(torch.device("cpu"))]
        counting = Counting(kernel)
        for rectangles, causal in ((layout.local, True), *((each, window is not None) for each in stages)):
            if rectangles:
                queries, keys = rectangles[-1].q_stop, max(each.k_stop for each in rectangles)
                inputs = [torch.zeros(h, rows, 8) for h, rows in ((4, queries), (1, keys), (1, keys), (4, queries))]
                run_kernel(counting, inputs, rectangles, causal=causal, window=window if causal else None)
        counts = [report[name][rank] for name in ("varlen_calls", "blocks_started", "blocks_useful")]
        assert counting.counts == counts
        assert report["kernel_calls"][rank] <= counts[0]


def test_an_emulated_kernel_makes_the_calls_that_are_counted():
    """The same with real attention on a small plan."""
    plan = plan_documents([2048, *[16] * 64], 2, strategy="per_doc")
    report = plan.report(kernel="torch_flash", query_heads=2)
    for rank in range(2):
        layout = RankPlan(plan, rank, Ranks(2)).layout_for(None)
        kernel = EmulatedVarlen()
        (stage,) = layout.stages(torch.device("cpu"))
        for rectangles, causal in ((layout.local, True), (stage.rectangles, False)):
            run_kernel(kernel, kernel_inputs((2, 1, 8, 8), rectangles), rectangles, causal=causal)
        assert len(kernel.calls) == report["varlen_calls"][rank]


def test_unknown_kernels_and_no_heads_are_named():
    plan = plan_documents([64], 2)
    with pytest.raises(PlanError, match="There is no varlen kernel 'eager'. Choose one of torch_flash, "):
        plan.report(kernel="eager")
    with pytest.raises(PlanError, match="at least 1, got query_heads=0"):
        plan.report(kernel="cudnn", query_heads=0)
    assert "varlen_calls" not in plan.report()
