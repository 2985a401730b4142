"""What nodes cost and what a topology changes: tokens that cross to each node once, and plans made for nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean
from typing import Any

from tqdm import tqdm

from ..data.lengths import sample_pack
from ..plan import Topology
from ..planning import plan_documents
from ..predict import CostModel, HardwareProfile
from ..predict.model_shape import LLAMA_3_8B


DIRECTLY, ONCE, PLANNED, BOTH = "directly", "once to a node", "planned for nodes", "both"
VARIANTS = (DIRECTLY, ONCE, PLANNED, BOTH)


def measure(
    corpora: Sequence[str],
    cp_sizes: Sequence[int],
    tokens: int,
    packs: int,
    *,
    config: Any = LLAMA_3_8B,
    hardware: str = "h100",
    progress: bool = False,
) -> dict[str, Any]:
    """Predicted steps of plans by "search".

    Args:
        corpora: of `LENGTH_DISTRIBUTIONS`.
        cp_sizes: numbers of ranks that fill several nodes.
        tokens: of each rank.
        packs: drawn in each cell, with the seeds from 0 on.
        config: of the model, see [`CostModel.from_config`].
        hardware: a profile's name or file.

    Returns:
        `dict`, JSON-serializable: the arguments and `cells`, each with `corpus`, `cp_size`, `window` and by
        `VARIANTS` means of `inter_node`, tokens that the busiest rank gets from other nodes or sends to them in a
        layer's forward, of `exposed`, the share of the step that the rank which waits longest does, and
        `step_seconds`; `over_directly`, the geometric mean of the step over that of `DIRECTLY`.

    Raises:
        PlanError: ranks that do not fill several nodes.
    """
    profile = HardwareProfile.load(hardware)
    model, topology = CostModel.from_config(config, profile), Topology(profile.ranks_per_node)
    cells = []
    with tqdm(total=len(corpora) * len(cp_sizes) * packs, leave=False, disable=None if progress else True) as bar:
        for corpus in corpora:
            for cp_size in cp_sizes:
                rows: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
                for seed in range(packs):
                    lengths = sample_pack(corpus, cp_size * tokens, seed=seed)
                    flat, planned = (plan_documents(lengths, cp_size, topology=one) for one in (None, topology))
                    plans = flat, flat.with_ranks_per_node(profile.ranks_per_node), planned.with_ranks_per_node(None)
                    for name, plan in zip(VARIANTS, (*plans, planned)):
                        report, time = plan.report(topology=topology), model.step_time(plan)
                        rows[name].append(
                            {
                                "inter_node": max(report["inter_node_received"] + report["inter_node_sent"]),
                                "exposed": float(time.exposed.max()) / time.seconds,
                                "step_seconds": time.seconds,
                            }
                        )
                    bar.update()
                variants = {
                    name: {
                        **{key: mean(row[key] for row in found) for key in found[0]},
                        "over_directly": math.exp(
                            mean(
                                math.log(row["step_seconds"] / other["step_seconds"])
                                for row, other in zip(found, rows[DIRECTLY])
                            )
                        ),
                    }
                    for name, found in rows.items()
                }
                cells.append({"corpus": corpus, "cp_size": cp_size, "window": cp_size * tokens, "variants": variants})
    return {"hardware": profile.description, "packs": packs, "tokens": tokens, "cells": cells}


def text(found: dict[str, Any]) -> str:
    """A table for a terminal."""
    lines = [
        found["hardware"],
        f"{found['packs']} packs a cell, {found['tokens']:,} tokens a rank; step: ms, and over the first; inter: "
        "tokens of the busiest rank between nodes, over the window",
        "",
        f"{'':28}{DIRECTLY:>24}" + "".join(f"{name:>30}" for name in VARIANTS[1:]),
        f"{'corpus':13}{'ranks':>6}{'window':>9}{'step':>10}{'inter':>7}{'waiting':>9}"
        + f"{'step':>8}{'':6}{'inter':>7}{'waiting':>9}" * 3,
    ]
    for cell in found["cells"]:
        line = f"{cell['corpus']:13}{cell['cp_size']:6}{cell['window']:9,}"
        for name, row in cell["variants"].items():
            line += f"{1000 * row['step_seconds']:{10 if name == DIRECTLY else 8},.0f}"
            line += "" if name == DIRECTLY else f"{row['over_directly']:6.2f}"
            line += f"{row['inter_node'] / cell['window']:7.3f}{row['exposed']:9.1%}"
        lines.append(line)
    return "\n".join(lines)
