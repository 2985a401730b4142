import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hf_flashcp.data
from hf_flashcp.data import LENGTH_DISTRIBUTIONS, sample_lengths, sample_pack
from hf_flashcp.errors import PlanError


DISTRIBUTIONS = json.loads(Path(hf_flashcp.data.__file__).with_name("length_distributions.json").read_text())

# Documents, mean and percentiles 50, 90 and 99 in tokens, from the corpora themselves.
PUBLISHED = {
    "pile": (153_407_073, 833, 272, 1_743, 8_464),
    "prolong64k": (25_565_583, 981, 374, 1_567, 11_100),
    "prolong512k": (20_336_686, 970, 344, 1_395, 8_000),
    "magi_real": (13_463_214, 1_717, 549, 2_711, 20_800),
    "wlb_llm": (99_519, 3_962, 3_227, 5_784, 26_100),
}


def test_names():
    assert set(LENGTH_DISTRIBUTIONS) == set(PUBLISHED) == set(DISTRIBUTIONS)


@pytest.mark.parametrize("name", LENGTH_DISTRIBUTIONS)
def test_bins_are_ordered_counted_and_cited(name):
    source, bins = DISTRIBUTIONS[name]["source"], DISTRIBUTIONS[name]["bins"]
    assert "arXiv:" in source or "github.com/" in source
    assert sum(count for *_, count in bins) == PUBLISHED[name][0]
    assert all(low < high and count > 0 for low, high, count in bins)
    # Each bin begins at the end of the previous one, or right after it.
    assert all(after[0] - before[1] in (0, 1) for before, after in zip(bins, bins[1:]))


@pytest.mark.parametrize("name", LENGTH_DISTRIBUTIONS)
def test_drawn_lengths_follow_the_corpus(name):
    lengths = np.array(sample_lengths(name, 100_000, seed=1))
    documents, mean, *percentiles = PUBLISHED[name]
    assert abs(lengths.mean() / mean - 1) < 0.05
    assert np.abs(np.percentile(lengths, [50, 90, 99]) / percentiles - 1).max() < 0.06
    bins = DISTRIBUTIONS[name]["bins"]
    assert lengths.min() >= 1 and lengths.max() <= bins[-1][1]
    for (low, high, count), share in zip(bins, [((lengths >= b[0]) & (lengths <= b[1])).mean() for b in bins]):
        assert abs(share - count / documents) < 0.008, (low, high)


def test_lengths_inside_a_bin_are_log_uniform():
    low, high, _ = DISTRIBUTIONS["pile"]["bins"][4]
    lengths = np.array([length for length in sample_lengths("pile", 50_000) if low <= length <= high])
    middle = (low * (high + 1)) ** 0.5
    assert {lengths.min(), lengths.max()} == {low, high}
    assert abs((lengths < middle).mean() - 0.5) < 0.02


def test_draws_are_deterministic_and_fewer_are_a_prefix_of_more():
    lengths = sample_lengths("pile", 1000, seed=7)
    assert all(type(length) is int for length in lengths)
    assert lengths == sample_lengths("pile", 1000, seed=7)
    assert lengths[:300] == sample_lengths("pile", 300, seed=7)
    assert lengths != sample_lengths("pile", 1000, seed=8)
    assert sample_lengths("pile", 4) == [257, 11, 962, 391]
    assert sample_lengths("pile", 0) == []


@pytest.mark.parametrize("name", LENGTH_DISTRIBUTIONS)
@pytest.mark.parametrize("window", [1, 100, 131_072])
def test_a_pack_fills_its_window_with_the_drawn_documents(name, window):
    for seed in range(4):
        pack = sample_pack(name, window, seed=seed)
        drawn = sample_lengths(name, len(pack), seed=seed)
        assert sum(pack) == window and min(pack) >= 1
        assert pack[:-1] == drawn[:-1] and pack[-1] <= drawn[-1]


@pytest.mark.parametrize(
    "draw, message",
    [
        (lambda: sample_lengths("redpajama", 3), "Unknown length distribution 'redpajama': choose one of 'pile', "),
        (lambda: sample_pack("wlb-llm", 3), "'wlb_llm'"),
        (lambda: sample_pack("pile", 0), "window must be at least 1, got 0"),
        (lambda: sample_pack("pile", 1e5), "window must be an integer, got 100000.0"),
        (lambda: sample_lengths("pile", -1), "count must be at least 0, got -1"),
        (lambda: sample_lengths("pile", 1, seed=-1), "seed must be at least 0, got -1"),
    ],
)
def test_errors_about_drawing_lengths(draw, message):
    with pytest.raises(PlanError, match=message):
        draw()


def test_drawing_needs_no_torch_and_the_collator_comes_on_demand():
    code = """
import sys
import hf_flashcp.data
print(sum(hf_flashcp.data.sample_pack("pile", 4096)), "FlashCPCollator" in dir(hf_flashcp.data))
assert not {"torch", "transformers"} & sys.modules.keys()
from hf_flashcp.data import FlashCPCollator
assert "torch" in sys.modules
print(FlashCPCollator.__module__)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["4096", "True", "hf_flashcp.data.collator"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hf_flashcp.data.nothing  # noqa: B018
