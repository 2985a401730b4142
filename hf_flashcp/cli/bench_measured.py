"""`flashcp bench`: the benchmarks that run attention, models or processes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.lengths import LENGTH_DISTRIBUTIONS, sample_pack
from ..errors import ConfigurationError
from ..planning import STRATEGIES
from .bench_options import add_corpora, check_at_least, show
from .doctor import load_config
from .plan import comma_separated
from .plots import require_matplotlib


def add_measured(benches) -> None:
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

    calibrate = benches.add_parser(
        "calibrate", help="a hardware profile of this machine's cores, and how far predictions with it are off"
    )
    add_corpora(calibrate)
    calibrate.add_argument("--window", type=int, default=8192, metavar="N", help="tokens of a pack (default 8192)")
    calibrate.add_argument("--cp-size", type=int, default=2, metavar="N", help="processes (default 2)")
    calibrate.add_argument("--packs", type=int, default=30, metavar="N", help="drawn to try the profile (default 30)")
    _add_layer(calibrate, heads=8, kv_heads=2, head_dim=64, dtype="fp32", strategies=["search", "per_doc"])
    calibrate.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of every run (default 5)")
    calibrate.add_argument("--output", metavar="FILE", help="write the profile there, for --hardware")
    calibrate.add_argument("--json", action="store_true")
    calibrate.set_defaults(run=run_calibrate)

    memory = benches.add_parser("memory", help="estimated memory of small training steps, beside the measured")
    memory.add_argument("--json", action="store_true")
    memory.set_defaults(run=run_memory)

    agreement = benches.add_parser("agreement", help="cost of comparing plans between ranks at each step")
    agreement.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8], metavar="N")
    agreement.add_argument("--json", action="store_true")
    agreement.set_defaults(run=run_agreement)


def _add_step(benches) -> None:
    step = benches.add_parser("step", help="time, parts and memory of a whole training step, over the ideal")
    add_corpora(step)
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


def _add_layer(
    parser: argparse.ArgumentParser,
    *,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    dtype: str = "bf16",
    strategies: Sequence[str] = ("per_doc", "flashcp", "search"),
) -> None:
    """The layer that is measured, with these defaults, and the plans it runs under."""
    parser.add_argument("--heads", type=int, default=heads, metavar="N", help=f"query heads (default {heads})")
    parser.add_argument("--kv-heads", type=int, default=kv_heads, metavar="N", help=f"default {kv_heads}")
    parser.add_argument("--head-dim", type=int, default=head_dim, metavar="N", help=f"default {head_dim}")
    parser.add_argument("--dtype", choices=("bf16", "fp32", "fp64"), default=dtype, help=f"default {dtype}")
    parser.add_argument(
        "--strategies",
        choices=STRATEGIES,
        nargs="+",
        default=list(strategies),
        metavar="NAME",
        help=f"default: {' '.join(strategies)}",
    )
    parser.add_argument("--stages", type=int, metavar="N", help="in which KV travels (default 1)")


def _layer(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `_add_layer` reads, and the rounds, as benchmarks take them."""
    names = ("heads", "kv_heads", "head_dim", "dtype", "strategies", "rounds")
    return {**{name: getattr(arguments, name) for name in names}, "num_stages": arguments.stages}


def run_attention(arguments: argparse.Namespace) -> None:
    from ..bench.attention import measure, text

    check_at_least(1, "--rounds", arguments.rounds)
    found = measure(
        arguments.lengths,
        arguments.cp_size,
        **_layer(arguments),
        exchanges=arguments.exchange,
        max_imbalance=arguments.max_imbalance,
    )
    show(found, text, arguments.json)


def run_kernels(arguments: argparse.Namespace) -> None:
    from ..bench.kernels import measure, text

    check_at_least(1, "--rounds", arguments.rounds)
    found = measure(
        sample_pack(arguments.lengths_from, arguments.window, seed=arguments.seed),
        arguments.cp_size,
        **_layer(arguments),
        device=arguments.device,
    )
    show(found, text, arguments.json)


def run_step(arguments: argparse.Namespace) -> None:
    if arguments.plot:
        require_matplotlib()
    for least, name in ((1, "rounds"), (1, "threads"), (2, "cp_size")):
        check_at_least(least, f"--{name.replace('_', '-')}", getattr(arguments, name))
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
    show(found, text, arguments.json)
    if arguments.plot:
        from .layer_plot import plot_layer

        plot_layer(found, arguments.plot)
        print(f"plot written to {arguments.plot}", file=sys.stderr)


def run_memory(arguments: argparse.Namespace) -> None:
    from ..bench.memory import measure, text

    show(measure(), text, arguments.json)


def run_agreement(arguments: argparse.Namespace) -> None:
    from ..bench.agreement import measure

    found = measure(arguments.processes)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    print(f"comparing a plan's digest, {found['rounds']} rounds, slowest rank's median\n")
    for processes, milliseconds in found["milliseconds"].items():
        print(f"{processes:4} processes {milliseconds:8.3f} ms")


def run_calibrate(arguments: argparse.Namespace) -> None:
    for least, name in ((1, "rounds"), (1, "packs"), (2, "cp_size")):
        check_at_least(least, f"--{name.replace('_', '-')}", getattr(arguments, name))
    from ..bench.calibration.calibrate import measure, text

    found = measure(
        arguments.lengths_from,
        arguments.window,
        arguments.cp_size,
        arguments.packs,
        **_layer(arguments),
        progress=True,
    )
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(found["profile"], indent=2) + "\n", encoding="utf-8")
        print(f"profile written to {arguments.output}", file=sys.stderr)
    show(found, text, arguments.json)
