"""`RecurrentCosts`: predicts the times of one recurrent or convolutional layer under a plan.

Documents that are cut need two exchanges, each at a moment when the layer has no other work:

    forward    |waits|-- scan of all slices, from zero states --|waits|
    link       |halo |                                          |states|
    backward   |waits|-- scan ----------------------------------|waits|
    link       |states|                                         |halo |
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..plan.contracted import contracted
from ..plan.hierarchical_traffic import hierarchical_traffic
from ..plan.shard_plan import ShardPlan
from ..plan.slices import Slice
from ..plan.traffic import by_link, traffic_matrix
from .hardware_profile import HardwareProfile, Kernel
from .model_shape import RecurrentLayers
from .timeline import PassTimes, Timeline


BACKWARD_OF_SCAN = 2
"""Ratio of a scan's floating-point operations in backward to those in forward: two products to one."""


def scan_seconds(
    kernel: Kernel, layers: RecurrentLayers, lengths: np.ndarray, starts: np.ndarray, backward: bool
) -> np.ndarray:
    """Return the seconds of the scan of each slice in one layer, (n,), without the launch.

    Slices that do not begin a document take longer, for what their entry state adds.

    Args:
        kernel (`Kernel`): the attention kernel. Scans are assumed to be as fast as it is on long rectangles.
        layers (`RecurrentLayers`): the recurrent layers. Slices are computed in whole chunks.
        lengths (`np.ndarray`): tokens of each slice, (n,).
        starts (`np.ndarray`): position at which each slice begins in its document, (n,).
        backward (`bool`): whether to return the time of backward.
    """
    computed = -(-lengths // layers.chunk) * layers.chunk
    flops = computed * (layers.flops_per_token + (starts > 0) * layers.continued_flops_per_token)
    if backward:
        return BACKWARD_OF_SCAN * flops / kernel.backward.flops_per_second
    return flops / kernel.forward.flops_per_second


class RecurrentCosts:
    """Predicts the times of one layer under a plan. All times are in seconds, (cp_size,)."""

    def __init__(self, hardware: HardwareProfile, layers: RecurrentLayers, plan: ShardPlan, itemsize: int):
        self.hardware, self.layers, self.plan, self.itemsize = hardware, layers, plan, itemsize

    def received(self) -> np.ndarray:
        """Return the bytes that each rank receives in forward, (2, cp_size): inside nodes and between nodes."""
        plan, layers = self.plan, self.layers
        nodes = self.hardware.ranks_per_node
        states, halo = contracted(plan.slices).slices, layers.halo_tokens + 1
        of_states, of_halo = (
            sum(by_link(traffic, nodes)[0] for traffic in self._traffic(slices, window))
            for slices, window in ((states, None), (plan.slices, halo))
        )
        return of_states * layers.summary_bytes + of_halo * self._halo_bytes

    def forward(self) -> PassTimes:
        """Return the times of forward."""
        line = Timeline(self.plan.cp_size)
        halo = line.transfer(self._halo_seconds())
        line.transfer(self._state_seconds(backwards=False), line.kernel(self._scan_seconds(backward=False), halo))
        return line.times()

    def backward(self) -> PassTimes:
        """Return the times of backward."""
        line = Timeline(self.plan.cp_size)
        states = line.transfer(self._state_seconds(backwards=True))
        line.transfer(self._halo_seconds(), line.kernel(self._scan_seconds(backward=True), states))
        return line.times()

    def step(self) -> PassTimes:
        """Return the times of forward and backward together, summed over the layers of the group.

        The time of kernels is that of scans.
        """
        return PassTimes(*(self.layers.count * (one + other) for one, other in zip(self.forward(), self.backward())))

    def _scan_seconds(self, backward: bool) -> np.ndarray:
        table, kernel = self.plan.slice_table, self.hardware.kernel
        starts, lengths = table.spans.starts - table.bases, table.spans.lengths
        seconds = scan_seconds(kernel, self.layers, lengths, starts, backward)
        launched = kernel.call_seconds * (self.layers.flops_per_token > 0)
        return np.bincount(table.ranks, seconds, self.plan.cp_size) + launched

    def _state_seconds(self, backwards: bool) -> np.ndarray:
        slices = contracted(self.plan.slices, backwards=backwards).slices
        return self._exchange_seconds(slices, None, self.layers.summary_bytes)

    def _halo_seconds(self) -> np.ndarray:
        return self._exchange_seconds(self.plan.slices, self.layers.halo_tokens + 1, self._halo_bytes)

    @property
    def _halo_bytes(self) -> int:
        return self.layers.halo_width * self.itemsize

    def _traffic(self, slices: Sequence[Sequence[Slice]], window: int | None) -> list[np.ndarray]:
        """Return the rows that travel in the one step of a direct exchange, or in two of a hierarchical one."""
        if self.plan.ranks_per_node is None:
            return [traffic_matrix(slices, window)]
        return list(hierarchical_traffic(slices, self.plan.ranks_per_node, window))

    def _exchange_seconds(self, slices: Sequence[Sequence[Slice]], window: int | None, row_bytes: int) -> np.ndarray:
        """Return the time of an exchange, whose steps follow each other."""
        nodes, seconds = self.hardware.ranks_per_node, np.zeros(self.plan.cp_size)
        for traffic in self._traffic(slices, window):
            seconds = seconds + self.hardware.wire_seconds(np.maximum(*by_link(traffic, nodes)) * row_bytes)
        return seconds
