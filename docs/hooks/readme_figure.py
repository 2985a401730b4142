"""Draws the README's picture: one pack under two strategies, and the keys and values that each rank receives.

python docs/hooks/readme_figure.py    # writes docs/images/per_doc_and_search.png
"""

from pathlib import Path

import numpy as np
from matplotlib.patches import Patch

from hf_flashcp import plan_documents
from hf_flashcp.cli.plots import COLOURS, INK, new_figure, save_figure
from hf_flashcp.data.lengths import sample_pack


CP_SIZE, WINDOW = 4, 32_768
STRATEGIES = {
    "per_doc": "Per-Doc: split every document over all ranks",
    "search": "search (default): split a document only where balance needs it",
}
_BAR = 0.72  # of a lane
_GREY = "#8b919a"
_SCALE = WINDOW // CP_SIZE  # tokens of a rank
_HELD, _RECEIVED = 1.18, 3.3  # widths of the two columns, in tokens of a rank: one scale for both


def received_tokens(plan):
    """How many tokens' keys and values each rank receives of each document: (cp_size, documents)."""
    received = np.zeros((plan.cp_size, len(plan.lengths)), dtype=np.int64)
    for rank, held in enumerate(plan.slices):
        for document, _, stop in held:
            received[rank, document] = stop  # the slices of a document are in order: its last one sees the most
        for document, start, stop in held:
            received[rank, document] -= stop - start
    assert received.sum(axis=1).tolist() == plan.report()["kv_received"]
    return received


def draw_bars(axes, rank, bars, smallest):
    """Draws (document, tokens) one after the other, numbers those of at least `smallest` tokens; returns the end."""
    left = 0
    for document, tokens in bars:
        axes.barh(rank, tokens, _BAR, left, color=COLOURS[document], edgecolor="white", linewidth=0.6)
        if tokens >= smallest:
            axes.text(left + tokens / 2, rank, document + 1, ha="center", va="center", fontsize=9, color=INK)
        left += tokens
    return left


def draw_plan(held, received, plan):
    pairs = np.array(plan.report()["pairs"])
    for rank, tokens in enumerate(received_tokens(plan).tolist()):
        draw_bars(held, rank, [(piece.document, piece.stop - piece.start) for piece in plan.slices[rank]], 420)
        end = draw_bars(received, rank, [(document, count) for document, count in enumerate(tokens) if count], 420)
        received.text(end + 250, rank, f"{end:,}", va="center", fontsize=10, color=INK)
    for rank, work in enumerate(pairs / pairs.mean()):
        held.text(1.03 * _SCALE, rank, f"{work:.2f}", va="center", fontsize=10, color=INK)
    held.text(1.03 * _SCALE, -0.62, "work", fontsize=10.5, color=INK)
    held.set_yticks(range(plan.cp_size), [f"rank {rank}" for rank in range(plan.cp_size)], fontsize=10, color=INK)
    received.axvline(WINDOW - _SCALE, color=_GREY, linewidth=1.2, linestyle=(0, (4, 3)))
    for axes, columns in ((held, _HELD), (received, _RECEIVED)):
        axes.set_xlim(0, columns * _SCALE)
        axes.set_ylim(CP_SIZE - 0.5, -0.5)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, colors=INK)
        axes.set_xticks([])


def main():
    lengths = sample_pack("magi_real", WINDOW, seed=4)
    figure = new_figure(11.5, 6.3)
    rows = figure.subfigures(2, 1, hspace=0.03)
    for row, (strategy, title) in zip(rows, STRATEGIES.items()):
        plan = plan_documents(lengths, CP_SIZE, strategy=strategy)
        row.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
        held, received = row.subplots(1, 2, sharey=True, width_ratios=(_HELD, _RECEIVED))
        draw_plan(held, received, plan)
        heading = f"KV that it receives, in tokens: {plan.report()['kv_fraction']:.0%} of an all-gather"
        held.set_title("tokens of each rank", loc="left", fontsize=10.5, color=INK)
        received.set_title(heading, loc="left", fontsize=10.5, color=INK)
        received.set_title("all-gather", loc="right", fontsize=10.5, color=_GREY)
    documents = [Patch(color=COLOURS[index], label=f"{index + 1}: {length:,}") for index, length in enumerate(lengths)]
    figure.legend(
        handles=documents,
        title="document: tokens    (work: attention pairs of a rank over the mean of all ranks)",
        title_fontsize=10,
        loc="outside lower center",
        ncols=len(lengths),
        frameon=False,
        fontsize=10,
        labelcolor=INK,
        handlelength=1,
        columnspacing=1.2,
    )
    save_figure(figure, Path(__file__).parent.parent / "images" / "per_doc_and_search.png")


if __name__ == "__main__":
    main()
