"""`flashcp doctor`: does a model train exactly, which kernels would its layers use, and what is refused?"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from ..errors import ConfigurationError
from ..planning import STRATEGIES
from ..tables import table
from .options import STRATEGY, add_json, add_number, load_config, show


MAX_PROCESSES = 4
"""Largest number of processes that the check starts; a larger cp_size runs the same code."""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check whether a model trains exactly",
        description="Trains a tiny random copy for one step, split over processes, and compares its gradients with "
        "those of each document run alone.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL_OR_CONFIG",
        help="a hub name, a config.json, a directory that has one, or a model type (checks its default config)",
    )
    add_number(parser, "--cp-size", 2, "context-parallel ranks", least=1)
    parser.add_argument("--strategy", choices=STRATEGIES, default="per_doc", help=STRATEGY)
    parser.add_argument(
        "--gpu",
        nargs="+",
        metavar="NAME",
        help="after the model: GPUs for which to name the kernels, for example h100 b200 (default: this machine's "
        "GPU, or, if it has none, a CPU and any GPU)",
    )
    parser.add_argument(
        "--all-models", action="store_true", help="check every causal language model of the installed transformers"
    )
    add_json(parser, "the findings")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check the models. Return 0 if the one model is supported, or after `--all-models`; else 1."""
    if arguments.all_models == (arguments.model is not None):
        raise ConfigurationError(
            "doctor takes one model (a name, a directory, a config.json or a type), or --all-models."
            + (" Write the model before --gpu." if arguments.gpu and not arguments.all_models else "")
        )
    if arguments.all_models and arguments.gpu:
        raise ConfigurationError("--gpu goes with one model: the list of all models names no kernels. Leave it out.")
    from transformers.utils import logging

    logging.set_verbosity_error()
    return _all_models(arguments) if arguments.all_models else _one_model(arguments)


def _one_model(arguments: argparse.Namespace) -> int:
    from ..distributed.workers import WorkerPool
    from ..doctor.diagnosis import SUPPORTED, WHOLE_ONLY, diagnose
    from ..doctor.layer_groups import devices_to_report, layer_groups

    devices = devices_to_report(arguments.gpu or ())
    config = load_config(arguments.model)
    processes = min(arguments.cp_size, MAX_PROCESSES)
    with WorkerPool() as pool:
        diagnosis = diagnose(config, pool, cp_size=processes, strategy=arguments.strategy)
    healthy = diagnosis.result in (SUPPORTED, WHOLE_ONLY) and not diagnosis.advice
    groups = layer_groups(config, diagnosis.layers, devices)
    found = {**asdict(diagnosis), "cp_size": arguments.cp_size, "processes": processes, "healthy": healthy}
    found["layers"] = groups
    show(
        found, lambda _: "\n".join(_report(diagnosis, groups, arguments.cp_size, processes)), arguments.json, indent=2
    )
    return 0 if healthy else 1


def _report(diagnosis, groups, cp_size: int, processes: int) -> list[str]:
    from ..doctor.gradients import LIMIT

    lines = [f"{diagnosis.model_class} ({diagnosis.model_type}), cp_size {cp_size}", ""]
    if groups:
        lines += _layers(groups)
    if diagnosis.mixer:
        lines.append(f"other layers: {diagnosis.mixer}")
    if diagnosis.gradient_error is not None:
        lines += [
            "",
            f"gradients of a tiny copy on {processes} processes, strategy {diagnosis.strategy}: relative difference "
            f"{diagnosis.gradient_error:.1e} (limit {LIMIT:.0e}); loss: {diagnosis.loss_error:.1e}"
            + (", router loss included" if diagnosis.router_loss else ""),
        ]
    lines += [f"to change: {advice}" for advice in diagnosis.advice]
    return [*lines, "", f"{diagnosis.result}{': ' + diagnosis.reason if diagnosis.reason else ''}"]


def _layers(groups: list[dict[str, Any]]) -> list[str]:
    """Return a table of the layers and their kernels on each device, then notes on these kernels."""
    from ..attention.kernels import TESTED

    sizes = {"heads": "heads", "KV": "kv_heads", "key": "key_dim", "value": "value_dim", "window": "window"}
    devices = {name: name.upper() if name.islower() else name for name in groups[0]["kernels"]}
    columns = {"layers": ",", "attention": "", **dict.fromkeys(sizes, ",")}
    columns |= {f"on {shown}": "" for shown in devices.values()}
    rows = []
    for group in groups:
        chosen = [group["kernels"][device]["kernel"] for device in devices]
        rows.append((group["layers"], group["kind"], *(group[name] for name in sizes.values()), *chosen))
    notes = []
    for device, shown in devices.items():
        kernels = [group["kernels"][device] for group in groups]
        statuses = dict.fromkeys((each["kernel"], each["status"]) for each in kernels if each["status"] != TESTED)
        device_notes = [*_rejected(kernels), *(f"{name} is {status}" for name, status in statuses)]
        notes += [f"{shown}: {note}" for note in device_notes]
    return [table(columns, rows), "", *notes]


def _rejected(groups: list[dict[str, Any]]) -> list[str]:
    """Return why kernels that come before the chosen one do not run, and how to install them if they could."""
    notes: dict[str, dict[str, None]] = {}  # for each kernel, each note once
    for kernels in groups:
        for name, reason in kernels["not"].items():
            install = kernels["faster"].get(name)
            note = f"not {name}, which {reason}" + (f"; it would be faster ({install})" if install else "")
            notes.setdefault(name, {})[note] = None
    return [note for each in notes.values() for note in each]


def _all_models(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..distributed.workers import WorkerPool
    from ..doctor.all_models import diagnose_all, text
    from ..doctor.tiny import causal_language_models

    with WorkerPool() as pool, tqdm(total=len(causal_language_models()), unit="model") as progress:

        def on_done(diagnosis):
            progress.set_postfix_str(diagnosis.model_type)
            progress.update()

        diagnoses = diagnose_all(pool, on_done=on_done)
    if arguments.json:
        print(json.dumps([asdict(each) for each in diagnoses], indent=2))
    else:
        print(text(diagnoses))
    return 0
