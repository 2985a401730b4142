"""Step "kernels": compares every kernel that runs here, forward and backward, with the formulas in float64.

The bound is that of FlashAttention's own tests: at most twice the error of the formulas in the kernel's dtype, with
scores and probabilities rounded to that dtype, as in transformers' eager attention.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...attention.kernels import (
    CAPABILITIES,
    AttentionKernel,
    BackwardInputs,
    Device,
    EagerKernel,
    Gradients,
    Layer,
    ScoreOptions,
    make_kernel,
)
from ...attention.kernels.base import hidden
from ...integrations.gradient_check import relative_error
from ...layout import Rectangle
from ..kernels import fused_kernels
from .settings import Found, Settings, compile_seconds


TIMES = 2.0
"""Largest allowed ratio of a kernel's error to the error of the formulas in the same dtype."""

EXACT = 1e-12
"""Largest allowed relative error of the formulas in float64 on the device, compared with autograd."""

HEAD_DIMS = ((64, 64), (80, 80), (128, 128), (256, 256), (192, 128), (12, 16))
GROUPS = (1, 4, 8)
KV_HEADS = 2
FEW_HEADS = (((128, 128), 4), ((192, 128), 1), ((64, 64), 8))
"""Widths and groups for kernels that compile for each of them."""

SOFTCAP = 3.0
"""A softcap that changes scores of random inputs, most of which are between -3 and 3."""

FEW = 8
"""Number of problems per kernel that are reported in full."""

TITLE = "Errors against float64, forward and backward"
NAMES = ("out", "logsumexp", "dQ", "dK", "dV")


Shape = tuple[int, int, int, int]


class Case(NamedTuple):
    """The rectangles of one kernel call, its sliding window and its softcap."""

    name: str
    rectangles: tuple[Rectangle, ...]
    causal: bool
    window: int | None = None
    softcap: float | None = None

    def layer(self, shape: Shape, dtype: torch.dtype) -> Layer:
        return Layer(dtype, *shape[2:], window=self.window is not None, softcap=self.softcap is not None)


def cases(unit: int) -> list[Case]:
    """Return cases whose rectangles have up to 5 x `unit` queries, with edges that are not aligned with tiles."""
    long, middle, short = 5 * unit + 3, 2 * unit, unit // 3 + 1
    squares = (
        Rectangle(0, long, 0, long),
        Rectangle(long, long + 1, long, long + 1),
        Rectangle(long + 1, long + 1 + middle, long + 1, long + 1 + middle),
    )
    bands = (Rectangle(0, middle, 0, long), Rectangle(middle + 3, middle + 3 + short, long + 5, long + 5 + middle))
    many_keys = (Rectangle(0, short, 0, middle), Rectangle(short, short + middle, middle, middle + long))
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
        Case("full, more than twice as many keys", many_keys, False),  # backward may fold query heads into queries
        Case("causal bands, window and softcap", bands, True, short, SOFTCAP),
        Case("full, prefixes, softcap", prefixes, False, None, SOFTCAP),
    ]


def kernels(settings: Settings) -> Found:
    """Check the formulas against autograd, and every fused kernel against the formulas."""
    device, found = settings.prepare(), Found()
    error = max(_formulas_error(device, softcap) for softcap in (None, SOFTCAP))
    found.add(TITLE, {"kernel": "eager", "dtype": "float64", "cases": 2, "largest error": error})
    found.require(error <= EXACT, f"the formulas in float64 are off by {error:.1e} on {device.type}")
    names = fused_kernels(device, Layer(torch.bfloat16, 64, 64))
    found.require(bool(names), "no fused kernel runs on this device")
    # Kernels that compile come last, so that the others do not run out of time.
    for name in sorted(names, key=compile_seconds):
        for dtype in (torch.bfloat16, torch.float16):
            _check_kernel(found, settings, name, dtype, device)
    return found


def _shapes(settings: Settings, name: str) -> list[Shape]:
    chosen = FEW_HEADS if compile_seconds(name) else itertools.product(HEAD_DIMS, GROUPS)
    if settings.rehearses:
        chosen = (((64, 64), 4), ((192, 128), 1), ((12, 16), 1))
    return [(heads * KV_HEADS, KV_HEADS, *dims) for dims, heads in chosen]


def _check_kernel(found: Found, settings: Settings, name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Run every case for which the kernel supports the layer."""
    count, left_out, worst, over = 0, 0, 0.0, 0.0
    wrong: list[str] = []
    kernel, deterministic = (make_kernel(name, device, flag) for flag in (False, True))
    for shape, case in itertools.product(_shapes(settings, name), cases(settings.sized(128, 16))):
        described = case.layer(shape, dtype)
        if name not in fused_kernels(device, described):
            continue
        if settings.seconds_left() < 1 + 2 * compile_seconds(name):
            left_out += 1
            continue
        layer = _Layer(shape, case, dtype, device)
        errors, limits = layer.errors(kernel), layer.errors(PlainKernel())
        count += 1
        where = f"{name}, {case.name}, heads {shape}, {dtype}"
        for what, error, limit in zip(NAMES, errors, limits):
            worst, over = max(worst, error), max(over, error / limit)
            if not error <= TIMES * limit:
                wrong.append(f"{what} of {where} is off by {error:.1e}, the formulas by {limit:.1e}")
        repeats = (
            CAPABILITIES[name].reason_against(Device.here(device), described._replace(deterministic=True)) is None
        )
        if repeats and not layer.repeats(deterministic):
            wrong.append(f"two deterministic runs of {where} differ")
    found.problems += wrong[:FEW]
    found.require(len(wrong) <= FEW, f"{name} in {dtype}: {len(wrong) - FEW} more like these")
    label = str(dtype).removeprefix("torch.")
    if left_out:
        found.cut.append(f"{left_out} cases of {name} in {label}")
    record = {"kernel": name, "dtype": label, "cases": count, "largest error": worst, "over the formulas": over}
    found.add(TITLE, record)


class _Layer:
    """Random inputs of one case, and the results for them in float64.

    `shape` has the query heads, KV heads, width of keys and width of values. As after a merge, backward gets an output
    and logsumexp over more keys than those of the case.
    """

    def __init__(self, shape: Shape, case: Case, dtype: torch.dtype, device: torch.device):
        self._case, self._options = case, ScoreOptions(case.causal, shape[2] ** -0.5, case.window, case.softcap)
        self._inputs = _inputs(shape, case, dtype, device)
        wide = [tensor.double() for tensor in self._inputs]
        out, lse = self._forward(EagerKernel(), wide)
        merged = _merged(out, lse, wide[3], case)
        self._given = merged[0].to(dtype), merged[1].float()
        self._exact = [out, lse, *self._backward(EagerKernel(), wide, merged)]

    def errors(self, kernel: AttentionKernel) -> list[float]:
        """Return the relative errors (Frobenius norm) of out, logsumexp, dQ, dK and dV."""
        ours = *self._forward(kernel, self._inputs), *self._backward(kernel, self._inputs, self._given)
        return [relative_error(a, b) for a, b in zip(ours, self._exact)]

    def repeats(self, kernel: AttentionKernel) -> bool:
        """Return whether two backward passes give bitwise equal gradients."""
        first, second = (self._backward(kernel, self._inputs, self._given) for _ in range(2))
        return all(torch.equal(a, b) for a, b in zip(first, second))

    def _forward(self, kernel: AttentionKernel, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return kernel.forward(*inputs[:3], self._case.rectangles, self._options)

    def _backward(
        self, kernel: AttentionKernel, inputs: Sequence[torch.Tensor], merged: tuple[torch.Tensor, torch.Tensor]
    ) -> Gradients:
        """Return the gradients; those of the query for all rows, which are 0 where no rectangle has them."""
        case = self._case
        grads = kernel.backward(BackwardInputs(inputs[3], *inputs[:3], *merged), case.rectangles, self._options)
        return grads._replace(query=_placed(grads.query, case, inputs[0].shape[1]))


class PlainKernel(EagerKernel):
    """The attention formulas, with scores, probabilities and their gradients rounded to the dtype of the queries."""

    def _forward_block(self, q, k, v, keys, options):
        scores = self._rounded((q @ k.mT).to(q.dtype), keys, options)
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v, scores.float().logsumexp(-1)

    def _backward_block(self, inputs, keys, options):
        do, q, k, v, o, lse = inputs
        scores = self._rounded(q @ k.mT, keys, options)
        p = (scores.float() - lse[..., None]).exp().to(q.dtype)
        ds = p * (do @ v.mT - (do.float() * o.float()).sum(-1, keepdim=True).to(q.dtype)) * options.scale
        if options.softcap is not None:
            ds = ds * (1 - (scores.masked_fill(p == 0, 0) / options.softcap).square())
        return ds @ k, ds.mT @ q, p.mT @ do

    def _rounded(self, products, keys, options):
        scores = products * options.scale
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        return scores if keys.mask is None else scores.masked_fill(keys.mask, -torch.inf)


def _inputs(shape: Shape, case: Case, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Return query, key, value and grad_out as in a model: (H, T, D) views of (T, H, D) tensors."""
    heads, kv_heads, key_dim, value_dim = shape
    rows = max(r.q_stop for r in case.rectangles)
    keys = max(r.k_stop for r in case.rectangles)
    generator = torch.Generator().manual_seed(0)
    sizes = [(rows, heads, key_dim), (keys, kv_heads, key_dim), (keys, kv_heads, value_dim), (rows, heads, value_dim)]
    return [torch.randn(size, generator=generator).to(device, dtype).transpose(0, 1) for size in sizes]


def _merged(
    out: torch.Tensor, lse: torch.Tensor, grad_out: torch.Tensor, case: Case
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output and logsumexp of all rows after a merge with further keys.

    The further keys have values of 0, and a third of the weight of the case's own keys.
    """
    rows = grad_out.shape[1]
    return _placed(out * 0.75, case, rows), _placed(lse + math.log(4 / 3), case, rows)


def _placed(values: torch.Tensor, case: Case, rows: int) -> torch.Tensor:
    """Return values (heads, n, ...) of the rectangles' queries among all rows (heads, rows, ...), zeros elsewhere."""
    index = torch.cat([torch.arange(r.q_start, r.q_stop) for r in case.rectangles]).to(values.device)
    return values.new_zeros(len(values), rows, *values.shape[2:]).index_copy_(1, index, values)


def _formulas_error(device: torch.device, softcap: float | None) -> float:
    """Return the error of the formulas in float64, which serve as the reference, compared with autograd."""
    shape, case = (4, 2, 16, 16), Case("", (Rectangle(0, 37, 0, 37),), True, 9, softcap)
    query, key, value, grad_out = _inputs(shape, case, torch.float64, device)
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    keys, values = (leaf.repeat_interleave(2, 0) for leaf in leaves[1:])
    scores = leaves[0] @ keys.mT * shape[2] ** -0.5
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(hidden(37, 37, 9, device), -torch.inf)
    out = scores.softmax(-1) @ values
    out.backward(grad_out)
    options = ScoreOptions(case.causal, shape[2] ** -0.5, case.window, softcap)
    ours, lse = EagerKernel().forward(query, key, value, case.rectangles, options)
    grads = EagerKernel().backward(BackwardInputs(grad_out, query, key, value, ours, lse), case.rectangles, options)
    reference = [out.detach(), *(leaf.grad for leaf in leaves)]
    return max(relative_error(a, b) for a, b in zip((ours, *grads), reference))
