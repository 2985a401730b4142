"""FlashAttention kernels: version 2 as included in PyTorch, and versions 2, 3 and 4 from separate packages.

All of them run on CUDA, in fp16 and bf16, and support heads up to 256 wide, windows and grouped queries.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ...plan.kernel_calls import GRIDS
from ..determinism import deterministic_algorithms
from .base import BackwardInputs, ScoreOptions
from .flash_attention_3 import operators
from .varlen import Sequences, VarlenKernel


class TorchFlashKernel(VarlenKernel):
    """FlashAttention-2 as included in PyTorch (`aten::_flash_attention_forward` and its backward).

    It needs no other package and does not support softcap. `torch.nn.attention.varlen` calls the same operators.

    `torch.nn.attention.activate_flash_attention_impl` replaces their implementation by FlashAttention-3 or 4. Then
    this kernel is not used, because [`FlashAttn3Kernel`] or [`FlashAttn4Kernel`] calls that implementation directly.
    """

    name = "torch_flash"
    grids = GRIDS[name]
    expands_kv_gradients = True

    def _forward_call(self, query, key, value, sequences, options):
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            *sequences[:4],
            0.0,  # dropout
            options.only_causal,
            False,  # return_debug_mask
            scale=options.scale,
            **_window_sizes(options, unbounded=None),
        )
        return out, lse

    def _backward_call(self, inputs, sequences, options):
        dropout_state = _dropout_state(inputs.query.device)
        # Backward takes its deterministic path if PyTorch's global switch is on
        # (aten/src/ATen/native/transformers/cuda/attention_backward.cu).
        with deterministic_algorithms(self.deterministic):
            return torch.ops.aten._flash_attention_backward(
                *inputs,
                *sequences[:4],
                0.0,
                options.only_causal,
                *dropout_state,
                scale=options.scale,
                **_window_sizes(options, unbounded=None),
            )


class FlashAttn2Kernel(VarlenKernel):
    """FlashAttention-2 from the package flash-attn, version 2.7 or later, which also supports softcap."""

    name = "flash_attn_2"
    grids = GRIDS[name]
    expands_kv_gradients = True

    def _forward_call(self, query, key, value, sequences, options):
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        out, lse, *_ = _flash_attn_varlen_forward(
            query, key, value, dropout_p=0.0, **self._arguments(sequences, options)
        )
        return out, lse

    def _backward_call(self, inputs, sequences, options):
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        grads = _empty_gradients(inputs)
        _flash_attn_varlen_backward(
            *inputs,
            *grads,
            dropout_p=0.0,
            alibi_slopes=None,
            deterministic=self.deterministic,
            **self._arguments(sequences, options),
        )
        return grads

    @staticmethod
    def _arguments(sequences: Sequences, options: ScoreOptions) -> dict[str, Any]:
        return {**_arguments(sequences, options), "causal": options.causal}


class FlashAttn3Kernel(VarlenKernel):
    """FlashAttention-3, the operators `fwd` and `bwd` that [`~flash_attention_3.operators`] finds, on Hopper GPUs.

    They are called with the argument names of their schema (hopper/flash_api_stable.cpp of flash-attention, the same
    in flash-attn3 of kernels-community and in xformers 0.0.34).
    """

    name = "flash_attn_3"
    grids = GRIDS[name]

    def _forward_call(self, query, key, value, sequences, options):
        arguments = _arguments(sequences, options, causal="is_causal")
        # Splitting the keys would need a second pass to combine the parts.
        out, lse, *_ = operators().fwd(query, key, value, num_splits=1, **arguments)
        return out, lse

    def _backward_call(self, inputs, sequences, options):
        # Builds differ in what backward returns, but all of them write to the same output arguments.
        grads, arguments = _empty_gradients(inputs), _arguments(sequences, options, causal="is_causal")
        operators().bwd(*inputs, *grads, deterministic=self.deterministic, **arguments)
        return grads


class FlashAttn4Kernel(VarlenKernel):
    """FlashAttention-4 from the package flash-attn-4 (4.0.0b10 to 4.0.0b36), on Hopper and Blackwell GPUs.

    It is called directly and not through PyTorch (torch/nn/attention/_fa4.py). PyTorch's wrapper unpacks two results,
    while the package returns four since 4.0.0b20 and five since 4.0.0b36, and in PyTorch 2.11 it refuses every window.
    In the package, `None` stands for an unbounded side of the window, and -1 would be a bound (see its
    `_resolve_causal_local_window`).
    """

    name = "flash_attn_4"
    grids = GRIDS[name]

    def __init__(self, deterministic: bool = False, blackwell: bool = False):
        super().__init__(deterministic)
        self._blackwell = blackwell

    def widths(self, key_dim, value_dim):
        """Return the widths for which the package has kernels: on Blackwell up to 128 for both, 192 and 128, or 256.

        On Hopper the kernels for grouped queries need a common width (see its `_validate_head_dims`).
        """
        widest = max(key_dim, value_dim)
        if not self._blackwell or widest <= 128:
            return super().widths(key_dim, value_dim)
        return (192, 128) if key_dim <= 192 and value_dim <= 128 else (256, 256)

    def _forward_call(self, query, key, value, sequences, options):
        from flash_attn.cute.interface import _flash_attn_fwd

        arguments = _arguments(sequences, options, unbounded=None)
        out, lse, *_ = _flash_attn_fwd(query, key, value, return_lse=True, **arguments)
        return out, lse

    def _backward_call(self, inputs, sequences, options):
        from flash_attn.cute.interface import _flash_attn_bwd

        grad_out, query, key, value, out, lse = inputs
        arguments = _arguments(sequences, options, unbounded=None)
        grads = _flash_attn_bwd(query, key, value, out, grad_out, lse, deterministic=self.deterministic, **arguments)
        return tuple(grads[:3])


@cache
def _dropout_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the state of the random numbers of dropout, which backward reads only if there is dropout."""
    return torch.zeros(2, dtype=torch.uint64, device=device), torch.empty(0, device=device)


_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


def _arguments(
    sequences: Sequences, options: ScoreOptions, *, causal: str = "causal", unbounded: int | None = -1
) -> dict[str, Any]:
    """Return keyword arguments for the packages' functions; `causal` is the name of the argument for causality."""
    return {
        **{name: getattr(sequences, name) for name in _LENGTHS},
        "softmax_scale": options.scale,
        causal: options.only_causal,
        "softcap": options.softcap or 0.0,
        **_window_sizes(options, unbounded),
    }


def _window_sizes(options: ScoreOptions, unbounded: int | None) -> dict[str, int | None]:
    """Return how many keys a query sees to the left and right of its aligned key; `unbounded` stands for all keys."""
    return {
        "window_size_left": unbounded if options.window is None else options.window - 1,
        "window_size_right": 0 if options.causal else unbounded,
    }


def _empty_gradients(inputs: BackwardInputs) -> tuple[torch.Tensor, ...]:
    """Return contiguous tensors for kernels that write the gradients of query, key and value to output arguments."""
    return tuple(
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (inputs.query, inputs.key, inputs.value)
    )
