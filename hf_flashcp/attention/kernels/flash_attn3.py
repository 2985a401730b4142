"""FlashAttention-3, through the operators that its library registers."""

from __future__ import annotations

import torch

from .varlen import Sequences, VarlenKernel


class FlashAttn3Kernel(VarlenKernel):
    """`flash_attn_3::fwd` and `::bwd`: Hopper GPUs, fp16 and bf16, heads up to 256 wide, windows, grouped queries.

    The operators are registered by importing `flash_attn_interface`, by PyTorch's
    `activate_flash_attention_impl("FA3")`, or by [`load_kernel_library`]. Arguments go by the names in the operators'
    schema (hopper/flash_api_stable.cpp of flash-attention, as in xformers 0.0.34).
    """

    name = "flash_attn_3"

    def _forward_call(self, query, key, value, sequences, causal, scale, window, softcap):
        out, lse, *_ = torch.ops.flash_attn_3.fwd(
            query,
            key,
            value,
            num_splits=1,  # split keys would need a second pass to combine
            **_options(sequences, causal, scale, window),
        )
        return out, lse

    def _backward_call(self, grad_out, query, key, value, out, lse, sequences, causal, scale, window, softcap):
        # What backward returns differs from build to build; the tensors that it writes into do not.
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
        torch.ops.flash_attn_3.bwd(
            grad_out,
            query,
            key,
            value,
            out,
            lse,
            *grads,
            deterministic=self.deterministic,
            **_options(sequences, causal, scale, window),
        )
        return tuple(grads)


def _options(sequences: Sequences, causal: bool, scale: float, window: int | None) -> dict[str, object]:
    return {
        **sequences._asdict(),
        "softmax_scale": scale,
        "is_causal": causal and window is None,
        "window_size_left": -1 if window is None else window - 1,
        "window_size_right": 0 if causal else -1,
    }
