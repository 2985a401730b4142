"""`CostModel`: predicts how long a training step takes under a plan, from a model's config and a hardware profile.

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
from .layer_work import Rectangles, StageWork, call_seconds, layer_work
from .model_shape import AttentionLayers, ModelShape
from .timeline import PassTimes, Timeline


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
        """Step time of the slowest rank."""
        return float((self.linear + self.attention + self.copies + self.exposed).max())

    @property
    def attention_seconds(self) -> float:
        """Attention with its copies and what it waits for, on the rank where they take longest."""
        return float((self.attention + self.copies + self.exposed).max())

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-serializable form."""
        by_rank = {name: values.tolist() for name, values in vars(self).items()}
        return {"seconds": self.seconds, "attention_seconds": self.attention_seconds, **by_rank}


@dataclass(frozen=True)
class CostModel:
    """Predicts step times of plans; what `plan_documents(..., cost_model=...)` minimises.

    Args:
        hardware (`HardwareProfile`): speeds of kernels and links.
        linear_flops_per_token (`float`): floating-point operations of the forward of all layers, twice the parameters
            that a token meets.
        layers (`tuple[AttentionLayers, ...]`): the attention layers, grouped.
        itemsize (`int`): bytes per element of K and V on the wire.
        grad_itemsize (`int`): bytes per element of their gradients on the wire.

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
        """Makes a cost model of a transformers config and some hardware.

        Args:
            config (`PreTrainedConfig` or `Mapping`): a causal language model's config, or the dict in a config.json.
            hardware: the name of a profile (`hf_flashcp.planning.HARDWARE`), the path of one, or a profile.
            itemsize (`int`, *optional*, defaults to 2): bytes per element of the training dtype, which is also that of
                the wire.

        Raises:
            ConfigurationError: a config without the sizes of its attention, or an unknown profile.
        """
        shape = ModelShape.from_config(config)
        return cls(HardwareProfile.load(hardware), shape.linear_flops_per_token, shape.layers, itemsize, itemsize)

    def step_time(self, plan: ShardPlan) -> StepTime:
        """Predicts the times of one step on a plan's batch."""
        return self.sum_up(plan, [self.passes(plan, layers) for layers in self.layers])

    def sum_up(self, plan: ShardPlan, passes: Sequence[tuple[PassTimes, PassTimes]]) -> StepTime:
        """Sums up a step: the linear work of a plan's tokens, and the forward and backward of each group of layers."""
        sums = [np.zeros(plan.cp_size) for _ in PassTimes._fields]
        for layers, (forward, backward) in zip(self.layers, passes):
            for total, once, other in zip(sums, forward, backward):
                total += layers.count * (once + other)
        return StepTime(self._linear_seconds(np.array(rank_tokens(plan.slices))), *sums)

    def document_times(self, lengths: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Predicted seconds of one device per document, forward and backward, (n,): `(linear, attention)`. They add up
        over a pack's documents; what starting kernels and moving KV costs depends on the plan."""
        lengths = np.asarray(lengths, dtype=np.int64)
        squares = Rectangles(np.arange(len(lengths)), lengths, np.zeros_like(lengths))
        # Documents that share a call are not alone on the device.
        kernel = dataclasses.replace(self.hardware.kernel, units=0, call_seconds=0.0)
        attention = np.zeros(len(lengths))
        for layers in self.layers:
            for backward in (False, True):
                options: dict[str, Any] = {"layers": layers, "window": layers.window, "backward": backward}
                attention += layers.count * call_seconds(kernel, squares, cp_size=len(lengths), causal=True, **options)
        return self._linear_seconds(lengths), attention

    def passes(self, plan: ShardPlan, layers: AttentionLayers) -> tuple[PassTimes, PassTimes]:
        """Predicts the forward and the backward of one layer by this library's exchange."""
        layer = LayerCosts(self, layers, plan)
        local, stages = layer_work(plan, layer.window, self.hardware.ranks_per_node)
        return layer.forward(local, stages), layer.backward(local, stages)

    def wire_seconds(self, bytes_moved: np.ndarray) -> np.ndarray:
        """Seconds, (cp_size,), of transfers of (2, cp_size) bytes inside nodes and between them at the same time."""
        inside, between = bytes_moved
        return np.maximum(_seconds(self.hardware.intra_node, inside), _seconds(self.hardware.inter_node, between))

    def _linear_seconds(self, tokens: np.ndarray) -> np.ndarray:
        work = tokens * self.linear_flops_per_token * (1 + BACKWARD_OF_LINEAR)
        return work / self.hardware.linear_flops_per_second


class LayerCosts:
    """Costs of one attention layer under a plan."""

    def __init__(self, model: CostModel, layers: AttentionLayers, plan: ShardPlan):
        self.model, self.layers, self.plan, self.cp_size = model, layers, plan, plan.cp_size
        self.window = plan.hiding_window(layers.window)

    def kernel_seconds(self, rectangles: Rectangles, *, causal: bool, backward: bool, heads: int = 0) -> np.ndarray:
        """One kernel call, see [`call_seconds`], of all query heads or of `heads`."""
        return call_seconds(
            self.model.hardware.kernel,
            rectangles,
            cp_size=self.cp_size,
            layers=dataclasses.replace(self.layers, query_heads=heads) if heads else self.layers,
            window=self.window,
            causal=causal,
            backward=backward,
        )

    def merge_seconds(self, rectangles: Rectangles) -> np.ndarray:
        """Partial outputs in fp32 are read and written, the received part's output is read."""
        rows = np.bincount(rectangles.ranks, rectangles.queries, self.cp_size)
        elements = rows * self.layers.query_heads * self.layers.value_dim
        return elements * (8 + self.model.itemsize) / self.model.hardware.memory_bytes_per_second

    def pack_seconds(self, tokens: np.ndarray | int, backward: bool) -> np.ndarray:
        """Packing tokens: KV to send is read and written once, gradients that come home are added to fp32 ones."""
        bytes_per_element = 8 + self.model.grad_itemsize if backward else 2 * self.model.itemsize
        elements = tokens * self.layers.kv_elements_per_token
        return elements * bytes_per_element / self.model.hardware.memory_bytes_per_second

    def stage_seconds(self, stage: StageWork, backward: bool) -> np.ndarray:
        """A stage's transfer, of both steps in a hierarchical exchange. Gradients go home along the same ways."""
        itemsize = self.model.grad_itemsize if backward else self.model.itemsize
        width = self.layers.kv_elements_per_token * itemsize
        second = _seconds(self.model.hardware.intra_node, stage.handed_on.max(0) * width)
        return self.model.wire_seconds(np.maximum(stage.received, stage.sent) * width) + second

    def forward(self, local: Rectangles, stages: Sequence[StageWork]) -> PassTimes:
        """All transfers are posted at once and arrive one after the other. A window's results need no merging."""
        line = Timeline(self.cp_size)
        packed = line.copy(self.pack_seconds(sum(stage.copied for stage in stages), backward=False))
        arrivals = [line.transfer(self.stage_seconds(stage, backward=False), packed) for stage in stages]
        line.kernel(self.kernel_seconds(local, causal=True, backward=False))
        for stage, arrived in zip(stages, arrivals):
            seconds = self.kernel_seconds(stage.rectangles, causal=self.window is not None, backward=False)
            line.kernel(seconds, arrived)
            if self.window is None:
                line.copy(self.merge_seconds(stage.rectangles))
        return line.times()

    def backward(self, local: Rectangles, stages: Sequence[StageWork]) -> PassTimes:
        """Each stage's gradients leave when they are computed; the local pass is last."""
        line = Timeline(self.cp_size)
        home = line.nothing
        for stage in stages:
            seconds = self.kernel_seconds(stage.rectangles, causal=self.window is not None, backward=True)
            home = line.transfer(self.stage_seconds(stage, backward=True), line.kernel(seconds))
        line.kernel(self.kernel_seconds(local, causal=True, backward=True))
        line.copy(self.pack_seconds(sum(stage.copied for stage in stages), backward=True), home)
        return line.times()


def _seconds(link: Link, bytes_moved: np.ndarray) -> np.ndarray:
    return np.where(bytes_moved > 0, link.latency_seconds + bytes_moved / link.bytes_per_second, 0.0)
