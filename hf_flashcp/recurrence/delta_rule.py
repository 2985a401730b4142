"""The gated delta rule and Kimi delta attention (KDA) on slices of documents.

State S (K, V) of a head, with key k, value v, query q, decay a and write strength b of each token (arXiv 2412.06464;
KDA, arXiv 2510.26692, has a decay for each of the K rows):

    S <- (I - b k k^T) a S + b k v^T,  o = S^T q

The columns of S do not mix. So one call of the kernel that starts from [0 | I] and has values [v | 0] returns outputs
[O | R] and a last state [B | A]: from a state S_in the slice ends in A S_in + B, and its outputs are O + R S_in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..layout import RankPlan, accumulate_dtype
from ..layout.state_layout import SliceGroup
from .halo import take_rows
from .package_kernels import takes
from .scan import Continued, run_scan


def delta_rule(
    kernel: Callable,
    plan: RankPlan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: None = None,
    output_final_state: bool = False,
    cu_seqlens: Any = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Call a delta rule's kernel on this rank's slices of documents.

    The arguments after `plan` are those of transformers' `torch_chunk_gated_delta_rule` and
    `chunk_kimi_delta_attention`, with T_r tokens in a batch of 1. Returns the output (1, T_r, H, V), and `None` for
    the final state.

    Source: transformers models/qwen3_next/modeling_qwen3_next.py, models/kimi_linear/modeling_kimi_linear.py, and
    chunk_gated_delta_rule and chunk_kda of flash-linear-attention.
    """
    assert initial_state is None and not output_final_state  # a sharded forward has no cache
    return run_scan(_DeltaRule(kernel, (query, key, value, g, beta), options), plan)[None], None


class _DeltaRule:
    def __init__(self, kernel: Callable, inputs: tuple[torch.Tensor, ...], options: dict[str, Any]):
        self._kernel, self._inputs, self._options = kernel, inputs, options
        self._varlen = takes(kernel, "cu_seqlens")
        _, key, value, _, _ = inputs
        self._heads, self._key_dim, self._value_dim = value.shape[2], key.shape[3], value.shape[3]
        self.decay_shape = (self._heads, self._key_dim, self._key_dim)
        self.state_shape = (self._heads, self._key_dim, self._value_dim)
        self.states_like = value.new_empty(0, dtype=accumulate_dtype(value.dtype))

    def whole(self, slices: SliceGroup) -> torch.Tensor:
        return self._run(slices)[0]

    def first(self, slices: SliceGroup) -> tuple[torch.Tensor, torch.Tensor]:
        return self._run(slices, output_final_state=True)

    def continued(self, slices: SliceGroup) -> Continued:
        identity = torch.eye(self._key_dim, dtype=self.states_like.dtype, device=self.states_like.device)
        start = F.pad(identity, (self._value_dim, 0)).expand(len(slices), self._heads, -1, -1)
        both, last = self._run(slices, start, output_final_state=True)
        out, read = both.split([self._value_dim, self._key_dim], dim=-1)
        added, decay = last.split([self._value_dim, self._key_dim], dim=-1)

        def read_states(states: torch.Tensor) -> torch.Tensor:
            pairs = zip(read.split(slices.tokens), states.to(read.dtype))
            return torch.cat([torch.einsum("thk,hkv->thv", rows, state) for rows, state in pairs])

        return Continued(out, decay, added, read_states)

    def _run(
        self, slices: SliceGroup, start: torch.Tensor | None = None, output_final_state: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs (tokens, H, V) and last states (n, H, K, V), with V + K columns if there is a `start`."""
        if self._varlen and len(slices) > 1:
            device = self.states_like.device
            inputs = [take_rows(tensor[0], slices.rows(device))[None] for tensor in self._inputs]
            return self._call(inputs, start, output_final_state, cu_seqlens=slices.cu_seqlens(device))
        results = []
        for number, each in enumerate(slices.slices):
            inputs = [tensor.narrow(1, each.row, each.tokens) for tensor in self._inputs]
            of_slice = None if start is None else start[number : number + 1]
            results.append(self._call(inputs, of_slice, output_final_state))
        outs, lasts = zip(*results)
        return torch.cat(outs), torch.cat(lasts) if output_final_state else None

    def _call(
        self, inputs: list[torch.Tensor], start: torch.Tensor | None, output_final_state: bool, **packing: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, value, g, beta = inputs
        if start is not None:
            value = F.pad(value, (0, self._key_dim))
        states = {"initial_state": start, "output_final_state": output_final_state}
        out, last = self._kernel(query, key, value, g=g, beta=beta, **states, **packing, **self._options)
        return out[0], last.to(self.states_like.dtype) if output_final_state else None
