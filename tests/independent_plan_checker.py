"""Checks a plan without code of the library: partition, tokens, attention pairs and exact KV volumes.

It counts with NumPy arrays over single tokens, so batches should have at most a few hundred thousand tokens.
"""

import numpy as np


def check_plan(lengths, cp_size, slices):
    """Assert that the slices are a partition and no rank is empty, and return counts per rank.

    They are `tokens`, `pairs`, and KV `received` and `sent`, where each token is sent once to each rank that needs it.
    `states_received` and `states_sent` count runs of tokens on the same rank: the state of each run is sent to every
    other rank that holds a later token of the document. `state_grads_received` and `state_grads_sent` count the same
    for ranks that hold an earlier one.
    """
    assert len(slices) == cp_size
    owner = [np.full(length, -1, dtype=np.int64) for length in lengths]
    for rank, pieces in enumerate(slices):
        assert len(pieces) > 0, f"rank {rank} is empty"
        for document, start, stop in pieces:
            assert 0 <= document < len(lengths) and 0 <= start < stop <= lengths[document], (
                rank,
                document,
                start,
                stop,
            )
            assert (owner[document][start:stop] == -1).all(), f"document {document} [{start}, {stop}) is held twice"
            owner[document][start:stop] = rank
    tokens, pairs, received, sent = (np.zeros(cp_size, dtype=np.int64) for _ in range(4))
    for document, ranks in enumerate(owner):
        assert (ranks >= 0).all(), f"document {document} has tokens on no rank"
        tokens += np.bincount(ranks, minlength=cp_size)
        np.add.at(pairs, ranks, np.arange(1, len(ranks) + 1))
        for holder in np.unique(ranks):
            # The last query of this rank attends to every key before it.
            needed = ranks[: np.flatnonzero(ranks == holder)[-1]]
            foreign = needed[needed != holder]
            received[holder] += len(foreign)
            sent += np.bincount(foreign, minlength=cp_size)
    assert received.sum() == sent.sum()
    counts = {"tokens": tokens, "pairs": pairs, "received": received, "sent": sent}
    for name, way in (("states", 1), ("state_grads", -1)):
        counts[f"{name}_received"], counts[f"{name}_sent"] = _states([ranks[::way] for ranks in owner], cp_size)
    return counts


def _states(owner, cp_size):
    """Count the runs of tokens that each rank receives from, and sends to, a rank with a later token."""
    received, sent = np.zeros((2, cp_size), dtype=np.int64)
    for ranks in owner:
        starts = [0, *(np.flatnonzero(ranks[1:] != ranks[:-1]) + 1)]
        for start in starts:
            later = set(ranks[start:].tolist()) - {ranks[start]}
            received[list(later)] += 1
            sent[ranks[start]] += len(later)
    return received, sent


def costs(counts):
    """Return the total KV that is sent, and the largest max(received, sent) of a rank."""
    return int(counts["received"].sum()), int(max(counts["received"].max(), counts["sent"].max()))


def assert_caps(counts, max_token_imbalance):
    """Assert the caps. Tokens must be equal within one, or at most `max_token_imbalance` times the mean."""
    tokens = counts["tokens"]
    cap = max_token_imbalance * tokens.sum() / len(tokens)
    assert tokens.max() - tokens.min() <= 1 or tokens.max() <= np.ceil(cap), tokens
