"""`RankPlan`: a plan bound to a rank and its process group."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from ..errors import ConfigurationError
from ..plan import ShardPlan
from ..plan.slices import rank_tokens
from ..plan.traffic import MOST_KEPT
from .rank_layout import RankLayout
from .window_layout import WindowLayout


if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


class RankPlan:
    """What attention layers get as `flashcp_plan`: plan, rank, process group, and the layouts built from them.

    A plain class, like [`ShardPlan`], so that wrappers which rebuild containers leave it alone.

    Args:
        plan (`ShardPlan`): the plan of the batch, equal on every rank of the group.
        rank (`int`, *optional*, defaults to 0): rank within the group.
        group (`ProcessGroup`, *optional*): the context-parallel group; not needed when cp_size is 1.
        target_count (`torch.Tensor`, *optional*): the `num_items_in_batch` of [`shard_inputs`], with which the mean
            over ranks of their losses is the batch's; `None` if the caller gave one.
        position_ids (`torch.Tensor`, *optional*): (..., C) of the whole row; `None` if they count each document's
            tokens.
        keep_received_kv (`bool`, *optional*): whether attention layers keep the KV that they receive until backward,
            or fetch it again; the same on every rank. By default kept unless some rank receives more than `MOST_KEPT`
            tokens for each of its own, which with four query heads per KV head is 0.8 times the queries, keys, values
            and outputs that are saved anyway. Fetching again moves half as many bytes more.
        layers_run_again (`frozenset`, *optional*): the `layer_idx` of layers that run again in backward and keep what
            they receive there whatever `keep_received_kv` says; the same on every rank.
        checked_layer (`int`, *optional*): the `layer_idx` of the layer that debug mode compares with float64; the same
            on every rank.

    Raises:
        ConfigurationError: group and plan differ in size.
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
    ):
        size = group.size() if group is not None else 1
        if size != plan.cp_size:
            raise ConfigurationError(
                f"The plan is for cp_size {plan.cp_size}, but the context-parallel group has {size} ranks. "
                "Give FlashCPPlugin (or the mesh) as many ranks as the plan has; FlashCPCollator() takes them from it."
            )
        self.plan = plan
        self.rank = rank
        self.group = group
        self.target_count = target_count
        self.position_ids = position_ids
        self.keep_received_kv: bool = _keeps_received_kv(plan) if keep_received_kv is None else keep_received_kv
        self.layers_run_again = layers_run_again
        self.checked_layer = checked_layer
        self.layout = RankLayout(plan, rank)
        self._window_layouts: dict[int, WindowLayout] = {}

    def with_layers(
        self, keep_received_kv: bool | None, layers_run_again: frozenset[int], checked_layer: int | None
    ) -> RankPlan:
        """The same batch and layouts for layers with other options, see [`RankPlan`]; with `None` `keep_received_kv`
        stays as it is."""
        other = copy.copy(self)
        if keep_received_kv is not None:
            other.keep_received_kv = keep_received_kv
        other.layers_run_again, other.checked_layer = layers_run_again, checked_layer
        return other

    def layout_for(self, window: int | None) -> RankLayout:
        """The layout of layers whose queries see `window` keys, built once: the full one if no document is longer."""
        if window is None or window >= self.layout.longest_document:
            return self.layout
        if window not in self._window_layouts:
            self._window_layouts[window] = WindowLayout(self.plan, self.rank, window)
        return self._window_layouts[window]

    def __repr__(self) -> str:
        return f"RankPlan(rank={self.rank}, {self.plan})"


def _keeps_received_kv(plan: ShardPlan) -> bool:
    received, _ = plan.kv_moved()
    return all(rows <= MOST_KEPT * own for rows, own in zip(received, rank_tokens(plan.slices)))
