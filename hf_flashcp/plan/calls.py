"""Counts the calls of one attention layer on each rank: collectives, kernels, and copies of rows."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from .rectangles import key_ranges
from .slices import HeldSlice, Slice, slices_by_document
from .stage_traffic import KeyPiece


if TYPE_CHECKING:
    from .shard_plan import ShardPlan


Calls = dict[str, list[int]]
"""Number of calls per rank, forward and backward together: `collectives` (the same on every rank), `kernel_calls` (of
a kernel that takes any number of sequences) and `copies` (passes over rows; K and V count as one)."""


def full_attention_calls(plan: ShardPlan) -> Calls:
    """Count the calls of one full-attention layer.

    A copy is one pass over rows. A rank that sends rows makes two for all stages together: it packs the rows, and adds
    the gradients that come back. For each stage in which it receives rows, a rank makes one copy to merge the stage's
    result. It makes two more if the keys of some slice do not arrive in one range ([`key_ranges`]): one to put the
    keys in document order, and one to put their gradients back in order of arrival.
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
    """Count the calls of a layer whose window is shorter than some document.

    There is one stage. Its keys are assembled from received and local rows, which takes two passes in forward and two
    in backward. Its results need no merging: they are written to their rows in one pass.
    """
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
    """Return, by receiver and sender, the documents of which tokens travel, in ascending order."""
    travels: list[dict[int, list[int]]] = [defaultdict(list) for _ in range(cp_size)]
    for document in sorted(held):
        # The ranks that receive each rank's slices are those that hold a later slice. They are kept as a bit mask.
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
    """Return whether [`key_ranges`] finds a range for each of the receiver's slices.

    `documents` lists the documents that each source sends. Only a document from several sources can fail. Its last
    slice needs all of its pieces, so they must be adjacent in the buffer; if they are, the other slices are checked.
    """
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
