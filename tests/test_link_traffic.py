"""Traffic by link in closed form is that which counts every two ranks, for one plan and for several joined plans."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flashcp.plan import ShardPlan, link_traffic
from hf_flashcp.plan.contracted import contracted
from hf_flashcp.plan.hierarchical_traffic import hierarchical_traffic
from hf_flashcp.plan.link_traffic import (
    CutSlices,
    Nodes,
    entry_links,
    full_links,
    rank_traffic,
    staged_entries,
    window_entries,
)
from hf_flashcp.plan.traffic import by_link, traffic_matrix
from hf_flashcp.planning import STRATEGIES, plan_documents
from hf_flashcp.predict.joined_plans import JoinedPlans
from tests.packs import arbitrary_plans


def counted(plan, size, hierarchical, window=None, offsets=None, slices=None):
    """Return the links of one plan from matrices with an entry per pair of ranks."""
    slices, cp_size = slices or plan.slices, plan.cp_size
    second = np.zeros((cp_size, cp_size), dtype=np.int64)
    if hierarchical:
        first, second = hierarchical_traffic(slices, size, window, offsets)
    else:
        first = traffic_matrix(slices, window)
        if offsets is not None:
            offset = (np.arange(cp_size) - np.arange(cp_size)[:, None]) % cp_size
            first = first * np.isin(offset, offsets)
    return *by_link(first, size), np.array([second.sum(0), second.sum(1)])


def together(links):
    """Return the links of several plans as those of joined plans."""
    return [np.concatenate(parts, axis=1).tolist() for parts in zip(*links)]


def as_lists(links):
    return [part.tolist() for part in links]


@st.composite
def joined_plans(draw):
    """Draw one to three plans of the same documents, and the number of ranks on a node."""
    plan = draw(arbitrary_plans(draw(st.sampled_from([1, 2, 3, 4, 6, 8]))))
    seeds = draw(st.lists(st.integers(0, 99), max_size=2))
    orders = [np.random.default_rng(seed).permutation(plan.cp_size) for seed in seeds]
    cut = [plan, plan_documents(plan.lengths, plan.cp_size, strategy=draw(st.sampled_from(STRATEGIES)))]
    others = [
        ShardPlan(plan.lengths, plan.cp_size, [base.slices[rank] for rank in order])
        for base, order in zip(cut, orders)
    ]
    return [plan, *others], draw(st.sampled_from([1, 2, 3, 4, 8]))


def exchanges(plans, size):
    """Return whether an exchange is hierarchical, for each that these plans can have."""
    return (False, True) if plans[0].cp_size % size == 0 and size < plans[0].cp_size else (False,)


@given(joined_plans())
def test_links_of_a_single_stage(case):
    plans, size = case
    joined = JoinedPlans(plans)
    nodes = Nodes(joined.cp_size, joined.ranks_of_each, size)
    for hierarchical in exchanges(plans, size):
        found = full_links(joined.cut_slices, nodes, hierarchical)
        assert as_lists(found) == together([counted(plan, size, hierarchical) for plan in plans])


@given(joined_plans(), st.booleans())
def test_links_of_states(case, backwards):
    plans, size = case
    joined = JoinedPlans(plans)
    nodes = Nodes(joined.cp_size, joined.ranks_of_each, size)
    states = [contracted(plan.slices, backwards=backwards).slices for plan in plans]
    for hierarchical in exchanges(plans, size):
        found = full_links(joined.cut_slices.contracted(backwards), nodes, hierarchical)
        each = [counted(plan, size, hierarchical, slices=slices) for plan, slices in zip(plans, states)]
        assert as_lists(found) == together(each)


@given(joined_plans(), st.integers(1, 30))
def test_links_of_windows(case, window):
    plans, size = case
    joined = JoinedPlans(plans)
    nodes = Nodes(joined.cp_size, joined.ranks_of_each, size)
    for hierarchical in exchanges(plans, size):
        found = entry_links(window_entries(joined.slice_table, window), 1, nodes, hierarchical)[0]
        assert as_lists(found) == together([counted(plan, size, hierarchical, window) for plan in plans])


@settings(max_examples=80)
@given(joined_plans(), st.data())
def test_links_of_stages(case, data):
    """Each plan has stages of its own. Slices are also paired in several parts."""
    plans, size = case
    joined, cp_size = JoinedPlans(plans), plans[0].cp_size
    nodes = Nodes(joined.cp_size, cp_size, size)
    stage_of = np.array([data.draw(st.lists(st.integers(0, 2), min_size=cp_size, max_size=cp_size)) for _ in plans])
    stages = int(stage_of.max()) + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(link_traffic, "MOST_PAIRS", data.draw(st.sampled_from([1, 7, 1 << 22])))
        staged = staged_entries(joined.cut_slices, stage_of)
    for hierarchical in exchanges(plans, size):
        found = entry_links(staged.entries, stages, nodes, hierarchical)
        for stage in range(stages):
            each = [
                counted(plan, size, hierarchical, offsets=[o for o in range(1, cp_size) if of_plan[o] == stage])
                for plan, of_plan in zip(plans, stage_of)
            ]
            assert as_lists(found[stage]) == together(each)
    cut = joined.cut_slices
    for slice_, (document, rank, _) in enumerate(zip(*cut)):  # keys before the slice on other ranks
        before = (cut.documents[:slice_] == document) & (cut.ranks[:slice_] != rank)
        assert staged.keys[slice_].sum() == cut.tokens[:slice_][before].sum()


@given(joined_plans())
def test_traffic_between_every_two_ranks(case):
    plans, _ = case
    joined = JoinedPlans(plans)
    found = rank_traffic(joined.cut_slices, joined.ranks_of_each, len(plans))
    assert found.tolist() == [traffic_matrix(plan.slices).tolist() for plan in plans]


def test_documents_that_are_not_cut_move_nothing():
    plan = ShardPlan([4, 4], 2, [[(0, 0, 4)], [(1, 0, 4)]])
    assert not len(CutSlices.of(plan.slice_table).tokens)
    for hierarchical in (False, True):
        links = full_links(CutSlices.of(plan.slice_table), Nodes(2, 2, 1), hierarchical)
        assert not any(part.any() for part in links)
