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

from ...plan.slices import Slice, Slices, attention_pairs
from ..caps import Caps


_UNITS = 9
"""Units of which every subset is tried, besides the one that is cut."""

_BUNDLES = 4
"""How many of these are several short documents."""

_CUT = 3
"""How many units are tried as the one that is cut."""

_FAR = 2**61

_MOST_WORK = 40_000
"""Slices x ranks of plans that are repaired: thousands of documents split over all ranks take too long to look at."""


class Unit:
    """A piece of a document, or several whole documents (`document` -1), that two ranks share out."""

    def __init__(self, document: int, pieces: list[Slice]):
        self.document, self.pieces = document, pieces
        self.start, self.stop = pieces[0].start, pieces[-1].stop
        self.tokens, self.pairs = _held_tokens(pieces), _held_pairs(pieces)


class Pool:
    """What two ranks hold: units to be shared out, and for each rank what stays there because there is too much to
    try. `tokens` are of the first rank, `pairs` of both."""

    def __init__(self, held: tuple[list[Slice], list[Slice]], caps: Caps):
        self.most_pairs = caps.most_pairs
        self.tokens, self.pairs = _held_tokens(held[0]), _held_pairs(held[0]) + _held_pairs(held[1])
        whole, parts = _whole_and_parts(held[0] + held[1], caps)
        self.units: list[Unit] = []
        kept = set(parts)
        room = _UNITS + 1 - min(len(whole), _BUNDLES)
        for pieces in sorted(parts.values(), key=_held_pairs, reverse=True):
            if len(self.units) + len(pieces) <= room:
                self.units += [Unit(piece.document, [piece]) for piece in pieces]
                kept.remove(pieces[0].document)
        first, second = ([piece for piece in rank if piece.document in kept] for rank in held)
        self.kept = first, second
        singles = _UNITS + 1 - len(self.units)
        if len(whole) > singles:
            singles -= _BUNDLES
        bundled = max(len(whole) - singles, 0)
        self.units += [Unit(piece.document, [piece]) for piece in whole[bundled:]]
        self._bundle(whole[:bundled])

    def _bundle(self, whole: list[Slice]) -> None:
        """Short documents together, each bundle of about twice the tokens of the one before."""
        limit = _held_tokens(whole) / (2**_BUNDLES - 1)
        tokens, bundle = 0, []
        for piece in whole:
            bundle.append(piece)
            tokens += piece.tokens
            if tokens >= limit or piece is whole[-1]:
                self.units.append(Unit(-1, bundle))
                tokens, bundle, limit = 0, [], 2 * limit

    def cuttable(self) -> list[int]:
        """Units that may be cut: the largest, and the largest that start their document."""
        by_pairs = sorted(range(len(self.units)), key=lambda index: -self.units[index].pairs)
        singles = [index for index in by_pairs if self.units[index].document >= 0]
        from_start = [index for index in singles if not self.units[index].start]
        return list(dict.fromkeys(singles[:2] + from_start[:_CUT]))[:_CUT]

    def slices(self, share: Share) -> tuple[list[Slice], list[Slice]]:
        first, second = list(self.kept[0]), list(self.kept[1])
        others = [unit for index, unit in enumerate(self.units) if index != share.cut]
        for place, unit in enumerate(others):
            (first if share.mask >> place & 1 else second).extend(unit.pieces)
        unit = self.units[share.cut]
        outer, inner = (first, second) if share.outer_first else (second, first)
        low, top = unit.start + share.low, unit.stop - share.top
        for rank, start, stop in ((outer, unit.start, low), (inner, low, top), (outer, top, unit.stop)):
            if start < stop:
                rank.append(Slice(unit.document, start, stop))
        return first, second


def _held_tokens(held: list[Slice]) -> int:
    return sum(stop - start for _, start, stop in held)


def _held_pairs(held: list[Slice]) -> int:
    return sum(attention_pairs(start, stop) for _, start, stop in held)


def _whole_and_parts(held: list[Slice], caps: Caps) -> tuple[list[Slice], dict[int, list[Slice]]]:
    """Whole documents, the shortest first, and pieces of other documents, those that touch joined."""
    whole: list[Slice] = []
    parts: dict[int, list[Slice]] = defaultdict(list)
    for piece in sorted(held):
        document, start, stop = piece
        if stop - start == caps.lengths[document]:
            whole.append(piece)
        elif parts[document] and parts[document][-1].stop == start:
            parts[document][-1] = Slice(document, parts[document][-1].start, stop)
        else:
            parts[document].append(piece)
    return sorted(whole, key=lambda piece: piece.stop), parts


class Share(NamedTuple):
    """One way to share out a pool: which unit is cut, which others the first rank holds (by bits), and who gets how
    many tokens of the cut unit's outer parts. `cost` is KV on top of what the two receive if no document is split
    between them."""

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
    unit, others = pool.units[cut], [unit for index, unit in enumerate(pool.units) if index != cut]
    held = np.array([_held_tokens(pool.kept[0])], np.int64)
    pairs = np.array([_held_pairs(pool.kept[0])], np.int64)
    for other in others:
        held = np.concatenate((held, held + other.tokens))
        pairs = np.concatenate((pairs, pairs + other.pairs))
    missing, length = pool.tokens - held, unit.stop - unit.start
    masks = np.flatnonzero((missing >= 0) & (missing <= length))
    if not len(masks):
        return None
    missing, pairs = missing[masks], pairs[masks]
    extra, (own_first, own_second) = _ends(pool, others, unit.document, masks)
    other_pairs = pool.pairs - unit.pairs - pairs
    first = Outer(True, missing, pairs, own_first, own_second)
    second = Outer(False, length - missing, other_pairs, own_second, own_first)
    return min(_outer_parts(pool, cut, masks, extra, outer) for outer in (first, second))


class Outer(NamedTuple):
    """The rank that gets the outer parts of the cut unit, for each subset of the other units on the first rank: the
    tokens of these parts, the pairs of what it holds besides, and where its and the other rank's last pieces of the
    cut document end."""

    first: bool
    tokens: np.ndarray
    pairs: np.ndarray
    own: np.ndarray
    inner_own: np.ndarray


def _outer_parts(pool: Pool, cut: int, masks: np.ndarray, extra: np.ndarray, outer: Outer) -> Share:
    """The best subset, and how the rank's tokens of the cut unit are divided between its two ends."""
    unit, tokens = pool.units[cut], outer.tokens
    # As in `tail_beside_head`: of the tokens at the two ends, the most that can be at the top.
    slope = unit.stop - unit.start - tokens
    pairs = outer.pairs + tokens * (2 * unit.start + tokens + 1) // 2
    top = np.where(slope > 0, (pool.most_pairs - pairs) // np.maximum(slope, 1), tokens)
    top = np.clip(top, 0, tokens)
    pairs = pairs + top * slope
    excess = np.maximum(pairs - pool.most_pairs, 0) + np.maximum(pool.pairs - pairs - pool.most_pairs, 0)
    inner_end = np.where(slope > 0, unit.stop - top, 0)
    outer_end = np.where(top > 0, unit.stop, np.where(tokens > 0, unit.start + tokens, 0))
    cost = extra + np.minimum(np.maximum(outer.own, outer_end), np.maximum(outer.inner_own, inner_end))
    index = int(np.where(excess > 0, _FAR + np.minimum(excess, _FAR), cost).argmin())
    low = int(tokens[index] - top[index])
    return Share(int(excess[index]), int(cost[index]), cut, int(masks[index]), outer.first, low, int(top[index]))


def _ends(pool: Pool, others: list[Unit], cut_document: int, masks: np.ndarray):
    """The cost of documents of which the two ranks hold several pieces; and, of the document that is cut, where each
    rank's last piece ends, the cut unit left out."""
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


def repair(slices: Slices, caps: Caps, solves: int) -> Slices | None:
    """The same plan with up to `solves` pairs of ranks shared out anew, those first that have most to gain, as long as
    that helps; `None` for plans that take too long to look at."""
    if sum(map(len, slices)) * len(slices) > _MOST_WORK:
        return None
    slices = [list(held) for held in slices]
    over = [_excess(held, caps) for held in slices]
    version = [0] * len(slices)
    tried: set[tuple[int, int, int, int]] = set()
    going_on = True
    while going_on:
        going_on = False
        gains = _gains_of_pairs(slices, over)
        for pair in sorted(gains, key=lambda pair: (-over[pair[0]] - over[pair[1]], -gains[pair], pair)):
            first, second = pair
            state = (first, second, version[first], version[second])
            if state in tried:
                continue
            if solves <= 0:
                break
            tried.add(state)
            solves -= 1
            pool = Pool((slices[first], slices[second]), caps)
            share = share_out(pool)
            if share and (share.excess, share.cost) < (over[first] + over[second], gains[pair]):
                slices[first], slices[second] = pool.slices(share)
                for rank in pair:
                    version[rank] += 1
                    over[rank] = _excess(slices[rank], caps)
                going_on = True
                break
    return slices


def _excess(held: list[Slice], caps: Caps) -> int:
    return max(_held_pairs(held) - caps.most_pairs, 0)


def _gains_of_pairs(slices: Slices, over: list[int]) -> dict[tuple[int, int], int]:
    """[`shared_costs`], with all pairs of ranks of which one has too many attention pairs."""
    gains = shared_costs(slices)
    for rank, excess in enumerate(over):
        if excess:
            for other in range(len(slices)):
                if other != rank:
                    gains[min(rank, other), max(rank, other)] += 0
    return gains


def shared_costs(slices: Slices) -> dict[tuple[int, int], int]:
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
