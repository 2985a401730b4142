"""Predicted times of one attention module beside those that the FlashCP paper measured, and what follows for ours.

The paper's setting: one node of 8 H100s, 128K tokens, 32 heads of 128 without grouped queries, cp_size 8. Its packs
are not known: kernels are predicted for packs like its corpora. What Llama 3 and Per-Doc transfer does not depend on
the pack.
"""

from __future__ import annotations

import dataclasses
import math
from statistics import mean
from typing import Any

from tqdm import tqdm

from ..data.lengths import sample_pack
from ..plan import ShardPlan
from ..planning import plan_documents
from ..predict import CostModel, HardwareProfile
from ..simulation.baselines import BASELINES, passes


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
_SETTINGS = {
    "32 KV heads": (32, 8),
    "8 KV heads": (8, 8),
    "32 KV heads, a node each": (32, 1),
    "8 KV heads, a node each": (8, 1),
}


def measure(packs: int, *, seed: int = 0, progress: bool = False) -> dict[str, Any]:
    """Predicts the paper's bars on drawn packs.

    Args:
        packs: drawn for each corpus, with the seeds from `seed` on.
        seed: of the first.
        progress: a bar on stderr if that is a terminal.

    Returns:
        `dict`, JSON-serializable. `parts`: by corpus and scheme the predicted milliseconds, means over packs, the
        published ones, and errors. `kernel_ratios`: what says more where packs differ, by corpus, predicted and
        published. `sixteen`: likewise for the one pack that is known. `speedups`: by setting, assumption and corpus
        how many times as long as ours the rivals' attention module takes, mean over mean, and the geometric mean over
        corpora. Ours is `search` with the cost model. What is assumed:

        - "predicted": everything.
        - "copies published": rivals have the paper's copies, all else is predicted.
        - "published": rivals are as published; ours has the kernels of the published FlashCP, and its own copies and
          waiting as predicted.
        - "published, ours copies as much": and ours has the copies of the published FlashCP too.
    """
    parts: dict[str, dict[str, Any]] = {}
    speedups: dict[str, dict[str, dict[str, float]]] = {}
    with tqdm(total=len(_SETTINGS) * len(PAPER) * packs, leave=False, disable=None if progress else True) as bar:
        for setting, (kv_heads, ranks_per_node) in _SETTINGS.items():
            profile = dataclasses.replace(HardwareProfile.load("h100"), ranks_per_node=ranks_per_node)
            model = CostModel.from_config({**_SIZES, "num_key_value_heads": kv_heads}, profile)
            for corpus, published in PAPER.items():
                drawn: dict[str, list[tuple[float, ...]]] = {scheme: [] for scheme in ("ours", *published)}
                for index in range(packs):
                    lengths = sample_pack(corpus, WINDOW, seed=seed + index)
                    drawn["ours"].append(_ours(lengths, model))
                    for scheme in published:
                        drawn[scheme].append(_parts(scheme, lengths, model))
                    bar.update()
                means = {scheme: [mean(values) for values in zip(*found)] for scheme, found in drawn.items()}
                papers = setting == "32 KV heads"
                if papers:
                    parts[corpus] = {scheme: _beside(means[scheme], published[scheme]) for scheme in published}
                    parts[corpus]["ours"] = {"predicted": means["ours"]}
                for assumption, ratios in _ratios(means, published, papers).items():
                    speedups.setdefault(f"{setting}, {assumption}", {})[corpus] = ratios
    for by_corpus in speedups.values():
        by_corpus["both"] = {
            rival: math.exp(mean(math.log(ratios[rival]) for ratios in by_corpus.values())) for rival in TARGETS
        }
    ratios = {
        corpus: {kind: _kernel_ratios(parts[corpus], kind) for kind in ("predicted", "published")} for corpus in PAPER
    }
    return {
        "packs": packs,
        "seed": seed,
        "parts": parts,
        "kernel_ratios": ratios,
        "sixteen": {"predicted": _sixteen(), "published": SIXTEEN},
        "speedups": speedups,
        "targets": TARGETS,
    }


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


def _ratios(means, published, papers: bool) -> dict[str, dict[str, float]]:
    ours = means["ours"]
    found = {"predicted": {rival: sum(means[rival]) / sum(ours) for rival in TARGETS}}
    if papers:
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
    """Tables for a terminal."""
    names = ("copies", "forward", "backward", "all-gather", "reduce-sc.", "sum")
    lines = [
        f"{found['packs']} packs of {WINDOW:,} tokens, {CP_SIZE} H100s in a node, 32 heads of 128; ms, means",
        "(ours: what is waited for in forward and backward, in place of all-gather and reduce-scatter)",
        "",
        f"{'corpus':8} {'scheme':14} {'':9}" + "".join(f"{name:>11}" for name in names),
    ]
    for corpus, schemes in found["parts"].items():
        for scheme, row in schemes.items():
            for name in ("predicted", "published"):
                if name in row:
                    values = [*row[name], sum(row[name])]
                    lines.append(
                        f"{corpus:8} {scheme:14} {name:9}" + "".join(f"{abs(value):11.1f}" for value in values)
                    )
            if "errors" in row:
                lines.append(f"{'':23} {'error':9}" + "".join(f"{error:+11.0%}" for error in row["errors"]))
    lines += ["", f"{'attention kernels':35}" + "".join(f"{corpus:>12}{'published':>12}" for corpus in PAPER)]
    for name in found["kernel_ratios"]["pile"]["predicted"]:
        row = [found["kernel_ratios"][corpus][kind][name] for corpus in PAPER for kind in ("predicted", "published")]
        lines.append(f"{name:35}" + "".join(f"{value:12.2f}" for value in row))
    for scheme, ratio in found["sixteen"]["predicted"].items():
        lines.append(f"{f'16 x 8K, {scheme} / whole':35}{ratio:12.2f}{SIXTEEN[scheme]:12.2f}")
    columns = [f"{rival} {corpus}" for corpus in (*PAPER, "both") for rival in TARGETS]
    head = f"{'attention module over ours':44}" + "".join(f"{name:>20}" for name in columns)
    lines += ["", head]
    for name, by_corpus in found["speedups"].items():
        values = [ratio for corpus in (*PAPER, "both") for ratio in by_corpus[corpus].values()]
        lines.append(f"{name:44}" + "".join(f"{value:20.2f}" for value in values))
    targets = ", ".join(f"{ratio} over {rival}" for rival, ratio in TARGETS.items())
    return "\n".join([*lines, "", f"the published FlashCP, on average over its settings: {targets}"])
