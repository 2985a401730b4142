"""`flashcp estimate`: does a window fit on some GPUs, and with which cp_size? Does not need torch."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from ..data.lengths import sample_pack
from ..errors import ConfigurationError
from ..predict import HardwareProfile
from ..predict.memory import WORKSPACE, MemoryEstimate
from ..predict.memory_shape import MemoryShape
from ..predict.training_setup import (
    DTYPES,
    GRADIENT_CHECKPOINTING,
    KERNELS,
    MIXED_PRECISIONS,
    SHARDINGS,
    TrainingSetup,
)
from ..simulation.sizing import Choice, best, choices, usable_bytes
from ..tables import GIB, counted, table
from . import options
from .plots import plot_memory


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "estimate",
        help="estimate whether a window fits on your GPUs, and with which cp_size",
        description="Estimates memory, step time and KV traffic of fine-tuning for every cp_size, and chooses one.",
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
    options.add_checkpointing(parser)
    options.add_corpus(parser, "(default: one document as long as the window, which causes the most traffic)")
    options.add_number(parser, "--seed", 0, "random seed for --lengths-from")
    options.add_json(parser)
    options.add_plot(parser, "memory by cp_size")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Estimate, draw if asked to, and print. Then raise an error if the window does not fit with any cp_size."""
    hardware = HardwareProfile.load(arguments.hardware)
    config = options.read_config(arguments.model)
    given = ("gpus", "sharding", "dtype", "mixed_precision", "gradient_checkpointing", "kernel")
    setup = TrainingSetup(**{name: getattr(arguments, name) for name in given})
    lengths = [arguments.window]
    if arguments.lengths_from:
        lengths = sample_pack(arguments.lengths_from, arguments.window, seed=arguments.seed)
    estimate = _estimate(config, hardware, setup, lengths, arguments.cp_size)
    if arguments.plot:
        plot_memory(estimate.found, estimate.usable, arguments.plot, window=arguments.window, setup=setup)
    options.show(_as_dict(estimate) if arguments.json else _text(estimate), str, arguments.json)
    sys.stdout.flush()  # so that it comes before an error on stderr
    _require_fit(estimate)


class _Estimate(NamedTuple):
    """An estimate for every cp_size, with memory in bytes.

    `shown` is the chosen cp_size or, if none fits, the one that allows the largest window. `modes` repeats the
    estimate for that cp_size with every kind of gradient checkpointing.
    """

    parameters: float
    setup: TrainingSetup
    lengths: list[int]
    hardware_bytes: float
    usable: float
    found: list[Choice]
    chosen: Choice | None
    reason: str
    shown: Choice
    modes: dict[str, Choice]


def _estimate(
    config: Any, hardware: HardwareProfile, setup: TrainingSetup, lengths: list[int], cp_size: int | None
) -> _Estimate:
    found = choices(config, hardware, setup, lengths, None if cp_size is None else [cp_size])
    chosen, reason = best(found)
    shown = chosen or max(found, key=lambda choice: choice.largest_window)
    modes = {
        mode: shown
        if mode == setup.gradient_checkpointing
        else choices(config, hardware, replace(setup, gradient_checkpointing=mode), lengths, [shown.cp_size])[0]
        for mode in GRADIENT_CHECKPOINTING
    }
    usable = usable_bytes(hardware)
    assert hardware.memory_bytes is not None  # usable_bytes raises an error without it
    parameters = MemoryShape.from_config(config).parameters
    return _Estimate(parameters, setup, lengths, hardware.memory_bytes, usable, found, chosen, reason, shown, modes)


def _require_fit(estimate: _Estimate) -> None:
    if estimate.chosen is not None:
        return
    setup, shown, modes = estimate.setup, estimate.shown, estimate.modes
    mode = max(modes, key=lambda mode: modes[mode].largest_window)
    reach = modes[mode].largest_window
    largest = f"{shown.largest_window:,} tokens" if shown.largest_window else "fewer than 1,024 tokens"
    other = f" ({reach:,} with --activation-checkpointing {mode})" if reach > shown.largest_window else ""
    advice = "Use a shorter window" if shown.largest_window or reach else "Use a smaller model"
    raise ConfigurationError(
        f"A window of {sum(estimate.lengths):,} tokens does not fit on {counted(setup.gpus, 'GPU')}. The largest "
        f"window that fits has {largest}, with cp_size {shown.cp_size}{other}. {advice}"
        f"{', --sharding fsdp2' if setup.sharding == 'ddp' else ''} or more GPUs."
    )


def _as_dict(estimate: _Estimate) -> dict[str, Any]:
    return {
        "setup": asdict(estimate.setup),
        "window": sum(estimate.lengths),
        "documents": len(estimate.lengths),
        "parameters": round(estimate.parameters),
        "usable_bytes": round(estimate.usable),
        "cp_size": None if estimate.chosen is None else estimate.chosen.cp_size,
        "reason": estimate.reason,
        "choices": [choice.to_dict() for choice in estimate.found],
        "gradient_checkpointing": {mode: choice.to_dict() for mode, choice in estimate.modes.items()},
    }


def _text(estimate: _Estimate) -> str:
    setup, lengths, shown = estimate.setup, estimate.lengths, estimate.shown
    precision = {"bf16": "bf16 mixed precision", "no": "no mixed precision"}[setup.mixed_precision]
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
    }
    rows = [
        (
            choice.cp_size,
            setup.gpus // choice.cp_size,
            choice.memory.total,
            "yes" if choice.fits else "no",
            choice.largest_window,
            _seconds(choice.step_seconds),
            choice.tokens_per_second,
            choice.kv_bytes,
            choice.state_bytes,
        )
        for choice in estimate.found
    ]
    if not any(choice.state_bytes for choice in estimate.found):
        del columns["states GiB per rank"]  # then the table leaves the last value of each row out
    modes = [
        (mode, choice.memory.total, choice.largest_window, _seconds(choice.step_seconds))
        for mode, choice in estimate.modes.items()
    ]
    parts = {part: size for part, size in shown.memory.parts.items() if size or part != "states"}
    parts["sum"] = shown.memory.total
    return "\n".join(
        [
            f"{estimate.parameters / 1e9:,.2f} billion parameters, loaded in {setup.dtype}, {precision}, "
            f"{setup.sharding}, gradient checkpointing {setup.gradient_checkpointing}, kernel {setup.kernel}",
            f"{counted(sum(lengths), 'token')} in {counted(len(lengths), 'document')}, {counted(setup.gpus, 'GPU')} "
            f"with {estimate.hardware_bytes / GIB:,.1f} GiB, {estimate.usable / GIB:,.1f} of them usable",
            "",
            table(columns, rows),
            "",
            f"cp_size {shown.cp_size}: {estimate.reason}" if estimate.chosen else "no cp_size fits",
            "",
            f"peak memory with cp_size {shown.cp_size}: {shown.memory.peak}",
            "",
            table({"memory": "", "GiB per GPU": "GiB:,.1f"}, parts.items()),
            *_with_workspace(shown.memory),
            "",
            table(
                {"gradient checkpointing": "", "GiB per GPU": "GiB:,.1f", "largest window": ",", "step": ">"}, modes
            ),
        ]
    )


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
