"""Attention kernels behind one interface, and the table from which a layer's kernel is chosen."""

from .base import AttentionKernel, BackwardInputs, Gradients, ScoreOptions, accumulate_dtype
from .capabilities import CAPABILITIES, EXPERIMENTAL, TESTED, check_activated_kernel, explain_kernels, select_kernel
from .cpu_flash import CPUFlashKernel
from .eager import EagerKernel
from .flash_attention import FlashAttn2Kernel, FlashAttn3Kernel, FlashAttn4Kernel, TorchFlashKernel
from .library import load_kernel_library
from .varlen import VarlenKernel


__all__ = [
    "CAPABILITIES",
    "EXPERIMENTAL",
    "TESTED",
    "AttentionKernel",
    "BackwardInputs",
    "CPUFlashKernel",
    "EagerKernel",
    "FlashAttn2Kernel",
    "FlashAttn3Kernel",
    "FlashAttn4Kernel",
    "Gradients",
    "ScoreOptions",
    "TorchFlashKernel",
    "VarlenKernel",
    "accumulate_dtype",
    "check_activated_kernel",
    "explain_kernels",
    "load_kernel_library",
    "select_kernel",
]
