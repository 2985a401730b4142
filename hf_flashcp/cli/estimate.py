"""`flashcp estimate`: does a window fit on some GPUs, and with which cp_size? Needs no torch."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from typing import Any

from ..data.lengths import LENGTH_DISTRIBUTIONS, sample_pack
from ..errors import ConfigurationError, PlanError
from ..predict import HARDWARE, HardwareProfile
from ..predict.memory import WORKSPACE, MemoryEstimate
from ..predict.memory_shape import MemoryShape
from ..predict.training_setup import DTYPES, GRADIENT_CHECKPOINTING, MIXED_PRECISIONS, SHARDINGS, TrainingSetup
from ..simulation.sizing import Choice, best, choices, usable_bytes
from .model_config import add_checkpointing, read_config
from .plan import _aligned, counted, json_text


GIB = 2**30


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "estimate",
        help="say whether a window fits on some GPUs, and with which cp_size",
        description="Estimates memory, step time and KV traffic of a fine-tune for every cp_size, and chooses one.",
    )
    parser.add_argument(
        "--model", required=True, metavar="CONFIG", help="a model's config.json, or a folder or hub name that has one"
    )
    parser.add_argument("--window", type=int, required=True, metavar="N", help="tokens of a packed row")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="in all")
    parser.add_argument(
        "--hardware", default="h100", metavar="NAME", help=f"{', '.join(HARDWARE)} (default), or a JSON file"
    )
    parser.add_argument("--cp-size", type=int, metavar="N", help="only this one (default: all that divide the GPUs)")
    parser.add_argument("--sharding", choices=SHARDINGS, default="fsdp2", help="default: %(default)s")
    add_checkpointing(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="in which the model is loaded (default %(default)s)"
    )
    parser.add_argument(
        "--mixed-precision", choices=MIXED_PRECISIONS, default="bf16", help="accelerate's (default %(default)s)"
    )
    parser.add_argument(
        "--lengths-from",
        choices=LENGTH_DISTRIBUTIONS,
        metavar="CORPUS",
        help="draw documents like those of a corpus: "
        f"{', '.join(LENGTH_DISTRIBUTIONS)} (default: one document as long as the window, the most traffic)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw (default 0)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON and nothing else")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw memory by cp_size to a file (.png, .svg, .pdf); needs the extra 'plot'"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Estimates, draws if asked to, and prints.

    Raises:
        ConfigurationError: options that do not go together, or, after everything is printed, a window that fits with
            no cp_size.
        PlanError: documents that cannot be planned.
        FlashCPError: a plot that cannot be drawn or written.
    """
    if arguments.window < 1:
        raise PlanError(f"--window must be at least 1 token, got {arguments.window}.")
    hardware = HardwareProfile.load(arguments.hardware)
    config = read_config(arguments.model)
    options = ("gpus", "sharding", "dtype", "mixed_precision", "gradient_checkpointing")
    setup = TrainingSetup(**{name: getattr(arguments, name) for name in options})
    lengths = [arguments.window]
    if arguments.lengths_from:
        lengths = sample_pack(arguments.lengths_from, arguments.window, seed=arguments.seed)
    sizes = None if arguments.cp_size is None else [arguments.cp_size]
    found = choices(config, hardware, setup, lengths, sizes)
    chosen, reason = best(found)
    shown = chosen or max(found, key=lambda choice: choice.largest_window)
    modes = {
        mode: shown
        if mode == setup.gradient_checkpointing
        else choices(config, hardware, replace(setup, gradient_checkpointing=mode), lengths, [shown.cp_size])[0]
        for mode in GRADIENT_CHECKPOINTING
    }
    usable = usable_bytes(hardware)
    if arguments.plot:
        from .estimate_plot import plot_memory

        plot_memory(found, usable, arguments.plot, window=arguments.window, setup=setup)
        print(f"plot written to {arguments.plot}", file=sys.stderr)
    shape = MemoryShape.from_config(config)
    if arguments.json:
        print(json_text(_as_dict(shape, setup, lengths, usable, found, chosen, reason, modes)))
    else:
        print(_text(shape, setup, lengths, hardware, found, chosen, reason, shown, modes))
    sys.stdout.flush()  # before an error on the other stream
    _require_fit(chosen, arguments.window, setup, shown, modes)


def _require_fit(
    chosen: Choice | None, window: int, setup: TrainingSetup, shown: Choice, modes: dict[str, Choice]
) -> None:
    if chosen is not None:
        return
    mode = max(modes, key=lambda mode: modes[mode].largest_window)
    reach = modes[mode].largest_window
    largest = f"{shown.largest_window:,} tokens" if shown.largest_window else "less than 1,024 tokens"
    other = f" ({reach:,} with --activation-checkpointing {mode})" if reach > shown.largest_window else ""
    advice = "Take a shorter window" if shown.largest_window or reach else "Take a smaller model"
    raise ConfigurationError(
        f"A window of {window:,} tokens does not fit on {counted(setup.gpus, 'GPU')}: the largest that does has "
        f"{largest}, with cp_size {shown.cp_size}{other}. {advice}"
        f"{', --sharding fsdp2' if setup.sharding == 'ddp' else ''} or more GPUs."
    )


def _as_dict(shape, setup, lengths, usable, found, chosen, reason, modes) -> dict[str, Any]:
    return {
        "setup": asdict(setup),
        "window": sum(lengths),
        "documents": len(lengths),
        "parameters": round(shape.parameters),
        "usable_bytes": round(usable),
        "cp_size": None if chosen is None else chosen.cp_size,
        "reason": reason,
        "choices": [choice.to_dict() for choice in found],
        "gradient_checkpointing": {mode: choice.to_dict() for mode, choice in modes.items()},
    }


def _text(shape, setup, lengths, hardware, found, chosen, reason, shown, modes) -> str:
    precision = {"bf16": "bf16 mixed precision", "no": "no mixed precision"}[setup.mixed_precision]
    documents = counted(len(lengths), "document")
    header = (
        "cp_size",
        "rows at a time",
        "GiB a GPU",
        "fits",
        "largest window",
        "step",
        "tokens / s",
        "KV GiB a rank",
    )
    rows = [header]
    for choice in found:
        rows.append(
            (
                str(choice.cp_size),
                str(setup.gpus // choice.cp_size),
                _gib(choice.memory.total),
                "yes" if choice.fits else "no",
                f"{choice.largest_window:,}",
                _seconds(choice.step_seconds),
                f"{choice.tokens_per_second:,.0f}",
                _gib(choice.kv_bytes),
            )
        )
    usable = usable_bytes(hardware) / GIB
    verdict = f"cp_size {chosen.cp_size}: {reason}" if chosen else "no cp_size fits"
    parts = [(name, _gib(size)) for name, size in shown.memory.parts.items()] + [("sum", _gib(shown.memory.total))]
    with_modes = [("gradient checkpointing", "GiB a GPU", "largest window", "step")]
    with_modes += [
        (mode, _gib(choice.memory.total), f"{choice.largest_window:,}", _seconds(choice.step_seconds))
        for mode, choice in modes.items()
    ]
    return "\n".join(
        [
            f"{shape.parameters / 1e9:,.2f} billion parameters, loaded in {setup.dtype}, {precision}, "
            f"{setup.sharding}, gradient checkpointing {setup.gradient_checkpointing}",
            f"{counted(sum(lengths), 'token')} in {documents}, {counted(setup.gpus, 'GPU')} with "
            f"{hardware.memory_bytes / GIB:,.1f} GiB, {usable:,.1f} of them usable",
            "",
            *_aligned(rows),
            "",
            verdict,
            "",
            f"memory with cp_size {shown.cp_size}, GiB a GPU, at its highest: {shown.memory.peak}",
            *(f"  {line}" for line in _aligned([(name.ljust(19), size) for name, size in parts])),
            *_with_workspace(shown.memory),
            "",
            *_aligned([(row[0].ljust(22), *row[1:]) for row in with_modes]),
        ]
    )


def _with_workspace(memory: MemoryEstimate) -> list[str]:
    """The moment with the attention workspace, unless it is the peak, where the parts above show it."""
    moments = {name: parts for name, parts in memory.moments.items() if parts[WORKSPACE]}
    if not moments or memory.peak in moments:
        return []
    name = max(moments, key=lambda name: sum(moments[name].values()))
    parts = moments[name]
    return ["", f"in the {name}: {_gib(sum(parts.values()))}, of which {WORKSPACE} {_gib(parts[WORKSPACE])}"]


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{1000 * seconds:,.0f} ms"
