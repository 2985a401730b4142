"""`flashcp bench`: the benchmarks that run attention, models or processes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.lengths import sample_pack
from ..errors import ConfigurationError
from ..planning import STRATEGIES
from .bench_options import add_bench, add_corpora, add_corpus, add_several, add_strategies, run_bench
from .layer_plot import plot_layer
from .options import add_model, add_number, add_plot, comma_separated, load_config
from .plots import require_matplotlib


LENGTHS = [4096, 1024, 1024, 512, 512, 512, 256, 256]


def add_measured(benches) -> None:
    attention = add_bench(
        benches, "attention", "attention", "time of one attention layer under each strategy, over the ideal"
    )
    attention.add_argument(
        "--lengths",
        type=comma_separated,
        default=LENGTHS,
        metavar="N,N,...",
        help=f"tokens of each document (default {','.join(map(str, LENGTHS))})",
    )
    add_number(attention, "--cp-size", 2, "processes")
    _add_layer(attention)
    add_several(attention, "--exchange", ("needed", "all"), dest="exchanges")
    attention.add_argument("--max-imbalance", type=float, default=1.05, metavar="R", help="default 1.05")
    add_number(attention, "--rounds", 10, "turns of every case", least=1)

    kernels = add_bench(benches, "kernels", "kernels", "each rank's kernels and copies under a plan, against one call")
    add_corpus(kernels)
    add_number(kernels, "--window", 131072, "tokens of the pack")
    add_number(kernels, "--seed", 0, "of the draw")
    add_number(kernels, "--cp-size", 8, "ranks")
    _add_device(kernels)
    _add_layer(kernels)
    add_number(kernels, "--rounds", 5, "turns of every run", least=1)
    kernels.set_defaults(run=_run_kernels)

    _add_step(benches)

    calibrate = add_bench(
        benches,
        "calibrate",
        "calibration.calibrate",
        "a hardware profile of this machine's cores, and how far predictions with it are off",
    )
    add_corpora(calibrate)
    add_number(calibrate, "--window", 8192, "tokens of a pack")
    add_number(calibrate, "--cp-size", 2, "processes", least=2)
    add_number(calibrate, "--packs", 30, "packs drawn to try the profile", least=1)
    _add_layer(calibrate, heads=8, kv_heads=2, head_dim=64, dtype="fp32", strategies=("search", "per_doc"))
    add_number(calibrate, "--rounds", 5, "turns of every run", least=1)
    calibrate.add_argument("--output", metavar="FILE", help="write the profile there, for --hardware")
    calibrate.set_defaults(run=_run_calibrate)

    add_bench(benches, "memory", "memory", "estimated memory of small training steps, beside the measured")

    agreement = add_bench(benches, "agreement", "agreement", "cost of comparing plans between ranks at each step")
    add_number(agreement, "--processes", [2, 4, 8], nargs="+", dest="world_sizes")


def _add_step(benches) -> None:
    step = add_bench(benches, "step", "step", "time, parts and memory of a whole training step, over the ideal")
    add_corpora(step)
    add_number(step, "--window", 4096, "tokens of a pack")
    add_number(step, "--cp-size", 2, "processes, or GPUs", least=2)
    add_model(step, "(trained from random weights; default: two layers like Qwen3's)")
    add_strategies(step, [name for name in STRATEGIES if name != "whole_doc"])
    exchanges = "what is needed, in one stage or in cp_size - 1 (the same on 2 ranks), or all KV; "
    add_several(step, "--exchange", ("needed", "staged", "all"), text=exchanges, dest="exchanges")
    step.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of weights (default fp32)")
    _add_device(step)
    add_number(step, "--threads", 1, "of each process", least=1)
    add_number(step, "--rounds", 5, "turns of every case", least=1)
    add_plot(
        step,
        "one layer on the first two ranks on CPU (the first corpus, the last strategy, the first exchange)",
    )
    step.set_defaults(run=_run_step, read=lambda model: load_config(model).to_dict())


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu (default) or cuda")


def _add_layer(
    parser: argparse.ArgumentParser,
    *,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    dtype: str = "bf16",
    strategies: Sequence[str] = ("per_doc", "flashcp", "search"),
) -> None:
    """Adds the layer that is measured, with these defaults, and the plans that it runs under."""
    add_number(parser, "--heads", heads, "query heads")
    add_number(parser, "--kv-heads", kv_heads)
    add_number(parser, "--head-dim", head_dim)
    parser.add_argument("--dtype", choices=("bf16", "fp32", "fp64"), default=dtype, help=f"default {dtype}")
    add_strategies(parser, strategies)
    add_number(parser, "--stages", text="in which KV travels (default 1)", dest="num_stages")


def _run_kernels(arguments: argparse.Namespace) -> None:
    lengths = sample_pack(arguments.corpus, arguments.window, seed=arguments.seed)
    run_bench(arguments, ("corpus", "window", "seed"), lengths=lengths)


def _run_step(arguments: argparse.Namespace) -> None:
    if arguments.plot:
        require_matplotlib()
        if arguments.device == "cuda":
            raise ConfigurationError(
                "--plot draws a step on CPU: leave out --device cuda, or look at a profiler's trace."
            )
    found = run_bench(arguments)
    if arguments.plot:
        plot_layer(found, arguments.plot)


def _run_calibrate(arguments: argparse.Namespace) -> None:
    found: dict[str, Any] = run_bench(arguments)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(found["profile"], indent=2) + "\n", encoding="utf-8")
        print(f"profile written to {arguments.output}", file=sys.stderr)
