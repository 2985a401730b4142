"""Functions that workers run to compare layers in groups of KV heads with layers in one group."""

import torch
import torch.distributed as dist

from hf_flashcp import FlashCPPlugin, attach
from tests import attention_cases as cases
from tests import debug_cases, engine_cases
from tests.device import make_kernel
from tests.model_cases import cp_mesh
from tests.models import build_model


def unequal_results(todo, head_groups):
    """Return the results, by number, of which any bit differs from those of one group, for each case."""
    found = []
    for case in todo:
        inputs = cases.make_inputs(case.plan.lengths, *case.shape, getattr(torch, case.dtype), case.seed)
        one, several = (
            cases.sharded_attention(
                case.plan, inputs, make_kernel(case.kernel), case.offset_groups, head_groups=count, **case.options
            )[0]
            for count in (1, head_groups)
        )
        found.append([number for number, pair in enumerate(zip(one, several)) if not torch.equal(*pair)])
    return found


def layouts_in_memory(plan):
    """Return whether the output and each gradient have the heads of a token together, in one and in two groups."""
    bound = cases.bind(plan)
    rows = [
        tensor.transpose(0, 1).contiguous().transpose(0, 1)
        for tensor in cases.local_rows(bound, cases.make_inputs(plan.lengths, 4, 2, 8, 8, torch.float64, 0))
    ]
    found = []
    for head_groups in (1, 2):
        leaves = [tensor.detach().requires_grad_() for tensor in rows[:3]]
        out = cases.document_attention(*leaves, bound, head_groups=head_groups)
        grads = torch.autograd.grad(out, leaves, rows[3])
        found.append([tensor.transpose(0, 1).is_contiguous() for tensor in (out, *grads)])
    return found


def work(plan, head_groups):
    """Return the kernel calls, collectives and received bytes of one layer with 4 KV heads."""
    bytes_received = sum(
        call["bytes_received"]
        for call in cases.counted_traffic(plan, (8, 4, 8, 12), options={"head_groups": head_groups})
    )
    counted = engine_cases.counts(plan, {"head_groups": head_groups})
    return counted["kernel_calls"], counted["collectives"], bytes_received


def peaks(plan, shape, keep, backward):
    """Return the peak bytes of a layer in 1, 2, 4 and 8 groups, of forward alone or with backward."""
    options = [{"keep_received_kv": keep, "head_groups": count} for count in (1, 1, 2, 4, 8)]
    # The first run makes masks.
    return [engine_cases.peak_memory(plan, shape, each, backward)[0] for each in options][1:]


def groups_on_one_rank():
    model = build_model("llama").train()
    attach(model, cp_mesh(), plugin=FlashCPPlugin(cp_size=dist.get_world_size(), head_groups=1 + dist.get_rank()))
    model(**debug_cases.make_batch([30, 12]))


def compiled(packs):
    FlashCPPlugin(cp_size=dist.get_world_size(), head_groups=2)  # attached models take it from here
    return engine_cases.compiled(packs, "aot_eager", whole=False)
