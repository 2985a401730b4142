"""Attention with the rounding that no fused kernel can avoid, as a yardstick for the errors of kernels."""

import torch

from tests.kernel_cases import SCALE


def rounded_formulas(inputs, rectangles, causal, window=None, whole=None):
    """Return out, logsumexp, dq, dk, dv in the inputs' dtype, from formulas in fp32.

    Tensor cores multiply 16-bit numbers and accumulate in fp32. So the inputs of a second product are rounded first:
    the probabilities and the gradients of the scores. The results are rounded as well: out, dq, dk and dv of each
    rectangle, dk and dv in every query head before grouped heads are summed. Scores, softmax and logsumexp are not.

    Args:
        whole: the merged out and logsumexp from which backward starts; defaults to those of the rectangles.
    """
    query, key, value, grad_out = inputs

    def rounded(tensor):
        return tensor.to(query.dtype).float()

    outs, lses = [], []
    grads = [torch.zeros(tensor.shape, device=tensor.device) for tensor in (query, key, value)]
    for q_start, q_stop, k_start, k_stop in rectangles:
        rows, keys = slice(q_start, q_stop), slice(k_start, k_stop)
        groups = query.shape[0] // key.shape[0]
        q, do = query[:, rows].float(), grad_out[:, rows].float()
        k, v = (tensor[:, keys].float().repeat_interleave(groups, 0) for tensor in (key, value))
        scores = q @ k.mT * SCALE
        if causal:
            ones = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device)
            last = k.shape[1] - q.shape[1]
            visible = ones.tril(last) if window is None else ones.tril(last).triu(last - window + 1)
            scores = scores.masked_fill(~visible, -torch.inf)
        out, lse = rounded(rounded(scores.softmax(-1)) @ v), scores.logsumexp(-1)
        outs.append(out)
        lses.append(lse)
        if whole is not None:
            out, lse = (tensor[:, rows].float() for tensor in whole)
        shares = (scores - lse[..., None]).exp()
        ds = rounded(shares * (do @ v.mT - (do * out).sum(-1, keepdim=True)))
        grads[0][:, rows] += rounded(ds @ k * SCALE)
        for grad, part in zip(grads[1:], (ds.mT @ q * SCALE, rounded(shares).mT @ do)):
            grad[:, keys] += rounded(rounded(part).unflatten(0, (-1, groups)).sum(1))
    return torch.cat(outs, 1), torch.cat(lses, 1), *grads
