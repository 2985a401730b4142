"""`flashcp bench`: measurements whose figures stand in docs/benchmarks.md.

A benchmark is a module of `hf_flashcp.bench` with two functions: `measure` takes the command's options by their names
and returns plain data, and `text` makes tables of it.
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
from . import options
from .bench_gpu import add_gpu
from .plots import plot_layer, require_matplotlib


LENGTHS = [4096, 1024, 1024, 512, 512, 512, 256, 256]
_NOT_MEASURED = ("run", "module", "json", "read", "output", "plot")


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure traffic of strategies and costs of this library",
        description="Measures and prints tables, or JSON.",
    )
    benches = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    _add_plans(benches)
    _add_layers(benches)
    _add_step(benches)
    _add_calibrate(benches)
    _add(benches, "memory", "estimated memory of small training steps, beside the measured")
    agreement = _add(benches, "agreement", "cost of comparing plans between ranks at each step")
    options.add_number(agreement, "--processes", [2, 4, 8], nargs="+", dest="world_sizes")
    add_gpu(benches)


def _add(benches, name: str, text: str, module: str = "") -> argparse.ArgumentParser:
    """Adds the benchmark of a module below `hf_flashcp.bench`. Returns its parser, for more given."""
    parser = benches.add_parser(name, help=text)
    options.add_json(parser)
    parser.set_defaults(run=_run, module=module or name)
    return parser


def _run(arguments: argparse.Namespace) -> None:
    _measure(arguments)


def _measure(arguments: argparse.Namespace, without: Sequence[str] = (), **more: Any) -> Any:
    """Measures, prints, and returns what was found. `without` are options that `measure` does not take, `more` what it
    takes in their place."""
    module = import_module(f"hf_flashcp.bench.{arguments.module}")
    given = {name: value for name, value in vars(arguments).items() if name not in (*_NOT_MEASURED, *without)}
    model = given.pop("model", None)
    if model is not None:
        given["config"] = arguments.read(model)
    found = module.measure(**given, **more)
    options.show(found, module.text, arguments.json, indent=2)
    return found


def _add_plans(benches) -> None:
    """The benchmarks that plan and predict; they run no attention."""
    text = "traffic saved by each strategy, beside the FlashCP paper's Table 2"
    table2 = _add(benches, "table2", text, "plans.table2")
    _add_corpus(table2)
    options.add_number(table2, "--window", 131072, "tokens of a pack")
    options.add_number(table2, "--cp-size", 4, "ranks")
    options.add_number(table2, "--packs", 100, "packs drawn", least=1)

    text = "KV and planning time of every strategy, beside the lower bound"
    plan = _add(benches, "plan", text, "plans.plan_quality")
    _add_corpora(plan)
    options.add_number(
        plan, "--window", [65536, 131072, 262144, 524288], "tokens of a pack", nargs="+", dest="windows"
    )
    options.add_number(plan, "--cp-size", [4, 8, 16, 32], "ranks", nargs="+", dest="cp_sizes")
    options.add_number(plan, "--packs", 1, "packs drawn in each cell", least=1)
    options.add_number(plan, "--seed", 0, "of each cell's first pack")
    plan.add_argument("--max-imbalance", type=float, default=1.05, metavar="R", help="attention pairs, max / mean")
    text = "instead: traffic inside nodes and between them, of search without a topology and with one"
    options.add_number(plan, "--ranks-per-node", text=text)
    plan.set_defaults(least_total=True)

    text = "predicted attention time of every strategy, over the ideal"
    predicted = _add(benches, "predicted", text, "plans.predicted")
    _add_corpora(predicted)
    options.add_number(predicted, "--window", 131072, "tokens of a pack")
    options.add_number(predicted, "--cp-size", [8, 16], "ranks", nargs="+", dest="cp_sizes")
    options.add_number(predicted, "--packs", 3, "packs drawn in each cell", least=1)
    options.add_model(predicted, "(default: Llama 3 8B's sizes)")
    options.add_hardware(predicted, default="h100")
    predicted.set_defaults(read=options.read_config)

    text = "predicted steps on nodes: tokens that cross to each once, plans for nodes"
    nodes = _add(benches, "nodes", text, "plans.nodes")
    _add_corpora(nodes)
    options.add_number(nodes, "--cp-size", [16, 32, 64], "ranks", nargs="+", dest="cp_sizes")
    options.add_number(nodes, "--tokens", 8192, "tokens of each rank", least=1)
    options.add_number(nodes, "--packs", 3, "packs drawn in each cell", least=1)

    text = "predictions of rivals beside what the FlashCP paper measured"
    options.add_number(
        _add(benches, "published", text, "plans.published"), "--packs", 20, "packs drawn per corpus", least=1
    )

    packing = _add(benches, "packing", "ways to pack documents: fill rate, and balance of groups", "plans.packing")
    _add_corpora(packing)
    options.add_number(packing, "--window", 131072, "tokens of a pack")
    options.add_number(packing, "--steps", 32, "optimizer steps to fill", least=1)
    options.add_number(packing, "--cp-size", 8, "ranks")
    options.add_number(packing, "--dp-size", 4, "data-parallel groups")
    options.add_number(packing, "--gradient-accumulation-steps", 4)
    options.add_number(packing, "--look-ahead", 16, "in optimizer steps")


def _add_layers(benches) -> None:
    """The benchmarks of one attention layer."""
    attention = _add(benches, "attention", "time of one attention layer under each strategy, over the ideal")
    text = f"tokens of each document (default {','.join(map(str, LENGTHS))})"
    attention.add_argument("--lengths", type=options.comma_separated, default=LENGTHS, metavar="N,N,...", help=text)
    options.add_number(attention, "--cp-size", 2, "processes")
    _add_layer(attention)
    _add_several(attention, "--exchange", ("needed", "all"), dest="exchanges")
    attention.add_argument("--max-imbalance", type=float, default=1.05, metavar="R", help="default 1.05")
    options.add_number(attention, "--rounds", 10, "turns of every case", least=1)

    kernels = _add(benches, "kernels", "each rank's kernels and copies under a plan, against one call")
    _add_corpus(kernels)
    options.add_number(kernels, "--window", 131072, "tokens of the pack")
    options.add_number(kernels, "--seed", 0, "of the draw")
    options.add_number(kernels, "--cp-size", 8, "ranks")
    _add_device(kernels)
    _add_layer(kernels)
    options.add_number(kernels, "--rounds", 5, "turns of every run", least=1)
    kernels.set_defaults(run=_run_kernels)


def _run_kernels(arguments: argparse.Namespace) -> None:
    lengths = sample_pack(arguments.corpus, arguments.window, seed=arguments.seed)
    _measure(arguments, ("corpus", "window", "seed"), lengths=lengths)


def _add_step(benches) -> None:
    step = _add(benches, "step", "time, parts and memory of a whole training step, over the ideal")
    _add_corpora(step)
    options.add_number(step, "--window", 4096, "tokens of a pack")
    options.add_number(step, "--cp-size", 2, "processes, or GPUs", least=2)
    options.add_model(step, "(trained from random weights; default: two layers like Qwen3's)")
    _add_strategies(step, [name for name in STRATEGIES if name != "whole_doc"])
    exchanges = "what is needed, in one stage or in cp_size - 1 (the same on 2 ranks), or all KV; "
    _add_several(step, "--exchange", ("needed", "staged", "all"), text=exchanges, dest="exchanges")
    step.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of weights (default fp32)")
    _add_device(step)
    options.add_number(step, "--threads", 1, "of each process", least=1)
    options.add_number(step, "--rounds", 5, "turns of every case", least=1)
    options.add_plot(
        step, "one layer on the first two ranks on CPU (the first corpus, the last strategy, the first exchange)"
    )
    step.set_defaults(run=_run_step, read=lambda model: options.load_config(model).to_dict())


def _run_step(arguments: argparse.Namespace) -> None:
    if arguments.plot:
        require_matplotlib()
        if arguments.device == "cuda":
            raise ConfigurationError(
                "--plot draws a step on CPU: leave out --device cuda, or look at a profiler's trace."
            )
    found = _measure(arguments)
    if arguments.plot:
        plot_layer(found, arguments.plot)


def _add_calibrate(benches) -> None:
    text = "a hardware profile of this machine's cores, and how far predictions with it are off"
    calibrate = _add(benches, "calibrate", text, "calibration.calibrate")
    _add_corpora(calibrate)
    options.add_number(calibrate, "--window", 8192, "tokens of a pack")
    options.add_number(calibrate, "--cp-size", 2, "processes", least=2)
    options.add_number(calibrate, "--packs", 30, "packs drawn to try the profile", least=1)
    _add_layer(calibrate, heads=8, kv_heads=2, head_dim=64, dtype="fp32", strategies=("search", "per_doc"))
    options.add_number(calibrate, "--rounds", 5, "turns of every run", least=1)
    calibrate.add_argument("--output", metavar="FILE", help="write the profile there, for --hardware")
    calibrate.set_defaults(run=_run_calibrate)


def _run_calibrate(arguments: argparse.Namespace) -> None:
    found: dict[str, Any] = _measure(arguments)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(found["profile"], indent=2) + "\n", encoding="utf-8")
        print(f"profile written to {arguments.output}", file=sys.stderr)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu (default) or cuda")


def _add_layer(
    parser: argparse.ArgumentParser,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    dtype: str = "bf16",
    strategies: Sequence[str] = ("per_doc", "flashcp", "search"),
) -> None:
    """Adds the layer that is measured, with these defaults, and the plans that it runs under."""
    options.add_number(parser, "--heads", heads, "query heads")
    options.add_number(parser, "--kv-heads", kv_heads)
    options.add_number(parser, "--head-dim", head_dim)
    parser.add_argument("--dtype", choices=("bf16", "fp32", "fp64"), default=dtype, help=f"default {dtype}")
    _add_strategies(parser, strategies)
    options.add_number(parser, "--stages", text="in which KV travels (default 1)", dest="num_stages")


def _add_corpus(parser: argparse.ArgumentParser) -> None:
    given: dict[str, Any] = {"choices": LENGTH_DISTRIBUTIONS, "default": "pile", "metavar": "CORPUS"}
    parser.add_argument("--lengths-from", dest="corpus", help="default: pile", **given)


def _add_corpora(parser: argparse.ArgumentParser) -> None:
    _add_several(parser, "--lengths-from", LENGTH_DISTRIBUTIONS, dest="corpora", metavar="CORPUS")


def _add_strategies(parser: argparse.ArgumentParser, strategies: Sequence[str]) -> None:
    _add_several(parser, "--strategies", STRATEGIES, strategies, metavar="NAME")


def _add_several(
    parser: argparse.ArgumentParser,
    option: str,
    choices: Sequence[str],
    default: Sequence[str] | None = None,
    text: str = "",
    **settings: Any,
) -> None:
    """Adds an option that takes several of the choices, by default all."""
    chosen = list(choices if default is None else default)
    text += f"default: {' '.join(chosen)}"
    parser.add_argument(option, choices=choices, nargs="+", default=chosen, help=text, **settings)
