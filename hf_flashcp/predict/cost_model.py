"""`CostModel`: how long a training step would take under a plan, from a model's config and a hardware profile.

What a rank does in one attention layer, and when (here with two stages; R1, R2 are the rectangles of received KV):

    forward    |-- pack --|-- local pass --------|-- R1 + merge --|-- R2 + merge --|
    link                  |-- KV 1 --|-- KV 2 ---------------------|waits|
    backward   |-- R1 --|-- R2 --|-- local pass ---------|waits|-- add --|
    link                |-- dKV 1 --|-- dKV 2 -----------------|

so a layer costs its kernels and copies, and as much of the transfers as they do not hide. A step is the sum over
layers plus the linear work of the rank's tokens, and takes as long as the slowest rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..plan.shard_plan import ShardPlan
from ..plan.slices import rank_tokens
from .hardware_profile import HardwareProfile, Link
from .layer_work import StageWork, call_seconds, layer_work
from .model_shape import AttentionLayers, ModelShape


if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BACKWARD_OF_LINEAR = 2
"""Floating-point work of a linear layer's backward, over that of its forward: two products instead of one."""


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of a training step (forward and backward), by rank.

    Args:
        linear (`np.ndarray`): (cp_size,) everything that works token by token.
        attention (`np.ndarray`): (cp_size,) attention kernels of all layers.
        copies (`np.ndarray`): (cp_size,) packing, merging and adding what travels, all layers.
        exposed (`np.ndarray`): (cp_size,) waiting for KV and for gradients of KV, all layers.
        transfer (`np.ndarray`): (cp_size,) time on the wire, all layers, whether it is waited for or not.
    """

    linear: np.ndarray
    attention: np.ndarray
    copies: np.ndarray
    exposed: np.ndarray
    transfer: np.ndarray

    @property
    def seconds(self) -> float:
        """Of the slowest rank."""
        return float((self.linear + self.attention + self.copies + self.exposed).max())

    @property
    def attention_seconds(self) -> float:
        """Attention with its copies and what it waits for, of the slowest rank."""
        return float((self.attention + self.copies + self.exposed).max())

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
        linear = self._linear_seconds(np.array(rank_tokens(plan.slices)))
        sums = [np.zeros(plan.cp_size) for _ in range(4)]
        for layers in self.layers:
            for total, forward, backward in zip(sums, *self.passes(plan, layers)):
                total += layers.count * (forward + backward)
        return StepTime(linear, *sums)

    def document_times(self, lengths: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`(linear, attention)`: predicted seconds of one device for each document, forward and backward, (n,). They
        add up over the documents of a pack; what starting kernels and moving KV costs depends on the plan."""
        lengths = np.asarray(lengths, dtype=np.int64)
        squares = np.stack([np.arange(len(lengths)), lengths, np.zeros_like(lengths)], 1)
        # Of several documents in one call, none is alone on the device.
        kernel = dataclasses.replace(self.hardware.kernel, units=0, call_seconds=0.0)
        attention = np.zeros(len(lengths))
        for layers in self.layers:
            for backward in (False, True):
                options: dict[str, Any] = {"layers": layers, "window": layers.window, "backward": backward}
                attention += layers.count * call_seconds(kernel, squares, cp_size=len(lengths), causal=True, **options)
        return self._linear_seconds(lengths), attention

    def _linear_seconds(self, tokens: np.ndarray) -> np.ndarray:
        work = tokens * self.linear_flops_per_token * (1 + BACKWARD_OF_LINEAR)
        return work / self.hardware.linear_flops_per_second

    def passes(self, plan: ShardPlan, layers: AttentionLayers) -> list[tuple[np.ndarray, ...]]:
        """`(attention, copies, exposed, transfer)` of one layer's forward, and of its backward, each (cp_size,)."""
        window = plan.hiding_window(layers.window)
        local, stages = layer_work(plan, window, self.hardware.ranks_per_node)
        none = np.zeros(plan.cp_size)
        copied = sum((stage.copied for stage in stages), none)
        merges = [none if window else self.merge_seconds(stage.rectangles, layers, plan.cp_size) for stage in stages]
        found: list[tuple[np.ndarray, ...]] = []
        for backward in (False, True):
            options: dict[str, Any] = {
                "cp_size": plan.cp_size,
                "layers": layers,
                "window": window,
                "backward": backward,
            }
            local_pass = call_seconds(self.hardware.kernel, local, causal=True, **options)
            passes = [
                call_seconds(self.hardware.kernel, stage.rectangles, causal=window is not None, **options)
                for stage in stages
            ]
            wires = [self._stage_seconds(stage, layers, backward) for stage in stages]
            packing = self._pack_seconds(copied, layers, backward)
            if backward:
                copies, end = packing, _backward_end(local_pass, passes, wires) + packing
            else:
                steps = [remote_pass + merge for remote_pass, merge in zip(passes, merges)]
                copies, end = sum(merges, packing), _forward_end(local_pass, steps, wires) + packing
            attention = sum(passes, local_pass)
            found.append((attention, copies, end - attention - copies, sum(wires, none)))
        return found

    def _stage_seconds(self, stage: StageWork, layers: AttentionLayers, backward: bool) -> np.ndarray:
        """(cp_size,) seconds of a stage's transfer, of both steps in a hierarchical exchange. Gradients go home along
        the same ways."""
        width = layers.kv_elements_per_token * (self.grad_itemsize if backward else self.itemsize)
        second = _seconds(self.hardware.intra_node, stage.handed_on.max(0) * width)
        return self.wire_seconds(np.maximum(stage.received, stage.sent) * width) + second

    def wire_seconds(self, bytes_moved: np.ndarray) -> np.ndarray:
        """(cp_size,) seconds that a transfer takes, of (2, cp_size) bytes: inside nodes, and between them at the same
        time."""
        links = (self.hardware.intra_node, self.hardware.inter_node)
        return np.max([_seconds(link, moved) for link, moved in zip(links, bytes_moved)], axis=0)

    def merge_seconds(self, rectangles: np.ndarray, layers: AttentionLayers, cp_size: int) -> np.ndarray:
        """(cp_size,) seconds: partial outputs in fp32 are read and written, the received part's output is read."""
        rows = np.bincount(rectangles[:, 0], rectangles[:, 1], cp_size)
        elements = rows * layers.query_heads * layers.value_dim
        return elements * (8 + self.itemsize) / self.hardware.memory_bytes_per_second

    def _pack_seconds(self, tokens: np.ndarray, layers: AttentionLayers, backward: bool) -> np.ndarray:
        """KV that is sent is read and written once; gradients that come home are added to fp32 ones."""
        an_element = 8 + self.grad_itemsize if backward else 2 * self.itemsize
        return tokens * layers.kv_elements_per_token * an_element / self.hardware.memory_bytes_per_second


def _seconds(link: Link, bytes_moved: np.ndarray) -> np.ndarray:
    return np.where(bytes_moved > 0, link.latency_seconds + bytes_moved / link.bytes_per_second, 0.0)


def _forward_end(local_pass: np.ndarray, steps: list[np.ndarray], wires: list[np.ndarray]) -> np.ndarray:
    """When the last stage is computed: all transfers are posted at once and arrive one after the other."""
    end, arrived = local_pass, np.zeros_like(local_pass)
    for step, wire in zip(steps, wires):
        arrived = arrived + wire
        end = np.maximum(end, arrived) + step
    return end


def _backward_end(local_pass: np.ndarray, passes: list[np.ndarray], wires: list[np.ndarray]) -> np.ndarray:
    """When the local pass is computed and all gradients are home: each stage's leave when it is computed."""
    home = done = np.zeros_like(local_pass)
    for remote_pass, wire in zip(passes, wires):
        done = done + remote_pass
        home = np.maximum(home, done) + wire
    return np.maximum(done + local_pass, home)
