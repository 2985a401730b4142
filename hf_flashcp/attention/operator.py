"""The engine's forward as a PyTorch operator, and activation checkpointing that keeps its results.

Activation checkpointing discards a layer's activations and runs the layer again in backward, including its attention
and exchange. Selective checkpointing (`torch.utils.checkpoint.create_selective_checkpoint_contexts`) can keep the
results of chosen operators, but it only sees calls that go through PyTorch's dispatcher. Therefore forward is one
operator:

    flashcp::attention(query, key, value, sinks, engine) -> (out, lse, KV of each stage if it is kept)

An operator cannot take a Python object, so `engine` is the number of an [`Engine`] in a table that holds it for the
duration of the call.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from .engine import Engine


_LIBRARY = torch.library.Library("flashcp", "DEF")
_LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? sinks, int engine) -> (Tensor, Tensor, Tensor[])"
)
_engines: dict[int, Engine] = {}
_numbers = itertools.count()


@torch.library.impl(_LIBRARY, "attention", "CompositeExplicitAutograd")
def _attention(query, key, value, sinks, engine):
    return _engines[engine].forward(query, key, value, sinks)


def run_forward(
    engine: Engine, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Call [`Engine.forward`] through PyTorch's dispatcher."""
    number = next(_numbers)
    _engines[number] = engine
    try:
        return torch.ops.flashcp.attention(query, key, value, sinks, number)
    finally:
        del _engines[number]


class _SaveAttention(str):
    """A string that can be called. A plain function would fail when trackers write TrainingArguments as JSON."""

    def __call__(self) -> tuple[Any, Any]:
        return create_selective_checkpoint_contexts(_policy)


save_attention_context_fn = _SaveAttention("hf_flashcp.save_attention_context_fn")
"""Activation checkpointing that does not compute attention again in backward. Pass it as `context_fn`:

    TrainingArguments(
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": False, "context_fn": hf_flashcp.save_attention_context_fn},
    )

(Before transformers 5.24 the arguments are called `gradient_checkpointing` and `gradient_checkpointing_kwargs`.)

Backward runs a layer's projections, norms and MLP again, but not its attention and exchange, whose results are kept
from the first run. Per layer this takes H_q * D_v elements and 4 bytes per query head for each token of the rank
(output and logsumexp), and H_kv * (D_k + D_v) elements for each received token. If received KV is not kept (see
`keep_received_kv` of [`FlashCPPlugin`]), backward fetches it again, without computing attention again. Plain
activation checkpointing computes attention twice and exchanges three times instead of twice. With `offload`, the
layer's input moves to the host, while the results kept here stay on the device.
"""


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operator is torch.ops.flashcp.attention.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
