"""Contracted plans: what recurrent layers exchange where a plan cuts documents.

A recurrent layer needs one state from each earlier slice of a document, however long the slice is. So its exchange is
that of full attention under a plan in which every slice is one token long:

    document 0 of 100 tokens     rank 0: [0, 30)   rank 1: [30, 60) [80, 100)   rank 2: [60, 80)
    contracted to 4 tokens       rank 0: [0, 1)    rank 1: [1, 2)   [3, 4)      rank 2: [2, 3)

Gradients of states flow from later slices to earlier ones, as if the contracted documents ran backwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .slice_table import SliceColumns
from .slices import Slice, runs_by_document
from .traffic import full_attention_traffic


if TYPE_CHECKING:
    from .shard_plan import ShardPlan


class Contracted(NamedTuple):
    """The lengths and slices of a contracted plan. It has only the documents that are cut, numbered from 0."""

    lengths: list[int]
    slices: list[list[Slice]]  # slices of each rank; none on ranks that hold whole documents only


def contracted(slices: Sequence[Sequence[Slice]], *, backwards: bool = False) -> Contracted:
    """Return the contracted plan of each rank's slices, or that of the documents read `backwards`.

    Adjacent slices on the same rank count as one.
    """
    cut = [[rank for rank, _ in runs] for runs in runs_by_document(slices).values() if len(runs) > 1]
    of_ranks: list[list[Slice]] = [[] for _ in slices]
    for document, ranks in enumerate(cut):
        for place, rank in enumerate(reversed(ranks) if backwards else ranks):
            of_ranks[rank].append(Slice(document, place, place + 1))
    return Contracted([len(ranks) for ranks in cut], of_ranks)


def contracted_plan(plan: ShardPlan, *, backwards: bool = False) -> ShardPlan:
    """Return the contracted plan of a plan, with one more document of one token on each rank.

    These documents come last. Without them ranks could be empty, which plans do not allow.
    """
    holders, ranks = plan.slice_table.holders, np.arange(plan.cp_size)
    cut = np.flatnonzero(holders.place + holders.left)
    lengths = (holders.place + holders.left + 1)[cut][holders.place[cut] == 0]
    documents = np.cumsum(holders.place[cut] == 0) - 1
    places = (holders.left if backwards else holders.place)[cut]
    columns = SliceColumns.by_rank(
        plan.cp_size,
        np.append(holders.ranks[cut], ranks),
        np.append(documents, len(lengths) + ranks),
        np.append(places, np.zeros_like(ranks)),
        np.append(places + 1, np.ones_like(ranks)),
    )
    every = [*lengths.tolist(), *[1] * plan.cp_size]
    return type(plan).from_columns(every, plan.cp_size, columns, ranks_per_node=plan.ranks_per_node)


def states_moved(slices: Sequence[Sequence[Slice]], *, backwards: bool = False) -> tuple[list[int], list[int]]:
    """Return `(received, sent)`, the slices whose states each rank receives and sends in a recurrent layer's forward.

    A rank that holds slices of a document that is cut receives the states of all slices before its own last one,
    except its own. With `backwards` the counts are those of backward, where it receives the gradients of all slices
    after its own first one, except its own.
    """
    return full_attention_traffic(contracted(slices, backwards=backwards).slices)
