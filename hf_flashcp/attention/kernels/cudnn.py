"""`CudnnKernel`: cuDNN's attention kernels for Hopper and Blackwell GPUs."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

from ...layout import accumulate_dtype
from ...plan.kernel_calls import GRIDS
from .base import BackwardInputs, ScoreOptions
from .cudnn_graphs import Graph, GraphKey, Sizes, Steps, graph_for
from .varlen import Sequences, VarlenKernel


_OF_KEYS = ("key", "value", "grad_key", "grad_value")


class CudnnKernel(VarlenKernel):
    """Attention kernels of cuDNN over packed sequences, on Hopper and Blackwell GPUs.

    They are called through the optional package nvidia-cudnn-frontend, version 1.18 or later. Sequences are given by
    lengths and ragged offsets, so that they are read where they are, and causal masks and windows are aligned
    bottom-right. Backward takes the merged output and softmax statistics, which are the logsumexp, as inputs.
    [`~cudnn_graphs`] builds the graphs.
    """

    name = "cudnn"
    grids = GRIDS[name]
    expands_kv_gradients = True

    def widths(self, key_dim, value_dim):
        """Return multiples of 16. Others are supported, but take more workspace in backward."""
        return -(-key_dim // 16) * 16, -(-value_dim // 16) * 16

    def forward(self, query, key, value, rectangles, options):
        return super().forward(*_rows_together(query, key, value), rectangles, options)

    def backward(self, inputs, rectangles, options):
        return super().backward(BackwardInputs(*_rows_together(*inputs[:-1]), inputs.lse), rectangles, options)

    def _forward_call(self, query, key, value, sequences, options):
        out = query.new_empty(sequences.num_queries, query.shape[1], value.shape[2])
        stats = query.new_empty(out.shape[:2], dtype=accumulate_dtype(query.dtype))
        graph = graph_for(self._key(options, query, key, value), _sizes(sequences))
        inputs, results = {"query": query, "key": key, "value": value}, {"out": out, "stats": stats}
        _run(graph, inputs, results, sequences)
        return out, stats.t()

    def _backward_call(self, inputs, sequences, options):
        grad_out, query, key, value, out, lse = inputs
        rows = sequences.num_queries, sequences.num_keys, sequences.num_keys
        grads = [
            torch.empty(count, *x.shape[1:], dtype=x.dtype, device=x.device)
            for count, x in zip(rows, (query, key, value))
        ]
        graph = graph_for(self._key(options, query, key, value, out, grad_out), _sizes(sequences))
        tensors = {"query": query, "key": key, "value": value, "out": out, "grad_out": grad_out}
        # The statistics are those of the call's rows, because cuDNN places its own sums over rows in the same way.
        results = {"stats": lse.t().contiguous(), **dict(zip(("grad_query", "grad_key", "grad_value"), grads))}
        _run(graph, tensors, results, sequences)
        return tuple(grads)

    def _key(
        self, options: ScoreOptions, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *more: torch.Tensor
    ) -> GraphKey:
        """Return the key of a graph; `more` holds the output and its gradient in backward."""
        return GraphKey(
            bool(more),
            query.dtype,
            query.shape[1],
            key.shape[1],
            key.shape[2],
            value.shape[2],
            tuple(_steps(tensor) for tensor in (query, key, value, *more)),
            options.causal,
            options.window,
            float(options.scale),
            self.deterministic and bool(more),
            query.device,
        )


def _sizes(sequences: Sequences) -> Sizes:
    """Return the sizes of a call."""
    return Sizes(
        batch=len(sequences.cu_seqlens_q) - 1,
        max_queries=sequences.max_seqlen_q,
        max_keys=sequences.max_seqlen_k,
        total_queries=sequences.num_queries,
        total_keys=sequences.num_keys,
    )


def _rows_together(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Copy tensors (heads, T, D) in which the rows of a head are together: their strides depend on T."""
    return tuple(
        tensor.transpose(0, 1).contiguous().transpose(0, 1) if tensor.stride(0) > tensor.stride(1) else tensor
        for tensor in tensors
    )


def _steps(tensor: torch.Tensor) -> Steps:
    return tensor.stride(0), tensor.stride(1)


def _run(graph: Graph, inputs: dict[str, torch.Tensor], others: dict[str, torch.Tensor], sequences: Sequences) -> None:
    """Run a graph. Sequences are read from the inputs where they are; other tensors have them one after the other."""
    batch, cu_seqlens = graph.sizes.batch, (sequences.cu_seqlens_q, sequences.cu_seqlens_k)
    placed = cu_seqlens if sequences.starts_q is None else (sequences.starts_q, sequences.starts_k)
    numbers = {name: _lengths(each, batch) for name, each in zip(("queries", "keys"), cu_seqlens)}
    for tensors, first_rows in ((inputs, placed), (others, cu_seqlens)):
        for name, tensor in tensors.items():
            numbers[f"{name} offsets"] = _offsets(first_rows[name in _OF_KEYS], tensor.stride(0), batch)
    graph.run({**inputs, **others, **numbers}, inputs["query"].device)


@lru_cache(maxsize=512)
def _offsets(first_rows: torch.Tensor, step: int, batch: int) -> torch.Tensor:
    """Return the offsets of `batch` sequences, (batch + 1,) int64. The further sequences are empty."""
    index = torch.arange(batch + 1, device=first_rows.device).clamp_(max=len(first_rows) - 1)
    return first_rows.to(torch.int64)[index] * step


@lru_cache(maxsize=512)
def _lengths(cu_seqlens: torch.Tensor, batch: int) -> torch.Tensor:
    """Return the lengths of `batch` sequences, (batch,) int32. The further sequences are empty."""
    return F.pad(cu_seqlens.diff(), (0, batch + 1 - len(cu_seqlens)))
