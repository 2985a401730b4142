"""Functions that workers run for the attention tests: one layer under a plan, compared with each document alone."""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

from hf_flashcp.attention import document_attention
from hf_flashcp.integrations.gradient_check import relative_error
from hf_flashcp.layout import RankPlan
from hf_flashcp.planning import ShardPlan
from tests.device import DEVICE, ON_CPU, ExactKernel, make_kernel


def make_sinks(heads, dtype=torch.float64):
    return torch.linspace(-2, 3, heads, dtype=torch.float64).to(dtype).to(DEVICE)


def make_inputs(lengths, heads, kv_heads, head_dim, value_dim, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    sides = [(heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim), (heads, value_dim)]
    drawn = (torch.randn(count, total, width, generator=generator, dtype=torch.float64) for count, width in sides)
    return [tensor.to(dtype).to(DEVICE) for tensor in drawn]


def reference_attention(lengths, query, key, value, grad_out, window=None, softcap=None, sinks=False):
    """Run each document alone through the textbook formula and autograd.

    Returns out, dq, dk, dv (and d_sinks) in packed order.
    """
    query, key, value = (tensor.detach().clone().requires_grad_() for tensor in (query, key, value))
    heads, groups = query.shape[0], query.shape[0] // key.shape[0]
    sink = make_sinks(heads).requires_grad_()
    outs = []
    for q, k, v in zip(*(tensor.split(lengths, dim=1) for tensor in (query, key, value))):
        scores = q @ k.repeat_interleave(groups, 0).mT * query.shape[-1] ** -0.5
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        visible = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()
        if window:
            visible = visible.triu(1 - window)
        scores = scores.masked_fill(~visible, -torch.inf)
        if sinks:
            scores = torch.cat([scores, sink[:, None, None].expand(heads, q.shape[1], 1)], dim=-1)
        outs.append(scores.softmax(-1)[..., : q.shape[1]] @ v.repeat_interleave(groups, 0))
    out = torch.cat(outs, dim=1)
    out.backward(grad_out)
    return out.detach(), query.grad, key.grad, value.grad, *([sink.grad] if sinks else [])


def bind(plan, offset_groups=None):
    if offset_groups is not None:
        plan = plan.with_offset_groups(offset_groups)
    group = dist.group.WORLD if plan.cp_size > 1 else None
    return RankPlan(plan, dist.get_rank() if group else 0, group)


def local_rows(bound, inputs):
    """Return this rank's rows of tensors (heads, tokens, width)."""
    index = bound.layout.token_index.to(DEVICE)
    return [tensor.index_select(1, index) for tensor in inputs]


def sharded_attention(plan, inputs, kernel=None, offset_groups=None, window=None, softcap=None, sinks=False, **more):
    """Return this rank's out, dq, dk, dv (and d_sinks), and its token index."""
    bound = bind(plan, offset_groups)
    query, key, value, grad_out = local_rows(bound, inputs)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    if sinks:
        leaves.append(make_sinks(query.shape[0], query.dtype).requires_grad_())
    options = {"window": window, "softcap": softcap, "sinks": leaves[3] if sinks else None}
    out = document_attention(*leaves[:3], bound, kernel=kernel, **options, **more)
    out.backward(grad_out)
    return [out.detach(), *(leaf.grad for leaf in leaves)], bound.layout.token_index.to(DEVICE)


class Case(NamedTuple):
    """One layer under a plan, and with what."""

    plan: ShardPlan
    shape: tuple[int, int, int, int]
    dtype: str = "float64"
    kernel: str = ExactKernel.name
    offset_groups: list[list[int]] | None = None
    options: dict = {}
    keep_received_kv: bool | None = None
    head_groups: int = 1
    seed: int = 0

    @property
    def pack(self):
        """What inputs and reference depend on."""
        return self.plan.lengths, self.shape, self.dtype, self.seed, tuple(self.options.items())


def attention_error(*args, **kwargs):
    """Relative errors of out, dq, dk, dv (and d_sinks) against the reference in fp64 on the same inputs."""
    return attention_errors([Case(*args, **kwargs)])[0]


def attention_errors(cases):
    """`attention_error` of many cases in one call."""
    references = shared_references(cases)
    return relative_errors([(*_parts(case, references), references[case.pack][1]) for case in cases])


def _parts(case, references):
    kernel, inputs = make_kernel(case.kernel), references[case.pack][0]
    more = {"keep_received_kv": case.keep_received_kv, "head_groups": case.head_groups}
    return sharded_attention(case.plan, inputs, kernel, case.offset_groups, **case.options, **more)


def shared_references(cases):
    """Inputs and reference of each pack among the cases; each reference is computed by one rank for all, since that
    takes longer than what is tested."""
    references = {}
    for pack in dict.fromkeys(case.pack for case in cases):
        lengths, shape, dtype, seed, options = pack
        inputs = make_inputs(lengths, *shape, getattr(torch, dtype), seed)
        if len(references) % dist.get_world_size() == dist.get_rank():
            full = reference_attention(list(lengths), *(tensor.double() for tensor in inputs), **dict(options))
            full = [tensor.contiguous() for tensor in full]
        else:
            query, key, value, grad_out = inputs
            like = [grad_out, query, key, value, *([make_sinks(shape[0])] if dict(options).get("sinks") else [])]
            full = [torch.empty_like(tensor, dtype=torch.float64) for tensor in like]
        references[pack] = inputs, full
    for number, (_, full) in enumerate(references.values()):
        for tensor in full if dist.get_world_size() > 1 else ():
            dist.broadcast(tensor, number % dist.get_world_size())
    return references


def relative_errors(cases):
    """Compare this rank's out, dq, dk, dv (and d_sinks) at `index` with the whole row's, for each `(parts, index,
    reference)`: relative Frobenius norms over all ranks, by one collective for all cases."""
    sums = [_sums(*case) for case in cases]
    flat = [each for case in sums for each in case]
    totals = _sum(torch.cat(flat)).split([len(each) for each in flat])
    errors = []
    for number, (_, _, reference) in enumerate(cases):
        squares, held, sinks = totals[3 * number : 3 * number + 3]
        assert bool((held == 1).all()), "a token that no rank holds, or several"
        norms = [float(square) ** 0.5 for square in squares]
        norms += [float((sinks - expected).norm()) for expected in reference[4:]]
        errors.append([_relative(norm, expected) for norm, expected in zip(norms, reference, strict=True)])
    return errors


def _sums(parts, index, reference):
    """What ranks add up: squared differences of their rows, how many hold each token, gradients of sinks."""
    rows = zip(parts[:4], reference[:4], strict=True)
    squares = [(part.double() - full.index_select(1, index)).square().sum() for part, full in rows]
    held = torch.zeros(reference[0].shape[1], dtype=torch.float64, device=DEVICE)
    held.index_add_(0, index, torch.ones_like(index, dtype=torch.float64))
    return torch.stack(squares), held, parts[4].double() if parts[4:] else held[:0]


def _relative(norm, reference):
    norm /= float(reference.double().norm()) or 1.0
    return norm if norm == norm else float("inf")


def sum_over_ranks(like, part, index):
    return _sum(torch.zeros(like.shape, dtype=torch.float64, device=DEVICE).index_copy_(1, index, part.double()))


def _sum(tensor):
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def bf16_errors(cases):
    """For each case: (ours, single-device bf16) errors of out, dq, dk, dv (and d_sinks) against fp64 on the same bf16
    inputs."""
    cases = [case._replace(dtype="bfloat16") for case in cases]
    references, singles = shared_references(cases), {}
    for pack, (inputs, full) in references.items():
        single = single_device(list(pack[0]), *inputs, **dict(pack[-1]))
        singles[pack] = [relative_error(a, b) for a, b in zip(single, full, strict=True)]
    ours = relative_errors([(*_parts(case, references), references[case.pack][1]) for case in cases])
    return [list(zip(errors, singles[case.pack], strict=True)) for case, errors in zip(cases, ours)]


def single_device(lengths, query, key, value, grad_out, window=None, softcap=None, sinks=False):
    """Run each document alone on a single device: PyTorch's sdpa or, if sdpa cannot, transformers' eager functions."""
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    if sinks:
        leaves.append(make_sinks(query.shape[0], query.dtype).requires_grad_())
    outs = []
    for q, k, v in zip(*(leaf[None].split(lengths, dim=2) for leaf in leaves[:3])):
        visible = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
        visible = visible.triu(1 - window) if window else visible
        if softcap or sinks:
            mask = torch.zeros_like(visible, dtype=q.dtype).masked_fill(~visible, torch.finfo(q.dtype).min)
            module = torch.nn.Module()
            module.num_key_value_groups, module.sinks = q.shape[1] // k.shape[1], leaves[-1]
            eager = modeling_gpt_oss if sinks else modeling_gemma2
            kwargs = {"softcap": softcap} if softcap else {}
            out = eager.eager_attention_forward(module, q, k, v, mask, scaling=q.shape[-1] ** -0.5, **kwargs)[0]
            outs.append(out[0].transpose(0, 1))
        else:
            outs.append(_sdpa(q, k, v, visible, window)[0])
    out = torch.cat(outs, dim=1)
    out.backward(grad_out)
    return out.detach(), *(leaf.grad for leaf in leaves)


def _sdpa(query, key, value, visible, window):
    """Call sdpa as transformers does.

    On a GPU that is the flash kernel without a mask, and with a mask the memory-efficient kernel, which has no grouped
    queries. PyTorch's own fallback computes in fp32.
    """
    if ON_CPU:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=True)
    if not window:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)


def leak_probe(plan, document):
    """Return the documents whose outputs change in any bit when one token of `document` changes."""
    lengths = list(plan.lengths)
    inputs = make_inputs(lengths, 4, 2, 8, 8, torch.float32, 0)
    start = sum(lengths[:document])
    before, index = sharded_attention(plan, inputs, ExactKernel())
    for tensor in inputs[:3]:
        tensor[:, start] += 1.0
    after, _ = sharded_attention(plan, inputs, ExactKernel())
    full = [sum_over_ranks(inputs[0][..., :8], out, index) for out in (before[0], after[0])]
    changed = (full[0] != full[1]).any(dim=-1).any(dim=0)
    return [bool(part.any()) for part in changed.split(lengths)]


def counted_traffic(plan, shape, offset_groups=None, options=None):
    """Return rows and bytes of every collective of one layer, forward then backward, as this rank passes them."""
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
            plan,
            make_inputs(plan.lengths, *shape, torch.float32, 0),
            offset_groups=offset_groups,
            **(options or {}),
        )
    finally:
        dist.all_to_all_single = original
    return calls


def collectives_seen(plan):
    """Return all collectives of one layer from torch's profiler, which also sees those inside our operators."""
    inputs = make_inputs(plan.lengths, 4, 2, 8, 8, torch.float32, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        sharded_attention(plan, inputs, ExactKernel())
    return sum(event.name.startswith("c10d::") for event in profiler.events())


class _TracingKernel(ExactKernel):
    def __init__(self, trace):
        self.trace = trace

    def forward(self, query, key, value, rectangles, options):
        self.trace.append("local forward" if options.causal else "remote forward")
        return super().forward(query, key, value, rectangles, options)

    def backward(self, inputs, rectangles, options):
        self.trace.append("local backward" if options.causal else "remote backward")
        return super().backward(inputs, rectangles, options)


def issue_order(plan, frozen_kv=False, offset_groups=None):
    """Return the order in which one layer posts transfers, waits and computes."""
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
    query, key, value, grad_out = local_rows(bound, make_inputs(plan.lengths, 4, 2, 8, 8, torch.float32, 0))
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
    """Return the largest differences caused by strided inputs and by an expanded output gradient."""
    bound = bind(plan)
    query, key, value, _ = local_rows(bound, make_inputs(plan.lengths, 4, 2, 8, 8, torch.float64, 0))

    def run(tensors):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = document_attention(*leaves, bound)
        out.sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (query, key, value)]
    return max(float((a - b).abs().max()) for a, b in zip(run((query, key, value)), run(strided)))


def error_of_another_window(plan, window, ours):
    """Return the smallest of the errors when the reference uses `window` and our layer `ours`."""
    inputs = make_inputs(plan.lengths, 4, 2, 8, 8, torch.float64, 0)
    reference = reference_attention(list(plan.lengths), *inputs, window=window)
    return relative_errors([(*sharded_attention(plan, inputs, window=ours), reference)])[0]


def errors_of_different_layers(plan):
    """Several layers under one bound plan, as a model has them."""
    bound, cases = bind(plan), []
    layers = [((4, 2, 8, 8), 5), ((4, 4, 16, 16), None), ((8, 1, 12, 4), 5), ((2, 2, 24, 8), 9)]
    for shape, window in layers:
        inputs = make_inputs(plan.lengths, *shape, torch.float64, 0)
        reference = reference_attention(list(plan.lengths), *inputs, window=window)
        query, key, value, grad_out = local_rows(bound, inputs)
        leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
        out = document_attention(*leaves, bound, window=window)
        out.backward(grad_out)
        ours = [out.detach(), *(leaf.grad for leaf in leaves)]
        cases.append((ours, bound.layout.token_index.to(DEVICE), reference))
    assert bound.layout_for(5) is bound.layout_for(5) and bound.layout_for(None) is bound.layout_for(1000)
    return [error for errors in relative_errors(cases) for error in errors]
