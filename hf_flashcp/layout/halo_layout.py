"""`HaloLayout`: the tokens before each slice that a short convolution needs.

A causal convolution of width 4 sees 3 tokens back. Each of the rank's slices is put behind the 3 tokens before it,
which other ranks may hold, or behind zeros where its document begins, so that one call convolves all slices:

    local rows    a3 a4 a5 b0 b1 c0       slices [3, 6) of document a, [0, 2) of b and [0, 1) of c
    padded rows   a0 a1 a2 a3 a4 a5  0  0  0 b0 b1  0  0  0 c0
    kept outputs           a3 a4 a5          b0 b1          c0
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ..plan import ShardPlan
from ..plan.ranges import Ranges
from .row_exchange import RowExchange
from .rows import Rows


class HaloMaps(NamedTuple):
    """The padded rows of a rank, and the rows that they hold."""

    kept: Rows  # padded rows that hold the rank's own tokens
    own_places: Rows  # padded rows before slices that hold tokens of this rank
    own_sources: Rows  # these tokens' rows
    places: Rows  # padded rows before slices that hold received tokens
    sources: Rows  # these tokens' rows among those received


class HaloLayout:
    """The index maps of a convolution of `width` tokens on one rank.

    Args:
        plan (`ShardPlan`): a valid plan.
        rank (`int`): rank within the plan.
        width (`int`): number of tokens that an output depends on, its own included.

    Attributes:
        exchange (`RowExchange`): the exchange of tokens.
        num_padded (`int`): number of padded rows.
        halo_tokens (`list[int]`): number of tokens before each slice that its first tokens see.
        pieces (`list[tuple[int, int]]`): the padded rows of each slice and of these tokens, as (start, stop).
    """

    def __init__(self, plan: ShardPlan, rank: int, width: int):
        self.exchange = RowExchange(plan, rank, width)
        own = self.exchange.own
        starts, lengths = own.spans.starts, own.spans.lengths
        halo = np.minimum(starts - own.bases, width - 1)
        zeros = width - 1 - halo
        zeros[:1] = 0  # the kernel pads the first slice itself
        ends = (zeros + halo + lengths).cumsum()
        self.num_padded = int(ends[-1])
        self.halo_tokens: list[int] = halo.tolist()
        self.pieces = list(zip((ends - lengths - halo).tolist(), ends.tolist()))
        self._kept = Ranges(ends - lengths, ends)
        before = halo > 0
        sources = self.exchange.places(Ranges(starts - halo, starts).select(before))
        places = Ranges(ends - lengths - halo, ends - lengths).select(before).cut(sources.lengths.cumsum())
        num_tokens = own.spans.total
        mine = sources.starts < num_tokens
        received = sources.select(~mine)
        self._halo = (
            (places.select(mine), sources.select(mine)),
            (places.select(~mine), Ranges(received.starts - num_tokens, received.stops - num_tokens)),
        )
        self._on: dict[torch.device, HaloMaps] = {}

    def on(self, device: torch.device) -> HaloMaps:
        """Return the maps with their index tensors on `device`."""
        if device not in self._on:
            halo = (Rows(each).to(device) for pair in self._halo for each in pair)
            self._on[device] = HaloMaps(Rows(self._kept).to(device), *halo)
        return self._on[device]

    def copy_maps(self, device: torch.device) -> None:
        """Start copying all index tensors to `device`."""
        self.on(device)
        self.exchange.stages(device)
