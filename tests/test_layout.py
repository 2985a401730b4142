"""Index maps, which are built from arrays of slices, against maps that are counted token by token."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flashcp.bench.attention import AllGatherLayout
from hf_flashcp.layout import RankLayout, Rows
from hf_flashcp.plan.hierarchical_traffic import hierarchical_traffic
from hf_flashcp.plan.ranges import Ranges, overlaps
from hf_flashcp.planning import STRATEGIES, plan_documents
from tests.packs import arbitrary_plans, owners, packs
from tests.step_time_evaluator import traffic_of


CPU = torch.device("cpu")


class TokenByToken:
    """What ranks need of each other, counted for every token by itself. A token is `(document, place)`."""

    def __init__(self, plan, window, groups):
        self.plan = plan
        self.held = [
            [(document, place) for document, start, stop in of_rank for place in range(start, stop)]
            for of_rank in plan.slices
        ]
        self.window = window or max(plan.lengths)
        self.needed = [{key for query in held for key in self.seen(query)} - set(held) for held in self.held]
        self.groups = [group for group in groups if any(self.arriving(rank, group) for rank in range(plan.cp_size))]

    def seen(self, query):
        document, place = query
        return [(document, key) for key in range(max(0, place - self.window + 1), place + 1)]

    def sent(self, rank, to, group):
        """Return the tokens that travel from one rank to another, in the order of the rank's rows."""
        meet = (to - rank) % self.plan.cp_size in group
        return [token for token in self.held[rank] if meet and token in self.needed[to]]

    def arriving(self, rank, group):
        """Return the tokens that a rank receives, in the order of their arrival."""
        return [token for source in range(self.plan.cp_size) for token in self.sent(source, rank, group)]


def numbers(rows):
    return Ranges.of(rows.ranges).numbers().tolist() if rows.index is None else rows.index.tolist()


@st.composite
def staged_plans(draw):
    """Draw a plan, by any strategy or none, and its groups of ring offsets."""
    cp_size = draw(st.integers(1, 8))
    if draw(st.booleans()):
        plan = draw(arbitrary_plans(cp_size))
    else:
        plan = plan_documents(*draw(packs(cp_size)), strategy=draw(st.sampled_from(STRATEGIES)), max_imbalance=9)
    offsets = draw(st.permutations(range(1, cp_size)))
    count = draw(st.integers(1, max(1, cp_size - 1)))
    if count > 1:
        plan = plan.with_offset_groups([offsets[number::count] for number in range(count)])
    return plan


@settings(max_examples=150)
@given(plan=staged_plans(), window=st.none() | st.integers(1, 45))
def test_maps_send_what_is_needed_and_queries_see_each_key_once(plan, window):
    """Every map is followed with tokens instead of KV."""
    groups = plan.stage_offsets if window is None else [range(1, plan.cp_size)]
    expected = TokenByToken(plan, window, groups)
    for rank in range(plan.cp_size):
        layout, held = RankLayout(plan, rank, window), expected.held[rank]
        stages, sent = layout.stages(CPU), numbers(layout.send_rows(CPU))
        assert layout.num_tokens == len(held) and len(stages) == len(expected.groups)
        seen = [[] for _ in held]
        for rectangle in layout.local:
            attend(rectangle, held, seen, True, window)
        own_rows, begin = [], 0
        for stage, group in zip(stages, expected.groups):
            by_target = [expected.sent(rank, target, group) for target in range(plan.cp_size)]
            assert stage.sent == slice(begin, begin + sum(map(len, by_target)))
            assert [held[row] for row in sent[stage.sent]] == [token for tokens in by_target for token in tokens]
            assert stage.send_splits == [len(tokens) for tokens in by_target]
            begin = stage.sent.stop
            arrived = expected.arriving(rank, group)
            assert stage.recv_splits == [len(expected.sent(r, rank, group)) for r in range(plan.cp_size)]
            own = [] if stage.local_rows is None else numbers(stage.local_rows)
            assert len(set(own)) == len(own) and (window is not None or not own)
            own_rows += [own] if own else []
            keys = arrived + [held[row] for row in own]
            if window is None:
                assert (stage.key_order is None) == in_one_range(plan.slices[rank], arrived)
            if stage.key_order is not None:
                order = numbers(stage.key_order)
                assert set(order) == set(range(len(keys)))
                keys = [keys[row] for row in order]
            in_order = list(range(len(keys))) if stage.key_order is None else order
            check_parts(stage.gradients, in_order, len(arrived) + len(own))
            for rectangle in stage.rectangles:
                attend(rectangle, keys, seen, stage.causal, window)
        assert begin == len(sent)
        assert [sorted(keys) for keys in seen] == [expected.seen(query) for query in held]
        passes = layout.local, *(stage.rectangles for stage in stages)
        outputs = [[row for each in of_pass for row in range(*each[:2])] for of_pass in passes if of_pass]
        assert [numbers(rows) for rows in layout.outputs(CPU).rows] == outputs
        check_parts(layout.outputs(CPU), [row for rows in outputs for row in rows], len(held))
        whole = [list(range(len(held)))] if layout.local else []
        gradients = [row for rows in (*whole, *own_rows, sent) for row in rows]
        check_parts(layout.key_gradients(CPU), gradients, len(held))
        of_passes = len(whole) + len(own_rows)
        assert [numbers(rows) for rows in layout.key_gradients(CPU).rows[:of_passes]] == [*whole, *own_rows]


def check_parts(parts, expected, count):
    """Check parts that together have the rows `expected` of a result of `count` rows."""
    rows = [numbers(each) for each in parts.rows]
    assert [row for each in rows for row in each] == expected and parts.count == count
    assert all(len(set(each)) == len(each) for each in rows)
    covered = Counter(expected)
    assert parts.most == max(covered.values(), default=0) and parts.disjoint == (parts.most <= 1)
    assert parts.complete == (len(covered) == count)
    assert parts.begins_whole == (rows[:1] == [list(range(count))])
    places = [[each.index(row) if row in each else -1 for each in rows] for row in range(count)]
    assert parts.places.tolist() == places


def attend(rectangle, keys, seen, causal, window=None):
    """Add the keys that each row sees. A causal mask, and a window in it, are aligned bottom-right."""
    for row in range(rectangle.q_start, rectangle.q_stop):
        stop = rectangle.k_stop - (rectangle.q_stop - 1 - row if causal else 0)
        seen[row] += keys[max(rectangle.k_start, stop - window if causal and window else 0) : stop]


def in_one_range(slices, arrived):
    """Return whether the keys before each slice are adjacent in the order of arrival."""
    for document, start, _ in slices:
        places = [row for row, (other, place) in enumerate(arrived) if other == document and place < start]
        if places and places[-1] - places[0] + 1 != len(places):
            return False
    return True


@settings(max_examples=40)
@given(plan=staged_plans())
def test_an_all_gather_sends_every_row_to_every_rank(plan):
    for rank, held in enumerate(plan.slices):
        layout, rows = AllGatherLayout(plan, rank), sum(stop - start for _, start, stop in held)
        stages = layout.stages(CPU)
        assert numbers(layout.send_rows(CPU)) == list(range(rows)) * (plan.cp_size - 1)
        assert sum(stage.received for stage in stages) == plan.num_tokens - rows


@settings(max_examples=60)
@given(plan=staged_plans(), window=st.integers(1, 45), data=st.data())
def test_traffic_of_windows_is_counted_token_by_token(plan, window, data):
    expected = TokenByToken(plan, window, [])
    counts = [
        [len(expected.sent(s, r, range(1, plan.cp_size))) for r in range(plan.cp_size)] for s in range(plan.cp_size)
    ]
    assert plan.kv_traffic(window).tolist() == counts
    size = data.draw(st.sampled_from([size for size in range(1, plan.cp_size + 1) if plan.cp_size % size == 0]))
    found, theirs = (
        hierarchical_traffic(plan.slices, size, window),
        traffic_of(owners(plan), window, range(1, plan.cp_size), size),
    )
    assert np.array_equal(found, theirs)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@given(pairs=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)), max_size=12), data=st.data())
def test_rows_of_ranges_are_those_of_their_numbers(device, pairs, data):
    """Ranges may be empty, overlap, touch, and come in any order."""
    ranges = Ranges.of((start, start + length) for start, length in pairs)
    listed = [row for start, length in pairs for row in range(start, start + length)]
    assert ranges.numbers().tolist() == ranges.joined().numbers().tolist() == listed
    one, other = (Rows(each, torch.device(device)) for each in (ranges, np.array(listed, dtype=np.int64)))
    assert one.count == other.count == len(listed) and one.ranges == other.ranges
    ends = sorted(data.draw(st.lists(st.integers(0, len(listed)), max_size=5)))
    spans = [slice(begin, end) for begin, end in zip([0, *ends], [*ends, len(listed)])]
    for span, part in zip(spans, one.parts(spans), strict=True):
        alone = Rows(np.array(listed[span], dtype=np.int64), torch.device(device))
        assert (part.count, part.ranges) == (alone.count, alone.ranges)
        if device == "cpu":
            assert numbers(part) == listed[span]
            assert part.index is None or one.index is None or part.index.data_ptr() == one.index[span].data_ptr()


@given(
    first=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=8),
    gaps=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=8),
)
def test_overlaps_of_ranges(first, gaps):
    ranges = [(start, start + length) for start, length in first]
    others, stop = [], 0
    for gap, length in gaps:
        others.append((stop + gap, stop + gap + length))
        stop = others[-1][1]
    expected = [
        (i, j, max(one[0], other[0]), min(one[1], other[1]))
        for i, one in enumerate(ranges)
        for j, other in enumerate(others)
        if one[0] < other[1] and other[0] < one[1]
    ]
    found = overlaps(Ranges.of(ranges), Ranges.of(others))
    assert list(zip(*(each.tolist() for each in (found.first, found.second, *found.common)))) == expected
