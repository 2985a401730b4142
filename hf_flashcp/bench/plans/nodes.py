"""Predicted steps on several nodes: the effects of sending KV to each node once, and of plans that know the nodes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from statistics import geometric_mean, mean
from typing import Any

from tqdm import tqdm

from ...data.lengths import sample_pack
from ...plan import ShardPlan, Topology
from ...planning import plan_documents
from ...planning.explanation import seconds_bound
from ...predict import CostModel, HardwareProfile
from ...predict.model_shape import LLAMA_3_8B
from ...tables import counted, records_table
from ..arguments import with_arguments
from .plan_quality import mean_ratio


DIRECTLY, ONCE, PLANNED, BOTH = "directly", "once per node", "planned for nodes", "both"
TIMED = "search, timed"
VARIANTS = (DIRECTLY, ONCE, PLANNED, BOTH, TIMED)


@with_arguments("packs", "tokens")
def measure(
    corpora: Sequence[str],
    cp_sizes: Sequence[int],
    tokens: int,
    packs: int,
    *,
    config: Any = LLAMA_3_8B,
    hardware: str = "h100",
) -> dict[str, Any]:
    """Predict the steps of plans that `search` makes for little KV, and of those that it makes with a cost model.

    A cell has, for each of the `VARIANTS`, means over packs of

    - `inter_node`: tokens that the busiest rank receives from other nodes, or sends to them, in a layer's forward;
    - `exposed`: the share of the step that the rank with the longest wait spends waiting;
    - `step_seconds`: the seconds of the step;

    and two geometric means of the step's time: `over_directly` is relative to `DIRECTLY`, and `over_bound` to the
    lower bound of plans within the caps (`None` if a plan is beyond them).
    """
    profile = HardwareProfile.load(hardware)
    model, topology = CostModel.from_config(config, profile), Topology(profile.ranks_per_node)
    cells = []
    for corpus, cp_size in tqdm([*itertools.product(corpora, cp_sizes)], unit="cell", leave=False, disable=None):
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
        for seed in range(packs):
            lengths = sample_pack(corpus, cp_size * tokens, seed=seed)
            flat, planned = (plan_documents(lengths, cp_size, topology=one) for one in (None, topology))
            plans = flat, flat.with_ranks_per_node(profile.ranks_per_node), planned.with_ranks_per_node(None), planned
            timed = plan_documents(lengths, cp_size, cost_model=model)
            for name, plan in zip(VARIANTS, (*plans, timed)):
                rows[name].append(_step(plan, model, topology))
        variants = {name: _means(found, rows[DIRECTLY]) for name, found in rows.items()}
        cells.append({"corpus": corpus, "cp_size": cp_size, "window": cp_size * tokens, "variants": variants})
    return {"hardware": profile.description, "cells": cells}


def _step(plan: ShardPlan, model: CostModel, topology: Topology) -> dict[str, Any]:
    report, time, bound = plan.report(topology=topology), model.step_time(plan), seconds_bound(plan, model)
    return {
        "inter_node": max(report["inter_node_received"] + report["inter_node_sent"]),
        "exposed": float(time.exposed.max()) / time.seconds,
        "step_seconds": time.seconds,
        "over_bound": None if bound is None else time.seconds / bound,
    }


def _means(found: list[dict[str, Any]], directly: list[dict[str, Any]]) -> dict[str, Any]:
    over = geometric_mean(row["step_seconds"] / other["step_seconds"] for row, other in zip(found, directly))
    means = {key: mean(row[key] for row in found) for key in ("inter_node", "exposed", "step_seconds")}
    return {**means, "over_directly": over, "over_bound": mean_ratio(row["over_bound"] for row in found)}


def text(found: dict[str, Any]) -> str:
    """Return a table with one row per variant of each cell."""
    columns = {
        "corpus": ("corpus", ""),
        "cp_size": ("ranks", ","),
        "window": ("window", ","),
        "plans": ("plans", ""),
        "step_seconds": ("step ms", "ms:,.0f"),
        "over_directly": ("/ directly", ".2f"),
        "over_bound": ("/ bound", ".2f"),
        "inter_node": ("between nodes", ".3f"),
        "exposed": ("waiting", ".1%"),
    }
    rows = [
        {**cell, "plans": name, **row, "inter_node": row["inter_node"] / cell["window"]}
        for cell in found["cells"]
        for name, row in cell["variants"].items()
    ]
    return (
        f"{found['hardware']}\n{counted(found['packs'], 'pack')} per cell, {found['tokens']:,} tokens per rank; "
        "between nodes: tokens of the busiest rank / window\n\n" + records_table(columns, rows)
    )
