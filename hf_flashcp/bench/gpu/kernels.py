"""Step "kernels": every kernel that runs here, forward and backward, against the formulas in float64.

The bound is that of FlashAttention's own tests: no more than twice the error of the formulas in the kernel's dtype,
with scores and probabilities rounded to it, as transformers' eager attention computes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ...attention.kernels import CAPABILITIES, AttentionKernel, EagerKernel
from ...attention.kernels.base import hidden
from ...doctor.layer_errors import relative_error
from ...layout import Rectangle
from .settings import Found, Run, Settings, fused_kernels


TIMES = 2.0
"""Largest error over that of the formulas in the same dtype."""

EXACT = 1e-12
"""Largest relative error of the formulas in float64 on the device against autograd."""

HEAD_DIMS = ((64, 64), (80, 80), (128, 128), (256, 256), (192, 128), (12, 16))
GROUPS = (1, 4, 8)
KV_HEADS = 2
FEW = 8
"""Problems of a kernel that are written out."""

NAMES = ("out", "logsumexp", "dQ", "dK", "dV")


class Case(NamedTuple):
    """Rectangles of one kernel call, and the window."""

    name: str
    rectangles: tuple[Rectangle, ...]
    causal: bool
    window: int | None = None


def cases(unit: int) -> list[Case]:
    """Rectangles of a few times `unit` queries, with edges off every tile."""
    long, middle, short = 5 * unit + 3, 2 * unit, unit // 3 + 1
    squares = (
        Rectangle(0, long, 0, long),
        Rectangle(long, long + 1, long, long + 1),
        Rectangle(long + 1, long + 1 + middle, long + 1, long + 1 + middle),
    )
    bands = (Rectangle(0, middle, 0, long), Rectangle(middle + 3, middle + 3 + short, long + 5, long + 5 + middle))
    disjoint = (Rectangle(0, short, 0, middle), Rectangle(short, long, middle, middle + long))
    prefixes = (
        Rectangle(0, short, 0, middle),
        Rectangle(short, middle, 0, long),
        Rectangle(middle, middle + 1, long, long + 1),
    )
    return [
        Case("causal squares", squares, True),
        Case("causal squares, window", squares, True, unit + 5),
        Case("causal bands", bands, True),
        Case("causal bands, window", bands, True, short),
        Case("full, disjoint keys", disjoint, False),
        Case("full, prefixes", prefixes, False),
    ]


def kernels(run: Run, settings: Settings) -> Found:
    found = Found()
    (measured,) = run(1, _check)
    found.add("Errors against float64, forward and backward", *measured["records"])
    found.problems += measured["problems"]
    found.cut += measured["cut"]
    return found


def _check(settings: Settings) -> dict[str, Any]:
    device = settings.prepare()
    found = Found()
    error = _formulas_error(device)
    found.add(
        "", {"kernel": "eager", "dtype": "float64", "cases": 1, "largest error": error, "over the formulas": 0.0}
    )
    found.require(error <= EXACT, f"the formulas in float64 are off by {error:.1e} on {device.type}")
    unit = settings.sized(128, 16)
    shapes = [
        (heads * KV_HEADS, KV_HEADS, *dims)
        for dims, heads in itertools.product(HEAD_DIMS, GROUPS)
        if not settings.rehearses or (dims, heads) in (((64, 64), 4), ((192, 128), 1), ((12, 16), 1))
    ]
    names = fused_kernels(device, torch.bfloat16, 64, 64)
    found.require(bool(names), "no fused kernel runs on this device")
    for name in names:
        for dtype in (torch.bfloat16, torch.float16):
            if found.has_time(settings, 2, f"{name} in {dtype}"):
                _check_kernel(found, name, dtype, shapes, cases(unit), device)
    return {"records": found.tables[""], "problems": found.problems, "cut": found.cut}


def _check_kernel(
    found: Found,
    name: str,
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, int, int, int]],
    todo: Sequence[Case],
    device: torch.device,
) -> None:
    count, worst, over = 0, 0.0, 0.0
    wrong: list[str] = []
    for shape in shapes:
        if name not in fused_kernels(device, dtype, shape[2], shape[3]):
            continue
        kernel = CAPABILITIES[name].make(False)
        for case in todo:
            errors, limits = kernel_errors(kernel, shape, case, dtype, device)
            count += 1
            for what, error, limit in zip(NAMES, errors, limits):
                worst, over = max(worst, error), max(over, error / limit)
                if not error <= TIMES * limit:
                    where = f"{name}, {case.name}, heads {shape}, {dtype}"
                    wrong.append(f"{what} of {where} is off by {error:.1e}, the formulas by {limit:.1e}")
            if not _repeats(name, shape, case, dtype, device):
                wrong.append(f"two deterministic runs of {name}, {case.name}, heads {shape}, {dtype} differ")
    found.problems += wrong[:FEW]
    found.require(len(wrong) <= FEW, f"{name} in {dtype}: {len(wrong) - FEW} more like these")
    label = str(dtype).removeprefix("torch.")
    found.add("", {"kernel": name, "dtype": label, "cases": count, "largest error": worst, "over the formulas": over})


def kernel_errors(
    kernel: AttentionKernel, shape: tuple[int, int, int, int], case: Case, dtype: torch.dtype, device: torch.device
) -> tuple[list[float], list[float]]:
    """Relative errors (Frobenius norm) of out, logsumexp, dQ, dK and dV against the formulas in float64, of the kernel
    and of the formulas in `dtype`. Backward gets an output and logsumexp over more keys than its own, as after a
    merge.

    Args:
        shape: query heads, KV heads, width of keys, width of values.
    """
    inputs = _inputs(shape, case, dtype, device)
    wide = [tensor.double() for tensor in inputs]
    exact = EagerKernel().forward(*wide[:3], case.rectangles, **_options(case, shape))
    merged = _merged(exact, wide[3], case)
    expected = [*exact, *_backward(EagerKernel(), wide, merged, case, shape)]
    given = merged[0].to(dtype), merged[1].float()
    ours = [
        *kernel.forward(*inputs[:3], case.rectangles, **_options(case, shape)),
        *_backward(kernel, inputs, given, case, shape),
    ]
    plain = [
        *PlainKernel().forward(*inputs[:3], case.rectangles, **_options(case, shape)),
        *_backward(PlainKernel(), inputs, given, case, shape),
    ]
    return [[relative_error(a, b) for a, b in zip(found, expected)] for found in (ours, plain)]


class PlainKernel(EagerKernel):
    """The formulas with scores, probabilities and their gradients rounded to the dtype of the queries."""

    def _forward_piece(self, q, k, v, mask, is_causal, scale, softcap):
        scores = (q @ k.mT).to(q.dtype) * scale
        scores = scores if mask is None else scores.masked_fill(mask, -torch.inf)
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v, scores.float().logsumexp(-1)

    def _backward_piece(self, do, q, k, v, o, lse, mask, is_causal, scale, softcap):
        scores = (q @ k.mT) * scale
        scores = scores if mask is None else scores.masked_fill(mask, -torch.inf)
        p = (scores.float() - lse[..., None]).exp().to(q.dtype)
        ds = p * (do @ v.mT - (do.float() * o.float()).sum(-1, keepdim=True).to(q.dtype)) * scale
        return ds @ k, ds.mT @ q, p.mT @ do


def _inputs(shape, case: Case, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """query, key, value, grad_out as a model has them: views of (T, H, D)."""
    heads, kv_heads, key_dim, value_dim = shape
    rows = max(r.q_stop for r in case.rectangles)
    keys = max(r.k_stop for r in case.rectangles)
    generator = torch.Generator().manual_seed(0)
    sizes = [(rows, heads, key_dim), (keys, kv_heads, key_dim), (keys, kv_heads, value_dim), (rows, heads, value_dim)]
    return [torch.randn(size, generator=generator).to(device, dtype).transpose(0, 1) for size in sizes]


def _options(case: Case, shape) -> dict[str, Any]:
    return {"causal": case.causal, "scale": shape[2] ** -0.5, "window": case.window}


def _merged(exact, grad_out: torch.Tensor, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """An output and logsumexp of all rows, as if every row had seen further keys whose values are 0 and whose weight
    is a third of its own keys'."""
    index = torch.cat([torch.arange(r.q_start, r.q_stop) for r in case.rectangles]).to(grad_out.device)
    lse = exact[1].new_zeros(grad_out.shape[:2]).index_copy_(1, index, exact[1] + torch.tensor(4 / 3).log())
    return torch.zeros_like(grad_out).index_copy_(1, index, exact[0] * 0.75), lse


def _backward(kernel: AttentionKernel, inputs, merged, case: Case, shape) -> list[torch.Tensor]:
    query, key, value, grad_out = inputs
    dtype = torch.promote_types(query.dtype, torch.float32)
    grads = [torch.zeros_like(tensor, dtype=dtype) for tensor in (query, key, value)]
    gradients = dict(zip(("grad_query", "grad_key", "grad_value"), grads))
    kernel.backward(grad_out, query, key, value, *merged, case.rectangles, **_options(case, shape), **gradients)
    return grads


def _repeats(name: str, shape, case: Case, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether two deterministic backward passes agree to the last bit; true where the kernel does not promise it."""
    most = CAPABILITIES[name].max_deterministic_head_dim
    if most is not None and max(shape[2:]) > most:
        return True
    kernel, inputs = CAPABILITIES[name].make(True), _inputs(shape, case, dtype, device)
    exact = EagerKernel().forward(
        *(tensor.double() for tensor in inputs[:3]), case.rectangles, **_options(case, shape)
    )
    merged = _merged(exact, inputs[3].double(), case)
    given = merged[0].to(dtype), merged[1].float()
    first, second = (_backward(kernel, inputs, given, case, shape) for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(first, second))


def _formulas_error(device: torch.device) -> float:
    """The formulas in float64, which all else is held against, against autograd over one mask."""
    shape, case = (4, 2, 16, 16), Case("", (Rectangle(0, 37, 0, 37),), True, 9)
    inputs = _inputs(shape, case, torch.float64, device)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    key, value = (leaf.repeat_interleave(2, 0) for leaf in leaves[1:])
    scores = (leaves[0] @ key.mT * shape[2] ** -0.5).masked_fill(hidden(37, 37, 9, device), -torch.inf)
    out = scores.softmax(-1) @ value
    out.backward(inputs[3])
    own = EagerKernel().forward(*inputs[:3], case.rectangles, **_options(case, shape))
    ours = [own[0], *_backward(EagerKernel(), inputs, own, case, shape)]
    reference = [out.detach(), *(leaf.grad for leaf in leaves)]
    return max(relative_error(a, b) for a, b in zip(ours, reference))
