"""Attention of packed documents on one device, as PyTorch computes it without this library."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def attend_one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int], window: int | None = None
) -> torch.Tensor:
    """Attends causally in one document after the other, by `scaled_dot_product_attention`, all tensors (heads, tokens,
    width). A window takes a mask of length x length."""
    parts = zip(*(tensor[None].split(list(lengths), dim=2) for tensor in (query, key, value)))
    return torch.cat([_attend(*part, window)[0] for part in parts], dim=1)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
    if window is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    length = query.shape[2]
    visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=True)
