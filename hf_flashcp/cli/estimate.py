"""`flashcp estimate`: does a window fit on some GPUs, and with which cp_size? Does not need torch."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any, NamedTuple

from ..data.lengths import sample_pack
from ..errors import ConfigurationError
from ..predict import HardwareProfile
from ..predict.memory import WORKSPACE, MemoryEstimate
from ..predict.training_setup import (
    DTYPES,
    KERNELS,
    MIXED_PRECISIONS,
    SHARDINGS,
    TrainingSetup,
)
from ..simulation.remedies import REMEDIES, as_arguments, compare, described, propose
from ..simulation.sizing import USABLE_MEMORY, Choice, best, sizings, usable_bytes
from ..tables import GIB, counted, records_table, table
from . import options
from .plots import plot_memory


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "estimate",
        help="estimate whether a window fits on your GPUs, and with which cp_size",
        description="Estimates memory, step time and KV traffic of fine-tuning for every cp_size, and proposes the "
        "cheapest settings that fit.",
    )
    options.add_model(parser, required=True)
    options.add_number(parser, "--window", text="tokens in a packed row", required=True, least=1)
    options.add_number(parser, "--gpus", text="number of GPUs in total", required=True)
    options.add_hardware(parser, default="h100")
    options.add_number(
        parser, "--cp-size", text="consider only this one (default: all that divide the number of GPUs)"
    )
    for option, values, default, text in (
        ("--sharding", SHARDINGS, "fsdp2", "how weights and optimizer state are distributed"),
        ("--dtype", DTYPES, "bfloat16", "dtype in which the model is loaded"),
        ("--mixed-precision", MIXED_PRECISIONS, "bf16", "accelerate's mixed precision"),
        ("--kernel", KERNELS, "torch_flash", "attention kernel, whose backward needs a workspace"),
    ):
        parser.add_argument(option, choices=values, default=default, help=f"{text} (default {default})")
    options.add_remedies(parser)
    options.add_corpus(parser, "(default: one document as long as the window, which causes the most traffic)")
    options.add_number(parser, "--seed", 0, "random seed for --lengths-from")
    options.add_json(parser)
    options.add_plot(parser, "memory by cp_size")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Estimate, draw if asked to, and print. Then raise an error if the window does not fit with any cp_size."""
    hardware = HardwareProfile.load(arguments.hardware)
    config = options.read_config(arguments.model)
    given = {name: getattr(arguments, name) for name in (*_GIVEN, *REMEDIES) if getattr(arguments, name) is not None}
    setup = TrainingSetup(**given, skip_logits=not arguments.keep_logits)
    lengths = [arguments.window]
    if arguments.lengths_from:
        lengths = sample_pack(arguments.lengths_from, arguments.window, seed=arguments.seed)
    free = [name for name in REMEDIES if name not in given]
    estimate = _estimate(config, hardware, setup, free, lengths, arguments.cp_size)
    if arguments.plot:
        plot_memory(estimate.found, estimate.usable, arguments.plot, window=arguments.window, setup=setup)
    options.show(_as_dict(estimate) if arguments.json else _text(estimate), str, arguments.json)
    sys.stdout.flush()  # so that it comes before an error on stderr
    _require_fit(estimate)


_GIVEN = ("gpus", "sharding", "dtype", "mixed_precision", "kernel")


class _Estimate(NamedTuple):
    """An estimate for every cp_size, each with the cheapest combination of remedies, with memory in bytes.

    `shown` is the chosen cp_size or, if none fits, the one that allows the largest window. `remedies` repeats the
    estimate for that cp_size with single remedies, and `least` with the combination that needs the least memory.
    """

    parameters: float
    setup: TrainingSetup
    lengths: list[int]
    hardware: HardwareProfile
    usable: float
    found: list[Choice]
    chosen: Choice | None
    reason: str
    shown: Choice
    least: Choice
    remedies: list[Choice]


def _estimate(
    config: Any,
    hardware: HardwareProfile,
    setup: TrainingSetup,
    free: list[str],
    lengths: list[int],
    cp_size: int | None,
) -> _Estimate:
    plans = sizings(config, hardware, setup, lengths, None if cp_size is None else [cp_size])
    proposals = [propose(setup, free, plan) for plan in plans]
    found = [cheapest for cheapest, _ in proposals]
    chosen, reason = best(found)
    shown = chosen or max(found, key=lambda choice: (choice.largest_window, -choice.memory.total))
    index = found.index(shown)
    remedies = list(compare(setup, free, plans[index]))
    parameters, usable = plans[index].shape.parameters, usable_bytes(hardware)
    least = proposals[index][1]
    return _Estimate(parameters, setup, lengths, hardware, usable, found, chosen, reason, shown, least, remedies)


def _require_fit(estimate: _Estimate) -> None:
    if estimate.chosen is not None:
        return
    setup, shown = estimate.setup, estimate.shown
    largest = f"{shown.largest_window:,} tokens" if shown.largest_window else "fewer than 1,024 tokens"
    advice = "Use a shorter window" if shown.largest_window else "Use a smaller model"
    raise ConfigurationError(
        f"A window of {sum(estimate.lengths):,} tokens does not fit on {counted(setup.gpus, 'GPU')}. The largest "
        f"window that fits has {largest}, with cp_size {shown.cp_size} and {described(shown.setup)}. {advice}"
        f"{', --sharding fsdp2' if setup.sharding == 'ddp' else ''} or more GPUs."
    )


def _as_dict(estimate: _Estimate) -> dict[str, Any]:
    chosen = estimate.chosen
    return {
        "setup": asdict(estimate.setup),
        "window": sum(estimate.lengths),
        "documents": len(estimate.lengths),
        "parameters": round(estimate.parameters),
        "usable_bytes": round(estimate.usable),
        "cp_size": None if chosen is None else chosen.cp_size,
        "reason": estimate.reason,
        "choices": [choice.to_dict() for choice in estimate.found],
        "proposed": None if chosen is None else chosen.to_dict(),
        "least_memory": estimate.least.to_dict(),
        "remedies": {described(choice.setup): choice.to_dict() for choice in estimate.remedies},
    }


def _text(estimate: _Estimate) -> str:
    setup, lengths, shown, hardware = estimate.setup, estimate.lengths, estimate.shown, estimate.hardware
    precision = {"bf16": "bf16 mixed precision", "no": "no mixed precision"}[setup.mixed_precision]
    memory_bytes, usable = (size / GIB for size in (estimate.usable / USABLE_MEMORY, estimate.usable))
    parts = {part: size for part, size in shown.memory.parts.items() if size or part != "states"}
    parts["sum"] = shown.memory.total
    lines = [
        f"{estimate.parameters / 1e9:,.2f} billion parameters, loaded in {setup.dtype}, {precision}, "
        f"{setup.sharding}, kernel {setup.kernel}",
        f"{counted(sum(lengths), 'token')} in {counted(len(lengths), 'document')}, {counted(setup.gpus, 'GPU')} with "
        f"{memory_bytes:,.1f} GiB, {usable:,.1f} of them usable",
        "",
        _sizes(estimate),
        "",
        f"cp_size {shown.cp_size}: {estimate.reason}" if estimate.chosen else "no cp_size fits",
        "",
        f"peak memory with cp_size {shown.cp_size}, {described(shown.setup)}: {shown.memory.peak}",
        "",
        table({"memory": "", "GiB per GPU": "GiB:,.1f"}, parts.items()),
        *_with_workspace(shown.memory),
        "",
        _remedies(estimate),
    ]
    if estimate.chosen:
        lines += ["", as_arguments(shown.setup, shown.cp_size)]
    if shown.memory.host:
        ranks = min(setup.gpus, hardware.ranks_per_node)
        lines += ["", f"pinned memory on the host: {ranks * shown.memory.host / GIB:,.1f} GiB per node"]
    return "\n".join(lines)


def _sizes(estimate: _Estimate) -> str:
    """Return the table with one row per cp_size."""
    columns = {
        "cp_size": ",",
        "rows at a time": ",",
        "GiB per GPU": "GiB:,.1f",
        "fits": ">",
        "largest window": ",",
        "step": ">",
        "tokens / s": ",.0f",
        "KV GiB per rank": "GiB:,.1f",
        "states GiB per rank": "GiB:,.1f",
        "with": "",
    }
    records = [
        {
            "cp_size": choice.cp_size,
            "rows at a time": estimate.setup.gpus // choice.cp_size,
            "GiB per GPU": choice.memory.total,
            "fits": "yes" if choice.fits else "no",
            "largest window": choice.largest_window,
            "step": _seconds(choice.step_seconds),
            "tokens / s": choice.tokens_per_second,
            "KV GiB per rank": choice.kv_bytes,
            "states GiB per rank": choice.state_bytes,
            "with": described(choice.setup),
        }
        for choice in estimate.found
    ]
    if not any(choice.state_bytes for choice in estimate.found):
        del columns["states GiB per rank"]
    return records_table({name: (name, form) for name, form in columns.items()}, records)


def _remedies(estimate: _Estimate) -> str:
    """Return the table with one row per remedy and one per combination that is proposed."""
    columns = {
        "with": "",
        "GiB per GPU": "GiB:,.1f",
        "host GiB": "GiB:,.1f",
        "largest window": ",",
        "step": ">",
    }
    named = [(described(choice.setup), choice) for choice in estimate.remedies]
    title = "proposed" if estimate.chosen else "least memory"
    named.append((f"{title}: {described(estimate.shown.setup)}", estimate.shown))
    if estimate.least.setup != estimate.shown.setup:
        named.append((f"least memory: {described(estimate.least.setup)}", estimate.least))
    rows = [
        (name, choice.memory.total, choice.memory.host, choice.largest_window, _seconds(choice.step_seconds))
        for name, choice in named
    ]
    return table(columns, rows)


def _with_workspace(memory: MemoryEstimate) -> list[str]:
    """Return a line on the memory while the attention workspace exists, unless that is the peak shown above."""
    moments = {name: parts for name, parts in memory.moments.items() if parts[WORKSPACE]}
    if not moments or memory.peak in moments:
        return []
    name = max(moments, key=lambda name: sum(moments[name].values()))
    total, workspace = (size / GIB for size in (sum(moments[name].values()), moments[name][WORKSPACE]))
    return ["", f"in the {name}: {total:,.1f} GiB, of which {workspace:,.1f} GiB is {WORKSPACE}"]


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{1000 * seconds:,.0f} ms"
