"""The engine's forward as an operator, and the checkpointing that keeps its result.

Activation checkpointing throws a layer's activations away and runs the layer again in backward, attention and exchange
included. Selective checkpointing (`torch.utils.checkpoint.create_selective_checkpoint_contexts`) can keep the results
of some operators instead, but sees only what goes through PyTorch's dispatcher. So forward is one operator:

    flashcp::attention(query, key, value, sinks, engine) -> (out, lse, keys of each stage if they are kept)

`engine` is the number of an [`Engine`] in a table, in which it is listed while the call lasts.
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
    """[`Engine.forward`] through the dispatcher."""
    number = next(_numbers)
    _engines[number] = engine
    try:
        return torch.ops.flashcp.attention(query, key, value, sinks, number)
    finally:
        del _engines[number]


class _SaveAttention(str):
    """A callable string, because trackers write TrainingArguments as JSON."""

    def __call__(self) -> tuple[Any, Any]:
        return create_selective_checkpoint_contexts(_policy)


save_attention_context_fn = _SaveAttention("hf_flashcp.save_attention_context_fn")
"""Activation checkpointing that does not attend twice: pass it as `context_fn`.

    TrainingArguments(
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": False, "context_fn": hf_flashcp.save_attention_context_fn},
    )

(Before transformers 5.24 the arguments are called `gradient_checkpointing` and `gradient_checkpointing_kwargs`.)

In backward a layer's projections, norms and MLP run again, its attention and exchange do not: their results are kept
from the first run. Per token and layer that costs H_q * D_v elements for the output and 4 bytes per query head for the
logsumexp, and H_kv * (D_k + D_v) elements per token received; where received KV is not kept (`keep_received_kv` of
[`attach`]) the last are fetched again in backward, without attending again. Under plain activation checkpointing a
layer attends twice and exchanges three times instead of two. With `offload` the layer's input goes to the host; what
is kept here stays on the device.
"""


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operator is torch.ops.flashcp.attention.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
