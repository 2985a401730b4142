"""Names for the parts of a layer in profilers' traces."""

from __future__ import annotations

import contextlib

import torch


_NOTHING = contextlib.nullcontext()


def named_range(name: str) -> contextlib.AbstractContextManager:
    """`torch.profiler.record_function("flashcp: NAME")` while a profiler runs (an NVTX range under
    `torch.autograd.profiler.emit_nvtx`), else nothing."""
    if torch.autograd._profiler_enabled():
        return torch.profiler.record_function(f"flashcp: {name}")
    return _NOTHING
