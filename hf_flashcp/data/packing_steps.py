"""Packing of arriving documents into optimizer steps: the documents of each pack, and the packs of each micro-step."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from typing import NamedTuple


SIMILAR = 0.05
"""Heavy documents are similar if their times differ by at most this share."""


class Waiting(NamedTuple):
    """A document, or a unit of several, that is waiting for a pack. Documents sort by time."""

    seconds: float  # predicted on one device
    item: int
    tokens: int
    step: int  # optimizer step that was being filled when the document arrived


class StepPacker:
    """A packer that takes documents, and returns the packs of one optimizer step after another.

    With `balanced`, each document goes to the pack that takes the least time, and a heavy document waits up to
    `look_ahead` steps for `dp_size - 1` others that are [`SIMILAR`]. Otherwise each document goes to the pack that it
    fits best. `tokens` and `documents` count what is available for the next step.
    """

    def __init__(self, window: int, balanced: bool, dp_size: int, look_ahead: int):
        self.window, self.balanced, self.dp_size, self.look_ahead = window, balanced, dp_size, look_ahead
        self.steps = self.tokens = self.documents = 0
        self._left: list[Waiting] = []
        self._pool: list[Waiting] = []
        self._heavy: list[Waiting] = []

    def add(self, item: int, tokens: int, seconds: float, heavy: bool) -> None:
        document = Waiting(seconds, item, tokens, self.steps)
        if heavy and self.balanced and self.look_ahead:
            bisect.insort(self._heavy, document)
            first = self._most_similar([bisect.bisect_left(self._heavy, document)])
            run = self._heavy[first : first + self.dp_size]
            if len(run) == self.dp_size and run[-1].seconds <= (1 + SIMILAR) * run[0].seconds:
                self._release(first)
        else:
            self._to_pool([document])

    @property
    def waiting_tokens(self) -> int:
        """Tokens of the heavy documents that wait for similar ones, and are not available for the next step."""
        return sum(document.tokens for document in self._heavy)

    def release(self) -> bool:
        """Make the most similar heavy documents available for the next step, and return whether there were any."""
        if not self._heavy:
            return False
        self._release(self._most_similar(range(len(self._heavy))))
        return True

    def step(self, packs: int) -> list[list[Waiting]]:
        """Return the packs of the next step, none of them empty; fewer than requested if documents run out."""
        while self._heavy:
            oldest = min(range(len(self._heavy)), key=lambda index: self._heavy[index].step)
            if self._heavy[oldest].step + self.look_ahead > self.steps:
                break
            self._release(self._most_similar([oldest]))
        documents, self._pool = self._left + sorted(self._pool, reverse=True), []
        found, self._left = (least_time if self.balanced else best_fit)(documents, self.window, packs)
        self.documents, self.tokens = len(self._left), sum(document.tokens for document in self._left)
        self.steps += 1
        return found

    def take_rest(self) -> list[Waiting]:
        """Return all documents that are left, and forget them."""
        rest = self._left + self._pool + self._heavy
        self._left, self._pool, self._heavy, self.documents, self.tokens = [], [], [], 0, 0
        return rest

    def _most_similar(self, among: Sequence[int]) -> int:
        """Return the start of the run of `dp_size` heavy documents whose times differ least.

        Only runs that contain one of the documents `among` are considered.
        """
        heavy, size = self._heavy, min(self.dp_size, len(self._heavy))
        firsts = range(max(among[0] - size + 1, 0), min(among[-1], len(heavy) - size) + 1)
        return min(firsts, key=lambda first: heavy[first + size - 1].seconds / heavy[first].seconds)

    def _release(self, first: int) -> None:
        run = self._heavy[first : first + self.dp_size]
        del self._heavy[first : first + self.dp_size]
        self._to_pool(run)

    def _to_pool(self, documents: list[Waiting]) -> None:
        self._pool += documents
        self.documents += len(documents)
        self.tokens += sum(document.tokens for document in documents)


def least_time(documents: Sequence[Waiting], window: int, packs: int) -> tuple[list[list[Waiting]], list[Waiting]]:
    """Put each document, in the given order, in the pack with room for it that takes the least time.

    Returns `(packs, left)`: at most the requested number of packs, none of them empty, and the documents for which
    there was no room.
    """
    found: list[list[Waiting]] = [[] for _ in range(packs)]
    room = [window] * packs
    times = [(0.0, index) for index in range(packs)]
    left, shortest = [], min((document.tokens for document in documents), default=0)
    for document in documents:
        full = []
        while times and room[times[0][1]] < document.tokens:
            full.append(heapq.heappop(times))
        if times:
            seconds, index = times[0]
            heapq.heapreplace(times, (seconds + document.seconds, index))
            found[index].append(document)
            room[index] -= document.tokens
        else:
            left.append(document)
        for each in full:
            if room[each[1]] >= shortest:
                heapq.heappush(times, each)
    return [pack for pack in found if pack], left


def best_fit(
    documents: Sequence[Waiting], window: int, packs: int | None = None
) -> tuple[list[list[Waiting]], list[Waiting]]:
    """Put each document, in the given order, in the pack with the least room that is enough for it.

    Returns `(packs, left)`: the requested number of packs, or fewer if there are fewer documents, and the documents
    for which there was no room.
    """
    found: list[list[Waiting]] = []
    spaces: list[int] = []
    with_space: dict[int, list[list[Waiting]]] = {}
    left = []
    for document in documents:
        at = bisect.bisect_left(spaces, document.tokens)
        if at < len(spaces):
            space = spaces[at]
            pack = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[at]
        elif len(found) == packs:
            left.append(document)
            continue
        else:
            space, pack = window, []
            found.append(pack)
        pack.append(document)
        space -= document.tokens
        if space:
            if space not in with_space:
                with_space[space] = []
                bisect.insort(spaces, space)
            with_space[space].append(pack)
    return (found if packs is None else cut_up(found, packs)), left


def cut_up(packs: list[list[Waiting]], count: int) -> list[list[Waiting]]:
    """Return `count` packs, by halving the slowest ones; fewer if there are fewer documents."""
    done = [pack for pack in packs if len(pack) == 1]
    several = [(-pack_seconds(pack), index, pack) for index, pack in enumerate(packs) if len(pack) > 1]
    heapq.heapify(several)
    number = len(packs)
    while several and len(several) + len(done) < count:
        _, _, pack = heapq.heappop(several)
        for half in least_time(sorted(pack, reverse=True), 1 << 62, 2)[0]:
            number += 1
            if len(half) > 1:
                heapq.heappush(several, (-pack_seconds(half), number, half))
            else:
                done.append(half)
    return done + [pack for _, _, pack in several]


def arrange(packs: Sequence[list[Waiting]], dp_size: int, gradient_accumulation_steps: int) -> list[list[Waiting]]:
    """Return the packs of one or several steps in training order.

    The packs of a micro-step take about the same time, and so do all packs of each data-parallel group over a step.
    """
    packs = sorted(packs, key=pack_seconds, reverse=True)
    micro_steps = [packs[start : start + dp_size] for start in range(0, len(packs), dp_size)]
    steps = -(-len(micro_steps) // gradient_accumulation_steps)
    last = [micro_steps.pop()] if len(packs) % dp_size else []
    micro_steps = [micro_step for first in range(steps) for micro_step in micro_steps[first::steps]] + last
    ordered = []
    for first in range(0, len(micro_steps), gradient_accumulation_steps):
        totals = [0.0] * dp_size
        for micro_step in micro_steps[first : first + gradient_accumulation_steps]:
            # The slowest pack goes to the group with the least time so far.
            groups = sorted(range(len(micro_step)), key=totals.__getitem__)
            for group, pack in sorted(zip(groups, micro_step)):
                totals[group] += pack_seconds(pack)
                ordered.append(pack)
    return ordered


def pack_seconds(pack: Sequence[Waiting]) -> float:
    """Return the predicted seconds of a pack on one device."""
    return sum(document.seconds for document in pack)
