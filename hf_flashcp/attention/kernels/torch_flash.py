"""The FlashAttention-2 that PyTorch carries."""

from __future__ import annotations

import torch

from ..determinism import deterministic_algorithms
from .varlen import VarlenKernel


class TorchFlashKernel(VarlenKernel):
    """`aten::_flash_attention_forward` and its backward, which `torch.nn.attention.varlen` calls too: CUDA, fp16 and
    bf16, heads up to 256 wide, windows, grouped queries; no softcap. Needs no other package.

    `torch.nn.attention.activate_flash_attention_impl` puts FlashAttention-3 or 4 behind the same operators; then
    [`FlashAttn3Kernel`] or [`FlashAttn4Kernel`] calls those directly, and this kernel is not used."""

    name = "torch_flash"

    def _forward_call(self, query, key, value, sequences, causal, scale, window, softcap):
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            *sequences,
            0.0,  # dropout
            causal and window is None,
            False,  # return_debug_mask
            scale=scale,
            **_window_sizes(causal, window),
        )
        return out, lse

    def _backward_call(self, grad_out, query, key, value, out, lse, sequences, causal, scale, window, softcap):
        # Read with dropout only.
        rng_state = torch.zeros(2, dtype=torch.uint64, device=query.device)
        unused = torch.empty(0, device=query.device)
        # Backward takes its deterministic path where PyTorch's global switch is on
        # (aten/src/ATen/native/transformers/cuda/attention_backward.cu).
        with deterministic_algorithms(self.deterministic):
            return torch.ops.aten._flash_attention_backward(
                grad_out,
                query,
                key,
                value,
                out,
                lse,
                *sequences,
                0.0,
                causal and window is None,
                rng_state,
                unused,
                scale=scale,
                **_window_sizes(causal, window),
            )


def _window_sizes(causal: bool, window: int | None) -> dict[str, int | None]:
    """Keys to the left and right of the aligned one; `None` for all."""
    return {
        "window_size_left": None if window is None else window - 1,
        "window_size_right": 0 if causal else None,
    }
