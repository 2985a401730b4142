"""The device on which tests run: the CPU, or a GPU that all ranks share (`python -m pytest --device cuda`)."""

import contextlib
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from unittest import mock

import torch
from torch.autograd.graph import save_on_cpu
from transformers import modeling_utils

from hf_flashcp.attention import kernels
from hf_flashcp.attention.kernels import (
    CPUFlashKernel,
    Device,
    EagerKernel,
    Layer,
    explain_kernels,
    load_kernel_library,
)


DEVICE = torch.device(os.environ.get("FLASHCP_TEST_DEVICE", "cpu"))
ON_CPU = DEVICE.type == "cpu"

if library := os.environ.get("FLASHCP_TEST_KERNEL_LIBRARY"):
    load_kernel_library(library)

ExactKernel = CPUFlashKernel if ON_CPU else EagerKernel
"""The kernel class that `select_kernel` chooses for fp64 and fp32 on this device."""


def on_device(batch):
    """Move the tensors of a batch to the device."""
    return {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


@contextlib.contextmanager
def offload_on_cpu():
    """Make offloading copy tensors on a CPU as on a GPU, into memory that is not pinned, and count the copies."""
    copies, empty = mock.Mock(made=[]), torch.empty

    def pageable(*args, **kwargs):
        if "pin_memory" not in kwargs:
            return empty(*args, **kwargs)
        copies()
        del kwargs["pin_memory"]
        copies.made.append(empty(*args, **kwargs))
        return copies.made[-1]

    if not ON_CPU:
        yield copies
        return
    with mock.patch.object(torch, "empty", pageable), mock.patch.object(modeling_utils, "save_on_cpu", save_on_cpu):
        yield copies


def usable_kernels(layer):
    """Return the names of the kernels that can run a layer on this device, fastest first.

    This queries the GPU, so modules that the workers' server imports must not call it.
    """
    return [name for name, reason in explain_kernels(Device.here(DEVICE), layer).items() if reason is None]


def fused_kernels(key_dim=None, value_dim=None, **needs):
    """Return the names of the kernels that run only bf16 and fp16; there are none on the CPU."""
    exact = usable_kernels(Layer(torch.float64))
    found = usable_kernels(Layer(torch.bfloat16, key_dim, value_dim, **needs))
    return [name for name in found if name not in exact]


def compiles_for_gpus():
    """Return whether torch.compile can generate GPU kernels here, which needs a compiler for Triton's launchers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    return bool(importlib.util.find_spec("triton") and compiler and headers)


def make_kernel(name, deterministic=False):
    return kernels.make_kernel(name, DEVICE, deterministic)
