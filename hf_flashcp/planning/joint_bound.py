"""A lower bound of the KV of any plan within the caps that takes the documents together.

The bound of `lower_bound.py` lets every document fill its ranks with the cheapest tokens of all others. But the heads
of other documents cost KV as well, and whole documents have more attention pairs per token than heads.

**Derivation.** Choose a level L >= 0 and a price c > 0 of an attention pair. A token with p + 1 pairs weighs
p + 1 - L. A rank has at most A pairs and at least F tokens, so together its tokens weigh at most w = A - L F. Only
levels with w > 0 are used. Let a_r be the weight of a document's tokens on rank r, D that of the whole document of
d tokens, and W the sum of L - p - 1 over tokens p < L. Every document is called either long or short.

*Short documents.* The KV of a short document is at least the sum over ranks of c max(-a_r, 0), minus a loss of

    c max(V, -D),   where V is the sum of L - p - 1 - 1/c over its tokens for which this is positive.               (3)

To see this, let no token weigh less than -1/c. This lowers the sum by c V at most. Let M be the ranks whose tokens of
the document still weigh less than 0. Each of them adds at most the number of these tokens, which is at most its end.
If the rank with the document's last token is not in M, the KV is at least the sum of these ends. Otherwise let f be
the largest end on ranks outside M, or 0. The KV is at least f, and the ranks in M hold [f, d) and some tokens before
f. If f >= L, then [f, d) weighs at least 0 and the tokens before f add at most f. If f < L, the sum is largest if M
holds all tokens before f too, and is then at most c max(0, -D - V).

*Long documents.* Let G(a) = min(a, 0) + max(a - w, 0). Sum G(a_r) over the long documents on one rank. If no a_r is
above w, this sum is at most 0. Otherwise it is at most the sum of their weights minus w, so at most minus the weight
of the rank's short documents. In both cases c times this sum is at most what the short documents add on this rank. So
the total KV is at least the sum over long documents of

    KV of the document + c g,   where g is the sum of G(a_r) over all ranks,                                        (4)

minus the losses of the short documents. First, g >= -W. Second, take the first j ranks as in `lower_bound.py`. G(a) is
at least a - w on these ranks, and at least min(a, 0) on all others. So [e_j, d) weighs at most g + j w plus the sum of
L - p - 1 over tokens p < min(L, e_j). In other words,

    D - g - j w <= (e_j - L) (e_j - L + 1) / 2   if e_j > L, and   D - g - j w <= 0   otherwise.                    (5)

So (4) is at least the minimum over g of c g + the sum over j of the larger of the least e_j by (5) and by (2). As a
function of g, this is concave between the values at which the larger one changes or e_j drops to 0, and it rises above
them. So the minimum is at one of these values or at g = -W.

A document is called long where that gives more. Any level and price give a bound, and the best are searched for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from .caps import Caps


_LEVELS = 12
"""Number of levels of the first round. Further rounds halve the distance of levels around the best one."""

_ROUNDS = 4

_PRICES = 64

_MOST_RANKS = 1024
"""Above this number of ranks there is no bound, because the work grows with the square."""


def joint_least_kv(caps: Caps, least_ends: Mapping[int, Sequence[int]]) -> int:
    """Return the lower bound of the total KV that this module derives, or 0 if there are too many ranks.

    Args:
        caps (`Caps`): the documents, and what a rank may hold of them.
        least_ends (`Mapping[int, Sequence[int]]`): the least ends e_1, e_2, ... by (2), for lengths that have some.
    """
    if caps.cp_size > _MOST_RANKS:
        return 0
    lengths = Counter(caps.lengths)
    prices = np.geomspace(0.2 / max(lengths), 2.0, _PRICES)
    highest = caps.most_pairs / max(caps.least_together(1), 1)
    step = min(highest, max(lengths)) / _LEVELS
    found: dict[int, float] = {}
    tries = [step * number for number in range(_LEVELS)]
    for _ in range(_ROUNDS + 1):
        for level in map(int, tries):
            if level not in found and level < highest:
                found[level] = _at_level(level, prices, caps, lengths, least_ends)
        best, step = max(found, key=lambda level: found[level]), step / 2
        tries = [max(best - step, 0), best + step]
    return max(math.ceil(max(found.values()) - 1e-3), 0)


def _at_level(
    level: int, prices: np.ndarray, caps: Caps, lengths: Mapping[int, int], least_ends: Mapping[int, Sequence[int]]
) -> float:
    """Return the largest bound for one level over all prices."""
    most_weight = caps.most_pairs - level * caps.least_together(1)
    tokens = np.array(list(lengths))[:, None]
    weights = tokens * (tokens + 1) // 2 - level * tokens
    heads = np.clip(level - 0.5 - 1 / prices, 0, tokens)
    gained = prices * (level * heads - heads * (heads + 1) / 2) - heads
    bounds = -np.maximum(gained, prices * np.maximum(-weights, 0))
    for place in np.flatnonzero(weights > 0):
        floors = np.zeros(caps.cp_size - 1)
        ends = least_ends.get(int(tokens[place, 0]), ())
        floors[: len(ends)] = ends
        as_long = _long_document(int(weights[place, 0]), most_weight, level, floors, prices)
        bounds[place] = np.maximum(bounds[place], as_long)
    total = np.array(list(lengths.values())) @ bounds
    return float(total.max())


def _long_document(weight: int, most_weight: int, level: int, floors: np.ndarray, prices: np.ndarray) -> np.ndarray:
    """Return the least value of (4) for every price, where `floors` are the document's least ends by (2)."""
    least = -level * (level - 1) / 2
    beyond = weight - most_weight * np.arange(1.0, len(floors) + 1)
    used = int(np.count_nonzero((beyond > least) | (floors > 0)))
    beyond, floors = beyond[:used], floors[:used]
    above = np.maximum(floors - level, 0)
    places = np.concatenate(([least], beyond, beyond - above * (above + 1) / 2))
    places = places[places >= least]
    excess = beyond - places[:, None]
    ends = np.where(excess > 0, level + (np.sqrt(1 + 8 * np.maximum(excess, 0)) - 1) / 2, 0)
    sums = np.maximum(ends, floors).sum(1)
    return (prices[:, None] * places + sums).min(1)
