"""How far one attention layer under a plan is from its documents alone on one device."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ..attention import AttentionKernel, document_attention
from ..integrations.gradient_check import relative_error
from ..layout import RankPlan
from ..plan import Topology
from ..planning import plan_documents
from .one_by_one import attend_one_by_one


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LayerCase(NamedTuple):
    """A layer and its plan, which cuts every document unless another strategy is given.

    Attributes:
        lengths (`tuple[int, ...]`): tokens of each document.
        heads, kv_heads, head_dim (`int`): sizes of the layer.
        window (`int`, *optional*): keys that a query sees.
        strategy (`str`), num_stages (`int`, *optional*): see [`plan_documents`].
        ranks_per_node (`int`, *optional*): with it KV crosses to each node once.
        keep_received_kv (`bool`, *optional*): whether received KV is kept for backward, see [`document_attention`].
        debug (`bool`): whether debug mode compares the layer.
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
    """Returns two lists of relative errors against float64 (Frobenius norm) of out, dQ, dK and dV: of this rank's
    tokens, and of one device that runs every document alone in the same dtype. Every rank of the group calls it."""
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
    """Query, key, value and dO of the whole row."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(count, sum(case.lengths), case.head_dim, generator=generator, dtype=torch.float64).to(
            device, dtype
        )
        for count in (case.heads, case.kv_heads, case.kv_heads, case.heads)
    ]


def _alone(inputs: list[torch.Tensor], case: LayerCase) -> list[torch.Tensor]:
    """Returns out, dQ, dK and dV of every document alone, by PyTorch's own attention."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs[:3]]
    out = attend_one_by_one(*leaves, case.lengths, window=case.window)
    out.backward(inputs[3])
    return [out.detach(), *(leaf.grad for leaf in leaves)]
