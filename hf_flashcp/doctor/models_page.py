"""Every causal language model of the installed transformers, checked, as a page of the documentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from ..distributed.workers import WorkerPool
from .diagnosis import NOT_CHECKED, REFUSED, SUPPORTED, WHOLE_DOCUMENTS, Diagnosis, diagnose_model_type
from .gradients import LENGTHS, LIMIT
from .tiny import causal_language_models
from .tiny_sizes import WINDOW


COMMAND = "python -m hf_flashcp doctor --all-models --output docs/models.md"


def diagnose_all(
    pool: WorkerPool, model_types: Sequence[str] | None = None, on_done: Callable[[Diagnosis], Any] | None = None
) -> list[Diagnosis]:
    """A diagnosis of every model type, or of those given, in alphabetical order; `on_done` is called with each."""
    diagnoses = []
    for model_type in model_types or causal_language_models():
        diagnoses.append(diagnose_model_type(model_type, pool))
        if on_done is not None:
            on_done(diagnoses[-1])
    return diagnoses


def page(diagnoses: Sequence[Diagnosis]) -> str:
    """Markdown, for docs/models.md."""
    by_verdict = {verdict: [d for d in diagnoses if d.result == verdict] for verdict in _SECTIONS}
    lines = [
        "# Models",
        "",
        f"Made by `{COMMAND}` with transformers {transformers.__version__} and torch "
        f"{torch.__version__.partition('+')[0]}. It builds a tiny random copy of every causal language model (a layer "
        "of each kind, two at least), runs one step of documents of "
        f"{', '.join(map(str, LENGTHS))} tokens split over two processes, and compares its gradients with those of "
        "the documents run one at a time with transformers' eager attention, all in fp64. "
        f"Windows are {WINDOW} tokens. "
        f"A model is supported if no parameter's gradient differs by more than {LIMIT:.0e} (relative Frobenius norm; "
        "see `hf_flashcp.integrations.gradient_check.gradient_error`). Configs are transformers' "
        "defaults. Your own: [`python -m hf_flashcp doctor`](doctor_command.md).",
        "",
        "| | models |",
        "|---|---|",
        *(f"| {verdict} | {len(found)} |" for verdict, found in by_verdict.items()),
    ]
    for verdict, (heading, row) in _SECTIONS.items():
        if found := by_verdict[verdict]:
            lines += ["", f"## {heading}", "", *row(found)]
    return "\n".join(lines) + "\n"


def _supported(diagnoses: Sequence[Diagnosis]) -> list[str]:
    return [
        "| Model type | Class | Beyond plain causal attention | Difference |",
        "|---|---|---|---|",
        *(
            f"| {d.model_type} | {d.model_class} | {'; '.join([*features(d), *d.advice])} "
            f"| {max(d.gradient_error, d.loss_error):.0e} |"
            for d in diagnoses
        ),
    ]


def _with_reason(diagnoses: Sequence[Diagnosis]) -> list[str]:
    return [
        "| Model type | Class | Reason |",
        "|---|---|---|",
        *(f"| {d.model_type} | {d.model_class} | {_cell(d.reason)} |" for d in diagnoses),
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


_SECTIONS = {
    SUPPORTED: ("Supported", _supported),
    WHOLE_DOCUMENTS: ("Whole-document plans only", _supported),
    REFUSED: ("Refused", _with_reason),
    NOT_CHECKED: ("Not checked", _with_reason),
}


def features(diagnosis: Diagnosis) -> list[str]:
    """What a model asks for beyond causal attention and a sum over targets, in words."""
    layers = diagnosis.layers
    windows = sum(layer["window"] is not None for layer in layers)
    found = []
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
