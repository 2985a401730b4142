"""Attention kernels: rectangles of queries and keys, with or without a causal mask.

A kernel knows nothing of ranks or documents. Shapes: query (H_q, T, D_k), key (H_kv, S, D_k), value (H_kv, S, D_v),
any strides; query head h attends with key head h // (H_q / H_kv).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from ..layout import Rectangle


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which partial outputs, logsumexp and gradients are summed: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


class AttentionKernel(Protocol):
    """What a backend provides.

    With `causal` a rectangle is aligned bottom-right: its last query sees all its keys, the query before it all but
    the last, and so on. With `window`, which comes only with `causal`, a query sees no more than the last `window` of
    those. With `softcap` scores are softcap * tanh(scaled scores / softcap).
    """

    name: str

    def reason_against(self, device_type: str, softcap: float | None) -> str | None:
        """Why it cannot run a layer with these on such a device, as the rest of a sentence that begins with its name;
        `None` if it can."""
        ...

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rectangles: Sequence[Rectangle],
        *,
        causal: bool,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns out (H_q, R, D_v) in the query's dtype and logsumexp (H_q, R) in the accumulate dtype, for the R
        query rows of the rectangles one after the other."""
        ...

    def backward(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        rectangles: Sequence[Rectangle],
        *,
        causal: bool,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        grad_query: torch.Tensor,
        grad_key: torch.Tensor,
        grad_value: torch.Tensor,
    ) -> None:
        """Adds the rectangles' part to the gradients, which have the accumulate dtype.

        `out` (H_q, T, D_v) and `lse` (H_q, T) are those of the whole attention, all rectangles of all calls merged:
        then each rectangle's gradients are its exact share.
        """
        ...


class _LoopedKernel:
    """Runs rectangles one by one, each as a batch of H_kv with H_q / H_kv heads; key and value heads are expanded with
    stride 0, never copied, and the gradients of a group summed in the accumulate dtype.

    A subclass says how to cut rectangles into blocks (themselves rectangles with the same mask), and runs one."""

    def forward(self, query, key, value, rectangles, *, causal, scale, window=None, softcap=None):
        groups = query.shape[0] // key.shape[0]
        options = {"causal": causal, "scale": scale, "window": window, "softcap": softcap}
        outs, lses = [], []
        for q_start, q_stop, k_start, k_stop in self._blocks(query, rectangles, causal, window):
            q = query[:, q_start:q_stop].unflatten(0, (-1, groups))
            k = key[:, k_start:k_stop].unsqueeze(1).expand(-1, groups, -1, -1)
            v = value[:, k_start:k_stop].unsqueeze(1).expand(-1, groups, -1, -1)
            out, lse = self._forward_one(q, k, v, **options)
            outs.append(out.flatten(0, 1))
            lses.append(lse.flatten(0, 1))
        return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, dim=1), torch.cat(lses, dim=1))

    def backward(
        self,
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        rectangles,
        *,
        causal,
        scale,
        window=None,
        softcap=None,
        grad_query,
        grad_key,
        grad_value,
    ):
        groups = query.shape[0] // key.shape[0]
        options = {"causal": causal, "scale": scale, "window": window, "softcap": softcap}
        for q_start, q_stop, k_start, k_stop in self._blocks(query, rectangles, causal, window):
            do, q, o, row_lse = (
                tensor[:, q_start:q_stop].unflatten(0, (-1, groups)) for tensor in (grad_out, query, out, lse)
            )
            k = key[:, k_start:k_stop].unsqueeze(1).expand(-1, groups, -1, -1)
            v = value[:, k_start:k_stop].unsqueeze(1).expand(-1, groups, -1, -1)
            dq, dk, dv = self._backward_one(do, q, k, v, o, row_lse, **options)
            grad_query[:, q_start:q_stop] += dq.flatten(0, 1)
            grad_key[:, k_start:k_stop] += dk.sum(1, dtype=grad_key.dtype)
            grad_value[:, k_start:k_stop] += dv.sum(1, dtype=grad_value.dtype)


def _cut(rectangle: Rectangle, rows: int, causal: bool, window: int | None) -> Iterator[Rectangle]:
    """Blocks of `rows` queries with the keys that any of them sees."""
    q_start, q_stop, k_start, k_stop = rectangle
    shift = k_stop - q_stop  # from a query to the last key that it sees, if causal
    for first in range(q_start, q_stop, rows):
        last = min(first + rows, q_stop)
        yield Rectangle(
            first,
            last,
            max(k_start, first + shift - window + 1) if window else k_start,
            last + shift if causal else k_stop,
        )


def _hidden(q_length: int, k_length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(Q, K) bool, true where a causal rectangle's query does not see a key."""
    ones = torch.ones(q_length, k_length, dtype=torch.bool, device=device)
    hidden = ones.triu(k_length - q_length + 1)
    return hidden if window is None else hidden.logical_or_(ones.tril(k_length - q_length - window))


class EagerKernel(_LoopedKernel):
    """The formulas, written out, on any device, with every option: blocks of queries, so that no more than about
    2 ** 25 scores exist at a time."""

    name = "eager"
    _MAX_SCORES = 2**25

    def reason_against(self, device_type, softcap):
        return None

    def _blocks(self, query, rectangles, causal, window):
        for rectangle in rectangles:
            rows = max(1, self._MAX_SCORES // (query.shape[0] * (rectangle.k_stop - rectangle.k_start)))
            # Wider than a window makes little sense: what a block sees grows with its rows.
            yield from _cut(rectangle, min(rows, max(window, 64)) if window else rows, causal, window)

    @staticmethod
    def _scores(q, k, causal, scale, window, softcap):
        dtype = accumulate_dtype(q.dtype)
        scores = q.to(dtype) @ k.to(dtype).mT * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if causal:
            scores = scores.masked_fill(_hidden(*scores.shape[-2:], window, scores.device), -torch.inf)
        return scores

    def _forward_one(self, q, k, v, causal, scale, window, softcap):
        with torch.autocast(q.device.type, enabled=False):
            scores = self._scores(q, k, causal, scale, window, softcap)
            lse = scores.logsumexp(-1)
            out = (scores - lse[..., None]).exp() @ v.to(scores.dtype)
        return out.to(q.dtype), lse

    def _backward_one(self, do, q, k, v, o, lse, causal, scale, window, softcap):
        with torch.autocast(q.device.type, enabled=False):
            scores = self._scores(q, k, causal, scale, window, softcap)
            p = (scores - lse[..., None]).exp()
            do, o, q, k, v = (tensor.to(p.dtype) for tensor in (do, o, q, k, v))
            ds = p * (do @ v.mT - (do * o).sum(-1, keepdim=True))
            if softcap is not None:
                ds = ds * (1 - (scores.masked_fill(p == 0, 0) / softcap).square())
            ds = ds * scale
            return ds @ k, ds.mT @ q, p.mT @ do


class CPUFlashKernel(_LoopedKernel):
    """PyTorch's flash kernel for CPU (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp): fp64, fp32, bf16, fp16.

    It aligns a causal mask top-left, so only square rectangles may use it; the others, and windows, run in blocks of
    queries with a mask of their own. It dies on zero keys, which rectangles never have; and value heads must be as
    wide as key heads, so narrower ones are padded here. It knows no softcap.
    """

    name = "cpu_flash"
    _WINDOW_ROWS = 128  # measured: smaller blocks compute fewer hidden scores, larger ones make fewer calls

    def reason_against(self, device_type, softcap):
        if device_type != "cpu":
            return "runs on CPU only"
        return "has no softcap" if softcap is not None else None

    def _blocks(self, query, rectangles, causal, window):
        for rectangle in rectangles:
            q_start, q_stop, k_start, k_stop = rectangle
            if not causal or (self._is_square(rectangle) and (window is None or k_stop - k_start <= window)):
                yield rectangle
                continue
            if window is not None and self._is_square(rectangle):
                yield Rectangle(q_start, q_start + window, k_start, k_start + window)
                rectangle = rectangle._replace(q_start=q_start + window)
            yield from _cut(rectangle, self._WINDOW_ROWS, causal, window)

    @staticmethod
    def _is_square(rectangle):
        return rectangle.q_stop - rectangle.q_start == rectangle.k_stop - rectangle.k_start

    @staticmethod
    def _mask(q, k, causal, window):
        """`(is_causal, attn_mask)` of a block."""
        q_length, k_length = q.shape[-2], k.shape[-2]
        if not causal:
            return False, None
        if q_length == k_length and (window is None or window >= k_length):
            return True, None
        hidden = _hidden(q_length, k_length, window, q.device)
        return False, torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -torch.inf)[None, None]

    def _forward_one(self, q, k, v, causal, scale, window, softcap):
        width, value_width = q.shape[-1], v.shape[-1]
        is_causal, mask = self._mask(q, k, causal, window)
        q, k, v = _pad_heads(max(width, value_width), q, k, v)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return out[..., :value_width], lse

    def _backward_one(self, do, q, k, v, o, lse, causal, scale, window, softcap):
        width, value_width = q.shape[-1], v.shape[-1]
        is_causal, mask = self._mask(q, k, causal, window)
        do, q, k, v, o = _pad_heads(max(width, value_width), do, q, k, v, o)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return dq[..., :width], dk[..., :width], dv[..., :value_width]


def _pad_heads(width: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(F.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in tensors)


_KERNELS: tuple[AttentionKernel, ...] = (CPUFlashKernel(), EagerKernel())


def explain_kernels(device_type: str, softcap: float | None = None) -> list[tuple[str, str | None]]:
    """`(name, reason)` of every kernel, best first: why it cannot run such a layer, or `None` for those that can."""
    return [(kernel.name, kernel.reason_against(device_type, softcap)) for kernel in _KERNELS]


def select_kernel(device: torch.device, softcap: float | None = None) -> AttentionKernel:
    """The best kernel for tensors on `device`: see [`explain_kernels`]."""
    return next(kernel for kernel in _KERNELS if kernel.reason_against(device.type, softcap) is None)
