"""Exact attention on a rank's tokens: kernels behind one interface, merged by logsumexp, with its own backward."""

from .function import document_attention
from .kernels import AttentionKernel, select_kernel


__all__ = ["AttentionKernel", "document_attention", "select_kernel"]
