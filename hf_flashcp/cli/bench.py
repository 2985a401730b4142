"""`flashcp bench`: measurements whose figures stand in docs/benchmarks.md."""

from __future__ import annotations

from pathlib import Path

from .bench_gpu import add_gpu
from .bench_measured import add_measured
from .bench_options import add_bench, add_corpora, add_corpus
from .options import add_hardware, add_model, add_number, read_config


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure traffic of strategies and costs of this library",
        description="Measures and prints tables, or JSON.",
    )
    benches = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    _add_plans(benches)
    add_measured(benches)
    add_gpu(benches)
    page = add_bench(benches, "page", "page", "run the commands of docs/benchmarks.md again and write what they print")
    page.add_argument("path", nargs="?", type=Path, default=Path("docs/benchmarks.md"), metavar="FILE")
    page.add_argument(
        "--sections", nargs="+", default=[], metavar="TEXT", help="only those whose heading contains it (default: all)"
    )


def _add_plans(benches) -> None:
    """The benchmarks that plan and predict; they run no attention."""
    table2 = add_bench(
        benches, "table2", "plans.table2", "traffic saved by each strategy, beside the FlashCP paper's Table 2"
    )
    add_corpus(table2)
    add_number(table2, "--window", 131072, "tokens of a pack")
    add_number(table2, "--cp-size", 4, "ranks")
    add_number(table2, "--packs", 100, "packs drawn", least=1)

    plan = add_bench(
        benches, "plan", "plans.plan_quality", "KV and planning time of every strategy, beside the lower bound"
    )
    add_corpora(plan)
    add_number(plan, "--window", [65536, 131072, 262144, 524288], "tokens of a pack", nargs="+", dest="windows")
    add_number(plan, "--cp-size", [4, 8, 16, 32], "ranks", nargs="+", dest="cp_sizes")
    add_number(plan, "--packs", 1, "packs drawn in each cell", least=1)
    add_number(plan, "--seed", 0, "of each cell's first pack")
    plan.add_argument("--max-imbalance", type=float, default=1.05, metavar="R", help="attention pairs, max / mean")
    add_number(
        plan,
        "--ranks-per-node",
        text="instead: traffic inside nodes and between them, of search without a topology and with one",
    )
    plan.set_defaults(least_total=True)

    predicted = add_bench(
        benches, "predicted", "plans.predicted", "predicted attention time of every strategy, over the ideal"
    )
    add_corpora(predicted)
    add_number(predicted, "--window", 131072, "tokens of a pack")
    add_number(predicted, "--cp-size", [8, 16], "ranks", nargs="+", dest="cp_sizes")
    add_number(predicted, "--packs", 3, "packs drawn in each cell", least=1)
    add_model(predicted, "(default: Llama 3 8B's sizes)")
    add_hardware(predicted, default="h100")
    predicted.set_defaults(read=read_config)

    nodes = add_bench(
        benches, "nodes", "plans.nodes", "predicted steps on nodes: tokens that cross to each once, plans for nodes"
    )
    add_corpora(nodes)
    add_number(nodes, "--cp-size", [16, 32, 64], "ranks", nargs="+", dest="cp_sizes")
    add_number(nodes, "--tokens", 8192, "tokens of each rank", least=1)
    add_number(nodes, "--packs", 3, "packs drawn in each cell", least=1)

    published = add_bench(
        benches, "published", "plans.published", "predictions of rivals beside what the FlashCP paper measured"
    )
    add_number(published, "--packs", 20, "packs drawn per corpus", least=1)

    packing = add_bench(
        benches, "packing", "plans.packing", "ways to pack documents: fill rate, and balance of groups"
    )
    add_corpora(packing)
    add_number(packing, "--window", 131072, "tokens of a pack")
    add_number(packing, "--steps", 32, "optimizer steps to fill", least=1)
    add_number(packing, "--cp-size", 8, "ranks")
    add_number(packing, "--dp-size", 4, "data-parallel groups")
    add_number(packing, "--gradient-accumulation-steps", 4)
    add_number(packing, "--look-ahead", 16, "in optimizer steps")
