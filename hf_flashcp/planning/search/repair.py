"""Two ranks at a time planned anew: what the strategy "search" does with plans that may still be far from the least.

Everything two ranks hold is put together and shared out again, at their token counts, for the least KV: some items
whole to the one, the rest to the other, and at most one item cut, in up to three parts of which the outer two go to
the same rank (an own head beside a tail). Which items go where is tried exhaustively, short documents in bundles.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from ...plan.slices import Slices, attention_pairs
from .unplaced import Budget


_UNITS = 9
"""Of how many units, besides the one that is cut, every subset is tried."""

_BUNDLES = 4
"""How many of these are several short documents."""

_CUT = 3
"""How many units are tried as the one that is cut."""

_FAR = 2**61

_MOST_WORK = 40_000
"""Slices x ranks of plans that are repaired: thousands of documents split over all ranks take too long to look at."""


class Unit:
    """A piece of a document, or several whole documents (`document` -1), that two ranks share out."""

    def __init__(self, document: int, pieces: list[tuple[int, int, int]]):
        self.document, self.pieces = document, pieces
        self.start, self.stop = pieces[0][1], pieces[-1][2]
        self.tokens = sum(stop - start for _, start, stop in pieces)
        self.pairs = sum(attention_pairs(start, stop) for _, start, stop in pieces)


class Pool:
    """What two ranks hold: units to be shared out, and for each rank what stays because there is too much to try."""

    def __init__(self, held: tuple[list, list], budget: Budget):
        self.cap = budget.most_pairs
        self.tokens = sum(stop - start for _, start, stop in held[0])
        self.pairs = sum(attention_pairs(start, stop) for rank in held for _, start, stop in rank)
        parts: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        whole = []
        for piece in sorted(held[0] + held[1]):
            document, start, stop = piece
            if stop - start == budget.lengths[document]:
                whole.append(piece)
            elif parts[document] and parts[document][-1][2] == start:
                parts[document][-1] = (document, parts[document][-1][1], stop)
            else:
                parts[document].append(piece)
        whole.sort(key=lambda piece: piece[2])
        by_size = sorted(parts.values(), key=lambda pieces: -sum(attention_pairs(*piece[1:]) for piece in pieces))
        self.units: list[Unit] = []
        shared = set()
        room = _UNITS + 1 - min(len(whole), _BUNDLES)
        for pieces in by_size:
            if len(self.units) + len(pieces) <= room:
                self.units += [Unit(piece[0], [piece]) for piece in pieces]
                shared.add(pieces[0][0])
        self.kept = tuple([piece for piece in rank if piece[0] in parts and piece[0] not in shared] for rank in held)
        singles = _UNITS + 1 - len(self.units)
        if len(whole) > singles:
            singles -= _BUNDLES
        bundled = max(len(whole) - singles, 0)
        self.units += [Unit(piece[0], [piece]) for piece in whole[bundled:]]
        self._bundle(whole[:bundled])

    def _bundle(self, whole: list[tuple[int, int, int]]) -> None:
        """Short documents together, each bundle of about twice the tokens of the one before."""
        limit = sum(stop for *_, stop in whole) / (2**_BUNDLES - 1)
        tokens, bundle = 0, []
        for piece in whole:
            bundle.append(piece)
            tokens += piece[2]
            if tokens >= limit or piece is whole[-1]:
                self.units.append(Unit(-1, bundle))
                tokens, bundle, limit = 0, [], 2 * limit

    def cuttable(self) -> list[int]:
        """Units that may be cut: the largest, and the largest that start their document."""
        by_pairs = sorted(range(len(self.units)), key=lambda index: -self.units[index].pairs)
        singles = [index for index in by_pairs if self.units[index].document >= 0]
        from_start = [index for index in singles if not self.units[index].start]
        return list(dict.fromkeys(singles[:2] + from_start[:_CUT]))[:_CUT]

    def slices(self, share: Share) -> tuple[list, list]:
        first, second = list(self.kept[0]), list(self.kept[1])
        others = [unit for index, unit in enumerate(self.units) if index != share.cut]
        for place, unit in enumerate(others):
            (first if share.mask >> place & 1 else second).extend(unit.pieces)
        unit = self.units[share.cut]
        outer, inner = (first, second) if share.outer_first else (second, first)
        low, top = unit.start + share.low, unit.stop - share.top
        for rank, start, stop in ((outer, unit.start, low), (inner, low, top), (outer, top, unit.stop)):
            if start < stop:
                rank.append((unit.document, start, stop))
        return first, second


class Share(NamedTuple):
    """One way to share out a pool: pairs above the cap, KV on top of what the two receive if no document is split
    between them; which unit is cut, which others (by bits) the first rank holds; who gets the outer parts of the cut
    unit, and their tokens."""

    excess: int
    cost: int
    cut: int
    mask: int
    outer_first: bool
    low: int
    top: int


def share_out(pool: Pool) -> Share | None:
    """The best way found, if there is any that keeps the numbers of tokens."""
    return min(filter(None, (_cut(pool, cut) for cut in pool.cuttable())), default=None)


def _cut(pool: Pool, cut: int) -> Share | None:
    """Every subset of the other units on the first rank, the unit `cut` shared out between the two."""
    others = [unit for index, unit in enumerate(pool.units) if index != cut]
    kept = [sum(attention_pairs(*piece[1:]) for piece in pieces) for pieces in pool.kept]
    held = np.array([sum(stop - start for _, start, stop in pool.kept[0])], np.int64)
    pairs = np.array([kept[0]], np.int64)
    for unit in others:
        held = np.concatenate((held, held + unit.tokens))
        pairs = np.concatenate((pairs, pairs + unit.pairs))
    unit = pool.units[cut]
    start, stop = unit.start, unit.stop
    length = stop - start
    missing = pool.tokens - held
    masks = np.flatnonzero((missing >= 0) & (missing <= length))
    if not len(masks):
        return None
    missing, pairs = missing[masks], pairs[masks]
    extra, own = _ends(pool, others, unit.document, masks)
    best = None
    for outer_first in (True, False):
        outer = missing if outer_first else length - missing
        outer_pairs = pairs if outer_first else pool.pairs - unit.pairs - pairs
        # As in `tail_beside_head`: of `outer` tokens at the two ends, the most that can be at the top.
        slope = length - outer
        outer_pairs = outer_pairs + outer * (2 * start + outer + 1) // 2
        top = np.where(slope > 0, (pool.cap - outer_pairs) // np.maximum(slope, 1), outer)
        top = np.clip(top, 0, outer)
        outer_pairs = outer_pairs + top * slope
        excess = np.maximum(outer_pairs - pool.cap, 0) + np.maximum(pool.pairs - outer_pairs - pool.cap, 0)
        inner_end = np.where(slope > 0, stop - top, 0)
        outer_end = np.where(top > 0, stop, np.where(outer > 0, start + outer, 0))
        own_outer, own_inner = own if outer_first else own[::-1]
        cost = extra + np.minimum(np.maximum(own_outer, outer_end), np.maximum(own_inner, inner_end))
        index = int(np.where(excess > 0, _FAR + np.minimum(excess, _FAR), cost).argmin())
        low = int(outer[index] - top[index])
        found = Share(int(excess[index]), int(cost[index]), cut, int(masks[index]), outer_first, low, int(top[index]))
        best = found if best is None else min(best, found)
    return best


def _ends(pool: Pool, others: list[Unit], cut_document: int, masks: np.ndarray):
    """What documents cost of which the two ranks hold several pieces, and where the last pieces of each rank end of
    the document that is cut, its cut unit left out."""
    places = defaultdict(list)
    for place, unit in enumerate(others):
        places[unit.document].append((place, unit.stop))
    ends_kept: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for rank, pieces in enumerate(pool.kept):
        for document, _, stop in pieces:
            ends_kept[document][rank] = max(ends_kept[document][rank], stop)
    extra = np.full(len(masks), sum(map(min, ends_kept.values())), np.int64)
    own = (np.zeros(1, np.int64), np.zeros(1, np.int64))
    for document, parts in places.items():
        if document >= 0 and (len(parts) > 1 or document == cut_document):
            first, second = np.zeros(len(masks), np.int64), np.zeros(len(masks), np.int64)
            for place, end in parts:
                on_first = (masks >> place & 1) * end
                first, second = np.maximum(first, on_first), np.maximum(second, end - on_first)
            if document == cut_document:
                own = (first, second)
            else:
                extra += np.minimum(first, second)
    return extra, own


def repair(slices: Slices, budget: Budget, solves: int) -> Slices:
    """Shares out up to `solves` pairs of ranks anew, those first that have most to gain, as long as that helps."""
    if sum(map(len, slices)) * len(slices) > _MOST_WORK:
        return slices
    slices = [list(held) for held in slices]
    over = [_excess(held, budget) for held in slices]
    version = [0] * len(slices)
    tried = set()
    while True:
        gains = _gains(slices)
        for rank, excess in enumerate(over):
            if excess:
                for other in range(len(slices)):
                    if other != rank:
                        gains[min(rank, other), max(rank, other)] += 0
        ranked = sorted(gains, key=lambda pair: (-over[pair[0]] - over[pair[1]], -gains[pair], pair))
        for pair in ranked:
            first, second = pair
            state = (*pair, version[first], version[second])
            if state in tried:
                continue
            if solves <= 0:
                return slices
            tried.add(state)
            solves -= 1
            pool = Pool((slices[first], slices[second]), budget)
            share = share_out(pool)
            if share and (share.excess, share.cost) < (over[first] + over[second], gains[pair]):
                slices[first], slices[second] = pool.slices(share)
                for rank in pair:
                    version[rank] += 1
                    over[rank] = _excess(slices[rank], budget)
                break
        else:
            return slices


def _excess(held: list, budget: Budget) -> int:
    return max(sum(attention_pairs(start, stop) for _, start, stop in held) - budget.most_pairs, 0)


def shared_cost(first: list, second: list) -> int:
    """What two ranks receive because documents are split between them."""
    return _gains([first, second])[0, 1]


def _gains(slices: Slices) -> dict[tuple[int, int], int]:
    """What pairs of ranks receive because documents are split between them."""
    ends: dict[int, dict[int, int]] = defaultdict(dict)
    for rank, held in enumerate(slices):
        for document, _, stop in held:
            ends[document][rank] = max(ends[document].get(rank, 0), stop)
    gains: dict[tuple[int, int], int] = defaultdict(int)
    for held_to in ends.values():
        for (first, end), (second, other_end) in itertools.combinations(held_to.items(), 2):
            gains[first, second] += min(end, other_end)
    return gains
