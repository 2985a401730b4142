"""`flashcp bench`: measurements whose figures stand in docs/benchmarks.md."""

from __future__ import annotations

import argparse
import json

from ..data.lengths import LENGTH_DISTRIBUTIONS
from ..errors import PlanError
from .model_config import read_config


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure traffic of strategies and costs of this library",
        description="Measures and prints a table, or JSON.",
    )
    benches = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)

    table2 = benches.add_parser("table2", help="traffic saved by each strategy, beside the FlashCP paper's Table 2")
    table2.add_argument("--lengths-from", choices=LENGTH_DISTRIBUTIONS, default="pile", metavar="CORPUS")
    table2.add_argument("--window", type=int, default=131072, metavar="N")
    table2.add_argument("--cp-size", type=int, default=4, metavar="N")
    table2.add_argument("--packs", type=int, default=100, metavar="N", help="packs drawn (default 100)")
    table2.add_argument("--json", action="store_true")
    table2.set_defaults(run=run_table2)

    plan = benches.add_parser("plan", help="KV and planning time of every strategy, beside the lower bound")
    plan.add_argument(
        "--lengths-from",
        choices=LENGTH_DISTRIBUTIONS,
        nargs="+",
        default=list(LENGTH_DISTRIBUTIONS),
        metavar="CORPUS",
        help="default: all of them",
    )
    plan.add_argument("--window", type=int, nargs="+", default=[65536, 131072, 262144, 524288], metavar="N")
    plan.add_argument("--cp-size", type=int, nargs="+", default=[4, 8, 16, 32], metavar="N")
    plan.add_argument("--packs", type=int, default=1, metavar="N", help="packs drawn in each cell (default 1)")
    plan.add_argument("--max-imbalance", type=float, default=1.05, metavar="R", help="attention pairs, max / mean")
    plan.add_argument("--json", action="store_true")
    plan.set_defaults(run=run_plan)

    predicted = benches.add_parser("predicted", help="predicted attention time of every strategy, over the ideal")
    predicted.add_argument(
        "--lengths-from",
        choices=LENGTH_DISTRIBUTIONS,
        nargs="+",
        default=list(LENGTH_DISTRIBUTIONS),
        metavar="CORPUS",
        help="default: all of them",
    )
    predicted.add_argument("--window", type=int, default=131072, metavar="N")
    predicted.add_argument("--cp-size", type=int, nargs="+", default=[8, 16], metavar="N")
    predicted.add_argument("--packs", type=int, default=3, metavar="N", help="packs drawn in each cell (default 3)")
    predicted.add_argument(
        "--model",
        metavar="CONFIG",
        help="a model's config.json, or a folder or hub name that has one (default: Llama 3 8B's sizes)",
    )
    predicted.add_argument(
        "--hardware", default="h100", metavar="NAME", help="a hardware profile's name or file (default h100)"
    )
    predicted.add_argument("--json", action="store_true")
    predicted.set_defaults(run=run_predicted)

    agreement = benches.add_parser("agreement", help="cost of comparing plans between ranks at each step")
    agreement.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8], metavar="N")
    agreement.add_argument("--json", action="store_true")
    agreement.set_defaults(run=run_agreement)


def run_table2(arguments: argparse.Namespace) -> None:
    from ..bench.table2 import PAPER, measure

    found = measure(arguments.lengths_from, arguments.window, arguments.cp_size, arguments.packs)
    if arguments.json:
        print(json.dumps({**found, "paper": PAPER}, indent=2))
        return
    print(
        f"{found['packs']} packs of {found['window']:,} tokens like {found['corpus']} "
        f"({found['documents']:.0f} documents each), {found['cp_size']} ranks; means\n"
    )
    print(f"{'':18}{'traffic saved':>26}{'imbalance (max / mean)':>26}")
    print(f"{'strategy':18}{'eq. 5':>13}{'exact':>13}{'attention':>15}{'tokens':>11}{'plan ms':>10}")
    for strategy, row in found["strategies"].items():
        print(
            f"{strategy:18}{row['saved_eq5']:13.1%}{row['saved_exact']:13.1%}{row['pair_imbalance']:15.3f}"
            f"{row['token_imbalance']:11.3f}{row['plan_ms']:10.2f}"
        )
    for name, row in PAPER.items():
        print(f"{'paper: ' + name:18}{row['saved_eq5']:13.0%}{'':13}{row['pair_imbalance']:15.2f}")


def run_plan(arguments: argparse.Namespace) -> None:
    from ..bench.plan_quality import measure, text

    if arguments.packs < 1:
        raise PlanError(f"--packs must be at least 1, got {arguments.packs}.")
    found = measure(
        arguments.lengths_from,
        arguments.window,
        arguments.cp_size,
        arguments.packs,
        max_imbalance=arguments.max_imbalance,
        progress=True,
    )
    print(json.dumps(found, indent=2) if arguments.json else text(found))


def run_predicted(arguments: argparse.Namespace) -> None:
    from ..bench.predicted import LLAMA_3_8B, measure, text

    if arguments.packs < 1:
        raise PlanError(f"--packs must be at least 1, got {arguments.packs}.")
    found = measure(
        arguments.lengths_from,
        arguments.window,
        arguments.cp_size,
        arguments.packs,
        config=read_config(arguments.model) if arguments.model else LLAMA_3_8B,
        hardware=arguments.hardware,
        progress=True,
    )
    print(json.dumps(found, indent=2) if arguments.json else text(found))


def run_agreement(arguments: argparse.Namespace) -> None:
    from ..bench.agreement import measure

    found = measure(arguments.processes)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    print(f"comparing a plan's digest, {found['rounds']} rounds, slowest rank's median\n")
    for processes, milliseconds in found["milliseconds"].items():
        print(f"{processes:4} processes {milliseconds:8.3f} ms")
