"""Event simulation of one attention layer's pass: what a device computes, what travels meanwhile, who waits for whom.

Every rank has a device, which runs kernels and copies, and a link, which runs transfers, each one event after the
other in the order of the list. An event also waits for the events that it names:

    device  |-- kernel 0 --|waits|-- kernel 1 --|
    link    |---- hop 1 ---------|---- hop 2 ----|
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


KERNEL, COPY = "kernel", "copy"
HOP, COLLECTIVE = "hop", "collective"
"""A hop begins on a rank when the rank before it is ready too, a collective when all are."""


class Event(NamedTuple):
    """Something that every rank does.

    Attributes:
        kind (`str`): `KERNEL`, `COPY`, `HOP` or `COLLECTIVE`.
        seconds (`np.ndarray`): (cp_size,) that it takes.
        after (`tuple[int, ...]`): places in the list of earlier events that the same rank must have ended.
    """

    kind: str
    seconds: np.ndarray
    after: tuple[int, ...] = ()


def ends(events: Sequence[Event], cp_size: int) -> list[np.ndarray]:
    """(cp_size,) when each event ends, if every rank begins at 0."""
    free = {True: np.zeros(cp_size), False: np.zeros(cp_size)}
    found: list[np.ndarray] = []
    for event in events:
        travels = event.kind in (HOP, COLLECTIVE)
        start = np.max([free[travels], *(found[place] for place in event.after)], axis=0)
        if event.kind == HOP:
            start = np.maximum(start, np.roll(start, 1))
        elif event.kind == COLLECTIVE:
            start = np.full(cp_size, start.max())
        free[travels] = start + event.seconds
        found.append(free[travels])
    return found


def parts(events: Sequence[Event], cp_size: int) -> tuple[np.ndarray, ...]:
    """`(attention, copies, exposed, transfer)` of a pass, each (cp_size,), as [`StepTime`] has them: `exposed` is what
    is left of the time until everything has ended."""
    none = np.zeros(cp_size)
    kernels, copies, transfer = (
        sum((event.seconds for event in events if event.kind in kinds), none)
        for kinds in ((KERNEL,), (COPY,), (HOP, COLLECTIVE))
    )
    end = np.max([none, *ends(events, cp_size)], axis=0)
    return kernels, copies, end - kernels - copies, transfer
