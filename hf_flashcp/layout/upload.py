"""`upload`: copies from host to device for which the host does not wait."""

from __future__ import annotations

import torch


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor from the host to `device`, where later operations see it, without waiting for the device.

    On CUDA the copy starts from pinned memory, because a copy from pageable memory may wait for earlier work.
    """
    if device.type == "cuda" and torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
