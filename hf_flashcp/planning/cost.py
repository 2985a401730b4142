"""`CostModel`: how long a training step would take under a plan, from a model's config and a hardware profile.

What a rank does in one attention layer, and when (times of one rank, one stage):

    forward    |-- local pass --------|-- received KV: full rectangles --|
               |-- KV travels ------------|exposed
    backward   |-- full rectangles ---|-- local pass ---------|
                                      |-- dK, dV travel home ------|exposed

so a layer costs its kernels and as much of each transfer as the local pass does not hide. A step is the sum over
layers plus the linear work of the rank's tokens, and takes as long as the slowest rank.

A kernel call is priced by its tiles: `tile` queries of one head against the keys that they see, plus a fixed overhead
in keys (that is what makes short rectangles slow), at the kernel's speed; but no call is shorter than its longest
tile, which one unit of the device works on alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .hardware_profile import HardwareProfile, Link
from .model_shape import AttentionLayers, ModelShape
from .plan import ShardPlan, Slice
from .volume import full_attention_traffic, kv_traffic


if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_NO_WINDOW = 1 << 40

BACKWARD_OF_LINEAR = 2
"""Floating-point work of a linear layer's backward, over that of its forward: two products instead of one."""


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of a training step (forward and backward), by rank.

    Args:
        linear (`np.ndarray`): (cp_size,) everything that works token by token.
        attention (`np.ndarray`): (cp_size,) attention kernels of all layers.
        exposed (`np.ndarray`): (cp_size,) waiting for KV and for gradients of KV, all layers.
        transfer (`np.ndarray`): (cp_size,) time on the wire, all layers, whether it is waited for or not.
    """

    linear: np.ndarray
    attention: np.ndarray
    exposed: np.ndarray
    transfer: np.ndarray

    @property
    def seconds(self) -> float:
        """Of the slowest rank."""
        return float((self.linear + self.attention + self.exposed).max())

    @property
    def attention_seconds(self) -> float:
        """Attention with what it waits for, of the slowest rank."""
        return float((self.attention + self.exposed).max())

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable."""
        by_rank = {name: values.tolist() for name, values in vars(self).items()}
        return {"seconds": self.seconds, "attention_seconds": self.attention_seconds, **by_rank}


@dataclass(frozen=True)
class CostModel:
    """Predicts step times of plans; what `plan_documents(..., cost_model=...)` minimises.

    Args:
        hardware (`HardwareProfile`): speeds of kernels and links.
        linear_flops_per_token (`float`): forward, all layers: twice the parameters that a token meets.
        layers (`tuple[AttentionLayers, ...]`): the attention layers, grouped.
        itemsize (`int`): bytes of an element of K and V on the wire.
        grad_itemsize (`int`): likewise of their gradients.

    Equal arguments make equal models, so that all ranks plan alike, and a model can be a key of a cache.
    """

    hardware: HardwareProfile
    linear_flops_per_token: float
    layers: tuple[AttentionLayers, ...]
    itemsize: int = 2
    grad_itemsize: int = 2

    @classmethod
    def from_config(
        cls,
        config: PreTrainedConfig | Mapping[str, Any],
        hardware: str | Path | HardwareProfile,
        *,
        itemsize: int = 2,
    ) -> CostModel:
        """A model for a transformers config on some hardware.

        Args:
            config (`PreTrainedConfig` or `Mapping`): of a causal language model, or what its config.json holds.
            hardware: the name of a profile (`hf_flashcp.planning.HARDWARE`), the path of one, or a profile.
            itemsize (`int`, *optional*, defaults to 2): bytes of an element in the training dtype, which is also that
                of the wire.

        Raises:
            ConfigurationError: a config without the sizes of its attention, or an unknown profile.
        """
        shape = ModelShape.from_config(config)
        return cls(HardwareProfile.load(hardware), shape.linear_flops_per_token, shape.layers, itemsize, itemsize)

    def step_time(self, plan: ShardPlan) -> StepTime:
        """Predicted times of one step on a plan's batch."""
        tokens = np.array([sum(stop - start for _, start, stop in held) for held in plan.slices])
        linear = tokens * self.linear_flops_per_token * (1 + BACKWARD_OF_LINEAR)
        linear = linear / self.hardware.linear_flops_per_second
        attention, exposed, transfer = (np.zeros(plan.cp_size) for _ in range(3))
        for layers in self.layers:
            for found, total in zip(self._layer(plan, layers), (attention, exposed, transfer)):
                total += layers.count * found
        return StepTime(linear, attention, exposed, transfer)

    def _layer(self, plan: ShardPlan, layers: AttentionLayers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`(attention, exposed, transfer)` of one layer, forward and backward."""
        # Attention computes windows that hide nothing as full attention.
        window = None if layers.window is None or layers.window >= max(plan.lengths) else layers.window
        local, remote = _full_rectangles(plan.slices) if window is None else _window_rectangles(plan.slices, window)
        attention, exposed, on_the_wire = (np.zeros(plan.cp_size) for _ in range(3))
        for backward, transfer in zip((False, True), self._transfers(plan, layers, window)):
            local_pass, remote_pass = (
                self._passes(rectangles, plan.cp_size, layers, window, causal=causal, backward=backward)
                for rectangles, causal in ((local, True), (remote, window is not None))
            )
            attention += local_pass + remote_pass
            exposed += np.maximum(transfer - local_pass, 0)
            on_the_wire += transfer
        return attention, exposed, on_the_wire

    def _passes(
        self,
        rectangles: np.ndarray,
        cp_size: int,
        layers: AttentionLayers,
        window: int | None,
        *,
        causal: bool,
        backward: bool,
    ) -> np.ndarray:
        """(cp_size,) seconds of one kernel call a rank over its rectangles (n, 3): rank, queries, keys before them."""
        kernel = self.hardware.kernel
        speed = kernel.backward if backward else kernel.forward
        rank, queries, before = rectangles.T
        tiles = -(-queries // kernel.tile)
        if causal:
            # Tile i = 1 ... sees before + i x tile keys, those beyond a window plus a tile cut off.
            most = (window or _NO_WINDOW) + kernel.tile
            growing = np.clip((most - before) // kernel.tile, 0, tiles)
            keys = before * growing + kernel.tile * growing * (growing + 1) / 2 + (tiles - growing) * most
            longest = np.minimum(before + tiles * kernel.tile, most)
        else:
            keys, longest = tiles * before, before
        a_pair = layers.backward_flops_per_pair if backward else layers.forward_flops_per_pair
        a_key = kernel.tile * a_pair / (speed.flops_per_second * (kernel.causal_efficiency if causal else 1))
        total = np.bincount(rank, (keys + tiles * speed.tile_overhead_keys) * layers.query_heads * a_key, cp_size)
        alone = np.zeros(cp_size)
        np.maximum.at(alone, rank, (longest + speed.tile_overhead_keys) * kernel.units * a_key)
        calls = np.bincount(rank, minlength=cp_size) > 0
        return np.maximum(total, alone) + kernel.call_seconds * calls

    def _transfers(
        self, plan: ShardPlan, layers: AttentionLayers, window: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(cp_size,) seconds that each rank's KV is under way, and the gradients."""
        profile = self.hardware
        wires: list[tuple[Link, np.ndarray]]
        if plan.cp_size <= profile.ranks_per_node and window is None:
            received, sent = full_attention_traffic(plan.cp_size, plan.slices)
            wires = [(profile.intra_node, np.maximum(received, sent))]
        else:
            traffic = np.array(kv_traffic(plan, window))
            node = np.arange(plan.cp_size) // profile.ranks_per_node
            inside = node[:, None] == node
            wires = [
                (link, np.maximum((traffic * which).sum(0), (traffic * which).sum(1)))
                for link, which in ((profile.intra_node, inside), (profile.inter_node, ~inside))
            ]
        width = layers.kv_elements_per_token
        forward, backward = (
            np.max([_seconds(link, tokens * width * size) for link, tokens in wires], axis=0)
            for size in (self.itemsize, self.grad_itemsize)
        )
        return forward, backward


def _seconds(link: Link, bytes_moved: np.ndarray) -> np.ndarray:
    return np.where(bytes_moved > 0, link.latency_seconds + bytes_moved / link.bytes_per_second, 0.0)


def _full_rectangles(slices: Sequence[Sequence[Slice]]) -> tuple[np.ndarray, np.ndarray]:
    """`(local, remote)`, each (n, 3): rank, queries, and keys before them (causal) or in all (remote).

    A rank's slices of a document form one causal square; each of them sees, of the other ranks' tokens, those before
    it, without a mask.
    """
    local, remote = [], []
    for rank, held in enumerate(slices):
        last, owned = None, 0
        for document, start, stop in held:
            if document != last:
                if owned:
                    local.append((rank, owned, 0))
                last, owned = document, 0
            if start > owned:
                remote.append((rank, stop - start, start - owned))
            owned += stop - start
        if owned:
            local.append((rank, owned, 0))
    return _table(local), _table(remote)


def _window_rectangles(slices: Sequence[Sequence[Slice]], window: int) -> tuple[np.ndarray, np.ndarray]:
    """The same for a window: the rows of a slice that see nothing before it, and those that wait for their band."""
    local, remote = [], []
    for rank, held in enumerate(slices):
        for _, start, stop in held:
            waiting = min(stop - start, window - 1) if start else 0
            if waiting:
                remote.append((rank, waiting, min(start, window - 1)))
            if start + waiting < stop:
                local.append((rank, stop - start - waiting, waiting))
    return _table(local), _table(remote)


def _table(rows: list[tuple[int, int, int]]) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(-1, 3)
