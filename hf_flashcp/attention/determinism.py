"""PyTorch's global switch for deterministic algorithms, set for a few operators at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import deterministic


@contextmanager
def deterministic_algorithms(on: bool) -> Iterator[None]:
    """Inside, PyTorch's switch is `on`, and new memory is left as it is.

    Where the switch is on, index_add_ and index_copy_ sort their indices and every new tensor is filled with NaN.
    That guards against what the engine never does: the rows that one call writes to are distinct, and a tensor is
    read only where it was written. So the engine runs with the switch off, whatever the user has set, and turns it on
    for the one kernel whose backward reads it. Kernels are told separately, when they are made.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = deterministic.fill_uninitialized_memory
    if not on and not before[0]:
        yield
        return
    torch.use_deterministic_algorithms(on)
    deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = filled
