"""The engine's forward as a PyTorch operator.

Profilers, dispatch modes and PyTorch's selective checkpointing see one call per layer:

    flashcp::attention(query, key, value, sinks, engine) -> (out, lse, KV of each stage if it is kept)

An operator cannot take a Python object, so `engine` is the number of an [`Engine`] in a table that holds it for the
duration of the call.
"""

from __future__ import annotations

import itertools

import torch

from .checkpointing import Results, kept_or_computed
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
) -> Results:
    """Call [`Engine.forward`] through PyTorch's dispatcher, unless a checkpoint has kept its results."""

    def compute() -> Results:
        number = next(_numbers)
        _engines[number] = engine
        try:
            return torch.ops.flashcp.attention(query, key, value, sinks, number)
        finally:
            del _engines[number]

    return kept_or_computed(compute)
