"""What the engine calls on each rank in one attention layer: collectives, kernels, and passes that copy rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from .slices import HeldSlice, Slice, slices_by_document


if TYPE_CHECKING:
    from .shard_plan import ShardPlan


Calls = dict[str, list[int]]
"""Calls of each rank, forward and backward together: `collectives` (the same on every rank), `kernel_calls` of a
kernel that takes any number of sequences, and `copies`, passes over rows, K and V together."""


class KeyPiece(NamedTuple):
    """`tokens` tokens of a document from `start` on, at row `offset` of a buffer of keys."""

    document: int
    start: int
    tokens: int
    offset: int = 0


def key_ranges(arrived: Sequence[KeyPiece], slices: Sequence[Slice]) -> list[tuple[int, int]] | None:
    """Rows of a buffer where each slice finds the keys before it, `(0, 0)` for one that needs none; `None` if a
    slice's keys are not in one range. The pieces that have arrived lie one behind the other, whatever their `offset`,
    and none straddles a slice."""
    pieces: dict[int, list[KeyPiece]] = defaultdict(list)
    offset = 0
    for document, start, tokens, _ in arrived:
        pieces[document].append(KeyPiece(document, start, tokens, offset))
        offset += tokens
    found = []
    for document, start, _ in slices:
        before = [piece for piece in pieces.get(document, ()) if piece.start < start]
        if not before:
            found.append((0, 0))
            continue
        first, last = min(piece.offset for piece in before), before[-1].offset + before[-1].tokens
        if last - first != sum(piece.tokens for piece in before):
            return None
        found.append((first, last))
    return found


def full_attention_calls(plan: ShardPlan) -> Calls:
    """Calls of one full-attention layer.

    A copy is one pass over rows: packing what is sent and adding the gradients that come home, for all stages at once,
    where the rank sends anything; for each stage that brings something, merging its result, and, where the keys of a
    slice do not arrive in one range ([`key_ranges`]), putting them in document order and their gradients back.
    """
    held, cp_size = slices_by_document(plan.slices), plan.cp_size
    travels = _travelling_documents(held, cp_size)
    senders = {sender for from_ranks in travels for sender in from_ranks}
    collectives, kernel_calls = 0, [2] * cp_size
    copies = [2 if rank in senders else 0 for rank in range(cp_size)]
    for offsets in plan.stage_offsets:
        exists = False
        for receiver, from_ranks in enumerate(travels):
            sources = [sender for sender in sorted(from_ranks) if (receiver - sender) % cp_size in offsets]
            if sources:
                exists = True
                kernel_calls[receiver] += 2
                documents = [from_ranks[source] for source in sources]
                copies[receiver] += 1 if _arrive_in_order(receiver, sources, documents, held) else 3
        collectives += 2 * exists
    return {"collectives": [collectives] * cp_size, "kernel_calls": kernel_calls, "copies": copies}


def window_calls(plan: ShardPlan, window: int) -> Calls:
    """Calls of a layer whose window is shorter than some document: there is one stage, and its keys are put together
    from what arrives and what is local, forward and back in two passes each; results are not merged but put in their
    places."""
    _, sent = plan.kv_moved(window)
    kernel_calls, copies = [], []
    for rank_slices, rows in zip(plan.slices, sent):
        waits = window > 1 and any(start > 0 for _, start, _ in rank_slices)
        local = any(start == 0 or stop - start >= window for _, start, stop in rank_slices)
        kernel_calls.append(2 * (waits + local))
        copies.append((2 if rows else 0) + 5 * waits)
    collectives = [2 if any(sent) else 0] * plan.cp_size
    return {"collectives": collectives, "kernel_calls": kernel_calls, "copies": copies}


def _travelling_documents(held: dict[int, list[HeldSlice]], cp_size: int) -> list[dict[int, list[int]]]:
    """By receiver and sender the documents of which something travels, ascending."""
    travels: list[dict[int, list[int]]] = [defaultdict(list) for _ in range(cp_size)]
    for document in sorted(held):
        # Receivers of each rank's slices: the ranks that hold a later one, as a bit mask.
        receivers, later = dict.fromkeys((rank for *_, rank in held[document]), 0), 0
        for *_, rank in reversed(held[document]):
            receivers[rank] |= later
            later |= 1 << rank
        for sender, mask in receivers.items():
            for receiver in receivers:
                if receiver != sender and mask >> receiver & 1:
                    travels[receiver][sender].append(document)
    return travels


def _arrive_in_order(
    receiver: int, sources: list[int], documents: list[list[int]], held: dict[int, list[HeldSlice]]
) -> bool:
    """Whether [`key_ranges`] finds a range for each of the receiver's slices. `documents` are those that each source
    sends. Only documents from several sources can fail: the last slice of a document needs all of its pieces, so these
    must touch; then the other slices count."""
    among = set(sources)
    places: dict[int, list[int]] = defaultdict(list)
    for place, of_source in enumerate(documents):
        for document in of_source:
            places[document].append(place)
    for document, where in places.items():
        for place, following in zip(where, where[1:]):
            if following != place + 1 or documents[place][-1] != document or documents[following][0] != document:
                return False
        if len(where) > 1:
            own = [Slice(document, start, stop) for start, stop, rank in held[document] if rank == receiver]
            arriving = sorted(
                (rank, start, stop) for start, stop, rank in held[document] if rank in among and start < own[-1].stop
            )
            if key_ranges([KeyPiece(document, start, stop - start) for _, start, stop in arriving], own) is None:
                return False
    return True
