"""The GPU that a step runs on: its packaged hardware profile, and whether something fits in its memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from ...predict import HARDWARE


OUT_OF_MEMORY = "out of memory"
"""Stands in a record in place of the figure that could not be measured."""


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def packaged_hardware(name: str) -> str | None:
    """Name of the packaged profile for a GPU that PyTorch calls `name`, if there is one."""
    words = re.findall("[a-z0-9]+", name.lower())  # so that a GH200 is not taken for an H200
    return next((hardware for hardware in HARDWARE if hardware in words), None)


def fits_in_memory(function: Callable[[], Any]) -> bool:
    """Calls `function` and waits for the device. `False`, with PyTorch's cache emptied, if memory ran out."""
    try:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return True
    except torch.OutOfMemoryError:
        pass  # the cache is emptied below, when the error no longer holds the tensors of its frames
    torch.cuda.empty_cache()
    return False
