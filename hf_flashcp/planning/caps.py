"""`Caps`: what ranks may hold."""

from __future__ import annotations

import math

from ..plan.slices import attention_pairs


ROUNDING = 1e-12
"""Relative. Caps are raised by it, so that no plan which meets them in floating point is beyond the bound."""


class Caps:
    """What ranks may hold.

    Args:
        lengths: tokens of each document.
        cp_size: number of ranks N.
        max_imbalance: the most attention pairs of a rank, as a multiple of the mean.
        max_token_imbalance: the most tokens of a rank, likewise; where that leaves no room, equal within one.

    Attributes:
        most_pairs (`int`): attention pairs a rank may hold (A).
        most_tokens (`int`): tokens a rank may hold.
    """

    def __init__(self, lengths: tuple[int, ...], cp_size: int, max_imbalance: float, max_token_imbalance: float):
        self.cp_size, self.total_tokens = cp_size, sum(lengths)
        total_pairs = sum(attention_pairs(0, length) for length in lengths)
        self.most_pairs = _floor_of_share(total_pairs, cp_size, max_imbalance)
        self.share, self.left_over = divmod(self.total_tokens, cp_size)
        cap = _floor_of_share(self.total_tokens, cp_size, max_token_imbalance)
        self.equal = cap <= self.share
        self.most_tokens = self.share + (self.left_over > 0) if self.equal else cap

    def most(self, ranks: int) -> int:
        """The most tokens that so many ranks may hold together (T_j)."""
        if self.equal:
            return ranks * self.share + min(ranks, self.left_over)
        return min(ranks * self.most_tokens, self.total_tokens - (self.cp_size - ranks))

    def least(self, ranks: int) -> int:
        """The fewest tokens that so many ranks may hold together (F_j): what the others cannot, and one each."""
        return max(self.total_tokens - self.most(self.cp_size - ranks), ranks)


def _floor_of_share(total: int, cp_size: int, cap: float) -> int:
    return total if cap >= cp_size else math.floor(cap * total / cp_size * (1 + ROUNDING))
