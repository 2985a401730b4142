"""`flashcp plan`: how documents would be shared, what that costs, and a picture of it. Needs no torch."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from ..data.lengths import LENGTH_DISTRIBUTIONS, sample_pack
from ..errors import PlanError
from ..plan import ShardPlan, Topology
from ..planning import DEFAULT_STRATEGY, STRATEGIES, plan_documents
from ..predict import HARDWARE, CostModel, HardwareProfile, StepTime
from .model_config import read_config


MAX_LISTED_SLICES = 12
"""Slices of a rank up to which the table is followed by the slices themselves."""

_SLICES_A_LINE = 4


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="show how documents would be shared over ranks, and what that costs",
        description="Plans one packed batch and prints tokens, attention work and KV traffic of every rank.",
    )
    documents = parser.add_mutually_exclusive_group(required=True)
    documents.add_argument(
        "--lengths", type=comma_separated, metavar="N,N,...", help="tokens of each document, in packed order"
    )
    documents.add_argument(
        "--lengths-from",
        choices=LENGTH_DISTRIBUTIONS,
        metavar="CORPUS",
        help=f"draw documents like those of a corpus until the window is full: {', '.join(LENGTH_DISTRIBUTIONS)}",
    )
    parser.add_argument("--window", type=int, metavar="N", help="tokens of the packed row, with --lengths-from")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the draw, with --lengths-from (default 0)"
    )
    parser.add_argument("--cp-size", type=int, required=True, metavar="N", help="context-parallel ranks")
    parser.add_argument("--strategy", choices=STRATEGIES, default=DEFAULT_STRATEGY, help="default: %(default)s")
    parser.add_argument(
        "--max-imbalance", type=float, default=1.05, metavar="R", help="attention pairs, max / mean (default 1.05)"
    )
    parser.add_argument(
        "--max-token-imbalance", type=float, default=1.0, metavar="R", help="tokens, max / mean (default 1.0)"
    )
    parser.add_argument(
        "--sliding-window", type=int, metavar="W", help="also count what layers with a window of W keys cost"
    )
    parser.add_argument(
        "--ranks-per-node",
        type=int,
        metavar="N",
        help="ranks that share a node, to which KV crosses once: count apart what travels between nodes, and keep "
        "that little with the strategy search (default: the hardware's)",
    )
    parser.add_argument(
        "--hardware",
        metavar="NAME",
        help=f"predict step times, and plan for them with the strategy search: {', '.join(HARDWARE)}, or a JSON file",
    )
    parser.add_argument(
        "--model",
        metavar="CONFIG",
        help="with --hardware: a model's config.json, or a folder or hub name that has one",
    )
    parser.add_argument("--json", action="store_true", help="print plan, report and digest as JSON and nothing else")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw the plan to a file (.png, .svg, .pdf); needs the extra 'plot'"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Plans, draws if asked to, and prints.

    Raises:
        PlanError: documents or options that cannot be planned.
        FlashCPError: a plot that cannot be drawn or written.
    """
    if arguments.lengths is None and arguments.window is None:
        raise PlanError("--lengths-from needs --window: the tokens to draw documents for.")
    if arguments.lengths is not None and arguments.window is not None:
        raise PlanError("--window goes with --lengths-from: --lengths already says how long the row is.")
    lengths = arguments.lengths or sample_pack(arguments.lengths_from, arguments.window, seed=arguments.seed)
    if (arguments.hardware is None) != (arguments.model is None):
        raise PlanError("--hardware and --model go together: times depend on both.")
    given = topology = None if arguments.ranks_per_node is None else Topology(arguments.ranks_per_node)
    searched, cost_model = arguments.strategy == "search", None
    if arguments.hardware is not None:
        profile = HardwareProfile.load(arguments.hardware)
        topology = given or Topology(profile.ranks_per_node)
        profile = dataclasses.replace(profile, ranks_per_node=topology.ranks_per_node)
        cost_model = CostModel.from_config(read_config(arguments.model), profile)
    plan = plan_documents(
        lengths,
        arguments.cp_size,
        strategy=arguments.strategy,
        cost_model=cost_model if searched else None,
        topology=None if searched and cost_model is not None else given,
        max_imbalance=arguments.max_imbalance,
        max_token_imbalance=arguments.max_token_imbalance,
    )
    step_time = cost_model.step_time(plan) if cost_model else None
    if arguments.json:
        found = {
            "strategy": arguments.strategy,
            "digest": plan.digest,
            "plan": plan.to_dict(),
            "report": plan.report(topology=topology),
        }
        if step_time is not None:
            found["step_time"] = step_time.to_dict()
        if arguments.sliding_window is not None:
            found["sliding_window"] = arguments.sliding_window
            found["sliding_window_report"] = plan.report(arguments.sliding_window, topology)
        text = json_text(found)
    else:
        options = {"sliding_window": arguments.sliding_window, "step_time": step_time, "topology": topology}
        text = plan_text(plan, strategy=arguments.strategy, **options)
    if arguments.plot:
        from .plan_plot import plot_plan

        plot_plan(plan, arguments.plot, strategy=arguments.strategy)
        print(f"plot written to {arguments.plot}", file=sys.stderr)
    print(text)


def plan_text(
    plan: ShardPlan,
    *,
    strategy: str,
    sliding_window: int | None = None,
    step_time: StepTime | None = None,
    topology: Topology | None = None,
) -> str:
    """A table with one line a rank (counts of tokens, except for slices and pairs), then imbalances and traffic; where
    ranks lie in several nodes, also what travels between these."""
    if topology is not None and plan.cp_size <= topology.ranks_per_node:
        topology = None
    report = plan.report(topology=topology)
    shown = {"tokens": "tokens", "pairs": "attention pairs", "kv_received": "KV received", "kv_sent": "KV sent"}
    if topology is not None:
        shown |= {"inter_node_received": "from other nodes", "inter_node_sent": "to other nodes"}
    columns = [list(map(len, plan.slices)), *(report[key] for key in shown)]
    rows: list[tuple[str, ...]] = [("rank", "slices", *shown.values())]
    rows += [tuple(f"{value:,}" for value in row) for row in zip(range(plan.cp_size), *columns)]
    rows.append(("sum", *(f"{sum(column):,}" for column in columns)))
    lines = [
        f"{counted(len(plan.lengths), 'document')}, {counted(plan.num_tokens, 'token')}, "
        f"{counted(plan.cp_size, 'rank')}, strategy {strategy}",
        "",
        *_aligned(rows),
        "",
        f"imbalance (max / mean)  tokens {report['token_imbalance']:.3f}, "
        f"attention pairs {report['pair_imbalance']:.3f}",
        f"KV moved                {report['kv_total']:,} tokens of an all-gather's {report['kv_all_gather']:,} "
        f"({report['kv_fraction']:.1%})",
        *([] if topology is None else [_node_line(report, topology)]),
        *([] if sliding_window is None else _window_lines(plan, sliding_window)),
        *([] if step_time is None else _time_lines(step_time)),
        f"digest                  {plan.digest}",
    ]
    if max(columns[0]) <= MAX_LISTED_SLICES:
        lines += ["", *_listed_slices(plan)]
    return "\n".join(lines)


def _node_line(report: dict[str, Any], topology: Topology) -> str:
    inside, between = (sum(report[f"{link}_node_received"]) for link in ("intra", "inter"))
    return (
        f"  in nodes of {topology.ranks_per_node:<10}{inside:,} inside, {between:,} between "
        f"({between / max(inside + between, 1):.1%})"
    )


def _window_lines(plan: ShardPlan, window: int) -> list[str]:
    report = plan.report(window=window)
    return [
        f"with a window of {window:,}",
        f"  attention pairs       {sum(report['pairs']):,}, imbalance {report['pair_imbalance']:.3f}",
        f"  KV moved              {report['kv_total']:,} tokens ({report['kv_fraction']:.1%})",
    ]


def _time_lines(time: StepTime) -> list[str]:
    mean = time.attention.mean()
    return [
        f"predicted step          {1000 * time.seconds:,.1f} ms on the slowest rank",
        f"  attention             {1000 * time.attention_seconds:,.1f} ms with what it waits for, "
        f"{time.attention_seconds / mean:.3f} x the mean of its kernels",
        f"  transfer              {1000 * time.transfer.max():,.1f} ms on the wire, "
        f"{1000 * time.exposed.max():,.1f} ms of it not hidden by attention",
    ]


def _listed_slices(plan: ShardPlan) -> list[str]:
    named = [[f"doc {document} [{start}, {stop})" for document, start, stop in piece] for piece in plan.slices]
    width = max(len(name) for names in named for name in names)
    lines = []
    for rank, names in enumerate(named):
        for first in range(0, len(names), _SLICES_A_LINE):
            label = f"rank {rank}" if first == 0 else ""
            line = "  ".join(name.ljust(width) for name in names[first : first + _SLICES_A_LINE])
            lines.append(f"{label:<{len(f'rank {plan.cp_size - 1}')}}  {line}".rstrip())
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]


def json_text(found: Any) -> str:
    """JSON, with null for numbers that are not finite, which it does not have."""
    return json.dumps(json.loads(json.dumps(found), parse_constant=lambda name: None))


def counted(number: int, noun: str) -> str:
    """`1 document`, `2,000 documents`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def comma_separated(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of whole numbers separated by commas, such as 4096,1024,512"
        ) from None
