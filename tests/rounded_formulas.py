"""Attention with the roundings that a fused kernel cannot avoid: what the errors of such kernels are measured by."""

import torch

from tests.kernel_cases import SCALE


def rounded_formulas(inputs, rectangles, causal, window=None, whole=None):
    """out, logsumexp, dq, dk, dv in the inputs' dtype, by formulas in fp32.

    Tensor cores multiply numbers of 16 bits and sum in fp32. So what enters a second product is rounded first, the
    softmax's shares and the gradients of the scores, and so are the results: out, dq, dk and dv of each rectangle, the
    last two in every query head before grouped heads are summed. Scores, their softmax and the logsumexp are not.

    Args:
        whole: the merged out and logsumexp that backward starts from; defaults to those of the rectangles.
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
