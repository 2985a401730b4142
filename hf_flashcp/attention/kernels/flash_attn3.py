"""FlashAttention-3, through the operators that its library registers."""

from __future__ import annotations

from typing import Any

import torch

from .base import ScoreOptions
from .varlen import Sequences, VarlenKernel, empty_gradients, window_sizes


class FlashAttn3Kernel(VarlenKernel):
    """`flash_attn_3::fwd` and `::bwd`: Hopper GPUs, fp16 and bf16, heads up to 256 wide, windows, grouped queries.

    The operators are registered by importing `flash_attn_interface`, by PyTorch's
    `activate_flash_attention_impl("FA3")`, or by [`load_kernel_library`]. Arguments go by the names in the operators'
    schema (hopper/flash_api_stable.cpp of flash-attention, as in xformers 0.0.34).
    """

    name = "flash_attn_3"

    def _forward_call(self, query, key, value, sequences, options):
        out, lse, *_ = torch.ops.flash_attn_3.fwd(
            query,
            key,
            value,
            num_splits=1,  # split keys would need a second pass to combine
            **_arguments(sequences, options),
        )
        return out, lse

    def _backward_call(self, inputs, sequences, options):
        # What backward returns differs from build to build; the tensors that it writes into do not.
        grads = empty_gradients(inputs)
        torch.ops.flash_attn_3.bwd(*inputs, *grads, deterministic=self.deterministic, **_arguments(sequences, options))
        return tuple(grads)


def _arguments(sequences: Sequences, options: ScoreOptions) -> dict[str, Any]:
    return {
        **sequences._asdict(),
        "softmax_scale": options.scale,
        "is_causal": options.only_causal,
        **window_sizes(options, unbounded=-1),
    }
