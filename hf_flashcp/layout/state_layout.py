"""`StateLayout`: which states of recurrent layers a rank sends and receives, and how it forms its own from them.

The states of a document pass from slice to slice. A rank that holds slices 2 and 4 of a document receives what slices
0, 1 and 3 do to a state, and goes through slices 0 to 3 in order. [`~plan.contracted`] draws the plan of this
exchange.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from ..plan import ShardPlan
from ..plan.contracted import contracted_plan
from ..plan.ranges import Ranges
from ..plan.slices import LocalSlice, local_slices
from .row_exchange import RowExchange
from .rows import Rows
from .upload import upload


class Step(NamedTuple):
    """One step of every chain that is long enough: state <- A state + B, with A and B of the chain's next slice."""

    chains: int  # number of chains that take this step, which are the first ones
    reaching: torch.Tensor  # (n,) int64, those of them that arrive at a slice of this rank
    reached: torch.Tensor  # (n,) int64, these slices, as numbers like those of `StateExchange.order`


class Chains(NamedTuple):
    """How the states of a rank's slices follow from those of other slices. There is a chain for each cut document, the
    longest first."""

    sources: torch.Tensor  # (sum of chains over steps,) int64, rows of the rank's own (A, B) followed by received ones
    steps: tuple[Step, ...]


class StateExchange:
    """The exchange of states in one direction, and what follows from it.

    Args:
        plan (`ShardPlan`): a plan that cuts documents.
        rank (`int`): rank within the plan.
        backwards (`bool`): whether gradients travel, from later slices to earlier ones.

    Attributes:
        rows (`RowExchange`): the exchange of (A, B), one row per slice.
        order (`np.ndarray`): (n,) int64, the slice in each of the rank's own rows, as a number among the `first`
            slices followed by the `continued` ones of [`StateLayout`].
    """

    def __init__(self, plan: ShardPlan, rank: int, backwards: bool):
        short = contracted_plan(plan, backwards=backwards)
        self.rows = RowExchange(short, rank)
        own = self.rows.own.select(slice(0, -1))
        self._documents, self._places, self._bases = own.documents, own.spans.starts - own.bases, own.bases
        places = np.array(short.lengths)[self._documents] - 1 - self._places if backwards else self._places
        self.order = np.argsort(np.lexsort((places, self._documents, places > 0)))
        self._on: dict[torch.device, tuple[torch.Tensor, Chains]] = {}

    def on(self, device: torch.device) -> tuple[torch.Tensor, Chains]:
        """Return `order` and the chains with their index tensors on `device`."""
        if device not in self._on:

            def up(array: np.ndarray) -> torch.Tensor:
                return upload(torch.from_numpy(array), device)

            sources, steps = self._chains()
            chains = Chains(up(sources), tuple(Step(count, up(chain), up(number)) for count, chain, number in steps))
            self._on[device] = up(self.order), chains
        return self._on[device]

    def _chains(self) -> tuple[np.ndarray, list[tuple[int, np.ndarray, np.ndarray]]]:
        """Return what [`Chains`] holds, as arrays."""
        _, first, chain_of = np.unique(self._documents, return_index=True, return_inverse=True)
        lengths = np.zeros(len(first), dtype=np.int64)  # number of steps of each chain
        np.maximum.at(lengths, chain_of, self._places)
        longest_first = np.argsort(-lengths, kind="stable")
        lengths, bases = lengths[longest_first], self._bases[first][longest_first]
        chain_of = np.argsort(longest_first)[chain_of]
        sources, steps = [np.empty(0, dtype=np.int64)], []
        for place in range(int(lengths.max(initial=0))):
            count = int((lengths > place).sum())
            rows = self.rows.places(Ranges(bases[:count] + place, bases[:count] + place + 1)).starts
            sources.append(rows - (rows > len(self._places)))
            reached = np.flatnonzero(self._places == place + 1)
            steps.append((count, chain_of[reached], self.order[reached]))
        return np.concatenate(sources), steps


class SliceGroup:
    """Some of a rank's slices, which a kernel runs together.

    Attributes:
        slices (`tuple[LocalSlice, ...]`): the slices, in the order of their rows.
        tokens (`list[int]`): number of tokens of each slice.
    """

    def __init__(self, slices: Iterable[LocalSlice]):
        self.slices = tuple(slices)
        self.tokens = [each.tokens for each in self.slices]
        self._on: dict[torch.device, tuple[Rows, torch.Tensor, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self.slices)

    def rows(self, device: torch.device) -> Rows:
        """Return the rows of all slices, one slice after the other."""
        return self._maps(device)[0]

    def cu_seqlens(self, device: torch.device) -> torch.Tensor:
        """Return where each slice begins among these rows, and where the last one ends: (n + 1,) int32."""
        return self._maps(device)[1]

    def seq_idx(self, device: torch.device) -> torch.Tensor:
        """Return the number of each row's slice in the group: (1, tokens) int32."""
        return self._maps(device)[2]

    def _maps(self, device: torch.device) -> tuple[Rows, torch.Tensor, torch.Tensor]:
        if device not in self._on:
            rows = Rows(Ranges.of((each.row, each.row + each.tokens) for each in self.slices)).to(device)
            tokens = torch.tensor(self.tokens)
            edges = torch.cat([tokens.new_zeros(1), tokens.cumsum(0)]).to(torch.int32)
            numbers = torch.arange(len(self), dtype=torch.int32).repeat_interleave(tokens)[None]
            self._on[device] = rows, upload(edges, device), upload(numbers, device)
        return self._on[device]


class StateLayout:
    """The rank's slices as recurrent layers run them, and the exchanges of their states.

    Args:
        plan (`ShardPlan`): a valid plan.
        rank (`int`): rank within the plan.

    Attributes:
        any (`bool`): whether the plan cuts a document on any rank, so that all ranks exchange states.
    """

    def __init__(self, plan: ShardPlan, rank: int):
        self.any = len(plan.columns.documents) > len(plan.lengths)
        self._plan, self._rank = plan, rank
        self._in_order: dict[torch.device, Rows] = {}

    @cached_property
    def all(self) -> SliceGroup:
        """All slices of the rank."""
        return SliceGroup(self._slices)

    @cached_property
    def whole(self) -> SliceGroup:
        """Documents that are whole on this rank."""
        return SliceGroup(each for each in self._slices if each.tokens == self._plan.lengths[each.document])

    @cached_property
    def first(self) -> SliceGroup:
        """Slices that begin a document which other slices continue."""
        return SliceGroup(
            each for each in self._slices if each.start == 0 and each.tokens < self._plan.lengths[each.document]
        )

    @cached_property
    def continued(self) -> SliceGroup:
        """Slices that continue a document."""
        return SliceGroup(each for each in self._slices if each.start > 0)

    @cached_property
    def _slices(self) -> tuple[LocalSlice, ...]:
        return local_slices(self._plan.columns.of_rank(self._rank))

    def in_order(self, device: torch.device) -> Rows:
        """Return where the rank's rows lie if those of the `first`, `continued` and `whole` slices come one group
        after the other."""
        if device not in self._in_order:
            slices = [*self.first.slices, *self.continued.slices, *self.whole.slices]
            tokens = np.array([each.tokens for each in slices])
            ends = np.cumsum(tokens)
            ascending = np.argsort([each.row for each in slices])
            self._in_order[device] = Rows(Ranges(ends - tokens, ends).select(ascending)).to(device)
        return self._in_order[device]

    @cached_property
    def forward(self) -> StateExchange:
        """The exchange in forward."""
        return StateExchange(self._plan, self._rank, backwards=False)

    @cached_property
    def backward(self) -> StateExchange:
        """The exchange of gradients in backward."""
        return StateExchange(self._plan, self._rank, backwards=True)

    def copy_maps(self, device: torch.device) -> None:
        """Start copying all index tensors to `device`."""
        if not self.any:
            return
        self.in_order(device)
        for exchange in (self.forward, self.backward):
            exchange.on(device)
            exchange.rows.stages(device)
