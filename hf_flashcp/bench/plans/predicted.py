"""Predicted times of every strategy: attention relative to the ideal, one device's time / number of ranks, and steps
relative to the lower bound."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from statistics import geometric_mean, mean, median
from typing import Any

from tqdm import tqdm

from ...data.lengths import sample_pack
from ...plan import Topology
from ...planning import STRATEGIES, plan_documents
from ...planning.explanation import seconds_bound
from ...planning.time_bound import step_time_bound
from ...predict import CostModel, HardwareProfile
from ...predict.model_shape import LLAMA_3_8B
from ...tables import records_table
from ..arguments import with_arguments
from .plan_quality import mean_ratio


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
    to the ideal), `exposed` (the longest wait of any rank, relative to the ideal) and `step_seconds`, the geometric
    mean of `over_bound` (the step relative to the lower bound of plans within the caps, `None` if a plan is beyond
    them) and the median of `plan_ms`. `attention_bound` is the mean of the lower bound of `attention`. `summary` has
    geometric means of `attention` and `over_bound` over the cells of each number of ranks, and over all cells
    (`cp_size` is `None`).
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
                strategy: {key: AVERAGES[key](one[strategy][key] for one in found) for key in AVERAGES}
                for strategy in found[0]
            }
            bound = mean(_attention_bound(lengths, cp_size, model) for lengths in drawn)
            cell = {"corpus": corpus, "cp_size": cp_size, "links": name, "attention_bound": bound}
            cells.append({**cell, "strategies": strategies})
    groups = itertools.product((*cp_sizes, None) if len(cp_sizes) > 1 else cp_sizes, links)
    return {
        "hardware": profile.description,
        "cells": cells,
        "summary": [_summary(cells, cp_size, name) for cp_size, name in groups],
    }


AVERAGES: dict[str, Callable[[Iterable[Any]], Any]] = {
    "attention": mean,
    "exposed": mean,
    "step_seconds": mean,
    "over_bound": mean_ratio,
    "plan_ms": median,
}
"""How each figure is averaged over the packs of a cell."""


def _summary(cells: Sequence[dict[str, Any]], cp_size: int | None, links: str) -> dict[str, Any]:
    those = [cell for cell in cells if cell["links"] == links and cp_size in (None, cell["cp_size"])]
    return {
        "cp_size": cp_size,
        "links": links,
        "attention_bound": geometric_mean(cell["attention_bound"] for cell in those),
        "strategies": {
            strategy: {
                key: mean_ratio(cell["strategies"][strategy][key] for cell in those)
                for key in ("attention", "over_bound")
            }
            for strategy in those[0]["strategies"]
        },
    }


def _ideal(lengths: Sequence[int], cp_size: int, model: CostModel) -> float:
    return model.step_time(plan_documents(lengths, 1)).attention_seconds / cp_size


def _attention_bound(lengths: Sequence[int], cp_size: int, model: CostModel) -> float:
    bound = step_time_bound(lengths, cp_size, model)
    return (bound.seconds - bound.linear) / _ideal(lengths, cp_size, model)


def _predictions(lengths: Sequence[int], cp_size: int, model: CostModel) -> dict[str, dict[str, Any]]:
    ideal = _ideal(lengths, cp_size, model)
    ranks_per_node = model.hardware.ranks_per_node
    topology = None if cp_size % ranks_per_node else Topology(ranks_per_node)
    plans = {
        strategy: plan_documents(lengths, cp_size, strategy=strategy, topology=topology) for strategy in STRATEGIES
    }
    plans[TIMED] = plan_documents(lengths, cp_size, cost_model=model)
    found = {}
    for strategy, plan in plans.items():
        time, bound = model.step_time(plan), seconds_bound(plan, model)
        found[strategy] = {
            "attention": time.attention_seconds / ideal,
            "exposed": float(time.exposed.max()) / ideal,
            "step_seconds": time.seconds,
            "over_bound": None if bound is None else time.seconds / bound,
            "plan_ms": 1000 * plan.planning_seconds,
        }
    return found


def text(found: dict[str, Any]) -> str:
    """Return two tables with one column per strategy, one row per cell, and geometric means."""
    attention, steps = (_table(found, key) for key in ("attention", "over_bound"))
    return (
        f"{found['hardware']}\n{found['packs']} packs of {found['window']:,} tokens per cell; attention time / ideal, "
        f"means\n\n{attention}\n\nstep / lower bound, geometric means; none for plans beyond the caps\n\n{steps}"
    )


def _table(found: dict[str, Any], key: str) -> str:
    names = found["cells"][0]["strategies"]
    bounds = key == "attention"
    columns = {
        "title": ("corpus", ""),
        "cp_size": ("ranks", ","),
        "links": ("links", ""),
        **{name: (name, ".3f") for name in names},
        **({"attention_bound": ("bound", ".3f")} if bounds else {}),
    }
    titled = [{**cell, "title": cell["corpus"]} for cell in found["cells"]]
    means = [{**row, "title": "geometric mean", "cp_size": row["cp_size"] or "all"} for row in found["summary"]]
    return records_table(columns, [_flat(row, key) if row else {} for row in [*titled, {}, *means]])


def _flat(row: dict[str, Any], key: str) -> dict[str, Any]:
    return {**row, **{name: of_plan[key] for name, of_plan in row["strategies"].items()}}
