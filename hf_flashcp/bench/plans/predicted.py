"""Predicted attention time of every strategy, relative to the ideal: one device's time / number of ranks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from statistics import geometric_mean, mean, median
from typing import Any

from tqdm import tqdm

from ...data.lengths import sample_pack
from ...plan import Topology
from ...planning import STRATEGIES, plan_documents
from ...predict import CostModel, HardwareProfile
from ...predict.model_shape import LLAMA_3_8B
from ...tables import table
from ..arguments import with_arguments


TIMED = "search, timed"
"""Name of the plans that `search` makes with a cost model."""


@with_arguments("corpora", "window", "cp_sizes", "packs", "seed")
def measure(
    corpora: Sequence[str],
    window: int,
    cp_sizes: Sequence[int],
    packs: int,
    *,
    config: Any = LLAMA_3_8B,
    hardware: str | HardwareProfile = "h100",
    seed: int = 0,
) -> dict[str, Any]:
    """Plan random packs and predict their steps, with the hardware's nodes and with one rank per node.

    For each strategy, a cell has means over packs of `attention` (attention and waiting on the slowest rank, relative
    to the ideal), `exposed` (the longest wait of any rank, relative to the ideal) and `step_seconds`, and the median
    of `plan_ms`. `summary` has the geometric mean of `attention` over cells.
    """
    profile = HardwareProfile.load(hardware)
    links = {"nodes": profile, "one per node": dataclasses.replace(profile, ranks_per_node=1)}
    models = {name: CostModel.from_config(config, connected) for name, connected in links.items()}
    cells = []
    for corpus, cp_size in tqdm([*itertools.product(corpora, cp_sizes)], unit="cell", leave=False, disable=None):
        drawn = [sample_pack(corpus, window, seed=seed + index) for index in range(packs)]
        for name, model in models.items():
            found = [_predictions(lengths, cp_size, model) for lengths in drawn]
            strategies = {
                strategy: {
                    key: average(one[strategy][key] for one in found)
                    for key, average in zip(row, (mean, mean, mean, median))
                }
                for strategy, row in found[0].items()
            }
            cells.append({"corpus": corpus, "cp_size": cp_size, "links": name, "strategies": strategies})
    summary = {
        name: {
            strategy: geometric_mean(
                cell["strategies"][strategy]["attention"] for cell in cells if cell["links"] == name
            )
            for strategy in cells[0]["strategies"]
        }
        for name in links
    }
    return {"hardware": profile.description, "cells": cells, "summary": summary}


def _predictions(lengths: Sequence[int], cp_size: int, model: CostModel) -> dict[str, dict[str, float]]:
    ideal = model.step_time(plan_documents(lengths, 1)).attention_seconds / cp_size
    ranks_per_node = model.hardware.ranks_per_node
    topology = None if cp_size % ranks_per_node else Topology(ranks_per_node)
    plans = {
        strategy: plan_documents(lengths, cp_size, strategy=strategy, topology=topology) for strategy in STRATEGIES
    }
    plans[TIMED] = plan_documents(lengths, cp_size, cost_model=model)
    found = {}
    for strategy, plan in plans.items():
        time = model.step_time(plan)
        found[strategy] = {
            "attention": time.attention_seconds / ideal,
            "exposed": float(time.exposed.max()) / ideal,
            "step_seconds": time.seconds,
            "plan_ms": 1000 * plan.planning_seconds,
        }
    return found


def text(found: dict[str, Any]) -> str:
    """Return a table with one column per strategy, one row per cell, and geometric means."""
    columns = {"corpus": "", "ranks": ",", "links": "", **dict.fromkeys(found["cells"][0]["strategies"], ".3f")}
    rows = [
        (cell["corpus"], cell["cp_size"], cell["links"], *(row["attention"] for row in cell["strategies"].values()))
        for cell in found["cells"]
    ]
    means = [("geometric mean", "", name, *row.values()) for name, row in found["summary"].items()]
    return (
        f"{found['hardware']}\n{found['packs']} packs of {found['window']:,} tokens per cell; attention time / ideal, "
        f"means\n\n{table(columns, [*rows, (), *means])}"
    )
