"""Slices held as arrays: they equal plain loops over tuples."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_flashcp.errors import PlanError
from hf_flashcp.plan.partition import is_partition, require_partition
from hf_flashcp.plan.slice_table import SliceColumns, SliceTable
from hf_flashcp.planning import ShardPlan
from tests.packs import arbitrary_plans


pytestmark = pytest.mark.smoke

numbers = st.integers(-1, 6)
ranks_of_slices = st.lists(st.lists(st.tuples(numbers, numbers, numbers), max_size=6), max_size=4)


def joined(pieces):
    """Sort the slices of a rank, and join adjacent ones of a document."""
    found = []
    for document, start, stop in sorted(pieces):
        if found and found[-1][0] == document and found[-1][2] == start:
            start = found.pop()[1]
        found.append((document, start, stop))
    return found


def shuffled(plan, random):
    """Return the slices of a plan in any order, some of them cut in two."""
    slices = []
    for held in plan.slices:
        pieces = []
        for document, start, stop in held:
            cut = random.randint(start, stop)
            pieces += [(document, *edges) for edges in ((start, cut), (cut, stop)) if edges[0] < edges[1]]
        random.shuffle(pieces)
        slices.append(pieces)
    return slices


@given(ranks_of_slices)
def test_slices_are_sorted_and_joined_like_tuples(slices):
    columns = SliceColumns.of(slices).maximal()
    assert columns.slices() == list(map(joined, slices))
    assert columns.nested() == [list(map(list, joined(held))) for held in slices]
    assert columns.ranks.tolist() == [rank for rank, held in enumerate(slices) for _ in joined(held)]
    assert all(column.dtype == np.int64 for column in columns)
    assert columns.maximal().same(columns)
    assert columns.sums(columns.tokens).tolist() == [sum(b - a for _, a, b in joined(held)) for held in slices]


@given(ranks_of_slices, st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 4))
def test_the_check_finds_what_the_loop_names(slices, lengths, cp_size):
    columns = SliceColumns.of(slices).maximal()
    try:
        require_partition(columns.slices(), lengths, cp_size)
    except PlanError:
        assert not is_partition(columns, lengths, cp_size)
    else:
        assert is_partition(columns, lengths, cp_size)


@given(arbitrary_plans(), st.randoms(use_true_random=False))
def test_plans_of_the_same_slices_are_equal(plan, random):
    slices = shuffled(plan, random)
    columns = SliceColumns.of(slices)
    for again in (
        ShardPlan(plan.lengths, plan.cp_size, slices, plan.offset_groups, plan.ranks_per_node),
        ShardPlan.from_columns(plan.lengths, plan.cp_size, columns, plan.offset_groups, plan.ranks_per_node),
        pickle.loads(pickle.dumps(plan)),
        copy.copy(plan),
    ):
        assert again.validate() == plan and hash(again) == hash(plan) and again.digest == plan.digest
        assert again.slices == plan.slices and again.to_dict() == plan.to_dict()
    assert plan.with_offset_groups(plan.offset_groups) == plan


@given(arbitrary_plans(), st.data())
def test_a_plan_with_a_wrong_number_is_refused_and_differs(plan, data):
    columns = [column.copy() for column in plan.columns]
    column = columns[data.draw(st.integers(1, 3))]
    column[data.draw(st.integers(0, len(column) - 1))] += data.draw(st.sampled_from([-1, 1, 2**40]))
    changed = ShardPlan.from_columns(plan.lengths, plan.cp_size, SliceColumns(*columns))
    assert changed != plan
    with pytest.raises(PlanError):
        changed.validate()


def test_tables_number_tokens_along_one_line():
    table = SliceTable.of([[(0, 0, 4), (2, 1, 3)], [(0, 4, 5), (2, 0, 1)]])
    assert table.ranks.tolist() == [0, 0, 1, 1]
    assert table.bases.tolist() == [0, 10, 0, 10]
    assert table.spans.starts.tolist() == [0, 11, 4, 10] and table.spans.stops.tolist() == [4, 13, 5, 11]
    assert table.rows.tolist() == [0, 4, 0, 1]


@pytest.mark.parametrize(
    "slices, message",
    [
        ([[(0, 0, 2**63)]], r"Rank 0 holds tokens \[0, 9223372036854775808\) of document 0, which has 4 tokens"),
        ([[(2**70, 0, 4)]], "a slice of document 1180591620717411303424, but the plan has 1 documents"),
        ([[(0, -(2**70), 4)]], r"Rank 0 holds tokens \[-1180591620717411303424, 4\)"),
        ([[(0, 0)]], "slices must hold, for each rank"),
        ([[(0, 0, 4, 5)]], "slices must hold, for each rank"),
        ([[(0, 0, 4.0)]], "slices must hold, for each rank"),
        ([(0, 0, 4)], "slices must hold, for each rank"),
        (None, "slices must hold, for each rank"),
    ],
)
def test_slices_that_are_refused(slices, message):
    with pytest.raises(PlanError, match=message):
        ShardPlan([4], 1, slices).validate()


def test_slices_may_be_iterators_and_numbers_of_numpy():
    plan = ShardPlan([4, 2], 2, (iter([np.array(piece)]) for piece in ([0, 0, 4], [1, 0, 2])))
    assert plan.validate() == ShardPlan([4, 2], 2, [[(0, 0, 4)], [(1, 0, 2)]])
    assert type(plan.slices[0][0].stop) is int
