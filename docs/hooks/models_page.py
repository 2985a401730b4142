"""Writes docs/models.md: which causal language models of the installed transformers train exactly.

python docs/hooks/models_page.py [--output docs/models.md]
"""

import argparse
import textwrap
from collections import defaultdict
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from hf_flashcp.distributed.workers import WorkerPool
from hf_flashcp.doctor.all_models import diagnose_all, difference, features
from hf_flashcp.doctor.diagnosis import NOT_CHECKED, REFUSED, SUPPORTED, WHOLE_ONLY
from hf_flashcp.doctor.gradients import LENGTHS, LIMIT
from hf_flashcp.doctor.tiny import causal_language_models
from hf_flashcp.doctor.tiny_sizes import WINDOW


SECTIONS = {
    SUPPORTED: ("Supported", "These train with every strategy."),
    WHOLE_ONLY: (
        "Whole-document plans only",
        "The states of their recurrent layers cannot be passed on: Mamba-1's scans ignore an initial state, and "
        "lightning attention and RG-LRU take none. They train on plans that keep documents whole: "
        '`FlashCPPlugin(cp_size=..., strategy="whole_doc")`.',
    ),
    REFUSED: ("Refused", "Attaching or the first forward raises an error."),
    NOT_CHECKED: ("Not checked", "The check could not run with the default config of these models."),
}


def page(diagnoses):
    """The page in Markdown."""
    by_result = {result: [d for d in diagnoses if d.result == result] for result in SECTIONS}
    lines = [
        "# Models",
        "",
        f"Made by `python docs/hooks/models_page.py` with transformers {transformers.__version__} and torch "
        f"{torch.__version__.partition('+')[0]}. For every causal language model of transformers the script builds a "
        "tiny random copy of the default config, with at least one layer of each kind, and trains it for one step on "
        f"documents of {', '.join(map(str, LENGTHS))} tokens that two processes share, with sliding windows of "
        f"{WINDOW} tokens. A model is supported if no parameter's gradient differs by more than {LIMIT:.0e} in fp64 "
        "(relative, Frobenius norm) from that of transformers' eager attention on one document at a time.",
        "",
        "`flashcp doctor --all-models` prints the same findings for your version of transformers, and "
        "[`flashcp doctor MODEL`](doctor.md) checks your own config. Names are those of `model_type` in a "
        "config.json.",
        "",
        "| Result | Models |",
        "|---|---|",
        *(f"| {result} | {len(found)} |" for result, found in by_result.items()),
    ]
    for result, (heading, meaning) in SECTIONS.items():
        if found := by_result[result]:
            lines += ["", f"## {heading}", "", meaning, ""]
            lines += by_need(found) if result in (SUPPORTED, WHOLE_ONLY) else by_reason(found)
    return "\n".join(lines) + "\n"


def by_need(diagnoses):
    """A table of supported models, grouped by what they need beyond plain causal attention."""
    groups = defaultdict(list)
    for each in diagnoses:
        groups["; ".join([*features(each), *map(cell, each.advice)])].append(each)
    return [
        "| Beyond plain causal attention | Model types | Largest difference |",
        "|---|---|---|",
        *(
            f"| {need or 'nothing'} | {names(found)} | {max(map(difference, found)):.0e} |"
            for need, found in sorted(groups.items())
        ),
    ]


def by_reason(diagnoses):
    """A table of the other models, grouped by the reason. A reason that begins with the class loses it."""
    groups = defaultdict(list)
    for each in diagnoses:
        reason = each.reason.removeprefix(f"{each.model_class} ")
        groups[cell(textwrap.shorten(reason, 130, placeholder=" ..."))].append(each)
    largest_first = sorted(groups.items(), key=lambda item: -len(item[1]))
    rows = (f"| {reason} | {names(found)} |" for reason, found in largest_first)
    return ["| Reason | Model types |", "|---|---|", *rows]


def names(diagnoses):
    return ", ".join(f"`{each.model_type}`" for each in diagnoses)


def cell(text):
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("docs/models.md"), metavar="FILE")
    output = parser.parse_args().output
    transformers.utils.logging.set_verbosity_error()
    with WorkerPool() as pool, tqdm(total=len(causal_language_models()), unit="model") as progress:
        diagnoses = diagnose_all(pool, on_done=lambda _: progress.update(), timeout=900)
    output.write_text(page(diagnoses), encoding="utf-8")


if __name__ == "__main__":
    main()
