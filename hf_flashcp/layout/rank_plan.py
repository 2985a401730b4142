"""`RankPlan`: a plan for one rank and its process group."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConfigurationError
from ..plan import ShardPlan
from ..plan.traffic import MOST_KEPT
from .halo_layout import HaloLayout
from .rank_layout import RankLayout
from .state_layout import StateLayout


if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


class RankPlan:
    """The plan of one batch, bound to a rank and its process group. Attention layers receive it as `flashcp_plan`.

    It also holds the index maps (layouts) that are built from the plan. Like [`ShardPlan`] it is a plain class, so
    that wrappers which rebuild containers pass it through untouched.

    Args:
        plan (`ShardPlan`): the plan of the batch, the same on every rank of the group.
        rank (`int`, *optional*, defaults to 0): rank within the group.
        group (`ProcessGroup`, *optional*): the context-parallel group; not needed if cp_size is 1.
        target_count (`torch.Tensor`, *optional*): the `num_items_in_batch` of [`shard_inputs`], with which the mean of
            the ranks' losses is the loss of the batch; `None` if the caller passed one.
        position_ids (`torch.Tensor`, *optional*): positions of the whole row, (..., C); `None` if positions count the
            tokens of each document.
        keep_received_kv (`bool`, *optional*): whether attention layers keep received KV until backward instead of
            fetching it again; the same on every rank. By default they keep it unless some rank receives more than
            `MOST_KEPT` tokens per token of its own. At that limit, with four query heads per KV head, received KV
            takes 0.8 times the memory of the queries, keys, values and outputs that are saved anyway. Fetching KV
            again increases the bytes moved by half.
        layers_run_again (`frozenset`, *optional*): the `layer_idx` of the layers that run again in backward, where
            they keep received KV regardless of `keep_received_kv`; the same on every rank.
        checked_layer (`int`, *optional*): the `layer_idx` of the layer that debug mode compares with float64; the same
            on every rank.
        kernel (`str`, *optional*): name of the attention kernel of all layers; by default each layer uses the fastest
            one that can run it.
        head_groups (`int`, *optional*, defaults to 1): number of groups of KV heads that attention layers compute one
            after another; at most one per KV head.

    Raises:
        ConfigurationError: the group does not have as many ranks as the plan.
    """

    def __init__(
        self,
        plan: ShardPlan,
        rank: int = 0,
        group: ProcessGroup | None = None,
        target_count: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        *,
        keep_received_kv: bool | None = None,
        layers_run_again: frozenset[int] = frozenset(),
        checked_layer: int | None = None,
        kernel: str | None = None,
        head_groups: int = 1,
    ):
        size = group.size() if group is not None else 1
        if size != plan.cp_size:
            raise ConfigurationError(
                f"The plan is for cp_size {plan.cp_size}, but the context-parallel group has {size} ranks. "
                f"Set cp_size={size} where the plan is made, or leave it out: FlashCPCollator() takes it from "
                "FlashCPPlugin."
            )
        self.plan = plan
        self.rank = rank
        self.group = group
        self.target_count = target_count
        self.position_ids = position_ids
        self.keep_received_kv: bool = _keeps_received_kv(plan) if keep_received_kv is None else keep_received_kv
        self.layers_run_again = layers_run_again
        self.checked_layer = checked_layer
        self.kernel = kernel
        self.head_groups = head_groups
        self.layout = RankLayout(plan, rank)
        self._window_layouts: dict[int, RankLayout] = {}
        self._halo_layouts: dict[int, HaloLayout] = {}
        self._state_layouts: list[StateLayout] = []  # at most one, shared by copies of this plan

    def with_layers(
        self,
        keep_received_kv: bool | None,
        layers_run_again: frozenset[int],
        checked_layer: int | None,
        kernel: str | None = None,
        head_groups: int | None = None,
    ) -> RankPlan:
        """Return a copy for the same batch, with the same layouts and other options for its layers.

        `None` leaves `keep_received_kv`, `kernel` and `head_groups` unchanged. [`RankPlan`] describes the options.
        """
        other = copy.copy(self)
        if keep_received_kv is not None:
            other.keep_received_kv = keep_received_kv
        if kernel is not None:
            other.kernel = kernel
        if head_groups is not None:
            other.head_groups = head_groups
        other.layers_run_again, other.checked_layer = layers_run_again, checked_layer
        return other

    def with_group(self, group: ProcessGroup | None) -> RankPlan:
        """Return a copy whose exchanges run in another group of the same ranks; `None` if no exchange will follow."""
        other = copy.copy(self)
        other.group = group
        return other

    def layout_for(self, window: int | None) -> RankLayout:
        """Return the layout of layers whose queries see `window` keys, built on first use.

        This is the layout of full attention if `window` is `None` or no document is longer than the window.
        """
        if window is None or window >= self.layout.longest_document:
            return self.layout
        if window not in self._window_layouts:
            self._window_layouts[window] = RankLayout(self.plan, self.rank, window)
        return self._window_layouts[window]

    def halo_for(self, width: int) -> HaloLayout:
        """Return the layout of convolutions whose outputs depend on `width` tokens, built on first use."""
        if width not in self._halo_layouts:
            self._halo_layouts[width] = HaloLayout(self.plan, self.rank, width)
        return self._halo_layouts[width]

    @property
    def states(self) -> StateLayout:
        """The layout of layers that pass states from slice to slice, built on first use."""
        if not self._state_layouts:
            self._state_layouts.append(StateLayout(self.plan, self.rank))
        return self._state_layouts[0]

    def copy_maps(self, device: torch.device, windows: Iterable[int | None], earlier: RankPlan | None) -> None:
        """Build index maps and start copying them to `device`.

        Args:
            device: device of the layers.
            windows: windows of the attention layers.
            earlier: plan of an earlier batch, whose recurrent layers tell which maps those of this one will need.
        """
        for window in windows:
            self.layout_for(window).stages(device)
        if earlier is None:
            return
        for width in earlier._halo_layouts:
            self.halo_for(width).copy_maps(device)
        if earlier._state_layouts:
            self.states.copy_maps(device)

    def __repr__(self) -> str:
        return f"RankPlan(rank={self.rank}, {self.plan})"


def _keeps_received_kv(plan: ShardPlan) -> bool:
    received, _ = plan.kv_moved()
    return bool((np.array(received) <= MOST_KEPT * plan.columns.sums(plan.columns.tokens)).all())
