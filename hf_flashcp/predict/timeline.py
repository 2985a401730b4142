"""`Timeline`: schedules the kernels, copies and transfers of all ranks in one pass of an attention layer.

Every rank has a device, which runs kernels and copies, and a link, which runs transfers. Each of them runs one piece
of work at a time, in the order in which the work is added. A piece of work may also wait for earlier pieces:

    device  |-- kernel 0 --|waits|-- kernel 1 --|
    link    |---- hop 1 ---------|---- hop 2 ----|
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class PassTimes(NamedTuple):
    """Seconds of each rank in one attention layer's forward or backward, (cp_size,) each."""

    attention: np.ndarray  # attention kernels
    copies: np.ndarray  # packing, merging and adding rows that travel
    exposed: np.ndarray  # waiting for transfers: all other time until device and link have finished
    transfer: np.ndarray  # time on the wire, including transfers that no rank waits for


class Timeline:
    """Schedules the work of all ranks in one pass. Every rank begins at time 0.

    The methods that add work take its duration on each rank, (cp_size,) seconds, and the end times of earlier work
    that a rank has to finish first. They return the times at which the work ends, (cp_size,) seconds.
    """

    def __init__(self, cp_size: int):
        self.nothing = np.zeros(cp_size)
        """Zeros, (cp_size,): the duration and the end time of no work."""
        self._device_end = self._link_end = self._attention = self._copies = self._transfer = self.nothing

    def kernel(self, seconds: np.ndarray, *after: np.ndarray) -> np.ndarray:
        """Add a kernel call."""
        self._attention = self._attention + seconds
        self._device_end = _latest(self._device_end, after) + seconds
        return self._device_end

    def copy(self, seconds: np.ndarray, *after: np.ndarray) -> np.ndarray:
        """Add work that copies or adds up rows."""
        self._copies = self._copies + seconds
        self._device_end = _latest(self._device_end, after) + seconds
        return self._device_end

    def transfer(self, seconds: np.ndarray, *after: np.ndarray) -> np.ndarray:
        """Add a transfer that starts on each rank as soon as that rank is ready."""
        return self._move(seconds, _latest(self._link_end, after))

    def hop(self, seconds: np.ndarray, *after: np.ndarray) -> np.ndarray:
        """Add a transfer from each rank to the next one that starts as soon as both are ready."""
        start = _latest(self._link_end, after)
        return self._move(seconds, np.maximum(start, np.roll(start, 1)))

    def collective(self, seconds: np.ndarray, *after: np.ndarray) -> np.ndarray:
        """Add a transfer between all ranks that starts as soon as all of them are ready."""
        return self._move(seconds, _latest(self._link_end, after).max())

    def times(self) -> PassTimes:
        """Return the times of the whole pass."""
        end = np.maximum(self._device_end, self._link_end)
        return PassTimes(self._attention, self._copies, end - self._attention - self._copies, self._transfer)

    def _move(self, seconds: np.ndarray, start: np.ndarray) -> np.ndarray:
        self._transfer = self._transfer + seconds
        self._link_end = start + seconds
        return self._link_end


def _latest(free: np.ndarray, after: tuple[np.ndarray, ...]) -> np.ndarray:
    for end in after:
        free = np.maximum(free, end)
    return free
