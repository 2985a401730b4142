"""The flash-attn package, version 2."""

from __future__ import annotations

import torch

from .varlen import VarlenKernel


class FlashAttn2Kernel(VarlenKernel):
    """flash-attn from 2.7 on: CUDA, fp16 and bf16, heads up to 256 wide, windows, grouped queries, softcap."""

    name = "flash_attn_2"

    def _forward_call(self, query, key, value, sequences, causal, scale, window, softcap):
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        out, lse, *_ = _flash_attn_varlen_forward(
            query, key, value, *sequences, 0.0, softmax_scale=scale, **_options(causal, window, softcap)
        )
        return out, lse

    def _backward_call(self, grad_out, query, key, value, out, lse, sequences, causal, scale, window, softcap):
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        # It writes gradients into what it is given.
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
        _flash_attn_varlen_backward(
            grad_out,
            query,
            key,
            value,
            out,
            lse,
            *grads,
            *sequences,
            0.0,
            softmax_scale=scale,
            alibi_slopes=None,
            deterministic=self.deterministic,
            **_options(causal, window, softcap),
        )
        return tuple(grads)


def _options(causal: bool, window: int | None, softcap: float | None) -> dict[str, bool | int | float]:
    return {
        "causal": causal,
        "window_size_left": -1 if window is None else window - 1,
        "window_size_right": 0 if causal else -1,
        "softcap": softcap or 0.0,
    }
