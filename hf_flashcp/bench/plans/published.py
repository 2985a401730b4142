"""Compares predicted times of one attention module with those in the FlashCP paper, and derives speed-ups of ours.

The paper measured one node of 8 H100s, 128K tokens, 32 heads of 128 without grouped queries, and cp_size 8. Its packs
are not published, so kernel times are predicted for random packs from the same corpora. The transfers of Llama 3 CP
and Per-Doc CP do not depend on the pack.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from statistics import geometric_mean, mean
from typing import Any

from tqdm import tqdm

from ...data.lengths import sample_pack
from ...plan import ShardPlan
from ...planning import plan_documents
from ...predict import CostModel, HardwareProfile
from ...predict.joined_plans import JoinedPlans
from ...simulation.baselines import BASELINES, passes
from ...tables import table
from ..arguments import with_arguments


PARTS = ("copies", "forward", "backward", "all_gather", "reduce_scatter")

PAPER = {
    "wlb_llm": {
        "llama3": (13.1, 26.2, 75.6, 5.4, 5.5),
        "per_doc_cp": (19.8, 19.3, 55.1, 5.4, 5.5),
        "flashcp_paper": (15.9, 19.1, 53.9, 4.2, 4.2),
    },
    "pile": {
        "llama3": (13.3, 9.5, 27.6, 5.4, 5.5),
        "per_doc_cp": (29.7, 5.7, 18.4, 5.4, 5.5),
        "flashcp_paper": (16.5, 5.5, 15.6, 3.6, 3.6),
    },
}
"""Milliseconds in arXiv 2606.08476 for cp_size 8 and 32 heads, by `PARTS`. The paper calls copies "others"."""

SIXTEEN = {"per_doc_cp": 1.21, "zigzag_ring": 1.41}
"""The paper's attention time for 16 documents of 8K tokens, relative to whole documents.

This is the only pack whose document lengths are published.
"""

TARGETS = {"llama3": 1.38, "per_doc_cp": 1.63}
"""Average speed-ups of the paper's FlashCP over Llama 3 CP and Per-Doc CP."""

WINDOW, CP_SIZE = 131072, 8
_SIZES = {"hidden_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 32}


PAPER_SETTING = "32 KV heads"
"""The setting of the paper's measurements."""

_SETTINGS = {
    PAPER_SETTING: (32, 8),
    "8 KV heads": (8, 8),
    "32 KV heads, one rank per node": (32, 1),
    "8 KV heads, one rank per node": (8, 1),
}
"""Number of KV heads and ranks per node of each setting."""


@with_arguments("packs", "seed")
def measure(packs: int, *, seed: int = 0) -> dict[str, Any]:
    """Predict the paper's measurements on random packs.

    `kernel_ratios` compares ratios of kernel times, which depend less on the packs than the times do. `speedups` has
    the time of the other implementations' attention module relative to ours (a ratio of means), by setting and
    assumption, and by corpus. Ours is `search` with the cost model. The assumptions are:

    - "predicted": all times are predicted.
    - "copies published": the others' copies take the published times; all other times are predicted.
    - "published": the others take the published times. Our kernels take the times of the published FlashCP, while our
      copies and waiting are predicted.
    - "published, ours copies as much": as before, and our copies also take the times of the published FlashCP.
    """
    parts: dict[str, dict[str, Any]] = {}
    speedups: dict[str, dict[str, dict[str, float]]] = {}
    cells = [*itertools.product(_SETTINGS.items(), PAPER.items())]
    for (name, setting), (corpus, published) in tqdm(cells, unit="cell", leave=False, disable=None):
        means = _means(*setting, corpus, published, range(seed, seed + packs))
        if name == PAPER_SETTING:
            parts[corpus] = {scheme: _beside(means[scheme], published[scheme]) for scheme in published}
            parts[corpus]["ours"] = {"predicted": means["ours"]}
        for assumption, ratios in _ratios(means, published if name == PAPER_SETTING else None).items():
            speedups.setdefault(f"{name}, {assumption}", {})[corpus] = ratios
    for by_corpus in speedups.values():
        by_corpus["both"] = {
            rival: geometric_mean(ratios[rival] for ratios in by_corpus.values()) for rival in TARGETS
        }
    ratios = {
        corpus: {kind: _kernel_ratios(parts[corpus], kind) for kind in ("predicted", "published")} for corpus in PAPER
    }
    return {
        "parts": parts,
        "kernel_ratios": ratios,
        "sixteen": {"predicted": _sixteen(), "published": SIXTEEN},
        "speedups": speedups,
        "targets": TARGETS,
    }


def _means(
    kv_heads: int, ranks_per_node: int, corpus: str, published: dict[str, tuple[float, ...]], seeds: Iterable[int]
) -> dict[str, list[float]]:
    """Return the predicted milliseconds of ours and of the published schemes, by `PARTS`, as means over packs."""
    profile = dataclasses.replace(HardwareProfile.load("h100"), ranks_per_node=ranks_per_node)
    model = CostModel.from_config({**_SIZES, "num_key_value_heads": kv_heads}, profile)
    drawn: dict[str, list[tuple[float, ...]]] = {scheme: [] for scheme in ("ours", *published)}
    for seed in seeds:
        lengths = sample_pack(corpus, WINDOW, seed=seed)
        drawn["ours"].append(_ours(lengths, model))
        for scheme in published:
            drawn[scheme].append(_parts(scheme, lengths, model))
    return {scheme: [mean(values) for values in zip(*found)] for scheme, found in drawn.items()}


def _kernel_ratios(parts: dict[str, Any], kind: str) -> dict[str, float]:
    kernels = {scheme: parts[scheme][kind][1:3] for scheme in BASELINES if scheme in parts}
    return {
        "llama3 / per_doc_cp": sum(kernels["llama3"]) / sum(kernels["per_doc_cp"]),
        "flashcp_paper / per_doc_cp": sum(kernels["flashcp_paper"]) / sum(kernels["per_doc_cp"]),
        "backward / forward": kernels["per_doc_cp"][1] / kernels["per_doc_cp"][0],
    }


def _sixteen() -> dict[str, float]:
    lengths = [8192] * 16
    model = CostModel.from_config(_SIZES, "h100")
    whole = model.step_time(plan_documents(lengths, CP_SIZE, strategy="whole_doc")).attention.max()
    return {scheme: sum(_parts(scheme, lengths, model)[1:3]) / (1000 * whole) for scheme in SIXTEEN}


def _ours(lengths: list[int], model: CostModel) -> tuple[float, ...]:
    """Return the milliseconds of copies, forward, backward, and waiting in both passes, on the slowest rank."""
    plan = plan_documents(lengths, CP_SIZE, cost_model=model)
    forward, backward = model.passes(JoinedPlans([plan]), model.layers[0], plan.ranks_per_node is not None)
    slowest = sum(forward[:3] + backward[:3]).argmax()
    copies = forward.copies + backward.copies
    found = (copies, forward.attention, backward.attention, forward.exposed, backward.exposed)
    return tuple(float(1000 * part[slowest]) for part in found)


def _parts(scheme: str, lengths: list[int], model: CostModel) -> tuple[float, ...]:
    """Return the milliseconds, by `PARTS`, of the rank with the most attention."""
    plan = ShardPlan(lengths, CP_SIZE, BASELINES[scheme].slices(tuple(lengths), CP_SIZE))
    forward, backward = passes(scheme, model, plan, model.layers[0])
    busiest = (forward[0] + backward[0]).argmax()
    copies = forward[1] + backward[1]
    return tuple(float(1000 * part[busiest]) for part in (copies, forward[0], backward[0], forward[3], backward[3]))


def _beside(predicted: list[float], published: tuple[float, ...]) -> dict[str, Any]:
    errors = [one / other - 1 for one, other in zip([*predicted, sum(predicted)], [*published, sum(published)])]
    return {"predicted": predicted, "published": list(published), "errors": errors}


def _ratios(
    means: dict[str, list[float]], published: dict[str, tuple[float, ...]] | None
) -> dict[str, dict[str, float]]:
    """Return the times of the other implementations relative to ours, for each assumption."""
    ours = means["ours"]
    found = {"predicted": {rival: sum(means[rival]) / sum(ours) for rival in TARGETS}}
    if published is not None:
        copies, *kernels = published["flashcp_paper"][:3]
        with_kernels = sum(kernels) + ours[0] + sum(ours[3:])
        found["copies published"] = {
            rival: (published[rival][0] + sum(means[rival][1:])) / sum(ours) for rival in TARGETS
        }
        found["published"] = {rival: sum(published[rival]) / with_kernels for rival in TARGETS}
        found["published, ours copies as much"] = {
            rival: sum(published[rival]) / (with_kernels - ours[0] + copies) for rival in TARGETS
        }
    return found


def text(found: dict[str, Any]) -> str:
    """Return three tables: predicted and published times, ratios of kernel times, and speed-ups."""
    targets = ", ".join(f"{ratio} over {rival}" for rival, ratio in TARGETS.items())
    return (
        f"{found['packs']} packs of {WINDOW:,} tokens, {CP_SIZE} H100s in a node, 32 heads of 128; ms, means\n"
        "(ours: waiting in forward and backward in place of all-gather and reduce-scatter)\n\n"
        f"{_parts_table(found['parts'])}\n\n{_kernels_table(found)}\n\n{_speedups_table(found['speedups'])}\n\n"
        f"the published FlashCP, on average over its settings: {targets}"
    )


def _parts_table(parts: dict[str, Any]) -> str:
    rows: list[tuple[Any, ...]] = []
    for corpus, schemes in parts.items():
        for scheme, row in schemes.items():
            for kind in ("predicted", "published"):
                if kind in row:
                    # A part that takes no time may be -0.0.
                    rows.append((corpus, scheme, kind, *map(abs, (*row[kind], sum(row[kind])))))
            if "errors" in row:
                rows.append(("", "", "error", *(f"{error:+.0%}" for error in row["errors"])))
    names = ("copies", "forward", "backward", "all-gather", "reduce-sc.", "sum")
    return table({"corpus": "", "scheme": "", "": "", **dict.fromkeys(names, ".1f")}, rows)


def _kernels_table(found: dict[str, Any]) -> str:
    kinds = [(corpus, kind) for corpus in PAPER for kind in ("predicted", "published")]
    ratios = found["kernel_ratios"]
    rows = [(name, *(ratios[corpus][kind][name] for corpus, kind in kinds)) for name in ratios["pile"]["predicted"]]
    drawn = table({"attention kernels": "", **{f"{corpus}\n{kind}": ".2f" for corpus, kind in kinds}}, rows)
    known = [(f"{scheme} / whole", ratio, SIXTEEN[scheme]) for scheme, ratio in found["sixteen"]["predicted"].items()]
    return f"{drawn}\n\n" + table({"16 documents of 8K": "", "predicted": ".2f", "published": ".2f"}, known)


def _speedups_table(speedups: dict[str, Any]) -> str:
    columns = [(corpus, rival) for corpus in (*PAPER, "both") for rival in TARGETS]
    rows = [(name, *(row[corpus][rival] for corpus, rival in columns)) for name, row in speedups.items()]
    names = {f"{corpus}\n{rival}": ".2f" for corpus, rival in columns}
    return table({"attention module over ours": "", **names}, rows)
