"""A context manager that makes PyTorch compute in fp64 even where a model asks for fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class float64_throughout(TorchFunctionMode):  # noqa: N801 (used as a context manager)
    """Replace fp32 with fp64 in every call to PyTorch inside the context.

    This covers `.float()`, `.to(torch.float32)`, `softmax(dtype=torch.float32)` and any other call with fp32 among its
    arguments. Many models compute norms, RoPE, router logits or the softmax of eager attention in fp32 whatever their
    dtype. Two fp64 runs that should differ only by fp64 rounding would then differ by about 1e-7, which would hide an
    error of that size. Layers that gradient checkpointing recomputes in backward are not covered.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*args, **kwargs)
