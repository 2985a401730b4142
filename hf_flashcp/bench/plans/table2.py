"""Traffic that each strategy saves on random packs, compared with Table 2 of the FlashCP paper."""

from __future__ import annotations

from statistics import mean
from typing import Any

from ...data.lengths import sample_pack
from ...plan import ShardPlan
from ...planning import STRATEGIES, plan_documents
from ...simulation.baselines import shared_tokens
from ...tables import records_table
from ..arguments import with_arguments


PAPER = {"flashcp": {"saved_eq5": 0.28, "pair_imbalance": 1.04}, "ilp": {"saved_eq5": 0.36, "pair_imbalance": 1.00}}
"""Table 2 of arXiv 2606.08476 (Pile, four ranks). ILP is the paper's integer program, which we do not implement."""


def padded_all_gather_fraction(plan: ShardPlan) -> float:
    """Return FlashCP eq. 5 / eq. 4: the traffic of an all-gather in which ranks pad to the largest contribution."""
    return shared_tokens(plan) * plan.cp_size / plan.num_tokens


@with_arguments("corpus", "window", "cp_size", "packs")
def measure(corpus: str, window: int, cp_size: int, packs: int, seed: int = 0) -> dict[str, Any]:
    """Plan random packs with every strategy, and return means over packs.

    They are the saved share of an all-gather's traffic, with a padded exchange (eq. 5) and with an exact exchange; the
    imbalances (max / mean over ranks); and the planning time.
    """
    drawn = [sample_pack(corpus, window, seed=seed + index) for index in range(packs)]
    rows = {}
    for strategy in STRATEGIES:
        plans = [plan_documents(lengths, cp_size, strategy=strategy) for lengths in drawn]
        reports = [plan.report() for plan in plans]
        rows[strategy] = {
            "saved_eq5": mean(1 - padded_all_gather_fraction(plan) for plan in plans),
            "saved_exact": mean(1 - report["kv_fraction"] for report in reports),
            "pair_imbalance": mean(report["pair_imbalance"] for report in reports),
            "token_imbalance": mean(report["token_imbalance"] for report in reports),
            "plan_ms": 1000 * mean(plan.planning_seconds for plan in plans),
        }
    return {"documents": mean(map(len, drawn)), "strategies": rows, "paper": PAPER}


def text(found: dict[str, Any]) -> str:
    """Return a table with one row per strategy, followed by the paper's rows."""
    columns = {
        "strategy": ("strategy", ""),
        "saved_eq5": ("traffic saved\nby eq. 5", ".1%"),
        "saved_exact": ("traffic saved\nexactly", ".1%"),
        "pair_imbalance": ("imbalance of\nattention", ".3f"),
        "token_imbalance": ("imbalance of\ntokens", ".3f"),
        "plan_ms": ("plan ms", ".2f"),
    }
    rows = {**found["strategies"], **{f"paper: {name}": row for name, row in found["paper"].items()}}
    return (
        f"{found['packs']} packs of {found['window']:,} tokens like {found['corpus']} "
        f"({found['documents']:.0f} documents each), {found['cp_size']} ranks; means, imbalances are max / mean\n\n"
        + records_table(columns, [{"strategy": name, **row} for name, row in rows.items()])
    )
