"""Index maps of recurrent and convolutional layers, against maps that are followed slice by slice and token by
token."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flashcp.layout.halo_layout import HaloLayout
from hf_flashcp.layout.state_layout import StateExchange, StateLayout
from hf_flashcp.plan.contracted import contracted, states_moved
from hf_flashcp.plan.slices import slices_by_document
from hf_flashcp.planning import ShardPlan
from tests.packs import arbitrary_plans
from tests.test_layout import numbers


CPU = torch.device("cpu")


def delivered(exchanges, own):
    """Return the rows that each rank receives, in order of arrival, if rank r has the rows `own[r]`."""
    sent = [numbers(each.send_rows(CPU)) for each in exchanges]
    splits = [stage.send_splits for each in exchanges for stage in each.stages(CPU)]
    if not splits:
        return [[] for _ in own]
    parts = []
    for rows, counts, numbers_sent in zip(own, splits, sent):
        rest = [rows[number] for number in numbers_sent]
        parts.append([[rest.pop(0) for _ in range(count)] for count in counts])
    arrived = [[row for source in parts for row in source[rank]] for rank in range(len(own))]
    assert [len(rows) for rows in arrived] == [stage.received for each in exchanges for stage in each.stages(CPU)]
    return arrived


def in_groups(plan, rank):
    """Return the (document, place) of the rank's slices of cut documents: those at place 0, then the others."""
    held = slices_by_document(plan.slices)
    cut = [document for document in sorted(held) if len(held[document]) > 1]
    places = [
        (document, place) for document in cut for place, (_, _, holder) in enumerate(held[document]) if holder == rank
    ]
    return [each for each in places if each[1] == 0] + [each for each in places if each[1] > 0]


@settings(deadline=None, max_examples=150)
@given(arbitrary_plans(), st.booleans())
def test_chains_go_through_all_slices_before_or_after_a_slice(plan, backwards):
    if not StateLayout(plan, 0).any:
        assert contracted(plan.slices).lengths == []
        return
    exchanges = [StateExchange(plan, rank, backwards) for rank in range(plan.cp_size)]
    held = slices_by_document(plan.slices)
    own = [[in_groups(plan, rank)[number] for number in each.order] for rank, each in enumerate(exchanges)]
    arrived = delivered([each.rows for each in exchanges], own)
    for rank, exchange in enumerate(exchanges):
        _, chains = exchange.on(CPU)
        rows = own[rank] + arrived[rank]
        sources = [rows[number] for number in chains.sources.tolist()]
        passed, met = {}, {}
        for step in chains.steps:
            taken, sources = sources[: step.chains], sources[step.chains :]
            for chain, slice_passed in enumerate(taken):
                passed.setdefault(chain, []).append(slice_passed)
            for chain, number in zip(step.reaching.tolist(), step.reached.tolist()):
                met[number] = list(passed[chain])
        assert not sources
        for number, (document, place) in enumerate(in_groups(plan, rank)):
            last = len(held[document]) - 1
            others = range(last, place, -1) if backwards else range(place)
            assert met.get(number, []) == [(document, other) for other in others]


@settings(deadline=None, max_examples=100)
@given(arbitrary_plans())
def test_groups_of_slices(plan):
    for rank, slices in enumerate(plan.slices):
        states = StateLayout(plan, rank)
        groups = [states.first, states.continued, states.whole]
        ordered = [each for group in groups for each in group.slices]
        assert sorted(each[:3] for each in ordered) == sorted(map(tuple, slices))
        assert all(start == 0 for _, start, _, _ in states.first.slices)
        assert all(start > 0 for _, start, _, _ in states.continued.slices)
        tokens = [each.row + token for each in ordered for token in range(each.tokens)]
        assert [tokens[place] for place in numbers(states.in_order(CPU))] == list(range(len(tokens)))
        for group in groups:
            if len(group):
                rows = numbers(group.rows(CPU))
                edges = group.cu_seqlens(CPU).tolist()
                assert [rows[begin] for begin in edges[:-1]] == [each.row for each in group.slices]
                assert edges[-1] == len(rows) == group.seq_idx(CPU).shape[1]
                assert torch.bincount(group.seq_idx(CPU)[0]).tolist() == group.tokens


@settings(deadline=None, max_examples=150)
@given(arbitrary_plans(), st.integers(2, 5))
def test_halos_are_the_tokens_before_slices(plan, width):
    layouts = [HaloLayout(plan, rank, width) for rank in range(plan.cp_size)]
    own = [
        [(document, place) for document, start, stop in held for place in range(start, stop)] for held in plan.slices
    ]
    arrived = delivered([each.exchange for each in layouts], own)
    for rank, layout in enumerate(layouts):
        maps = layout.on(CPU)
        padded = [None] * layout.num_padded
        for places, rows in (
            (maps.kept, own[rank]),
            (maps.own_places, [own[rank][source] for source in numbers(maps.own_sources)]),
            (maps.places, [arrived[rank][source] for source in numbers(maps.sources)]),
        ):
            for place, row in zip(numbers(places), rows, strict=True):
                assert padded[place] is None
                padded[place] = row
        expected = []
        for document, start, stop in plan.slices[rank]:
            before = [(document, place) if place >= 0 else None for place in range(start - width + 1, start)]
            if not expected:  # the kernel pads the first slice
                before = [each for each in before if each is not None]
            expected += [*before, *((document, place) for place in range(start, stop))]
        assert padded == expected
        for (start, stop), count, (document, first, last) in zip(layout.pieces, layout.halo_tokens, plan.slices[rank]):
            assert padded[start:stop] == [(document, place) for place in range(first - count, last)]
        assert sum(stage.received for stage in layout.exchange.stages(CPU)) == len(set(arrived[rank]))


def test_states_moved():
    """Document 0 has slices on ranks 0, 1, 2, 1; document 1 is whole."""
    slices = [[(0, 0, 30)], [(0, 30, 60), (0, 80, 100)], [(0, 60, 80), (1, 0, 5)]]
    assert contracted(slices).slices == [[(0, 0, 1)], [(0, 1, 2), (0, 3, 4)], [(0, 2, 3)]]
    backwards = contracted(slices, backwards=True).slices
    assert list(map(sorted, backwards)) == [[(0, 3, 4)], [(0, 0, 1), (0, 2, 3)], [(0, 1, 2)]]
    assert states_moved(slices) == ([0, 2, 2], [2, 1, 1])
    assert states_moved(ShardPlan([5, 5], 2, [[(0, 0, 5)], [(1, 0, 5)]]).slices) == ([0, 0], [0, 0])
