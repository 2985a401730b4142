"""`flashcp simulate`: predict a training step under every strategy and other implementations. Does not need torch."""

from __future__ import annotations

import argparse
import dataclasses
from statistics import geometric_mean, median
from typing import Any

from tqdm import tqdm

from ..errors import ConfigurationError
from ..plan.lengths import MOST_TOKENS
from ..predict import CostModel, HardwareProfile
from ..predict.model_shape import LLAMA_3_8B
from ..simulation.baselines import BASELINES, why_not
from ..simulation.simulate import NAMES, TIMED, check_ranks, simulate, title_of
from ..tables import counted, records_table
from . import options
from .plots import plot_simulation


REFERENCE = TIMED
"""The scheme with which all others are compared."""

PARTS = ("linear", "attention", "scan", "copies", "exposed", "repeated")


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "simulate",
        help="predict a training step under every strategy and under other implementations",
        description="Predicts the time, traffic and memory of a training step on the given hardware, for every "
        "strategy of this library and for other implementations of context parallelism.",
    )
    options.add_documents(parser).add_argument(
        "--lengths-file",
        metavar="FILE",
        help="draw from your own document lengths: a .jsonl file, or a text file of whole numbers",
    )
    parser.add_argument(
        "--column",
        default="length",
        metavar="NAME",
        help="column of a .jsonl file that has the tokens or their number (default length)",
    )
    options.add_number(parser, "--packs", 3, "number of rows to draw", least=1)
    options.add_model(parser, "(default: Llama 3 8B's sizes)")
    options.add_number(parser, "--cp-size", text="ranks, 2 to 256", nargs="+", required=True)
    options.add_hardware(parser, nargs="+", default=["h100"])
    options.add_number(
        parser,
        "--ranks-per-node",
        text="replaces the value of the hardware profile; with 1, all KV is sent between nodes",
    )
    options.add_checkpointing(parser)
    options.add_json(parser)
    options.add_plot(parser, "the parts of the steps")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Simulate, draw if asked to, and print."""
    packs = options.documents(arguments, arguments.packs)
    config = options.read_config(arguments.model) if arguments.model else LLAMA_3_8B
    profiles = {name: _profile(name, arguments.ranks_per_node) for name in arguments.hardware}
    for profile in profiles.values():
        for cp_size in arguments.cp_size:
            check_ranks(cp_size, profile.ranks_per_node)
    training = {"gradient_checkpointing": arguments.gradient_checkpointing}
    cells = []
    runs = len(profiles) * len(arguments.cp_size) * len(packs)
    with tqdm(total=runs * len(NAMES), leave=False, disable=None) as bar:
        for name, profile in profiles.items():
            model = CostModel.from_config(config, profile)
            for cp_size in arguments.cp_size:
                rows: dict[str, list[dict[str, Any]]] = {}
                for lengths in packs:
                    for scheme in NAMES:
                        for outcome in simulate(lengths, cp_size, config, model, names=(scheme,), **training).values():
                            rows.setdefault(scheme, []).append(outcome.to_dict())
                        bar.update()
                cells.append(_cell(name, profile, cp_size, rows, model))
    found = {"window": sum(packs[0]), "documents": [len(lengths) for lengths in packs], **training, "cells": cells}
    if arguments.plot:
        plot_simulation(found, arguments.plot)
    options.show(found, _text, arguments.json)


def _profile(name: str, ranks_per_node: int | None) -> HardwareProfile:
    profile = HardwareProfile.load(name)
    if ranks_per_node is None:
        return profile
    if not 1 <= ranks_per_node <= MOST_TOKENS:
        raise ConfigurationError(
            f"--ranks-per-node must be at least 1 and at most {MOST_TOKENS:,}, got {ranks_per_node}."
        )
    return dataclasses.replace(profile, ranks_per_node=ranks_per_node)


def _cell(name: str, profile: HardwareProfile, cp_size: int, rows, model: CostModel) -> dict[str, Any]:
    """Return medians over packs, and geometric means of each scheme's times relative to the reference's."""
    found = {}
    for scheme, outcomes in rows.items():
        found[scheme] = {
            key: None if value is None else median(outcome[key] for outcome in outcomes)
            for key, value in outcomes[0].items()
        }
        for key, part in (
            ("over_reference", "step_seconds"),
            ("attention_over_reference", "attention_module_seconds"),
        ):
            found[scheme][key] = geometric_mean(
                one[part] / other[part] for one, other in zip(outcomes, rows[REFERENCE])
            )
    left_out = {scheme: reason for scheme in BASELINES if (reason := why_not(scheme, model, cp_size))}
    return {
        "hardware": name,
        "description": profile.description,
        "ranks_per_node": profile.ranks_per_node,
        "cp_size": cp_size,
        "reference": REFERENCE,
        "schemes": found,
        "left_out": left_out,
    }


def _text(found: dict[str, Any]) -> str:
    numbers = sorted(found["documents"])
    drawn = counted(numbers[0], "document") if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]} documents"
    lines = [
        f"{counted(found['window'], 'token')} in {drawn}, {counted(len(numbers), 'pack')}, gradient checkpointing "
        f"{found['gradient_checkpointing']}; medians, ratios are geometric means"
    ]
    rows_of_cells = [row for cell in found["cells"] for row in cell["schemes"].values()]
    parts = [part for part in PARTS if part != "scan" or any(row["scan_seconds"] for row in rows_of_cells)]
    if found["gradient_checkpointing"] == "none":
        parts.remove("repeated")
    columns = {
        "title": ("ms, slowest rank", ""),
        "step_seconds": ("step", "ms:,.1f"),
        "over_reference": ("step\n/ ours", ".2f"),
        **{f"{part}_seconds": (part, "ms:,.1f") for part in parts},
        "attention_module_seconds": ("attention\nmodule", "ms:,.1f"),
        "attention_over_reference": ("module\n/ ours", ".2f"),
        "mfu": ("MFU", ".1%"),
        "intra_node_bytes": ("GiB in\nnode", "GiB:,.2f"),
        "inter_node_bytes": ("GiB between\nnodes", "GiB:,.2f"),
        "memory_bytes": ("memory\nGiB", "GiB:,.1f"),
    }
    for cell in found["cells"]:
        rows = {name: {"title": title_of(name), **row} for name, row in cell["schemes"].items()}
        ours, others = ([row for name, row in rows.items() if (name in BASELINES) == rival] for rival in (False, True))
        lines += [
            "",
            cell["description"],
            f"cp_size {cell['cp_size']}, {counted(cell['ranks_per_node'], 'rank')} per node",
            "",
            records_table(columns, [*ours, {}, *others] if others else ours),
            "",
            *(f"left out: {title_of(scheme)}: {reason}" for scheme, reason in cell["left_out"].items()),
        ]
    return "\n".join(lines)
