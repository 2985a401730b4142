"""Timeline of one attention layer's pass: what the devices compute, what travels meanwhile, and who waits for whom.

Every rank has a device, which runs kernels and copies, and a link, which runs transfers; each runs one piece of work
after the other in the order in which they are added. A piece of work also waits for the earlier ones that it names:

    device  |-- kernel 0 --|waits|-- kernel 1 --|
    link    |---- hop 1 ---------|---- hop 2 ----|
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class PassTimes(NamedTuple):
    """Seconds, (cp_size,) each, of one attention layer's forward or backward."""

    attention: np.ndarray
    copies: np.ndarray  # packing, merging and adding what travels
    exposed: np.ndarray  # waiting for what travels: the rest of the time until everything has ended
    transfer: np.ndarray  # on the wire, whether it is waited for or not


class Timeline:
    """Schedules the work of all ranks in one pass. Every rank begins at 0.

    Methods that add work take the (cp_size,) seconds that it needs on each rank and the ends of the earlier work that
    a rank has to finish first; they return the (cp_size,) seconds at which the work ends.
    """

    def __init__(self, cp_size: int):
        self.nothing = np.zeros(cp_size)
        """(cp_size,) zeros: the seconds of no work, and the end of no work."""
        self._device_end = self._link_end = self._attention = self._copies = self._transfer = self.nothing

    def kernel(self, seconds: np.ndarray, *after: np.ndarray) -> np.ndarray:
        self._attention = self._attention + seconds
        self._device_end = _latest(self._device_end, after) + seconds
        return self._device_end

    def copy(self, seconds: np.ndarray, *after: np.ndarray) -> np.ndarray:
        """Copies or adds rows."""
        self._copies = self._copies + seconds
        self._device_end = _latest(self._device_end, after) + seconds
        return self._device_end

    def transfer(self, seconds: np.ndarray, *after: np.ndarray) -> np.ndarray:
        """Moves rows as soon as the rank itself is ready."""
        return self._move(seconds, _latest(self._link_end, after))

    def hop(self, seconds: np.ndarray, *after: np.ndarray) -> np.ndarray:
        """Moves rows from each rank to the next one, as soon as both are ready."""
        start = _latest(self._link_end, after)
        return self._move(seconds, np.maximum(start, np.roll(start, 1)))

    def collective(self, seconds: np.ndarray, *after: np.ndarray) -> np.ndarray:
        """Moves rows between all ranks, as soon as all are ready."""
        return self._move(seconds, _latest(self._link_end, after).max())

    def times(self) -> PassTimes:
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
