"""Runs the fused kernels on a CPU through Triton's interpreter, and counts what they read and write."""

import contextlib
import functools
import importlib.util
import sys
from unittest.mock import patch

import numpy as np
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from hf_flashcp.attention import fused_merge
from hf_flashcp.attention.engine import Engine
from hf_flashcp.attention.kernels import BackwardInputs
from hf_flashcp.bench.kernels import random_tensors
from hf_flashcp.exchange import kv_exchange
from hf_flashcp.layout import Parts, RankLayout, Rows, fused
from tests import attention_cases
from tests.kernel_cases import EmulatedVarlen


KERNELS = "hf_flashcp.layout.triton_sums", "hf_flashcp.attention.triton_merge"


@functools.cache
def interpreted():
    """Return the modules of the kernels, loaded such that Triton interprets them."""
    found = {}
    with patch.object(triton.knobs.runtime, "interpret", True):
        for name in KERNELS:
            spec = importlib.util.find_spec(name)
            found[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found[name])
    return found


@contextlib.contextmanager
def on_cpu(launch=None):
    """Let the library run its fused kernels on CPU tensors, or `launch` instead of starting them."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict(sys.modules, interpreted()))
        stack.enter_context(patch.object(fused, "runs_on", lambda tensor: True))
        if launch is not None:
            for module in (fused, fused_merge):
                stack.enter_context(patch.object(module, "launch", launch))
        yield


def attention_errors(todo):
    """Return the errors of layers whose results are merged and added by the fused kernels."""
    with on_cpu(), np.errstate(divide="ignore", invalid="ignore"):
        return attention_cases.attention_errors(todo)


def parts_of(numbers, count):
    return Parts([Rows(np.array(each, dtype=np.int64)) for each in numbers], count)


class CopiedBytes(TorchDispatchMode):
    """Counts the bytes that operators outside of kernels read and write, and the operators."""

    COPIES = ("copy_", "cat", "index_select")
    VIEWS = (
        "as_strided",
        "view",
        "transpose",
        "slice",
        "split_with_sizes",
        "unsqueeze",
        "squeeze",
        "select",
        "t",
        "detach",
        "alias",
        "expand",
    )
    FREE = ("lift_fresh", "empty", "new_empty", "empty_like")

    def __init__(self):
        super().__init__()
        self.bytes = self.operators = 0
        self.inside_kernel = False
        self.others = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if not self.inside_kernel:
            self.operators += 1
            if name in self.COPIES:
                self.bytes += 2 * found.numel() * found.element_size()
            else:
                self.others.add(name)
        return found

    def launch(self, kernel, target, *args, **constants):
        """Count what a fused kernel reads and writes, from its arguments, unless an attention kernel starts it."""
        if self.inside_kernel:
            return
        self.operators += 1
        self.inside_kernel = True
        self._count_launch(target, *args, **constants)
        self.inside_kernel = False

    def _count_launch(self, target, *args, **constants):
        first, parts = args[0], args[1]
        merges = "HAS_SINKS" in constants
        places = args[6 if merges else 3][:, : len(parts)]
        wanted = (places >= 0).any(1) if constants["IN_PLACE"] else torch.ones(len(target[0]), dtype=torch.bool)
        reads, rows = int((places >= 0).sum()), int(wanted.sum())
        from_base = rows if merges or constants["HAS_BASE"] else 0
        assert all(part.dtype == target.dtype for part in (first, *parts))
        self.bytes += (reads + from_base + rows) * len(target) * target.shape[2] * target.element_size()
        if merges:
            lse = args[3]
            self.bytes += (reads + 2 * rows) * len(lse) * lse.element_size()


class _Received:
    """A transfer that brings random rows, without other ranks."""

    def __init__(self, rows, result=None):
        self._result = rows.received.normal_() if result is None else result.normal_()

    def wait(self):
        return self._result


def copies_of_a_layer(plan, window, shape=(4, 2, 16), fuses=True):
    """Return the [`CopiedBytes`] of each rank in one bf16 layer without sinks that keeps received KV."""
    found = []
    for rank in range(plan.cp_size):
        count, layout = CopiedBytes(), RankLayout(plan, rank, plan.hiding_window(window))
        run = Engine(None, layout, _Uncounted(count), 1.0, None, True)
        tokens = layout.num_tokens
        query, key, value, grad_out = random_tensors(shape, tokens, tokens, torch.bfloat16, torch.device("cpu"))
        layout.stages(key.device)
        with contextlib.ExitStack() as stack:
            stack.enter_context(patch.object(kv_exchange, "Transfer", _Received))
            if fuses:
                stack.enter_context(on_cpu(count.launch))
            stack.enter_context(count)
            out, lse, received = run.forward(query, key, value, None)
            run.backward(BackwardInputs(grad_out, query, key, value, out, lse), received, keys_need_grad=True)
        found.append(count)
    return found


class _Uncounted(EmulatedVarlen):
    def __init__(self, count):
        super().__init__()
        self._count = count

    def forward(self, *args):
        return self._call(super().forward, args)

    def backward(self, *args):
        return self._call(super().backward, args)

    def _call(self, method, args):
        self._count.inside_kernel = True
        try:
            return method(*args)
        finally:
            self._count.inside_kernel = False
