"""Short causal convolutions on slices of documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..layout import RankPlan
from .halo import with_halo, without_halo


def short_convolution(
    kernel: Callable,
    plan: RankPlan,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    seq_idx: Any = None,
    **options: Any,
) -> torch.Tensor:
    """Call a causal convolution once for all slices, each behind the tokens before it.

    The arguments after `plan` are those of transformers' `causal_conv1d_fn`: hidden_states (1, D, T_r) and weight
    (D, W). Returns (1, D, T_r).

    Source: transformers models/qwen3_next/modeling_qwen3_next.py, and causal_conv1d_fn of causal_conv1d.
    """
    width = weight.shape[-1]
    padded = with_halo(hidden_states[0].transpose(0, 1), plan, width)
    out = kernel(padded.transpose(0, 1)[None], weight, bias, activation=activation, **options)
    return without_halo(out[0].transpose(0, 1), plan, width).transpose(0, 1)[None]
