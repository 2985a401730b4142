"""Packing by length: no token is lost, epochs have equal numbers of packs, and groups have about equal work."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_flashcp import CostModel, pack_lengths, plan_documents
from hf_flashcp.data.lengths import sample_lengths
from hf_flashcp.data.packing import imbalance
from hf_flashcp.data.packing_steps import StepPacker, Waiting, best_fit, cut_up, least_time
from hf_flashcp.errors import PlanError
from hf_flashcp.predict.model_shape import LLAMA_3_8B


pytestmark = pytest.mark.smoke


@st.composite
def packing_problems(draw):
    cp_size = draw(st.sampled_from([1, 2, 5]))
    window = draw(st.integers(2 * cp_size, 60))
    options = {
        "method": draw(st.sampled_from(["balanced", "best_fit"])),
        "overlong": draw(st.sampled_from(["truncate", "split", "drop"])),
        "max_length": draw(st.none() | st.integers(1, window)),
        "dp_size": draw(st.integers(1, 3)),
        "gradient_accumulation_steps": draw(st.integers(1, 3)),
        "look_ahead": draw(st.integers(0, 3)),
        "cost_model": draw(st.sampled_from([None, ATTENTION_ONLY])),
        "cp_size": cp_size,
    }
    lengths = draw(st.lists(st.integers(1, draw(st.sampled_from([4, 40, 90]))), min_size=1, max_size=80))
    return lengths, window, options


ATTENTION_ONLY = dataclasses.replace(CostModel.from_config(LLAMA_3_8B, "h100"), linear_flops_per_token=1.0)


def packed(problem, epoch=0):
    """Return the packing, or None if there are too few tokens for cp_size ranks."""
    lengths, window, options = problem
    try:
        return pack_lengths(lengths, window, epoch=epoch, **options)
    except PlanError as error:
        assert "too short for a pack of their own" in str(error) or "no documents to pack" in str(error)
        return None


@given(packing_problems())
def test_every_token_is_packed_truncated_or_dropped(problem):
    lengths, window, options = problem
    longest = options["max_length"] or window
    if (packing := packed(problem)) is None:
        return
    ranges = {}
    for pack in packing:
        tokens = sum(piece.stop - piece.start for piece in pack)
        assert options["cp_size"] <= tokens <= window
        for document, start, stop in pack:
            assert 0 <= start < stop <= lengths[document] and stop - start <= longest
            ranges.setdefault(document, []).append((start, stop))
    expected = {}
    for document, length in enumerate(lengths):
        if length <= longest or options["overlong"] == "split":
            stops = [*range(longest, length, longest), length]
            expected[document] = list(zip([0, *stops], stops))
        elif options["overlong"] == "truncate":
            expected[document] = [(0, longest)]
    assert {document: sorted(found) for document, found in ranges.items()} == expected
    report = packing.report()
    assert report["documents_in"] == len(lengths) and report["tokens_in"] == sum(lengths)
    assert report["documents_packed"] == len(expected)
    assert report["documents_in"] == report["documents_packed"] + report["documents_dropped"]
    assert report["tokens_packed"] == sum(stop - start for found in expected.values() for start, stop in found)
    assert report["tokens_in"] == sum(report[f"tokens_{name}"] for name in ("packed", "truncated", "dropped"))
    assert report["documents_split"] == sum(len(found) > 1 for found in expected.values())
    assert report["documents_truncated"] == (
        sum(length > longest for length in lengths) if options["overlong"] == "truncate" else 0
    )
    assert report["fill_rate"] == pytest.approx(report["tokens_packed"] / (len(packing) * window))


@given(packing_problems())
def test_epochs_have_equal_numbers_of_whole_steps_if_documents_suffice(problem):
    packings = [packed(problem, epoch) for epoch in (0, 1, 1)]
    if packings[0] is None:
        return
    assert len({len(packing) for packing in packings}) == 1
    assert list(packings[1]) == list(packings[2])
    step = problem[2]["dp_size"] * problem[2]["gradient_accumulation_steps"]
    if problem[2]["cp_size"] == 1:
        assert len(packings[0]) % step == 0 or all(len(pack) == 1 for pack in packings[0])


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(50, 80), st.integers(1, 6))
def test_places_of_one_step(tokens, window, packs):
    """No document is lost, no pack is too full, and every document is in the pack that first fit would choose."""
    documents = [Waiting(float(length), index, length, 0) for index, length in enumerate(tokens)]
    for place in (least_time, best_fit):
        found, left = place(documents, window, packs)
        assert sorted([*left, *(document for pack in found for document in pack)]) == sorted(documents)
        assert len(found) <= packs and all(found)
        assert all(sum(document.tokens for document in pack) <= window for pack in found)
        assert all(sum(d.tokens for d in pack) + min(d.tokens for d in left) > window for pack in found if left)
        assert left or len(found) == min(packs, len(documents)) or place is best_fit and len(found) < packs
    assert len(cut_up([documents], packs)) == min(packs, len(documents)) if documents else True
    # Brute force: first fit in the same order, trying the fullest pack first.
    rooms = []
    for length in tokens:
        fitting = [room for room in rooms if room >= length]
        room = min(fitting, default=window)
        if fitting:
            rooms.remove(room)
        rooms.append(room - length)
    assert sorted(window - sum(d.tokens for d in pack) for pack in best_fit(documents, window)[0]) == sorted(rooms)


def test_heavy_documents_wait_for_similar_ones_within_the_look_ahead():
    packer = StepPacker(window=100, balanced=True, dp_size=2, look_ahead=2)
    packer.add(0, 90, 90.0, True)
    assert packer.tokens == 0
    packer.add(1, 50, 50.0, True)
    packer.add(2, 10, 10.0, False)
    assert packer.tokens == 10
    packer.add(3, 88, 88.0, True)
    assert packer.tokens == 10 + 90 + 88
    assert [{document.item for document in pack} for pack in packer.step(2)] == [{0}, {3, 2}]
    packer.add(4, 10, 10.0, False)
    assert [{document.item for document in pack} for pack in packer.step(1)] == [{4}]
    packer.add(5, 10, 10.0, False)
    assert [{document.item for document in pack} for pack in packer.step(2)] == [{1}, {5}]


def test_a_document_without_room_is_first_in_the_next_step():
    packer = StepPacker(window=100, balanced=True, dp_size=1, look_ahead=0)
    for item, tokens in enumerate((60, 50, 55)):
        packer.add(item, tokens, float(tokens), False)
    assert [[document.item for document in pack] for pack in packer.step(2)] == [[0], [2]]
    packer.add(3, 99, 99.0, False)
    assert [[document.item for document in pack] for pack in packer.step(1)] == [[1]]


@pytest.mark.parametrize("corpus", ["pile", "magi_real"])
def test_balanced_packs_are_balanced_and_full(corpus):
    lengths = sample_lengths(corpus, 6000)
    options = {"overlong": "truncate", "dp_size": 4, "gradient_accumulation_steps": 2, "cp_size": 8}
    reports = {
        name: pack_lengths(lengths, 32768, method=name, **options).report() for name in ("balanced", "best_fit")
    }
    balanced, best = reports["balanced"], reports["best_fit"]
    assert balanced["micro_step_imbalance"] < 1.08 < best["micro_step_imbalance"]
    assert balanced["step_imbalance"] < 1.06
    assert balanced["fill_rate"] > 0.9 and best["fill_rate"] >= balanced["fill_rate"]
    assert balanced["mean_delay"] < 1 and best["mean_delay"] < 0.5


def test_groups_take_turns_within_a_step():
    """Of two micro-steps with a slow and a fast pack each, every group gets one slow and one fast pack."""
    seconds = pack_lengths([100, 90, 50, 40], 100, dp_size=2, gradient_accumulation_steps=2, look_ahead=0).seconds
    assert (seconds[0] > seconds[1]) != (seconds[2] > seconds[3])


def test_imbalance():
    found = imbalance([2.0, 1.0, 1.0, 2.0, 3.0, 1.0, 9.0], 2, 2)
    assert found["micro_step_imbalance"] == pytest.approx((2 + 2 + 3) / (1.5 + 1.5 + 2))
    assert found["step_imbalance"] == pytest.approx((3 + 3) / (3 + 2))
    assert imbalance([1.0], 2, 2) == {"micro_step_imbalance": 1.0, "step_imbalance": 1.0}


def test_times_add_up_to_the_step_of_one_device():
    """Times add up except for the cost of starting kernels, and of a kernel that does not fill the device.

    There is one call per direction, in which the documents of 235, 40, 40, 6 and 1 blocks start 853 empty ones for
    each of 32 heads.
    """
    model = CostModel.from_config(LLAMA_3_8B, "h100")
    lengths = [30000, 5000, 5000, 700, 11]
    linear, attention = model.document_times(lengths)
    step = model.step_time(plan_documents(lengths, 1))
    assert linear.sum() == pytest.approx(step.linear.sum(), rel=1e-12)
    kernel = model.hardware.kernel
    starts = 2 * model.layers[0].count * (kernel.call_seconds + 853 * 32 * kernel.block_seconds)
    assert attention.sum() + starts == pytest.approx(step.attention.sum(), rel=1e-12)
    assert np.all(np.diff(linear + attention) <= 0)


def test_the_cost_model_decides_which_packs_take_equally_long():
    """One document has the attention of twelve others, but only the per-token work of four."""
    lengths = [4000] + [1000] * 20
    tokens = [
        [sum(piece.stop for piece in pack) for pack in pack_lengths(lengths, 24000, dp_size=2, cost_model=model)]
        for model in (ATTENTION_ONLY, None)
    ]
    assert sorted(tokens[0]) == [8000, 16000] and sorted(tokens[1]) == [12000, 12000]


@pytest.mark.parametrize(
    "lengths, options, message",
    [
        ([5, 0, 3], {}, "Document 1 has 0 tokens"),
        ([5, 30], {}, "Document 1 has 30 tokens, more than the 20 that fit"),
        ([5], {"cp_size": 16}, "A window of 20 tokens is too small for cp_size 16"),
        ([5], {"cp_size": 8}, "too short for a pack of their own"),
        ([20, 20, 5], {"cp_size": 8}, "too short for a pack of their own"),
        ([5], {"method": "worst_fit"}, "There is no packing method 'worst_fit'"),
        ([5], {"overlong": "cut"}, "overlong is 'cut'"),
        ([5], {"dp_size": 0}, "dp_size must be a whole number from 1"),
        ([5], {"look_ahead": -1}, "look_ahead must be a whole number from 0"),
        ([5], {"max_length": 21}, "do not fit in a window of 20"),
        ([30], {"overlong": "drop"}, "There are no documents to pack"),
        ([], {}, "There are no documents to pack"),
    ],
)
def test_bad_input(lengths, options, message):
    with pytest.raises(PlanError, match=message):
        pack_lengths(lengths, 20, **options)


def test_documents_as_long_as_the_window_do_not_hold_up_the_others():
    """With many documents as long as the window, the delay stays short, and packs stay full and balanced."""
    lengths = sample_lengths("pile", 8_000)
    report = pack_lengths(lengths, 4096, overlong="truncate", dp_size=4, gradient_accumulation_steps=2).report()
    assert report["documents_truncated"] > 100 and report["fill_rate"] > 0.9
    assert report["mean_delay"] < 1 and report["micro_step_imbalance"] < 1.02
