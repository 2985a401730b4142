"""`run_scan`: a recurrent layer's scan over all slices of a rank, whatever the recurrence.

    1. run the slices that begin or continue a document that is cut, from zero states
    2. post their summaries (A, B)
    3. run whole documents in the meantime
    4. form the states with which slices begin, and add what they contribute to the outputs of continued slices

Without cuts, only step 3 remains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from ..layout import RankPlan
from ..layout.state_layout import SliceGroup
from .halo import take_rows
from .states import carry_states, exchange_states


class Continued(NamedTuple):
    """The results of slices that continue a document, run from zero states."""

    out: torch.Tensor  # (tokens, H, V)
    decay: torch.Tensor  # A, (n, H, K, K) or (n, H, 1, 1)
    added: torch.Tensor  # B, (n, H, K, V)
    read: Callable[[torch.Tensor], torch.Tensor]  # initial states (n, H, K, V) -> what they add to `out`


class Scan(Protocol):
    """One recurrence with its inputs. Outputs have the rows of one slice after the other."""

    decay_shape: tuple[int, int, int]  # shape of A for one slice: (H, K, K) or (H, 1, 1)
    state_shape: tuple[int, int, int]  # shape of B for one slice: (H, K, V)
    states_like: torch.Tensor  # empty tensor with the device and dtype of A and B; the dtype is at least fp32

    def whole(self, slices: SliceGroup) -> torch.Tensor:
        """Return the outputs (tokens, H, V) of whole documents."""

    def first(self, slices: SliceGroup) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs (tokens, H, V) and last states B (n, H, K, V) of slices that begin a document."""

    def continued(self, slices: SliceGroup) -> Continued:
        """Return the results of slices that continue a document."""


def run_scan(scan: Scan, plan: RankPlan) -> torch.Tensor:
    """Return the output (T_r, H, V) of a recurrent layer for this rank's tokens, as for each document alone.

    Every rank of the plan's group calls it, and its backward.
    """
    states = plan.states
    if not states.any:
        return scan.whole(states.all)
    like = scan.states_like
    decays, added = [like.new_empty(0, *scan.decay_shape)], [like.new_empty(0, *scan.state_shape)]
    outs: list[torch.Tensor] = []
    if len(states.first):
        out, last = scan.first(states.first)
        outs.append(out)
        decays.append(like.new_zeros(len(states.first), *scan.decay_shape))  # multiplies no state
        added.append(last)
    continued = scan.continued(states.continued) if len(states.continued) else None
    if continued is not None:
        outs.append(continued.out)
        decays.append(continued.decay)
        added.append(continued.added)
    decay, add = torch.cat(decays), torch.cat(added)
    transfers = exchange_states(decay, add, plan)
    if len(states.whole):
        outs.append(scan.whole(states.whole))
    out, initial = carry_states(torch.cat(outs), decay, add, plan, transfers)
    if continued is not None:
        begin = sum(states.first.tokens)
        before, out, after = out.tensor_split([begin, begin + len(continued.out)])
        out = torch.cat([before, out + continued.read(initial[len(states.first) :]).to(out.dtype), after])
    return take_rows(out, states.in_order(out.device))
