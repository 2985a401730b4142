"""Diagnosis of one model from its config or its model type."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers import PreTrainedConfig

from ..distributed.workers import WorkerPool
from ..integrations.models.hybrids import MIXERS
from .gradients import LIMIT, run_check
from .tiny import causal_language_models, default_config, tiny_copy


SUPPORTED, WHOLE_ONLY, REFUSED, NOT_CHECKED = "supported", "whole-document plans only", "refused", "not checked"

_NO_INTERFACE = "does not call its attention through transformers' attention interface"
_ATTENTION_DROPOUT = (
    "attention_dropout",
    "attn_dropout",
    "attn_pdrop",
    "attention_probs_dropout_prob",
    "attention_dropout_prob",
    "attention_dropout_rate",
)


@dataclass
class Diagnosis:
    """The doctor's findings about one model.

    Errors are relative and come from a tiny copy in fp64. `layers` describes each attention layer of that copy,
    `mixer` is the kind of its recurrent or convolutional layers, and `advice` lists what has to change in the config
    before training.
    """

    model_type: str
    model_class: str
    result: str
    reason: str = ""
    gradient_error: float | None = None
    loss_error: float | None = None
    strategy: str | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    mixer: str | None = None
    router_loss: bool = False
    advice: list[str] = field(default_factory=list)


def diagnose(
    config: PreTrainedConfig, pool: WorkerPool, *, cp_size: int = 2, strategy: str = "per_doc", timeout: float = 120.0
) -> Diagnosis:
    """Check a tiny copy of a model on `cp_size` CPU processes; no weights are needed.

    The check is abandoned after `timeout` seconds.
    """
    try:
        text_config = config.get_text_config()
    except ValueError as error:
        return Diagnosis(config.model_type, type(config).__name__, NOT_CHECKED, _one_line(error))
    classes = causal_language_models()
    model_type = text_config.model_type if text_config.model_type in classes else config.model_type
    model_class = classes.get(model_type)
    diagnosis = Diagnosis(model_type, model_class or type(config).__name__, NOT_CHECKED, advice=_advice(text_config))
    if model_class is None:
        diagnosis.reason = "transformers has no causal language model with this config"
        return diagnosis
    if not _may_be_supported(model_class, model_type):
        diagnosis.result, diagnosis.reason = REFUSED, _NO_INTERFACE
        return diagnosis
    try:
        tiny = tiny_copy(text_config)
    except Exception as error:  # configs validate themselves in many ways
        diagnosis.reason = f"no tiny copy could be made ({_one_line(error)})"
        return diagnosis
    mixer = MIXERS.get(tiny.model_type)
    diagnosis.mixer, whole = (mixer.kind, mixer.needs_whole_documents) if mixer else (None, False)
    diagnosis.strategy = "whole_doc" if whole else strategy
    found = run_check(pool, tiny, cp_size, diagnosis.strategy, timeout)
    diagnosis.layers, diagnosis.router_loss = found.get("layers", []), found.get("router_loss", False)
    diagnosis.gradient_error, diagnosis.loss_error = found.get("gradient_error"), found.get("loss_error")
    diagnosis.result, diagnosis.reason = _result(found)
    if whole and diagnosis.result == SUPPORTED:
        diagnosis.result = WHOLE_ONLY
    return diagnosis


def _may_be_supported(model_class: str, model_type: str) -> bool:
    supports_backend = getattr(getattr(transformers, model_class), "_supports_attention_backend", False)
    return supports_backend or model_type in MIXERS


def _result(found: dict[str, Any]) -> tuple[str, str]:
    if found["refused"]:
        return REFUSED, _one_line(found["error"].split(". ")[0].rstrip("."), limit=300)
    if found["stage"] == "done":
        worst = max(found["gradient_error"], found["loss_error"])
        if worst <= LIMIT:
            return SUPPORTED, ""
        return REFUSED, f"gradients differ by {worst:.0e} from those of documents run alone"
    if found["stage"] == "build" and "attn_implementation" in found["error"]:
        return REFUSED, f"does not build with flashcp ({_one_line(found['error'])})"
    if found["stage"] == "run":
        return REFUSED, f"fails when documents are split over ranks ({_one_line(found['error'])})"
    failures = {
        "build": "a tiny copy does not build",
        "attach": "attach() fails on a tiny copy",
        "reference": "a tiny copy does not run alone",
        "lost": "the check did not finish",
    }
    return NOT_CHECKED, f"{failures[found['stage']]} ({_one_line(found['error'])})"


def _advice(config: PreTrainedConfig) -> list[str]:
    return [
        f"set {name} to 0 (it is {getattr(config, name)}): attention dropout is refused in training"
        for name in _ATTENTION_DROPOUT
        if getattr(config, name, None)
    ]


def _one_line(error: Any, limit: int = 160) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def diagnose_model_type(model_type: str, pool: WorkerPool, **options: Any) -> Diagnosis:
    """Call [`diagnose`] with the default config of a model type."""
    model_class = causal_language_models()[model_type]
    try:
        config = default_config(model_type)
    except Exception as error:  # some default configs do not pass their own validation
        if not _may_be_supported(model_class, model_type):
            return Diagnosis(model_type, model_class, REFUSED, _NO_INTERFACE)
        reason = f"its default config does not build ({_one_line(error)})"
        return Diagnosis(model_type, model_class, NOT_CHECKED, reason)
    diagnosis = diagnose(config, pool, **options)
    diagnosis.model_type, diagnosis.model_class = model_type, model_class
    return diagnosis
