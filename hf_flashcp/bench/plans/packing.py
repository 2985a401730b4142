"""Compares packing methods: how full the packs are, and how evenly data-parallel groups are loaded."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from statistics import mean, median
from typing import Any

import numpy as np
from tqdm import tqdm

from ...data.lengths import sample_lengths
from ...data.packing import imbalance, pack_lengths
from ...data.packing_options import PackingOptions
from ...extras import require_extra
from ...planning import plan_documents
from ...predict import CostModel
from ...predict.model_shape import LLAMA_3_8B
from ...tables import records_table
from ..arguments import with_arguments


ROUNDS = 3
"""Repetitions of timed packing; the result is the median."""

PLANNED = 32
"""Number of packs for which a plan is made, to check the estimate that adds up the times of documents."""


@with_arguments(
    "corpora", "window", "steps", "cp_size", "dp_size", "gradient_accumulation_steps", "look_ahead", "seed"
)
def measure(
    corpora: Sequence[str],
    window: int,
    steps: int,
    *,
    cp_size: int,
    dp_size: int,
    gradient_accumulation_steps: int,
    look_ahead: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Pack the same documents with every method.

    Documents longer than the window are truncated; concatenation splits them instead. `mean_delay` is in optimizer
    steps, and `None` if packs are shuffled. `time_error` compares the time of a pack as a sum over its documents with
    the time that a cost model predicts for its plan: it is the mean deviation of their ratio from its mean.
    """
    options = PackingOptions(
        window,
        overlong="truncate",
        cp_size=cp_size,
        dp_size=dp_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        look_ahead=look_ahead,
    )
    cells = []
    for corpus in tqdm(corpora, leave=False, disable=None):
        lengths = _lengths(corpus, steps * options.step_packs * window, seed)
        methods = {name: method(lengths, options, seed) for name, method in METHODS.items()}
        cells.append({"corpus": corpus, "documents": len(lengths), "methods": methods})
    return {"cells": cells}


def _lengths(corpus: str, tokens: int, seed: int) -> np.ndarray:
    count = 1024
    while (lengths := np.array(sample_lengths(corpus, count, seed=seed))).sum() < tokens:
        count *= 2
    return lengths[: np.searchsorted(lengths.cumsum(), tokens) + 1]


def _concatenated(lengths: np.ndarray, options: PackingOptions, seed: int) -> dict[str, Any]:
    def pack() -> tuple[list[np.ndarray], np.ndarray]:
        ends = np.random.default_rng(seed).permutation(lengths).cumsum()
        cuts = np.union1d(ends, np.arange(options.window, ends[-1], options.window))
        packs = np.split(np.diff(cuts, prepend=0), np.flatnonzero(cuts % options.window == 0) + 1)
        return [pack for pack in packs if len(pack)], ends

    (packs, ends), seconds = _timed(pack)
    first = np.append(0, ends[:-1]) // options.window
    cut = int((first != (ends - 1) // options.window).sum())
    return {**_quality(packs, options), "documents_cut": cut, "mean_delay": 0.0, "seconds": seconds}


def _trl(lengths: np.ndarray, options: PackingOptions, seed: int) -> dict[str, Any]:
    require_extra("Comparisons with TRL", "bench", "datasets", "pyarrow", "trl")
    import datasets
    import pyarrow as pa
    from trl import pack_dataset

    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(lengths)
    tokens = pa.array(np.zeros(shuffled.sum(), dtype=np.int8))
    rows = pa.ListArray.from_arrays(pa.array(np.append(0, shuffled.cumsum()), pa.int32()), tokens)
    documents = datasets.Dataset(pa.table({"input_ids": rows}))
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        packed, seconds = _timed(
            lambda: pack_dataset(
                documents, options.window, "bfd", map_kwargs={"keep_in_memory": True, "load_from_cache_file": False}
            )
        )
    finally:
        if not bars:
            datasets.enable_progress_bars()
    packs = packed.with_format("numpy")["seq_lengths"]
    packs = [packs[index] for index in generator.permutation(len(packs)).tolist()]
    cut = int((lengths > options.window).sum())
    return {**_quality(packs, options), "documents_cut": cut, "mean_delay": None, "seconds": seconds}


def _ours(method: str) -> Callable[..., dict[str, Any]]:
    def measure(lengths: np.ndarray, options: PackingOptions, seed: int) -> dict[str, Any]:
        given = {**dataclasses.asdict(options), "method": method, "seed": seed}
        packing, seconds = _timed(lambda: pack_lengths(lengths, **given))
        report = packing.report()
        packs = [np.array([piece.stop - piece.start for piece in pack]) for pack in packing]
        return {
            **_quality(packs, options),
            "documents_cut": report["documents_truncated"],
            "mean_delay": report["mean_delay"],
            "seconds": seconds,
        }

    return measure


METHODS = {"concatenate": _concatenated, "TRL bfd": _trl, "best_fit": _ours("best_fit"), "balanced": _ours("balanced")}


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        found = function()
        times.append(time.perf_counter() - start)
    return found, median(times)


def _quality(packs: Sequence[np.ndarray], options: PackingOptions) -> dict[str, float]:
    seconds, _ = options.times(np.concatenate(packs))
    ends = np.cumsum([len(pack) for pack in packs])
    by_pack = np.add.reduceat(seconds, ends - [len(pack) for pack in packs])
    model = CostModel.from_config(LLAMA_3_8B, "h100")
    some = range(0, max(len(packs) - 1, 1), -(-len(packs) // PLANNED))  # The last pack may have only a few tokens.
    plans = [plan_documents(packs[index].tolist(), options.cp_size) for index in some]
    ratios = [model.step_time(plan).seconds / by_pack[index] for plan, index in zip(plans, some)]
    return {
        "packs": len(packs),
        "fill_rate": float(sum(pack.sum() for pack in packs) / (len(packs) * options.window)),
        **imbalance(by_pack, options.dp_size, options.gradient_accumulation_steps),
        "time_error": float(mean(abs(ratio / mean(ratios) - 1) for ratio in ratios)),
    }


def text(found: dict[str, Any]) -> str:
    """Return a table with one row per corpus and method."""
    columns = {
        "corpus": ("corpus", ""),
        "method": ("method", ""),
        "packs": ("packs", ","),
        "fill_rate": ("fill", ".1%"),
        "micro_step_imbalance": ("micro-step\nmax / mean", ".3f"),
        "step_imbalance": ("step\nmax / mean", ".3f"),
        "documents_cut": ("documents\ncut", ","),
        "mean_delay": ("mean delay\nin steps", ".2f"),
        "time_error": ("time\nerror", ".1%"),
        "seconds": ("packing\ns", ".2f"),
    }
    rows = [
        {"corpus": cell["corpus"], "method": name, **row}
        for cell in found["cells"]
        for name, row in cell["methods"].items()
    ]
    return (
        f"{found['steps']} steps of {found['dp_size']} groups x {found['gradient_accumulation_steps']} packs of "
        f"{found['window']:,} tokens, look-ahead {found['look_ahead']} steps; times predicted for Llama 3 8B on "
        f"H100s, cp_size {found['cp_size']}\n\n" + records_table(columns, rows)
    )
