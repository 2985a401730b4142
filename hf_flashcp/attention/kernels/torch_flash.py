"""The FlashAttention-2 that PyTorch carries."""

from __future__ import annotations

import torch

from ..determinism import deterministic_algorithms
from .varlen import VarlenKernel, window_sizes


class TorchFlashKernel(VarlenKernel):
    """`aten::_flash_attention_forward` and its backward, which `torch.nn.attention.varlen` calls too: CUDA, fp16 and
    bf16, heads up to 256 wide, windows, grouped queries; no softcap. Needs no other package.

    `torch.nn.attention.activate_flash_attention_impl` puts FlashAttention-3 or 4 behind the same operators; then
    [`FlashAttn3Kernel`] or [`FlashAttn4Kernel`] calls those directly, and this kernel is not used."""

    name = "torch_flash"

    def _forward_call(self, query, key, value, sequences, options):
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            *sequences,
            0.0,  # dropout
            options.only_causal,
            False,  # return_debug_mask
            scale=options.scale,
            **window_sizes(options, unbounded=None),
        )
        return out, lse

    def _backward_call(self, inputs, sequences, options):
        # Read with dropout only.
        rng_state = torch.zeros(2, dtype=torch.uint64, device=inputs.query.device)
        unused = torch.empty(0, device=inputs.query.device)
        # Backward takes its deterministic path where PyTorch's global switch is on
        # (aten/src/ATen/native/transformers/cuda/attention_backward.cu).
        with deterministic_algorithms(self.deterministic):
            return torch.ops.aten._flash_attention_backward(
                *inputs,
                *sequences,
                0.0,
                options.only_causal,
                rng_state,
                unused,
                scale=options.scale,
                **window_sizes(options, unbounded=None),
            )
