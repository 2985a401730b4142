"""FlashAttention-4, from the package flash-attn-4."""

from __future__ import annotations

from typing import Any

from .base import ScoreOptions
from .varlen import Sequences, VarlenKernel, window_sizes


class FlashAttn4Kernel(VarlenKernel):
    """flash-attn-4 (4.0.0b10 to b36): Hopper and Blackwell GPUs, fp16 and bf16, windows, grouped queries.

    It is called directly. PyTorch's own route to it (torch/nn/attention/_fa4.py) unpacks two results, while the
    package returns four from 4.0.0b20 and five from 4.0.0b36 on, and in PyTorch 2.11 it refuses every window.
    """

    name = "flash_attn_4"

    def _forward_call(self, query, key, value, sequences, options):
        from flash_attn.cute.interface import _flash_attn_fwd

        out, lse, *_ = _flash_attn_fwd(query, key, value, return_lse=True, **_arguments(sequences, options))
        return out, lse

    def _backward_call(self, inputs, sequences, options):
        from flash_attn.cute.interface import _flash_attn_bwd

        grad_query, grad_key, grad_value, *_ = _flash_attn_bwd(
            inputs.query,
            inputs.key,
            inputs.value,
            inputs.out,
            inputs.grad_out,
            inputs.lse,
            deterministic=self.deterministic,
            **_arguments(sequences, options),
        )
        return grad_query, grad_key, grad_value


def _arguments(sequences: Sequences, options: ScoreOptions) -> dict[str, Any]:
    """`None` stands for a side without a bound: -1 would be one, see `_resolve_causal_local_window` there."""
    return {
        **sequences._asdict(),
        "softmax_scale": options.scale,
        "causal": options.only_causal,
        **window_sizes(options, unbounded=None),
    }
