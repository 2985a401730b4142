"""The flash-attn package, version 2."""

from __future__ import annotations

from typing import Any

from .base import ScoreOptions
from .varlen import VarlenKernel, empty_gradients, window_sizes


class FlashAttn2Kernel(VarlenKernel):
    """flash-attn from 2.7 on: CUDA, fp16 and bf16, heads up to 256 wide, windows, grouped queries, softcap."""

    name = "flash_attn_2"

    def _forward_call(self, query, key, value, sequences, options):
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        out, lse, *_ = _flash_attn_varlen_forward(query, key, value, *sequences, 0.0, **_arguments(options))
        return out, lse

    def _backward_call(self, inputs, sequences, options):
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        grads = empty_gradients(inputs)
        _flash_attn_varlen_backward(
            *inputs,
            *grads,
            *sequences,
            0.0,
            alibi_slopes=None,
            deterministic=self.deterministic,
            **_arguments(options),
        )
        return tuple(grads)


def _arguments(options: ScoreOptions) -> dict[str, Any]:
    return {
        "softmax_scale": options.scale,
        "causal": options.causal,
        **window_sizes(options, unbounded=-1),
        "softcap": options.softcap or 0.0,
    }
