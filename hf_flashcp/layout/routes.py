"""Determines which rows travel between ranks in each stage."""

from __future__ import annotations

from typing import NamedTuple

from ..plan.ranges import Ranges
from ..plan.stage_traffic import StageTraffic
from .second_step import SecondStep


class Routes(NamedTuple):
    """How the rows of one stage travel to and from one rank.

    In a hierarchical exchange `sent` and the splits describe its first step.
    """

    sent: Ranges  # the local rows that the rank sends, by destination
    send_splits: list[int]  # number of rows for each rank
    recv_splits: list[int]  # number of rows from each rank
    second_step: SecondStep | None = None


def direct_routes(traffic: StageTraffic, rank: int) -> Routes:
    """Return the routes of one rank's rows in a stage in which rows go directly to every rank that needs them."""
    sent, received, cp_size = traffic.sent(rank), traffic.received(rank), traffic.plan.cp_size
    return Routes(
        sent.sender_rows, sent.tokens_by(sent.receivers, cp_size), received.tokens_by(received.senders, cp_size)
    )
