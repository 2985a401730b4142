"""Attention kernels: rectangles of queries and keys, with or without a causal mask.

A kernel knows nothing of ranks or documents. Shapes: query (H_q, T, D_k), key (H_kv, S, D_k), value (H_kv, S, D_v),
any strides; query head h attends with key head h // (H_q / H_kv).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from ..layout import Rectangle


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which partial outputs, logsumexp and gradients are summed: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


class AttentionKernel(Protocol):
    """What a backend provides.

    With `causal` every rectangle is square and its i-th query sees its keys up to the i-th.
    """

    name: str

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rectangles: Sequence[Rectangle],
        *,
        causal: bool,
        scale: float,
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
    stride 0, never copied, and the gradients of a group summed in the accumulate dtype."""

    def forward(self, query, key, value, rectangles, *, causal, scale):
        groups = query.shape[0] // key.shape[0]
        outs, lses = [], []
        for q_start, q_stop, k_start, k_stop in rectangles:
            q = query[:, q_start:q_stop].unflatten(0, (-1, groups))
            k = key[:, k_start:k_stop].unsqueeze(1).expand(-1, groups, -1, -1)
            v = value[:, k_start:k_stop].unsqueeze(1).expand(-1, groups, -1, -1)
            out, lse = self._forward_one(q, k, v, causal, scale)
            outs.append(out.flatten(0, 1))
            lses.append(lse.flatten(0, 1))
        return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, dim=1), torch.cat(lses, dim=1))

    def backward(
        self, grad_out, query, key, value, out, lse, rectangles, *, causal, scale, grad_query, grad_key, grad_value
    ):
        groups = query.shape[0] // key.shape[0]
        for q_start, q_stop, k_start, k_stop in rectangles:
            do, q, o, row_lse = (
                tensor[:, q_start:q_stop].unflatten(0, (-1, groups)) for tensor in (grad_out, query, out, lse)
            )
            k = key[:, k_start:k_stop].unsqueeze(1).expand(-1, groups, -1, -1)
            v = value[:, k_start:k_stop].unsqueeze(1).expand(-1, groups, -1, -1)
            dq, dk, dv = self._backward_one(do, q, k, v, o, row_lse, causal, scale)
            grad_query[:, q_start:q_stop] += dq.flatten(0, 1)
            grad_key[:, k_start:k_stop] += dk.sum(1, dtype=grad_key.dtype)
            grad_value[:, k_start:k_stop] += dv.sum(1, dtype=grad_value.dtype)


class EagerKernel(_LoopedKernel):
    """The formulas, written out, on any device. Memory is quadratic in a rectangle's sides: a reference."""

    name = "eager"

    @staticmethod
    def _scores(q, k, causal, scale):
        dtype = accumulate_dtype(q.dtype)
        scores = q.to(dtype) @ k.to(dtype).mT * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        return scores

    def _forward_one(self, q, k, v, causal, scale):
        with torch.autocast(q.device.type, enabled=False):
            scores = self._scores(q, k, causal, scale)
            lse = scores.logsumexp(-1)
            out = (scores - lse[..., None]).exp() @ v.to(scores.dtype)
        return out.to(q.dtype), lse

    def _backward_one(self, do, q, k, v, o, lse, causal, scale):
        with torch.autocast(q.device.type, enabled=False):
            p = (self._scores(q, k, causal, scale) - lse[..., None]).exp()
            do, o, q, k, v = (tensor.to(p.dtype) for tensor in (do, o, q, k, v))
            ds = p * (do @ v.mT - (do * o).sum(-1, keepdim=True)) * scale
            return ds @ k, ds.mT @ q, p.mT @ do


class CPUFlashKernel(_LoopedKernel):
    """PyTorch's flash kernel for CPU (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp): fp64, fp32, bf16, fp16.

    It aligns a causal mask top-left, which is only right for the square rectangles we give it; it dies on zero
    keys, which rectangles never have; and value heads must be as wide as key heads, so narrower ones are padded here.
    """

    name = "cpu_flash"

    def _forward_one(self, q, k, v, causal, scale):
        width, value_width = q.shape[-1], v.shape[-1]
        q, k, v = _pad_heads(max(width, value_width), q, k, v)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out[..., :value_width], lse

    def _backward_one(self, do, q, k, v, o, lse, causal, scale):
        width, value_width = q.shape[-1], v.shape[-1]
        do, q, k, v, o = _pad_heads(max(width, value_width), do, q, k, v, o)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse, 0.0, causal, scale=scale
        )
        return dq[..., :width], dk[..., :width], dv[..., :value_width]


def _pad_heads(width: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(F.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in tensors)


_CPU_FLASH = CPUFlashKernel()
_EAGER = EagerKernel()


def select_kernel(device: torch.device) -> AttentionKernel:
    """The kernel for tensors on `device`: PyTorch's flash kernel on CPU, the eager reference elsewhere."""
    return _CPU_FLASH if device.type == "cpu" else _EAGER
