"""Settings of the strategy "search": how it builds plans, and how many it builds."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..caps import Caps


class Settings(NamedTuple):
    """The choices that differ between constructions."""

    # Which of the items that are too large for a rank has its tail cut off next: the "largest", the "smallest", or a
    # piece of the "same" document as before, until the rest of that document fits.
    order: str = "same"
    whole_first: bool = False  # if items fit but cannot be packed, fill a rank with whole items before cutting
    token_weight: float = 2.0  # weight of tokens against pairs when whole items are packed
    load_weight: float = 0.3  # weight of the KV that a piece of a split document makes its rank send or receive
    reserve: float = 0.0  # tokens of the shortest documents to leave to later ranks, in multiples of a rank's tokens
    filling: float = 1.0  # largest fraction of the tokens beside a tail that short documents may fill


SETTINGS = (
    Settings(),
    Settings("largest", whole_first=True, token_weight=0.7, reserve=0.05),
    Settings("smallest"),
    Settings("same", whole_first=True, token_weight=0.7, reserve=0.5),
    Settings("largest", whole_first=True, reserve=0.3),
    Settings("smallest", token_weight=0.7, reserve=0.1),
    Settings("largest", whole_first=True, token_weight=0.7),
    Settings("same", whole_first=True, reserve=0.15),
    Settings("largest", whole_first=True, filling=0.7),
    Settings("largest", whole_first=True, filling=0.4),
)
"""Settings in the order of how much each improves on those before it, on sampled packs."""


class Effort(NamedTuple):
    """The numbers of plans to try for batches in which documents + 4 x ranks is at most `most_size`."""

    most_size: float
    settings: int  # settings that are tried first
    targets: int  # plans with a target for the busiest rank; also settings to try if the first plans are far off
    more_settings: int  # further settings, for the least total
    repaired: int  # plans to repair, for the least total
    solves: int  # pairs of ranks to re-plan in each repaired plan


EFFORTS = (
    Effort(90, settings=2, targets=6, more_settings=8, repaired=3, solves=40),
    Effort(400, settings=2, targets=6, more_settings=8, repaired=1, solves=12),
    Effort(1000, settings=2, targets=4, more_settings=8, repaired=1, solves=12),
    Effort(4000, settings=2, targets=2, more_settings=4, repaired=1, solves=8),
    Effort(math.inf, settings=1, targets=1, more_settings=1, repaired=0, solves=0),
)
"""Efforts, for the smallest batches first."""


def effort_for(caps: Caps) -> Effort:
    """Return the effort for the batch of some caps."""
    size = len(caps.lengths) + 4 * caps.cp_size
    return next(effort for effort in EFFORTS if size <= effort.most_size)
