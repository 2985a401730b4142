"""`flashcp bench gpu`: correctness and speed on a GPU, in one run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm


def add_gpu(benches) -> None:
    gpu = benches.add_parser(
        "gpu",
        help="check correctness and measure speed on a GPU, in one run",
        description="Runs several steps in turn. Each step has its own time limit and its own processes, so that a "
        "step that fails does not affect the others. A run on one GPU takes at most nine minutes. On several GPUs, "
        "started with torchrun, it adds the steps that need more than one. docs/gpu.md explains the figures.",
    )
    gpu.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cuda (default), or cpu for a quick trial with small sizes",
    )
    gpu.add_argument(
        "--steps",
        nargs="+",
        default=[],
        metavar="NAME",
        help="run only these steps or groups of steps (groups: correctness, timing, cluster; default: all)",
    )
    gpu.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="write steps.jsonl, report.txt and profile.json to this folder; steps that have passed there are skipped",
    )
    gpu.add_argument(
        "--kernel-library", metavar="FILE", help="load FlashAttention-3 from this library file; .xz is unpacked first"
    )
    gpu.add_argument("--json", action="store_true", help="print one line of JSON per step and nothing else")
    gpu.set_defaults(run=run_gpu)


def run_gpu(arguments: argparse.Namespace) -> int:
    """Run the steps that were asked for. Return 0 if all of them passed, else 1."""
    from ..attention.kernels import load_kernel_library
    from ..bench.gpu.launch import is_first, join, launched_ranks, run_together
    from ..bench.gpu.runner import PASSED, Pools, Results, run_steps
    from ..bench.gpu.settings import Settings
    from ..bench.gpu.steps import CLUSTER_STEPS, STEPS, choose

    together = launched_ranks() > 1
    chosen = choose(arguments.steps, STEPS + CLUSTER_STEPS * together)
    library = arguments.kernel_library and str(load_kernel_library(arguments.kernel_library))
    settings = Settings(arguments.device, library)
    results = None
    if is_first():
        pools = Pools(arguments.device)
        results = Results(arguments.output, pools.machine())
        with _progress(chosen, arguments.json) as progress:
            run_steps([step for step in chosen if step in STEPS], settings, pools, results, progress)
    if together:
        new_ranks = join(settings)
        with _progress(chosen, arguments.json) as progress:
            run_together([step for step in chosen if step in CLUSTER_STEPS], settings, new_ranks, results, progress)
    if results is None:
        return 0
    rows = results.rows(step.name for step in chosen)
    _write(rows, chosen, arguments)
    return 0 if all(row["status"] == PASSED for row in rows) else 1


def _write(rows: list[dict[str, Any]], chosen: list[Any], arguments: argparse.Namespace) -> None:
    from ..bench.gpu.report import text

    report = text(rows, {step.name: step.shows for step in chosen})
    if arguments.output is not None:
        (arguments.output / "report.txt").write_text(report + "\n", encoding="utf-8")
        for row in rows:
            if "profile" in row["more"]:
                profile = json.dumps(row["more"]["profile"], indent=2)
                (arguments.output / "profile.json").write_text(profile + "\n", encoding="utf-8")
    if not arguments.json:
        print(report)


@contextmanager
def _progress(steps: list[Any], as_json: bool) -> Iterator[Callable[[Any, dict[str, Any] | None], None]]:
    """Show a progress bar over the steps and, with `--json`, print one line after each."""
    with tqdm(total=len(steps), unit="step", leave=False, disable=None) as bar:

        def on_row(step: Any, row: dict[str, Any] | None) -> None:
            bar.set_description(step.name)
            if row is not None:
                bar.update()
                if as_json:
                    print(json.dumps(row), flush=True)

        yield on_row
