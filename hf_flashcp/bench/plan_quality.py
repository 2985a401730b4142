"""How much KV every strategy moves, how evenly, and how long it plans, beside the lower bound."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, median
from typing import Any

from ..data.lengths import sample_pack
from ..plan import ShardPlan, Topology
from ..planning import STRATEGIES, plan_documents
from ..planning.lower_bound import kv_lower_bound


Planner = Callable[[Sequence[int], int], ShardPlan]
"""From lengths and cp_size to a plan."""


LINKS = ("intra_node", "inter_node")


def plan_quality(plan: ShardPlan, topology: Topology | None = None) -> dict[str, Any]:
    """What is compared of a plan, from its [`ShardPlan.report`] for full attention.

    Returns:
        `dict`: `kv_total` and `bottleneck` (the largest received or sent of a rank), in tokens; `pair_imbalance` and
        `token_imbalance` (max / mean over ranks); `tokens_equal` (within one); `slices` of all ranks. With a topology
        also `intra_node` and `inter_node`, the parts of the bottleneck: the largest received or sent of a rank inside
        its node, and from or to others; and `inter_node_total`.
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
    topology: Topology | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Plans drawn packs with every strategy, in every cell: corpus, window and number of ranks.

    Args:
        corpora: one or more of `hf_flashcp.data.lengths.LENGTH_DISTRIBUTIONS`.
        windows: tokens of a packed row.
        cp_sizes: numbers of ranks.
        packs: packs drawn in each cell, with the seeds from `seed` on; the same for all strategies and `cp_sizes`.
        max_imbalance: cap on attention pairs, max / mean over ranks.
        max_token_imbalance: cap on tokens, likewise; 1.0 for equal within one.
        others: planners beside the strategies, by name.
        topology: ranks in nodes, to count apart what travels between nodes.
        progress: a bar on stderr if that is a terminal and the run takes longer than a second or two.

    Returns:
        `dict`, JSON-serializable: the arguments; `cells`, each with mean `documents`, mean `kv_bound` (tokens) and by
        strategy, in `strategies`, the means of [`plan_quality`]'s figures with

        - `bound_ratio`: KV of the packs planned within the caps over their lower bound (`None` if none is, or if the
          bound is 0),
        - `within_caps`: the share of packs planned within the caps, beyond which the bound says nothing,
        - `plan_ms`: median milliseconds that a core spent planning (a pack that this process planned before may come
          from a cache);

        and `summary` by strategy: geometric means of `bound_ratio`, `kv_fraction` and `bottleneck_fraction` (multiples
        of the window) over the `summary_cells` cells with a bound above 0, where no plan within the caps is free
        (`None` where a strategy has no figure, or 0), means and medians over all cells of the others.

    Raises:
        PlanError: an unknown corpus or strategy, a window, cp_size or cap that cannot be planned.
    """
    corpora = [corpora] if isinstance(corpora, str) else list(corpora)
    caps = {"max_imbalance": max_imbalance, "max_token_imbalance": max_token_imbalance}
    planners = {name: _strategy(name, caps) for name in strategies} | dict(others or {})
    grid = list(itertools.product(corpora, windows, cp_sizes))
    cells = []
    with _progress_bar(len(grid) * packs, progress) as bar:
        for corpus, window, cp_size in grid:
            drawn = [sample_pack(corpus, window, seed=seed + index) for index in range(packs)]
            bounds, found = [], {name: [] for name in planners}
            for lengths in drawn:
                bounds.append(kv_lower_bound(lengths, cp_size, **caps))
                for name, planner in planners.items():
                    begin = time.process_time()
                    plan = planner(lengths, cp_size)
                    seconds = time.process_time() - begin
                    found[name].append({**plan_quality(plan, topology), "plan_ms": 1000 * seconds})
                bar.update()
            cells.append(
                {
                    "corpus": corpus,
                    "window": window,
                    "cp_size": cp_size,
                    "documents": mean(map(len, drawn)),
                    "kv_bound": mean(bounds),
                    "strategies": {name: _row(rows, bounds, **caps) for name, rows in found.items()},
                }
            )
    bounded = [cell for cell in cells if cell["kv_bound"] > 0]
    return {
        "corpora": corpora,
        "windows": list(windows),
        "cp_sizes": list(cp_sizes),
        "packs": packs,
        "seed": seed,
        **caps,
        "cells": cells,
        "ranks_per_node": None if topology is None else topology.ranks_per_node,
        "summary_cells": len(bounded),
        "summary": {name: _summary(name, cells, bounded) for name in planners},
    }


def _strategy(name: str, caps: dict[str, float]) -> Planner:
    return lambda lengths, cp_size: plan_documents(lengths, cp_size, strategy=name, **caps)


def _progress_bar(steps: int, shown: bool):
    from tqdm import tqdm

    return tqdm(total=steps, desc="packs", delay=1, leave=False, disable=None if shown else True)


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
        "bound_ratio": _geometric_mean([row["bound_ratio"] for row in moved]),
        "kv_fraction": _geometric_mean([row["kv_total"] / row["window"] for row in moved]),
        "bottleneck_fraction": _geometric_mean([row["bottleneck"] / row["window"] for row in moved]),
        **{key: mean(row[key] for row in rows) for key in ("pair_imbalance", "token_imbalance", "slices")},
        "within_caps": mean(row["within_caps"] for row in rows),
        "plan_ms": median(row["plan_ms"] for row in rows),
    }


def _geometric_mean(values: Sequence[float | None]) -> float | None:
    if not values or not all(values):
        return None
    return math.exp(mean(map(math.log, values)))


def text(found: dict[str, Any]) -> str:
    """Two tables for a terminal: every cell's KV in total and of its busiest rank, in windows; and the summary. With a
    topology one, of what travels inside nodes and between them."""
    if found["ranks_per_node"] is not None:
        return _nodes_text(found)
    names = list(found["summary"])
    width = max(14, *(len(name) + 2 for name in names))
    lines = [
        f"{found['packs']} packs a cell, attention pairs at most {found['max_imbalance']:g} x the mean, tokens "
        + ("equal" if found["max_token_imbalance"] == 1 else f"at most {found['max_token_imbalance']:g} x the mean"),
        "KV moved in all / largest received or sent of a rank, both in multiples of the window",
        "",
        f"{'corpus':13}{'window':>9}{'ranks':>7}{'documents':>11}{'bound':>8}"
        + "".join(f"{name:>{width}}" for name in names),
    ]
    for cell in found["cells"]:
        window = cell["window"]
        costs = [
            f"{row['kv_total'] / window:.2f} /{row['bottleneck'] / window:5.2f}" for row in cell["strategies"].values()
        ]
        lines.append(
            f"{cell['corpus']:13}{window:9,}{cell['cp_size']:7}{cell['documents']:11.0f}"
            f"{cell['kv_bound'] / window:8.2f}" + "".join(f"{cost:>{width}}" for cost in costs)
        )
    lines += [
        "",
        f"all cells; first three columns: geometric means over the {found['summary_cells']} with a bound above 0",
        "",
        f"{'':14}{'KV moved':>9}{'KV moved':>10}{'largest':>10}{'imbalance':>15}{'':>9}{'within':>8}{'plan':>9}",
        f"{'strategy':14}{'/ bound':>9}{'/ window':>10}{'/ window':>10}{'pairs':>8}{'tokens':>7}{'slices':>9}"
        f"{'caps':>8}{'ms':>9}",
    ]
    for name, row in found["summary"].items():
        lines.append(
            f"{name:14}{_number(row['bound_ratio'], 9)}{_number(row['kv_fraction'], 10)}"
            f"{_number(row['bottleneck_fraction'], 10)}{row['pair_imbalance']:8.3f}{row['token_imbalance']:7.3f}"
            f"{row['slices']:9,.0f}{row['within_caps']:8.0%}{row['plan_ms']:9.2f}"
        )
    return "\n".join(lines)


def _nodes_text(found: dict[str, Any]) -> str:
    parts = (*LINKS, "inter_node_total")
    lines = [
        f"{found['packs']} packs a cell, nodes of {found['ranks_per_node']} ranks; KV in multiples of the window",
        "intra, inter: largest received or sent of a rank in its node, and from or to others; all inter: of all ranks",
        "",
        f"{'':40}" + "".join(f"{name:>35}" for name in found["summary"]),
        f"{'corpus':13}{'window':>9}{'ranks':>7}{'documents':>11}"
        + len(found["summary"]) * f"{'intra':>9}{'inter':>8}{'all inter':>11}{'ms':>7}",
    ]
    means: dict[str, list[list[float]]] = {name: [] for name in found["summary"]}
    for cell in found["cells"]:
        line = f"{cell['corpus']:13}{cell['window']:9,}{cell['cp_size']:7}{cell['documents']:11.0f}"
        for name, row in cell["strategies"].items():
            means[name].append([*(row[part] / cell["window"] for part in parts), row["plan_ms"]])
            line += _node_columns(*means[name][-1])
        lines.append(line)
    lines.append(f"{'means':40}" + "".join(_node_columns(*map(mean, zip(*rows))) for rows in means.values()))
    return "\n".join(lines)


def _node_columns(inside: float, between: float, total: float, milliseconds: float) -> str:
    return f"{inside:9.3f}{between:8.3f}{total:11.2f}{milliseconds:7.1f}"


def _number(value: float | None, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.3f}"
