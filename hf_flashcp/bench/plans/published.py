"""Predicted times of one attention module beside those that the FlashCP paper measured, and what follows for ours.

The paper's setting: one node of 8 H100s, 128K tokens, 32 heads of 128 without grouped queries, cp_size 8. Its packs
are not known: kernels are predicted for packs like its corpora. What Llama 3 and Per-Doc transfer does not depend on
the pack.
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
"""Milliseconds of arXiv 2606.08476, cp_size 8, 32 heads, by `PARTS`: its "others" are copies."""

SIXTEEN = {"per_doc_cp": 1.21, "zigzag_ring": 1.41}
"""Its attention time of 16 documents of 8K, over that of whole documents: the one pack that is known."""

TARGETS = {"llama3": 1.38, "per_doc_cp": 1.63}
"""Average speed-ups of its FlashCP over Llama 3 CP and Per-Doc CP."""

WINDOW, CP_SIZE = 131072, 8
_SIZES = {"hidden_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 32}


PAPERS = "32 KV heads"
"""The setting in which the paper measured."""

_SETTINGS = {
    PAPERS: (32, 8),
    "8 KV heads": (8, 8),
    "32 KV heads, a node each": (32, 1),
    "8 KV heads, a node each": (8, 1),
}
"""KV heads of the model, and ranks that share a node."""


@with_arguments("packs", "seed")
def measure(packs: int, *, seed: int = 0) -> dict[str, Any]:
    """Predicts the paper's bars on drawn packs.

    `kernel_ratios` says more where packs differ. `speedups` are how many times as long as ours the rivals' attention
    module takes, mean over mean, by setting, assumption and corpus. Ours is `search` with the cost model. What is
    assumed:

    - "predicted": everything.
    - "copies published": rivals have the paper's copies, all else is predicted.
    - "published": rivals are as published; ours has the kernels of the published FlashCP, and its own copies and
      waiting as predicted.
    - "published, ours copies as much": and ours has the copies of the published FlashCP too.
    """
    parts: dict[str, dict[str, Any]] = {}
    speedups: dict[str, dict[str, dict[str, float]]] = {}
    cells = [*itertools.product(_SETTINGS.items(), PAPER.items())]
    for (name, setting), (corpus, published) in tqdm(cells, unit="cell", leave=False, disable=None):
        means = _means(*setting, corpus, published, range(seed, seed + packs))
        if name == PAPERS:
            parts[corpus] = {scheme: _beside(means[scheme], published[scheme]) for scheme in published}
            parts[corpus]["ours"] = {"predicted": means["ours"]}
        for assumption, ratios in _ratios(means, published if name == PAPERS else None).items():
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
    """Predicted milliseconds of ours and of the published schemes by `PARTS`, means over drawn packs."""
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
    """Milliseconds of copies, forward, backward, and waiting in both, on the rank that takes longest."""
    plan = plan_documents(lengths, CP_SIZE, cost_model=model)
    forward, backward = model.passes(plan, model.layers[0])
    slowest = sum(forward[:3] + backward[:3]).argmax()
    copies = forward.copies + backward.copies
    found = (copies, forward.attention, backward.attention, forward.exposed, backward.exposed)
    return tuple(float(1000 * part[slowest]) for part in found)


def _parts(scheme: str, lengths: list[int], model: CostModel) -> tuple[float, ...]:
    """Milliseconds by `PARTS` of the rank with the most attention."""
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
    """By assumption how many times as long as ours the rivals take."""
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
    """Tables of the parts beside the published ones, of what kernels say, and of the speed-ups."""
    targets = ", ".join(f"{ratio} over {rival}" for rival, ratio in TARGETS.items())
    return (
        f"{found['packs']} packs of {WINDOW:,} tokens, {CP_SIZE} H100s in a node, 32 heads of 128; ms, means\n"
        "(ours: what is waited for in forward and backward, in place of all-gather and reduce-scatter)\n\n"
        f"{_parts_table(found['parts'])}\n\n{_kernels_table(found)}\n\n{_speedups_table(found['speedups'])}\n\n"
        f"the published FlashCP, on average over its settings: {targets}"
    )


def _parts_table(parts: dict[str, Any]) -> str:
    rows: list[tuple[Any, ...]] = []
    for corpus, schemes in parts.items():
        for scheme, row in schemes.items():
            for kind in ("predicted", "published"):
                if kind in row:
                    # The sum of a part that takes no time may be -0.0.
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
