"""PyTorch's flash kernel for CPU, in blocks that suit it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

from .base import Block, BlockKernel, Piece, cut, hidden, pad_heads


class CPUFlashKernel(BlockKernel):
    """PyTorch's flash kernel for CPU (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp): fp64, fp32, bf16, fp16.

    It aligns a causal mask top-left, so only square rectangles may use that; the others, and windows, have masks of
    their own. It dies on zero keys, which rectangles never have, and writes a logsumexp of 0 for a row whose keys are
    all hidden, so no piece has such a row; and value heads must be as wide as key heads, so narrower ones are padded
    here. It knows no softcap.

    What it likes: 768 rows and more in a call (it then takes 256 at a time, otherwise 64 or 32), and no causal flag on
    short sequences, because it computes keys in whole blocks of 512 and hides what lies behind the diagonal. So the
    query heads of a group are folded into rows, and causal sequences cut into blocks of queries with a mask. The
    gradients of keys and values it sums over rows in the compute dtype, a reason to keep blocks short: each is added
    in the accumulate dtype. Measured in bf16 on one Zen 5 core at head dim 64, in GFLOP/s forward and backward, 4
    query heads a KV head: 512 causal tokens 76 against 51 with the causal flag, 1024 93 against 80, 2048 100 against
    95; 256 x 256 without a mask 115 folded against 88; error of dK in bf16 3.1e-3 against 4.7e-3, and 7.2e-3 with the
    kernel's own grouped queries.
    """

    name = "cpu_flash"
    _ROWS = 192  # queries of a masked block; fewer with more than 4 heads a group, to stay at 768 rows
    _FULL_ROWS = 4096  # rows of an unmasked block, about
    _MASK_KEYS = 2048  # keys up to which one masked call beats one without a mask and one for each edge
    # Causal squares take the flag if they are as short as the first of these, where blocks only add overhead, or
    # longer than the second, where blocks save little: with 1 head in the rows, 2 or 3, more.
    _FLAG_BY_FOLD = {1: (256, 512), 2: (64, 512), 4: (64, 2048)}

    def _blocks(self, query, groups, rectangles, causal, window, *, backward):
        fold = _fold(query.shape[0], groups)
        few, many = self._FLAG_BY_FOLD[max(heads for heads in self._FLAG_BY_FOLD if heads <= fold)]
        if backward and fold >= 4:
            # Blocks are then as fast as the flag at any length, and their dK and dV more exact.
            many = None
        rows = min(self._ROWS, max(64, 4 * self._ROWS // fold))
        if window and window < rows:
            rows = min(rows, max(64, window // 2))
        for rectangle in rectangles:
            q_start, q_stop, k_start, k_stop = rectangle
            if not causal:
                yield from self._unmasked(rectangle, fold)
                continue
            if q_stop - q_start == k_stop - k_start:
                # The first rows of a square see all that is before them, whatever the window.
                seen = min(q_stop - q_start, window or q_stop - q_start)
                if seen <= few or (many is not None and seen > many):
                    yield Block(q_start, q_start + seen, [Piece(k_start, k_start + seen, None)], 1, causal=True)
                    rectangle = rectangle._replace(q_start=q_start + seen)
            for q_start, q_stop, k_start, k_stop in cut(rectangle, rows, causal, window):
                pieces = self._masked(q_stop - q_start, k_start, k_stop, rows, fold, window, query.dtype)
                yield Block(q_start, q_stop, pieces, fold)

    def _unmasked(self, rectangle, fold) -> Iterator[Block]:
        queries = rectangle.q_stop - rectangle.q_start
        blocks = max(1, round(queries * fold / self._FULL_ROWS))
        for q_start, q_stop, k_start, k_stop in cut(rectangle, -(-queries // blocks), causal=False, window=None):
            yield Block(q_start, q_stop, [Piece(k_start, k_stop, None)], fold)

    def _masked(self, queries, k_start, k_stop, rows, fold, window, dtype) -> list[Piece]:
        """The pieces of a causal block of `queries` queries, at most `rows`; each query sees a key of each."""
        keys = k_stop - k_start
        if keys <= self._MASK_KEYS:
            width = min(self._MASK_KEYS, window + rows) if window else self._MASK_KEYS
            mask = _causal_mask(rows, fold, width, window, dtype)[-queries * fold :, -keys:]
            return [Piece(k_start, k_stop, mask)]
        edge = k_start if window is None else max(k_start, k_stop - window + 1)
        diagonal = k_stop - queries
        pieces = [
            Piece(edge, diagonal, None),
            Piece(diagonal, k_stop, _causal_mask(rows, fold, rows, None, dtype)[-queries * fold :, -queries:]),
        ]
        if edge > k_start:
            mask = _window_edge_mask(rows, fold, dtype)[-queries * fold :, k_start - edge :]
            pieces.append(Piece(k_start, edge, mask))
        return pieces

    def _forward_piece(self, q, k, v, mask, is_causal, scale, softcap):
        value_width = v.shape[-1]
        q, k, v = pad_heads(max(q.shape[-1], value_width), q, k, v)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return out[..., :value_width], lse

    def _backward_piece(self, do, q, k, v, o, lse, mask, is_causal, scale, softcap):
        width, value_width = q.shape[-1], v.shape[-1]
        do, q, k, v, o = pad_heads(max(width, value_width), do, q, k, v, o)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse, 0.0, is_causal, attn_mask=mask, scale=scale
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
