"""PyTorch's flash attention kernel for CPU, called with blocks that suit it."""

from __future__ import annotations

from functools import lru_cache

import torch

from ...layout import Rectangle
from .base import cut, hidden, pad_heads
from .blocks import BlockKernel, KeyBlock, QueryBlock


class CPUFlashKernel(BlockKernel):
    """PyTorch's flash attention kernel for CPU, in fp64, fp32, bf16 and fp16.

    See aten/src/ATen/native/cpu/FlashAttentionKernel.cpp. This class works around its limits:

    - Its causal mask is aligned top-left, so only square rectangles can use its causal flag. Other causal rectangles
      and windows get explicit masks.
    - It crashes without keys, and writes a logsumexp of 0 for a row whose keys are all hidden. Neither occurs here:
      rectangles have keys, and every row of a block sees at least one.
    - Value heads must be as wide as key heads, so the narrower ones are padded.
    - It does not support softcap.

    It is fastest with 768 or more rows per call, of which it then processes 256 at a time, otherwise 64 or 32. On
    short sequences it is faster without its causal flag, because it computes keys in whole blocks of 512 and hides
    those behind the diagonal. Therefore the query heads of a group are folded into rows, and causal sequences are
    divided into masked blocks of queries. Short blocks are also more accurate: the kernel sums the gradients of keys
    and values over the rows of a block in the compute dtype, while blocks are summed in the accumulate dtype.

    Measured in bf16 on one Zen 5 core at head dimension 64, with 4 query heads per KV head, in GFLOP/s of forward and
    backward: 76 with blocks and 51 with the causal flag for 512 causal tokens, 93 and 80 for 1024, 100 and 95 for
    2048; for 256 x 256 without a mask, 115 with folded heads and 88 without. The error of dK in bf16 is 3.1e-3 with
    blocks, 4.7e-3 with the causal flag, and 7.2e-3 with the kernel's own grouped queries.
    """

    name = "cpu_flash"
    _ROWS = 192  # queries per masked block; fewer with more than 4 heads per group, to stay at 768 rows
    _FULL_ROWS = 4096  # approximate rows per unmasked block
    _MASK_KEYS = 2048  # up to this many keys, one masked call is faster than an unmasked call plus one for each edge
    # By the number of heads folded into rows (1, 2 to 3, 4 or more): causal squares use the flag if they have at most
    # as many rows as the first number, where blocks only add overhead, or more than the second, where blocks save
    # little.
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
        """Return how many of the first rows of a causal rectangle use the causal flag."""
        if rectangle.queries != rectangle.keys:
            return 0
        # The first `window` rows of a square see all keys before them, so the window does not hide any.
        rows = min(rectangle.queries, window or rectangle.queries)
        few, many = self._FLAG_BY_FOLD[max(heads for heads in self._FLAG_BY_FOLD if heads <= fold)]
        # In backward, blocks with 4 or more heads are as fast as the flag at any length, and more accurate.
        return rows if rows <= few or (rows > many and not (backward and fold >= 4)) else 0

    def _masked(self, part: Rectangle, rows: int, fold: int, window: int | None, dtype: torch.dtype) -> list[KeyBlock]:
        """Return the blocks of keys for a causal block of at most `rows` queries, each of which sees a key of each."""
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
    """Return how many heads of a group to fold into rows.

    That is the largest divisor of the group that leaves a head for every thread, because backward parallelizes over
    heads.
    """
    threads = torch.get_num_threads()
    return max(n for n in range(1, groups + 1) if groups % n == 0 and (n == 1 or heads // n >= threads))


@lru_cache(maxsize=16)
def _causal_mask(rows: int, fold: int, keys: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Return the mask (rows * fold, keys) that is added to the scores of a folded causal block.

    It is aligned bottom-right, so its last rows and columns are the mask of a smaller block.
    """
    return _additive(hidden(rows, keys, window, torch.device("cpu")), fold, dtype)


@lru_cache(maxsize=16)
def _window_edge_mask(rows: int, fold: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the mask (rows * fold, rows) for a block's first keys, up to the first key that its last query sees."""
    return _additive(torch.ones(rows, rows, dtype=torch.bool).tril(-1), fold, dtype)


def _additive(mask: torch.Tensor, fold: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(mask, -torch.inf).repeat_interleave(fold, 0)
