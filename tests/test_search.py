import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flashcp.planning import ShardPlan
from hf_flashcp.planning.algorithm1 import flashcp
from hf_flashcp.planning.search import search
from hf_flashcp.planning.search_reference import better_algorithm1
from hf_flashcp.planning.sharding import per_doc
from tests.independent_plan_checker import assert_caps, check_plan, costs
from tests.packs import KNOWN_PACKS, packs


ADVERSARIAL = {
    "one_giant_with_tiny_ones": [20_000] + [7] * 300,
    "giant_in_the_middle": [3] * 50 + [9_000] + [5] * 50,
    "two_giants": [8_000, 7_000] + [11] * 100,
    "two_giants_alone": [6_000, 6_000],
    "three_giants": [9_000, 4_001, 3_999] + [2] * 200,
    "powers_of_two": [2**power for power in range(14)],
    "seven_equal": [640] * 7,
    "eight_equal": [640] * 8,
    "nine_equal": [640] * 9,
    "all_equal": [100] * 64,
    "single": [12_345],
    "single_power_of_two": [8_192],
    "fewer_documents_than_ranks": [500, 301, 77],
    "all_of_length_one": [1] * 50,
    "one_token_a_rank": [1] * 8,
    "one_with_ones": [40] + [1] * 10,
    "nearly_equal": [1000 + index for index in range(9)],
}


def assert_sound(lengths, cp_size, max_imbalance=1.05, max_token_imbalance=1.0, minimize_total=False):
    """Partition, caps, determinism, and never above Algorithm 1 at the same caps. Returns the counts."""
    options = {"max_imbalance": max_imbalance, "max_token_imbalance": max_token_imbalance}
    slices = search(lengths, cp_size, **options, minimize_total=minimize_total)
    assert slices == search(list(lengths), cp_size, **options, minimize_total=minimize_total)
    ShardPlan(lengths, cp_size, slices).validate()
    counts = check_plan(lengths, cp_size, slices)
    assert_caps(counts, max_token_imbalance)
    theirs = check_plan(lengths, cp_size, flashcp(tuple(lengths), cp_size, max_imbalance, max_token_imbalance))
    most_pairs = max_imbalance * counts["pairs"].sum() / cp_size
    if theirs["pairs"].max() <= most_pairs:
        assert counts["pairs"].max() <= most_pairs
        total, bottleneck = costs(counts)
        their_total, their_bottleneck = costs(theirs)
        assert total <= their_total and bottleneck <= their_bottleneck
    elif counts["pairs"].max() > most_pairs:
        by_document = check_plan(lengths, cp_size, per_doc(tuple(lengths), cp_size))
        assert counts["pairs"].max() <= min(theirs["pairs"].max(), by_document["pairs"].max())
    return counts


caps = st.tuples(st.sampled_from([1.0, 1.02, 1.05, 1.3, 3.0, math.inf]), st.sampled_from([1.0, 1.1, 2.0, math.inf]))


@given(packs(), caps, st.booleans())
def test_small_packs(case, caps, minimize_total):
    assert_sound(*case, *caps, minimize_total)


@given(packs(cp_size=7, max_documents=30, max_length=200), caps, st.booleans())
def test_more_ranks_and_documents(case, caps, minimize_total):
    assert_sound(*case, *caps, minimize_total)


@settings(max_examples=50)
@given(
    st.lists(st.floats(0, 11).map(lambda power: int(math.exp(power))), min_size=1, max_size=80),
    st.integers(1, 24),
    caps,
    st.booleans(),
)
def test_heavy_tails(lengths, cp_size, caps, minimize_total):
    lengths = lengths + [1] * max(cp_size - sum(lengths), 0)
    assert_sound(lengths, cp_size, *caps, minimize_total)


@pytest.mark.parametrize("minimize_total", [False, True])
@pytest.mark.parametrize("cp_size", [1, 2, 3, 8])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_packs(name, cp_size, minimize_total):
    for max_imbalance in (1.0, 1.05, 2.0):
        for max_token_imbalance in (1.0, 1.1):
            assert_sound(ADVERSARIAL[name], cp_size, max_imbalance, max_token_imbalance, minimize_total)


@pytest.mark.parametrize("name", KNOWN_PACKS)
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4, 5, 7])
def test_known_packs(name, cp_size):
    assert_sound(KNOWN_PACKS[name], cp_size)


@pytest.mark.parametrize("cp_size", [2, 4, 8])
def test_a_single_document_without_slack_costs_what_zigzag_costs(cp_size):
    length = 2 * cp_size * 100
    counts = assert_sound([length], cp_size, max_imbalance=1.0)
    assert costs(counts)[0] == 3 * (cp_size - 1) * length // 4


@pytest.mark.parametrize("cp_size", [4, 8])
def test_one_giant_with_tiny_ones_is_no_worse_than_rotated_per_doc(cp_size):
    lengths = ADVERSARIAL["one_giant_with_tiny_ones"]
    counts = assert_sound(lengths, cp_size)
    rotated = check_plan(lengths, cp_size, per_doc(tuple(lengths), cp_size, rotate_ranks=True))
    assert costs(counts)[1] <= costs(rotated)[1]


def test_reference_is_algorithm_1():
    # What the search measures itself against skips rounds of Algorithm 1, but never the one that counts.
    for lengths in [*ADVERSARIAL.values(), *KNOWN_PACKS.values()]:
        for cp_size in (2, 5, 8):
            for caps in ((1.0, 1.0), (1.05, 1.0), (1.05, 1.1), (1.5, math.inf)):
                if sum(lengths) < cp_size:
                    continue
                theirs = flashcp(tuple(lengths), cp_size, *caps)
                counts = check_plan(lengths, cp_size, theirs)
                most_pairs = caps[0] * counts["pairs"].sum() / cp_size
                found = better_algorithm1(lengths, cp_size, most_pairs, caps[1], math.inf, math.inf)
                assert found == (theirs if counts["pairs"].max() <= most_pairs else None)
                total, bottleneck = costs(counts)
                assert better_algorithm1(lengths, cp_size, most_pairs, caps[1], total + 1, 0) in (found, None)
                if found and total:
                    assert better_algorithm1(lengths, cp_size, most_pairs, caps[1], total + 1, bottleneck) == found


@pytest.mark.parametrize(
    "lengths, cp_size",
    [
        ([1] * 2048, 1024),
        ([50_000] + [1] * 2000, 1024),
        ([30_000, 20_000, 10_000], 1024),
        ([1 + index % 3 for index in range(5_000)], 8),
        ([1 + index % 3 for index in range(5_000)], 512),
    ],
)
def test_large(lengths, cp_size):
    slices = search(lengths, cp_size)
    ShardPlan(lengths, cp_size, slices).validate()
    counts = check_plan(lengths, cp_size, slices)
    assert_caps(counts, 1.0)
    by_document = check_plan(lengths, cp_size, per_doc(tuple(lengths), cp_size))
    assert costs(counts)[0] <= costs(by_document)[0] and costs(counts)[1] <= costs(by_document)[1]
    assert counts["pairs"].max() <= max(1.05 * counts["pairs"].sum() / cp_size, by_document["pairs"].max())
