"""Determines which rows travel between ranks in each stage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from ..plan.stage_traffic import KeyPiece, LocalSlice, StageTraffic
from .rows import concatenated, row_numbers
from .stage import SecondStep


def rows_of_slices(slices: Iterable[LocalSlice]) -> np.ndarray:
    """Return the local rows of slices, (n,) int64, slice by slice."""
    return row_numbers((row, row + stop - start) for _, start, stop, row in slices)


class Routes(NamedTuple):
    """How the rows of one stage travel to and from one rank.

    In a hierarchical exchange `sent` and the splits describe its first step.
    """

    sent: np.ndarray  # (n,) int64, the local rows that the rank sends, by destination
    send_splits: list[int]  # number of rows for each rank
    recv_splits: list[int]  # number of rows from each rank
    received: list[KeyPiece]  # the keys that the rank needs, by source
    second_step: SecondStep | None = None


def direct_routes(traffic: StageTraffic, rank: int) -> Routes:
    """Return the routes of one rank's rows in a stage in which rows go directly to every rank that needs them."""
    sent = [rows_of_slices(traffic.slices(rank, target)) for target in range(traffic.plan.cp_size)]
    received, counts = traffic.received(rank)
    return Routes(concatenated(sent), [len(rows) for rows in sent], counts, received)
