"""PyTorch's flash kernel for CPU, in blocks that suit it."""

from __future__ import annotations

from functools import lru_cache

import torch

from ...layout import Rectangle
from .base import cut, hidden, pad_heads
from .blocks import BlockKernel, KeyBlock, QueryBlock


class CPUFlashKernel(BlockKernel):
    """PyTorch's flash kernel for CPU (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp): fp64, fp32, bf16, fp16.

    It aligns a causal mask top-left, so only square rectangles may use that; the others, and windows, have masks of
    their own. It dies on zero keys, which rectangles never have, and writes a logsumexp of 0 for a row whose keys are
    all hidden, so no block has such a row; and value heads must be as wide as key heads, so narrower ones are padded
    here. It has no softcap.

    It is fastest with 768 rows or more in a call (it then takes 256 at a time, otherwise 64 or 32), and without its
    causal flag on short sequences, because it computes keys in whole blocks of 512 and hides what lies behind the
    diagonal. So the query heads of a group are folded into rows, and causal sequences are cut into blocks of queries
    with a mask. It sums the gradients of keys and values over rows in the compute dtype, a reason to keep blocks
    short: each is added in the accumulate dtype. Measured in bf16 on one Zen 5 core at head dim 64, in GFLOP/s forward
    and backward, 4 query heads per KV head: 512 causal tokens 76 against 51 with the causal flag, 1024 93 against 80,
    2048 100 against 95; 256 x 256 without a mask 115 folded against 88; error of dK in bf16 3.1e-3 against 4.7e-3, and
    7.2e-3 with the kernel's own grouped queries.
    """

    name = "cpu_flash"
    _ROWS = 192  # queries of a masked block; fewer with more than 4 heads per group, to stay at 768 rows
    _FULL_ROWS = 4096  # rows of an unmasked block, about
    _MASK_KEYS = 2048  # keys up to which one masked call beats one without a mask and one for each edge
    # Causal squares take the flag if they are as short as the first of these, where blocks only add overhead, or
    # longer than the second, where blocks save little: with 1 head in the rows, 2 or 3, more.
    _FLAG_BY_FOLD = {1: (256, 512), 2: (64, 512), 4: (64, 2048)}

    def _blocks(self, query, groups, rectangles, options, backward):
        fold = _fold(query.shape[0], groups)
        rows = min(self._ROWS, max(64, 4 * self._ROWS // fold))
        if options.window and options.window < rows:
            rows = min(rows, max(64, options.window // 2))
        for rectangle in rectangles:
            if not options.causal:
                blocks = max(1, round(rectangle.queries * fold / self._FULL_ROWS))
                for part in cut(rectangle, -(-rectangle.queries // blocks), options):
                    yield QueryBlock(part.q_start, part.q_stop, [KeyBlock(part.k_start, part.k_stop)], fold)
                continue
            flagged = self._flagged_rows(rectangle, fold, options.window, backward)
            if flagged:
                q_start, k_start = rectangle.q_start, rectangle.k_start
                square = KeyBlock(k_start, k_start + flagged, causal=True)
                yield QueryBlock(q_start, q_start + flagged, [square], 1)
                rectangle = rectangle._replace(q_start=q_start + flagged)
            for part in cut(rectangle, rows, options):
                keys = self._masked(part, rows, fold, options.window, query.dtype)
                yield QueryBlock(part.q_start, part.q_stop, keys, fold)

    def _flagged_rows(self, rectangle: Rectangle, fold: int, window: int | None, backward: bool) -> int:
        """How many of a causal rectangle's first rows take the causal flag."""
        if rectangle.queries != rectangle.keys:
            return 0
        # The first rows of a square see all that is before them, whatever the window.
        rows = min(rectangle.queries, window or rectangle.queries)
        few, many = self._FLAG_BY_FOLD[max(heads for heads in self._FLAG_BY_FOLD if heads <= fold)]
        # In backward, blocks of 4 heads and more are as fast as the flag at any length, and dK and dV more exact.
        return rows if rows <= few or (rows > many and not (backward and fold >= 4)) else 0

    def _masked(self, part: Rectangle, rows: int, fold: int, window: int | None, dtype: torch.dtype) -> list[KeyBlock]:
        """The keys of a causal block of at most `rows` queries; each query sees a key of each."""
        queries, k_start, k_stop = part.queries, part.k_start, part.k_stop
        if part.keys <= self._MASK_KEYS:
            width = min(self._MASK_KEYS, window + rows) if window else self._MASK_KEYS
            mask = _causal_mask(rows, fold, width, window, dtype)[-queries * fold :, -part.keys :]
            return [KeyBlock(k_start, k_stop, mask)]
        edge = k_start if window is None else max(k_start, k_stop - window + 1)
        diagonal = k_stop - queries
        mask = _causal_mask(rows, fold, rows, None, dtype)[-queries * fold :, -queries:]
        keys = [KeyBlock(edge, diagonal), KeyBlock(diagonal, k_stop, mask)]
        if edge > k_start:
            mask = _window_edge_mask(rows, fold, dtype)[-queries * fold :, k_start - edge :]
            keys.append(KeyBlock(k_start, edge, mask))
        return keys

    def _forward_block(self, q, k, v, keys, options):
        value_width = v.shape[-1]
        q, k, v = pad_heads(max(q.shape[-1], value_width), q, k, v)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, keys.causal, attn_mask=keys.mask, scale=options.scale
        )
        return out[..., :value_width], lse

    def _backward_block(self, inputs, keys, options):
        width, value_width = inputs.query.shape[-1], inputs.value.shape[-1]
        padded = pad_heads(max(width, value_width), *inputs[:-1])
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *padded, inputs.lse, 0.0, keys.causal, attn_mask=keys.mask, scale=options.scale
        )
        return dq[..., :width], dk[..., :width], dv[..., :value_width]


def _fold(heads: int, groups: int) -> int:
    """How many heads of a group to put in the rows: all, if every thread still has a head to itself, because backward
    runs its threads over heads."""
    threads = torch.get_num_threads()
    return max(n for n in range(1, groups + 1) if groups % n == 0 and (n == 1 or heads // n >= threads))


@lru_cache(maxsize=16)
def _causal_mask(rows: int, fold: int, keys: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """(rows * fold, keys): added to the scores of a folded block, aligned bottom-right, so that the last rows and
    columns of it are the mask of a smaller block."""
    return _additive(hidden(rows, keys, window, torch.device("cpu")), fold, dtype)


@lru_cache(maxsize=16)
def _window_edge_mask(rows: int, fold: int, dtype: torch.dtype) -> torch.Tensor:
    """(rows * fold, rows): the same for the first keys of a block up to the first that its last query sees."""
    return _additive(torch.ones(rows, rows, dtype=torch.bool).tril(-1), fold, dtype)


def _additive(mask: torch.Tensor, fold: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(mask, -torch.inf).repeat_interleave(fold, 0)
