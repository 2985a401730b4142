"""`CostModel`: predicts how long a training step takes under a plan, from a model's config and a hardware profile.

This is the work of a rank in one attention layer with two stages. R1 and R2 are the rectangles of received KV:

    forward    |-- pack --|-- local pass --------|-- R1 + merge --|-- R2 + merge --|
    link                  |-- KV 1 --|-- KV 2 ---------------------|waits|
    backward   |-- R1 --|-- R2 --|-- local pass ---------|waits|-- add --|
    link                |-- dKV 1 --|-- dKV 2 -----------------|

A layer takes as long as its kernels and copies, plus the part of its transfers that they do not hide. A step takes the
sum over layers plus the linear work of the rank's tokens, on the slowest rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..plan.shard_plan import ShardPlan
from .hardware_profile import HardwareProfile
from .joined_plans import JoinedPlans
from .layer_work import Rectangles, StageWork, call_seconds, layer_work
from .model_shape import AttentionLayers, ModelShape, RecurrentLayers, state_tokens
from .recurrent_costs import RecurrentCosts, scan_seconds
from .timeline import PassTimes, Timeline


if TYPE_CHECKING:
    from transformers import PreTrainedConfig


BACKWARD_OF_LINEAR = 2
"""Ratio of a linear layer's floating-point operations in backward to those in forward: two products to one."""


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of each rank in a training step (forward and backward), summed over layers.

    Args:
        linear (`np.ndarray`): all work that is done token by token, (cp_size,).
        attention (`np.ndarray`): attention kernels, (cp_size,).
        copies (`np.ndarray`): packing, merging and adding rows that travel, (cp_size,).
        exposed (`np.ndarray`): waiting for KV, states, halos and their gradients, (cp_size,).
        transfer (`np.ndarray`): time on the wire, (cp_size,), including transfers that no rank waits for.
        scan (`np.ndarray`): kernels of recurrent layers, (cp_size,); 0 in models without them.
    """

    linear: np.ndarray
    attention: np.ndarray
    copies: np.ndarray
    exposed: np.ndarray
    transfer: np.ndarray
    scan: np.ndarray

    @property
    def of_ranks(self) -> np.ndarray:
        """Step time of each rank, (cp_size,)."""
        return self.linear + self.attention + self.scan + self.copies + self.exposed

    @property
    def seconds(self) -> float:
        """Step time of the slowest rank."""
        return float(self.of_ranks.max())

    @property
    def attention_seconds(self) -> float:
        """Time of attention kernels, copies and waiting, on the rank where they take longest together.

        In a hybrid model the waiting includes that for states.
        """
        return float((self.attention + self.copies + self.exposed).max())

    def divided(self, parts: int) -> list[StepTime]:
        """Return the times of each of so many plans, which were predicted together."""
        columns = [np.split(values, parts) for values in vars(self).values()]
        return [StepTime(*of_plan) for of_plan in zip(*columns)]

    def to_dict(self) -> dict[str, Any]:
        """Return the times in a JSON-serializable form."""
        by_rank = {name: values.tolist() for name, values in vars(self).items()}
        return {"seconds": self.seconds, "attention_seconds": self.attention_seconds, **by_rank}


@dataclass(frozen=True)
class CostModel:
    """Predicts the step times of plans. `plan_documents(..., cost_model=...)` minimizes these times.

    Models with equal arguments are equal and hashable, so that all ranks make the same plans and plans can be cached.

    Args:
        hardware (`HardwareProfile`): speeds of kernels and links.
        linear_flops_per_token (`float`): floating-point operations per token in forward, without attention's products
            Q K and P V: two per parameter that a token uses.
        layers (`tuple[AttentionLayers, ...]`): the attention layers, in groups of equal layers.
        itemsize (`int`): bytes per element of K and V on the wire.
        grad_itemsize (`int`): bytes per element of their gradients on the wire.
        recurrent (`RecurrentLayers`, *optional*): the recurrent or convolutional layers of a hybrid model.
    """

    hardware: HardwareProfile
    linear_flops_per_token: float
    layers: tuple[AttentionLayers, ...]
    itemsize: int = 2
    grad_itemsize: int = 2
    recurrent: RecurrentLayers | None = None

    @classmethod
    def from_config(
        cls,
        config: PreTrainedConfig | Mapping[str, Any],
        hardware: str | Path | HardwareProfile,
        *,
        itemsize: int = 2,
    ) -> CostModel:
        """Make a cost model from a model's config and a hardware profile.

        Args:
            config (`PreTrainedConfig` or `Mapping`): a causal language model's config, or the dict in a config.json.
            hardware (`str`, `Path` or `HardwareProfile`): a name in `hf_flashcp.planning.HARDWARE`, the path of a
                profile's JSON file, or a profile.
            itemsize (`int`, *optional*, defaults to 2): bytes per element in the training dtype, in which KV and its
                gradients travel, too.

        Raises:
            ConfigurationError: the config lacks the sizes of its attention layers, or the profile is unknown.
        """
        shape = ModelShape.from_config(config)
        linear = shape.linear_flops_per_token
        return cls(HardwareProfile.load(hardware), linear, shape.layers, itemsize, itemsize, shape.recurrent)

    @property
    def state_tokens(self) -> float:
        """Price of a received state in tokens of KV, see [`~model_shape.state_tokens`]."""
        return state_tokens(self.layers, self.recurrent, self.itemsize)

    def step_time(self, plan: ShardPlan) -> StepTime:
        """Predict the times of one training step on the batch of a plan."""
        return self.step_times([plan])[0]

    def step_times(self, plans: Sequence[ShardPlan]) -> list[StepTime]:
        """Predict the times of one training step under each of several plans of the same documents and cp_size.

        This takes far less time than to predict them one by one. The nodes of a plan replace those of the hardware.
        """
        found: dict[int, StepTime] = {}
        for ranks_per_node in dict.fromkeys(plan.ranks_per_node for plan in plans):
            places = [place for place, plan in enumerate(plans) if plan.ranks_per_node == ranks_per_node]
            joined, model = JoinedPlans([plans[place] for place in places]), self
            if ranks_per_node is not None:
                hardware = dataclasses.replace(self.hardware, ranks_per_node=ranks_per_node)
                model = dataclasses.replace(self, hardware=hardware)
            found |= zip(places, model.joined_step_time(joined, ranks_per_node is not None).divided(len(places)))
        return [found[place] for place in range(len(plans))]

    def joined_step_time(self, plans: JoinedPlans, hierarchical: bool) -> StepTime:
        """Predict the times of joined plans, with a hierarchical or a direct exchange, whatever the plans say."""
        passes = [self.passes(plans, layers, hierarchical) for layers in self.layers]
        return self.sum_up(plans, passes, hierarchical)

    def sum_up(
        self, plans: JoinedPlans, passes: Sequence[tuple[PassTimes, PassTimes]], hierarchical: bool = False
    ) -> StepTime:
        """Return the times of a step, given the forward and backward times of one attention layer of each group.

        The times of recurrent layers are those with this library's exchange.
        """
        attention = [np.zeros(plans.cp_size) for _ in PassTimes._fields]
        for layers, (forward, backward) in zip(self.layers, passes):
            for total, once, other in zip(attention, forward, backward):
                total += layers.count * (once + other)
        kernels, copies, exposed, transfer = attention
        linear = self._linear_seconds(plans.tokens)
        if self.recurrent is None:
            return StepTime(linear, kernels, copies, exposed, transfer, np.zeros(plans.cp_size))
        recurrent = RecurrentCosts(self.hardware, self.recurrent, plans, self.itemsize, hierarchical).step()
        exposed, transfer = exposed + recurrent.exposed, transfer + recurrent.transfer
        return StepTime(linear, kernels, copies, exposed, transfer, recurrent.attention)

    def document_times(self, lengths: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return `(linear, attention)`, the predicted seconds of each document on one device, (n,) each.

        The times include forward and backward, and add up over the documents of a pack. The scans of recurrent layers
        count as linear. Kernel launches and the moving of KV and states are left out, because their times depend on
        the plan.
        """
        lengths = np.asarray(lengths, dtype=np.int64)
        squares = Rectangles(np.arange(len(lengths)), lengths, np.zeros_like(lengths))
        # With `units=0`, the longest tile does not bound the call: documents share calls with other documents.
        kernel = dataclasses.replace(self.hardware.kernel, units=0, call_seconds=0.0)
        attention = np.zeros(len(lengths))
        for layers in self.layers:
            for backward in (False, True):
                options: dict[str, Any] = {"layers": layers, "window": layers.window, "backward": backward}
                attention += layers.count * call_seconds(kernel, squares, cp_size=len(lengths), causal=True, **options)
        return self._linear_seconds(lengths) + self._scan_seconds(lengths), attention

    def passes(self, plans: JoinedPlans, layers: AttentionLayers, hierarchical: bool) -> tuple[PassTimes, PassTimes]:
        """Predict the times of one layer's forward and backward with this library's exchange."""
        layer = LayerCosts(self, layers, plans)
        local, stages = layer_work(plans, layer.window, self.hardware.ranks_per_node, hierarchical)
        return layer.forward(local, stages), layer.backward(local, stages)

    def _scan_seconds(self, lengths: np.ndarray) -> np.ndarray:
        """Return the seconds of the scans of whole documents, forward and backward, without launches."""
        seconds, kernel, starts = np.zeros(len(lengths)), self.hardware.kernel, np.zeros_like(lengths)
        if self.recurrent is not None:
            for backward in (False, True):
                once = scan_seconds(kernel, self.recurrent, lengths, starts, backward)
                seconds += self.recurrent.count * once
        return seconds

    def _linear_seconds(self, tokens: np.ndarray) -> np.ndarray:
        work = tokens * self.linear_flops_per_token * (1 + BACKWARD_OF_LINEAR)
        return work / self.hardware.linear_flops_per_second


class LayerCosts:
    """Predicts the times of one attention layer under a plan. All times are in seconds, (cp_size,)."""

    def __init__(self, model: CostModel, layers: AttentionLayers, plan: ShardPlan | JoinedPlans):
        self.model, self.layers, self.plan, self.cp_size = model, layers, plan, plan.cp_size
        self.window = plan.hiding_window(layers.window)

    def kernel_seconds(self, rectangles: Rectangles, *, causal: bool, backward: bool, heads: int = 0) -> np.ndarray:
        """Return the time of one kernel call, see [`call_seconds`], for all query heads or for `heads` of them."""
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
        """Return the time to merge outputs: fp32 partial outputs are read and written, and the new output is read."""
        rows = np.bincount(rectangles.ranks, rectangles.queries, self.cp_size)
        elements = rows * self.layers.query_heads * self.layers.value_dim
        return elements * (8 + self.model.itemsize) / self.model.hardware.memory_bytes_per_second

    def pack_seconds(self, tokens: np.ndarray | int, backward: bool) -> np.ndarray:
        """Return the time to pack the KV of tokens (read and write), or to add their gradients to fp32 sums."""
        bytes_per_element = 8 + self.model.grad_itemsize if backward else 2 * self.model.itemsize
        elements = tokens * self.layers.kv_elements_per_token
        return elements * bytes_per_element / self.model.hardware.memory_bytes_per_second

    def stage_seconds(self, stage: StageWork, backward: bool) -> np.ndarray:
        """Return the time of a stage's transfer, in a hierarchical exchange of both steps.

        Gradients take the same routes back.
        """
        itemsize = self.model.grad_itemsize if backward else self.model.itemsize
        width = self.layers.kv_elements_per_token * itemsize
        hardware = self.model.hardware
        second = hardware.intra_node.seconds(stage.forwarded.max(0) * width)
        return hardware.wire_seconds(np.maximum(stage.received, stage.sent) * width) + second

    def forward(self, local: Rectangles, stages: Sequence[StageWork]) -> PassTimes:
        """Return the times of forward.

        All transfers are posted at once and arrive one after the other. Results of windowed layers need no merging.
        """
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
        """Return the times of backward, in which a stage's gradients are sent at once and the local pass is last."""
        line = Timeline(self.cp_size)
        returned = line.nothing
        for stage in stages:
            seconds = self.kernel_seconds(stage.rectangles, causal=self.window is not None, backward=True)
            returned = line.transfer(self.stage_seconds(stage, backward=True), line.kernel(seconds))
        line.kernel(self.kernel_seconds(local, causal=True, backward=True))
        line.copy(self.pack_seconds(sum(stage.copied for stage in stages), backward=True), returned)
        return line.times()
