"""Re-plans pairs of ranks, which the strategy "search" does for plans that may still be far from the least KV.

Everything that two ranks hold is pooled and divided again for the least KV, such that both keep their numbers of
tokens. At most one item is cut, into up to three parts, and the two outer parts go to the same rank (an own head and a
tail). All other items go to either rank whole. All divisions are tried, with short documents in bundles.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from ...plan.slices import Slice, Slices, attention_pairs
from ..caps import Caps


_UNITS = 9
"""Number of units of which every subset is tried, not counting the unit that is cut."""

_BUNDLES = 4
"""How many of these units are bundles of short documents."""

_CUT = 3
"""How many units are tried as the one that is cut."""

_FAR = 2**61

_MOST_WORK = 40_000
"""The most slices x ranks in a plan to repair. Plans in which thousands of documents are split over all ranks would
take too long."""


class Unit:
    """A piece of a document, or a bundle of whole documents (`document` is -1), that goes to one of two ranks."""

    def __init__(self, document: int, pieces: list[Slice]):
        self.document, self.pieces = document, pieces
        self.start, self.stop = pieces[0].start, pieces[-1].stop
        self.tokens, self.pairs = _held_tokens(pieces), _held_pairs(pieces)


class Pool:
    """Everything that two ranks hold.

    Attributes:
        units (`list[Unit]`): the units to divide between the ranks.
        kept (`tuple[list[Slice], list[Slice]]`): the slices that stay on each rank, because there are too many to try.
        tokens (`int`): number of tokens of the first rank.
        pairs (`int`): number of attention pairs of both ranks.
    """

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
        """Put short documents into bundles, each with about twice the tokens of the one before."""
        limit = _held_tokens(whole) / (2**_BUNDLES - 1)
        tokens, bundle = 0, []
        for piece in whole:
            bundle.append(piece)
            tokens += piece.tokens
            if tokens >= limit or piece is whole[-1]:
                self.units.append(Unit(-1, bundle))
                tokens, bundle, limit = 0, [], 2 * limit

    def cuttable(self) -> list[int]:
        """Return the units that may be cut: the largest, and the largest that begin at the start of a document."""
        by_pairs = sorted(range(len(self.units)), key=lambda index: -self.units[index].pairs)
        singles = [index for index in by_pairs if self.units[index].document >= 0]
        from_start = [index for index in singles if not self.units[index].start]
        return list(dict.fromkeys(singles[:2] + from_start[:_CUT]))[:_CUT]

    def slices(self, share: Share) -> tuple[list[Slice], list[Slice]]:
        """Return the slices of both ranks after the pool is divided as `share` says."""
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
    """Return the whole documents, shortest first, and the pieces of each other document, with adjacent ones joined."""
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
    """One way to divide a pool between two ranks. Smaller shares are better."""

    excess: int  # attention pairs above the cap, on both ranks together
    cost: int  # tokens whose KV travels because documents are split between the two ranks
    cut: int  # index of the unit that is cut
    mask: int  # bit i says whether the first rank gets the i-th of the other units
    outer_first: bool  # whether the first rank gets the two outer parts of the cut unit
    low: int  # tokens of the outer part at the unit's start
    top: int  # tokens of the outer part at the unit's end


def share_out(pool: Pool) -> Share | None:
    """Return the best division found, or `None` if none keeps the ranks' numbers of tokens."""
    return min(filter(None, (_cut(pool, cut) for cut in pool.cuttable())), default=None)


def _cut(pool: Pool, cut: int) -> Share | None:
    """Return the best division with the unit `cut` divided, over all subsets of the other units on the first rank."""
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
    """The rank that gets the outer parts of the cut unit. Arrays have an entry per subset of the other units."""

    first: bool  # whether this is the first rank
    tokens: np.ndarray  # tokens of the outer parts
    pairs: np.ndarray  # attention pairs of everything else that the rank holds
    own: np.ndarray  # where the rank's last piece of the cut document ends, except the cut unit
    inner_own: np.ndarray  # where that of the other rank ends


def _outer_parts(pool: Pool, cut: int, masks: np.ndarray, extra: np.ndarray, outer: Outer) -> Share:
    """Return the best division for the given outer rank: its subset, and the lengths of the two outer parts."""
    unit, tokens = pool.units[cut], outer.tokens
    # As in `tail_beside_head`, the part at the unit's end is as long as the cap on pairs allows.
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
    """Return the cost of documents of which the two ranks hold several pieces, for each subset; and where each rank's
    last piece of the cut document ends, except the cut unit."""
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
    """Re-plan up to `solves` pairs of ranks, those with the most to gain first, as long as that helps.

    Returns the slices of every rank, or `None` for plans that would take too long.
    """
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
    """Return [`shared_costs`], extended by all pairs of ranks of which one has too many attention pairs."""
    gains = shared_costs(slices)
    for rank, excess in enumerate(over):
        if excess:
            for other in range(len(slices)):
                if other != rank:
                    gains[min(rank, other), max(rank, other)] += 0
    return gains


def shared_costs(slices: Slices) -> dict[tuple[int, int], int]:
    """Return, for pairs of ranks, the tokens whose KV travels because documents are split between the two."""
    ends: dict[int, dict[int, int]] = defaultdict(dict)
    for rank, held in enumerate(slices):
        for document, _, stop in held:
            ends[document][rank] = max(ends[document].get(rank, 0), stop)
    gains: dict[tuple[int, int], int] = defaultdict(int)
    for held_to in ends.values():
        for (first, end), (second, other_end) in itertools.combinations(held_to.items(), 2):
            gains[first, second] += min(end, other_end)
    return gains
