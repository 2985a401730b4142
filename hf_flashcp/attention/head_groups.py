"""Attention in groups of KV heads, one after another, so that buffers of a layer exist for one group only.

Heads do not depend on each other, so a group of KV heads with its query heads is a layer of its own. Divided into n
groups, a layer needs 1/n of the packed KV that it sends, the KV that it receives (if it is not kept for backward), the
partial outputs, the gradients of keys that travel, and the buffers of the kernel. Kernel calls and exchanges are n
times as many and 1/n as large, so the bytes that travel are the same.

The exchange of a group is posted when the group before it is done, and hidden by the local pass of its own group.
Posting it earlier would hide no larger share of it, and would need room for the KV of two groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..exchange import named_range
from ..layout import accumulate_dtype
from .engine import Engine
from .kernels import BackwardInputs, Gradients


class HeadGroup(NamedTuple):
    """Consecutive KV heads of a layer, and the query heads that use them."""

    queries: slice
    keys: slice

    def select(self, inputs: BackwardInputs) -> BackwardInputs:
        """Return the tensors of these heads, as views."""
        grad_out, query, key, value, out, lse = inputs
        queries, keys = self
        return BackwardInputs(grad_out[queries], query[queries], key[keys], value[keys], out[queries], lse[queries])

    def __str__(self) -> str:
        return f"KV heads {self.keys.start} to {self.keys.stop - 1}"


def divide_heads(query_heads: int, kv_heads: int, count: int) -> list[HeadGroup]:
    """Divide a layer's heads into `count` groups that differ by at most one KV head; into fewer if KV heads are fewer.

    With a single KV head (multi-query attention) there is one group.
    """
    count, shared = min(count, kv_heads), query_heads // kv_heads
    edges = [number * kv_heads // count for number in range(count + 1)]
    return [
        HeadGroup(slice(first * shared, stop * shared), slice(first, stop)) for first, stop in zip(edges, edges[1:])
    ]


class GroupedEngine(NamedTuple):
    """An [`Engine`] that computes the heads of a layer in groups, with the same methods.

    Results of a group are copied to where they belong among those of all heads. Heads of a token lie together in
    memory, as the layer's projections write and read them.
    """

    engine: Engine
    groups: Sequence[HeadGroup]

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Return out, lse and a list with the KV of each stage of each group, see [`Engine.forward`]."""
        out = _empty_like(query, value.shape[2])
        lse = query.new_empty(query.shape[:2], dtype=accumulate_dtype(query.dtype))
        received: list[torch.Tensor] = []
        for group in self.groups:
            queries, keys = group
            with named_range(str(group)):
                found = self.engine.forward(
                    query[queries], key[keys], value[keys], None if sinks is None else sinks[queries]
                )
                out[queries], lse[queries] = found[:2]
                received += found[2]
            del found  # free it before the next group allocates its own
        return out, lse, received

    def backward(self, inputs: BackwardInputs, received: Sequence[torch.Tensor], keys_need_grad: bool) -> Gradients:
        """Return dQ, dK and dV of this rank's tokens, see [`Engine.backward`]."""
        grads = Gradients(
            _empty_like(inputs.query),
            _empty_like(inputs.key) if keys_need_grad else None,
            _empty_like(inputs.value) if keys_need_grad else None,
        )
        stages = len(received) // len(self.groups)
        for number, group in enumerate(self.groups):
            kept = received[number * stages : (number + 1) * stages]
            with named_range(f"{group}, backward"):
                found = self.engine.backward(group.select(inputs), kept, keys_need_grad)
                for whole, part, heads in zip(grads, found, (group.queries, group.keys, group.keys)):
                    if whole is not None:
                        whole[heads] = part
            del found, part
        return grads


def _empty_like(tensor: torch.Tensor, width: int | None = None) -> torch.Tensor:
    """Return an empty tensor of the shape (heads, T, D) of another, with the heads of a token together in memory."""
    heads, tokens, same_width = tensor.shape
    return tensor.new_empty(tokens, heads, width or same_width).transpose(0, 1)
