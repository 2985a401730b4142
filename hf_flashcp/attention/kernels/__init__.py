"""Attention kernels behind one interface, and the rule by which a layer's kernel is chosen."""

from .base import AttentionKernel, BackwardInputs, Gradients, ScoreOptions
from .capabilities import CAPABILITIES, EXPERIMENTAL, TESTED
from .cpu_flash import CPUFlashKernel
from .cudnn import CudnnKernel
from .devices import GPUS, Device, Layer
from .eager import EagerKernel
from .flash_attention import FlashAttn2Kernel, FlashAttn3Kernel, FlashAttn4Kernel, TorchFlashKernel
from .library import load_kernel_library
from .selection import (
    check_activated_kernel,
    check_kernel_name,
    explain_kernels,
    faster_kernels,
    make_kernel,
    require_kernel,
    select_kernel,
)
from .varlen import VarlenKernel


__all__ = [
    "CAPABILITIES",
    "EXPERIMENTAL",
    "GPUS",
    "TESTED",
    "AttentionKernel",
    "BackwardInputs",
    "CPUFlashKernel",
    "CudnnKernel",
    "Device",
    "EagerKernel",
    "FlashAttn2Kernel",
    "FlashAttn3Kernel",
    "FlashAttn4Kernel",
    "Gradients",
    "Layer",
    "ScoreOptions",
    "TorchFlashKernel",
    "VarlenKernel",
    "check_activated_kernel",
    "check_kernel_name",
    "explain_kernels",
    "faster_kernels",
    "load_kernel_library",
    "make_kernel",
    "require_kernel",
    "select_kernel",
]
