"""What is counted with arrays over all slices equals plain loops, and takes no memory that grows with plans."""

import gc
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_flashcp.plan.calls import _scattered, full_attention_calls
from hf_flashcp.plan.contracted import contracted, contracted_plan
from hf_flashcp.plan.contracted import states_moved as states_moved_by_loop
from hf_flashcp.plan.kernel_calls import GRIDS, deal_calls, deal_passes
from hf_flashcp.plan.moved import kv_moved, rank_pairs, states_moved, window_moved
from hf_flashcp.plan.rectangles import Rectangle, key_ranges
from hf_flashcp.plan.slices import Slice, attention_pairs
from hf_flashcp.plan.stage_traffic import stage_traffic
from hf_flashcp.plan.topology import Topology
from hf_flashcp.plan.traffic import full_attention_traffic, traffic_matrix
from hf_flashcp.planning import STRATEGIES, ShardPlan, plan_documents, sharding
from hf_flashcp.planning.sharding import give_empty_ranks_a_token, per_doc, per_doc_columns
from tests.packs import arbitrary_plans, packs


pytestmark = pytest.mark.smoke


@given(arbitrary_plans(), st.integers(1, 50))
def test_counts_of_ranks(plan, window):
    assert kv_moved(plan) == tuple(map(tuple, full_attention_traffic(plan.slices)))
    traffic = traffic_matrix(plan.slices, window)
    assert window_moved(plan, window) == (tuple(traffic.sum(0).tolist()), tuple(traffic.sum(1).tolist()))
    for backwards in (False, True):
        expected = states_moved_by_loop(plan.slices, backwards=backwards)
        assert states_moved(plan, backwards=backwards) == tuple(map(tuple, expected))
    for width in (None, window):
        expected = [sum(attention_pairs(start, stop, width) for _, start, stop in held) for held in plan.slices]
        assert rank_pairs(plan, width) == expected


@given(arbitrary_plans(), st.booleans())
def test_contracted_plans(plan, backwards):
    lengths, slices = contracted(plan.slices, backwards=backwards)
    held = [[*of_rank, (len(lengths) + rank, 0, 1)] for rank, of_rank in enumerate(slices)]
    expected = ShardPlan([*lengths, *[1] * plan.cp_size], plan.cp_size, held, ranks_per_node=plan.ranks_per_node)
    assert contracted_plan(plan, backwards=backwards).validate() == expected


@given(arbitrary_plans(), st.integers(1, 50))
def test_calls_with_a_window(plan, window):
    window = plan.hiding_window(window)
    if window is None:
        return
    report, (_, sent) = plan.report(window), plan.kv_moved(window)
    for rank, held in enumerate(plan.slices):
        waits = window > 1 and any(start > 0 for _, start, _ in held)
        local = any(start == 0 or stop - start >= window for _, start, stop in held)
        assert report["kernel_calls"][rank] == 2 * (waits + local)
        sends = bool(sent[rank])
        assert report["copies"][rank] == sends + (waits or sends) + 2 * waits + 2 * (waits and local)


def in_one_range(slices, received):
    """Return whether the keys of every slice are in one range of what arrives."""
    arrived = [
        (document, position)
        for document, start, stop, _ in sorted(received, key=lambda piece: (piece[3], *piece[:3]))
        for position in range(start, stop)
    ]
    for document, start, _ in slices:
        rows = [row for row, key in enumerate(arrived) if key[0] == document and key[1] < start]
        if rows and rows[-1] - rows[0] >= len(rows):
            return False
    return True


@given(arbitrary_plans())
def test_copies_of_keys_that_arrive_scattered(plan):
    plan = plan.with_offset_groups(None)
    scattered, calls, stages = _scattered(plan), full_attention_calls(plan), stage_traffic(plan)
    received, sent = plan.kv_moved()
    for rank, held in enumerate(plan.slices):
        last = {document: start for document, start, _ in held}
        pieces = [
            (*piece, other)
            for other, of_other in enumerate(plan.slices)
            for piece in of_other
            if other != rank and piece.start < last.get(piece.document, 0)
        ]
        ordered = in_one_range(held, pieces)
        if scattered[rank]:
            assert not ordered
        if stages:
            arriving = stages[0].received(rank).spans
            assert (key_ranges(plan.slice_table.of_rank(rank), arriving).order is None) == ordered
        expected = 2 * (sent[rank] > 0) + (received[rank] > 0) * (3 if ordered else 4)
        assert calls["copies"][rank] == expected
        assert calls["kernel_calls"][rank] == 2 + 2 * (received[rank] > 0)


@pytest.mark.parametrize("rotate_ranks", [False, True])
def test_zigzags_of_several_documents_are_recognized_as_scattered(rotate_ranks):
    """Otherwise the report of such a plan would take a time quadratic in ranks."""
    plan = plan_documents([500] * 40, 16, strategy="per_doc", rotate_ranks=rotate_ranks)
    assert _scattered(plan).all()


def zigzag(lengths, cp_size, rotate_ranks, documents):
    """Split documents chunk by chunk, see `per_doc`."""
    chunks, next_extra = 2 * cp_size, 0
    slices = [[] for _ in range(cp_size)]
    for document in documents:
        shift = document % cp_size if rotate_ranks else 0
        base, extra = divmod(lengths[document], chunks)
        sizes = [base] * chunks
        for turn in range(next_extra, next_extra + extra):
            turn %= chunks
            if turn < cp_size:
                sizes[(turn - shift) % cp_size] += 1
            else:
                sizes[chunks - 1 - (chunks - 1 - turn - shift) % cp_size] += 1
        next_extra = (next_extra + extra) % chunks
        start = 0
        for chunk, size in enumerate(sizes):
            if size:
                rank = (min(chunk, chunks - 1 - chunk) + shift) % cp_size
                slices[rank].append(Slice(document, start, start + size))
            start += size
    return slices


@given(packs(max_documents=9, max_length=60), st.booleans(), st.data())
def test_zigzags(case, rotate_ranks, data):
    lengths, cp_size = case
    documents = sorted(data.draw(st.sets(st.integers(0, len(lengths) - 1))))
    most = sharding.MOST_CHUNKS
    try:
        sharding.MOST_CHUNKS = data.draw(st.sampled_from([1, 8, 40, most]))
        assert per_doc(lengths, cp_size, rotate_ranks, documents) == zigzag(lengths, cp_size, rotate_ranks, documents)
        columns = per_doc_columns(lengths, cp_size, rotate_ranks)
    finally:
        sharding.MOST_CHUNKS = most
    every = zigzag(lengths, cp_size, rotate_ranks, range(len(lengths)))
    assert ShardPlan.from_columns(lengths, cp_size, columns).validate() == ShardPlan(lengths, cp_size, every)


@given(arbitrary_plans(cp_size=4), st.integers(0, 6))
def test_empty_ranks_get_the_first_token_of_the_longest_piece(plan, more):
    slices = [*map(list, plan.slices), *([] for _ in range(more))]
    if plan.num_tokens < len(slices):
        return
    expected = [list(held) for held in slices]
    for held in expected:
        if not held:
            piece, donor = max(
                ((piece, pieces) for pieces in expected for piece in pieces),
                key=lambda found: (found[0].tokens, found[0].tokens == 1 and len(found[1]) > 1, -found[0].document),
            )
            document, start, stop = piece
            place = donor.index(piece)
            donor[place : place + 1] = [Slice(document, start + 1, stop)] if piece.tokens > 1 else []
            held.append(Slice(document, start, start + 1))
    give_empty_ranks_a_token(slices)
    assert slices == expected


sizes = st.integers(1, 20_000)


@st.composite
def rectangles_of_passes(draw):
    """Draw rectangles in the order of their queries, with gaps and with keys that overlap."""
    passes = []
    for drawn in draw(
        st.lists(st.lists(st.tuples(sizes, sizes, st.booleans(), st.booleans()), max_size=6), max_size=4)
    ):
        rectangles, row, key = [], 0, 0
        for queries, keys, gap, again in drawn:
            row, key = row + gap, 0 if again else key
            rectangles.append(Rectangle(row, row + queries, key, key + keys))
            row, key = row + queries, key + keys
        passes.append(rectangles)
    return passes


@pytest.mark.parametrize("kernel", GRIDS)
@given(passes=rectangles_of_passes())
def test_passes_are_divided_together_as_they_are_alone(kernel, passes):
    for grid in GRIDS[kernel]:
        assert deal_passes(passes, grid, 32) == [deal_calls(rectangles, grid, 32) for rectangles in passes]


def use_plans(random, count):
    """Make plans of new documents by every strategy, and use all that is kept with a plan."""
    for number in range(count):
        lengths = random.integers(1, 60, 5).tolist()
        plan = plan_documents(lengths, 3, strategy=STRATEGIES[number % len(STRATEGIES)], max_imbalance=3.0)
        assert plan.report()["tokens"] and plan.digest and hash(plan) and plan.slices
        if number % 50 < len(STRATEGIES):
            plan.report(9, Topology(3))
            plan.with_offset_groups([[1], [2]]).report(kernel="flash_attn_2")


def test_plans_that_are_no_longer_used_take_no_memory():
    """A plan and its tables take several KiB. Only the slices of 128 plans are cached."""
    random = np.random.default_rng(0)
    use_plans(random, 50)
    gc.collect()
    tracemalloc.start()
    try:
        use_plans(random, 2000)
        gc.collect()
        left, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert left < 500_000
