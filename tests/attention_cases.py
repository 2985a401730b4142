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


def attention_error(plan, shape, dtype="float64", kernel="cpu_flash", offset_groups=None, seed=0):
    """Largest relative error of out, dq, dk, dv of this rank against the reference in fp64 on the same inputs."""
    inputs = make_inputs(plan.lengths, *shape, getattr(torch, dtype), seed)
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


def bf16_errors(plan, shape, kernel):
    """[ours, single-device bf16] error of out, dq, dk, dv against fp64 on the same bf16 inputs."""
    inputs = make_inputs(plan.lengths, *shape, torch.bfloat16, 0)
    reference = reference_attention(list(plan.lengths), *(tensor.double() for tensor in inputs))
    ours, index = sharded_attention(plan, inputs, KERNELS[kernel])
    full = [sum_over_ranks(tensor, part, index) for tensor, part in zip(reference, ours)]
    single = single_device_sdpa(list(plan.lengths), *inputs)
    return [(relative_error(a, b), relative_error(c, b)) for a, b, c in zip(full, reference, single)]


def single_device_sdpa(lengths, query, key, value, grad_out):
    """What a single device runs: PyTorch's sdpa on every document alone."""
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    outs = [
        torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
        for q, k, v in zip(*(leaf.split(lengths, dim=1) for leaf in leaves))
    ]
    out = torch.cat(outs, dim=1)
    out.backward(grad_out)
    return out.detach(), *(leaf.grad for leaf in leaves)


def leak_probe(plan, document):
    """Which documents' outputs change, to the last bit, when one token of `document` does."""
    lengths = list(plan.lengths)
    inputs = make_inputs(lengths, 4, 2, 8, 8, torch.float32, 0)
    start = sum(lengths[:document])
    before, index = sharded_attention(plan, inputs, KERNELS["cpu_flash"])
    for tensor in inputs[:3]:
        tensor[:, start] += 1.0
    after, _ = sharded_attention(plan, inputs, KERNELS["cpu_flash"])
    full = [sum_over_ranks(inputs[0][..., :8], out, index) for out in (before[0], after[0])]
    changed = (full[0] != full[1]).any(dim=-1).any(dim=0)
    return [bool(part.any()) for part in changed.split(lengths)]


def counted_traffic(plan, shape, offset_groups=None):
    """Rows and bytes of every collective of one layer, forward then backward, as this rank hands them over."""
    calls = []
    original = dist.all_to_all_single

    def counting(output, input, output_split_sizes=None, input_split_sizes=None, **kwargs):
        calls.append(
            {
                "sent": sum(input_split_sizes),
                "received": sum(output_split_sizes),
                "bytes_received": output.numel() * output.element_size(),
            }
        )
        return original(output, input, output_split_sizes, input_split_sizes, **kwargs)

    dist.all_to_all_single = counting
    try:
        sharded_attention(
            plan, make_inputs(plan.lengths, *shape, torch.float32, 0), KERNELS["cpu_flash"], offset_groups
        )
    finally:
        dist.all_to_all_single = original
    return calls


def collectives_seen(plan):
    """Every collective of one layer's forward and backward, by torch's own counter."""
    from torch.distributed.tensor.debug import CommDebugMode

    inputs = make_inputs(plan.lengths, 4, 2, 8, 8, torch.float32, 0)
    with CommDebugMode() as counter:
        sharded_attention(plan, inputs, KERNELS["cpu_flash"])
    return counter.get_total_counts()


class _TracingKernel(CPUFlashKernel):
    def __init__(self, trace):
        self.trace = trace

    def forward(self, *args, causal, **kwargs):
        self.trace.append("local forward" if causal else "remote forward")
        return super().forward(*args, causal=causal, **kwargs)

    def backward(self, *args, causal, **kwargs):
        self.trace.append("local backward" if causal else "remote backward")
        return super().backward(*args, causal=causal, **kwargs)


def issue_order(plan, frozen_kv=False, offset_groups=None):
    """In which order one layer posts, waits and computes."""
    trace = []
    original = dist.all_to_all_single

    def tracing(*args, **kwargs):
        trace.append("post")
        work = original(*args, **kwargs)

        class Work:
            def wait(self):
                trace.append("wait")
                return work.wait()

        return Work()

    bound = bind(plan, offset_groups)
    query, key, value, grad_out = (
        tensor.index_select(1, bound.layout.token_index)
        for tensor in make_inputs(plan.lengths, 4, 2, 8, 8, torch.float32, 0)
    )
    query.requires_grad_()
    if not frozen_kv:
        key.requires_grad_(), value.requires_grad_()
    dist.all_to_all_single = tracing
    try:
        document_attention(query, key, value, bound, kernel=_TracingKernel(trace)).backward(grad_out)
    finally:
        dist.all_to_all_single = original
    return trace


def awkward_layouts(plan):
    """Largest difference between contiguous and strided inputs, and for an expanded output gradient."""
    bound = bind(plan)
    inputs = make_inputs(plan.lengths, 4, 2, 8, 8, torch.float64, 0)
    query, key, value, _ = (tensor.index_select(1, bound.layout.token_index) for tensor in inputs)

    def run(tensors):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = document_attention(*leaves, bound)
        out.sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (query, key, value)]
    return max(float((a - b).abs().max()) for a, b in zip(run((query, key, value)), run(strided)))
