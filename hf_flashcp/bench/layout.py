"""Times the construction of a rank's index maps, which happens once per batch, and once per sliding window."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from ..data.lengths import sample_pack
from ..layout import RankLayout
from ..plan import ShardPlan
from ..planning import plan_documents
from ..tables import records_table
from .arguments import with_arguments


@with_arguments("corpus", "tokens_per_rank", "cp_sizes", "sliding_window", "ranks_per_node", "rounds")
def measure(
    corpus: str,
    tokens_per_rank: int,
    cp_sizes: Sequence[int],
    strategies: Sequence[str],
    sliding_window: int,
    ranks_per_node: int | None,
    rounds: int,
) -> dict[str, Any]:
    """Time the construction of the maps for full attention and for a sliding window, on the CPU.

    `full` and `window` are medians over rounds on the slowest rank, in seconds of one core, which other load on the
    machine hardly changes. Every time, the plan is as a data loader worker sends it, without anything that was counted
    before.
    """
    cases = []
    for cp_size in cp_sizes:
        lengths = sample_pack(corpus, tokens_per_rank * cp_size)
        for strategy in strategies:
            plan = plan_documents(lengths, cp_size, strategy=strategy).with_ranks_per_node(ranks_per_node)
            ranks = [_seconds(plan, rank, sliding_window, rounds) for rank in range(cp_size)]
            slowest = {name: max(rank[name] for rank in ranks) for name in ("full", "window")}
            cases.append(
                {
                    "tokens": plan.num_tokens,
                    "cp_size": cp_size,
                    "strategy": strategy,
                    "slices": sum(map(len, plan.slices)),
                    **slowest,
                }
            )
    return {"cases": cases}


def _seconds(plan: ShardPlan, rank: int, sliding_window: int, rounds: int) -> dict[str, float]:
    spans: dict[str, list[float]] = {"full": [], "window": []}
    for _ in range(rounds + 1):
        for name, window in (("full", None), ("window", sliding_window)):
            fresh, begin = copy.copy(plan), time.thread_time()
            RankLayout(fresh, rank, window).stages(torch.device("cpu"))
            spans[name].append(time.thread_time() - begin)
    return {name: median(each[1:]) for name, each in spans.items()}


def text(found: dict[str, Any]) -> str:
    """Return a table with one row per size and strategy."""
    columns = {
        "tokens": ("tokens", ","),
        "cp_size": ("ranks", ","),
        "strategy": ("strategy", ""),
        "slices": ("slices", ","),
        "full": ("full\nms", "ms:.2f"),
        "window": ("window\nms", "ms:.2f"),
    }
    nodes = "" if found["ranks_per_node"] is None else f", {found['ranks_per_node']} ranks per node"
    return (
        f"index maps of a batch like {found['corpus']}, for full attention and a sliding window of "
        f"{found['sliding_window']:,}{nodes}; "
        f"CPU time of the slowest rank, medians of {found['rounds']} rounds\n\n"
        + records_table(columns, found["cases"])
    )
