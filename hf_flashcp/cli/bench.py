"""`flashcp bench`: measurements whose figures stand in docs/benchmarks.md."""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

from ..data.lengths import LENGTH_DISTRIBUTIONS
from ..plan import Topology
from ..planning import plan_documents
from .bench_gpu import add_gpu
from .bench_measured import add_measured
from .bench_options import add_corpora, check_at_least, show
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
    add_corpora(plan)
    plan.add_argument("--window", type=int, nargs="+", default=[65536, 131072, 262144, 524288], metavar="N")
    plan.add_argument("--cp-size", type=int, nargs="+", default=[4, 8, 16, 32], metavar="N")
    plan.add_argument("--packs", type=int, default=1, metavar="N", help="packs drawn in each cell (default 1)")
    plan.add_argument("--seed", type=int, default=0, metavar="N", help="of each cell's first pack (default 0)")
    plan.add_argument("--max-imbalance", type=float, default=1.05, metavar="R", help="attention pairs, max / mean")
    plan.add_argument(
        "--ranks-per-node",
        type=int,
        metavar="N",
        help="instead: traffic inside nodes and between them, of search without a topology and with one",
    )
    plan.add_argument("--json", action="store_true")
    plan.set_defaults(run=run_plan)

    predicted = benches.add_parser("predicted", help="predicted attention time of every strategy, over the ideal")
    add_corpora(predicted)
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

    nodes = benches.add_parser(
        "nodes", help="predicted steps on nodes: tokens that cross to each once, plans for nodes"
    )
    add_corpora(nodes)
    nodes.add_argument("--cp-size", type=int, nargs="+", default=[16, 32, 64], metavar="N", help="default: 16 32 64")
    nodes.add_argument("--tokens", type=int, default=8192, metavar="N", help="of each rank (default 8192)")
    nodes.add_argument("--packs", type=int, default=3, metavar="N", help="packs drawn in each cell (default 3)")
    nodes.add_argument("--json", action="store_true")
    nodes.set_defaults(run=run_nodes)

    published = benches.add_parser("published", help="predictions of rivals beside what the FlashCP paper measured")
    published.add_argument("--packs", type=int, default=20, metavar="N", help="packs drawn a corpus (default 20)")
    published.add_argument("--json", action="store_true")
    published.set_defaults(run=run_published)

    packing = benches.add_parser("packing", help="ways to pack documents: fill rate, and balance of groups")
    add_corpora(packing)
    packing.add_argument("--window", type=int, default=131072, metavar="N")
    packing.add_argument("--steps", type=int, default=32, metavar="N", help="optimizer steps to fill (default 32)")
    packing.add_argument("--cp-size", type=int, default=8, metavar="N")
    packing.add_argument("--dp-size", type=int, default=4, metavar="N", help="data-parallel groups (default 4)")
    packing.add_argument("--gradient-accumulation-steps", type=int, default=4, metavar="N", help="default 4")
    packing.add_argument("--look-ahead", type=int, default=16, metavar="N", help="in optimizer steps (default 16)")
    packing.add_argument("--json", action="store_true")
    packing.set_defaults(run=run_packing)

    add_measured(benches)
    add_gpu(benches)

    page = benches.add_parser("page", help="run the commands of docs/benchmarks.md again and write what they print")
    page.add_argument("page", nargs="?", type=Path, default=Path("docs/benchmarks.md"), metavar="FILE")
    page.add_argument(
        "--sections", nargs="+", default=[], metavar="TEXT", help="only those whose heading contains it (default: all)"
    )
    page.add_argument("--json", action="store_true")
    page.set_defaults(run=run_page)


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

    check_at_least(1, "--packs", arguments.packs)
    caps: dict[str, Any] = {"max_imbalance": arguments.max_imbalance}
    compared: dict[str, Any] = {}
    if arguments.ranks_per_node is None:
        compared["others"] = {"least total": functools.partial(plan_documents, **caps, minimize_total=True)}
    else:
        topology = Topology(arguments.ranks_per_node)
        planner = functools.partial(plan_documents, **caps, topology=topology)
        compared |= {"strategies": ["search"], "others": {"with topology": planner}, "topology": topology}
    found = measure(
        arguments.lengths_from,
        arguments.window,
        arguments.cp_size,
        arguments.packs,
        seed=arguments.seed,
        **caps,
        **compared,
        progress=True,
    )
    show(found, text, arguments.json)


def run_predicted(arguments: argparse.Namespace) -> None:
    from ..bench.predicted import measure, text
    from ..predict.model_shape import LLAMA_3_8B

    check_at_least(1, "--packs", arguments.packs)
    found = measure(
        arguments.lengths_from,
        arguments.window,
        arguments.cp_size,
        arguments.packs,
        config=read_config(arguments.model) if arguments.model else LLAMA_3_8B,
        hardware=arguments.hardware,
        progress=True,
    )
    show(found, text, arguments.json)


def run_nodes(arguments: argparse.Namespace) -> None:
    from ..bench.nodes import measure, text

    for name in ("tokens", "packs"):
        check_at_least(1, f"--{name}", getattr(arguments, name))
    found = measure(arguments.lengths_from, arguments.cp_size, arguments.tokens, arguments.packs, progress=True)
    show(found, text, arguments.json)


def run_published(arguments: argparse.Namespace) -> None:
    from ..bench.published import measure, text

    check_at_least(1, "--packs", arguments.packs)
    show(measure(arguments.packs, progress=True), text, arguments.json)


def run_packing(arguments: argparse.Namespace) -> None:
    from ..bench.packing import measure, text

    check_at_least(1, "--steps", arguments.steps)
    names = ("cp_size", "dp_size", "gradient_accumulation_steps", "look_ahead")
    found = measure(
        arguments.lengths_from,
        arguments.window,
        arguments.steps,
        **{name: getattr(arguments, name) for name in names},
        progress=True,
    )
    show(found, text, arguments.json)


def run_page(arguments: argparse.Namespace) -> None:
    from ..bench.page import text, update

    show(update(arguments.page, arguments.sections, progress=True), text, arguments.json)
