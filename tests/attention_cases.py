"""What workers run for the attention tests: one layer under a plan, against every document alone."""

import torch
import torch.distributed as dist

from hf_flashcp.attention import document_attention
from hf_flashcp.attention.kernels import CPUFlashKernel, EagerKernel
from hf_flashcp.layout import RankPlan
from hf_flashcp.layout.rank_layout import RankLayout


KERNELS = {"cpu_flash": CPUFlashKernel(), "eager": EagerKernel()}


def relative_error(ours, reference):
    """Relative Frobenius norm."""
    reference = reference.double()
    norm = reference.norm()
    difference = (ours.double() - reference).norm()
    return float(difference / norm if norm > 0 else difference)


def make_inputs(lengths, heads, kv_heads, head_dim, value_dim, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    sides = [(heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim), (heads, value_dim)]
    return [
        torch.randn(count, total, width, generator=generator, dtype=torch.float64).to(dtype) for count, width in sides
    ]


def reference_attention(lengths, query, key, value, grad_out):
    """Every document alone, by the textbook formula with autograd: out, dq, dk, dv in the packed order."""
    query, key, value = (tensor.detach().clone().requires_grad_() for tensor in (query, key, value))
    groups = query.shape[0] // key.shape[0]
    outs = []
    for q, k, v in zip(*(tensor.split(lengths, dim=1) for tensor in (query, key, value))):
        scores = q @ k.repeat_interleave(groups, 0).mT * query.shape[-1] ** -0.5
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        outs.append(scores.softmax(-1) @ v.repeat_interleave(groups, 0))
    out = torch.cat(outs, dim=1)
    out.backward(grad_out)
    return out.detach(), query.grad, key.grad, value.grad


def bind(plan, offset_groups=None):
    group = dist.group.WORLD if plan.cp_size > 1 else None
    bound = RankPlan(plan, dist.get_rank() if group else 0, group)
    if offset_groups is not None:
        bound.layout = RankLayout(plan, bound.rank, offset_groups)
    return bound


def sharded_attention(plan, inputs, kernel, offset_groups=None):
    """This rank's out, dq, dk, dv and its token index."""
    bound = bind(plan, offset_groups)
    index = bound.layout.token_index
    query, key, value, grad_out = (tensor.index_select(1, index) for tensor in inputs)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    out = document_attention(*leaves, bound, kernel=kernel)
    out.backward(grad_out)
    return [out.detach(), *(leaf.grad for leaf in leaves)], index


def attention_error(plan, shape, dtype=torch.float64, kernel="cpu_flash", offset_groups=None, seed=0):
    """Largest relative error of out, dq, dk, dv of this rank against the reference in fp64 on the same inputs."""
    inputs = make_inputs(plan.lengths, *shape, dtype, seed)
    reference = reference_attention(list(plan.lengths), *(tensor.double() for tensor in inputs))
    ours, index = sharded_attention(plan, inputs, KERNELS[kernel], offset_groups)
    full = [sum_over_ranks(tensor, part, index) for tensor, part in zip(reference, ours)]
    return [relative_error(a, b) for a, b in zip(full, reference)]


def attention_errors(cases):
    """`attention_error` of many cases in one call."""
    return [attention_error(*case[0], **case[1]) for case in cases]


def sum_over_ranks(like, part, index):
    full = torch.zeros(like.shape, dtype=torch.float64).index_copy_(1, index, part.double())
    if dist.get_world_size() > 1:
        dist.all_reduce(full)
    return full
