"""`flashcp bench`: the measurements behind the figures in docs/benchmarks.md.

A benchmark is a module of `hf_flashcp.bench` with two functions: `measure` takes the command's options as keyword
arguments and returns plain data, and `text` formats that data as tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ..data.lengths import LENGTH_DISTRIBUTIONS, sample_pack
from ..errors import ConfigurationError
from ..planning import STRATEGIES
from ..simulation.simulate import TIMED
from . import options
from .bench_gpu import add_gpu
from .plots import plot_layer, require_matplotlib


LENGTHS = [4096, 1024, 1024, 512, 512, 512, 256, 256]
_NOT_MEASURED = ("run", "module", "json", "read", "output", "plot")


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure this library: traffic, kernels, whole steps, memory, packing",
        description="Runs one benchmark and prints its tables, or JSON.",
    )
    benches = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    _add_plans(benches)
    _add_layout(benches)
    _add_layers(benches)
    _add_step(benches)
    _add_rows(benches)
    _add_calibrate(benches)
    _add(benches, "memory", "estimated and measured memory of small training steps")
    agreement = _add(benches, "agreement", "time that ranks take to compare their plans in each step")
    options.add_number(agreement, "--processes", [2, 4, 8], "numbers of processes", nargs="+", dest="world_sizes")
    add_gpu(benches)


def _add(benches, name: str, text: str, module: str = "") -> argparse.ArgumentParser:
    """Add the benchmark in a module of `hf_flashcp.bench`, and return its parser for further options."""
    parser = benches.add_parser(name, help=text)
    options.add_json(parser)
    parser.set_defaults(run=_run, module=module or name)
    return parser


def _run(arguments: argparse.Namespace) -> None:
    _measure(arguments)


def _measure(arguments: argparse.Namespace, without: Sequence[str] = (), **more: Any) -> Any:
    """Measure, print the result and return it.

    `without` names options that are not passed to `measure`, and `more` has arguments that replace them.
    """
    module = import_module(f"hf_flashcp.bench.{arguments.module}")
    given = {name: value for name, value in vars(arguments).items() if name not in (*_NOT_MEASURED, *without)}
    model = given.pop("model", None)
    if model is not None:
        given["config"] = arguments.read(model)
    found = module.measure(**given, **more)
    options.show(found, module.text, arguments.json, indent=2)
    return found


def _add_plans(benches) -> None:
    """Add the benchmarks that plan and predict but run no attention."""
    text = "traffic that each strategy saves, compared with Table 2 of the FlashCP paper"
    table2 = _add(benches, "table2", text, "plans.table2")
    _add_corpus(table2)
    options.add_number(table2, "--window", 131072, "tokens per pack")
    options.add_number(table2, "--cp-size", 4, "ranks")
    options.add_number(table2, "--packs", 100, "number of packs to draw", least=1)

    text = "KV traffic and planning time of every strategy, and the lower bound"
    plan = _add(benches, "plan", text, "plans.plan_quality")
    _add_corpora(plan)
    options.add_number(plan, "--window", [65536, 131072, 262144, 524288], "tokens per pack", nargs="+", dest="windows")
    options.add_number(plan, "--cp-size", [4, 8, 16, 32], "ranks", nargs="+", dest="cp_sizes")
    options.add_number(plan, "--packs", 1, "packs to draw per cell", least=1)
    options.add_number(plan, "--seed", 0, "random seed of the first pack in each cell")
    plan.add_argument(
        "--max-imbalance",
        type=float,
        default=1.05,
        metavar="R",
        help="cap on attention pairs per rank, max / mean (default 1.05)",
    )
    text = "instead compare traffic within and between nodes, for search with and without a topology"
    options.add_number(plan, "--ranks-per-node", text=text)
    plan.set_defaults(least_total=True)

    text = "predicted attention time of every strategy, relative to the ideal"
    predicted = _add(benches, "predicted", text, "plans.predicted")
    _add_corpora(predicted)
    options.add_number(predicted, "--window", 131072, "tokens per pack")
    options.add_number(predicted, "--cp-size", [8, 16], "ranks", nargs="+", dest="cp_sizes")
    options.add_number(predicted, "--packs", 3, "packs to draw per cell", least=1)
    options.add_model(predicted, "(default: Llama 3 8B's sizes)")
    options.add_hardware(predicted, default="h100")
    predicted.set_defaults(read=options.read_config)

    text = "predicted steps on several nodes: KV sent to each node once, plans that know the nodes"
    nodes = _add(benches, "nodes", text, "plans.nodes")
    _add_corpora(nodes)
    options.add_number(nodes, "--cp-size", [16, 32, 64], "ranks", nargs="+", dest="cp_sizes")
    options.add_number(nodes, "--tokens", 8192, "tokens per rank", least=1)
    options.add_number(nodes, "--packs", 3, "packs to draw per cell", least=1)

    text = "predicted times of other implementations, compared with the FlashCP paper"
    options.add_number(
        _add(benches, "published", text, "plans.published"), "--packs", 20, "packs to draw per corpus", least=1
    )

    packing = _add(
        benches, "packing", "packing methods: fill rate, and balance of data-parallel groups", "plans.packing"
    )
    _add_corpora(packing)
    options.add_number(packing, "--window", 131072, "tokens per pack")
    options.add_number(packing, "--steps", 32, "number of optimizer steps to pack for", least=1)
    options.add_number(packing, "--cp-size", 8, "ranks")
    options.add_number(packing, "--dp-size", 4, "data-parallel groups")
    options.add_number(packing, "--gradient-accumulation-steps", 4, "packs per group in an optimizer step")
    options.add_number(
        packing, "--look-ahead", 16, "optimizer steps that a long document may wait for others of its length"
    )


def _add_layout(benches) -> None:
    layout = _add(benches, "layout", "time to build the index maps of a batch on one rank")
    _add_corpus(layout)
    options.add_number(layout, "--tokens", 16384, "tokens per rank", least=1, dest="tokens_per_rank")
    options.add_number(layout, "--cp-size", [8, 32], "ranks", nargs="+", dest="cp_sizes")
    _add_strategies(layout, ("search", "per_doc"))
    options.add_number(layout, "--sliding-window", 4096, "keys that a query of a windowed layer sees", least=1)
    text = "ranks per node, to which KV is sent once (default: directly between ranks)"
    options.add_number(layout, "--ranks-per-node", text=text)
    options.add_number(layout, "--rounds", 5, "rounds; each builds the maps of a rank once", least=1)


def _add_layers(benches) -> None:
    """Add the benchmarks of one attention layer."""
    attention = _add(benches, "attention", "time of one attention layer under each strategy, relative to the ideal")
    text = f"tokens of each document (default {','.join(map(str, LENGTHS))})"
    attention.add_argument("--lengths", type=options.comma_separated, default=LENGTHS, metavar="N,N,...", help=text)
    options.add_number(attention, "--packs", None, "draw this many packs, and print one row for each", least=1)
    _add_corpus(attention)
    options.add_number(attention, "--window", 8192, "tokens in a pack, with --packs")
    options.add_number(attention, "--seed", 0, "random seed of the first pack, with --packs")
    options.add_number(attention, "--cp-size", 2, "processes")
    _add_layer(attention, strategies=("per_doc", "flashcp", "search", TIMED), choices=(*STRATEGIES, TIMED))
    options.add_hardware(attention, f"profile with which {TIMED} predicts the layer's time", default="cpu")
    text = "needed: the KV that each rank needs; all: all KV"
    _add_several(attention, "--exchange", ("needed", "all"), text=text, dest="exchanges")
    attention.add_argument(
        "--max-imbalance",
        type=float,
        default=1.05,
        metavar="R",
        help="cap on attention pairs per rank, max / mean (default 1.05)",
    )
    text = "groups of KV heads that the layer computes one after another; several numbers compare peaks of memory"
    options.add_number(attention, "--head-groups", [1], text, least=1, nargs="+")
    options.add_number(attention, "--rounds", 10, "rounds; each runs every case once", least=1)
    attention.set_defaults(run=_run_attention)

    kernels = _add(benches, "kernels", "kernels and copies of each rank under a plan, compared with one call")
    _add_corpus(kernels)
    options.add_number(kernels, "--window", 131072, "tokens in the pack")
    options.add_number(kernels, "--seed", 0, "random seed of the pack")
    options.add_number(kernels, "--cp-size", 8, "ranks")
    _add_device(kernels)
    text = "kernels to time (default: all fused kernels that can run the layer, otherwise eager)"
    kernels.add_argument("--kernel", dest="kernels", nargs="+", metavar="NAME", help=text)
    _add_layer(kernels)
    options.add_number(kernels, "--rounds", 5, "rounds; each runs every measurement once", least=1)
    kernels.set_defaults(run=_run_kernels)


def _run_attention(arguments: argparse.Namespace) -> None:
    if arguments.packs is None:
        _measure(arguments, ("packs", "corpus", "window", "seed"))
    else:
        arguments.module = "drawn_packs"
        _measure(arguments, ("lengths", "exchanges", "head_groups"))


def _run_kernels(arguments: argparse.Namespace) -> None:
    lengths = sample_pack(arguments.corpus, arguments.window, seed=arguments.seed)
    _measure(arguments, ("corpus", "window", "seed"), lengths=lengths)


def _add_step(benches) -> None:
    step = _add(benches, "step", "time, parts and memory of a whole training step, relative to the ideal")
    _add_corpora(step)
    options.add_number(step, "--window", 4096, "tokens per pack")
    text = "tokens of each document of one pack, instead of drawn ones"
    step.add_argument("--lengths", type=options.comma_separated, metavar="N,N,...", help=text)
    options.add_number(step, "--cp-size", 2, "processes, or GPUs", least=2)
    options.add_model(step, "(or small-qwen3, the default, or small-qwen3_5; trained from random weights)")
    _add_strategies(step, [name for name in STRATEGIES if name != "whole_doc"])
    exchanges = (
        "needed: the KV that each rank needs, in one stage; staged: the same KV in cp_size - 1 stages; all: all KV"
    )
    _add_several(step, "--exchange", ("needed", "staged", "all"), text=exchanges, dest="exchanges")
    step.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="dtype of the weights (default fp32)")
    _add_device(step)
    options.add_number(step, "--threads", 1, "threads per process", least=1)
    options.add_number(step, "--rounds", 5, "rounds; each runs every case once", least=1)
    options.add_plot(
        step,
        "one layer on the first two ranks, on CPU (for the first corpus, the last strategy and the first exchange)",
    )
    step.set_defaults(run=_run_step, read=_read_step_model)


def _add_rows(benches) -> None:
    rows = _add(benches, "rows", "a step on rollouts of unequal length: padded, pooled into one plan, or in turns")
    options.add_number(rows, "--rows", 4, "rollouts per process", least=1)
    options.add_number(rows, "--longest", 2048, "most tokens of a rollout", least=32)
    options.add_number(rows, "--cp-size", 2, "processes", least=2)
    options.add_model(rows, "(or small-qwen3, the default, or small-qwen3_5; trained from random weights)")
    options.add_number(rows, "--rounds", 5, "rounds; each runs every way once", least=1)
    rows.set_defaults(read=_read_step_model)


def _read_step_model(name: str) -> dict[str, Any]:
    from ..bench.step import MODELS

    return MODELS.get(name) or options.load_config(name).to_dict()


def _run_step(arguments: argparse.Namespace) -> None:
    if arguments.plot:
        require_matplotlib()
        if arguments.device == "cuda":
            raise ConfigurationError(
                "--plot draws a step on CPU only. Leave out --device cuda, or use a profiler for a step on a GPU."
            )
    found = _measure(arguments)
    if arguments.plot:
        plot_layer(found, arguments.plot)


def _add_calibrate(benches) -> None:
    text = "measure a hardware profile of this machine's CPU cores, and the error of its predictions"
    calibrate = _add(benches, "calibrate", text, "calibration.calibrate")
    _add_corpora(calibrate)
    options.add_number(calibrate, "--window", 8192, "tokens per pack")
    options.add_number(calibrate, "--cp-size", 2, "processes", least=2)
    options.add_number(calibrate, "--packs", 30, "packs to draw for testing the profile", least=1)
    _add_layer(calibrate, heads=8, kv_heads=2, head_dim=64, dtype="fp32", strategies=("search", "per_doc"))
    options.add_number(calibrate, "--rounds", 5, "rounds; each runs every measurement once", least=1)
    calibrate.add_argument("--output", metavar="FILE", help="write the profile to this file, for use with --hardware")
    calibrate.set_defaults(run=_run_calibrate)


def _run_calibrate(arguments: argparse.Namespace) -> None:
    found: dict[str, Any] = _measure(arguments)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(found["profile"], indent=2) + "\n", encoding="utf-8")
        print(f"profile written to {arguments.output}", file=sys.stderr)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device of all ranks (default cpu)")


def _add_layer(
    parser: argparse.ArgumentParser,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    dtype: str = "bf16",
    strategies: Sequence[str] = ("per_doc", "flashcp", "search"),
    choices: Sequence[str] = STRATEGIES,
) -> None:
    """Add options for the measured layer, with the given defaults, and for the plans under which it runs."""
    options.add_number(parser, "--heads", heads, "query heads")
    options.add_number(parser, "--kv-heads", kv_heads, "KV heads")
    options.add_number(parser, "--head-dim", head_dim, "width of a head")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32", "fp64"), default=dtype, help=f"dtype of all tensors (default {dtype})"
    )
    _add_strategies(parser, strategies, choices)
    options.add_number(parser, "--stages", text="stages in which KV is sent (default 1)", dest="num_stages")


def _add_corpus(parser: argparse.ArgumentParser) -> None:
    given: dict[str, Any] = {"choices": LENGTH_DISTRIBUTIONS, "default": "pile", "metavar": "CORPUS"}
    parser.add_argument(
        "--lengths-from", dest="corpus", help="corpus whose document lengths are imitated (default pile)", **given
    )


def _add_corpora(parser: argparse.ArgumentParser) -> None:
    text = "corpora whose document lengths are imitated"
    _add_several(parser, "--lengths-from", LENGTH_DISTRIBUTIONS, text=text, dest="corpora", metavar="CORPUS")


def _add_strategies(
    parser: argparse.ArgumentParser, strategies: Sequence[str], choices: Sequence[str] = STRATEGIES
) -> None:
    _add_several(parser, "--strategies", choices, strategies, "strategies to compare", metavar="NAME")


def _add_several(
    parser: argparse.ArgumentParser,
    option: str,
    choices: Sequence[str],
    default: Sequence[str] | None = None,
    text: str = "",
    **settings: Any,
) -> None:
    """Add an option that takes several of the choices; the default is all of them."""
    chosen = list(choices if default is None else default)
    text = f"{text} (default {' '.join(chosen)})"
    parser.add_argument(option, choices=choices, nargs="+", default=chosen, help=text, **settings)
