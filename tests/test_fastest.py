"""Plans for the least predicted time: never slower than other strategies, and priced together as each alone."""

import dataclasses
import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flashcp.data.lengths import sample_pack
from hf_flashcp.errors import UnmetCapWarning
from hf_flashcp.plan.kernel_calls import ROWS_PER_BLOCK, LengthClasses, length_classes
from hf_flashcp.plan.slices import Slice
from hf_flashcp.planning import STRATEGIES, CostModel, HardwareProfile, ShardPlan, plan_documents
from hf_flashcp.planning.caps import Caps
from hf_flashcp.planning.fastest import Contest, fastest
from hf_flashcp.planning.rivals import flashcp_floors, rivals
from hf_flashcp.planning.search.grouping import group_ranks
from hf_flashcp.planning.search.search import search
from hf_flashcp.predict.model_shape import LLAMA_3_8B, AttentionLayers
from tests.cost_models import H100, RECURRENT, cost_models
from tests.independent_plan_checker import check_plan
from tests.packs import packs
from tests.step_time_evaluator import cheapest_division, step_times


SLOW = dataclasses.replace(
    H100,
    intra_node=dataclasses.replace(H100.intra_node, bytes_per_second=4e9),
    inter_node=dataclasses.replace(H100.inter_node, bytes_per_second=1e9),
)
PROFILES = {"h100": H100, "slow": SLOW, "cpu": HardwareProfile.load("cpu")}
MIXED = (AttentionLayers(3, 8, 2, 64, 48, 20), AttentionLayers(2, 4, 4, 128, 128))


def small_model(profile, recurrent=None):
    return CostModel(profile, 1e6, MIXED, recurrent=recurrent)


def others(lengths, cp_size, caps):
    """Return the plans of all other strategies that keep to the caps."""
    found = {}
    for strategy, rotate in [*itertools.product(STRATEGIES, [False]), ("per_doc", True)]:
        plan = plan_documents(lengths, cp_size, strategy=strategy, rotate_ranks=rotate, **caps_of(strategy, caps))
        if strategy != "search" and Caps(plan.lengths, cp_size, *caps).allow(plan.slices):
            found[strategy, rotate] = plan
    return found


def caps_of(strategy, caps):
    names = ("max_imbalance", "max_token_imbalance")
    return dict(zip(names, caps)) if strategy in ("flashcp", "search") else {}


@settings(max_examples=60)
@given(
    packs(max_documents=12, max_length=3000),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([*PROFILES]),
    st.sampled_from([(1.05, 1.0), (1.0, 1.0), (1.3, 1.1)]),
)
@pytest.mark.filterwarnings("ignore::hf_flashcp.errors.UnmetCapWarning")
def test_no_other_strategy_within_the_caps_is_faster(case, cp_size, ranks_per_node, profile, caps):
    lengths, least = case
    cp_size = min(cp_size, sum(lengths), max(cp_size, least))
    model = small_model(dataclasses.replace(PROFILES[profile], ranks_per_node=ranks_per_node))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = plan_documents(lengths, cp_size, cost_model=model, **caps_of("search", caps))
    check_plan(lengths, cp_size, plan.slices)
    limits = Caps(plan.lengths, cp_size, *caps)
    within = limits.allow(plan.slices)
    assert within != any(isinstance(each.message, UnmetCapWarning) for each in caught)
    assert max(plan.report()["tokens"]) <= limits.most_tokens
    rivals = others(lengths, cp_size, caps)
    assert within or not rivals
    seconds = model.step_time(plan).seconds
    for name, rival in rivals.items():
        assert seconds <= model.step_time(rival).seconds * (1 + 1e-9), name


@settings(max_examples=60)
@given(packs(max_length=100), st.sampled_from([2, 3, 4, 6]), cost_models, st.sampled_from([(1.05, 1.0), (2.0, 1.5)]))
def test_no_other_strategy_is_faster_where_tiles_are_counted_one_by_one(case, cp_size, model, caps):
    """On any hardware, by an independent evaluator. Planning again gives the same plan."""
    lengths = (*case[0], cp_size)
    plan = plan_documents(lengths, cp_size, cost_model=model, **caps_of("search", caps))
    assert plan == fastest(Caps(lengths, cp_size, *caps), model)
    if model.recurrent is None:
        seconds = step_times(plan, model)[1].max()
        assert seconds == pytest.approx(model.step_time(plan).seconds, rel=1e-9)
        for name, rival in others(lengths, cp_size, caps).items():
            assert seconds <= step_times(rival, model)[1].max() * (1 + 1e-9), name


@pytest.mark.parametrize("corpus", ["pile", "prolong64k", "wlb_llm"])
@pytest.mark.parametrize("cp_size, ranks_per_node", [(8, 8), (16, 4), (12, 8), (6, 1)])
def test_plans_of_corpora(corpus, cp_size, ranks_per_node):
    """They are made again exactly, and no other strategy is faster. `num_stages` is obeyed."""
    profile = dataclasses.replace(H100, ranks_per_node=ranks_per_node)
    model, lengths = CostModel.from_config(LLAMA_3_8B, profile), sample_pack(corpus, 65536, seed=cp_size)
    plan = plan_documents(lengths, cp_size, cost_model=model)
    again = fastest(Caps(tuple(lengths), cp_size), model)  # plan_documents remembers its plans
    assert plan == again and plan.ranks_per_node in (None, ranks_per_node)
    seconds = model.step_time(plan).seconds
    for name, rival in others(lengths, cp_size, (1.05, 1.0)).items():
        for exchanged in {rival, rival.with_ranks_per_node(ranks_per_node if cp_size % ranks_per_node == 0 else None)}:
            assert seconds <= model.step_time(exchanged).seconds * (1 + 1e-9), name
    for stages in (1, 3, 99):
        staged = plan_documents(lengths, cp_size, cost_model=model, num_stages=stages)
        assert len(staged.stage_offsets) == min(stages, cp_size - 1)


@pytest.mark.parametrize(
    "lengths, cp_size",
    [([8192], 8), ([8192], 3), ([1024] * 16, 8), ([1] * 8, 8), ([1] * 40, 8), ([5000, 1, 1], 4), ([7], 7), ([9], 1)],
)
@pytest.mark.filterwarnings("ignore::hf_flashcp.errors.UnmetCapWarning")
def test_unusual_batches(lengths, cp_size):
    for profile in PROFILES.values():
        plan = plan_documents(lengths, cp_size, cost_model=CostModel.from_config(LLAMA_3_8B, profile))
        counts = check_plan(lengths, cp_size, plan.slices)
        assert max(counts["tokens"]) - min(counts["tokens"]) <= 1


def test_batches_of_many_documents_on_many_ranks():
    """Efforts fall with the size of a batch, but not below a plan within the caps."""
    for cp_size, window in ((64, 2**18), (256, 2**20)):
        lengths = sample_pack("pile", window, seed=1)
        model = CostModel.from_config(LLAMA_3_8B, H100)
        plan = plan_documents(lengths, cp_size, cost_model=model)
        assert Caps(plan.lengths, cp_size).allow(plan.slices)
        flashcp = plan_documents(lengths, cp_size, strategy="flashcp")
        assert model.step_time(plan).seconds <= model.step_time(flashcp).seconds


@settings(max_examples=80)
@given(packs(max_length=80), st.sampled_from([2, 3, 4, 6]), cost_models, st.integers(0, 2**30), st.booleans())
def test_joined_plans_take_as_long_as_each_alone(case, cp_size, model, seed, hybrid):
    """Plans of the same documents, of which each has its own slices, stages and nodes."""
    lengths, rng = [*case[0], cp_size], np.random.default_rng(seed)
    model = dataclasses.replace(model, recurrent=RECURRENT if hybrid else None)
    joined = []
    for strategy in rng.choice(STRATEGIES, 5):
        plan = plan_documents(lengths, cp_size, strategy=str(strategy))
        plan = ShardPlan(lengths, cp_size, [plan.slices[rank] for rank in rng.permutation(cp_size)])
        cuts = np.sort(rng.integers(1, cp_size, rng.integers(0, 3)))
        groups = [part.tolist() for part in np.split(rng.permutation(np.arange(1, cp_size)), cuts) if len(part)]
        plan = plan.with_offset_groups(groups if len(groups) > 1 else None)
        joined.append(plan.with_ranks_per_node(2 if cp_size in (4, 6) and rng.integers(2) else None))
    for found, each in zip(model.step_times(joined), joined):
        alone = model.step_time(each)
        for name, values in vars(alone).items():
            assert getattr(found, name) == pytest.approx(values, rel=1e-12, abs=1e-18), name


@given(packs(max_documents=8, max_length=4000), st.integers(2, 8))
@pytest.mark.filterwarnings("ignore::hf_flashcp.errors.UnmetCapWarning")
def test_strategies_that_are_left_out_are_slower(case, cp_size):
    """The floors of "flashcp" and "per_doc" are below their predicted times."""
    lengths, least = case
    cp_size = min(cp_size, sum(lengths), max(cp_size, least))
    for profile in PROFILES.values():
        model, caps = CostModel.from_config(LLAMA_3_8B, profile), Caps(tuple(lengths), cp_size)
        floors = flashcp_floors(caps, model)
        per_doc = plan_documents(lengths, cp_size, strategy="per_doc")
        flashcp = plan_documents(lengths, cp_size, strategy="flashcp")
        assert floors[-1] <= model.step_time(per_doc).seconds
        assert floors.min() <= model.step_time(flashcp).seconds
    assert floors[-1] > 0.3 * model.step_time(per_doc).seconds


@settings(max_examples=60)
@given(packs(max_documents=8, max_length=300), st.sampled_from([2, 3, 4]), cost_models)
def test_rivals_that_are_left_out_are_slower(case, cp_size, model):
    """On any hardware, also if the limit is the time of one of the plans."""
    lengths, limits = (*case[0], cp_size), (1.3, 1.2)
    plans = {plan.digest: plan for plan in others(lengths, cp_size, limits).values()}
    seconds = {digest: model.step_time(plan).seconds for digest, plan in plans.items()}
    for limit in seconds.values():
        left = compared(Caps(lengths, cp_size, *limits), model, limit * (1 + 1e-9))
        left = {plan.digest for plan in map(as_plan(lengths, cp_size), left)}
        assert all(seconds[digest] > limit for digest in seconds.keys() - left)


def as_plan(lengths, cp_size):
    """Return a function that makes a plan from slices or their columns."""
    return lambda found: ShardPlan(lengths, cp_size, found if isinstance(found, list) else found.slices())


def test_rivals_are_the_plans_of_all_other_strategies():
    lengths, model = tuple(sample_pack("pile", 32768, seed=2)), CostModel.from_config(LLAMA_3_8B, H100)
    caps = Caps(lengths, 4, 8.0, 8.0)
    wanted = others(lengths, 4, (8.0, 8.0))
    found = list(map(as_plan(lengths, 4), compared(caps, model)))
    assert {plan.digest for plan in found} == {plan.digest for plan in wanted.values()} and len(wanted) == 5
    assert compared(caps, model, 0.0) == compared(caps, model, 0.0, False) == compared(caps, model)[-2:]
    assert len(compared(caps, model, math.inf, False)) == len(found) - 1


def compared(caps, model, seconds=math.inf, with_flashcp=True):
    return list(rivals(caps, model, seconds, with_flashcp))


def test_plans_beyond_the_cap_on_tokens_are_not_compared():
    lengths, model = (900, 50, 50), CostModel.from_config(LLAMA_3_8B, H100)
    contest = Contest(Caps(lengths, 2, 2.0), model)
    contest.enter([[[Slice(0, 0, 900)], [Slice(1, 0, 50), Slice(2, 0, 50)]]])
    assert not contest.found
    contest.enter([[[Slice(0, 0, 500)], [Slice(0, 500, 900), Slice(1, 0, 50), Slice(2, 0, 50)]]])
    assert [timed.beyond for timed in contest.found] == [0]


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(0, 5000), st.integers(0, 2)), min_size=1, max_size=12))
def test_calls_are_divided_as_well_as_possible(sequences):
    """The division is the one that is found by trying all divisions into consecutive classes."""
    blocks, rows, passes = np.array(sequences).T
    for heads in (1, 32):
        divided = LengthClasses(blocks, rows, passes, 3).divided(heads)
        for number in range(3):
            mine = passes == number
            found = divided.calls[number], divided.started[number] - blocks[mine].sum()
            if not mine.any():
                assert found == (0, 0)
                continue
            calls, empty = cheapest_division(list(zip(blocks[mine].tolist(), rows[mine].tolist())), heads)
            copied = divided.copied[number] / ROWS_PER_BLOCK
            assert found[0] == calls and found[1] + copied == pytest.approx(empty)
            last = divided.last_class[number][np.unique(length_classes(blocks[mine]))]
            assert len(set(last.tolist())) == calls


@given(st.integers(0, 2**30), st.sampled_from([(2, 2), (4, 2), (8, 2), (8, 4), (12, 3)]))
def test_ranks_are_grouped_by_what_they_share(seed, sizes):
    ranks, size = sizes
    rng = np.random.default_rng(seed)
    block = np.kron(np.eye(ranks // size), np.ones((size, size))) * rng.integers(1, 100, (ranks, ranks))
    np.fill_diagonal(block, 0)
    hidden = rng.permutation(ranks)
    order = group_ranks(block[hidden][:, hidden].astype(float), size)
    assert sorted(order.tolist()) == list(range(ranks))
    node = hidden[order] // size
    assert all(len(set(node[start : start + size])) == 1 for start in range(0, ranks, size))


@pytest.mark.parametrize("ranks, size, seed", [(8, 4, 121), (8, 4, 230), (8, 2, 0), (12, 3, 1), (16, 4, 2), (4, 4, 3)])
def test_grouped_ranks_share_no_less_than_as_they_came(ranks, size, seed):
    """With the first two seeds, filling nodes and changing places does not find the order that was given."""
    traffic = np.ceil(np.exp(np.random.default_rng(seed).normal(0, 3, (ranks, ranks))))
    np.fill_diagonal(traffic, 0)
    order = group_ranks(traffic, size)
    assert sorted(order.tolist()) == list(range(ranks))
    assert between_nodes(traffic, order, size) <= between_nodes(traffic, np.arange(ranks), size)


def between_nodes(traffic, order, size):
    node = np.argsort(order) // size
    return traffic[node[:, None] != node].sum()


@pytest.mark.parametrize("corpus, cp_size", [("pile", 8), ("prolong64k", 4), ("prolong64k", 8)])
def test_flashcp_is_compared_where_cutting_all_documents_is_slow(corpus, cp_size):
    """Its plan is compared up to its own time, though "per_doc" certainly takes longer."""
    lengths, model = tuple(sample_pack(corpus, 32768, seed=1)), CostModel.from_config(LLAMA_3_8B, H100)
    caps, plan = Caps(lengths, cp_size), plan_documents(lengths, cp_size, strategy="flashcp")
    seconds = model.step_time(plan).seconds
    assert caps.allow(plan.slices) and seconds < flashcp_floors(caps, model)[-1]
    assert plan in map(as_plan(lengths, cp_size), compared(caps, model, seconds))


def test_plans_with_the_least_kv_are_tried_where_ranks_wait_long(monkeypatch):
    profile = dataclasses.replace(H100, ranks_per_node=1)
    model, caps = CostModel.from_config(LLAMA_3_8B, profile), Caps(tuple(sample_pack("prolong64k", 65536, seed=1)), 16)
    seconds = model.step_time(fastest(caps, model)).seconds
    monkeypatch.setattr(Contest, "lightest_plans", lambda contest: [])
    assert seconds < model.step_time(fastest(caps, model)).seconds


def test_without_a_construction_the_plan_is_that_of_search(monkeypatch):
    model, caps = CostModel.from_config(LLAMA_3_8B, H100), Caps(tuple(sample_pack("pile", 2**18, seed=1)), 64)
    monkeypatch.setattr(Contest, "tight_plans", lambda contest: [])
    plan = fastest(caps, model)
    assert caps.allow(plan.slices)
    assert model.step_time(plan).seconds <= model.step_time(ShardPlan(caps.lengths, 64, search(caps))).seconds


@pytest.mark.parametrize("lengths, cp_size", [((783,), 8), ((2443,), 4), ((256, 2248, 58), 3), ((984, 1974), 4)])
def test_beyond_the_cap_the_plan_has_the_fewest_pairs_on_its_fullest_rank(lengths, cp_size, monkeypatch):
    """No plan meets the cap of 1, and over a slow link plans with more pairs on one rank are faster."""
    link = dataclasses.replace(H100.intra_node, bytes_per_second=4e9)
    model, caps = (
        CostModel.from_config(LLAMA_3_8B, dataclasses.replace(H100, intra_node=link)),
        Caps(lengths, cp_size, 1.0),
    )
    price, priced = Contest._timed, []
    monkeypatch.setattr(Contest, "_timed", lambda *given: priced.extend(found := price(*given)) or found)
    plan = fastest(caps, model)
    fewest = min(timed.beyond for timed in priced)
    assert max(plan.report()["pairs"]) == caps.most_pairs + fewest > caps.most_pairs
    assert min(priced, key=lambda timed: timed.seconds).beyond > fewest
