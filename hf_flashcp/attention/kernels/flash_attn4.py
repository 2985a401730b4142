"""FlashAttention-4, from the package flash-attn-4."""

from __future__ import annotations

from .varlen import Sequences, VarlenKernel


class FlashAttn4Kernel(VarlenKernel):
    """flash-attn-4 (4.0.0b10 to b36): Hopper and Blackwell GPUs, fp16 and bf16, windows, grouped queries.

    It is called directly. PyTorch's own route to it (torch/nn/attention/_fa4.py) unpacks two results, while the
    package returns four from 4.0.0b20 and five from 4.0.0b36 on, and in PyTorch 2.11 it refuses every window.
    """

    name = "flash_attn_4"

    def _forward_call(self, query, key, value, sequences, causal, scale, window, softcap):
        from flash_attn.cute.interface import _flash_attn_fwd

        out, lse, *_ = _flash_attn_fwd(
            query, key, value, return_lse=True, **_options(sequences, causal, scale, window)
        )
        return out, lse

    def _backward_call(self, grad_out, query, key, value, out, lse, sequences, causal, scale, window, softcap):
        from flash_attn.cute.interface import _flash_attn_bwd

        grad_query, grad_key, grad_value, *_ = _flash_attn_bwd(
            query,
            key,
            value,
            out,
            grad_out,
            lse,
            deterministic=self.deterministic,
            **_options(sequences, causal, scale, window),
        )
        return grad_query, grad_key, grad_value


def _options(sequences: Sequences, causal: bool, scale: float, window: int | None) -> dict[str, object]:
    """`None` stands for a side without a bound: -1 would be one, see `_resolve_causal_local_window` there."""
    return {
        **sequences._asdict(),
        "softmax_scale": scale,
        "causal": causal and window is None,
        "window_size_left": None if window is None else window - 1,
        "window_size_right": 0 if causal else None,
    }
