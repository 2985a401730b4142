"""Whole items on ranks under two budgets, tokens and attention pairs: the second half of a plan of "search"."""

from __future__ import annotations

import heapq
import math

from ...plan.slices import Slice, Slices, attention_pairs
from .unplaced import Item


_COMPARED = 16


def longest_tail(start: int, stop: int, pairs: int) -> int:
    """How many tokens from the end of [start, stop) hold at most `pairs` attention pairs."""
    rest = stop * (stop + 1) // 2 - pairs
    if rest <= start * (start + 1) // 2:
        return stop - start
    # The shortest prefix h with h (h + 1) / 2 >= rest.
    return stop - ((math.isqrt(8 * rest - 7) - 1) // 2 + 1)


def pack(
    items: list[Item], shares: list[int], most_pairs: int, token_weight: float, loads_of: dict[int, float], cuts: bool
) -> Slices | None:
    """Whole items on empty ranks, longest processing time first on pairs and tokens together. Then pairs are brought
    under `most_pairs` by swaps, and tokens to `shares` by moves, swaps and head cuts. `None` where that fails.

    Args:
        shares (`list[int]`): the most tokens of each rank, largest first.
        token_weight (`float`): weight of tokens against pairs.
    """
    ranks = len(shares)
    items = sorted(items, reverse=True)
    pair_weight = 1 / most_pairs
    token_weight /= shares[0]
    pieces: list[list[Item]] = [[] for _ in range(ranks)]
    pairs, tokens = [0] * ranks, [0] * ranks
    loads = [(0.0, rank) for rank in range(ranks)]
    for item in items:
        item_pairs, document, start, stop = item
        load, rank = loads[0]
        pieces[rank].append(item)
        pairs[rank] += item_pairs
        tokens[rank] += stop - start
        load += item_pairs * pair_weight + (stop - start) * token_weight + loads_of.get(document, 0.0)
        heapq.heapreplace(loads, (load, rank))
    fullest = sorted(range(ranks), key=lambda rank: -tokens[rank])
    by_rank = [0] * ranks
    for share, rank in zip(shares, fullest):
        by_rank[rank] = share
    _lower_pairs(pieces, pairs, tokens, shares[0], most_pairs, cuts)
    if max(pairs) > most_pairs or not _equalize(pieces, pairs, tokens, by_rank, most_pairs, cuts):
        return None
    return [[Slice(document, start, stop) for _, document, start, stop in held] for held in pieces]


def _exchange(pieces, pairs, tokens, donor: int, given: Item, receiver: int, taken: Item | None) -> None:
    pieces[donor].remove(given)
    pieces[receiver].append(given)
    moved_pairs, moved_tokens = given[0], given[3] - given[2]
    if taken:
        pieces[receiver].remove(taken)
        pieces[donor].append(taken)
        moved_pairs -= taken[0]
        moved_tokens -= taken[3] - taken[2]
    pairs[donor] -= moved_pairs
    pairs[receiver] += moved_pairs
    tokens[donor] -= moved_tokens
    tokens[receiver] += moved_tokens


def _move_head(pieces, pairs, tokens, donor: int, item: Item, head: int, receiver: int) -> None:
    """Cuts the first `head` tokens off an item of the donor and gives them to the receiver."""
    item_pairs, document, start, stop = item
    moved_pairs = attention_pairs(start, start + head)
    pieces[donor].remove(item)
    pieces[donor].append((item_pairs - moved_pairs, document, start + head, stop))
    pieces[receiver].append((moved_pairs, document, start, start + head))
    pairs[donor] -= moved_pairs
    pairs[receiver] += moved_pairs
    tokens[donor] -= head
    tokens[receiver] += head


def _lower_pairs(pieces, pairs, tokens, share: int, most_pairs: int, cuts: bool) -> None:
    """Swaps items of the rank with the most pairs against smaller ones elsewhere until all are under `most_pairs`, or
    nothing helps."""
    ranks = range(len(pairs))
    for _ in range(2 * len(pairs)):
        donor = max(ranks, key=pairs.__getitem__)
        if pairs[donor] <= most_pairs:
            return
        best, move = pairs[donor], None
        for receiver in sorted(ranks, key=pairs.__getitem__)[:4]:
            if receiver == donor:
                continue
            others = [(0, None), *((item[0], item) for item in pieces[receiver][:_COMPARED])]
            for item in pieces[donor][:_COMPARED]:
                for other_pairs, other in others:
                    change = item[0] - other_pairs
                    if change > 0:
                        peak = max(pairs[donor] - change, pairs[receiver] + change)
                        if peak < best:
                            best, move = peak, (item, receiver, other)
        if move is None:
            if not cuts or not _cut_for_pairs(pieces, pairs, tokens, share, most_pairs, donor):
                return
            continue
        _exchange(pieces, pairs, tokens, donor, *move)


def _cut_for_pairs(pieces, pairs, tokens, share: int, most_pairs: int, donor: int) -> bool:
    """Gives a head that brings a rank under `most_pairs`, with room for the tokens it will then lack, to the rank with
    the most room. Whether it could."""
    receiver = min(range(len(pairs)), key=pairs.__getitem__)
    room = most_pairs - pairs[receiver]
    item = max(pieces[donor], key=lambda item: (-item[2], item[3]))
    item_pairs, _, start, stop = item
    head = 0
    for _ in range(3):
        lacking = max(share - tokens[donor] + head, 0)
        # One head, or short documents of a quarter of the average pairs a token.
        over = pairs[donor] - most_pairs + most_pairs // 64
        over += min(lacking * (lacking + 1) // 2, lacking * most_pairs // (4 * share))
        longer = stop - start - longest_tail(start, stop, item_pairs - min(over, room))
        if longer >= stop - start:
            break
        head = longer
    if head and attention_pairs(start, start + head) > room:
        head -= 1
    if head <= 0:
        return False
    _move_head(pieces, pairs, tokens, donor, item, head, receiver)
    return True


def _equalize(pieces, pairs, tokens, shares: list[int], most_pairs: int, cuts: bool) -> bool:
    """Moves whole items, swaps pairs of them, and as a last resort moves heads, until no rank has more tokens than
    its share, in place. Whether that worked."""
    ranks = range(len(tokens))
    cuts_left = len(tokens) if cuts else 0
    for _ in range(6 * len(tokens) + 12):
        excess = [held - share for held, share in zip(tokens, shares)]
        over = max(excess)
        if over <= 0:
            return True
        donor = excess.index(over)
        done = False
        for receiver in sorted(ranks, key=excess.__getitem__)[:3]:
            owed = min(over, -excess[receiver])
            if owed <= 0:
                break
            if _give(pieces, pairs, tokens, donor, receiver, owed, most_pairs):
                done = True
                break
        if not done:
            # Whoever lacks tokens has no room for pairs: it gives a head, and gets shorter documents for it.
            cuts_left -= 1
            neediest = min(ranks, key=excess.__getitem__)
            if cuts_left < 0 or not _cut_for_pairs(pieces, pairs, tokens, shares[neediest], most_pairs, neediest):
                return False
    return False


def _give(pieces, pairs, tokens, donor: int, receiver: int, owed: int, most_pairs: int) -> bool:
    """Moves up to `owed` tokens by the best of: a whole item, a swap of two, the head of an item, one item against
    several. Of the room for pairs, tokens may use up their share. Whether it could."""
    room, donor_room = most_pairs - pairs[receiver], most_pairs - pairs[donor]
    best, given, taken = 0, None, None
    mine = sorted((item[3] - item[2], item) for item in pieces[donor])
    others = sorted((item[3] - item[2], item) for item in pieces[receiver])[:_COMPARED]
    for length, item in mine:
        if best < length <= owed and item[0] * owed <= room * length:
            best, given = length, item
    if best < owed:
        for length, item in mine[:_COMPARED]:
            for other_length, other in others:
                gain = length - other_length
                if best < gain <= owed and -donor_room <= item[0] - other[0]:
                    if (item[0] - other[0]) * owed <= room * gain:
                        best, given, taken = gain, item, other
    if best < owed / 2:
        cuts = [item for length, item in mine if length > owed]
        if cuts:
            item = min(cuts, key=lambda cut: (cut[2], cut[3]))
            if attention_pairs(item[2], item[2] + owed) <= room:
                _move_head(pieces, pairs, tokens, donor, item, owed, receiver)
                return True
    if given is None:
        return _give_several(pieces, pairs, tokens, donor, receiver, owed, room)
    _exchange(pieces, pairs, tokens, donor, given, receiver, taken)
    return True


def _give_several(pieces, pairs, tokens, donor: int, receiver: int, owed: int, room: int) -> bool:
    """Swaps one item of a receiver that has no room for pairs left for several of the donor, all but one of them its
    shortest: more tokens, hardly more pairs. Whether it could."""
    donor_room = room + pairs[receiver] - pairs[donor]
    mine = sorted(pieces[donor], key=lambda item: item[3] - item[2])
    best, move = 0, None
    for other in pieces[receiver]:
        for first in [None, *mine[-_COMPARED:]]:
            gained_tokens = (first[3] - first[2] if first else 0) - other[3] + other[2]
            gained_pairs = (first[0] if first else 0) - other[0]
            for count, item in enumerate(mine):
                if gained_tokens > owed or gained_pairs > room:
                    break
                if gained_tokens > best and gained_pairs >= -donor_room:
                    best, move = gained_tokens, (other, first, mine[:count])
                if item is first:
                    break
                gained_tokens += item[3] - item[2]
                gained_pairs += item[0]
    if move is None:
        return False
    other, first, group = move
    group = group + [first] if first else group
    _exchange(pieces, pairs, tokens, donor, group[0], receiver, other)
    for item in group[1:]:
        _exchange(pieces, pairs, tokens, donor, item, receiver, None)
    return True
