"""`flashcp doctor`: whether a model trains exactly, which kernels its layers would use, and what is refused."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..errors import ConfigurationError
from ..planning import STRATEGIES


MAX_PROCESSES = 4
"""Processes that the check starts at most; more ranks follow the same code."""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check whether a model trains exactly",
        description="Checks the gradient of a tiny random copy, split over processes, against each document alone.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL_OR_CONFIG",
        help="a hub name, a directory with a config.json, such a file, or a model type (its default config)",
    )
    parser.add_argument("--cp-size", type=int, default=2, metavar="N", help="context-parallel ranks (default 2)")
    parser.add_argument("--strategy", choices=STRATEGIES, default="per_doc", help="default: %(default)s")
    parser.add_argument(
        "--all-models", action="store_true", help="check every causal language model of the installed transformers"
    )
    parser.add_argument("--output", metavar="FILE", help="with --all-models: write the page there")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON and nothing else")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Returns 0 if the model is supported (always after `--all-models`), else 1.

    Raises:
        ConfigurationError: no model, or one that cannot be found.
    """
    if arguments.all_models == (arguments.model is not None):
        raise ConfigurationError(
            "doctor takes one model (a name, a directory, a config.json or a type), or --all-models."
        )
    if arguments.output and not arguments.all_models:
        raise ConfigurationError("--output goes with --all-models: the report of one model is printed.")
    if arguments.cp_size < 1:
        raise ConfigurationError(f"--cp-size must be at least 1, got {arguments.cp_size}.")
    from transformers.utils import logging

    logging.set_verbosity_error()
    return _all_models(arguments) if arguments.all_models else _one_model(arguments)


def _one_model(arguments: argparse.Namespace) -> int:
    from ..distributed.workers import WorkerPool
    from ..doctor.diagnosis import SUPPORTED, WHOLE_DOCUMENTS, diagnose
    from ..doctor.layer_groups import layer_groups

    config = load_config(arguments.model)
    processes = min(arguments.cp_size, MAX_PROCESSES)
    with WorkerPool() as pool:
        diagnosis = diagnose(config, pool, cp_size=processes, strategy=arguments.strategy)
    healthy = diagnosis.verdict in (SUPPORTED, WHOLE_DOCUMENTS) and not diagnosis.advice
    groups = layer_groups(config, diagnosis.layers)
    if arguments.json:
        found = {**diagnosis.to_dict(), "cp_size": arguments.cp_size, "processes": processes, "healthy": healthy}
        found["layers"] = groups
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(_report(diagnosis, groups, arguments.cp_size, processes)))
    return 0 if healthy else 1


def _report(diagnosis, groups, cp_size: int, processes: int) -> list[str]:
    from ..attention.kernels import TESTED
    from ..doctor.gradients import LIMIT

    lines = [f"{diagnosis.model_class} ({diagnosis.model_type}), cp_size {cp_size}", ""]
    if groups:
        rows = [("layers", "attention", "heads", "KV", "key", "value", "window", "on CPU", "on CUDA")]
        for group in groups:
            kernels = [group["kernels"][device]["kernel"] for device in ("cpu", "cuda")]
            sizes = [group[name] for name in ("heads", "kv_heads", "key_dim", "value_dim", "window")]
            rows.append((*(str("" if x is None else x) for x in (group["layers"], group["kind"], *sizes)), *kernels))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        reasons = {
            f"{device.upper()}: not {name}, which {reason}"
            for group in groups
            for device in ("cpu", "cuda")
            for name, reason in group["kernels"][device]["not"].items()
        }
        statuses = {
            f"{device.upper()}: {chosen['kernel']} is {chosen['status']}"
            for group in groups
            for device, chosen in group["kernels"].items()
            if chosen["status"] != TESTED
        }
        lines += ["", *sorted(reasons), *sorted(statuses)]
    if diagnosis.gradient_error is not None:
        lines += [
            "",
            f"gradients of a tiny copy on {processes} processes, strategy {diagnosis.strategy}: relative difference "
            f"{diagnosis.gradient_error:.1e} (limit {LIMIT:.0e}), of the loss {diagnosis.loss_error:.1e}"
            + (", router loss included" if diagnosis.router_loss else ""),
        ]
    lines += [f"to change: {advice}" for advice in diagnosis.advice]
    return [*lines, "", f"{diagnosis.verdict}{': ' + diagnosis.reason if diagnosis.reason else ''}"]


def load_config(name: str):
    """The config that a hub name, a directory, a file or a model type stands for.

    Raises:
        ConfigurationError: none of them.
    """
    from transformers import AutoConfig

    from ..doctor.tiny import causal_language_models, default_config

    try:
        if name in causal_language_models() and not Path(name).exists():
            return default_config(name)
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers and its validators raise a dozen kinds
        raise ConfigurationError(
            f"No usable config for {name!r}: pass a hub name, a directory with a config.json, such a file, or a model "
            f"type such as llama. transformers says: {' '.join(str(error).split())[:200]}"
        ) from None


def _all_models(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..distributed.workers import WorkerPool
    from ..doctor.models_page import diagnose_all, page
    from ..doctor.tiny import causal_language_models

    with WorkerPool() as pool, tqdm(total=len(causal_language_models()), unit="model") as progress:

        def on_done(diagnosis):
            progress.set_postfix_str(diagnosis.model_type)
            progress.update()

        diagnoses = diagnose_all(pool, on_done=on_done)
    text = json.dumps([d.to_dict() for d in diagnoses], indent=2) if arguments.json else page(diagnoses)
    if arguments.output:
        Path(arguments.output).write_text(text)
        print(f"written to {arguments.output}", file=sys.stderr)
    else:
        print(text, end="")
    return 0
