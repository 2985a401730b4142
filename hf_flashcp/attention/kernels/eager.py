"""Attention computed directly from its formulas."""

from __future__ import annotations

import torch

from ...layout import accumulate_dtype
from .base import ScoreOptions, cut, hidden
from .blocks import BlockKernel, KeyBlock, QueryBlock


class EagerKernel(BlockKernel):
    """Attention computed directly from its formulas, on any device and with every option.

    Queries are processed in blocks, so that at most about 2**25 scores exist at a time.
    """

    name = "eager"
    _MAX_SCORES = 2**25

    def _blocks(self, query, groups, rectangles, options, backward):
        for rectangle in rectangles:
            rows = max(1, self._MAX_SCORES // (query.shape[0] * rectangle.keys))
            # Blocks with more rows than the window waste work, because the keys that a block sees grow with its rows.
            rows = min(rows, max(options.window, 64)) if options.window else rows
            for part in cut(rectangle, rows, options):
                mask = None
                if options.causal:
                    mask = hidden(part.queries, part.keys, options.window, query.device).repeat_interleave(groups, 0)
                yield QueryBlock(part.q_start, part.q_stop, [KeyBlock(part.k_start, part.k_stop, mask)], groups)

    @staticmethod
    def _scores(q: torch.Tensor, k: torch.Tensor, keys: KeyBlock, options: ScoreOptions) -> torch.Tensor:
        dtype = accumulate_dtype(q.dtype)
        scores = q.to(dtype) @ k.to(dtype).mT * options.scale
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        return scores if keys.mask is None else scores.masked_fill_(keys.mask, -torch.inf)

    def _forward_block(self, q, k, v, keys, options):
        with torch.autocast(q.device.type, enabled=False):
            scores = self._scores(q, k, keys, options)
            lse = scores.logsumexp(-1)
            finite = lse.masked_fill(lse == -torch.inf, 0)  # a row without keys gets zeros instead of NaN
            out = (scores - finite[..., None]).exp() @ v.to(scores.dtype)
        return out, lse

    def _backward_block(self, inputs, keys, options):
        with torch.autocast(inputs.query.device.type, enabled=False):
            scores = self._scores(inputs.query, inputs.key, keys, options)
            p = (scores - inputs.lse[..., None]).exp()
            do, q, k, v, o = (tensor.to(p.dtype) for tensor in inputs[:-1])
            ds = p * (do @ v.mT - (do * o).sum(-1, keepdim=True))
            if options.softcap is not None:
                ds = ds * (1 - (scores.masked_fill(p == 0, 0) / options.softcap).square())
            ds = ds * options.scale
            return ds @ k, ds.mT @ q, p.mT @ do
