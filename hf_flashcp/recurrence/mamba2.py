"""Mamba-2 (arXiv 2405.21060) on slices of documents.

A head has a state S (N, P). With decay rate A < 0, time step dt, input x (P), and B and C (N) of each token:

    S <- exp(A dt) S + dt B x^T,  o = S^T C + D x

From a state S_in, token t of a slice outputs exp(A (dt_0 + ... + dt_t)) S_in^T C_t more than from a zero state, and
the slice multiplies S_in by the same factor of its last token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..errors import UnsupportedModelError
from ..layout import RankPlan, accumulate_dtype
from ..layout.state_layout import SliceGroup
from .halo import take_rows
from .package_kernels import takes
from .scan import Continued, run_scan
from .states import in_full_precision


def mamba2(
    kernel: Callable,
    plan: RankPlan,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    *,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_states: None = None,
    return_final_states: bool = False,
    z: None = None,
    seq_idx: Any = None,
    cu_seqlens: Any = None,
    **options: Any,
) -> torch.Tensor:
    """Call Mamba-2's kernel on this rank's slices of documents.

    The arguments after `plan` are those of transformers' `mamba2_chunk_scan`, with T_r tokens in a batch of 1:
    hidden_states (1, T_r, H, P), dt (1, T_r, H), A (H,), B and C (1, T_r, G, N). Returns the output (1, T_r, H, P).

    Source: transformers models/bamba/modeling_bamba.py, and mamba_chunk_scan_combined of mamba_ssm.
    """
    assert initial_states is None and not return_final_states  # a sharded forward has no cache
    if z is not None:
        raise UnsupportedModelError(
            "A Mamba-2 layer passes its gate (z) to the scan, where flashcp cannot correct outputs before they are "
            "gated. This model cannot be trained on plans that cut documents."
        )
    steps = {"dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
    scan = _Mamba2(kernel, (hidden_states, dt, B, C), A, steps, {"chunk_size": chunk_size, **options})
    return run_scan(scan, plan)[None]


class _Mamba2:
    def __init__(
        self,
        kernel: Callable,
        inputs: tuple[torch.Tensor, ...],
        rate: torch.Tensor,
        steps: dict[str, Any],
        options: dict[str, Any],
    ):
        self._kernel, self._inputs, self._rate, self._steps, self._options = kernel, inputs, rate, steps, options
        self._packs = takes(kernel, "seq_idx")
        hidden_states, _, B, _ = inputs
        self._heads, self._groups = hidden_states.shape[2], B.shape[2]
        self.decay_shape = (self._heads, 1, 1)
        self.state_shape = (self._heads, B.shape[3], hidden_states.shape[3])
        self.states_like = hidden_states.new_empty(0, dtype=accumulate_dtype(hidden_states.dtype))

    def whole(self, slices: SliceGroup) -> torch.Tensor:
        if self._packs and len(slices) > 1:
            device = self.states_like.device
            inputs = [take_rows(tensor[0], slices.rows(device))[None] for tensor in self._inputs]
            return self._call(inputs, seq_idx=slices.seq_idx(device))
        return torch.cat([self._call(inputs) for inputs in self._of_slices(slices)])

    def first(self, slices: SliceGroup) -> tuple[torch.Tensor, torch.Tensor]:
        last = [_run_again_in_backward(self._last_state, x, dt, B) for x, dt, B, _ in self._of_slices(slices)]
        return self.whole(slices), torch.stack(last)

    def continued(self, slices: SliceGroup) -> Continued:
        out, added = self.first(slices)
        inputs = list(self._of_slices(slices))
        decay = torch.stack([self._log_decays(dt).sum(0).exp() for _, dt, _, _ in inputs])[..., None, None]

        def read(states: torch.Tensor) -> torch.Tensor:
            each = zip(states, inputs)
            return torch.cat([_run_again_in_backward(self._read, state, dt, C) for state, (_, dt, _, C) in each])

        return Continued(out, decay, added, read)

    def _of_slices(self, slices: SliceGroup) -> Iterator[list[torch.Tensor]]:
        for each in slices.slices:
            yield [tensor.narrow(1, each.row, each.tokens) for tensor in self._inputs]

    def _call(self, inputs: list[torch.Tensor], **packing: torch.Tensor) -> torch.Tensor:
        hidden_states, dt, B, C = inputs
        return self._kernel(hidden_states, dt, self._rate, B, C, **self._steps, **self._options, **packing)[0]

    def _steps_of(self, dt: torch.Tensor) -> torch.Tensor:
        """Return the time steps of a slice as the kernel computes them, (tokens, H)."""
        bias, dtype, dt = self._steps["dt_bias"], self.states_like.dtype, dt[0]
        if self._packs:  # mamba_ssm computes them in fp32, and transformers in the dtype of dt
            dt = dt.to(dtype)
        if bias is not None:
            dt = dt + bias.to(dt.dtype)
        if self._steps["dt_softplus"]:
            dt = F.softplus(dt)
        return dt.clamp(*self._steps["dt_limit"]).to(dtype)

    def _log_decays(self, dt: torch.Tensor) -> torch.Tensor:
        """Return the logarithms of the factors by which a slice's tokens scale the state, (tokens, H)."""
        return self._rate.to(self.states_like.dtype) * self._steps_of(dt)

    def _last_state(self, hidden_states: torch.Tensor, dt: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """Return the state (H, N, P) with which a slice ends that begins with a zero state."""
        # Summed from the end: a long slice decays so far that differences of sums from its beginning lose digits.
        later = F.pad(self._log_decays(dt)[1:], (0, 0, 0, 1)).flip(0).cumsum(0).flip(0)
        weights = self._steps_of(dt) * later.exp()
        written = (hidden_states[0].to(weights.dtype) * weights[..., None]).unflatten(1, (self._groups, -1))
        return torch.einsum("tgn,tghp->ghnp", B[0].to(weights.dtype), written).flatten(0, 1)

    def _read(self, state: torch.Tensor, dt: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
        """Return what the outputs (tokens, H, P) of a slice owe to the state (H, N, P) with which it begins."""
        grouped = state.unflatten(0, (self._groups, -1))
        of_groups = torch.einsum("tgn,ghnp->tghp", C[0].to(state.dtype), grouped)
        return of_groups.flatten(1, 2) * self._log_decays(dt).cumsum(0).exp()[..., None]


def _run_again_in_backward(function: Callable, *inputs: torch.Tensor) -> torch.Tensor:
    """Call a function that would keep tensors (tokens, H, P) in fp32, and let it keep its inputs alone."""
    run = functools.partial(in_full_precision, function)
    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
