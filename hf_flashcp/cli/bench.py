"""`flashcp bench`: measurements whose figures stand in docs/benchmarks.md."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from typing import Any

from ..data.lengths import LENGTH_DISTRIBUTIONS, sample_pack
from ..errors import ConfigurationError, PlanError
from ..planning import STRATEGIES, Topology, plan_documents
from .doctor import load_config
from .model_config import read_config
from .plan import comma_separated
from .plots import require_matplotlib


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
    _add_corpora(plan)
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
    _add_corpora(predicted)
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
    _add_corpora(nodes)
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
    _add_corpora(packing)
    packing.add_argument("--window", type=int, default=131072, metavar="N")
    packing.add_argument("--steps", type=int, default=32, metavar="N", help="optimizer steps to fill (default 32)")
    packing.add_argument("--cp-size", type=int, default=8, metavar="N")
    packing.add_argument("--dp-size", type=int, default=4, metavar="N", help="data-parallel groups (default 4)")
    packing.add_argument("--gradient-accumulation-steps", type=int, default=4, metavar="N", help="default 4")
    packing.add_argument("--look-ahead", type=int, default=16, metavar="N", help="in optimizer steps (default 16)")
    packing.add_argument("--json", action="store_true")
    packing.set_defaults(run=run_packing)

    attention = benches.add_parser("attention", help="time of one attention layer under each strategy, over the ideal")
    attention.add_argument(
        "--lengths",
        type=comma_separated,
        default=[4096, 1024, 1024, 512, 512, 512, 256, 256],
        metavar="N,N,...",
        help="tokens of each document (default 4096,1024,1024,512,512,512,256,256)",
    )
    attention.add_argument("--cp-size", type=int, default=2, metavar="N", help="processes (default 2)")
    _add_layer(attention)
    attention.add_argument(
        "--exchange", choices=("needed", "all"), nargs="+", default=["needed", "all"], help="default: both"
    )
    attention.add_argument("--max-imbalance", type=float, default=1.05, metavar="R", help="default 1.05")
    attention.add_argument("--rounds", type=int, default=10, metavar="N", help="turns of every case (default 10)")
    attention.add_argument("--json", action="store_true")
    attention.set_defaults(run=run_attention)

    kernels = benches.add_parser("kernels", help="each rank's kernels and copies under a plan, against one call")
    kernels.add_argument(
        "--lengths-from", choices=LENGTH_DISTRIBUTIONS, default="pile", metavar="CORPUS", help="default: pile"
    )
    kernels.add_argument("--window", type=int, default=131072, metavar="N", help="tokens of the pack (default 131072)")
    kernels.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw (default 0)")
    kernels.add_argument("--cp-size", type=int, default=8, metavar="N", help="ranks (default 8)")
    kernels.add_argument("--device", default="cpu", metavar="NAME", help="cpu (default) or cuda")
    _add_layer(kernels)
    kernels.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of every run (default 5)")
    kernels.add_argument("--json", action="store_true")
    kernels.set_defaults(run=run_kernels)

    _add_step(benches)

    memory = benches.add_parser("memory", help="estimated memory of small training steps, beside the measured")
    memory.add_argument("--json", action="store_true")
    memory.set_defaults(run=run_memory)

    agreement = benches.add_parser("agreement", help="cost of comparing plans between ranks at each step")
    agreement.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8], metavar="N")
    agreement.add_argument("--json", action="store_true")
    agreement.set_defaults(run=run_agreement)


def _add_step(benches) -> None:
    step = benches.add_parser("step", help="time, parts and memory of a whole training step, over the ideal")
    _add_corpora(step)
    step.add_argument("--window", type=int, default=4096, metavar="N", help="tokens of a pack (default 4096)")
    step.add_argument("--cp-size", type=int, default=2, metavar="N", help="processes, or GPUs (default 2)")
    step.add_argument(
        "--model",
        metavar="CONFIG",
        help="what is trained, from random weights: a model's config.json, or a folder or hub name that has one "
        "(default: two layers like Qwen3's)",
    )
    strategies = [name for name in STRATEGIES if name != "whole_doc"]
    step.add_argument(
        "--strategies",
        choices=STRATEGIES,
        nargs="+",
        default=strategies,
        metavar="NAME",
        help=f"default: {' '.join(strategies)}",
    )
    step.add_argument(
        "--exchange",
        choices=("needed", "staged", "all"),
        nargs="+",
        default=["needed", "staged", "all"],
        help="what is needed, in one stage or in cp_size - 1 (the same on 2 ranks), or all KV; default: each of them",
    )
    step.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of weights (default fp32)")
    step.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu (default) or cuda")
    step.add_argument("--threads", type=int, default=1, metavar="N", help="of each process (default 1)")
    step.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of every case (default 5)")
    step.add_argument(
        "--plot",
        metavar="FILE",
        help="draw one layer on the first two ranks (the first corpus, the last strategy, the first exchange) to a "
        "file (.png, .svg, .pdf); on CPU; needs the extra 'plot'",
    )
    step.add_argument("--json", action="store_true")
    step.set_defaults(run=run_step)


def _add_corpora(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths-from",
        choices=LENGTH_DISTRIBUTIONS,
        nargs="+",
        default=list(LENGTH_DISTRIBUTIONS),
        metavar="CORPUS",
        help="default: all of them",
    )


def _add_layer(parser: argparse.ArgumentParser) -> None:
    """The layer that is measured, and the plans it runs under."""
    parser.add_argument("--heads", type=int, default=32, metavar="N", help="query heads (default 32)")
    parser.add_argument("--kv-heads", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument("--head-dim", type=int, default=128, metavar="N", help="default 128")
    parser.add_argument("--dtype", choices=("bf16", "fp32", "fp64"), default="bf16", help="default bf16")
    parser.add_argument(
        "--strategies",
        choices=STRATEGIES,
        nargs="+",
        default=["per_doc", "flashcp", "search"],
        metavar="NAME",
        help="default: per_doc flashcp search",
    )
    parser.add_argument("--stages", type=int, metavar="N", help="in which KV travels (default 1)")


def _layer(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `_add_layer` reads, and the rounds, as benchmarks take them."""
    names = ("heads", "kv_heads", "head_dim", "dtype", "strategies", "rounds")
    return {**{name: getattr(arguments, name) for name in names}, "num_stages": arguments.stages}


def _check_at_least(least: int, option: str, value: int) -> None:
    if value < least:
        raise PlanError(f"{option} must be at least {least}, got {value}.")


def _show(found: dict[str, Any], text: Callable[[dict[str, Any]], str], as_json: bool) -> None:
    print(json.dumps(found, indent=2) if as_json else text(found))


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

    _check_at_least(1, "--packs", arguments.packs)
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
    _show(found, text, arguments.json)


def run_predicted(arguments: argparse.Namespace) -> None:
    from ..bench.predicted import measure, text
    from ..planning.model_shape import LLAMA_3_8B

    _check_at_least(1, "--packs", arguments.packs)
    found = measure(
        arguments.lengths_from,
        arguments.window,
        arguments.cp_size,
        arguments.packs,
        config=read_config(arguments.model) if arguments.model else LLAMA_3_8B,
        hardware=arguments.hardware,
        progress=True,
    )
    _show(found, text, arguments.json)


def run_nodes(arguments: argparse.Namespace) -> None:
    from ..bench.nodes import measure, text

    for name in ("tokens", "packs"):
        _check_at_least(1, f"--{name}", getattr(arguments, name))
    found = measure(arguments.lengths_from, arguments.cp_size, arguments.tokens, arguments.packs, progress=True)
    _show(found, text, arguments.json)


def run_published(arguments: argparse.Namespace) -> None:
    from ..bench.published import measure, text

    _check_at_least(1, "--packs", arguments.packs)
    _show(measure(arguments.packs, progress=True), text, arguments.json)


def run_packing(arguments: argparse.Namespace) -> None:
    from ..bench.packing import measure, text

    _check_at_least(1, "--steps", arguments.steps)
    names = ("cp_size", "dp_size", "gradient_accumulation_steps", "look_ahead")
    found = measure(
        arguments.lengths_from,
        arguments.window,
        arguments.steps,
        **{name: getattr(arguments, name) for name in names},
        progress=True,
    )
    _show(found, text, arguments.json)


def run_attention(arguments: argparse.Namespace) -> None:
    from ..bench.attention import measure, text

    _check_at_least(1, "--rounds", arguments.rounds)
    found = measure(
        arguments.lengths,
        arguments.cp_size,
        **_layer(arguments),
        exchanges=arguments.exchange,
        max_imbalance=arguments.max_imbalance,
    )
    _show(found, text, arguments.json)


def run_kernels(arguments: argparse.Namespace) -> None:
    from ..bench.kernels import measure, text

    _check_at_least(1, "--rounds", arguments.rounds)
    found = measure(
        sample_pack(arguments.lengths_from, arguments.window, seed=arguments.seed),
        arguments.cp_size,
        **_layer(arguments),
        device=arguments.device,
    )
    _show(found, text, arguments.json)


def run_step(arguments: argparse.Namespace) -> None:
    if arguments.plot:
        require_matplotlib()
    for least, name in ((1, "rounds"), (1, "threads"), (2, "cp_size")):
        _check_at_least(least, f"--{name.replace('_', '-')}", getattr(arguments, name))
    if arguments.plot and arguments.device == "cuda":
        raise ConfigurationError("--plot draws a step on CPU: leave out --device cuda, or look at a profiler's trace.")
    from ..bench.step import QWEN3, measure, text

    found = measure(
        arguments.lengths_from,
        arguments.window,
        arguments.cp_size,
        config=load_config(arguments.model).to_dict() if arguments.model else QWEN3,
        exchanges=arguments.exchange,
        **{name: getattr(arguments, name) for name in ("strategies", "dtype", "device", "threads", "rounds")},
        progress=True,
    )
    _show(found, text, arguments.json)
    if arguments.plot:
        from .layer_plot import plot_layer

        plot_layer(found, arguments.plot)
        print(f"plot written to {arguments.plot}", file=sys.stderr)


def run_memory(arguments: argparse.Namespace) -> None:
    from ..bench.memory import measure, text

    _show(measure(), text, arguments.json)


def run_agreement(arguments: argparse.Namespace) -> None:
    from ..bench.agreement import measure

    found = measure(arguments.processes)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    print(f"comparing a plan's digest, {found['rounds']} rounds, slowest rank's median\n")
    for processes, milliseconds in found["milliseconds"].items():
        print(f"{processes:4} processes {milliseconds:8.3f} ms")
