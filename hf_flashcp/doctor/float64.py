"""A context in which everything is computed in fp64, also what models compute in fp32 on purpose."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class float64_throughout(TorchFunctionMode):  # noqa: N801 (used as a context manager)
    """Within it `.float()`, `.to(torch.float32)`, `softmax(dtype=torch.float32)` and whatever else names fp32 in a
    call to PyTorch works in fp64.

    Many models compute norms, RoPE, router logits or eager attention's softmax in fp32 whatever their dtype is. Two
    fp64 runs that differ by rounding then differ by 1e-7, which would hide an error of that size. It does not reach
    what a checkpointed layer computes again in backward.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*args, **kwargs)
