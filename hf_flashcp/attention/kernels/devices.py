"""`Device` and `Layer`: what the choice of a kernel depends on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ...errors import ConfigurationError


GPUS: Mapping[str, tuple[int, int]] = {
    "a100": (8, 0),
    "l40s": (8, 9),
    "h100": (9, 0),
    "h200": (9, 0),
    "b200": (10, 0),
    "b300": (10, 3),
    "rtx5090": (12, 0),
}
"""CUDA compute capabilities of GPUs by name."""


class Device(NamedTuple):
    """The type of a device ("cpu", "cuda", ...) and, for a known GPU, its CUDA compute capability."""

    type: str
    capability: tuple[int, int] | None = None

    @classmethod
    def here(cls, device: torch.device | str) -> Device:
        """Describe a device of this machine. The capability is unknown if the machine has no GPU."""
        device = torch.device(device)
        known = device.type == "cuda" and torch.cuda.is_available()
        return cls(device.type, torch.cuda.get_device_capability(device) if known else None)

    @classmethod
    def named(cls, gpu: str) -> Device:
        """Describe a GPU by its name in [`GPUS`].

        Raises:
            ConfigurationError: the name is unknown.
        """
        if gpu.lower() not in GPUS:
            raise ConfigurationError(f"The GPU {gpu!r} is unknown. Choose one of {', '.join(GPUS)}.")
        return cls("cuda", GPUS[gpu.lower()])

    @property
    def major(self) -> int | None:
        """The generation of a known GPU: 8 Ampere and Ada, 9 Hopper, 10 Blackwell, 12 Blackwell for workstations."""
        return None if self.capability is None else self.capability[0]


class Layer(NamedTuple):
    """What a layer's attention needs from a kernel.

    `None` stands for an unknown dtype or width, which is not checked. Sliding windows, grouped queries and attention
    sinks are not listed where every kernel supports them.
    """

    dtype: torch.dtype | None = None
    key_dim: int | None = None
    value_dim: int | None = None
    window: bool = False
    softcap: bool = False
    deterministic: bool = False  # whether gradients must be bitwise reproducible

    @property
    def widest(self) -> int:
        """Width of the wider of key and value heads; 0 if unknown."""
        return max(self.key_dim or 0, self.value_dim or 0)


ANY_LAYER = Layer()
"""A layer about which nothing is known."""
