"""Writes the tables of models, windows and documents in docs/memory.md, and draws its picture.

python docs/hooks/memory_page.py
"""

import json
from dataclasses import replace
from pathlib import Path

import yaml

from hf_flashcp.cli.plots import plot_memory
from hf_flashcp.data.lengths import sample_pack
from hf_flashcp.predict.hardware_profile import HardwareProfile
from hf_flashcp.predict.layer_memory import LayerStack
from hf_flashcp.predict.training_setup import TrainingSetup
from hf_flashcp.simulation.remedies import REMEDIES, described, propose
from hf_flashcp.simulation.sizing import sizings, usable_bytes


FOLDER = Path(__file__).parent
PAGE, PICTURE = FOLDER.parent / "memory.md", FOLDER.parent / "images" / "memory.png"
MODELS = {
    "1B": ("llama_3_2_1b", 8, 8),
    "8B": ("qwen3_8b", 8, 8),
    "30B-A3B": ("qwen3_30b_a3b", 16, 8),
    "70B": ("llama_3_70b", 64, 16),
}
"""For each model, its config, the number of GPUs and the cp_size."""

WINDOWS = {"128K": 131072, "256K": 262144, "1M": 1048576}
DRAWN = ("8B", 2**20)
STEPS = (
    {},
    {"gradient_checkpointing": "full"},
    {"skip_logits": True},
    {"gradient_checkpointing": "attention-saving"},
    {"offload": True},
    {"head_groups": 8, "mlp_tiles": 16},
)
"""What each bar of the picture changes in the one before it."""
HEAD = (
    "| Model | Window | Weights, gradients, optimizer | Logits | All layers keep "
    "| Inputs of all layers | One layer in backward | Cheapest settings that fit | Peak | Step |"
)


def planned(model, lengths):
    """Return the plan of documents on the model's ranks, and the setup without any remedy."""
    name, gpus, cp_size = MODELS[model]
    config = json.loads((FOLDER / "configs" / f"{name}.json").read_text(encoding="utf-8"))
    setup = TrainingSetup(gpus=gpus, skip_logits=False)
    (sizing,) = sizings(config, HardwareProfile.load("h100"), setup, lengths, [cp_size])
    return sizing, setup


def row(model, window):
    """Return the cells of a row, in GiB."""
    sizing, setup = planned(model, [WINDOWS[window]])
    full = replace(setup, gradient_checkpointing="full", offload=True)
    parts, one = sizing.memory(setup).moments, sizing.memory(full).moments["last layer's backward"]
    stacks = [LayerStack(sizing.shape, each, sizing.load) for each in (setup, replace(full, offload=False))]
    last = sizing.shape.layers - 1
    of_layer = ("activations", "received KV", "temporary", "attention workspace")
    sizes = [
        sum(parts["optimizer"][part] for part in ("weights", "gradients", "optimizer")),
        parts["loss backward"]["logits"],
        *(sum(stack.up_to(last)) for stack in stacks),
        sum(one[part] for part in of_layer),
    ]
    cheapest, _ = propose(replace(setup, skip_logits=True), REMEDIES, sizing)
    settings = described(cheapest.setup) if cheapest.fits else f"none: {described(cheapest.setup)}"
    seconds = cheapest.step_seconds
    shown = [f"{size / 2**30:,.1f}" for size in sizes]
    return [
        model,
        window,
        *shown,
        settings,
        f"{cheapest.memory.total / 2**30:,.1f}",
        f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s",
    ]


def table():
    """Return the table in Markdown."""
    rows = [row(model, window) for model in MODELS for window in WINDOWS]
    return "\n".join([HEAD, "|---" * HEAD.count(" |") + "|", *(f"| {' | '.join(cells)} |" for cells in rows)])


DOCUMENTS = {
    "one document": [2**20],
    "eight documents of 128K": [2**17] * 8,
    "lengths like ProLong-512K's": sample_pack("prolong512k", 2**20),
    "lengths like The Pile's": sample_pack("pile", 2**20),
}
HEAD_OF_MILLION = "| Qwen3 8B, 1,048,576 tokens, 8 H100s | GB per GPU | Step | KV received per GPU |"
PUBLISHED = "| TRL, measured: one document | 56.2 | 380 s | |"


def of_recipe():
    """Return what recipes/million.yaml sets of [`TrainingSetup`]."""
    settings = yaml.safe_load((FOLDER.parents[1] / "recipes" / "million.yaml").read_text(encoding="utf-8"))
    chosen = {name: settings[name] for name in ("keep_received_kv", "head_groups", "mlp_tiles")}
    offload = settings["activation_checkpointing_kwargs"]["offload"]
    return {"gradient_checkpointing": "attention-saving", "offload": offload, "skip_logits": True, **chosen}


def million():
    """Return the table of a million tokens in Markdown."""
    rows = [HEAD_OF_MILLION, "|---" * HEAD_OF_MILLION.count(" |") + "|", PUBLISHED]
    for name, lengths in DOCUMENTS.items():
        sizing, setup = planned("8B", lengths)
        found = sizing.choice(replace(setup, **of_recipe()))
        total, moved = found.memory.total / 1e9, found.kv_bytes / 1e9
        rows.append(f"| predicted: {name} | {total:.1f} | {found.step_seconds:.0f} s | {moved:.0f} GB |")
    return "\n".join(rows)


def draw(path=PICTURE):
    """Draw the memory with more and more remedies."""
    model, window = DRAWN
    sizing, setup = planned(model, [window])
    found = []
    for changes in STEPS:
        setup = replace(setup, **changes)
        found.append(sizing.choice(setup))
    plot_memory(found, usable_bytes(sizing.cost_model.hardware), path, window=window, setup=setup)


def main():
    page = PAGE.read_text(encoding="utf-8")
    for head, made in ((HEAD, table()), (HEAD_OF_MILLION, million())):
        start = page.index(head)
        page = page[:start] + made + page[page.index("\n\n", start) :]
    PAGE.write_text(page, encoding="utf-8")
    draw()


if __name__ == "__main__":
    main()
