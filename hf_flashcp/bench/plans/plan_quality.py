"""Compares KV traffic, balance and planning time of every strategy with each other and with the lower bound."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import geometric_mean, mean, median
from typing import Any

from tqdm import tqdm

from ...data.lengths import sample_pack
from ...plan import ShardPlan, Topology
from ...planning import STRATEGIES, plan_documents
from ...planning.lower_bound import kv_lower_bound
from ...tables import counted, records_table
from ..arguments import with_arguments


Planner = Callable[[Sequence[int], int], ShardPlan]
"""A function that plans documents of the given lengths on `cp_size` ranks."""


LINKS = ("intra_node", "inter_node")


def plan_quality(plan: ShardPlan, topology: Topology | None = None) -> dict[str, Any]:
    """Return the figures by which plans are compared, from [`ShardPlan.report`] for full attention.

    They are KV in tokens, imbalances, the number of slices, and `tokens_equal`: do ranks differ by at most one token?
    `bottleneck` is the most KV that any rank receives or sends. With a topology there is also the most KV that any
    rank receives or sends within its node (`intra_node`) and from or to other nodes (`inter_node`).
    """
    report = plan.report(topology=topology)
    by_link = {}
    if topology is not None:
        by_link = {link: max(report[f"{link}_received"] + report[f"{link}_sent"]) for link in LINKS}
        by_link["inter_node_total"] = sum(report["inter_node_received"])
    return {
        **by_link,
        **{key: report[key] for key in ("kv_total", "pair_imbalance", "token_imbalance")},
        "bottleneck": max(report["kv_received"] + report["kv_sent"]),
        "tokens_equal": max(report["tokens"]) - min(report["tokens"]) <= 1,
        "slices": sum(map(len, plan.slices)),
    }


@with_arguments("windows", "cp_sizes", "packs", "seed", "max_imbalance", "max_token_imbalance", "ranks_per_node")
def measure(
    corpora: str | Sequence[str],
    windows: Sequence[int],
    cp_sizes: Sequence[int],
    packs: int,
    strategies: Sequence[str] = STRATEGIES,
    *,
    max_imbalance: float = 1.05,
    max_token_imbalance: float = 1.0,
    seed: int = 0,
    others: Mapping[str, Planner] | None = None,
    least_total: bool = False,
    ranks_per_node: int | None = None,
) -> dict[str, Any]:
    """Plan random packs with every strategy, for every cell: a corpus, a window and a number of ranks.

    The seeds of the packs count up from `seed`, and are the same for all strategies and `cp_sizes`. `others` are
    further planners, by name. With `least_total`, a `search` that minimizes total KV is compared as well. With
    `ranks_per_node`, only `search` without and with a topology are compared.

    A cell has means over packs, the lower bound `kv_bound`, and for each strategy `within_caps`, the share of plans
    within the caps, and `bound_ratio`, the KV that those plans send divided by their lower bounds. `summary` has means
    over cells, which are geometric for ratios.
    """
    corpora = [corpora] if isinstance(corpora, str) else list(corpora)
    caps = {"max_imbalance": max_imbalance, "max_token_imbalance": max_token_imbalance}
    plan = functools.partial(plan_documents, **caps)
    planners: dict[str, Planner] = {name: functools.partial(plan, strategy=name) for name in strategies}
    topology = None if ranks_per_node is None else Topology(ranks_per_node)
    if topology is not None:
        planners = {"search": plan, "with topology": functools.partial(plan, topology=topology)}
    elif least_total:
        planners["least total"] = functools.partial(plan, minimize_total=True)
    planners |= dict(others or {})
    cells = []
    grid = [*itertools.product(corpora, windows, cp_sizes)]
    for corpus, window, cp_size in tqdm(grid, unit="cell", delay=1, leave=False, disable=None):
        drawn = [sample_pack(corpus, window, seed=seed + index) for index in range(packs)]
        bounds = [kv_lower_bound(lengths, cp_size, **caps) for lengths in drawn]
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in planners}
        for lengths in drawn:
            for name, planner in planners.items():
                begin = time.process_time()
                made = planner(lengths, cp_size)
                seconds = time.process_time() - begin
                found[name].append({**plan_quality(made, topology), "plan_ms": 1000 * seconds})
        cell = {"corpus": corpus, "window": window, "cp_size": cp_size}
        cell |= {"documents": mean(map(len, drawn)), "kv_bound": mean(bounds)}
        cells.append({**cell, "strategies": {name: _row(rows, bounds, **caps) for name, rows in found.items()}})
    bounded = [cell for cell in cells if cell["kv_bound"] > 0]
    return {
        "corpora": corpora,
        "cells": cells,
        "summary_cells": len(bounded),
        "summary": {name: _summary(name, cells, bounded) for name in planners},
    }


def _row(plans: list[dict[str, Any]], bounds: list[int], max_imbalance: float, max_token_imbalance: float):
    within = [
        plan["pair_imbalance"] <= max_imbalance
        and (plan["tokens_equal"] or plan["token_imbalance"] <= max_token_imbalance)
        for plan in plans
    ]
    least = sum(itertools.compress(bounds, within))
    moved = sum(plan["kv_total"] for plan in itertools.compress(plans, within))
    return {
        **{key: mean(plan[key] for plan in plans) for key in plans[0] if key not in ("tokens_equal", "plan_ms")},
        "bound_ratio": moved / least if least else None,
        "within_caps": mean(within),
        "plan_ms": median(plan["plan_ms"] for plan in plans),
    }


def _summary(name: str, cells: list[dict[str, Any]], bounded: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [cell["strategies"][name] for cell in cells]
    moved = [cell["strategies"][name] | {"window": cell["window"]} for cell in bounded]
    return {
        "bound_ratio": mean_ratio([row["bound_ratio"] for row in moved]),
        "kv_fraction": mean_ratio([row["kv_total"] / row["window"] for row in moved]),
        "bottleneck_fraction": mean_ratio([row["bottleneck"] / row["window"] for row in moved]),
        **{key: mean(row[key] for row in rows) for key in ("pair_imbalance", "token_imbalance", "slices")},
        "within_caps": mean(row["within_caps"] for row in rows),
        "plan_ms": median(row["plan_ms"] for row in rows),
    }


def mean_ratio(values: Iterable[float | None]) -> float | None:
    """Return the geometric mean of ratios, or `None` if there are none or one of them is unknown."""
    ratios = list(values)
    known = [ratio for ratio in ratios if ratio]
    return geometric_mean(known) if known and len(known) == len(ratios) else None


def text(found: dict[str, Any]) -> str:
    """Return two tables: KV in total and of the busiest rank for every cell, in multiples of the window; the summary.

    With nodes, return one table of the KV that is sent within and between nodes.
    """
    if found["ranks_per_node"] is not None:
        return _nodes_text(found)
    tokens = found["max_token_imbalance"]
    return (
        f"{counted(found['packs'], 'pack')} per cell, attention pairs at most {found['max_imbalance']:g} x the mean, "
        f"tokens {'equal' if tokens == 1 else f'at most {tokens:g} x the mean'}\n"
        "KV moved in total / most that any rank receives or sends, both in multiples of the window\n\n"
        f"{_cells_table(found)}\n\nall cells; first three columns: geometric means over the {found['summary_cells']} "
        f"cells with a bound above 0\n\n{_summary_table(found['summary'])}"
    )


_CELL = {
    "corpus": ("corpus", ""),
    "window": ("window", ","),
    "cp_size": ("ranks", ","),
    "documents": ("documents", ".0f"),
}


def _cells_table(found: dict[str, Any]) -> str:
    records = []
    for cell in found["cells"]:
        window = cell["window"]
        costs = {
            name: f"{row['kv_total'] / window:.2f} /{row['bottleneck'] / window:5.2f}"
            for name, row in cell["strategies"].items()
        }
        records.append({**cell, "bound": cell["kv_bound"] / window, **costs})
    return records_table(
        {**_CELL, "bound": ("bound", ".2f"), **{name: (name, ">") for name in found["summary"]}}, records
    )


def _summary_table(summary: dict[str, Any]) -> str:
    columns = {
        "strategy": ("strategy", ""),
        "bound_ratio": ("KV moved\n/ bound", ".3f"),
        "kv_fraction": ("KV moved\n/ window", ".3f"),
        "bottleneck_fraction": ("largest\n/ window", ".3f"),
        "pair_imbalance": ("imbalance\nof pairs", ".3f"),
        "token_imbalance": ("imbalance\nof tokens", ".3f"),
        "slices": ("slices", ",.0f"),
        "within_caps": ("within\ncaps", ".0%"),
        "plan_ms": ("plan\nms", ".2f"),
    }
    return records_table(columns, [{"strategy": name, **row} for name, row in summary.items()])


def _nodes_text(found: dict[str, Any]) -> str:
    columns = {
        **_CELL,
        "plans": ("plans", ""),
        "intra_node": ("intra", ".3f"),
        "inter_node": ("inter", ".3f"),
        "inter_node_total": ("all inter", ".2f"),
        "plan_ms": ("ms", ".1f"),
    }
    figures = list(columns)[-4:]
    rows = [
        {**cell, "plans": name, **row, **{key: row[key] / cell["window"] for key in figures[:-1]}}
        for cell in found["cells"]
        for name, row in cell["strategies"].items()
    ]
    means = [
        {"corpus": "means", "window": "", "cp_size": "", "documents": "", "plans": name}
        | {key: mean(row[key] for row in rows if row["plans"] == name) for key in figures}
        for name in found["summary"]
    ]
    return (
        f"{counted(found['packs'], 'pack')} per cell, nodes of {found['ranks_per_node']} ranks; KV in windows\n"
        "intra, inter: most KV that any rank receives or sends within its node, and from or to other nodes; "
        "all inter: sum over ranks\n\n" + records_table(columns, rows + means)
    )
