"""Sums of partial results by rows in one fused kernel, for CUDA, and what other fused kernels share with it.

Every element of every part is read once, and every element of the result is written once. The kernels are written in
Triton, which comes with PyTorch's CUDA builds. `places` of [`Parts`] tells them which rows belong together. Steps are
the strides of heads and rows, tensor after tensor. Each program handles `ROWS` rows of one head of the result; the
elements of a row of a head are contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .parts import Parts
from .rows import accumulate_dtype, empty_rows


MOST_AT_ONCE = 4
"""The largest number of parts that one launch adds to the first one. With 8, a kernel compiled for Hopper would not
keep all values in registers."""

_ELEMENTS = 2048  # per program: 16 rows of 128 elements


def runs_on(tensor: torch.Tensor) -> bool:
    """Return whether the fused kernels can run on a tensor."""
    return tensor.is_cuda and not isinstance(tensor, FakeTensor) and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def sum_parts(
    parts: Sequence[torch.Tensor], where: Parts, like: torch.Tensor, out: torch.Tensor | None
) -> torch.Tensor:
    """Return the sum by rows of `parts`, see [`~layout.sums.sum_parts`]."""
    from .triton_sums import sum_rows

    base = parts[0] if where.begins_whole else None
    others = parts[1:] if where.begins_whole else parts
    launches = launches_of(len(others))
    for first, stop in launches:
        if stop == len(others) and out is not None:
            target = out
        elif base is not None and base.dtype == like.dtype and len(launches) == 1:
            target = base
        else:
            target = next_total(where, like, stop == len(others))
        summed = tuple(others[first:stop])
        launch(
            sum_rows,
            target,
            target if base is None else base,
            summed,
            steps_of(target, target if base is None else base, *summed),
            *places_from(where, first + where.begins_whole),
            HAS_BASE=base is not None,
            IN_PLACE=target is base,
            DOUBLE=target.dtype == torch.float64,
        )
        base = target
    return base


def take_rows(source: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """Copy the rows `index` (n,) of `source` (heads, T, D) to `out` (heads, n, D)."""
    from .triton_sums import sum_rows

    steps = steps_of(out, out, source)
    constants = {"HAS_BASE": False, "IN_PLACE": False, "DOUBLE": out.dtype == torch.float64}
    launch(sum_rows, out, out, (source,), steps, index[:, None], 1, **constants)


def launches_of(parts: int) -> list[tuple[int, int]]:
    """Return which parts, [first, stop), each launch combines."""
    return [(first, min(first + MOST_AT_ONCE, parts)) for first in range(0, max(parts, 1), MOST_AT_ONCE)]


def next_total(where: Parts, like: torch.Tensor, ends: bool) -> torch.Tensor:
    """Return an empty tensor for a launch's result: in the accumulate dtype, unless it is the final result."""
    return empty_rows(where.count, like, like.dtype if ends else accumulate_dtype(like.dtype))


def places_from(where: Parts, first: int) -> tuple[torch.Tensor, int]:
    """Return the columns of `places` from that of part `first` on, and the stride of rows."""
    return where.places[:, first:] if first else where.places, len(where.rows)


def steps_of(*tensors: torch.Tensor) -> tuple[int, ...]:
    """Return the strides of heads and rows of tensors (heads, rows) or (heads, rows, D), one after the other."""
    assert all(each.dim() == 2 or each.stride(2) == 1 or each.shape[2] == 1 for each in tensors)
    return tuple(step for tensor in tensors for step in tensor.stride()[:2])


def launch(kernel: Any, target: torch.Tensor, *args: Any, **constants: Any) -> None:
    """Launch a kernel with one program per block of rows and head of `target` (heads, rows, D)."""
    heads, count, width = target.shape
    if not count:
        return
    columns = max(16, 1 << (width - 1).bit_length())
    rows = max(1, _ELEMENTS // columns)
    with torch.cuda.device_of(target):  # Triton starts kernels on the current device
        kernel[(-(-count // rows), heads)](target, *args, count, WIDTH=width, ROWS=rows, COLUMNS=columns, **constants)
