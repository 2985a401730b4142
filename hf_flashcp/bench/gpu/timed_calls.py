"""`TimedCalls`: forward and backward of kernels on random tensors, for rectangles that the caller gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from ...attention.kernels import AttentionKernel, BackwardInputs, ScoreOptions
from ...layout import Rectangle
from ..kernels import Shape, random_tensors


ROUNDS = 5

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)


class TimedCalls:
    """Random bf16 tensors for some rectangles, on which kernels run in either direction.

    Backward reads an output and a logsumexp that are not those of forward, which does not change its time.

    Args:
        rectangles (`Sequence[Rectangle]`): all rectangles; a kernel may run a part of them.
        causal (`bool`): whether they are causal.
        shape (`Shape`): query heads, KV heads and head dim.
        device (`torch.device`): device of the tensors.
    """

    def __init__(self, rectangles: Sequence[Rectangle], causal: bool, shape: Shape, device: torch.device):
        rows, keys = max(each.q_stop for each in rectangles), max(each.k_stop for each in rectangles)
        query, key, value, grad_out = random_tensors(shape, rows, keys, torch.bfloat16, device)
        lse = torch.zeros(query.shape[:2], device=device)
        self._inputs = BackwardInputs(grad_out, query, key, value, torch.randn_like(query), lse)
        self._options = ScoreOptions(causal, shape[2] ** -0.5)

    def run(self, direction: Direction, kernel: AttentionKernel, rectangles: Sequence[Rectangle]) -> None:
        """Run a kernel on some of the rectangles."""
        if direction == "forward":
            kernel.forward(*self._inputs[1:4], rectangles, self._options)
        else:
            kernel.backward(self._inputs, rectangles, self._options)


def side_by_side(sizes: Sequence[tuple[int, int]]) -> list[Rectangle]:
    """Return one rectangle per pair of numbers of queries and keys, with disjoint ranges of both."""
    found, rows, keys = [], 0, 0
    for more_rows, more_keys in sizes:
        found.append(Rectangle(rows, rows + more_rows, keys, keys + more_keys))
        rows, keys = rows + more_rows, keys + more_keys
    return found
