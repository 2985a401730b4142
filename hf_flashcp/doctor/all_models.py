"""The doctor's findings about every causal language model of the installed transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..distributed.workers import WorkerPool
from ..tables import table
from .diagnosis import Diagnosis, diagnose_model_type
from .tiny import causal_language_models


def diagnose_all(
    pool: WorkerPool,
    model_types: Sequence[str] | None = None,
    on_done: Callable[[Diagnosis], Any] | None = None,
    timeout: float = 120.0,
) -> list[Diagnosis]:
    """Diagnose every model type, or those given, in alphabetical order.

    `on_done` is called with each diagnosis. A check is abandoned after `timeout` seconds.
    """
    diagnoses = []
    for model_type in model_types or causal_language_models():
        diagnoses.append(diagnose_model_type(model_type, pool, timeout=timeout))
        if on_done is not None:
            on_done(diagnoses[-1])
    return diagnoses


def text(diagnoses: Sequence[Diagnosis]) -> str:
    """Format diagnoses as a table with one row per model type."""
    columns = {"model type": "", "result": "", "difference": ".0e", "notes": ""}
    return table(
        columns,
        [(d.model_type, d.result, difference(d), d.reason or "; ".join([*features(d), *d.advice])) for d in diagnoses],
    )


def difference(diagnosis: Diagnosis) -> float | None:
    """The larger one of the differences of gradient and loss, or None if they were not computed."""
    if diagnosis.gradient_error is None or diagnosis.loss_error is None:
        return None
    return max(diagnosis.gradient_error, diagnosis.loss_error)


def features(diagnosis: Diagnosis) -> list[str]:
    """What a model needs beyond plain causal attention, in words."""
    layers = diagnosis.layers
    windows = sum(layer["window"] is not None for layer in layers)
    found = [diagnosis.mixer] if diagnosis.mixer else []
    if windows:
        found.append("sliding window" + ("" if windows == len(layers) else " in some layers"))
    found += [name for name in ("softcap", "sinks") if any(layer[name] for layer in layers)]
    if any(layer["value_dim"] != layer["key_dim"] for layer in layers):
        found.append("values narrower or wider than keys")
    if len({(layer["heads"], layer["kv_heads"], layer["key_dim"]) for layer in layers}) > 1:
        found.append("heads that differ by layer")
    if diagnosis.router_loss:
        found.append("router loss")
    return found
