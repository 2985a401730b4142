"""Step "compile": compiled layers on two packs: the same gradients, breaks at attention only, no new graph."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from ...data import FlashCPCollator
from ...integrations.attach import attach
from ...integrations.gradient_check import gradient_error
from .settings import Found, Run, Settings


TOLERANCE = {torch.bfloat16: 5e-2, torch.float32: 1e-5}
"""Largest relative difference of a parameter's gradient from that of the layers that are not compiled."""

PACKS = ((300, 150, 31), (90, 420, 5, 64))


def compile(run: Run, settings: Settings) -> Found:
    return run(1, _compare)[0]


def _compare(settings: Settings) -> Found:
    device, found = settings.prepare(), Found()
    dtype = settings.sized(torch.bfloat16, torch.float32)
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (_model(settings).to(device, dtype) for _ in range(2))
    for layer in compiled.model.layers:
        layer.compile(backend=settings.sized("inductor", "eager"), dynamic=True)
    graphs = []
    for number, lengths in enumerate(PACKS):
        batch = _batch(lengths, device)
        for model in (plain, compiled):
            model.zero_grad()
            model(**batch).loss.backward()
        error = gradient_error(*({n: p.grad for n, p in model.named_parameters()} for model in (compiled, plain)))
        graphs.append(counters["stats"]["unique_graphs"])
        found.add("Compiled layers beside plain ones", {"pack": number + 1, "error": error, "graphs": graphs[-1]})
        found.require(error <= TOLERANCE[dtype], f"gradients of pack {number + 1} are off by {error:.1e}")
    found.require(graphs[-1] == graphs[0], f"the second pack made {graphs[-1] - graphs[0]} new graphs")
    places = {match.group(1) for reason in counters["graph_break"] if (match := re.search(r"function (\w+)", reason))}
    found.more["graph breaks"] = dict(counters["graph_break"])
    found.add("Graph breaks", *({"at": place} for place in sorted(places)))
    return found


def _model(settings: Settings) -> Any:
    torch.manual_seed(0)
    width = settings.sized(512, 128)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        head_dim=64,
    )
    config._attn_implementation = "flashcp"
    model = LlamaForCausalLM(config).train()
    attach(model, None)
    return model


def _batch(lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(len(lengths))
    batch = FlashCPCollator(1)(
        [{"input_ids": torch.randint(512, (n,), generator=generator).tolist()} for n in lengths]
    )
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
