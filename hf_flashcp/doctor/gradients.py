"""The gradient check: one step of a tiny copy with documents split over ranks, compared with each document alone."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..data import FlashCPCollator
from ..data.batch import shard_inputs
from ..data.boundaries import IGNORE_INDEX
from ..errors import FlashCPError
from ..integrations.attach import attach
from ..integrations.gradient_check import gradient_error, relative_error
from ..integrations.models.router_loss import FUNCTION
from ..integrations.registration import INTERNAL_NAME, NAME, layer_type
from ..planning import PlanSettings
from .float64 import float64_throughout
from .tiny import build


LENGTHS = (40, 3, 17, 1, 25)
"""Lengths of the checked documents in tokens.

Some are longer and some shorter than the tiny copy's sliding window and RoPE threshold; the one of 1 has no target.
"""

LIMIT = 1e-12
"""Largest relative gradient difference of a model that counts as exact, in fp64."""

GRADIENT_FLOOR = 1e-3
"""Lower bound on the denominator of a parameter's relative difference, as a share of the norm of all gradients."""

ROUTER_COEFFICIENT = 0.1
"""Weight of a mixture-of-experts model's router loss in the checked loss."""


def check_gradients(config: PreTrainedConfig, strategy: str = "per_doc") -> dict[str, Any]:
    """Compare the gradients of a tiny copy, split over ranks, with those of each document alone, on CPU.

    Every rank of a gloo group calls this function, with the config of a tiny copy.

    Returns the last `stage` that was reached ("build", "attach", "reference", "run" or "done"), the `error` that
    stopped the check there, and whether this library raised that error itself (`refused`). A finished check also has
    `gradient_error`, `loss_error`, `router_loss` and `layers`, which describes each attention layer.
    """
    found: dict[str, Any] = {"stage": "build", "error": None, "refused": False}
    try:
        with float64_throughout():
            _run_stages(config, strategy, found)
    except Exception as error:  # any error that a model raises is a finding
        found["error"] = f"{error}" if isinstance(error, FlashCPError) else f"{type(error).__name__}: {error}"
        found["refused"] = isinstance(error, FlashCPError)
    return found


def _run_stages(config: PreTrainedConfig, strategy: str, found: dict[str, Any]) -> None:
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("cp",)) if size > 1 else None
    model = build(config, NAME).eval()
    found["stage"] = "attach"
    attach(model, mesh)
    documents = _documents(config.get_text_config().vocab_size)
    found["stage"] = "reference"
    reference = build(config, "eager").eval()
    options = {"use_cache": False} | ({"output_router_logits": True} if _may_have_router_loss(reference) else {})
    outputs = [reference(input_ids=ids, **options) for ids, _ in documents]
    expected_loss = sum(_loss(output.logits, targets) for output, (_, targets) in zip(outputs, documents))
    has_router_loss = all(getattr(output, "router_logits", None) for output in outputs)
    if has_router_loss:
        expected_loss = expected_loss + ROUTER_COEFFICIENT * _router_loss(reference, outputs)
    expected_loss.backward()
    found["stage"] = "run"
    batch = FlashCPCollator(settings=PlanSettings(size, strategy))(
        [{"input_ids": ids[0].tolist()} for ids, _ in documents]
    )
    shard = shard_inputs(batch, mesh)
    targets = shard["shift_labels"]
    with _recorded_layers() as layers:
        inputs = {name: value for name, value in shard.items() if "labels" not in name}
        output = model(**inputs, **options)
        loss = _loss(output.logits, targets)
        if has_router_loss:
            loss = loss + ROUTER_COEFFICIENT * output.aux_loss / size
        loss.backward()
    total = _sum_over_ranks(loss.detach())
    found["gradient_error"] = gradient_error(
        _gradients(model, summed=True), _gradients(reference), floor=GRADIENT_FLOOR
    )
    found["loss_error"] = relative_error(total, expected_loss.detach())
    found["layers"], found["router_loss"] = layers, has_router_loss
    found["stage"] = "done"


def _documents(vocab_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the token ids (1, n) and targets (1, n) of each document."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, vocab_size, (1, length), generator=generator) for length in LENGTHS]
    return [(row, F.pad(row[:, 1:], (0, 1), value=IGNORE_INDEX)) for row in ids]


def _loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the summed negative log likelihood, divided by the number of targets of all documents."""
    count = sum(LENGTHS) - len(LENGTHS)
    flat = logits.double().flatten(0, -2)
    return F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum") / count


def _may_have_router_loss(model: PreTrainedModel) -> bool:
    takes_option = "output_router_logits" in inspect.signature(model.forward).parameters
    return takes_option and _router_function(model) is not None


def _router_function(model: PreTrainedModel) -> Callable | None:
    return getattr(sys.modules[type(model).__module__], FUNCTION, None)


def _router_loss(model: PreTrainedModel, outputs: Sequence[Any]) -> torch.Tensor:
    """Return transformers' router loss for the tokens of all documents together."""
    logits = tuple(torch.cat(layer) for layer in zip(*(output.router_logits for output in outputs)))
    return _router_function(model)(logits, model.num_experts, model.num_experts_per_tok)


def _gradients(model: PreTrainedModel, summed: bool = False) -> dict[str, torch.Tensor]:
    grads = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        grads[name] = _sum_over_ranks(grad.double()) if summed else grad.double()
    return grads


def _sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


@contextmanager
def _recorded_layers():
    """Record the shapes and options with which each attention layer is called, one entry per layer."""
    attention = ALL_ATTENTION_FUNCTIONS[INTERNAL_NAME]
    layers: dict[int, dict[str, Any]] = {}

    def record(module, query, key, value, *args, **kwargs):
        layers[id(module)] = {
            "layer": getattr(module, "layer_idx", None),
            "type": layer_type(module),
            "heads": query.shape[1],
            "kv_heads": key.shape[1],
            "key_dim": key.shape[-1],
            "value_dim": value.shape[-1],
            "window": kwargs.get("sliding_window"),
            "softcap": kwargs.get("softcap") is not None,
            "sinks": kwargs.get("s_aux") is not None,
        }
        return attention(module, query, key, value, *args, **kwargs)

    found: list[dict[str, Any]] = []
    ALL_ATTENTION_FUNCTIONS[INTERNAL_NAME] = record
    try:
        yield found
    finally:
        ALL_ATTENTION_FUNCTIONS[INTERNAL_NAME] = attention
        found += layers.values()


def run_check(pool, config: PreTrainedConfig, cp_size: int, strategy: str, timeout: float) -> dict[str, Any]:
    """Run [`check_gradients`] on `cp_size` workers of a pool.

    Returns the largest errors of all ranks, or the findings of a rank that did not finish. A worker that dies or does
    not answer is reported as stage "lost".
    """
    outcomes = pool.outcomes(cp_size, check_gradients, config, strategy, timeout=timeout)
    for completed, result, _ in outcomes:
        if not completed:
            return {"stage": "lost", "error": str(result).splitlines()[0], "refused": False}
    results: Sequence[dict[str, Any]] = [result for _, result, _ in outcomes]
    unfinished = [result for result in results if result["stage"] != "done"]
    if unfinished:
        return max(unfinished, key=lambda result: result["refused"])
    return {
        **results[0],
        "gradient_error": max(result["gradient_error"] for result in results),
        "loss_error": max(result["loss_error"] for result in results),
    }
