"""A context manager that sets PyTorch's global switch for deterministic algorithms for a few operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import deterministic


@contextmanager
def deterministic_algorithms(on: bool) -> Iterator[None]:
    """Set PyTorch's switch for deterministic algorithms to `on` inside the context, without filling new memory.

    While the switch is on, index_add_ and index_copy_ sort their indices, and every new tensor is filled with NaN. The
    engine needs neither: the rows that one call writes to are distinct, and it reads a tensor only where it has
    written to it. Therefore the engine runs with the switch off, whatever the user has set, and turns it on only for
    the kernel whose backward reads it. The other kernels are told when they are created.
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
