"""Errors of one attention layer under a plan, compared with each document run alone on one device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from ..attention import AttentionKernel, document_attention
from ..integrations.gradient_check import relative_error
from ..layout import RankPlan
from ..plan import Topology
from ..planning import plan_documents


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LayerCase(NamedTuple):
    """An attention layer and the plan under which it runs.

    The default strategy splits every document over all ranks. With `debug`, debug mode checks the layer as well.
    """

    lengths: tuple[int, ...] = (700, 260, 64, 31, 1)
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    window: int | None = None
    strategy: str = "per_doc"
    num_stages: int | None = None
    ranks_per_node: int | None = None
    keep_received_kv: bool | None = None
    debug: bool = False


def layer_errors(
    case: LayerCase, group: ProcessGroup, device: torch.device, dtype: torch.dtype, kernel: AttentionKernel
) -> tuple[list[float], list[float]]:
    """Return the relative errors of out, dQ, dK and dV, compared with float64 (Frobenius norm).

    The first list holds the errors of this rank's tokens; the second those of one device that runs every document
    alone in the same dtype. Every rank of the group must call this function.
    """
    topology = None if case.ranks_per_node is None else Topology(case.ranks_per_node)
    plan = plan_documents(
        case.lengths, group.size(), strategy=case.strategy, num_stages=case.num_stages, topology=topology
    )
    bound = RankPlan(plan, group.rank(), group)
    inputs = _inputs(case, device, dtype)
    reference = _alone([tensor.double() for tensor in inputs], case)
    index = bound.layout.token_index.to(device)
    leaves = [tensor.index_select(1, index).requires_grad_() for tensor in inputs[:3]]
    out = document_attention(
        *leaves,
        bound,
        window=case.window,
        keep_received_kv=case.keep_received_kv,
        kernel=kernel,
        check_as="the layer" if case.debug else None,
    )
    out.backward(inputs[3].index_select(1, index))
    ours = [out.detach(), *(leaf.grad for leaf in leaves)]
    return (
        [relative_error(a, b.index_select(1, index)) for a, b in zip(ours, reference)],
        [relative_error(a, b) for a, b in zip(_alone(inputs, case), reference)],
    )


def _inputs(case: LayerCase, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return query, key, value and dO of the whole row, each (heads, tokens, width)."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(n, sum(case.lengths), case.head_dim) for n in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype) for size in sizes]


def _alone(inputs: list[torch.Tensor], case: LayerCase) -> list[torch.Tensor]:
    """Return out, dQ, dK and dV from PyTorch's own attention on one document at a time."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs[:3]]
    out = attend_one_by_one(*leaves, case.lengths, window=case.window)
    out.backward(inputs[3])
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def attend_one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int], window: int | None = None
) -> torch.Tensor:
    """Run causal `scaled_dot_product_attention` on one document at a time.

    All tensors are (heads, tokens, width). With a sliding `window`, each document needs a mask of length x length.
    """
    parts = zip(*(tensor[None].split(list(lengths), dim=2) for tensor in (query, key, value)))
    return torch.cat([_attend(*part, window)[0] for part in parts], dim=1)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
    if window is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    length = query.shape[2]
    visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=True)
