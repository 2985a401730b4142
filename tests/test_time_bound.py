"""The lower bound of predicted step times holds for every plan within the caps, and is close to the best of them."""

import dataclasses
from statistics import geometric_mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flashcp.data.lengths import sample_pack
from hf_flashcp.plan.slices import attention_pairs
from hf_flashcp.planning import STRATEGIES, CostModel, ShardPlan, plan_documents
from hf_flashcp.planning.time_bound import step_time_bound
from hf_flashcp.predict.hardware_profile import Link, Pass
from hf_flashcp.predict.model_shape import LLAMA_3_8B, AttentionLayers
from tests.cost_models import H100, RECURRENT, cost_models
from tests.packs import arbitrary_plans, packs
from tests.step_time_evaluator import step_times
from tests.test_fastest import MIXED, PROFILES


@settings(max_examples=150)
@given(arbitrary_plans(), st.sampled_from([*PROFILES]), st.sampled_from([1, 2, 3, 8]), st.booleans(), st.booleans())
def test_no_plan_is_predicted_to_be_faster(plan, profile, ranks_per_node, hybrid, hierarchical):
    """The caps are those that the plan keeps. Times are also those of the independent evaluator."""
    hardware = dataclasses.replace(PROFILES[profile], ranks_per_node=ranks_per_node)
    model = CostModel(hardware, 1e6, MIXED, recurrent=RECURRENT if hybrid else None)
    if hierarchical and plan.cp_size % ranks_per_node == 0:
        plan = plan.with_ranks_per_node(ranks_per_node)
    report = plan.report()
    bound = step_time_bound(plan.lengths, plan.cp_size, model, report["pair_imbalance"], report["token_imbalance"])
    assert bound.seconds <= model.step_time(plan).seconds * (1 + 1e-12)
    if not hybrid:
        assert bound.seconds <= step_times(plan, model)[1].max() * (1 + 1e-12)


@settings(max_examples=250)
@given(st.data(), cost_models, st.sampled_from(["arbitrary", "timed", *STRATEGIES]), st.booleans())
def test_the_bound_holds_for_any_hardware(data, model, strategy, hierarchical):
    """Tiles are so small that documents have many, and a part of the bound or another decides."""
    cp_size = data.draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    if strategy == "arbitrary":
        plan = data.draw(arbitrary_plans(cp_size))
    else:
        lengths, _ = data.draw(packs(cp_size, max_length=120))
        options = {"cost_model": model} if strategy == "timed" else {"strategy": strategy}
        plan = plan_documents(lengths, cp_size, **options)
    size = model.hardware.ranks_per_node
    if hierarchical and strategy != "timed":
        plan = plan.with_ranks_per_node(size if 1 < size < cp_size and cp_size % size == 0 else None)
    report = plan.report()
    bound = step_time_bound(plan.lengths, cp_size, model, report["pair_imbalance"], report["token_imbalance"])
    assert 0 < bound.seconds <= model.step_time(plan).seconds * (1 + 1e-12)
    assert bound.seconds * (1 + 1e-12) >= step_time_bound(plan.lengths, cp_size, model, 99, 99).seconds
    if model.recurrent is None:
        assert bound.seconds <= step_times(plan, model)[1].max() * (1 + 1e-12)


@pytest.mark.parametrize("corpus", ["pile", "prolong64k", "magi_real", "wlb_llm"])
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("cp_size, ranks_per_node", [(8, 8), (16, 4), (4, 1)])
def test_no_strategy_is_predicted_to_be_faster(corpus, profile, cp_size, ranks_per_node):
    hardware = dataclasses.replace(PROFILES[profile], ranks_per_node=ranks_per_node)
    model, lengths = CostModel.from_config(LLAMA_3_8B, hardware), sample_pack(corpus, 65536, seed=2)
    plans = [plan_documents(lengths, cp_size, strategy=strategy) for strategy in STRATEGIES]
    for plan in [*plans, plan_documents(lengths, cp_size, cost_model=model)]:
        report = plan.report()
        caps = max(report["pair_imbalance"], 1.0), max(report["token_imbalance"], 1.0)
        for exchanged in {plan, plan.with_ranks_per_node(ranks_per_node)}:
            bound = step_time_bound(lengths, cp_size, model, *caps)
            assert bound.seconds <= model.step_time(exchanged).seconds


def test_plans_are_close_to_the_bound():
    model, found = CostModel.from_config(LLAMA_3_8B, H100), []
    for corpus in ("pile", "prolong64k", "prolong512k", "magi_real", "wlb_llm"):
        lengths = sample_pack(corpus, 131072, seed=0)
        plan = plan_documents(lengths, 8, cost_model=model)
        found.append(model.step_time(plan).seconds / step_time_bound(lengths, 8, model).seconds)
    assert geometric_mean(found) < 1.03 and max(found) < 1.035


def test_a_document_on_one_rank_takes_its_tiles():
    """One device computes a causal square, whose tiles are counted one by one."""
    layers = AttentionLayers(2, 32, 2, 64, 64)  # enough heads that the longest tile does not decide
    model = CostModel(H100, 1e6, (layers,))
    bound = step_time_bound([4096], 1, model)
    kernel, seconds = H100.kernel, 0.0
    for speed, flops in ((kernel.forward, 2 * 128), (kernel.backward, 2 * (3 * 64 + 2 * 64))):
        keys = sum(128 * tile + speed.tile_overhead_keys for tile in range(1, 33))
        seconds += 2 * (
            32 * 128 * flops * keys / speed.flops_per_second / kernel.causal_efficiency + kernel.call_seconds
        )
    assert bound.attention == pytest.approx(seconds)
    assert bound.linear == pytest.approx(3 * 4096 * 1e6 / H100.linear_flops_per_second)
    assert bound.copies == bound.links == 0 and bound.seconds == pytest.approx(bound.linear + bound.attention)
    assert bound.seconds == pytest.approx(model.step_time(plan_documents([4096], 1)).seconds, rel=1e-9)


def test_a_document_that_no_rank_can_hold_moves_its_keys():
    """One document on two ranks of two nodes: half of it crosses, or more, and links decide if they are slow."""
    layers = AttentionLayers(1, 4, 2, 64, 64)
    slow = dataclasses.replace(H100.inter_node, bytes_per_second=1e6)
    model = CostModel(dataclasses.replace(H100, inter_node=slow, ranks_per_node=1), 0.0, (layers,))
    bound, plan = step_time_bound([8192], 2, model), plan_documents([8192], 2, cost_model=model)
    received = plan.report()["kv_total"]
    assert bound.links <= received / 2 * 2 * 128 * 2 * 2 / 1e6  # the mean of two ranks, forward and backward
    assert bound.links > 0.9 * received / 2 * 2 * 128 * 2 * 2 / 1e6
    assert bound.seconds == pytest.approx(bound.links)
    one_node = dataclasses.replace(model, hardware=dataclasses.replace(model.hardware, ranks_per_node=2))
    assert step_time_bound([8192], 2, one_node).links < bound.links / 1000


def test_windows_take_their_pairs():
    layers = AttentionLayers(1, 4, 2, 64, 64, 512)
    model = CostModel(H100, 0.0, (layers,))
    bound = step_time_bound([8192, 300], 2, model)
    pairs = sum(attention_pairs(0, length, 512) for length in (8192, 300))
    least = sum(
        4 * flops * (pairs + 8492 * speed.tile_overhead_keys) / speed.flops_per_second / 0.91 / 2 + 1e-5
        for speed, flops in ((H100.kernel.forward, 256), (H100.kernel.backward, 640))
    )
    assert bound.seconds == pytest.approx(least) and bound.links == 0


def test_profiles_with_fast_masks():
    """A kernel that is not slower under a mask gains nothing from cuts."""
    kernel = dataclasses.replace(H100.kernel, causal_efficiency=1.0)
    model = CostModel.from_config(LLAMA_3_8B, dataclasses.replace(H100, kernel=kernel))
    lengths = sample_pack("pile", 32768, seed=0)
    bound = step_time_bound(lengths, 4, model)
    assert 0.95 < bound.seconds / model.step_time(plan_documents(lengths, 4, cost_model=model)).seconds <= 1


def idle(**changes):
    """Return hardware on which only what is changed takes time."""
    fast = dataclasses.replace(H100.kernel.forward, flops_per_second=1e18, tile_overhead_keys=0)
    kernel = dataclasses.replace(H100.kernel, tile=1, units=1, call_seconds=0.0, block_seconds=0.0)
    kernel = dataclasses.replace(kernel, causal_efficiency=1.0, forward=fast, backward=fast)
    speeds = {"linear_flops_per_second": 1e18, "memory_bytes_per_second": 1e18}
    links = {"intra_node": Link(1e18, 0.0), "inter_node": Link(1e18, 0.0)}
    of_kernel = {name: changes.pop(name) for name in [*changes] if name in vars(kernel)}
    kernel = dataclasses.replace(kernel, **of_kernel)
    return dataclasses.replace(H100, **speeds | links | {"kernel": kernel} | changes)


MERGES, KV = AttentionLayers(1, 64, 1, 16, 16), AttentionLayers(1, 2, 2, 64, 64)
SLOW_LINK, SLOW = Link(1e9, 0.0), Pass(1e12, 0)


@pytest.mark.parametrize(
    "layers, cp_size, ranks_per_node, changes, least",
    [
        (MERGES, 4, 8, {"memory_bytes_per_second": 1e9}, 0.74),
        (KV, 4, 8, {"memory_bytes_per_second": 1e9}, 0.71),
        (KV, 4, 8, {"intra_node": SLOW_LINK}, 0.71),
        (KV, 8, 4, {"intra_node": SLOW_LINK, "inter_node": SLOW_LINK}, 0.61),
        (KV, 8, 4, {"inter_node": SLOW_LINK}, 0.72),
        (KV, 4, 1, {"inter_node": SLOW_LINK}, 0.71),
        (KV, 4, 8, {"forward": SLOW, "backward": SLOW}, 0.99),
        (KV, 4, 8, {"forward": SLOW, "backward": SLOW, "causal_efficiency": 0.3}, 0.99),
        (KV, 4, 8, {"forward": Pass(1e12, 5000), "backward": Pass(1e12, 5000)}, 0.91),
        (KV, 4, 8, {"call_seconds": 1e-3}, 0.49),
    ],
    ids="merges copies inside both between alone pairs masks tiles launches".split(),
)
def test_the_bound_is_close_whatever_decides(layers, cp_size, ranks_per_node, changes, least):
    """A document is cut evenly, and almost all of a step's time is of one kind."""
    hardware = idle(ranks_per_node=ranks_per_node, **changes)
    model = CostModel(hardware, 0.0, (layers,), itemsize=2, grad_itemsize=4)
    plan = plan_documents([9600], cp_size, cost_model=model)
    assert least < step_time_bound([9600], cp_size, model).seconds / model.step_time(plan).seconds <= 1
    cut = plan_documents([9600], cp_size, strategy="per_doc")
    assert step_time_bound([9600], cp_size, model).seconds <= model.step_time(cut).seconds * (1 + 1e-12)


def test_recurrent_layers_on_one_rank_take_their_scans():
    model = CostModel(idle(forward=Pass(1e12, 0), backward=Pass(2e12, 0), call_seconds=1e-3), 1e3, (), 2, 2, RECURRENT)
    time, bound = model.step_time(plan_documents([9600], 1)), step_time_bound([9600], 1, model)
    assert time.scan[0] > 0.9 * time.seconds
    assert bound.seconds == bound.linear == pytest.approx(time.seconds)


def test_nodes_may_hold_the_ranks_with_a_token_more():
    """Two nodes hold a document between them, and one token more per rank than the third. Half of it crosses."""
    slow = dataclasses.replace(H100.inter_node, bytes_per_second=1e6)
    model = CostModel(
        dataclasses.replace(H100, inter_node=slow, ranks_per_node=2), 0.0, (AttentionLayers(1, 4, 2, 64, 64),)
    )
    starts, lengths = range(0, 404, 101), (404, 200)
    slices = [[(0, start, start + 101)] for start in starts] + [[(1, 0, 100)], [(1, 100, 200)]]
    plan = ShardPlan(lengths, 6, slices, ranks_per_node=2)
    assert max(plan.report()["tokens"]) - min(plan.report()["tokens"]) == 1
    bound = step_time_bound(lengths, 6, model, max_imbalance=6.0)
    bytes_of_half = 202 * 2 * 128 * 2 * 2  # forward and backward
    assert bound.links == pytest.approx(bytes_of_half / 6 / 1e6) and bound.seconds <= model.step_time(plan).seconds
