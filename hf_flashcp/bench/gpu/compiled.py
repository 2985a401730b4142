"""Step "compile": compiled layers must give the same gradients, and compile no new graph for a second pack."""

from __future__ import annotations

import re

import torch
from torch._dynamo.utils import counters

from ...integrations.attach import attach
from ...integrations.gradient_check import gradient_error
from .settings import Found, Settings
from .small_models import packed_batch, small_llama


TOLERANCE = {torch.bfloat16: 5e-2, torch.float32: 1e-5}
"""Largest relative difference between a parameter's gradients with and without compilation."""

PACKS = ((300, 150, 31), (90, 420, 5, 64))


def compile(settings: Settings) -> Found:
    """Train compiled and plain layers on two packs, and compare their gradients."""
    device, found = settings.prepare(), Found()
    dtype = settings.sized(torch.bfloat16, torch.float32)
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (small_llama(settings.sized(512, 128)).to(device, dtype) for _ in range(2))
    for model in (plain, compiled):
        attach(model, None)
    for layer in compiled.model.layers:
        layer.compile(backend=settings.sized("inductor", "eager"), dynamic=True)
    graphs = []
    for number, lengths in enumerate(PACKS):
        batch = packed_batch(lengths, device)
        for model in (plain, compiled):
            model.zero_grad()
            model(**batch).loss.backward()
        error = gradient_error(*({n: p.grad for n, p in model.named_parameters()} for model in (compiled, plain)))
        graphs.append(counters["stats"]["unique_graphs"])
        found.add(
            "Compiled layers compared with plain ones", {"pack": number + 1, "error": error, "graphs": graphs[-1]}
        )
        found.require(error <= TOLERANCE[dtype], f"gradients of pack {number + 1} are off by {error:.1e}")
    found.require(graphs[-1] == graphs[0], f"the second pack compiled {graphs[-1] - graphs[0]} new graphs")
    places = {match.group(1) for reason in counters["graph_break"] if (match := re.search(r"function (\w+)", reason))}
    found.more["graph breaks"] = dict(counters["graph_break"])
    found.add("Graph breaks", *({"at": place} for place in sorted(places)))
    return found
