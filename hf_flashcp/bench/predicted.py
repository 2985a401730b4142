"""Predicted attention time of every strategy, as a multiple of the ideal: one device's time over the ranks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import mean, median
from typing import Any

from tqdm import tqdm

from ..data.lengths import sample_pack
from ..plan import Topology
from ..planning import STRATEGIES, plan_documents
from ..predict import CostModel, HardwareProfile
from ..predict.model_shape import LLAMA_3_8B


TIMED = "search, timed"
"""The row of plans that `cost_model` chose."""


def measure(
    corpora: Sequence[str],
    window: int,
    cp_sizes: Sequence[int],
    packs: int,
    *,
    config: Any = LLAMA_3_8B,
    hardware: str | HardwareProfile = "h100",
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Plans drawn packs and predicts their steps, with the ranks packed into nodes, and each in a node of its own.

    Args:
        corpora: of `hf_flashcp.data.lengths.LENGTH_DISTRIBUTIONS`.
        window: tokens of a packed row.
        cp_sizes: numbers of ranks.
        packs: packs drawn in each cell, with the seeds from `seed` on.
        config: of the model, see [`CostModel.from_config`].
        hardware: a profile or its name.
        progress: a bar on stderr if that is a terminal.

    Returns:
        `dict`, JSON-serializable: the arguments, `cells`, each by strategy with means of `attention` (attention and
        what it waits for on the slowest rank, over the ideal), `exposed` (the waiting alone, likewise), `step_seconds`
        and median `plan_ms`; `summary`: by links and strategy the geometric mean of `attention` over cells.
    """
    profile = HardwareProfile.load(hardware)
    links = {"nodes": profile, "a node each": dataclasses.replace(profile, ranks_per_node=1)}
    cells = []
    with tqdm(total=len(corpora) * len(cp_sizes) * packs, leave=False, disable=None if progress else True) as bar:
        for corpus in corpora:
            for cp_size in cp_sizes:
                rows: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in links}
                for index in range(packs):
                    lengths = sample_pack(corpus, window, seed=seed + index)
                    for name, connected in links.items():
                        model = CostModel.from_config(config, connected)
                        for strategy, found in _predictions(lengths, cp_size, model).items():
                            rows[name].setdefault(strategy, []).append(found)
                    bar.update()
                for name, by_strategy in rows.items():
                    strategies = {strategy: _row(found) for strategy, found in by_strategy.items()}
                    cells.append({"corpus": corpus, "cp_size": cp_size, "links": name, "strategies": strategies})
    summary = {
        name: {
            strategy: math.exp(
                mean(math.log(cell["strategies"][strategy]["attention"]) for cell in cells if cell["links"] == name)
            )
            for strategy in cells[0]["strategies"]
        }
        for name in links
    }
    return {
        "corpora": list(corpora),
        "window": window,
        "cp_sizes": list(cp_sizes),
        "packs": packs,
        "seed": seed,
        "hardware": profile.description,
        "cells": cells,
        "summary": summary,
    }


def _row(found: list[dict[str, float]]) -> dict[str, float]:
    means = {key: mean(row[key] for row in found) for key in ("attention", "exposed", "step_seconds")}
    return {**means, "plan_ms": median(row["plan_ms"] for row in found)}


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
    """A table for a terminal: a row for each cell, a column for each strategy."""
    strategies = list(found["cells"][0]["strategies"])
    lines = [
        found["hardware"],
        f"{found['packs']} packs of {found['window']:,} tokens a cell; attention time / ideal, means",
        "",
        f"{'corpus':13}{'ranks':>6}  {'links':12}" + "".join(f"{name:>15}" for name in strategies),
    ]
    for cell in found["cells"]:
        lines.append(
            f"{cell['corpus']:13}{cell['cp_size']:6}  {cell['links']:12}"
            + "".join(f"{row['attention']:15.3f}" for row in cell["strategies"].values())
        )
    lines += ["", "geometric means"]
    for name, row in found["summary"].items():
        lines.append(f"{'':19}  {name:12}" + "".join(f"{value:15.3f}" for value in row.values()))
    return "\n".join(lines)
