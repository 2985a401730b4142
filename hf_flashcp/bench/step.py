"""Times a whole training step under each strategy and exchange, and on a single process.

All cases run in turn, round after round, on the same processes of one machine, so that other load on the machine
affects all of them equally. A step shards a packed batch, runs the model forward and backward under DDP, clips the
gradient and updates with AdamW. The ideal is the time of the step on one process, with the same kernels, divided by
the number of ranks. On CPU, one more round with PyTorch's profiler shows how a step divides its time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from ..data.lengths import sample_pack
from ..distributed.workers import WorkerFailure, WorkerPool
from ..errors import ConfigurationError, FlashCPError
from ..planning import STRATEGIES, plan_documents
from ..tables import counted, records_table
from .arguments import with_arguments
from .step_worker import run_turn
from .traces import PARTS


QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": True,
}
"""Config of the model that is trained by default."""

QWEN3_5 = {
    "model_type": "qwen3_5_text",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
"""Config of a hybrid model: three layers with a gated delta rule, and one with attention."""

MODELS = {"small-qwen3": QWEN3, "small-qwen3_5": QWEN3_5}
"""The configs by the names that the command takes."""

EXCHANGES = ("needed", "staged", "all")
"""Ways to exchange KV.

"needed" sends the needed KV in one stage, "staged" sends it in one stage per other rank, and "all" sends all KV, as an
all-gather does.
"""

SINGLE = "single process"
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2}
"""Relative tolerance, for each dtype, between losses and gradient norms of a case and of the single process."""

_WARM_UP = 2


@with_arguments("window", "cp_size", "config", "dtype", "device", "threads", "rounds")
def measure(
    corpora: Sequence[str],
    window: int,
    cp_size: int,
    *,
    config: dict[str, Any] = QWEN3,
    strategies: Sequence[str] = tuple(name for name in STRATEGIES if name != "whole_doc"),
    exchanges: Sequence[str] = EXCHANGES,
    lengths: Sequence[int] | None = None,
    dtype: str = "fp32",
    device: str = "cpu",
    threads: int = 1,
    rounds: int = 5,
) -> dict[str, Any]:
    """Train on one pack of each corpus, or on one of documents with the given `lengths` instead.

    The first case of every pack is the single process.

    `ideal_share` is the median over rounds of the single process's time / cp_size / the case's time. On CPU there is
    more: `cpu_ideal_share` is the same for the CPU seconds of the busiest rank, which leave out waiting and other
    programs; `shares` has the share of the ranks' time in each of `PARTS`, from a round with the profiler; and `layer`
    has the result of [`layer_bars`] on each rank in that round, for the first corpus, the last strategy and the first
    exchange.
    """
    names = [
        (strategy, exchange)
        for strategy in strategies
        for exchange in exchanges
        if exchange != "staged" or cp_size > 2 or "needed" not in exchanges
    ]
    if device == "cuda" and torch.cuda.device_count() < cp_size:
        raise ConfigurationError(
            f"--cp-size {cp_size} needs {cp_size} GPUs, but PyTorch sees {torch.cuda.device_count()}. Pass a smaller "
            "--cp-size, or --device cpu."
        )
    setting = (json.dumps(config), dtype, device, threads)
    packs: list[dict[str, Any]] = []
    layer = None
    drawn = {"lengths": lengths} if lengths else {corpus: sample_pack(corpus, window) for corpus in corpora}
    turns = len(drawn) * (_WARM_UP + rounds + 1)
    pool = WorkerPool("spawn") if device == "cuda" else WorkerPool()
    with pool, tqdm(total=turns, unit="round", leave=False, disable=None) as bar:
        for corpus, documents in drawn.items():
            cases = [(plan_documents(documents, 1), False)]
            for strategy, exchange in names:
                stages = cp_size - 1 if exchange == "staged" else None
                plan = plan_documents(documents, cp_size, strategy=strategy, num_stages=stages)
                cases.append((plan, exchange == "all"))
            found = []
            for turn in range(_WARM_UP + rounds + 1):
                bar.set_description(corpus)
                order = [(place + turn) % len(cases) for place in range(len(cases))]
                found.append(_run(pool, cp_size, setting, cases, order, turn == _WARM_UP + rounds))
                bar.update()
            if layer is None and device == "cpu":
                place, name = next((place, name) for place, name in enumerate(names, 1) if name[0] == strategies[-1])
                layer = {"corpus": corpus, "strategy": name[0], "exchange": name[1]}
                layer["ranks"] = _from_zero([rank[place]["layer"] for rank in found[-1]])
            rows = _cases([(SINGLE, None), *names], found[_WARM_UP:], sum(documents), cp_size)
            check_agreement(rows, TOLERANCES[dtype])
            packs.append({"corpus": corpus, "lengths": list(documents), "cases": rows})
    return {"packs": packs, "layer": layer}


def _run(pool: WorkerPool, cp_size: int, *arguments: Any) -> list[dict[int, Any]]:
    try:
        return pool.run(cp_size, run_turn, *arguments, timeout=3600)
    except WorkerFailure as failure:
        for error in failure.errors:
            if isinstance(error, FlashCPError):
                raise error from None
        raise


def _cases(names: list[tuple], turns: list[list[dict[int, Any]]], tokens: int, cp_size: int) -> list[dict[str, Any]]:
    """Return one row per case from the figures of every rank in every turn; the last turn has the profiler's."""
    *timed, profiled = turns
    seconds, cpu_seconds = (
        [[max(rank[index][key] for rank in turn if index in rank) for turn in timed] for index in range(len(names))]
        for key in ("seconds", "cpu_seconds")
    )
    cases = []
    for index, (strategy, exchange) in enumerate(names):
        ranks = [rank[index] for rank in profiled if index in rank]
        used = len(ranks)
        case = {
            "strategy": strategy,
            "exchange": exchange,
            "seconds": median(seconds[index]),
            "tokens_per_second": tokens / median(seconds[index]),
            "ideal_share": _ideal_share(seconds, index, used),
            "peak_bytes": max(rank["peak"] for rank in ranks),
            "loss": sum(rank["loss"] for rank in ranks) / used,
            "grad_norm": ranks[0]["grad_norm"],
        }
        if "parts" in ranks[0]:
            case["cpu_ideal_share"] = _ideal_share(cpu_seconds, index, used)
            whole = sum(sum(rank["parts"].values()) for rank in ranks)
            case["shares"] = {part: sum(rank["parts"][part] for rank in ranks) / whole for part in PARTS}
            case["profiled_seconds"] = max(rank["seconds"] for rank in ranks)
        cases.append(case)
    return cases


def _ideal_share(seconds: list[list[float]], index: int, ranks: int) -> float:
    """Return the median over rounds of the single process's time / ranks / the case's time."""
    return median(alone / ranks / taken for alone, taken in zip(seconds[0], seconds[index]))


def _from_zero(ranks: list[dict[str, list]]) -> list[dict[str, list]]:
    start = min(begin for rank in ranks for _, begin, _ in rank["forward"])
    return [
        {name: [[bar, begin - start, end - start] for bar, begin, end in bars] for name, bars in rank.items()}
        for rank in ranks
    ]


def check_agreement(cases: list[dict[str, Any]], tolerance: float) -> None:
    """Check that all cases computed the same step, because otherwise their times could not be compared."""
    for case in cases:
        for what in ("loss", "grad_norm"):
            assert math.isclose(case[what], cases[0][what], rel_tol=tolerance), (
                f"{what} of {case['strategy']}, {case['exchange']}: {case[what]}, single process: {cases[0][what]}"
            )


def text(found: dict[str, Any]) -> str:
    """Return one table per pack."""
    config = found["config"]
    parts = [
        f"{config['model_type']}, {config['num_hidden_layers']} layers of {config['hidden_size']}, {found['dtype']}; "
        f"{counted(sum(found['packs'][0]['lengths']), 'token')}, {found['cp_size']} processes, "
        f"{counted(found['threads'], 'thread')} each, {found['device']}; medians of {found['rounds']} rounds"
    ]
    columns = {
        "strategy": ("strategy", ""),
        "exchange": ("exchange", ""),
        "tokens_per_second": ("tokens/s", ",.0f"),
        "seconds": ("ms", "ms:.1f"),
        "ideal_share": ("of ideal", ".1%"),
        "cpu_ideal_share": ("CPU time", ".1%"),
        "peak_bytes": ("peak MiB", "MiB:.1f"),
        **{part: (part, ".1%") for part in PARTS},
    }
    for pack in found["packs"]:
        rows = [{**case, **case.get("shares", {})} for case in pack["cases"]]
        documents = counted(len(pack["lengths"]), "document")
        longest = counted(max(pack["lengths"]), "token")
        parts.append(f"{pack['corpus']}: {documents}, the longest of {longest}\n{records_table(columns, rows)}")
    return "\n\n".join(parts)
