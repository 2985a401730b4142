"""`flashcp simulate`: a training step under every strategy and under other implementations, side by side. Needs no
torch."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from statistics import mean, median
from typing import Any

from tqdm import tqdm

from ..data.lengths import LENGTH_DISTRIBUTIONS, draw_pack, read_lengths, sample_pack
from ..errors import ConfigurationError, PlanError
from ..plan.lengths import MOST_TOKENS
from ..predict import HARDWARE, CostModel, HardwareProfile
from ..predict.model_shape import LLAMA_3_8B
from ..simulation.baselines import BASELINES, why_not
from ..simulation.simulate import NAMES, TIMED, check_ranks, simulate
from .estimate import GIB
from .model_config import add_checkpointing, read_config
from .plan import comma_separated, counted, json_text


REFERENCE = TIMED
"""What the others are compared with."""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "simulate",
        help="predict a training step under every strategy and under other implementations",
        description="Predicts time, traffic and memory of a training step on some hardware, for every strategy with "
        "this library's exchange and for other ways of context parallelism.",
    )
    documents = parser.add_mutually_exclusive_group(required=True)
    documents.add_argument(
        "--lengths", type=comma_separated, metavar="N,N,...", help="tokens of each document of one packed row"
    )
    documents.add_argument(
        "--lengths-from",
        choices=LENGTH_DISTRIBUTIONS,
        metavar="CORPUS",
        help=f"draw documents like those of a corpus: {', '.join(LENGTH_DISTRIBUTIONS)}",
    )
    documents.add_argument(
        "--lengths-file", metavar="FILE", help="draw from your own lengths: .jsonl, or whole numbers in a text file"
    )
    parser.add_argument(
        "--column", default="length", metavar="NAME", help="of a .jsonl file: tokens or their number (default length)"
    )
    parser.add_argument("--window", type=int, metavar="N", help="tokens of a packed row that is drawn")
    parser.add_argument("--packs", type=int, default=3, metavar="N", help="rows that are drawn (default 3)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first draw (default 0)")
    parser.add_argument(
        "--model",
        metavar="CONFIG",
        help="a model's config.json, or a folder or hub name that has one (default: Llama 3 8B's sizes)",
    )
    parser.add_argument("--cp-size", type=int, nargs="+", required=True, metavar="N", help="ranks, 2 to 256")
    parser.add_argument(
        "--hardware",
        nargs="+",
        default=["h100"],
        metavar="NAME",
        help=f"{', '.join(HARDWARE)}, or JSON files (default h100)",
    )
    parser.add_argument(
        "--ranks-per-node", type=int, metavar="N", help="instead of the profile's; 1: all KV crosses InfiniBand"
    )
    add_checkpointing(parser)
    parser.add_argument("--json", action="store_true", help="print everything as JSON and nothing else")
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="draw the parts of the steps to a file (.png, .svg, .pdf); needs the extra 'plot'",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Simulates, draws if asked to, and prints.

    Raises:
        PlanError: documents or options that cannot be planned.
        ConfigurationError: an unknown profile, a model without sizes, ranks that do not fill their nodes.
        FlashCPError: a plot that cannot be drawn or written.
    """
    packs = _packs(arguments)
    config = read_config(arguments.model) if arguments.model else LLAMA_3_8B
    profiles = {name: _profile(name, arguments.ranks_per_node) for name in arguments.hardware}
    for profile in profiles.values():
        for cp_size in arguments.cp_size:
            check_ranks(cp_size, profile.ranks_per_node)
    cells = []
    runs = len(profiles) * len(arguments.cp_size) * len(packs)
    with tqdm(total=runs * len(NAMES), leave=False, disable=None) as bar:
        for name, profile in profiles.items():
            model = CostModel.from_config(config, profile)
            for cp_size in arguments.cp_size:
                rows: dict[str, list[dict[str, Any]]] = {}
                for lengths in packs:
                    for scheme in NAMES:
                        options = {"names": (scheme,), "gradient_checkpointing": arguments.gradient_checkpointing}
                        for _, outcome in simulate(lengths, cp_size, config, model, **options).items():
                            rows.setdefault(scheme, []).append(outcome.to_dict())
                        bar.update()
                cells.append(_cell(name, profile, cp_size, rows, model))
    found = {
        "window": sum(packs[0]),
        "documents": [len(lengths) for lengths in packs],
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "cells": cells,
    }
    if arguments.plot:
        from .simulate_plot import plot_simulation

        plot_simulation(found, arguments.plot)
        print(f"plot written to {arguments.plot}", file=sys.stderr)
    if arguments.json:
        print(json_text(found))
    else:
        _print(found)


def _packs(arguments: argparse.Namespace) -> list[list[int]]:
    if arguments.lengths is not None:
        if arguments.window is not None:
            raise PlanError("--window is for rows that are drawn: --lengths already says how long the row is.")
        return [arguments.lengths]
    if arguments.window is None:
        raise PlanError("--lengths-from and --lengths-file need --window: the tokens to draw documents for.")
    if arguments.packs < 1:
        raise PlanError(f"--packs must be at least 1, got {arguments.packs}.")
    seeds = range(arguments.seed, arguments.seed + arguments.packs)
    if arguments.lengths_file is None:
        return [sample_pack(arguments.lengths_from, arguments.window, seed=seed) for seed in seeds]
    lengths = read_lengths(arguments.lengths_file, arguments.column)
    return [draw_pack(lengths, arguments.window, seed=seed) for seed in seeds]


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
    """Medians over packs, and how many times as long as with the reference a scheme takes: geometric means."""
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
            ratios = [one[part] / other[part] for one, other in zip(outcomes, rows[REFERENCE])]
            found[scheme][key] = math.exp(mean(map(math.log, ratios)))
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


def title(scheme: str) -> str:
    """Of a row or a bar."""
    return BASELINES[scheme].title if scheme in BASELINES else f"ours, {scheme}"


def _print(found: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    documents = sorted(found["documents"])
    drawn = (
        counted(documents[0], "document") if len(documents) == 1 else f"{documents[0]} to {documents[-1]} documents"
    )
    console.print(
        f"{counted(found['window'], 'token')} in {drawn}, {counted(len(documents), 'pack')}, gradient checkpointing "
        f"{found['gradient_checkpointing']}; medians, ratios are geometric means",
        soft_wrap=True,
    )
    for cell in found["cells"]:
        console.print(f"\n{cell['description']}", soft_wrap=True)
        console.print(
            f"cp_size {cell['cp_size']}, {counted(cell['ranks_per_node'], 'rank')} in a node", soft_wrap=True
        )
        table = Table(box=box.SIMPLE, pad_edge=False)
        table.add_column("ms, slowest rank", no_wrap=True)
        parts = ["linear", "attention", "copies", "exposed"]
        parts += [] if found["gradient_checkpointing"] == "none" else ["repeated"]
        for column in ("step", "/ ours", *parts, "attention\nmodule", "/ ours"):
            table.add_column(column, justify="right")
        for column in ("MFU", "GiB in\nnode", "GiB between\nnodes", "memory\nGiB"):
            table.add_column(column, justify="right")
        for scheme, row in cell["schemes"].items():
            if scheme == next(iter(BASELINES)):
                table.add_section()
            table.add_row(
                title(scheme),
                f"{1000 * row['step_seconds']:,.1f}",
                f"{row['over_reference']:.2f}",
                *(f"{1000 * row[f'{part}_seconds']:,.1f}" for part in parts),
                f"{1000 * row['attention_module_seconds']:,.1f}",
                f"{row['attention_over_reference']:.2f}",
                "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
                *(f"{row[key] / GIB:,.2f}" for key in ("intra_node_bytes", "inter_node_bytes")),
                f"{row['memory_bytes'] / GIB:,.1f}",
            )
        console.print(table)
        for scheme, reason in cell["left_out"].items():
            console.print(f"left out: {title(scheme)}: {reason}", soft_wrap=True)
