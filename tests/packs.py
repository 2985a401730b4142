"""Document lengths for several tests: cases from other context-parallel projects, and random ones."""

import numpy as np
from hypothesis import strategies as st

from hf_flashcp.planning import STRATEGIES, ShardPlan, plan_documents


def from_cu_seqlens(bounds):
    return [stop - start for start, stop in zip(bounds, bounds[1:])]


# Packs from the tests and bug reports of other projects, in tokens.
KNOWN_PACKS = {
    "ring_flash_attention": from_cu_seqlens([0, 120, 1248, 4232]),
    "ring_flash_attention_128": from_cu_seqlens([0, 128, 1248, 4240]),
    "fewer_tokens_than_chunks": from_cu_seqlens([0, 7, 14, 16]),
    "one_long": [1024],
    "short_long_short": [32, 956, 68],
    "halves": [512, 512],
    "mixed": from_cu_seqlens([0, 388, 788, 988, 1008, 1024]),
    "blocks_of_128": from_cu_seqlens([0, 128, 256, 384, 512, 640, 768, 1050]),
    "six_of_150": [150] * 6,
    "odd": from_cu_seqlens([0, 2, 9, 13, 23]),
    "tiny": from_cu_seqlens([0, 3, 5, 9]),
    "uneven": from_cu_seqlens([0, 7, 18, 23]),
    "ids": [3, 3, 1, 2],
    "three": [100, 80, 44],
    "one": [120],
    "aligned": [256],
    "small": [40, 30, 25],
    "small_2": [50, 40, 38],
    "small_3": [70, 20, 20],
    "two": [20, 10],
    "thousands": [300, 400, 324],
    "long_short": [700, 324],
    "seven": [100, 150, 200, 250, 124, 100, 100],
    "prime_like": [105, 163, 105, 163],
    "single_tokens": [1] * 7,
    "giant_and_tiny": [400, 1, 2, 1, 3],
}


def plans_of(name, cp_size):
    """The plans of a known pack under every strategy, each plan once: on one rank they are all the same."""
    plans = [plan_documents(KNOWN_PACKS[name], cp_size, strategy=strategy) for strategy in STRATEGIES]
    return list({tuple(map(tuple, plan.slices)): plan for plan in plans}.values())


@st.composite
def packs(draw, cp_size=None, max_documents=6, max_length=40):
    """Draw `(lengths, cp_size)` with at least one token per rank."""
    cp_size = cp_size or draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, max_length), min_size=1, max_size=max_documents))
    if sum(lengths) < cp_size:
        lengths[0] += cp_size
    return lengths, cp_size


@st.composite
def arbitrary_plans(draw, cp_size=None):
    """Draw any valid plan, with documents split anywhere, and several slices of a document on one rank."""
    lengths, cp_size = draw(packs(cp_size))
    pieces = []
    for document, length in enumerate(lengths):
        cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=8))) if length > 1 else []
        pieces += [(document, start, stop) for start, stop in zip([0, *cuts], [*cuts, length])]
    owners = draw(st.lists(st.integers(0, cp_size - 1), min_size=len(pieces), max_size=len(pieces)))
    slices = [[] for _ in range(cp_size)]
    for piece, owner in zip(pieces, owners):
        slices[owner].append(piece)
    for rank in range(cp_size):
        if not slices[rank]:  # give an empty rank the first token of the longest slice on another rank
            donor, piece = max(
                ((other, piece) for other in range(cp_size) for piece in slices[other]),
                key=lambda entry: (len(slices[entry[0]]) > 1, entry[1][2] - entry[1][1]),
            )
            document, start, stop = piece
            slices[donor].remove(piece)
            slices[rank].append((document, start, start + 1 if stop - start > 1 else stop))
            if stop - start > 1:
                slices[donor].append((document, start + 1, stop))
    return ShardPlan(lengths, cp_size, slices)


def owners(plan):
    """Return for each document the rank of every token, (length,)."""
    found = [np.full(length, -1) for length in plan.lengths]
    for rank, held in enumerate(plan.slices):
        for document, start, stop in held:
            found[document][start:stop] = rank
    return found
