"""Exact attention for one rank's tokens: kernels behind one interface, whose partial results are merged."""

from .checkpointing import save_attention_context_fn
from .function import document_attention
from .kernels import AttentionKernel, Layer, select_kernel
from .reference_check import layer_to_check


__all__ = [
    "AttentionKernel",
    "Layer",
    "document_attention",
    "layer_to_check",
    "save_attention_context_fn",
    "select_kernel",
]
