"""What workers run to count and trace what the engine does in one layer, forward and backward."""

import contextlib
from collections import Counter

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from hf_flashcp.attention import document_attention
from hf_flashcp.attention.kernels import CPUFlashKernel
from tests import attention_cases as cases


class CountingKernel(CPUFlashKernel):
    """Counts calls, and says when it is running."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.running = False

    @contextlib.contextmanager
    def _call(self):
        self.calls += 1
        self.running = True
        try:
            yield
        finally:
            self.running = False

    def forward(self, *args, **kwargs):
        with self._call():
            return super().forward(*args, **kwargs)

    def backward(self, *args, **kwargs):
        with self._call():
            return super().backward(*args, **kwargs)


class OperationCount(TorchDispatchMode):
    """Operators that are not the kernel's own, by name."""

    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.kernel.running:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


CPU = torch.device("cpu")
COPIES = (
    "cat",
    "index_select",
    "index_copy_",
    "index_add_",
    "copy_",
    "lerp_",
    "add_",
    "clone",
    "_to_copy",
    "scatter_",
)
# What reads a tensor's values on the host, or makes shapes of them.
SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "index", "item", "is_nonzero", "equal")


def counts(plan, options=None):
    """`collectives`, `kernel_calls`, and the engine's copying and synchronising operators by name."""
    bound, options, kernel = cases.bind(plan), options or {}, CountingKernel()
    inputs = cases.make_inputs(plan.lengths, 4, 2, 8, 12, torch.float32, 0)
    query, key, value, grad_out = (tensor.index_select(1, bound.layout.token_index) for tensor in inputs)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    collectives = 0
    original = dist.all_to_all_single

    def counting(*args, **kwargs):
        nonlocal collectives
        collectives += 1
        return original(*args, **kwargs)

    dist.all_to_all_single = counting
    try:
        with OperationCount(kernel) as operations:
            out = document_attention(*leaves, bound, kernel=kernel, **options)
            torch.autograd.grad(out, leaves, grad_out)
    finally:
        dist.all_to_all_single = original
    return {
        "collectives": collectives,
        "kernel_calls": kernel.calls,
        "copies": {name: operations.counts[name] for name in COPIES if operations.counts[name]},
        "synchronising": {name: operations.counts[name] for name in SYNCHRONISING if operations.counts[name]},
    }


def errors_in_bf16(plan, shape):
    """Error of out, dq, dk, dv in bf16 against fp64 on the same bf16 inputs."""
    return cases.attention_error(plan, shape, "bfloat16")


def differences_between_runs(plan, options):
    """How many numbers of out, dq, dk, dv differ between two runs, to the last bit."""
    inputs = cases.make_inputs(plan.lengths, 4, 2, 16, 16, torch.bfloat16, 0)
    first, second = (cases.sharded_attention(plan, [each.clone() for each in inputs], **options)[0] for _ in range(2))
    return [int((a != b).sum()) for a, b in zip(first, second)]
