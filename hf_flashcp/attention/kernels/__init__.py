"""Attention kernels behind one interface, and the table that says which one runs a layer."""

from .base import AttentionKernel, accumulate_dtype
from .capabilities import CAPABILITIES, EXPERIMENTAL, TESTED, explain_kernels, select_kernel
from .cpu_flash import CPUFlashKernel
from .eager import EagerKernel
from .flash_attn2 import FlashAttn2Kernel
from .torch_flash import TorchFlashKernel
from .varlen import VarlenKernel


__all__ = [
    "CAPABILITIES",
    "EXPERIMENTAL",
    "TESTED",
    "AttentionKernel",
    "CPUFlashKernel",
    "EagerKernel",
    "FlashAttn2Kernel",
    "TorchFlashKernel",
    "VarlenKernel",
    "accumulate_dtype",
    "explain_kernels",
    "select_kernel",
]
