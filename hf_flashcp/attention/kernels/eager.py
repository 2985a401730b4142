"""The formulas, written out."""

from __future__ import annotations

import torch

from .base import Block, BlockKernel, Piece, accumulate_dtype, cut, hidden


class EagerKernel(BlockKernel):
    """The formulas, written out, on any device, with every option: blocks of queries, so that no more than about
    2 ** 25 scores exist at a time."""

    name = "eager"
    _MAX_SCORES = 2**25

    def _blocks(self, query, groups, rectangles, causal, window, *, backward):
        for rectangle in rectangles:
            rows = max(1, self._MAX_SCORES // (query.shape[0] * (rectangle.k_stop - rectangle.k_start)))
            # Wider than a window makes little sense: what a block sees grows with its rows.
            rows = min(rows, max(window, 64)) if window else rows
            for block in cut(rectangle, rows, causal, window):
                q_start, q_stop, k_start, k_stop = block
                mask = None
                if causal:
                    mask = hidden(q_stop - q_start, k_stop - k_start, window, query.device)
                    mask = mask.repeat_interleave(groups, 0)
                yield Block(q_start, q_stop, [Piece(k_start, k_stop, mask)], groups)

    @staticmethod
    def _scores(q, k, mask, scale, softcap):
        dtype = accumulate_dtype(q.dtype)
        scores = q.to(dtype) @ k.to(dtype).mT * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        return scores if mask is None else scores.masked_fill_(mask, -torch.inf)

    def _forward_piece(self, q, k, v, mask, is_causal, scale, softcap):
        with torch.autocast(q.device.type, enabled=False):
            scores = self._scores(q, k, mask, scale, softcap)
            lse = scores.logsumexp(-1)
            finite = lse.masked_fill(lse == -torch.inf, 0)  # a row without keys has nothing, not NaN
            out = (scores - finite[..., None]).exp() @ v.to(scores.dtype)
        return out, lse

    def _backward_piece(self, do, q, k, v, o, lse, mask, is_causal, scale, softcap):
        with torch.autocast(q.device.type, enabled=False):
            scores = self._scores(q, k, mask, scale, softcap)
            p = (scores - lse[..., None]).exp()
            do, o, q, k, v = (tensor.to(p.dtype) for tensor in (do, o, q, k, v))
            ds = p * (do @ v.mT - (do * o).sum(-1, keepdim=True))
            if softcap is not None:
                ds = ds * (1 - (scores.masked_fill(p == 0, 0) / softcap).square())
            ds = ds * scale
            return ds @ k, ds.mT @ q, p.mT @ do
