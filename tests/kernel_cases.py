"""Rectangles, inputs and references for the tests of attention kernels, and a varlen kernel for any machine."""

import torch

from hf_flashcp.attention.kernels import BackwardInputs, EagerKernel, ScoreOptions, VarlenKernel
from hf_flashcp.layout import Rectangle
from tests.device import DEVICE


FP64 = 1e-12  # largest allowed difference of out, logsumexp, dq, dk, dv, which are of order 1
SHAPES = [(4, 2, 8, 8), (2, 2, 8, 12), (4, 1, 12, 8)]  # H_q, H_kv, D_k, D_v
SCALE = 0.3

CAUSAL = {
    "squares": [Rectangle(0, 3, 0, 3), Rectangle(3, 14, 3, 14), Rectangle(14, 120, 14, 120)],
    "one square": [Rectangle(0, 50, 0, 50)],
    "squares with gaps": [Rectangle(1, 12, 2, 13), Rectangle(20, 90, 30, 100)],
    "bands": [Rectangle(0, 60, 0, 90), Rectangle(70, 75, 100, 180), Rectangle(75, 76, 180, 181)],
}

FULL = {
    "one": [Rectangle(0, 40, 0, 33)],
    "disjoint keys": [Rectangle(0, 9, 0, 4), Rectangle(9, 10, 4, 60), Rectangle(10, 50, 60, 61)],
    "prefixes of one document": [Rectangle(2, 9, 0, 4), Rectangle(9, 20, 0, 30), Rectangle(25, 26, 0, 41)],
    "prefixes of two": [
        *(Rectangle(0, 4, 3, 8), Rectangle(4, 9, 3, 20)),
        *(Rectangle(12, 13, 20, 21), Rectangle(13, 30, 20, 50), Rectangle(30, 33, 20, 60)),
    ],
}


class EmulatedVarlen(VarlenKernel):
    """A varlen kernel that applies the formulas to one sequence at a time, and checks its inputs as strictly as real
    ones."""

    name = "emulated"

    def __init__(self, common_width=True, **kwargs):
        super().__init__(**kwargs)
        self.common_width = common_width
        self.calls = []

    def _check(self, query, key, value, sequences, *more):
        assert query.shape[2] == key.shape[2] and query.shape[2] % 8 == value.shape[2] % 8 == 0
        assert not self.common_width or key.shape[2] == value.shape[2]
        for tensor in (query, key, value, *more):
            assert tensor.stride(-1) == 1
            steps = (tensor.storage_offset(), *tensor.stride()[:-1])
            assert all(step * tensor.element_size() % 16 == 0 for step in steps), "kernels load 16 bytes at a time"
        for cumulative, longest, rows, least in (
            (sequences.cu_seqlens_q, sequences.max_seqlen_q, query.shape[0], 2),
            (sequences.cu_seqlens_k, sequences.max_seqlen_k, key.shape[0], 1),
        ):
            assert cumulative.dtype == torch.int32 and cumulative.is_contiguous()
            lengths = cumulative.diff()
            assert cumulative[0] == 0 and cumulative[-1] == rows
            assert lengths.min() > 0 and longest == max(least, lengths.max())
        assert len(sequences.cu_seqlens_q) == len(sequences.cu_seqlens_k)
        self.calls.append(len(sequences.cu_seqlens_q) - 1)

    def _each(self, sequences):
        q, k = sequences.cu_seqlens_q.tolist(), sequences.cu_seqlens_k.tolist()
        for q_start, q_stop, k_start, k_stop in zip(q, q[1:], k, k[1:]):
            yield (
                slice(q_start, q_stop),
                slice(k_start, k_stop),
                (Rectangle(0, q_stop - q_start, 0, k_stop - k_start),),
            )

    def _forward_call(self, query, key, value, sequences, options):
        self._check(query, key, value, sequences)
        out = query.new_empty(*query.shape[:2], value.shape[2])
        lse = query.new_empty(query.shape[1], query.shape[0], dtype=torch.promote_types(query.dtype, torch.float32))
        for q, k, whole in self._each(sequences):
            parts = (tensor.transpose(0, 1) for tensor in (query[q], key[k], value[k]))
            part, lse[:, q] = EagerKernel().forward(*parts, whole, options)
            out[q] = part.transpose(0, 1)
        return out, lse

    def _backward_call(self, inputs, sequences, options):
        grad_out, query, key, value, out, lse = inputs
        self._check(query, key, value, sequences, grad_out, out)
        assert lse.is_contiguous() and lse.shape == (query.shape[1], query.shape[0])
        grads = [torch.zeros_like(tensor, dtype=lse.dtype) for tensor in (query, key, value)]
        for q, k, whole in self._each(sequences):
            parts = (x.transpose(0, 1) for x in (grad_out[q], query[q], key[k], value[k], out[q]))
            of_sequence = EagerKernel().backward(BackwardInputs(*parts, lse[:, q]), whole, options)
            for grad, rows, part in zip(grads, (q, k, k), of_sequence):
                grad[rows] = part.transpose(0, 1)
        return [grad.to(query.dtype) for grad in grads]


def make(shape, rectangles, dtype=torch.float64, seed=0):
    """Return query, key, value and grad_out as in a model: views of (T, H, D) tensors."""
    heads, kv_heads, key_dim, value_dim = shape
    rows = max(r.q_stop for r in rectangles) + 3
    keys = max(r.k_stop for r in rectangles) + 2
    generator = torch.Generator().manual_seed(seed)
    sizes = [(rows, heads, key_dim), (keys, kv_heads, key_dim), (keys, kv_heads, value_dim), (rows, heads, value_dim)]
    drawn = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return [tensor.to(dtype).to(DEVICE).transpose(0, 1) for tensor in drawn]


def run(kernel, inputs, rectangles, whole=None, **options):
    """Return out, logsumexp, dq, dk, dv. Backward starts from `whole`, a merged out and logsumexp, or from its own."""
    query, key, value, grad_out = inputs
    options = ScoreOptions(scale=SCALE, **options)
    out, lse = kernel.forward(query, key, value, rectangles, options)
    if whole is None:
        index = torch.cat([torch.arange(r.q_start, r.q_stop, device=out.device) for r in rectangles])
        whole = out.new_zeros(grad_out.shape).index_copy_(1, index, out), lse.new_zeros(query.shape[:2])
        whole[1].index_copy_(1, index, lse)
    grads = kernel.backward(BackwardInputs(grad_out, query, key, value, *whole), rectangles, options)
    index = torch.cat([torch.arange(r.q_start, r.q_stop, device=out.device) for r in rectangles])
    grad_query = grads.query.new_zeros(query.shape).index_copy_(1, index, grads.query)
    return out, lse, grad_query, grads.key, grads.value


def textbook(inputs, rectangles, causal, window=None, softcap=None):
    """Return out, logsumexp, dq, dk, dv from autograd with one dense mask per rectangle."""
    query, key, value = (tensor.detach().clone().requires_grad_() for tensor in inputs[:3])
    groups = query.shape[0] // key.shape[0]
    outs, lses, loss = [], [], 0.0
    for q_start, q_stop, k_start, k_stop in rectangles:
        k, v = (tensor[:, k_start:k_stop].repeat_interleave(groups, 0) for tensor in (key, value))
        scores = query[:, q_start:q_stop] @ k.mT * SCALE
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if causal:
            rows, keys = (torch.arange(count, device=scores.device) for count in scores.shape[1:])
            distance = rows[:, None] + len(keys) - len(rows) - keys
            scores = scores.masked_fill((distance < 0) | (distance >= (window or 10**9)), -torch.inf)
        outs.append(scores.softmax(-1) @ v)
        lses.append(scores.logsumexp(-1))
        loss = loss + (outs[-1] * inputs[3][:, q_start:q_stop]).sum()
    loss.backward()
    return torch.cat(outs, 1).detach(), torch.cat(lses, 1).detach(), query.grad, key.grad, value.grad


def difference(ours, reference):
    return max(float((a - b).abs().max()) for a, b in zip(ours, reference))
