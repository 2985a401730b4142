"""How the strategy "search" builds its plans, and how many of them."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..caps import Caps


class Settings(NamedTuple):
    """What one construction does differently from others."""

    # Which item too large for a rank has its tail cut off next: the "largest", the "smallest", or one of the "same"
    # document as before until its rest fits.
    order: str = "same"
    whole_first: bool = False  # where items fit but cannot be packed, fill a rank with whole ones before cutting
    token_weight: float = 2.0  # against pairs, when whole items are packed
    load_weight: float = 0.3  # of what a piece of a split document makes its rank send or receive
    reserve: float = 0.0  # tokens of the shortest documents left to later ranks, in multiples of a rank's
    filling: float = 1.0  # of the tokens that a rank needs beside a tail, how much may be short documents


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
"""In the order of what each adds to those before it, on drawn packs."""


class Effort(NamedTuple):
    """How much is tried for batches of up to `most_size` documents + 4 x ranks."""

    most_size: float
    settings: int  # how many are tried first
    targets: int  # plans with one for the busiest rank; also settings, where the first plans are far from the bound
    more_settings: int  # for the least total
    repaired: int  # plans, for the least total
    solves: int  # pairs of ranks planned anew in each


EFFORTS = (
    Effort(90, settings=2, targets=6, more_settings=8, repaired=3, solves=40),
    Effort(400, settings=2, targets=6, more_settings=8, repaired=1, solves=12),
    Effort(1000, settings=2, targets=4, more_settings=8, repaired=1, solves=12),
    Effort(4000, settings=2, targets=2, more_settings=4, repaired=1, solves=8),
    Effort(math.inf, settings=1, targets=1, more_settings=1, repaired=0, solves=0),
)
"""Smallest batches first."""


def effort_for(caps: Caps) -> Effort:
    size = len(caps.lengths) + 4 * caps.cp_size
    return next(effort for effort in EFFORTS if size <= effort.most_size)
