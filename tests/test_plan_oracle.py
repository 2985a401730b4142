"""The oracle compared with all assignments, and the lower bound compared with the oracle and every strategy."""

import itertools
import math
from collections import Counter
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flashcp.data.lengths import sample_pack
from hf_flashcp.errors import PlanError
from hf_flashcp.planning import STRATEGIES, joint_bound, plan_documents
from hf_flashcp.planning.caps import Caps
from hf_flashcp.planning.lower_bound import LowPositions, kv_lower_bound, least_ends, least_kv
from tests import plan_oracle as oracle
from tests.independent_plan_checker import check_plan
from tests.packs import KNOWN_PACKS, packs


TINY = [
    ([5], 2),
    ([7], 3),
    ([6, 2], 2),
    ([3, 3, 3], 2),
    ([4, 3, 1], 3),
    ([5, 1, 1, 1], 2),
    ([2, 2, 2, 2], 3),
    ([8], 2),
]


def within_caps(tokens, pairs, max_imbalance, max_token_imbalance):
    mean = sum(tokens) / len(tokens)
    equal = max(tokens) - min(tokens) <= 1
    return (equal or max(tokens) <= max_token_imbalance * mean) and max(pairs) * len(pairs) <= max_imbalance * sum(
        pairs
    )


def every_plan(lengths, cp_size):
    """Yield `(tokens, pairs, received, sent)` for every assignment of single tokens to ranks."""
    places = [(document, position) for document, length in enumerate(lengths) for position in range(length)]
    for ranks in itertools.product(range(cp_size), repeat=len(places)):
        tokens, pairs, received, sent = ([0] * cp_size for _ in range(4))
        for (_, position), rank in zip(places, ranks):
            tokens[rank] += 1
            pairs[rank] += position + 1
        if min(tokens) == 0:
            continue
        later: set[int] = set()
        for index in reversed(range(len(places))):
            document, position = places[index]
            if position == lengths[document] - 1:
                later = set()
            rank = ranks[index]
            later.add(rank)
            for other in later - {rank}:
                received[other] += 1
                sent[rank] += 1
        yield tokens, pairs, received, sent


@pytest.mark.parametrize("lengths, cp_size", TINY)
@pytest.mark.parametrize("caps", [(1.05, 1.0), (1.2, 1.0), (1.5, 1.5), (math.inf, 1.3)])
def test_oracle_equals_exhaustive_search(lengths, cp_size, caps):
    found = [plan for plan in every_plan(lengths, cp_size) if within_caps(*plan[:2], *caps)]
    least = {
        "total": lambda plan: sum(plan[2]),
        "received": lambda plan: max(plan[2]),
        "sent": lambda plan: max(plan[3]),
        "bottleneck": lambda plan: max(plan[2] + plan[3]),
    }
    for objective, cost in least.items():
        best = oracle.best_plan(lengths, cp_size, objective, max_imbalance=caps[0], max_token_imbalance=caps[1])
        if not found:
            assert best is None
            continue
        assert best.proven and best.value == min(map(cost, found)) == pytest.approx(best.least)
        counts = check_plan(lengths, cp_size, best.plan.slices)
        assert within_caps(counts["tokens"].tolist(), counts["pairs"].tolist(), *caps)
        values = (
            counts["tokens"].tolist(),
            counts["pairs"].tolist(),
            counts["received"].tolist(),
            counts["sent"].tolist(),
        )
        assert cost(values) == best.value
    if found:
        assert kv_lower_bound(lengths, cp_size, *caps) <= min(sum(plan[2]) for plan in found)


@settings(max_examples=25)
@given(
    packs(max_documents=4, max_length=8),
    st.sampled_from([(1.0, 1.0), (1.05, 1.0), (1.3, 1.0), (1.1, 1.2), (1.3, 2.0)]),
)
def test_oracle_is_never_below_the_bound_nor_above_a_strategy(case, caps):
    lengths, cp_size = case
    best = oracle.best_plan(lengths, cp_size, max_imbalance=caps[0], max_token_imbalance=caps[1], seconds=5)
    if best is not None:
        assert best.value >= kv_lower_bound(lengths, cp_size, *caps)
    for strategy in STRATEGIES:
        plan = plan_documents(lengths, cp_size, strategy=strategy, max_imbalance=caps[0], max_token_imbalance=caps[1])
        report = plan.report()
        if within_caps(report["tokens"], report["pairs"], *caps):
            assert best is not None and report["kv_total"] >= best.least - 1e-6


@pytest.mark.parametrize(
    "lengths, cp_size, block, near",
    [
        ([59, 1, 1, 1, 1, 1], 2, 1, 1.1),
        ([24, 4, 3, 3, 1, 1, 1, 1, 2, 8], 3, 1, 1.1),
        ([9 * 512, 4 * 512, 3 * 512, 3 * 512, 5 * 512], 4, 512, 1.6),
    ],
)
def test_bound_is_near_the_oracle(lengths, cp_size, block, near):
    best = oracle.best_plan(lengths, cp_size, block=block)
    assert best.proven and all(stop % block == 0 for slices in best.plan.slices for *_, stop in slices)
    assert best.value / near <= kv_lower_bound(lengths, cp_size) <= best.value


@pytest.mark.parametrize("cp_size, block", [(2, 8), (3, 4), (4, 8)])
def test_one_document_without_slack_costs_what_zigzag_costs(cp_size, block):
    length = 2 * cp_size * block
    closed_form = 3 * (cp_size - 1) * length // 4
    assert kv_lower_bound([length], cp_size, max_imbalance=1.0) <= closed_form
    assert plan_documents([length], cp_size, strategy="per_doc").report()["kv_total"] == closed_form
    best = oracle.best_plan([length], cp_size, block=block, max_imbalance=1.0)
    assert best.proven and best.value == closed_form


def test_bound_of_one_long_document_is_that_of_zigzag():
    for cp_size in (2, 4, 8, 64):
        length = 2 * cp_size * 4096
        closed_form = 3 * (cp_size - 1) * length // 4
        assert 0.99 * closed_form <= kv_lower_bound([length], cp_size, max_imbalance=1.0) <= closed_form


@pytest.mark.parametrize("objective", oracle.OBJECTIVES)
@pytest.mark.parametrize(
    "lengths, cp_size", [([6, 4, 6, 4], 2), ([5, 5, 5], 3), ([1] * 9, 3), ([7, 2, 7, 2, 7, 2], 3)]
)
def test_documents_that_pack_evenly_cost_nothing(lengths, cp_size, objective):
    assert kv_lower_bound(lengths, cp_size) == 0
    best = oracle.best_plan(lengths, cp_size, objective)
    assert best.value == 0 and best.plan.report()["kv_total"] == 0


@pytest.mark.parametrize("others", [5, 17, 100])
def test_a_document_longer_than_a_share_gives_its_head(others):
    lengths = [150] + [50] * 3  # a share is 100
    assert kv_lower_bound(lengths, 3, max_imbalance=math.inf) == 50
    assert oracle.best_plan(lengths, 3, block=50, max_imbalance=math.inf).value == 50
    assert kv_lower_bound([100 + others] + [1] * (300 - others), 4, max_imbalance=math.inf) == others


heavy_tailed = st.lists(st.floats(0, 9).map(lambda power: int(math.exp(power))), min_size=1, max_size=40)


@settings(max_examples=300)
@given(
    heavy_tailed,
    st.integers(1, 12),
    st.sampled_from([1.0, 1.01, 1.05, 1.3, 4.0, math.inf]),
    st.sampled_from([1.0, 1.03, 1.5, math.inf]),
)
def test_no_strategy_within_the_caps_is_below_the_bound(lengths, cp_size, max_imbalance, max_token_imbalance):
    lengths = lengths + [1] * max(cp_size - sum(lengths), 0)
    assert_bound_holds(lengths, cp_size, max_imbalance, max_token_imbalance)


@pytest.mark.parametrize("name", KNOWN_PACKS)
def test_bound_holds_on_known_packs(name):
    for cp_size, *caps in itertools.product((1, 2, 3, 4, 5, 7), (1.0, 1.05, 1.5), (1.0, 1.2)):
        assert_bound_holds(KNOWN_PACKS[name], cp_size, *caps)


def assert_bound_holds(lengths, cp_size, max_imbalance, max_token_imbalance):
    bound = kv_lower_bound(lengths, cp_size, max_imbalance, max_token_imbalance)
    assert isinstance(bound, int) and bound >= 0
    for strategy in STRATEGIES:
        plan = plan_documents(
            lengths, cp_size, strategy=strategy, max_imbalance=max_imbalance, max_token_imbalance=max_token_imbalance
        )
        report = plan.report()
        if within_caps(report["tokens"], report["pairs"], max_imbalance, max_token_imbalance):
            assert report["kv_total"] >= bound, strategy


@given(packs(cp_size=3, max_documents=8, max_length=60), st.randoms())
def test_bound_falls_with_wider_caps_and_ignores_the_order(case, random):
    lengths, cp_size = case

    def least(*caps):
        return least_kv(Caps(tuple(lengths), cp_size, *caps))

    assert least(1.0, 1.0) >= least(1.1, 1.0) >= least(math.inf, 1.0)
    assert least(1.0, 1.0) >= least(1.0, 1.5) >= least(1.0, math.inf)
    shuffled = random.sample(lengths, len(lengths))
    assert kv_lower_bound(lengths, cp_size) == kv_lower_bound(shuffled, cp_size) >= least(1.05, 1.0)


def direct_bound(lengths, cp_size, max_imbalance):
    """Compute condition (2) literally for equal tokens: try every end, with the other tokens sorted by position."""
    share, left_over = divmod(sum(lengths), cp_size)
    area = int(max_imbalance * sum(length * (length + 1) / 2 for length in lengths) / cp_size + 1e-9)
    total = 0
    for document, length in enumerate(lengths):
        for ranks in range(1, cp_size):
            most, least = ranks * share + min(ranks, left_over), ranks * share + max(ranks - cp_size + left_over, 0)
            for end in range(length - ranks + 1):
                held = sorted(
                    position + 1
                    for other, other_length in enumerate(lengths)
                    for position in range(end if other == document else other_length)
                )[: max(least - (length - end), 0)]
                if length - end <= most and sum(held) + sum(range(end + 1, length + 1)) <= ranks * area:
                    total += end
                    break
            else:
                total += max(length - ranks, 0)
    return total


@given(packs(max_documents=6, max_length=25), st.sampled_from([1.0, 1.05, 1.2, 2.0]))
def test_bound_equals_its_definition(case, max_imbalance):
    lengths, cp_size = case
    assert least_kv(Caps(tuple(lengths), cp_size, max_imbalance)) == direct_bound(lengths, cp_size, max_imbalance)


def tiny_pack(random):
    """Return a pack with one or more documents that nearly fit on a rank, small enough for `least_total`."""
    cp_size = random.choice([2, 2, 3, 3, 4])
    longest, most = {2: (13, 36), 3: (8, 20), 4: (6, 13)}[cp_size]
    lengths = [random.randint(longest - 3, longest)]
    while sum(lengths) < cp_size or random.random() < 0.8:
        lengths.append(random.randint(1, random.choice([2, 4, longest])))
    return (lengths, cp_size) if sum(lengths) <= most else tiny_pack(random)


@pytest.mark.parametrize("seed", range(3))
def test_every_level_and_price_gives_a_bound(seed):
    """Compare with the least total of all plans, not only for the levels and prices that are searched."""
    random, tight = Random(seed), 0
    for _ in range(120):
        lengths, cp_size = tiny_pack(random)
        caps = Caps(
            tuple(lengths), cp_size, *random.choice([(1.0, 1.0), (1.05, 1.0), (1.2, 1.0), (1.1, 1.2), (1.3, 2.0)])
        )
        least_tokens = 1 if caps.token_room else caps.total_tokens // cp_size
        optimum = oracle.least_total(lengths, cp_size, caps.most_pairs, least_tokens, caps.most_tokens)
        if optimum is None:
            continue
        ends, alone = least_ends(caps), least_kv(caps)
        highest = math.ceil(caps.most_pairs / max(caps.least_together(1), 1))
        prices = np.geomspace(0.01, 5.0, 100)
        for level in range(min(highest, 40)):
            assert joint_bound._at_level(level, prices, caps, Counter(lengths), ends) <= optimum + 1e-6
        found = joint_bound.joint_least_kv(caps, ends)
        assert max(found, alone) <= optimum
        tight += alone < found == optimum
    assert tight


def test_documents_that_nearly_fit_have_a_higher_bound_together():
    lengths = sample_pack("wlb_llm", 65536, seed=1)
    assert kv_lower_bound(lengths, 16) >= 1.15 * least_kv(Caps(tuple(lengths), 16))
    assert joint_bound.joint_least_kv(Caps((3 * 2048,), 2048), {}) == 0


@pytest.mark.parametrize("lengths, cp_size", TINY)
def test_trying_all_assignments_finds_what_the_oracle_finds(lengths, cp_size):
    caps = Caps(tuple(lengths), cp_size, 1.2)
    best = oracle.best_plan(lengths, cp_size, max_imbalance=1.2)
    least_tokens = caps.total_tokens // cp_size
    found = oracle.least_total(lengths, cp_size, caps.most_pairs, least_tokens, caps.most_tokens)
    assert found == (best and best.value)


def test_bound_takes_few_bisections_and_reads_lengths_as_plans_do(monkeypatch):
    """606 documents on 32 ranks need about a hundred lookups of the cheapest tokens, each logarithmic in documents."""
    looks, cheapest = [], LowPositions.cheapest
    monkeypatch.setattr(LowPositions, "cheapest", lambda self, tokens: looks.append(tokens) or cheapest(self, tokens))
    kv_lower_bound(sample_pack("pile", 524288, seed=1), 32)
    assert 0 < len(looks) < 1000
    with pytest.raises(PlanError, match="no documents"):
        kv_lower_bound([], 2)
