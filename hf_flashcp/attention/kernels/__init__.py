"""Attention kernels behind one interface, and the table that says which one runs a layer."""

from .base import AttentionKernel, accumulate_dtype
from .capabilities import CAPABILITIES, explain_kernels, select_kernel
from .cpu_flash import CPUFlashKernel
from .eager import EagerKernel


__all__ = [
    "CAPABILITIES",
    "AttentionKernel",
    "CPUFlashKernel",
    "EagerKernel",
    "accumulate_dtype",
    "explain_kernels",
    "select_kernel",
]
