"""`RecurrentCosts`: predicts the times of one recurrent or convolutional layer under a plan.

Documents that are cut need two exchanges, each at a moment when the layer has no other work:

    forward    |waits|-- scan of all slices, from zero states --|waits|
    link       |halo |                                          |states|
    backward   |waits|-- scan ----------------------------------|waits|
    link       |states|                                         |halo |
"""

from __future__ import annotations

import numpy as np

from ..plan.link_traffic import LinkTraffic, Nodes, entry_links, full_links, window_entries
from .hardware_profile import HardwareProfile, Kernel
from .joined_plans import JoinedPlans
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

    def __init__(
        self,
        hardware: HardwareProfile,
        layers: RecurrentLayers,
        plans: JoinedPlans,
        itemsize: int,
        hierarchical: bool,
    ):
        self.hardware, self.layers, self.plans, self.itemsize = hardware, layers, plans, itemsize
        self._nodes, self._hierarchical = (
            Nodes(plans.cp_size, plans.ranks_of_each, hardware.ranks_per_node),
            hierarchical,
        )

    def received(self) -> np.ndarray:
        """Return the bytes that each rank receives in forward, (2, cp_size): inside nodes and between nodes."""
        found = np.zeros((2, self.plans.cp_size))
        for links, row_bytes in (self._states(backwards=False), self._halo()):
            found += links.received * row_bytes
            found[0] += links.forwarded[0] * row_bytes
        return found

    def forward(self) -> PassTimes:
        """Return the times of forward."""
        line = Timeline(self.plans.cp_size)
        halo = line.transfer(self._exchange_seconds(*self._halo()))
        line.transfer(
            self._exchange_seconds(*self._states(backwards=False)),
            line.kernel(self._scan_seconds(backward=False), halo),
        )
        return line.times()

    def backward(self) -> PassTimes:
        """Return the times of backward."""
        line = Timeline(self.plans.cp_size)
        states = line.transfer(self._exchange_seconds(*self._states(backwards=True)))
        line.transfer(self._exchange_seconds(*self._halo()), line.kernel(self._scan_seconds(backward=True), states))
        return line.times()

    def step(self) -> PassTimes:
        """Return the times of forward and backward together, summed over the layers of the group.

        The time of kernels is that of scans.
        """
        return PassTimes(*(self.layers.count * (one + other) for one, other in zip(self.forward(), self.backward())))

    def _scan_seconds(self, backward: bool) -> np.ndarray:
        table, kernel = self.plans.slice_table, self.hardware.kernel
        starts, lengths = table.spans.starts - table.bases, table.spans.lengths
        seconds = scan_seconds(kernel, self.layers, lengths, starts, backward)
        launched = kernel.call_seconds * (self.layers.flops_per_token > 0)
        return np.bincount(table.ranks, seconds, self.plans.cp_size) + launched

    def _states(self, backwards: bool) -> tuple[LinkTraffic, int]:
        """Return the traffic of states, and the bytes of each."""
        slices = self.plans.cut_slices.contracted(backwards)
        return full_links(slices, self._nodes, self._hierarchical), self.layers.summary_bytes

    def _halo(self) -> tuple[LinkTraffic, int]:
        """Return the traffic of the tokens before each slice that convolutions read, and the bytes of each."""
        entries = window_entries(self.plans.slice_table, self.layers.halo_tokens + 1)
        links = entry_links(entries, 1, self._nodes, self._hierarchical)[0]
        return links, self.layers.halo_width * self.itemsize

    def _exchange_seconds(self, links: LinkTraffic, row_bytes: int) -> np.ndarray:
        """Return the time of an exchange, whose steps follow each other."""
        first = self.hardware.wire_seconds(np.maximum(links.received, links.sent) * row_bytes)
        return first + self.hardware.intra_node.seconds(links.forwarded.max(0) * row_bytes)
