"""Exact attention on a rank's tokens: kernels behind one interface, merged by logsumexp, with its own backward."""

from .function import document_attention
from .kernels import AttentionKernel, select_kernel
from .operator import save_attention_context_fn


__all__ = ["AttentionKernel", "document_attention", "save_attention_context_fn", "select_kernel"]
