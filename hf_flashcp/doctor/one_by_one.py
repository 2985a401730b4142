"""Packed documents on one device, as PyTorch computes them without this library."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def attend_one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int]
) -> torch.Tensor:
    """Causal attention of one document after the other, by `scaled_dot_product_attention`.

    Args:
        query (`torch.Tensor`): (H_q, C, D).
        key, value (`torch.Tensor`): (H_kv, C, D).
        lengths (`Sequence[int]`): tokens of each document; they add up to C.

    Returns:
        `torch.Tensor`: (H_q, C, D).
    """
    parts = zip(*(tensor[None].split(list(lengths), dim=2) for tensor in (query, key, value)))
    outs = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True)[0] for part in parts]
    return torch.cat(outs, dim=1)
