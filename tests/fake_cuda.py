"""Runs calls for a GPU through PyTorch's meta kernels, which check shapes, dtypes and arguments but compute nothing.

With a CUDA build of PyTorch, the tensors are fake CUDA tensors, which have a device even on machines without a GPU.
With a CPU build, they are meta tensors.
"""

import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_flashcp.attention.kernels import BackwardInputs, ScoreOptions, flash_attention, varlen
from tests.kernel_cases import SCALE, make


FAKE = torch.device("cuda" if torch.version.cuda else "meta")


@contextlib.contextmanager
def fake_cuda():
    """Let tensors on `FAKE` have no data, and clear the caches of kernels before and after the context."""
    caches = varlen._calls_on, flash_attention._dropout_state
    for cached in caches:
        cached.cache_clear()
    try:
        with FakeTensorMode() if torch.version.cuda else contextlib.nullcontext():
            yield
    finally:
        for cached in caches:
            cached.cache_clear()


def forward_and_backward(kernel, shape, rectangles, **options):
    """Call a kernel on bf16 tensors on `FAKE`, inside [`fake_cuda`]; nothing is computed."""
    query, key, value, grad_out = (
        torch.empty_like(tensor, dtype=torch.bfloat16, device=FAKE) for tensor in make(shape, rectangles)
    )
    options = ScoreOptions(scale=SCALE, **options)
    found = kernel.forward(query, key, value, rectangles, options)
    whole = torch.empty_like(grad_out), torch.empty(query.shape[:2], device=FAKE)
    kernel.backward(BackwardInputs(grad_out, query, key, value, *whole), rectangles, options)
    return found
